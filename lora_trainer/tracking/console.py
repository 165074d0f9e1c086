"""What a person sees: the plan, progress bars with the time left, and one line of numbers that moves along."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from lora_trainer.errors import StoppedBySignal, printable
from lora_trainer.tracking.metrics import StepRow

MEAN_OVER = 100
"""Updates behind the loss that a person sees: that of one update says little."""
PERIOD_S = 30.0
"""Between two lines where there is no terminal."""
SAID_AFTER_S = 2.0
"""What takes longer is said, where no bar shows it."""
ALWAYS_SHOWN = 3
"""First lines of a start, shown whatever the period."""


@contextmanager
def needless(what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """A fault of something that no run needs, as a picture, is told of and ends nothing. A request to stop passes."""
    try:
        yield
    except StoppedBySignal:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a plot, a font or a log comes up with
        tell(f"{what} could not be written ({type(error).__name__}: {error}); the run does not need it")


class MainConsole:
    """The console of the main process; the other processes write nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        is_terminal = sys.stdout is not None and sys.stdout.isatty()  # whatever FORCE_COLOR says
        self.rich = Console(quiet=silent, highlight=False, soft_wrap=True, force_terminal=is_terminal)

    def print(self, text: str) -> None:
        self.rich.print(printable(text), markup=False)

    def drawing(self, text: str) -> None:
        """Lines with colours of their own, which show on a terminal alone."""
        self.rich.print(Text.from_ansi(text))

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """A title and rows of name and value; a value may be longer than the line."""
        self.rich.print(f"\n[bold]{title}[/bold]")
        listed = list(rows)
        width = max((len(name) for name, _ in listed), default=0)
        for name, value in listed:
            self.print(f"  {name:<{width}}  {value}")

    def track(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Pass the items through while a bar shows how many are done and the time left; a line where there is none."""
        started, is_said = time.monotonic(), False
        with self._bar() as bar:
            task = bar.add_task(what, total=total, numbers="")
            for item in items:
                yield item
                bar.advance(task)
                if bar.disable and not is_said and time.monotonic() - started > SAID_AFTER_S:
                    self.print(what)
                    is_said = True

    @contextmanager
    def training(self, num_steps: int, start: int) -> Iterator[TrainingLine]:
        """The bar of the loop."""
        with self._bar() as bar:
            task = bar.add_task("training", total=num_steps, completed=start, numbers="")
            yield TrainingLine(self, bar, task, num_steps)

    def _bar(self) -> progress.Progress:
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            console=self.rich,
            expand=True,
            disable=not self.rich.is_terminal,
        )


class TrainingLine:
    """Mean loss, LR and speed beside the bar; where there is no terminal a plain line now and then."""

    def __init__(self, console: MainConsole, bar: progress.Progress, task: Any, num_steps: int) -> None:
        self._console, self._bar, self._task, self._num_steps = console, bar, task, num_steps
        self._losses: deque[float] = deque(maxlen=MEAN_OVER)
        self._num_shown, self._shown_at = 0, 0.0

    def step(self, row: StepRow) -> None:
        self._losses.append(row.loss)
        loss, speed = fmean(self._losses), row.images_per_s
        numbers = f"loss {loss:.4f} lr {row.lr:.1e} {speed:.1f}/s"
        more = f" (mean of {len(self._losses)})  lr {row.lr:.3e}  {speed:.1f} images/s  grad norm {row.grad_norm:.3f}"
        self.show(row.step, numbers, f"loss {loss:.4f}{more}")

    def advance(self, step: int) -> None:
        """Move the bar and say nothing."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, numbers: str, line: str | None = None) -> None:
        """Numbers beside the bar; without a terminal a line: the first ones, the last one, and one in each period."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        is_due = self._num_shown < ALWAYS_SHOWN or step == self._num_steps or now - self._shown_at >= PERIOD_S
        if self._bar.disable and is_due:
            self._num_shown, self._shown_at = self._num_shown + 1, now
            self._console.print(f"step {step}/{self._num_steps}  {line or numbers}")

    def print(self, text: str) -> None:
        self._console.print(text)
