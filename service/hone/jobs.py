"""The use cases: what a caller can ask of Hone, whatever it came by (gRPC, CLI, a test).

Sync, and safe to call from several threads. A method checks, then asks the store; what has to happen outside happens in
the reconciler, after the answer.
"""

import hashlib
import json
import re
import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hmac import compare_digest
from uuid import uuid4

from hone.backends.base import Backend
from hone.errors import AlreadyExists, InvalidRequest, NotFound, Refused, Violation, WrongState
from hone.job import Attempt, Event, EventType, Job, MetricSeries, Output, Point, State
from hone.plan import Planned
from hone.run import Run
from hone.spec import JobSpec
from hone.spec.combinations import refuse_unserved
from hone.storage import ArtifactStore
from hone.store import Request, Store, condition

MAX_PAGE_SIZE = 1000
MAX_ID_LENGTH = 50
"""A pod's host name has 63 characters, and says rank and attempt too."""
PROBE_KEPT_S = 60.0
"""How long the artefact store is believed to be writable."""
_ID_LETTERS = "bcdfghjkmnpqrstvwxz23456789"
"""No vowels, so that no words come about; nothing that looks like something else."""
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """A part of a listing."""

    jobs: tuple[Job, ...]
    next_page_token: str = ""
    """Empty at the end."""


