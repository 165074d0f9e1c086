"""When a signal is a request to stop, when it is an echo, and when it ends the process at once."""

from __future__ import annotations

import os
import signal

import pytest

from lora_trainer.cli import session
from lora_trainer.cli.session import StopRequest
from lora_trainer.errors import StoppedBySignal


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves; `os._exit` raises `Ended`."""
    now = [100.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    return now


def test_the_first_signal_asks_and_the_same_again_ends_at_once(clock: list[float]) -> None:
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        clock[0] += 2
        with pytest.raises(Ended) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.args == (128 + signal.SIGTERM,)


def test_a_launchers_echo_is_no_second_request(clock: list[float]) -> None:
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within the second
        clock[0] += 20
        signal.raise_signal(signal.SIGTERM)  # the launcher's own
        assert stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_that_ask_without_a_screen(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """SIGUSR1 is what schedulers of clusters often send; the screen may be gone by then."""

    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
    assert signal.getsignal(number) == before


def test_before_the_loop_a_signal_is_raised_where_it_falls() -> None:
    with StopRequest().listening(), pytest.raises(StoppedBySignal, match="before this start's first update"):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("disposition", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_lost_terminal_asks_to_stop_unless_nohup_ignores_it(disposition: signal.Handlers, stops: bool) -> None:
    before = signal.signal(signal.SIGHUP, disposition)
    try:
        with StopRequest().listening() as stop:
            stop()
            signal.raise_signal(signal.SIGHUP)
            assert stop() is stops
    finally:
        signal.signal(signal.SIGHUP, before)
