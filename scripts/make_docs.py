"""Write the pages of docs/ that come from the code; with --check, only say whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from make_gallery import page

from lora_trainer.config.describe import describe

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"config.md": describe, "schedules.md": page}


def main() -> int:
    stale = [name for name, write in PAGES.items() if not is_current(DOCS / name, write())]
    if "--check" not in sys.argv:
        for name in stale:
            (DOCS / name).write_text(PAGES[name]())
            print(f"wrote docs/{name}")
        return 0
    for name in stale:
        print(f"docs/{name} is out of date: run scripts/make_docs.py")
    return len(stale)


def is_current(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
