"""The one thing that the reconciler knows of a backend. Backends know attempts, and nothing of a job's states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from hone.findings import Finding
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
    """Why it waits, or what keeps one that runs from going on: one sentence that a person can act on."""
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


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Which attempt something in the backend belongs to."""

    namespace: str
    job: str
    attempt: int
    nonce: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why something cannot be seen at the moment."""

    what: str
    """jobs in team-a, …"""
    why: str
    since: datetime


@dataclass(frozen=True, kw_only=True)
class ForeignJob:
    """Something that a person started past the service: shown, and never touched."""

    namespace: str
    uid: str
    name: str
    create_time: datetime
    run: Run | None
    """What it runs; None when that cannot be read."""
    problem: str
    """Why it cannot be read."""
    seen: Observation


class Backend(Protocol):
    """Starts, watches and stops attempts. Every call may be repeated and answers the same."""

    name: str
    poll_s: float
    """Seconds between two looks at an attempt that runs."""
    keeps_ended: bool
    """Whether what is left of an ended attempt stays until its job is deleted. Else it is removed as soon as its logs
    are kept with the job."""
    max_waiting: int | None
    """How many attempts that found no room are asked for again and again; the jobs behind them stay PENDING unasked.
    None: all of them, where the backend keeps a queue of its own."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What cannot be seen at the moment; for health, events and metrics."""

    def close(self) -> None:
        """Let go of everything; attempts run on."""

    def subscribe(self, callback: Callable[[str, str], None]) -> Callable[[], None]:
        """Have (namespace, job id) told when something changed that `observe` would show sooner than the next poll; the
        answer ends that."""

    def check(self, planned: Planned, *, namespace: str) -> None:
        """Refuse, before anything is recorded, what cannot run here: no such hardware, inputs that are not there.
        Raises InvalidRequest with every violation, or StorageError where this machine is at fault."""

    def preflight(self, run: Run, plan: Plan) -> Sequence[Finding]:
        """A look at everything that a run names, without one; starts nothing, and may take minutes."""

    def manifest(self, planned: Planned, *, namespace: str) -> str:
        """What a person would apply to run it without a service; empty where there is no such thing."""

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

    def rescue(self, run: Run, *, after_seq: int) -> tuple[Sequence[Event], Mapping[int, bytes]]:
        """What may be lost once it is asked to end: events that nobody received, and what `tail_logs` tells. Nothing
        where it does not run, was asked already, or keeps these itself."""

    def tail_logs(self, run: Run) -> Mapping[int, bytes]:
        """The last 1 MiB of each rank, to be kept with the job; of a backend that keeps logs itself, none."""

    def present(self) -> Sequence[Owner]:
        """Attempts of which something is there, as far as that is known; where `keeps_ended`, none."""

    def owner_of(self, namespace: str, pod: str, uid: str) -> Owner | None:
        """The attempt that a pod belongs to; None where it belongs to none. Raises Unavailable when nobody can tell."""

    def foreign(self) -> Sequence[ForeignJob]:
        """What people started past the service."""

    def foreign_logs(self, uid: str, *, rank: int, tail: int | None = None, offset: int = 0) -> Iterator[bytes]:
        """What a rank of such a one wrote."""
