"""One change of one job: collected here, written by the store in one transaction with the events that tell of it.

Pure: what may become of a job, whatever the database.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from hone.errors import InternalError
from hone.job import LOST_AFTER, TRANSITIONS, Attempt, Event, EventType, Failure, Job, Output, Progress, State
from hone.store.rows import failure_fields

_PROGRESS_METRICS = ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "eta_s")


class Change:
    """A job as it is inside the transaction, and what is to become of it."""

    def __init__(self, job: Job, *, last_seqs: Mapping[int, int], now: datetime) -> None:
        self.job = job
        self.now = now
        self.last_seqs = dict(last_seqs)
        """Attempt → its own number of its last stored event."""
        self.changed_attempts: set[int] = set()
        self.events: list[tuple[Event, int | None]] = []
        """New events, each with the number that its attempt gave it."""
        self.logs: list[tuple[int, int, bytes]] = []
        """(attempt, rank, what it wrote last), to be kept."""
        self.delete_artifacts: bool | None = None
        self._before = job

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to write."""
        return bool(
            self.job is not self._before
            or self.changed_attempts
            or self.events
            or self.logs
            or self.delete_artifacts is not None
        )

    @property
    def written(self) -> Job:
        """The job as the store holds it once this is written."""
        return replace(self.job, version=self.job.version + 1, update_time=self.now) if self.is_needed else self.job

    def to_state(self, state: State, reason: str, **changes: Any) -> None:
        """Change the state as TRANSITIONS allows, or only the reason of the same state. Tells it as an event.

        A state that the table does not lead to is a bug: InternalError.
        """
        job = self.job
        if (job.state, job.state_reason) == (state, reason):
            if changes:
                self.set(**changes)
            return
        if job.state != state and (job.state, state) not in TRANSITIONS:
            raise InternalError(f"Job {job.id} cannot go from {job.state} to {state}.")
        if job.state == state and state.is_terminal:
            raise InternalError(f"Job {job.id} is {state}, which never changes.")
        if state.is_terminal:
            changes.setdefault("end_time", self.now)
        self.set(state=state, state_reason=reason, **changes)
        self.tell(EventType.STATE, reason, fields={"state": str(state), "reason": reason})

    def set(self, **changes: Any) -> None:
        """Change what is not the state."""
        self.job = replace(self.job, **changes)

    def tell(self, kind: EventType, message: str, *, attempt: int = 0, fields: Mapping[str, str] | None = None) -> None:
        """Add an event of the service's own."""
        event = Event(seq=0, time=self.now, type=kind, message=message, attempt=attempt, fields=fields or {})
        self.events.append((event, None))

    def add_attempt(self, attempt: Attempt) -> None:
        """Record an attempt before anything of it is started."""
        self.set(attempts=(*self.job.attempts, attempt), progress=None)
        self.last_seqs[attempt.number] = 0
        self.changed_attempts.add(attempt.number)

    def update_attempt(self, number: int, **changes: Any) -> None:
        """Change one attempt."""
        before = self.attempt(number)
        after = replace(before, **changes)
        if after == before:
            return
        self.set(attempts=tuple(after if attempt is before else attempt for attempt in self.job.attempts))
        self.changed_attempts.add(number)

    def attempt(self, number: int) -> Attempt:
        """One attempt of the job."""
        return next(attempt for attempt in self.job.attempts if attempt.number == number)

    def tell_failure(self, number: int, failure: Failure) -> None:
        """Add the event of a failure that the attempt could not report itself."""
        self.tell(EventType.FAILURE, failure.message, attempt=number, fields=failure_fields(failure))

    def keep_logs(self, number: int, tails: Mapping[int, bytes]) -> None:
        """Keep what the ranks of an attempt wrote last, in place of what was kept of them before."""
        self.logs += [(number, rank, data) for rank, data in tails.items()]

    def store_events(self, number: int, events: Iterable[Event]) -> int:
        """Add what an attempt reported; what is there already is passed over, what comes after a gap is not taken,
        unless a warning says that what belongs there is lost.

        The answer is the attempt's own number of the last event that is stored now.
        """
        last = self.last_seqs[number]
        taken = []
        for event in sorted(events, key=lambda event: event.seq):
            if event.seq == last + 1 or (event.seq > last and event.fields.get(LOST_AFTER) == str(last)):
                taken.append(event)
                last = event.seq
        if taken:
            self.events += [(replace(event, attempt=number), event.seq) for event in taken]
            self.last_seqs[number] = last
            self.changed_attempts.add(number)
            if self.job.attempts[-1].number == number:
                self.set(progress=progress_after(self.job.progress, taken))
        return last


def progress_after(progress: Progress | None, events: Sequence[Event]) -> Progress | None:
    """How far a run is, after these events of it."""
    for event in events:
        if event.type == EventType.PHASE:
            progress = replace(progress or Progress(), phase=event.fields.get("phase", ""))
        elif event.type == EventType.PROGRESS:
            metrics = event.metrics
            known: dict[str, Any] = {name: metrics[name] for name in _PROGRESS_METRICS if name in metrics}
            before = progress or Progress()
            progress = replace(
                before,
                step=event.step if event.step is not None else before.step,
                max_steps=int(metrics.get("max_steps", before.max_steps)),
                **known,
            )
    return progress


def output_of(event: Event) -> Output:
    """The output that an event tells of. Raises KeyError or ValueError when it does not."""
    fields = event.fields
    return Output(
        kind=fields["kind"],
        uri=fields["uri"],
        size_bytes=int(fields["size_bytes"]),
        sha256=fields["sha256"],
        attempt=event.attempt,
    )
