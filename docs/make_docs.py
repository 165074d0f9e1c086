"""Write what comes from the code in the pages of docs/; with --check, only say whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from config_page import describe
from make_gallery import page

from lora_trainer.config.optimizers import OPTIMIZERS

DOCS = Path(__file__).resolve().parent


def learning_rates() -> str:
    """The page as it is written by hand, but for the table of usual ranges."""
    before, heading, rest = (DOCS / "learning_rates.md").read_text().partition("### Usual ranges\n")
    told, _, after = rest.partition("| optimizer |")
    return before + heading + told + usual_ranges() + after[after.index("\n\n") + 1 :]


def usual_ranges() -> str:
    """The optimizers by their usual range of base learning rates."""
    kinds: dict[tuple[float, float], list[str]] = {}
    for name, row in OPTIMIZERS.items():
        kinds.setdefault(row.usual_lr, []).append(name)
    rows = [f"| {', '.join(names)} | {_number(low)} | {_number(high)} |" for (low, high), names in kinds.items()]
    return "\n".join(["| optimizer | from | to |", "|---|---|---|", *rows]) + "\n"


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


PAGES = {"config.md": describe, "schedules.md": page, "learning_rates.md": learning_rates}


def main() -> int:
    stale = [name for name, write in PAGES.items() if not is_current(DOCS / name, write())]
    if "--check" not in sys.argv:
        for name in stale:
            (DOCS / name).write_text(PAGES[name]())
            print(f"wrote docs/{name}")
        return 0
    for name in stale:
        print(f"docs/{name} is out of date: run docs/make_docs.py")
    return len(stale)


def is_current(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
