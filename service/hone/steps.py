"""One look at one job, and the one thing to do about it.

Called by reconcile.py. Level-triggered: it goes by what the store and the backend say now, not by what happened; every
step may be repeated, and being killed between two of them costs time only. Nothing talks to a backend or to the
artefact store inside a transaction.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from hone.backends.base import Backend, Observation, Phase
from hone.crash import crash_point
from hone.errors import IntegrityError, NotFound, StorageError, TemporaryError
from hone.job import TRANSITIONS, Attempt, Event, EventType, Failure, FailureClass, Job, Output, State
from hone.run import Run
from hone.storage import ArtifactStore, JobLayout, read_manifest
from hone.store import Change, Store, output_of

RUNNING_POLL_S = 0.5
"""Between two looks at something that runs."""
WAITING_POLL_S = 30.0
"""Between two looks at something that waits for room; the end of another job wakes it sooner."""
_RETRIED = frozenset({FailureClass.INFRA, FailureClass.PREEMPTED})


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that a step acts on."""

    store: Store
    backend: Backend
    artifacts: ArtifactStore
    grace_s: float
    retry_pause_s: float
    clock: Callable[[], datetime]
    new_nonce: Callable[[], str]


class Step:
    """One step of one job. `job` is as it was last read or written here."""

    def __init__(self, world: World, job: Job) -> None:
        self.world = world
        self.job = job

    def make(self) -> float | None:
        """Do it. The answer is in how many seconds the job wants to be looked at again; None when never."""
        if self.job.delete_time:
            self._delete()
            return None
        if self.job.state.is_terminal:
            return None
        attempt = self._live_attempt()
        if self.job.state == State.CANCELLING:
            return self._cancel(attempt)
        if attempt is None:
            return self._new_attempt()
        return self._drive(attempt)

    def _live_attempt(self) -> Attempt | None:
        attempts = self.job.attempts
        return attempts[-1] if attempts and not attempts[-1].state.is_terminal else None

    def _new_attempt(self) -> float:
        """Record the next attempt; nothing is started before its nonce is stored."""
        attempts = self.job.attempts
        if attempts and (pause := self._pause_after(attempts)) > 0:
            return pause
        with self._change() as change:
            if change.job.state != State.PENDING:
                return 0.0
            now = self.world.clock()
            number = len(change.job.attempts) + 1
            change.add_attempt(
                Attempt(
                    number=number,
                    nonce=self.world.new_nonce(),
                    state=State.PENDING,
                    create_time=now,
                    gpus=self.job.plan.launch.gpus_per_node * self.job.plan.launch.nodes,
                )
            )
        crash_point("attempt-recorded")
        return 0.0

    def _pause_after(self, attempts: tuple[Attempt, ...]) -> float:
        """Seconds until the next attempt may start: twice as long after each that failed."""
        ended = attempts[-1].end_time or attempts[-1].create_time
        pause = self.world.retry_pause_s * 2 ** (len(attempts) - 1)
        return (ended + timedelta(seconds=pause) - self.world.clock()).total_seconds()

    def _drive(self, attempt: Attempt) -> float:
        """Make the backend have the attempt, and the store know what the backend sees."""
        run = self._run(attempt)
        last_seq = self.world.store.last_seqs(self.job)[attempt.number]
        seen = self.world.backend.observe(run, after_seq=last_seq)
        crash_point("observed")
        if seen.phase == Phase.ABSENT:
            if attempt.start_time or last_seq:
                return self._end_attempt(attempt, self._lost(attempt))
            seen = self.world.backend.ensure(run, self.job.plan)
        if seen.events:
            self._store_events(attempt, seen)
            if seen.phase in (Phase.SUCCEEDED, Phase.FAILED):
                return 0.0  # there may be more of them
        if seen.phase == Phase.SUCCEEDED:
            return self._succeed(attempt, seen)
        if seen.phase == Phase.FAILED:
            return self._end_attempt(attempt, seen)
        return self._wait(attempt, seen) if seen.phase == Phase.WAITING else self._watch(attempt, seen)

    def _store_events(self, attempt: Attempt, seen: Observation) -> None:
        with self._change() as change:
            if seen.phase == Phase.RUNNING:
                self._to_running(change, attempt, seen)
            change.store_events(attempt.number, seen.events)
        crash_point("events-stored")

    def _wait(self, attempt: Attempt, seen: Observation) -> float:
        if (self.job.state, self.job.state_reason) != (State.QUEUED, seen.reason):
            with self._change() as change:
                change.update_attempt(attempt.number, state=State.QUEUED)
                if (change.job.state, State.QUEUED) in TRANSITIONS or change.job.state == State.QUEUED:
                    change.to_state(State.QUEUED, seen.reason)
        return WAITING_POLL_S

    def _watch(self, attempt: Attempt, seen: Observation) -> float:
        known = self.job.attempts[-1]
        if (self.job.state, known.state, known.start_time) != (State.RUNNING, State.RUNNING, seen.start_time):
            with self._change() as change:
                self._to_running(change, attempt, seen)
        if self._is_too_late(seen):
            self._stop_at_deadline(attempt)
        return RUNNING_POLL_S if seen.start_time else RUNNING_POLL_S / 5

    def _to_running(self, change: Change, attempt: Attempt, seen: Observation) -> None:
        start = seen.start_time
        change.update_attempt(attempt.number, state=State.RUNNING, start_time=start or attempt.start_time)
        if change.job.state in (State.PENDING, State.QUEUED):
            change.to_state(State.RUNNING, f"Attempt {attempt.number} runs.")
        if start and change.job.start_time is None:
            change.set(start_time=start)

    def _is_too_late(self, seen: Observation) -> bool:
        deadline, start = self.job.resolved_spec.scheduling.deadline, seen.start_time
        return bool(deadline and start and (self.world.clock() - start).total_seconds() >= deadline)

    def _stop_at_deadline(self, attempt: Attempt) -> None:
        """Say so first: the event is what tells this end from another, whoever is killed in between."""
        if not self._met_deadline(attempt):
            deadline = self.job.resolved_spec.scheduling.deadline
            with self._change() as change:
                message = f"The attempt is stopped: it has run for {deadline} s (scheduling.deadline)."
                change.tell(EventType.WARNING, message, attempt=attempt.number, fields={"deadline": str(deadline)})
        self.world.backend.stop(self._run(attempt), grace_s=self.world.grace_s)

    def _succeed(self, attempt: Attempt, seen: Observation) -> float:
        """Say SUCCEEDED, after the manifest of every promised output was read back."""
        try:
            outputs = self._read_back(attempt)
        except TemporaryError as error:
            self._explain(f"It has ended well; its outputs cannot be read back yet. {error}")
            raise
        except (NotFound, IntegrityError, StorageError) as error:
            return self._end_attempt(attempt, replace(seen, phase=Phase.FAILED, failure=_unproven(error), final=True))
        crash_point("outputs-read-back")
        with self._change() as change:
            if change.job.state.is_terminal:
                return 0.0
            self._update_ended(change, attempt, seen, state=State.SUCCEEDED)
            kinds = " and ".join(output.kind for output in outputs)
            change.to_state(State.SUCCEEDED, f"Read back: {kinds}." if kinds else "Done.", outputs=outputs)
        crash_point("finished")
        return 0.0

    def _read_back(self, attempt: Attempt) -> tuple[Output, ...]:
        job, layout = self.job, JobLayout(self.job.namespace, self.job.id)
        outputs = {output.kind: output for output in map(output_of, self._told(attempt, EventType.OUTPUT))}
        for kind in job.plan.output_bytes:
            if kind not in outputs:
                raise NotFound(f"The trainer ended well without its output {kind!r}.")
            read_manifest(self.world.artifacts, getattr(layout, kind), digest=outputs[kind].sha256)
        return tuple(outputs[kind] for kind in job.plan.output_bytes)

    def _end_attempt(self, attempt: Attempt, seen: Observation) -> float:
        """Record how an attempt failed, and whether another follows."""
        failure = seen.failure or Failure(failure_class=FailureClass.INTERNAL, message="The attempt failed.")
        stopped = self._met_deadline(attempt)
        if stopped:
            failure = self._deadline_failure(failure)
        again = failure.failure_class in _RETRIED and not seen.final
        is_new = stopped or not self._told(attempt, EventType.FAILURE)
        with self._change() as change:
            if change.job.state.is_terminal or change.attempt(attempt.number).state.is_terminal:
                return 0.0
            self._update_ended(change, attempt, seen, state=State.FAILED, failure=failure)
            if is_new:
                change.tell_failure(attempt.number, failure)
            self._after_failure(change, failure, again=again)
        crash_point("attempt-ended")
        return 0.0

    def _after_failure(self, change: Change, failure: Failure, *, again: bool) -> None:
        job = change.job
        if job.state == State.CANCELLING:
            change.to_state(State.CANCELLED, "It was cancelled; nothing of it runs any more.")
            return
        used = sum(attempt.counted for attempt in job.attempts)
        allowed = job.resolved_spec.scheduling.max_attempts
        disrupted = not job.attempts[-1].counted
        if disrupted or (again and used < allowed):
            number = len(job.attempts)
            change.to_state(State.PENDING, f"Attempt {number} failed and another follows: {failure.message}")
            return
        change.to_state(State.FAILED, failure.message, failure=failure)

    def _update_ended(
        self, change: Change, attempt: Attempt, seen: Observation, *, state: State, failure: Failure | None = None
    ) -> None:
        change.update_attempt(
            attempt.number,
            state=state,
            start_time=seen.start_time or attempt.start_time,
            end_time=seen.end_time or self.world.clock(),
            failure=failure,
            counted=not seen.disrupted,
        )
        if change.job.start_time is None and seen.start_time:
            change.set(start_time=seen.start_time)

    def _met_deadline(self, attempt: Attempt) -> bool:
        return any("deadline" in event.fields for event in self._told(attempt, EventType.WARNING))

    def _told(self, attempt: Attempt, kind: EventType) -> Sequence[Event]:
        """The attempt's events of one type."""
        return self.world.store.events(self.job.namespace, job=self.job, types=(kind,), attempt=attempt.number)

    def _deadline_failure(self, failure: Failure) -> Failure:
        deadline = self.job.resolved_spec.scheduling.deadline
        return replace(
            failure,
            failure_class=FailureClass.USER,
            message=f"The attempt was stopped at its deadline of {deadline} s (scheduling.deadline).",
            next_step="Raise scheduling.deadline, or make the run shorter.",
        )

    def _lost(self, attempt: Attempt) -> Observation:
        """It ran, and nothing is left of it: it must not be started a second time under its number."""
        failure = Failure(
            failure_class=FailureClass.INFRA,
            message=f"Nothing is left of attempt {attempt.number}, which had started: somebody removed it.",
            next_step="Submit it again.",
        )
        return Observation(phase=Phase.FAILED, failure=failure)

    def _cancel(self, attempt: Attempt | None) -> float:
        if attempt is None:
            with self._change() as change:
                if change.job.state == State.CANCELLING:
                    change.to_state(State.CANCELLED, "It was cancelled before anything of it ran.")
            return 0.0
        run = self._run(attempt)
        self.world.backend.stop(run, grace_s=self.world.grace_s)
        crash_point("stop-asked")
        last_seq = self.world.store.last_seqs(self.job)[attempt.number]
        seen = self.world.backend.observe(run, after_seq=last_seq)
        if seen.events:
            with self._change() as change:
                change.store_events(attempt.number, seen.events)
            return 0.0 if seen.phase in (Phase.SUCCEEDED, Phase.FAILED) else RUNNING_POLL_S / 5
        if seen.phase == Phase.RUNNING:
            return RUNNING_POLL_S / 5
        if seen.phase == Phase.SUCCEEDED:
            return self._succeed(attempt, seen)
        with self._change() as change:
            if change.job.state == State.CANCELLING:
                self._update_ended(change, attempt, seen, state=State.CANCELLED, failure=seen.failure)
                change.to_state(State.CANCELLED, "It was cancelled; nothing of it runs any more.")
        return 0.0

    def _delete(self) -> None:
        """Take away what is left of an ended job, the record last: a deletion cut short is taken up again."""
        job, world = self.job, self.world
        for attempt in job.attempts:
            world.backend.remove(self._run(attempt))
        crash_point("runs-removed")
        if world.store.deletes_artifacts(job):
            try:
                world.artifacts.delete(JobLayout(job.namespace, job.id).root)
            except (TemporaryError, StorageError) as error:
                self._tell_once(f"Its artefacts cannot be deleted yet; it is tried again. {error}")
                raise
        crash_point("artifacts-deleted")
        world.store.bury(job.namespace, job.id, now=world.clock())

    def _explain(self, reason: str) -> None:
        """Say why a job stays where it is."""
        with self._change() as change:
            if not change.job.state.is_terminal:
                change.to_state(change.job.state, reason)

    def _tell_once(self, message: str) -> None:
        """Add a warning, unless the job's last event says the same: it is tried again and again."""
        told = self.world.store.events(self.job.namespace, job=self.job, types=(EventType.WARNING,), attempt=0)
        if not told or told[-1].message != message:
            with self._change() as change:
                change.tell(EventType.WARNING, message)

    def _run(self, attempt: Attempt) -> Run:
        return Run(
            namespace=self.job.namespace,
            job=self.job.id,
            attempt=attempt.number,
            nonce=attempt.nonce,
            spec=self.job.resolved_spec,
            launch=self.job.plan.launch,
            store=self.world.artifacts.uri,
            inputs={},
        )

    @contextmanager
    def _change(self) -> Iterator[Change]:
        with self.world.store.change(self.job.namespace, self.job.id, now=self.world.clock()) as change:
            yield change
        self.job = change.written


def _unproven(error: Exception) -> Failure:
    """The trainer said that it had succeeded, and the store says something else."""
    return Failure(
        failure_class=FailureClass.INFRA,
        message=f"The trainer ended well, but its outputs cannot be read back: {error}",
        next_step="Look at the artefact store; nothing of this job counts as complete.",
    )
