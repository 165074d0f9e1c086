"""Trials and what came of them: one line each in a file, so that an interrupted torture goes on where it was."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempt to lose a run; `run` says what was lost, None where nothing was."""

    family: str
    key: str
    run: Callable[[], str | None]


class Record:
    """What is known of each trial by `family/key`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.results: dict[str, str | None] = {}
        if file.exists():
            rows = (json.loads(line) for line in file.read_text().splitlines() if line.endswith("}"))
            self.results = {row["trial"]: row["lost"] for row in rows}

    def run(self, trials: Iterable[Trial], seconds: float | None = None) -> bool:
        """Run what has not been run; False if the time given ran out first."""
        due = [trial for trial in trials if f"{trial.family}/{trial.key}" not in self.results]
        started = time.monotonic()
        with self._bar() as bar, self._file.open("a") as file:
            task = bar.add_task("trials", total=len(due), family="")
            for trial in due:
                if seconds is not None and time.monotonic() - started > seconds:
                    return False
                name = f"{trial.family}/{trial.key}"
                self.results[name] = trial.run()
                file.write(json.dumps({"trial": name, "lost": self.results[name]}) + "\n")
                file.flush()
                bar.update(task, advance=1, family=trial.family)
        return True

    def table(self) -> dict[str, dict[str, int]]:
        """Trials passed and made, by family."""
        made = Counter(name.partition("/")[0] for name in self.results)
        passed = Counter(name.partition("/")[0] for name, lost in self.results.items() if lost is None)
        return {family: {"passed": passed[family], "trials": made[family]} for family in made}

    def failures(self) -> dict[str, str]:
        """What was lost, by trial."""
        return {name: lost for name, lost in self.results.items() if lost is not None}

    @staticmethod
    def _bar() -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[family]}"),
        )
