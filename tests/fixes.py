"""Every fix that a message prints is applied: which texts there are, and how a test does what one says.

`texts_of` reads the texts off the source. A `Row` makes something wrong, then does what the message printed, from the
message alone; the complaint must be gone. Rows lie in `tests/fix_rows`, by the source file that their fix stands in.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from faults import stop_after
from typer.testing import CliRunner

from lora_trainer.cli.program import app
from lora_trainer.cli.train import train
from lora_trainer.config.load import load_config
from lora_trainer.config.structure import all_keys
from lora_trainer.errors import Problem, StoppedBySignal, TrainerError

SOURCES = Path(__file__).parent.parent / "lora_trainer"
ANY = ".*"
_VALUE = r"\{.*?\}|\[.*\]|\"[^\"]*\"|[^\s,;()]+"


@dataclass(frozen=True, slots=True)
class Text:
    """A fix as it stands in the source, with `.*` for what is filled in."""

    pattern: str
    line: int

    def matches(self, fix: str) -> bool:
        return re.fullmatch(self.pattern, fix, re.DOTALL) is not None

    @property
    def plain(self) -> str:
        return re.sub(r"\\(.)", r"\1", self.pattern)


@cache
def texts_of(file: str) -> tuple[Text, ...]:
    """The fixes of a source file, each way they can be put together."""
    tree = ast.parse((SOURCES / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found: dict[str, int] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        fixes = [keyword.value for keyword in call.keywords if keyword.arg == "fix"]
        if isinstance(call.func, ast.Name) and call.func.id == "Problem":
            fixes += call.args[3:4]
        for pattern in itertools.chain.from_iterable(_patterns(fix, around[-1] if around else tree) for fix in fixes):
            found.setdefault(pattern, call.lineno)
    return tuple(Text(pattern, line) for pattern, line in found.items())


def files_with_fixes() -> list[str]:
    """Source files in which a fix stands."""
    files = (str(file.relative_to(SOURCES)) for file in sorted(SOURCES.rglob("*.py")))
    return [file for file in files if texts_of(file)]


def _patterns(node: ast.expr, scope: ast.AST) -> list[str]:
    """What an expression can amount to, as patterns."""
    match node:
        case ast.Constant(value=str(text)):
            return [re.escape(text)]
        case ast.Constant():
            return []
        case ast.JoinedStr(values=parts):
            texts = (re.escape(p.value) if isinstance(p, ast.Constant) else ANY for p in parts)
            return ["".join(map(str, texts))]
        case ast.IfExp(body=one, orelse=other):
            return [*_patterns(one, scope), *_patterns(other, scope)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in _patterns(left, scope) for b in _patterns(right, scope)]
        case ast.Name(id=name):
            assigned = [pattern for value in _assigned(name, scope) for pattern in _patterns(value, scope)]
            return assigned or [ANY]
    return [ANY]


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(scope):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for element, value in zip(target.elts, node.value.elts, strict=True):
                    if isinstance(element, ast.Name) and element.id == name:
                        yield value


@dataclass
class World:
    """A configuration, a base, images, and a command about them; what is wrong is done to it, and then the fix."""

    folder: Path
    base: Path
    images: Path
    kept: Path
    """Where runs lie that several rows begin with."""
    patch: pytest.MonkeyPatch
    faults: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)
    """What is broken until the fix undoes it."""
    words: list[str] = field(default_factory=list)
    """Overrides."""
    command: Sequence[str] = ()
    """Words of the program before its configuration and overrides; nothing where only the configuration is read."""
    call: Callable[[], object] | None = None
    """Done in place of a command."""

    @property
    def config(self) -> Path:
        return self.folder / "my.yaml"

    def own_images(self) -> Path:
        """A copy of the images, which may be changed; the configuration names it."""
        own = self.folder / "images"
        if not own.is_dir():
            shutil.copytree(self.images, own)
            self.words.append(f"data.dir={own}")
        return own

    def own_base(self) -> Path:
        """A copy of the base, which may be changed; the configuration names it."""
        own = self.folder / "base"
        if not own.is_dir():
            shutil.copytree(self.base, own, copy_function=os.link)
            self.words.append(f"model.path={own}")
        return own

    def trained(self, name: str = "run", *overrides: str, stopped: bool = False) -> Path:
        """The directory of a finished or stopped run, or with a `sweep` section of a sweep; it may be changed."""
        if not (self.kept / name).is_dir():
            with pytest.MonkeyPatch.context() as patch, suppress(StoppedBySignal):
                if stopped:
                    stop_after(patch, 1)
                train(self.config, [f"name={name}", f"output_dir={self.kept}", *overrides])
        own = self.folder / "runs" / name
        shutil.copytree(self.kept / name, own)
        return own

    def program(self, *words: str) -> list[Problem]:
        """Run a command as typed; its problems."""
        done = CliRunner().invoke(app, list(words))
        if isinstance(done.exception, TrainerError):
            return list(done.exception.problems)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return [] if done.exit_code in (0, 7) else [Problem(done.output, fix=done.output)]

    def problems(self) -> list[Problem]:
        """What the command complains of now."""
        try:
            if self.call is not None:
                self.call()
            elif not self.command:
                load_config(self.config, self.words)
            else:
                named = any(word.endswith("my.yaml") for word in self.command)
                takes_config = self.command[0] in ("check", "train", "plan", "sweep", "find-lr") and not named
                return self.program(*self.command, *(["-c", str(self.config)] if takes_config else []), *self.words)
        except TrainerError as error:
            return list(error.problems)
        return []


Step = Callable[[World, Problem], object]


@dataclass(frozen=True)
class Row:
    """Something wrong, and what its fix says."""

    wrong: str | Sequence[str] | Callable[[World], object]
    """Overrides, or what makes the world wrong."""
    mend: Step
    command: Sequence[str] | None = None
    about: str = ""
    """Of the fix, where several are printed."""


def key_values(fix: str) -> list[tuple[str, str]]:
    """The settings that a fix prints, as `key: value` or `key=value`."""
    return re.findall(rf"\b([a-z_]+(?:\.[a-z_0-9]+)*)(?:: |=)({_VALUE})", fix)


def complained_of(problem: Problem) -> str:
    """The key that a problem names first, in backticks."""
    found = re.search(r"`([\w.]+)", problem.what)
    assert found, problem
    return found[1]


def written(number: int = 0) -> Step:
    """The settings that the fix prints are added to the command: the one of this number, or all (-1)."""

    def mend(world: World, problem: Problem) -> None:
        pairs = key_values(str(problem.fix))
        assert pairs, problem
        for key, value in pairs if number < 0 else [pairs[number]]:
            section = complained_of(problem).rpartition(".")[0] if "`" in problem.what else ""
            whole = key if key in all_keys() or "." in key else f"{section}.{key}"
            world.words.append(f"{whole}={value}")

    return mend


def removed(key: str | None = None) -> Step:
    """The setting that is complained of, or this one that the fix names, is taken away."""

    def mend(world: World, problem: Problem) -> None:
        name = complained_of(problem) if key is None else key
        assert key is None or key.rpartition(".")[2] in str(problem.fix), problem
        kept = [word for word in world.words if not word.startswith(f"{name}=")]
        assert len(kept) < len(world.words), (name, world.words)
        world.words[:] = kept

    return mend


def valued(pattern: str = r"write ([^\s,;]+)", key: str | None = None) -> Step:
    """What is complained of gets the value that the fix prints."""

    def mend(world: World, problem: Problem) -> None:
        found = re.search(pattern, str(problem))
        assert found, problem
        world.words.append(f"{key or complained_of(problem)}={found[1]}")

    return mend


def said(fragment: str, act: Callable[[World], object]) -> Step:
    """What a person does who reads this in the fix."""

    def mend(world: World, problem: Problem) -> None:
        assert fragment in str(problem), problem
        act(world)

    return mend


def typed(pattern: str = "(lora-trainer .*)") -> Step:
    """The command line that the fix prints is typed, and does what it says."""

    def mend(world: World, problem: Problem) -> None:
        found = re.search(pattern, str(problem.fix))
        assert found, problem
        assert world.program(*found[1].strip("`").split()[1:]) == []
        world.command, world.call = (), lambda: None

    return mend


def apply(row: Row, world: World, texts: Sequence[Text]) -> set[Text]:
    """Make it wrong, do what the fix says, and see that the complaint is gone; the texts that were reached."""
    if callable(row.wrong):
        row.wrong(world)
    else:
        world.words += [row.wrong] if isinstance(row.wrong, str) else row.wrong
    if row.command is not None:
        world.command = row.command
    complaints = world.problems()
    reached = [
        (text, problem)
        for problem in complaints
        for text in texts
        if text.matches(str(problem.fix)) and row.about in str(problem)
    ]
    assert reached, f"no fix of this file is printed: {[str(problem) for problem in complaints]}"
    problem = reached[0][1]
    row.mend(world, problem)
    assert [str(left) for left in world.problems()] == [], problem
    exact = {text for text, said in reached if said is problem and text.pattern != ANY}
    return exact or {text for text, _ in reached}
