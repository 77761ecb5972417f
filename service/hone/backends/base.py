"""The one thing that the reconciler knows of a backend. Backends know attempts, and nothing of a job's states."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from hone.job import Event, Failure, Plan
from hone.plan import Planned
from hone.run import Run


class Phase(StrEnum):
    """What a backend sees of an attempt."""

    ABSENT = "absent"
    """Never started, or nothing is left of it."""
    WAITING = "waiting"
    """Accepted; no room, or not scheduled yet. Observation.reason says why."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Ended otherwise; Observation.failure says how."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One look at one attempt."""

    phase: Phase
    reason: str = ""
    """Why it waits: one sentence that a person can act on."""
    failure: Failure | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    events: tuple[Event, ...] = ()
    """What the trainer reported after the asked seq, in order; Event.seq is the attempt's own. One look may bring a
    part: the last one of an ended attempt is the one that brings none."""
    disrupted: bool = False
    """The machine was taken away: the attempt does not count."""
    final: bool = False
    """No other attempt may follow, whatever the failure's class: somebody ended this one on purpose."""


class Backend(Protocol):
    """Starts, watches and stops attempts. Every call may be repeated and answers the same."""

    name: str
    max_waiting: int | None
    """How many attempts that found no room are asked for again and again; the jobs behind them stay PENDING unasked.
    None: all of them, where the backend keeps a queue of its own."""

    def check(self, planned: Planned) -> None:
        """Refuse, before anything is recorded, what cannot run here: no such hardware, inputs that are not there.
        Raises InvalidRequest with every violation, or StorageError where this machine is at fault."""

    def ensure(self, run: Run, plan: Plan) -> Observation:
        """Make the attempt be there, exactly once, and look at it. Raises Unavailable when the outcome is unknown."""

    def observe(self, run: Run, *, after_seq: int) -> Observation:
        """Look at the attempt, with the events after the attempt's own `after_seq`."""

    def stop(self, run: Run, *, grace_s: float) -> Observation:
        """Ask it to end, and kill it after the grace; returns at once with what is seen now."""

    def remove(self, run: Run) -> None:
        """Delete what is left of an ended attempt."""

    def logs(self, run: Run, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """What a rank wrote so far, in chunks: from byte `offset` on, or the last `tail` lines of that."""