def new_suffix() -> str:
    """Five characters that make a name an id."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(5))


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

    def plan(self, spec: JobSpec) -> Planned:
        """What would run, also for what this version or this machine does not run. Raises InvalidRequest."""
        return self._planner(spec)

    def create(
        self,
        namespace: str,
        spec: JobSpec,
        *,
        job_id: str = "",
        request_id: str = "",
        validate_only: bool = False,
        creator: str = "",
    ) -> Job:
        """Record a job; once this returns it is durable. With `validate_only` nothing is recorded.

        The same `request_id` and body give the same job. Raises InvalidRequest, NotServed, AlreadyExists,
        RequestIdReused, and what is wrong with the artefact store.
        """
        _check_label("namespace", namespace, 63)
        if job_id:
            _check_label("job_id", job_id, MAX_ID_LENGTH)
        request = _request(request_id, spec, job_id)
        if request and (earlier := self._store.requested(namespace, request)):
            return earlier
        refuse_unserved(spec)
        planned = self._planner(spec)
        self._backend.check(planned)
        self._probe()
        job = self._new_job(namespace, spec, planned, job_id=job_id, creator=creator)
        if validate_only:
            return job
        return self._record(job, request, may_rename=not job_id)

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
        job = self.get(namespace, job_id)
        with self._store.change(namespace, job.id, now=self._clock()) as change:
            if not change.job.state.is_terminal and change.job.state != State.CANCELLING:
                change.to_state(State.CANCELLING, "A caller cancelled it; it is being stopped.")
        return change.written

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

    def events(
        self, namespace: str, *, job_id: str = "", after_seq: int = 0, limit: int = MAX_PAGE_SIZE
    ) -> Sequence[Event]:
        """History after a number, in order, of one job or of the namespace."""
        if after_seq < 0:
            message = f"{after_seq} is negative; give the number of the last event that was read, or 0."
            raise InvalidRequest([Violation(path="after_seq", value=after_seq, message=message)])
        job = self.get(namespace, job_id) if job_id else None
        return self._store.events(namespace, job=job, after_seq=after_seq, limit=_page_size(limit))

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
        if attempt == 0 and not job.attempts:
            return iter(())
        return self._backend.logs(self._run(job, _attempt(job, attempt)), rank=rank, tail=tail, offset=offset)

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
            return change.store_events(attempt, events)

    def list(self, namespace: str, *, page_size: int = 50, page_token: str = "", filter: str = "") -> JobPage:
        """Jobs, newest first. A token continues the listing that gave it, and no other. Raises InvalidRequest."""
        size = _page_size(page_size)
        after = _read_token(page_token, namespace, filter) if page_token else None
        found = self._store.page(namespace, condition=condition(filter), limit=size + 1, after=after)
        if len(found) <= size:
            return JobPage(jobs=tuple(found))
        shown = tuple(found[:size])
        return JobPage(jobs=shown, next_page_token=_token(shown[-1], namespace, filter))

    def _probe(self) -> None:
        """Find out now, not after hours of training, that outputs could not be stored."""
        with self._probe_lock:
            if time.monotonic() - self._probed_at > PROBE_KEPT_S:
                self._artifacts.probe()
                self._probed_at = time.monotonic()

    def _new_job(self, namespace: str, spec: JobSpec, planned: Planned, *, job_id: str, creator: str) -> Job:
        now = self._clock()
        return Job(
            namespace=namespace,
            id=job_id or f"{spec.name}-{self._new_suffix()}",
            uid=str(uuid4()),
            requested_spec=spec,
            resolved_spec=planned.spec,
            plan=planned.plan,
            state=State.PENDING,
            state_reason="It is recorded and starts as soon as there is room.",
            creator=creator,
            create_time=now,
            update_time=now,
            version=1,
        )

    def _record(self, job: Job, request: Request | None, *, may_rename: bool) -> Job:
        for _ in range(10):
            try:
                return self._store.create(job, request)
            except AlreadyExists as error:
                if not may_rename or error.reason != AlreadyExists.reason:
                    raise
                job = replace(job, id=f"{job.requested_spec.name}-{self._new_suffix()}")
        return self._store.create(job, request)

    def _run(self, job: Job, attempt: Attempt) -> Run:
        return Run(
            namespace=job.namespace,
            job=job.id,
            attempt=attempt.number,
            nonce=attempt.nonce,
            spec=job.resolved_spec,
            launch=job.plan.launch,
            store=self._artifacts.uri,
            inputs={},
        )


def _check_label(path: str, value: str, longest: int) -> None:
    if len(value) > longest or not _DNS_LABEL.fullmatch(value):
        message = f"{value!r} is not one: lower-case letters, digits and hyphens, at most {longest}."
        raise InvalidRequest([Violation(path=path, value=value, message=message)])


def _request(request_id: str, spec: JobSpec, job_id: str) -> Request | None:
    if not request_id:
        return None
    if len(request_id) > 128:
        message = f"has {len(request_id)} characters; at most 128 are kept. A UUID has 36."
        raise InvalidRequest([Violation(path="request_id", value=request_id[:40], message=message)])
    body = json.dumps([spec.model_dump(mode="json", exclude_unset=True), job_id], sort_keys=True)
    return Request(request_id, hashlib.sha256(body.encode()).hexdigest())


def _page_size(size: int) -> int:
    if size < 0:
        message = f"{size} is negative; give 1 to {MAX_PAGE_SIZE}, or 0 for the usual."
        raise InvalidRequest([Violation(path="page_size", value=size, message=message)])
    return min(size or 50, MAX_PAGE_SIZE)


def _token(last: Job, namespace: str, filter_: str) -> str:
    data = [_arguments(namespace, filter_), last.create_time.isoformat(), last.uid]
    return urlsafe_b64encode(json.dumps(data).encode()).decode()


def _read_token(token: str, namespace: str, filter_: str) -> tuple[datetime, str]:
    try:
        arguments, time_, uid = json.loads(urlsafe_b64decode(token.encode()))
        after = (datetime.fromisoformat(time_), str(uid))
    except (ValueError, TypeError) as error:
        raise _bad_token(token, "is not a token that a listing gave") from error
    if arguments != _arguments(namespace, filter_):
        raise _bad_token(token, "belongs to a listing with another namespace or filter")
    return after


def _arguments(namespace: str, filter_: str) -> str:
    return hashlib.sha256(json.dumps([namespace, filter_]).encode()).hexdigest()[:16]


def _bad_token(token: str, what: str) -> InvalidRequest:
    message = f"{what}: leave it out to begin again."
    return InvalidRequest([Violation(path="page_token", value=token, message=message)])


def _attempt(job: Job, number: int) -> Attempt:
    found = [attempt for attempt in job.attempts if number in (0, attempt.number)]
    if not found:
        raise NotFound(f"Job {job.id} has no attempt {number}; it has {len(job.attempts)}.", fix="0 is the newest.")
    return found[-1]
