"""What surrounds every command that works in a run directory: signals, the exit record, the way errors are shown."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lora_trainer.config.places import EXIT_FILE
from lora_trainer.errors import ConfigError, ExitCode, Problem, StoppedBySignal, SystemSetupError, TrainerError
from lora_trainer.storage import atomic_files, disk_space, locks
from lora_trainer.tracking.console import MainConsole

ECHO_S = 1.0


class StopRequest:
    """Set by the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP; the same signal once more ends the process at once.

    Ctrl-C under a launcher comes twice: from the terminal, and as the launcher's own SIGTERM or death. So another
    signal, or the same one within `ECHO_S`, is no second request. Before anybody asks, nothing has to be finished
    first: then the signal is raised where it falls.
    """

    def __init__(self) -> None:
        self.asked_by: int | None = None
        self.polled = False
        self._asked_at = 0.0

    @property
    def asked(self) -> bool:
        return self.asked_by is not None

    def __call__(self) -> bool:
        self.polled = True
        return self.asked

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            if number == self.asked_by and time.monotonic() - self._asked_at > ECHO_S:
                os._exit(128 + number)
            return
        self.asked_by, self._asked_at = number, time.monotonic()
        if not self.polled:
            what = "stopped as asked before this start's first update; what was saved and cached stays"
            raise StoppedBySignal(Problem(what, fix="the same command goes on"))
        with suppress(OSError):  # the screen may be gone
            os.write(2, b"\nstopping after this update; once more ends at once\n")

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen inside the block; SIGHUP stays ignored where it is (under nohup)."""
        heard = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def report_error(error: TrainerError, *, debug: bool) -> int:
    """Show an error's problems on stderr, and its traceback only where asked; the exit code."""
    sys.stdout.flush()
    problems = "\n".join(f"  {problem}".replace("\n", "\n  ") for problem in error.problems)
    count = f" ({len(error.problems)} problems)" if len(error.problems) > 1 else ""
    print(f"lora-trainer: {error.title}{count}\n{problems}", file=sys.stderr, flush=True)
    if debug:
        traceback.print_exception(error)
    return int(error.exit_code)


def check_output(file: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse to replace what we did not write.

    Raises:
        ConfigError: another's file, a folder or a device is in the way.
    """
    if os.path.lexists(file) and not (file.is_file() and is_ours(file)):
        what = "something that is no file of ours is in the way"
        raise ConfigError(Problem(what, str(file), fix="name another with --output"))


def record_exit(run_dir: Path, code: int | None, status: str, message: str) -> None:
    """`exit.json`: the code, which `accelerate launch` would turn into 1, and the first line of the message.

    While a run goes on the code is null; where a file still says so and nothing runs, the run was killed.
    """
    with suppress(OSError):  # on a full disk the exit code itself still says it
        atomic_files.write_json(run_dir / EXIT_FILE, {"code": code, "status": status, "message": message})


@contextmanager
def writing(run_dir: Path, console: MainConsole, *, fresh: bool) -> Iterator[None]:
    """Be the only writer of a run's directory, and leave the code of a fault inside the block in its `exit.json`.

    Args:
        fresh: move an earlier run aside first.
    """
    with locks.sole_writer(run_dir, console.print):
        if fresh:
            _set_aside(run_dir, console)
        record_exit(run_dir, None, "running", f"started by process {os.getpid()}")
        try:
            with disk_space.faults_in_words():
                yield
        except TrainerError as error:
            record_exit(run_dir, error.exit_code, error.title, str(error.problems[0].what))
            raise
        except Exception as error:
            record_exit(run_dir, ExitCode.BUG, "bug", f"{type(error).__name__}: {error}")
            raise


def check_platform() -> None:
    """Linux and WSL2 are what the trainer is made for and tested on.

    Raises:
        SystemSetupError: this is another system, or docstrings are left out.
    """
    if sys.platform != "linux":
        what = f"lora_trainer runs on Linux and WSL2, not on {sys.platform}"
        raise SystemSetupError(Problem(what, fix="on Windows, start it inside WSL2"))
    if sys.flags.optimize > 1:
        what, why = "Python runs without docstrings", "transformers builds its classes from them"
        raise SystemSetupError(Problem(what, why=why, fix="start it without -OO: unset PYTHONOPTIMIZE"))


def _set_aside(run_dir: Path, console: MainConsole) -> None:
    """Move an old run's files to `<name>.before-1` (2, 3 ...) beside its directory, so that a new run starts empty."""
    old = [path for path in run_dir.iterdir() if path.name != ".lock"]
    if not old:
        return
    numbered = (run_dir.with_name(f"{run_dir.name}.before-{number}") for number in itertools.count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    atomic_files.make_folder(aside)
    for path in old:
        atomic_files.rename(path, aside / path.name)
    atomic_files.sync_folder(aside)
    console.print(f"the earlier run was moved to {aside}")
