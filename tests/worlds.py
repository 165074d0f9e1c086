"""Processes forked from that of a test, so that nothing is imported again: one alone, or several joined by gloo."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

from accelerate import PartialState

from lora_trainer.errors import TrainerError


def run_in_world(num_processes: int, work: Callable[[], object]) -> list[int]:
    """Call `work` in so many processes that find each other as torchrun's would; the exit code of each rank.

    0 is a normal end, 1 a bug with its traceback on stderr, any other number the documented code of an error.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            _be_rank(rank, num_processes, port, work)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_in_a_process(work: Callable[[], object]) -> int:
    """Call `work` in a process of its own; its exit code as that of a rank, negative for a signal."""
    child = os.fork()
    if child == 0:
        _work(work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be_rank(rank: int, num_processes: int, port: int, work: Callable[[], object]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    PartialState._reset_state()  # of the runs in this process before the fork
    _work(work)


def _work(work: Callable[[], object]) -> None:
    code = 1
    try:
        work()
        code = 0
    except TrainerError as error:
        code = error.exit_code
    except:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)  # whatever happened: a child must never go on as a second pytest
