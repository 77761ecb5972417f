"""The store: every question and every change as one method, one transaction each.

Called by jobs.py and reconcile.py. It keeps the rules of job.TRANSITIONS and the order of events; it decides nothing.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from hone.crash import crash_point
from hone.errors import AlreadyExists, HoneError, NotFound, RequestIdReused
from hone.job import Attempt, Event, EventType, Job, State
from hone.store.change import Change
from hone.store.database import Database, insert_rows
from hone.store.lease import TTL_S, Fence, Lease
from hone.store.rows import (
    attempt_row,
    changing_columns,
    event_row,
    job_row,
    to_attempt,
    to_event,
    to_job,
    to_us,
    writable,
)
from hone.store.tables import attempt_logs, attempts, events, job_labels, jobs, namespaces, request_ids

REQUEST_IDS_KEPT = timedelta(hours=24)
"""A request id is kept as long as its job, and at least so long."""

KEPT_JOBS = 1024

# Made once: SQLAlchemy takes longer to understand a new statement than SQLite takes to run it.
_BY_ID = and_(jobs.c.namespace == bindparam("b_namespace"), jobs.c.id == bindparam("b_id"), jobs.c.buried.is_(False))
_VERSION = select(jobs.c.uid, jobs.c.version).where(_BY_ID)
_JOB = select(jobs).where(_BY_ID)
_LOCKED_JOB = _JOB.with_for_update()
_LAST_SEQS = select(attempts.c.number, attempts.c.last_seq).where(attempts.c.job_uid == bindparam("b_uid"))
_ATTEMPTS = select(attempts).where(attempts.c.job_uid == bindparam("b_uid")).order_by(attempts.c.number)
_UPDATE_JOB = update(jobs).where(jobs.c.uid == bindparam("b_uid"))
_UPDATE_ATTEMPT = update(attempts).where(
    attempts.c.job_uid == bindparam("b_uid"), attempts.c.number == bindparam("b_number")
)
_SEQ = select(namespaces.c.seq).where(namespaces.c.name == bindparam("b_namespace"))
_REQUEST = select(request_ids.c.body_hash, request_ids.c.job_uid).where(
    request_ids.c.namespace == bindparam("b_namespace"), request_ids.c.request_id == bindparam("b_request_id")
)


@dataclass(frozen=True)
class Request:
    """The caller's name for one request, and the digest of its body."""

    id: str
    body_hash: str


