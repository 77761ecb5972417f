"""Jobs that people started past the service (`kubectl apply`): shown in lists and watches, and never touched.

Called by reconcile.py. Keyed by what Kubernetes never uses again, the Job's uid; such a job gets no id that is taken.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from hone.backends.base import Backend, ForeignJob, Observation, Phase
from hone.errors import AlreadyExists, HoneError, UserError
from hone.job import TRANSITIONS, Attempt, Failure, FailureClass, Job, Output, State
from hone.plan import Planned
from hone.results import recorded_outputs
from hone.spec import JobSpec
from hone.storage import ArtifactStore, JobLayout
from hone.store import Store

_STATES = {
    Phase.ABSENT: State.PENDING,
    Phase.WAITING: State.QUEUED,
    Phase.RUNNING: State.RUNNING,
    Phase.SUCCEEDED: State.SUCCEEDED,
    Phase.FAILED: State.FAILED,
}
_log = logging.getLogger(__name__)


class Observer:
    """Keeps the records of foreign jobs true. One thread calls it."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        artifacts: ArtifactStore,
        *,
        planner: Callable[[JobSpec], Planned],
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._backend, self._artifacts = store, backend, artifacts
        self._planner, self._clock = planner, clock
        self._complained: set[str] = set()

    def look(self) -> None:
        """Record what is new, tell what changed, and end what is gone. Raises Unavailable: look again."""
        found = self._backend.foreign()
        for foreign in found:
            job = self._store.of_uid(foreign.uid) or self._record(foreign)
            if job and not job.state.is_terminal:
                self._tell(job, foreign.seen, foreign.run.store if foreign.run else "")
        known = {foreign.uid for foreign in found}
        for job in self._store.observed():
            if job.uid not in known:
                self._tell(job, _REMOVED, "")

    def _record(self, foreign: ForeignJob) -> Job | None:
        try:
            if foreign.run is None:
                raise UserError(foreign.problem)
            job = self._new_job(foreign, foreign.run.spec)
            try:
                return self._store.create(job)
            except AlreadyExists:
                return self._store.create(replace(job, id=f"{job.id[:44]}-{job.uid[:5]}"))
        except HoneError as error:
            if foreign.uid not in self._complained:
                self._complained.add(foreign.uid)
                _log.warning("Job %s/%s is not shown: %s", foreign.namespace, foreign.name, error)
            return None

    def _new_job(self, foreign: ForeignJob, spec: JobSpec) -> Job:
        plan = self._planner(spec).plan
        return Job(
            namespace=foreign.namespace,
            id=foreign.name,
            uid=foreign.uid,
            requested_spec=spec,
            resolved_spec=spec,
            plan=plan,
            state=State.PENDING,
            state_reason="It was applied by kubectl; the service shows it and does not touch it.",
            creator="",
            create_time=foreign.create_time,
            update_time=self._clock(),
            version=1,
            observed=True,
        )

    def _tell(self, job: Job, seen: Observation, store: str) -> None:
        state = _STATES[seen.phase]
        reason = seen.failure.message if seen.failure else seen.reason or _REASONS.get(state, job.state_reason)
        if (job.state, job.state_reason) == (state, reason):
            return
        outputs = self._outputs(job, store) if state == State.SUCCEEDED else ()
        with self._store.change(job.namespace, job.id, now=self._clock()) as change:
            if change.job.state.is_terminal:
                return
            if not change.job.attempts:
                change.add_attempt(self._first_attempt(job))
            if change.job.state != state and (change.job.state, state) not in TRANSITIONS:
                return  # seen between two looks of which the first is the later one; the next look tells
            change.update_attempt(
                1, state=state, start_time=seen.start_time, end_time=seen.end_time, failure=seen.failure
            )
            if seen.start_time and change.job.start_time is None:
                change.set(start_time=seen.start_time)
            if seen.failure:
                change.tell_failure(1, seen.failure)
            change.to_state(state, reason, outputs=outputs, failure=seen.failure)

    def _first_attempt(self, job: Job) -> Attempt:
        launch = job.plan.launch
        gpus = launch.gpus_per_node * launch.nodes
        return Attempt(number=1, nonce="", state=State.PENDING, create_time=job.create_time, gpus=gpus)

    def _outputs(self, job: Job, store: str) -> Sequence[Output]:
        """What it left, where this service can read it."""
        if store != self._artifacts.uri:
            return ()
        try:
            found = recorded_outputs(self._artifacts, JobLayout(job.namespace, job.id), job.resolved_spec)
        except HoneError as error:
            _log.warning("Job %s/%s: its outputs cannot be read: %s", job.namespace, job.id, error)
            return ()
        return tuple(found.values())


_REASONS = {State.RUNNING: "It runs.", State.SUCCEEDED: "Done."}
_REMOVED = Observation(
    phase=Phase.FAILED,
    failure=Failure(
        failure_class=FailureClass.USER,
        message="Its Job was deleted before it had ended.",
        next_step="Apply it again; results that are complete are found and kept.",
    ),
)
