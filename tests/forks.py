"""Commands in forks of this process, each with its own limits of time and memory: what a hostile input may cost."""

from __future__ import annotations

import gc
import io
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CPU_S, WALL_S, MORE_BYTES, MOST_LETTERS = 5, 40, 2**30, 20_000
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 75}
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    def faults(self, refused: bool | None = None) -> list[str]:
        """What it did that no input may bring about.

        Args:
            refused: whether the input is wrong for sure, or right for sure.
        """
        found = [] if self.code in DOCUMENTED else [f"exit {self.code}"]
        if refused is not None and refused != (self.code not in (0, 7)):
            found.append(f"exit {self.code}, {'not ' * refused}refused")
        for name, text in (("stdout", self.out), ("stderr", self.err)):
            if "Traceback" in text:
                found.append(f"a traceback on {name}")
            if letter := _UNSEEN.search(text):
                found.append(f"{letter[0]!r} on {name}")
            if len(text) > MOST_LETTERS:
                found.append(f"{len(text)} letters on {name}")
        if self.code not in (0, 7) and (told := self.err.count("lora-trainer: ")) != 1:
            found.append(f"{told} messages")
        return found


def in_fork(arguments: Sequence[str], folder: Path) -> Outcome:
    """Run the program in a fork; it finds standard output and error as at a start of its own."""
    files = folder / "stdout", folder / "stderr"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = _program(arguments, folder)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err = (file.read_bytes().decode(errors="surrogateescape") for file in files)
    return Outcome(os.waitstatus_to_exitcode(status), out, err)


def _program(arguments: Sequence[str], folder: Path) -> int:
    gc.disable()
    os.chdir(folder)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = io.TextIOWrapper(io.FileIO(number, "wb", closefd=False), encoding="utf-8", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MORE_BYTES
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + CPU_S, int(spent) + CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(WALL_S)
    from lora_trainer.cli.program import main

    try:
        main(list(arguments))
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:  # noqa: BLE001 - whatever it is, a traceback is what is looked for
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return 0
