"""The structure of the package, measured: rooms, imports that run up, the longest import chain, long parameter lists.

python tests/house.py              # a table; exits with 1 where a limit is passed
python tests/house.py --root DIR   # of another checkout
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOMS = (
    "cli",
    "experiments",
    "training",
    "report",
    "evidence",
    "planning",
    "lora_files",
    "data",
    "models",
    "diffusion",
    "tracking",
    "runtime",
    "config",
    "schedules",
    "storage",
)
"""Top floor first: a room imports from itself and from those below it."""
FOUNDATION = ("errors", "strict_model", "__init__")
"""Modules that every room may import."""
ROOF = ("__main__", "testing")
"""What may import any room and is imported by none: the program itself, and above it the contracts of plug-ins."""
MOST_LOOSE_MODULES, LONGEST_CHAIN, MOST_PARAMETERS = 4, 18, 5


@dataclass(frozen=True)
class House:
    """The package of one checkout."""

    root: Path

    @cached_property
    def sources(self) -> dict[str, str]:
        """The text of each module by its dotted name."""
        files = sorted((self.root / "lora_trainer").rglob("*.py"))
        names = (".".join(file.relative_to(self.root).with_suffix("").parts) for file in files)
        texts = (file.read_text(encoding="utf-8") for file in files)
        return {name.removesuffix(".__init__"): text for name, text in zip(names, texts, strict=True)}

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        """The syntax tree of each module."""
        return {name: ast.parse(source) for name, source in self.sources.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules of the package that each module imports anywhere, lazily and for types too."""
        return {name: {m for m in imported(tree) if m in self.modules} - {name} for name, tree in self.modules.items()}

    @property
    def num_lines(self) -> int:
        return sum(source.count("\n") for source in self.sources.values())

    @property
    def loose_modules(self) -> list[str]:
        """Modules that lie in no room."""
        files = sorted((self.root / "lora_trainer").glob("*.py"))
        return [file.stem for file in files if not file.stem.startswith("__")]

    def imports_that_run_up(self) -> list[str]:
        """`module -> imported` for each import that does not lead to the same room or a lower one."""
        found = []
        for name, targets in self.imports.items():
            found += [f"{name} -> {target}" for target in targets if floor(target) > floor(name)]
        return sorted(found)

    def longest_chain(self) -> list[str]:
        """The modules of the longest chain of imports, from the top."""
        chains: dict[str, list[str]] = {}

        def chain(name: str) -> list[str]:
            if name not in chains:
                chains[name] = [name]  # a circle would end here
                below = (chain(target) for target in sorted(self.imports[name]))
                chains[name] = [name, *max(below, key=len, default=[])]
            return chains[name]

        return max((chain(name) for name in sorted(self.modules)), key=len)

    def long_parameter_lists(self) -> list[str]:
        """Functions with too many positional parameters; those of the command line do not count."""
        found = []
        for name, tree in self.modules.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not name.startswith("lora_trainer.cli"):
                    given = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                    if len(given) > MOST_PARAMETERS:
                        found.append(f"{name}.{node.name} ({len(given)})")
        return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports; `from a import b` counts as `a.b` where that is a module, and as `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(module: str) -> int:
    """The height of a module's room; 0 for what all may import, and those above the rooms for the roof.

    Raises:
        AssertionError: the module lies in no room.
    """
    parts = module.split(".")
    place = parts[1] if len(parts) > 1 else "__init__"
    if place in FOUNDATION:
        return 0
    if place in ROOF:
        return len(ROOMS) + 1 + ROOF.index(place)
    assert place in ROOMS, f"{module} lies in no room: see docs/architecture.md"
    return len(ROOMS) - ROOMS.index(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    house = House(parser.parse_args().root)
    rows = [
        ("modules in no room", len(house.loose_modules), MOST_LOOSE_MODULES),
        ("longest import chain", len(house.longest_chain()), LONGEST_CHAIN),
        ("imports that run up", len(house.imports_that_run_up()), 0),
        ("functions with more than 5 positional parameters", len(house.long_parameter_lists()), 0),
    ]
    print(f"{len(ROOMS)} rooms, {len(house.modules)} modules, {house.num_lines:,} lines")
    for what, found, limit in rows:
        print(f"{what:<50}{found:>4}  (at most {limit})")
    return int(any(found > limit for _, found, limit in rows))


if __name__ == "__main__":
    sys.exit(main())
