"""The use cases: what a caller can ask of Hone, whatever it came by (gRPC, CLI, a test).

Sync, and safe to call from several threads. A method checks, then asks the store; what has to happen outside happens in
the reconciler, after the answer.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from hmac import compare_digest
from typing import Any
from uuid import uuid4

from hone import paging
from hone.backends.base import Backend
from hone.checkpoints import checkpoints
from hone.crash import crash_point
from hone.creation import Creation, Prepared, check_creation, new_suffix
from hone.errors import AlreadyExists, HoneError, InvalidRequest, NotFound, Refused, Violation, WrongState
from hone.findings import Finding, not_checked, of_error, ok, plan_finding
from hone.job import TRANSITIONS, Attempt, Checkpoint, Event, EventType, Job, MetricSeries, Output, Point, State
from hone.paging import JobPage
from hone.plan import Planned
from hone.plan.continued import continued, plan_on_4_bits
from hone.references import adapter, base, merges_on_4_bits, named, places, references, waits_for
from hone.run import Run
from hone.spec import JobSpec
from hone.spec.combinations import refuse_unserved
from hone.spec.sources import with_sources
from hone.storage import ArtifactStore
from hone.store import Request, Store, condition

PROBE_KEPT_S = 60.0
"""How long the artefact store is believed to be writable."""
_SUBMIT_AGAIN = "Submit it again to run it again."


class Jobs:
    """The jobs of every namespace."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        artifacts: ArtifactStore,
        *,
        planner: Callable[[JobSpec], Planned],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_suffix: Callable[[], str] = new_suffix,
    ) -> None:
        self._store = store
        self._backend = backend
        self._artifacts = artifacts
        self._planner = planner
        self._clock = clock
        self._new_suffix = new_suffix
        self._probe_lock = threading.Lock()
        self._probed_at = float("-inf")

    def plan(self, namespace: str, spec: JobSpec) -> Planned:
        """What would run, also for what this version or this machine does not run. Raises InvalidRequest."""
        planned = self._planned(namespace, spec)
        return replace(planned, manifest=self._backend.manifest(planned, namespace=namespace))

    def preflight(self, namespace: str, spec: JobSpec) -> Sequence[Finding]:
        """Everything that a look at what the request names finds, without recording it; may take minutes."""
        found = [*self._look_at_store()]
        try:
            refuse_unserved(spec)
            planned = self._planned(namespace, spec)
            refuse_unserved(planned.spec)
        except HoneError as error:
            return [*of_error("plan", error), *found]
        found.insert(0, plan_finding(planned.plan))
        try:
            self._backend.check(planned, namespace=namespace)
            inputs = self._inputs(namespace, planned.spec, found)
        except HoneError as error:
            return [*found, *of_error("machine" if self._backend.name == "local" else "cluster", error)]
        run = Run(
            namespace=namespace,
            job="preflight",
            attempt=1,
            nonce="preflight",
            spec=planned.spec,
            launch=planned.plan.launch,
            store=self._artifacts.uri,
            inputs=inputs,
        )
        return [*found, *self._backend.preflight(run, planned.plan)]

    def create(self, namespace: str, spec: JobSpec, **options: Any) -> Job:
        """Record a job; once this returns it is durable. Options are those of Creation.

        Raises InvalidRequest, NotServed, AlreadyExists, RequestIdReused, and what is wrong with the artefact store.
        """
        answer = self.create_all([Creation(namespace=namespace, spec=spec, **options)])[0]
        if isinstance(answer, HoneError):
            raise answer
        return answer

    def create_all(self, wanted: Sequence[Creation]) -> Sequence[Job | HoneError]:
        """Record jobs with as few commits as can be; each answer is what `create` gives or raises."""
        prepared = [self._prepare(creation) for creation in wanted]
        new = [(found.job, found.request) for found in prepared if isinstance(found, Prepared)]
        recorded = iter(self._store.create_all(new))
        return [
            self._renamed(creation, found, next(recorded)) if isinstance(found, Prepared) else found
            for creation, found in zip(wanted, prepared, strict=True)
        ]

    def get(self, namespace: str, job_id: str) -> Job:
        """A job by its id, or by its name while that is unambiguous. Raises NotFound."""
        if job := self._store.find(namespace, job_id):
            return job
        ids = self._store.ids_of_name(namespace, job_id)
        if len(ids) > 1:
            message = f"{job_id!r} names several jobs: {', '.join(ids)}{', …' if len(ids) > 4 else ''}. Give an id."
            raise InvalidRequest([Violation(path="job", value=job_id, message=message)])
        return self._store.get(namespace, ids[0] if ids else job_id)

    def cancel(self, namespace: str, job_id: str) -> Job:
        """Ask a job to end; a second time, or after its end, nothing changes."""
        job = self._managed(namespace, job_id)
        with self._store.change(namespace, job.id, now=self._clock()) as change:
            if not change.job.state.is_terminal and change.job.state != State.CANCELLING:
                change.to_state(State.CANCELLING, "A caller cancelled it; it is being stopped.")
        return change.written

    def pause(self, namespace: str, job_id: str) -> Job:
        """Free what a job holds, so that it can be resumed from its last checkpoint; a second time nothing changes.

        Raises WrongState for a job that is being cancelled or has ended.
        """
        job = self._managed(namespace, job_id, fix="Submit it to the service to have it paused.")
        with self._store.change(namespace, job.id, now=self._clock()) as change:
            state = change.job.state
            if state in (State.PAUSING, State.PAUSED):
                pass
            elif (state, State.PAUSING) not in TRANSITIONS:
                raise WrongState(f"Job {job.id} is {state}: there is nothing to pause.", fix=_SUBMIT_AGAIN)
            elif state == State.PENDING and not _has_live_attempt(change.job):
                change.to_state(State.PAUSED, "It was paused while nothing of it ran.")
            else:
                change.to_state(State.PAUSING, "A caller paused it; it is being stopped.")
        return change.written

    def resume(self, namespace: str, job_id: str) -> Job:
        """Have a paused job go on with another attempt; one that goes on already is left as it is.

        Raises WrongState for a job that is still being paused or cancelled, or has ended.
        """
        job = self._managed(namespace, job_id, fix="Submit it to the service to have it paused and resumed.")
        with self._store.change(namespace, job.id, now=self._clock()) as change:
            state = change.job.state
            if state == State.PAUSED:
                change.to_state(State.PENDING, "A caller resumed it; it goes on as soon as there is room.")
            elif state == State.PAUSING:
                raise WrongState(f"Job {job.id} is still {state}.", fix="Resume it when it is PAUSED.")
            elif state.is_terminal or state == State.CANCELLING:
                raise WrongState(f"Job {job.id} is {state}: it cannot go on.", fix=_SUBMIT_AGAIN)
        return change.written

    def checkpoints(self, namespace: str, job_id: str) -> Sequence[Checkpoint]:
        """What a job's trainers saved to go on from, in that order; what was removed since is not complete."""
        return checkpoints(self._store.checkpoint_events(self.get(namespace, job_id)))

    def delete(self, namespace: str, job_id: str, *, artifacts: bool = False) -> Job:
        """Delete an ended job, its record and its run directories; with `artifacts` its outputs too.

        The answer carries delete_time; the job is gone when the reconciler has done it. Raises WrongState.
        """
        job = self.get(namespace, job_id)
        with self._store.change(namespace, job.id, now=self._clock()) as change:
            if not change.job.state.is_terminal:
                raise WrongState(
                    f"Job {job.id} is {change.job.state}.", fix="Cancel it, and delete it when it has ended."
                )
            if change.job.delete_time is None:
                change.set(delete_time=change.now)
                what = "its record and its outputs" if artifacts else "its record; its outputs stay"
                change.tell(EventType.NOTE, f"Deletion was asked for: {what}.")
                change.delete_artifacts = artifacts
            elif artifacts:
                change.delete_artifacts = True
        return change.written

    def _managed(self, namespace: str, job_id: str, *, fix: str = "") -> Job:
        """A job that is this service's to end. Raises WrongState for one that is only shown."""
        job = self.get(namespace, job_id)
        if job.observed and not job.state.is_terminal:
            raise WrongState(
                f"Job {job.id} was applied by kubectl; this service shows it and does not touch it.",
                fix=fix or f"kubectl delete job {job.id} --namespace {namespace}",
            )
        return job

    def events(
        self, namespace: str, *, job_id: str = "", after_seq: int = 0, limit: int = paging.MAX_PAGE_SIZE
    ) -> Sequence[Event]:
        """History after a number, in order, of one job or of the namespace."""
        if after_seq < 0:
            message = f"{after_seq} is negative; give the number of the last event that was read, or 0."
            raise InvalidRequest([Violation(path="after_seq", value=after_seq, message=message)])
        job = self.get(namespace, job_id) if job_id else None
        return self._store.events(namespace, job=job, after_seq=after_seq, limit=paging.page_size(limit))

    def metrics(
        self,
        namespace: str,
        job_id: str,
        *,
        names: Sequence[str] = (),
        min_step: int = 0,
        max_step: int | None = None,
    ) -> Sequence[MetricSeries]:
        """Reported numbers by name, in order of report; every name, or those asked for."""
        job = self.get(namespace, job_id)
        points: dict[str, list[Point]] = {name: [] for name in names}
        for event in self._store.metric_events(job, min_step=min_step, max_step=max_step):
            for name, value in event.metrics.items():
                if not names or name in points:
                    point = Point(step=event.step or 0, value=value, time=event.time, attempt=event.attempt)
                    points.setdefault(name, []).append(point)
        return [MetricSeries(name=name, points=tuple(found)) for name, found in points.items()]

    def outputs(self, namespace: str, job_id: str) -> Sequence[Output]:
        """What a succeeded job left; nothing before, since nothing is complete before."""
        return self.get(namespace, job_id).outputs

    def logs(
        self,
        namespace: str,
        job_id: str,
        *,
        attempt: int = 0,
        rank: int = 0,
        tail: int | None = None,
        offset: int = 0,
    ) -> Iterator[bytes]:
        """What a rank wrote so far: from byte `offset` on, or the last `tail` lines. Attempt 0 is the newest.

        To follow, ask again with `offset` raised by what came, until the job has ended and nothing more comes.
        """
        job = self.get(namespace, job_id)
        processes = job.plan.launch.world_size
        if not 0 <= rank < processes:
            message = f"{rank} is not a rank of this job, which has {processes}: 0 to {processes - 1}."
            raise InvalidRequest([Violation(path="rank", value=rank, message=message)])
        if job.observed:  # kept by nobody but its pods
            return self._backend.foreign_logs(job.uid, rank=rank, tail=tail, offset=offset)
        if attempt == 0 and not job.attempts:
            return iter(())
        found = _attempt(job, attempt)
        if found.state.is_terminal and not self._backend.keeps_ended:
            kept = self._store.attempt_log(job, number=found.number, rank=rank) or b""
            return iter([_part(kept, tail=tail, offset=offset)])
        return self._backend.logs(Run.of(job, found, store=self._artifacts.uri), rank=rank, tail=tail, offset=offset)

    def report(self, namespace: str, job_id: str, attempt: int, nonce: str, events: Sequence[Event]) -> int:
        """Take what a trainer reports; the answer is the last of its numbers that is stored, the rest it sends again.

        Raises Refused for an attempt that has ended, and for a nonce that is not the attempt's.
        """
        with self._store.change(namespace, job_id, now=self._clock()) as change:
            found = next((a for a in change.job.attempts if a.number == attempt), None)
            if found is None or not compare_digest(found.nonce.encode(), nonce.encode()):
                raise Refused(f"This is not attempt {attempt} of job {job_id}.", fix="Only its own trainer may report.")
            if found.state.is_terminal:
                raise Refused(f"Attempt {attempt} of job {job_id} has ended: nothing more is taken of it.")
            stored = change.store_events(attempt, events)
        crash_point("report-stored")
        return stored

    def list(self, namespace: str, *, page_size: int = 50, page_token: str = "", filter: str = "") -> JobPage:
        """Jobs, newest first. A token continues the listing that gave it, and no other. Raises InvalidRequest."""
        size = paging.page_size(page_size)
        after = paging.read_token(page_token, namespace, filter) if page_token else None
        found = self._store.page(namespace, condition=condition(filter), limit=size + 1, after=after)
        if len(found) <= size:
            return JobPage(jobs=tuple(found))
        shown = tuple(found[:size])
        return JobPage(jobs=shown, next_page_token=paging.token(shown[-1], namespace, filter))

    def _planned(self, namespace: str, spec: JobSpec) -> Planned:
        """The plan; a model that another job leaves, or has yet to leave, has the shape of the one it started from."""
        find = partial(self._store.find, namespace)
        exact, planner = named(spec, lambda job: self.get(namespace, job)), self._planner
        source = exact.model.source
        start = base(source, find)
        if merges_on_4_bits(exact, find):
            planner = partial(plan_on_4_bits, planner)
        if start == source:
            return planner(exact)
        if own := adapter(source, find):
            exact = continued(exact, own)
        planned = planner(with_sources(exact, {source: start}))
        return replace(planned, spec=with_sources(planned.spec, {start: source}))

    def _inputs(self, namespace: str, spec: JobSpec, found: MutableSequence[Finding]) -> Mapping[str, str]:
        """Where the outputs of other jobs lie that a request names; none while one has yet to end."""
        find = partial(self._store.find, namespace)
        if not (named := references(spec)):
            return {}
        if waiting := waits_for(spec, find):
            found.append(not_checked("inputs", waiting))
            return {}
        found.append(ok("inputs", f"{' and '.join(one.text for one in named)}: complete.", how="as the jobs say"))
        return places(spec, find)

    def _look_at_store(self) -> Iterator[Finding]:
        try:
            self._artifacts.probe()
            how = "a small object was written, read back and removed"
            yield ok("store", f"{self._artifacts.uri} takes outputs.", how=how)
        except HoneError as error:
            yield from of_error("store", error)

    def _probe(self) -> None:
        """Find out now, not after hours of training, that outputs could not be stored."""
        with self._probe_lock:
            if time.monotonic() - self._probed_at > PROBE_KEPT_S:
                self._artifacts.probe()
                self._probed_at = time.monotonic()

    def _prepare(self, creation: Creation) -> Prepared | Job | HoneError:
        """What is to be recorded; or the job that the same request made before, or what is wrong."""
        request: Request | None = None
        try:
            request = check_creation(creation)
            refuse_unserved(creation.spec)
            planned = self._planned(creation.namespace, creation.spec)
            refuse_unserved(planned.spec)  # which says what was left to the planner
            self._backend.check(planned, namespace=creation.namespace)
            self._probe()
            job = self._new_job(creation, planned)
        except HoneError as error:
            return self._earlier(creation, request) or error
        if creation.validate_only:
            return self._earlier(creation, request) or job
        return Prepared(job, request)

    def _earlier(self, creation: Creation, request: Request | None) -> Job | HoneError | None:
        """The job that this request made before; asked where recording it would not find out."""
        try:
            return self._store.requested(creation.namespace, request) if request else None
        except HoneError as error:
            return error

    def _new_job(self, creation: Creation, planned: Planned) -> Job:
        now = self._clock()
        return Job(
            namespace=creation.namespace,
            id=creation.job_id or f"{creation.spec.name}-{self._new_suffix()}",
            uid=str(uuid4()),
            requested_spec=creation.spec,
            resolved_spec=planned.spec,
            plan=planned.plan,
            state=State.PENDING,
            state_reason="It is recorded and starts as soon as there is room.",
            creator=creation.creator,
            create_time=now,
            update_time=now,
            version=1,
        )

    def _renamed(self, creation: Creation, prepared: Prepared, answer: Job | HoneError) -> Job | HoneError:
        """The answer; where an id that was made up here was taken, that of another try."""
        for _ in range(10):
            if creation.job_id or not isinstance(answer, AlreadyExists) or answer.reason != AlreadyExists.reason:
                break
            job = replace(prepared.job, id=f"{creation.spec.name}-{self._new_suffix()}")
            answer = self._store.create_all([(job, prepared.request)])[0]
        return answer


def _part(log: bytes, *, tail: int | None, offset: int) -> bytes:
    """From byte `offset` on, of that the last `tail` lines."""
    rest = log[offset:]
    return rest if tail is None else b"".join(rest.splitlines(keepends=True)[-tail:] if tail else [])


def _has_live_attempt(job: Job) -> bool:
    return bool(job.attempts) and not job.attempts[-1].state.is_terminal


def _attempt(job: Job, number: int) -> Attempt:
    found = [attempt for attempt in job.attempts if number in (0, attempt.number)]
    if not found:
        raise NotFound(f"Job {job.id} has no attempt {number}; it has {len(job.attempts)}.", fix="0 is the newest.")
    return found[-1]