class Store:
    """The durable record, at a SQLAlchemy URL. Safe to use from several threads."""

    def __init__(self, database_url: str) -> None:
        self._database = Database(database_url)
        self._raise_seq = _raise_seq(sqlite.insert if self._database.is_sqlite else postgresql.insert)
        self._kept: OrderedDict[str, Job] = OrderedDict()
        """Jobs as they were last read or written, by uid."""
        self._subscribers: list[Callable[[Job], None]] = []
        self._fence: Fence = lambda _: None

    @property
    def is_shared(self) -> bool:
        """Whether other services may work on the same database."""
        return not self._database.is_sqlite

    def lease(self, holder: str, *, ttl_s: float = TTL_S) -> Lease:
        """What services that share the database take turns by; of a shared one only."""
        return Lease(self._database, holder=holder, ttl_s=ttl_s)

    def fenced(self, fence: Fence) -> "Store":
        """The same store for one writer, each of whose transactions begins with the fence."""
        other = copy(self)
        other._fence = fence
        return other

    def close(self) -> None:
        """Give connections back."""
        self._database.close()

    def subscribe(self, callback: Callable[[Job], None]) -> Callable[[], None]:
        """Have `callback(job)` called for each job that a commit changed, in the thread that wrote; the answer ends
        that.

        The callback must be quick and must not raise.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with suppress(ValueError):  # it has ended already
                self._subscribers.remove(callback)

        return unsubscribe

    def create(self, job: Job, request: Request | None = None) -> Job:
        """Record a new job with its first event; the job itself, or the one that this request made before.

        Raises AlreadyExists when the id is or was taken, RequestIdReused when the request had another body.
        """
        crash_point("create-before-commit")
        try:
            self._insert([(job, request)])
        except IntegrityError as error:
            return self._made_before(job, request, error)
        return job

    def create_all(self, new: Sequence[tuple[Job, Request | None]]) -> Sequence[Job | HoneError]:
        """Record many jobs with one commit; each answer is what `create` gives or raises."""
        if len(new) > 1:
            crash_point("create-before-commit")
            with suppress(IntegrityError):  # one of them stands in the way: each for itself
                self._insert(new)
                return [job for job, _ in new]
        return [self._create_alone(job, request) for job, request in new]

    def requested(self, namespace: str, request: Request) -> Job | None:
        """The job that this request made before. Raises RequestIdReused."""
        if self._database.read_row(_REQUEST, {"b_namespace": namespace, "b_request_id": request.id}) is None:
            return None
        with self._database.read() as connection:
            return self._earlier(connection, namespace, request)

    @contextmanager
    def change(self, namespace: str, job_id: str, *, now: datetime) -> Iterator[Change]:
        """Change one job in one transaction: what the body asks of the Change is written at its end.

        Raises NotFound. A body that raises changes nothing.
        """
        with self._write_own() as connection:
            row = connection.execute(_LOCKED_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            if row is None:
                raise _no_job(namespace, job_id)
            found = connection.execute(_ATTEMPTS, {"b_uid": row.uid}).all()
            job = self._job(row, [to_attempt(attempt) for attempt in found])
            change = Change(job, last_seqs={attempt.number: attempt.last_seq for attempt in found}, now=now)
            yield change
            if change.is_needed:
                self._write(connection, change)
                crash_point("change-before-commit")
        if change.is_needed:
            crash_point("change-after-commit")
            self._keep(change.written)
            self._tell(change.written)

    def bury(self, namespace: str, job_id: str, *, now: datetime) -> None:
        """Remove a job whose deletion is done: its id stays taken, its last event says that it is gone.

        Its other events go with it: whoever reads on later finds a gap in the numbers where a deleted job's were.
        """
        with self._write_own() as connection:
            row = connection.execute(_LOCKED_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            if row is None:
                return
            job, uid = self._job(row, ()), row.uid
            for table in (events, attempt_logs, attempts, job_labels):
                connection.execute(delete(table).where(table.c.job_uid == uid))
            old = request_ids.c.create_time < to_us(now - REQUEST_IDS_KEPT)
            connection.execute(delete(request_ids).where(request_ids.c.job_uid == uid, old))
            emptied = {"requested_spec": "", "resolved_spec": "", "plan": "", "progress": None, "failure": None}
            connection.execute(
                _UPDATE_JOB, {"b_uid": uid, **emptied, "buried": True, "unfinished": False, "outputs": "[]"}
            )
            gone = Event(
                seq=0, time=now, type=EventType.NOTE, message=f"Job {job.id} was deleted.", fields={"deleted": "true"}
            )
            self._write_events(connection, [(job, gone, None)])
            crash_point("bury-before-commit")
        self._kept.pop(uid, None)
        crash_point("bury-after-commit")
        self._tell(job)

    def job_version(self, namespace: str, job_id: str) -> tuple[str, int] | None:
        """Uid and version of a job, as cheaply as can be: whoever keeps what was made of that version may use it."""
        row = self._database.read_row(_VERSION, {"b_namespace": namespace, "b_id": job_id})
        return None if row is None else (row[0], row[1])

    def find(self, namespace: str, job_id: str) -> Job | None:
        """A job by its id; one that has not changed since it was last seen here costs no more than `job_version`."""
        version = self.job_version(namespace, job_id)
        kept = self._kept.get(version[0]) if version else None
        if version is None or (kept and (kept.uid, kept.version) == version):
            return kept
        with self._database.read() as connection:
            row = connection.execute(_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            found = None if row is None else self._with_attempts(connection, [row])[0]
        if found:
            self._keep(found)
        return found

    def get(self, namespace: str, job_id: str) -> Job:
        """A job by its id. Raises NotFound."""
        job = self.find(namespace, job_id)
        if job is None:
            raise _no_job(namespace, job_id)
        return job

    def ids_of_name(self, namespace: str, name: str, *, limit: int = 5) -> list[str]:
        """Ids of the jobs of that name, newest first."""
        chosen = and_(jobs.c.namespace == namespace, jobs.c.name == name, jobs.c.buried.is_(False))
        query = select(jobs.c.id).where(chosen).order_by(jobs.c.create_time.desc()).limit(limit)
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())

    def page(
        self, namespace: str, *, condition: ColumnElement[bool], limit: int, after: tuple[datetime, str] | None = None
    ) -> list[Job]:
        """Jobs, newest first, below the (creation time, uid) of the last one seen."""
        chosen = [jobs.c.namespace == namespace, jobs.c.buried.is_(False), condition]
        if after:
            time, uid = to_us(after[0]), after[1]
            chosen.append(or_(jobs.c.create_time < time, and_(jobs.c.create_time == time, jobs.c.uid < uid)))
        query = select(jobs).where(*chosen).order_by(jobs.c.create_time.desc(), jobs.c.uid.desc()).limit(limit)
        with self._database.read() as connection:
            return self._with_attempts(connection, connection.execute(query).all())

    def ping(self) -> None:
        """Nothing, when the database answers. Raises Unavailable, or what is wrong with it."""
        self._database.read_row(select(1), {})

    def counts(self) -> dict[tuple[str, str], int]:
        """(namespace, state) → number of jobs on record."""
        groups = (jobs.c.namespace, jobs.c.state)
        query = select(*groups, func.count()).where(jobs.c.buried.is_(False)).group_by(*groups)
        with self._database.read() as connection:
            return {(row[0], row[1]): row[2] for row in connection.execute(query)}

    @property
    def name(self) -> str:
        """Address of the database, without its password."""
        return self._database.name

    def of_uid(self, uid: str) -> Job | None:
        """A job by what stays its own for ever."""
        with self._database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.uid == uid, jobs.c.buried.is_(False))).first()
            return None if row is None else self._with_attempts(connection, [row])[0]

    def observed(self) -> Sequence[Job]:
        """Jobs that were started past the service and have not ended."""
        chosen = and_(jobs.c.observed.is_(True), jobs.c.unfinished.is_(True))
        with self._database.read() as connection:
            return self._with_attempts(connection, connection.execute(select(jobs).where(chosen)).all())

    def attempt_log(self, job: Job, *, number: int, rank: int) -> bytes | None:
        """What a rank of an attempt that is gone wrote last; None where nothing of it was kept."""
        chosen = and_(attempt_logs.c.job_uid == job.uid, attempt_logs.c.number == number, attempt_logs.c.rank == rank)
        with self._database.read() as connection:
            data = connection.execute(select(attempt_logs.c.data).where(chosen)).scalar()
        return None if data is None else zlib.decompress(data)

    def unfinished(self) -> Sequence[tuple[str, str, int]]:
        """(namespace, id, version) of every job of ours that somebody has to see to, oldest first."""
        chosen = and_(jobs.c.unfinished.is_(True), jobs.c.observed.is_(False))
        query = select(jobs.c.namespace, jobs.c.id, jobs.c.version).where(chosen)
        with self._database.read() as connection:
            found = connection.execute(query.order_by(jobs.c.create_time, jobs.c.uid))
            return [(row.namespace, row.id, row.version) for row in found]

    def finished(self, limit: int) -> Sequence[Job]:
        """Jobs of ours that succeeded, of every namespace, the newest first."""
        chosen = and_(jobs.c.state == State.SUCCEEDED, jobs.c.observed.is_(False), jobs.c.buried.is_(False))
        query = select(jobs).where(chosen).order_by(jobs.c.create_time.desc()).limit(limit)
        with self._database.read() as connection:
            return self._with_attempts(connection, connection.execute(query).all())

    def last_seqs(self, job: Job) -> dict[int, int]:
        """Attempt → the attempt's own number of its last stored event."""
        return {row.number: row.last_seq for row in self._database.read_rows(_LAST_SEQS, {"b_uid": job.uid})}

    def deletes_artifacts(self, job: Job) -> bool:
        """Whether the deletion that was asked for takes the job's artefacts along."""
        with self._database.read() as connection:
            return bool(connection.execute(select(jobs.c.delete_artifacts).where(jobs.c.uid == job.uid)).scalar())

    def last_seq(self, namespace: str) -> int:
        """Number of the namespace's newest event; 0 before the first."""
        row = self._database.read_row(_SEQ, {"b_namespace": namespace})
        return 0 if row is None else int(row[0])

    def events(
        self,
        namespace: str,
        *,
        job: Job | None = None,
        after_seq: int = 0,
        limit: int = 1000,
        types: Sequence[str] = (),
        attempt: int | None = None,
    ) -> Sequence[Event]:
        """Events after a number, in order; of one job, of some types, of one attempt where asked."""
        chosen = [events.c.seq > after_seq, events.c.namespace == namespace]
        if job:
            chosen.append(events.c.job_uid == job.uid)
        if types:
            chosen.append(events.c.type.in_(types))
        if attempt is not None:
            chosen.append(events.c.attempt == attempt)
        query = select(events).where(*chosen).order_by(events.c.seq).limit(limit)
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(query)]

    def checkpoint_events(self, job: Job) -> Sequence[Event]:
        """Events of a job that tell of checkpoints, in order of commit."""
        chosen = and_(events.c.job_uid == job.uid, events.c.type == EventType.CHECKPOINT)
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(select(events).where(chosen).order_by(events.c.seq))]

    def metric_events(self, job: Job, *, min_step: int, max_step: int | None) -> Sequence[Event]:
        """Events of a job that carry numbers, in order of commit; one without a step counts as step 0."""
        step = func.coalesce(events.c.step, 0)
        chosen = [events.c.job_uid == job.uid, events.c.metrics != "{}", step >= min_step]
        if max_step is not None:
            chosen.append(step <= max_step)
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(select(events).where(*chosen).order_by(events.c.seq))]

    def _create_alone(self, job: Job, request: Request | None) -> Job | HoneError:
        try:
            return self.create(job, request)
        except HoneError as error:
            return error

    def _insert(self, new: Sequence[tuple[Job, Request | None]]) -> None:
        """All of them in one transaction. Raises IntegrityError when an id or a request id is taken."""
        by_namespace: dict[str, list[Job]] = {}
        for job, _ in new:
            by_namespace.setdefault(job.namespace, []).append(job)
        labels = [
            {"job_uid": job.uid, "key": key, "value": value}
            for job, _ in new
            for key, value in job.requested_spec.labels.items()
        ]
        requests = [_request_row(job, request) for job, request in new if request]
        with self._write_own() as connection:
            insert_rows(connection, jobs, [job_row(job) for job, _ in new])
            insert_rows(connection, job_labels, labels)
            insert_rows(connection, request_ids, requests)
            for _, there in sorted(by_namespace.items()):  # in one order, so that no two writers wait for each other
                self._write_events(connection, [(job, _first_event(job), None) for job in there])
        crash_point("create-after-commit")
        for job, _ in new:
            self._keep(job)
            self._tell(job)

    def _made_before(self, job: Job, request: Request | None, error: IntegrityError) -> Job:
        """What stood in the way of a new job: the same request, or another job of that id."""
        with self._database.write() as connection:  # it may be a part of the commit that is being made
            if request and (earlier := self._earlier(connection, job.namespace, request)):
                return earlier
        raise AlreadyExists(
            f"Job id {job.id!r} is taken, or was; ids are not used again.", fix="Choose another, or none."
        ) from error

    def _earlier(self, connection: Connection, namespace: str, request: Request) -> Job | None:
        row = connection.execute(_REQUEST, {"b_namespace": namespace, "b_request_id": request.id}).first()
        if row is None:
            return None
        if row.body_hash != request.body_hash:
            raise RequestIdReused(
                f"request_id {request.id!r} was used before, with another request.",
                fix="Use a new one for each request.",
            )
        found = connection.execute(select(jobs).where(jobs.c.uid == row.job_uid)).one()
        if found.buried:
            raise NotFound(f"Job {found.id!r}, which this request made, was deleted.", fix="Use a new request_id.")
        return self._with_attempts(connection, [found])[0]

    def _with_attempts(self, connection: Connection, rows: Sequence[Any]) -> list[Job]:
        uids = [row.uid for row in rows]
        query = select(attempts).where(attempts.c.job_uid.in_(uids)).order_by(attempts.c.number)
        found: dict[str, list[Any]] = {uid: [] for uid in uids}
        for attempt in connection.execute(query) if uids else ():
            found[attempt.job_uid].append(to_attempt(attempt))
        return [self._job(row, found[row.uid]) for row in rows]

    def _job(self, row: Any, made: Sequence[Attempt]) -> Job:
        return to_job(row, tuple(made), like=self._kept.get(row.uid))

    def _write(self, connection: Connection, change: Change) -> None:
        job = change.written
        columns = changing_columns(job)
        if change.delete_artifacts is not None:
            columns["delete_artifacts"] = change.delete_artifacts
        connection.execute(_UPDATE_JOB, {"b_uid": job.uid, **columns})
        for number in change.changed_attempts:
            row = attempt_row(job.uid, change.attempt(number), last_seq=change.last_seqs[number])
            if not connection.execute(_UPDATE_ATTEMPT, {"b_uid": job.uid, "b_number": number, **row}).rowcount:
                insert_rows(connection, attempts, [row])
        self._write_events(connection, [(job, event, source_seq) for event, source_seq in change.events])
        for number, rank, data in change.logs:
            chosen = and_(
                attempt_logs.c.job_uid == job.uid, attempt_logs.c.number == number, attempt_logs.c.rank == rank
            )
            connection.execute(delete(attempt_logs).where(chosen))
            row = {"job_uid": job.uid, "number": number, "rank": rank, "data": zlib.compress(data)}
            insert_rows(connection, attempt_logs, [row])

    def _write_events(self, connection: Connection, new: Sequence[tuple[Job, Event, int | None]]) -> None:
        """Events of one namespace under its next numbers; each with the number that its attempt gave it."""
        if not new:
            return
        added = {"name": new[0][0].namespace, "seq": len(new)}
        first = int(connection.execute(self._raise_seq, added).scalar_one()) - len(new) + 1
        rows = [
            event_row(job, event, seq=seq, source_seq=source_seq)
            for seq, (job, event, source_seq) in enumerate(new, start=first)
        ]
        insert_rows(connection, events, rows)

    @contextmanager
    def _write_own(self) -> Iterator[Connection]:
        """One transaction, of whoever may write."""
        with self._database.write() as connection:
            self._fence(connection)
            yield connection

    def _keep(self, job: Job) -> None:
        """For `find`; not a job with texts that the database may have taken otherwise."""
        self._kept.pop(job.uid, None)
        failures = [job.failure, *(attempt.failure for attempt in job.attempts)]
        if not any(failures) and writable(job.state_reason) == job.state_reason:
            self._kept[job.uid] = job
        while len(self._kept) > KEPT_JOBS:
            with suppress(KeyError):  # another thread was first
                self._kept.popitem(last=False)

    def _tell(self, job: Job) -> None:
        for callback in tuple(self._subscribers):
            callback(job)


def _request_row(job: Job, request: Request) -> dict[str, Any]:
    return {
        "namespace": job.namespace,
        "request_id": request.id,
        "body_hash": request.body_hash,
        "job_uid": job.uid,
        "create_time": to_us(job.create_time),
    }


def _first_event(job: Job) -> Event:
    fields = {"state": str(job.state), "reason": job.state_reason}
    return Event(seq=0, time=job.create_time, type=EventType.STATE, message=job.state_reason, fields=fields)


def _raise_seq(insert_or_update: Callable[[Any], Any]) -> Any:
    """The statement that raises a namespace's counter, makes it where there is none, and answers what it is now."""
    add = insert_or_update(namespaces)
    raised = {"seq": namespaces.c.seq + add.excluded.seq}
    made = add.on_conflict_do_update(index_elements=[namespaces.c.name], set_=raised)
    return made.returning(namespaces.c.seq)


def _no_job(namespace: str, job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r} in namespace {namespace!r}.", fix="`hone list` shows them.")
