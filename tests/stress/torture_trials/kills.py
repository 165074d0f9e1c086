"""SIGKILL at every operation on the disk and at random times, also while a run resumes; SIGTERM; a second writer."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from signal import SIGKILL, SIGTERM

from stress.torture_trials.faults import kill_at, moments
from stress.torture_trials.record import Trial
from stress.torture_trials.world import World, kill

from lora_trainer.errors import ExitCode
from lora_trainer.storage.locks import sole_writer
from lora_trainer.tracking.metrics import step_rows

LONG = ("train.max_steps=24", "checkpoint.every_steps=6", "export.every_steps=null")


def at_every_operation(world: World, stride: int = 1) -> Iterator[Trial]:
    """Kill before and after every operation of the run, then of the resume after a kill in its middle."""
    straight = len(moments(lambda: world.train_quietly("counted")))
    world.forget("counted")
    for number in range(0, straight, stride):
        yield Trial("kill at every operation", f"{number}", _kill_once(world, number))
    world.attempt("half", prepare=kill_at(straight // 2))
    world.copy("half", "counted")
    resumed = len(moments(lambda: world.train_quietly("counted")))
    world.forget("counted")
    for number in range(0, resumed, stride):
        yield Trial("kill at every operation of a resume", f"{number}", _kill_resume(world, "half", number))


def _kill_once(world: World, number: int) -> Callable[[], str | None]:
    return lambda: _killed(world, f"kill-{number}", number)


def _kill_resume(world: World, killed: str, number: int) -> Callable[[], str | None]:
    def run() -> str | None:
        place = f"kill-resume-{number}"
        world.copy(killed, place)
        return _killed(world, place, number)

    return run


def _killed(world: World, place: str, number: int) -> str | None:
    if (code := world.attempt(place, prepare=kill_at(number))) != -SIGKILL:
        return f"the kill at {number} did not happen: the run ended with {code}"
    lost = world.finished_like_reference(place)
    world.forget(place)
    return lost


def at_random(world: World, seed: int, count: int) -> Iterator[Trial]:
    """One to five kills per run at random times, so that resumes are killed too."""
    usual = _duration(world)
    for index in range(count):
        yield Trial("random kills, 1-5 per run", f"{index}", _random_kills(world, seed, index, usual))


def _random_kills(world: World, seed: int, index: int, usual: float) -> Callable[[], str | None]:
    def run() -> str | None:
        draw = random.Random(f"kills {seed} {index}")
        place = f"random-{index}"
        for _ in range(draw.randint(1, 5)):
            pid = world.start(place)
            time.sleep(draw.uniform(0, usual))
            kill(pid)
        lost = world.finished_like_reference(place)
        world.forget(place)
        return lost

    return run


def terminated(world: World, seed: int, count: int) -> Iterator[Trial]:
    """SIGTERM at random times: saved at the current step, exit 75, the resume as ever."""
    world.reference(LONG)
    usual = _duration(world, LONG)
    for index in range(count):
        yield Trial("SIGTERM", f"{index}", _terminate(world, seed, index, usual))


def _terminate(world: World, seed: int, index: int, usual: float) -> Callable[[], str | None]:
    def run() -> str | None:
        place = f"term-{index}"
        pid = world.start(place, LONG)
        log = world.run_dir(place) / "metrics.jsonl"
        _until(pid, lambda: log.exists() and log.stat().st_size > 0)  # a signal before only ends the start
        time.sleep(random.Random(f"terms {seed} {index}").uniform(0, 0.6 * usual))
        code = kill(pid, SIGTERM)
        if code not in (ExitCode.STOPPED, ExitCode.DONE):
            return f"exit code {code}: {world.log(place)[-300:]}"
        if code == ExitCode.STOPPED:
            newest = max((world.run_dir(place) / "checkpoints").glob("step-*")).name
            done = step_rows(log)[-1]["step"]
            if newest != f"step-{done:08d}":
                return f"{done} updates were done and {newest} was saved"
            if json.loads((world.run_dir(place) / "exit.json").read_text())["code"] != ExitCode.STOPPED:
                return "exit.json has another code"
        lost = world.finished_like_reference(place, LONG)
        world.forget(place)
        return lost

    return run


def second_writers(world: World, count: int) -> Iterator[Trial]:
    """A run in a directory that another process writes is refused; once that one is killed, it is not."""
    for index in range(count):
        yield Trial("second writer", f"{index}", _second_writer(world, index))


def _second_writer(world: World, index: int) -> Callable[[], str | None]:
    def run() -> str | None:
        place = f"writer-{index}"

        def hold() -> None:
            with sole_writer(world.run_dir(place), print):
                time.sleep(600)

        holder = world.start(place, prepare=hold)
        lock = world.run_dir(place) / ".lock"
        _until(holder, lambda: lock.exists() and bool(lock.read_text()))
        code = world.attempt(place)
        said = f"pid {holder}" in world.log(place)
        kill(holder)
        if code != ExitCode.ENVIRONMENT or not said:
            return f"the second writer ended with {code}"
        lost = world.finished_like_reference(place)
        world.forget(place)
        return lost

    return run


def _until(pid: int, come: Callable[[], bool]) -> None:
    """Wait for something that a child does; an error where the child ends before."""
    while not come():
        time.sleep(0.002)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None and not come():
            raise AssertionError(f"the child {pid} ended before it did what was waited for")


def _duration(world: World, overrides: tuple[str, ...] = ()) -> float:
    """Seconds of an undisturbed start: the middle of three."""
    took = []
    for number in range(3):
        started = time.monotonic()
        world.attempt(f"timed-{number}", overrides)
        took.append(time.monotonic() - started)
        world.forget(f"timed-{number}")
    return sorted(took)[1]
