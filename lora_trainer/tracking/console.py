"""What a person sees: the plan, progress bars with the time left, and one line of numbers that moves along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console

from lora_trainer.errors import printable
from lora_trainer.tracking.metrics import StepRow


class MainConsole:
    """The console of the main process; the other processes write nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        self.rich = Console(quiet=silent, highlight=False, soft_wrap=True)

    def print(self, text: str) -> None:
        self.rich.print(printable(text), markup=False)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """A title and rows of name and value; a value may be longer than the line."""
        self.rich.print(f"\n[bold]{title}[/bold]")
        listed = list(rows)
        width = max((len(name) for name, _ in listed), default=0)
        for name, value in listed:
            self.print(f"  {name:<{width}}  {value}")

    def track(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Pass the items through while a bar shows how many are done and the time left."""
        with self._bar() as bar:
            task = bar.add_task(what, total=total, numbers="")
            for item in items:
                yield item
                bar.advance(task)

    @contextmanager
    def training(self, num_steps: int, start: int) -> Iterator[TrainingLine]:
        """The bar of the loop."""
        with self._bar() as bar:
            task = bar.add_task("training", total=num_steps, completed=start, numbers="")
            yield TrainingLine(self, bar, task, num_steps)

    def _bar(self) -> progress.Progress:
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            console=self.rich,
            disable=not self.rich.is_terminal,
        )


class TrainingLine:
    """Loss, LR and speed beside the bar; a plain line per step where there is no terminal."""

    def __init__(self, console: MainConsole, bar: progress.Progress, task: Any, num_steps: int) -> None:
        self._console, self._bar, self._task, self._num_steps = console, bar, task, num_steps

    def step(self, row: StepRow) -> None:
        numbers = f"loss {row.loss:.4f}  lr {row.lr:.3e}  {row.images_per_s:.1f} images/s"
        self.show(row.step, numbers, f"  grad norm {row.grad_norm:.3f}")

    def advance(self, step: int) -> None:
        """Move the bar and say nothing."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, numbers: str, more: str = "") -> None:
        """Numbers beside the bar; `more` only where there is no terminal."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        if self._bar.disable:
            self._console.print(f"step {step}/{self._num_steps}  {numbers}{more}")

    def print(self, text: str) -> None:
        self._console.print(text)
