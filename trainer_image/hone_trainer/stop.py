"""Being asked to stop: what the supervisor does with SIGTERM, and with another node's end."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed
from hone_trainer.process import STOP_SIGNALS, unblock_stop_signals

PEER_SIGNAL = signal.SIGUSR1
"""The gang's thread sends it to its own process, so that the main thread leaves what it waits for."""


def interrupted() -> RunFailed:
    """What a run ends with that was asked to stop."""
    return RunFailed(TrainerExit.INTERRUPTED, "The run was asked to stop (SIGTERM) and stopped.")


class Stop:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        """By the monotonic clock."""
        self._at_once = False

    def ask(self, _signal: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked_at = self.asked_at or time.monotonic()
        self._leave(interrupted())

    def hear_of_peer(self, _signal: int, _frame: FrameType | None) -> None:
        """Another node ended; the gang knows why."""
        self._leave(RunFailed(TrainerExit.PEER_LOST, "Another node ended the run."))

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A phase of the supervisor's own, such as a download: a signal ends it where it stands."""
        if self.asked_at is not None:
            raise interrupted()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _leave(self, error: RunFailed) -> None:
        if self._at_once:
            self._at_once = False  # a second signal must not interrupt the way out
            raise error


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Hear stop signals, until the block ends."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in STOP_SIGNALS}
    before[PEER_SIGNAL] = signal.signal(PEER_SIGNAL, stop.hear_of_peer)
    unblock_stop_signals()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_for_peer() -> None:
    """Called in the gang's thread."""
    os.kill(os.getpid(), PEER_SIGNAL)
