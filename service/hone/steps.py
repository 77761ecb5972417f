"""One look at one job, and the one thing to do about it.

Called by reconcile.py. Level-triggered: it goes by what the store and the backend say now, not by what happened; every
step may be repeated, and being killed between two of them costs time only. Nothing talks to a backend or to the
artefact store inside a transaction.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from hone.backends.base import Backend, Observation, Phase
from hone.checkpoints import checkpoints, resume_points
from hone.crash import crash_point
from hone.errors import (
    IntegrityError,
    StorageError,
    TemporaryError,
    Unavailable,
    UserError,
    WrongState,
)
from hone.failures import input_missing, lost, too_late, unproven
from hone.job import TRANSITIONS, Attempt, Event, EventType, Failure, FailureClass, Job, State
from hone.references import places, waits_for
from hone.results import promised_outputs, push_sentence
from hone.run import ResumePoint, Run, is_retried
from hone.storage import ArtifactStore, JobLayout
from hone.store import Change, Store

STOPPING_POLL_S = 0.1
"""Between two looks at something that was asked to end."""
LONGEST_PAUSE_S = 300.0
"""Between two attempts."""
DEPENDENCY_POLL_S = 2.0
"""Between two looks at a job whose output another one waits for."""
WAITING_POLL_S = 30.0
"""Between two looks at something that waits for room; the end of another job wakes it sooner."""


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
        self._tails: Mapping[int, bytes] = {}

    def make(self) -> float | None:
        """Do it. The answer is in how many seconds the job wants to be looked at again; None when never."""
        if self.job.delete_time:
            self._delete()
            return None
        if self.job.observed:
            return None  # told by observed.py, and never touched
        if self.job.state.is_terminal or self.job.state == State.PAUSED:
            return self._let_go()
        attempt = self._live_attempt()
        if self.job.state in (State.CANCELLING, State.PAUSING):
            return self._end_on_request(attempt)
        if attempt is None:
            return self._new_attempt()
        try:
            return self._drive(attempt)
        except Unavailable as error:
            if self.job.state in (State.PENDING, State.QUEUED):
                self._explain(f"It cannot be seen to at the moment, and is tried again. {error}")
            raise

    def _live_attempt(self) -> Attempt | None:
        attempts = self.job.attempts
        return attempts[-1] if attempts and not attempts[-1].state.is_terminal else None

    def _new_attempt(self) -> float:
        """Record the next attempt; nothing is started before its nonce is stored."""
        attempts = self.job.attempts
        if attempts and (pause := self._pause_after(attempts)) > 0:
            return pause
        try:
            if reason := waits_for(self.job.resolved_spec, self._find):
                self._explain(reason)
                return DEPENDENCY_POLL_S
        except UserError as error:
            return self._give_up(error)
        if (later := self._let_go()) is not None:
            return later
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

    def _give_up(self, error: UserError) -> float:
        """What it needs will never be there: it ends before anything of it ran."""
        failure = input_missing(error)
        with self._change() as change:
            if change.job.state == State.PENDING:
                change.tell_failure(0, failure)
                change.to_state(State.FAILED, failure.message, failure=failure)
        return 0.0

    def _let_go(self) -> float | None:
        """Remove what the backend need not keep of attempts that have ended; the answer is when to try again."""
        if self.world.backend.keeps_ended:
            return None
        for attempt in self.job.attempts:
            try:
                self.world.backend.remove(self._run(attempt))
            except WrongState:  # a pod of it ends slowly, or what was asked for came about after its end was recorded
                self.world.backend.stop(self._run(attempt), grace_s=self.world.grace_s)
                return 1.0
        crash_point("attempt-let-go")
        return None

    def _pause_after(self, attempts: tuple[Attempt, ...]) -> float:
        """Seconds until the next attempt may start: twice as long after each that failed; disruptions do not count, and
        after a pause there is none."""
        if attempts[-1].state == State.CANCELLED:
            return 0.0
        ended = attempts[-1].end_time or attempts[-1].create_time
        failed = sum(attempt.counted for attempt in attempts)
        pause = min(self.world.retry_pause_s * 2 ** max(failed - 1, 0), LONGEST_PAUSE_S)
        return (ended + timedelta(seconds=pause) - self.world.clock()).total_seconds()

    def _drive(self, attempt: Attempt) -> float:
        """Make the backend have the attempt, and the store know what the backend sees."""
        run = self._run(attempt)
        last_seq = self.world.store.last_seqs(self.job)[attempt.number]
        seen = self.world.backend.observe(run, after_seq=last_seq)
        crash_point("observed")
        if seen.phase == Phase.ABSENT:
            if attempt.start_time or last_seq:
                return self._end_attempt(attempt, Observation(phase=Phase.FAILED, failure=lost(attempt)))
            try:
                inputs = places(self.job.resolved_spec, self._find)
            except UserError as error:
                return self._end_attempt(
                    attempt, replace(seen, phase=Phase.FAILED, failure=input_missing(error), final=True)
                )
            run = Run.of(self.job, attempt, store=run.store, inputs=inputs, resume=self._resume_points(attempt))
            seen = self.world.backend.ensure(run, self.job.plan)
        if seen.events:
            self._store_events(attempt, seen)
            if seen.phase in (Phase.SUCCEEDED, Phase.FAILED):
                return 0.0  # there may be more of them
        if seen.phase in (Phase.SUCCEEDED, Phase.FAILED):
            self._read_logs(attempt)
        if seen.phase == Phase.SUCCEEDED:
            return self._succeed(attempt, seen)
        if seen.phase == Phase.FAILED:
            return self._end_attempt(attempt, seen)
        return self._wait(attempt, seen) if seen.phase == Phase.WAITING else self._watch(attempt, seen)

    def _read_logs(self, attempt: Attempt) -> None:
        """What the ranks wrote last, before it can be gone; kept in the transaction that ends the attempt."""
        self._tails = self.world.backend.tail_logs(self._run(attempt))
        crash_point("logs-read")

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
        if seen.start_time and self.job.state == State.RUNNING:  # a caller may have changed that since the look
            self._explain(seen.reason or _runs(attempt))
        if self._is_too_late(seen):
            self._stop_at_deadline(attempt)
        return self.world.backend.poll_s if seen.start_time else self.world.backend.poll_s / 5

    def _to_running(self, change: Change, attempt: Attempt, seen: Observation) -> None:
        start = seen.start_time
        change.update_attempt(attempt.number, state=State.RUNNING, start_time=start or attempt.start_time)
        if change.job.state in (State.PENDING, State.QUEUED):
            change.to_state(State.RUNNING, _runs(attempt))
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
        self._stop(attempt)

    def _stop(self, attempt: Attempt) -> None:
        """Ask it to end; what may be gone with its end is kept first."""
        run = self._run(attempt)
        events, tails = self.world.backend.rescue(run, after_seq=self.world.store.last_seqs(self.job)[attempt.number])
        if events or tails:
            with self._change() as change:
                change.store_events(attempt.number, events)
                change.keep_logs(attempt.number, tails)
            crash_point("log-rescued")
        self.world.backend.stop(run, grace_s=self.world.grace_s)

    def _succeed(self, attempt: Attempt, seen: Observation) -> float:
        """Say SUCCEEDED, after the manifest of every promised output was read back."""
        try:
            told = self._told(attempt, EventType.OUTPUT)
            outputs = promised_outputs(self.world.artifacts, self.job, attempt, told)
            pushed = push_sentence(self._told(attempt, EventType.NOTE, EventType.WARNING))
        except TemporaryError as error:
            self._explain(f"It has ended well; its outputs cannot be read back yet. {error}")
            raise
        except (UserError, IntegrityError, StorageError) as error:
            return self._end_attempt(attempt, replace(seen, phase=Phase.FAILED, failure=unproven(error), final=True))
        crash_point("outputs-read-back")
        with self._change() as change:
            if change.job.state.is_terminal:
                return 0.0
            self._update_ended(change, attempt, seen, state=State.SUCCEEDED)
            kinds = " and ".join(output.kind for output in outputs)
            reason = f"Read back: {kinds}. {pushed}".strip() if kinds else "Done."
            change.to_state(State.SUCCEEDED, reason, outputs=outputs)
        crash_point("finished")
        return 0.0

    def _end_attempt(self, attempt: Attempt, seen: Observation) -> float:
        """Record how an attempt failed, and whether another follows."""
        failure = seen.failure or Failure(failure_class=FailureClass.INTERNAL, message="The attempt failed.")
        stopped = self._met_deadline(attempt)
        if stopped:
            failure = too_late(failure, self.job.resolved_spec.scheduling.deadline)
        again = is_retried(failure) and not seen.final
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
            self._to_rest(change)
            return
        used = sum(attempt.counted for attempt in job.attempts)
        allowed = job.resolved_spec.scheduling.max_attempts
        disrupted = not job.attempts[-1].counted
        if disrupted or (again and used < allowed):
            if job.state == State.PAUSING:
                self._to_rest(change)
                return
            number = len(job.attempts)
            change.to_state(State.PENDING, f"Attempt {number} failed and another follows: {failure.message}")
            return
        change.to_state(State.FAILED, failure.message, failure=failure)

    def _update_ended(
        self, change: Change, attempt: Attempt, seen: Observation, *, state: State, failure: Failure | None = None
    ) -> None:
        change.keep_logs(attempt.number, self._tails)
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

    def _told(self, attempt: Attempt, *kinds: EventType) -> Sequence[Event]:
        """The attempt's events of these types."""
        return self.world.store.events(self.job.namespace, job=self.job, types=kinds, attempt=attempt.number)

    def _end_on_request(self, attempt: Attempt | None) -> float:
        """Cancel or pause it: what runs is asked to end, and looked at until it has."""
        if attempt is None:
            with self._change() as change:
                self._to_rest(change)
            return 0.0
        run = self._run(attempt)
        self._stop(attempt)
        crash_point("stop-asked")
        last_seq = self.world.store.last_seqs(self.job)[attempt.number]
        seen = self.world.backend.observe(run, after_seq=last_seq)
        if seen.events:
            with self._change() as change:
                change.store_events(attempt.number, seen.events)
            return 0.0 if seen.phase in (Phase.SUCCEEDED, Phase.FAILED) else STOPPING_POLL_S
        if seen.phase == Phase.RUNNING:
            if seen.reason:
                self._explain(seen.reason)
            return STOPPING_POLL_S
        if seen.phase in (Phase.SUCCEEDED, Phase.FAILED):
            self._read_logs(attempt)
        if seen.phase == Phase.SUCCEEDED:
            return self._succeed(attempt, seen)
        if self.job.state == State.PAUSING and self._failed_by_itself(attempt, seen):
            return self._end_attempt(attempt, seen)
        paused = self._where_paused()
        with self._change() as change:
            if change.job.state in (State.CANCELLING, State.PAUSING):
                asked = replace(seen, disrupted=seen.disrupted or change.job.state == State.PAUSING)
                self._update_ended(change, attempt, asked, state=State.CANCELLED, failure=seen.failure)
                self._to_rest(change, paused=paused)
        crash_point("ended-on-request")
        return 0.0

    def _failed_by_itself(self, attempt: Attempt, seen: Observation) -> bool:
        """Whether going on later would not help: what a stop, or a machine, brings about is no reason to fail."""
        is_hopeless = seen.failure is not None and not is_retried(seen.failure)
        return seen.phase == Phase.FAILED and (is_hopeless or self._met_deadline(attempt))

    def _to_rest(self, change: Change, *, paused: str = "It is paused; nothing of it runs.") -> None:
        """The end of a cancellation, or of a pause."""
        if change.job.state == State.CANCELLING:
            ran = any(attempt.start_time for attempt in change.job.attempts)
            reason = "nothing of it runs any more." if ran else "nothing of it ran."
            change.to_state(State.CANCELLED, f"It was cancelled; {reason}")
        elif change.job.state == State.PAUSING:
            change.to_state(State.PAUSED, paused)

    def _where_paused(self) -> str:
        told = checkpoints(self.world.store.checkpoint_events(self.job))
        if complete := [checkpoint.step for checkpoint in told if checkpoint.complete]:
            return f"It is paused, and goes on from step {complete[-1]} when it is resumed."
        return "It is paused. No checkpoint of it is stored: it begins again when it is resumed."

    def _delete(self) -> None:
        """Take away what is left of an ended job, the record last: a deletion cut short is taken up again."""
        job, world = self.job, self.world
        for attempt in () if job.observed else job.attempts:
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
        state = self.job.state
        if self.job.state_reason == reason:
            return
        with self._change() as change:
            if change.job.state == state:
                change.to_state(state, reason)

    def _tell_once(self, message: str) -> None:
        """Add a warning, unless the job's last event says the same: it is tried again and again."""
        told = self.world.store.events(self.job.namespace, job=self.job, types=(EventType.WARNING,), attempt=0)
        if not told or told[-1].message != message:
            with self._change() as change:
                change.tell(EventType.WARNING, message)

    def _run(self, attempt: Attempt) -> Run:
        return Run.of(self.job, attempt, store=self.world.artifacts.uri)

    def _resume_points(self, attempt: Attempt) -> Sequence[ResumePoint]:
        """The same whenever it is asked: what the attempt itself says later of earlier ones is left out."""
        if attempt.number == 1:
            return ()
        told = self.world.store.checkpoint_events(self.job)
        return resume_points(checkpoints(event for event in told if event.attempt < attempt.number))

    def _find(self, job_id: str) -> Job | None:
        return self.world.store.find(self.job.namespace, job_id)

    @contextmanager
    def _change(self) -> Iterator[Change]:
        with self.world.store.change(self.job.namespace, self.job.id, now=self.world.clock()) as change:
            yield change
        self.job = change.written


def _runs(attempt: Attempt) -> str:
    return f"Attempt {attempt.number} runs."
