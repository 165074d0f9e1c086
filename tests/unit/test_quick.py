"""What `scripts/test --quick` leaves out is what starts a process: a test without the mark cannot start one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_a_test_without_the_mark_starts_no_process() -> None:
    with pytest.raises(AssertionError, match=r"pytest\.mark\.process"):
        subprocess.run([sys.executable, "-c", ""], check=False)
    with pytest.raises(AssertionError, match=r"pytest\.mark\.process"):
        os.fork()


@pytest.mark.process
def test_one_with_the_mark_does() -> None:
    assert subprocess.run([sys.executable, "-c", ""], check=False).returncode == 0
