"""The store: every question and every change as one method, one transaction each.

Called by jobs.py and reconcile.py. It keeps the rules of job.TRANSITIONS and the order of events; it decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from hone.crash import crash_point
from hone.errors import AlreadyExists, NotFound, RequestIdReused
from hone.job import Event, EventType, Job
from hone.store.change import Change
from hone.store.database import Database
from hone.store.rows import (
    attempt_row,
    changing_columns,
    event_row,
    job_row,
    to_attempt,
    to_event,
    to_job,
    to_us,
)
from hone.store.tables import attempts, events, job_labels, jobs, namespaces, request_ids

REQUEST_IDS_KEPT = timedelta(hours=24)
"""A request id is kept as long as its job, and at least so long."""

_BY_ID = and_(jobs.c.namespace == bindparam("b_namespace"), jobs.c.id == bindparam("b_id"), jobs.c.buried.is_(False))
_VERSION = select(jobs.c.uid, jobs.c.version).where(_BY_ID)
_JOB = select(jobs).where(_BY_ID)
_LOCKED_JOB = _JOB.with_for_update()
_ATTEMPTS = select(attempts).where(attempts.c.job_uid == bindparam("b_uid")).order_by(attempts.c.number)
_UPDATE_JOB = update(jobs).where(jobs.c.uid == bindparam("b_uid"))
_SEQ = select(namespaces.c.seq).where(namespaces.c.name == bindparam("b_namespace"))
_REQUEST = select(request_ids.c.body_hash, request_ids.c.job_uid).where(
    request_ids.c.namespace == bindparam("b_namespace"), request_ids.c.request_id == bindparam("b_request_id")
)
# Made once: SQLAlchemy takes longer to understand a new statement than SQLite takes to run it.
_INSERT_JOB, _INSERT_LABEL, _INSERT_REQUEST, _INSERT_ATTEMPT, _INSERT_EVENT = (
    insert(table) for table in (jobs, job_labels, request_ids, attempts, events)
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
        self._subscribers: tuple[Callable[[str], None], ...] = ()

    def close(self) -> None:
        """Give connections back."""
        self._database.close()

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Have `callback(namespace)` called after each commit, in the thread that wrote; the answer ends that.

        The callback must be quick and must not raise.
        """
        self._subscribers = (*self._subscribers, callback)

        def unsubscribe() -> None:
            self._subscribers = tuple(other for other in self._subscribers if other is not callback)

        return unsubscribe

    def create(self, job: Job, request: Request | None = None) -> Job:
        """Record a new job with its first event; the job itself, or the one that this request made before.

        Raises AlreadyExists when the id is or was taken, RequestIdReused when the request had another body.
        """
        crash_point("create-before-commit")
        with self._database.write() as connection:
            if request and (earlier := self._earlier(connection, job.namespace, request)):
                return earlier
            row = job_row(job)
            try:
                connection.execute(_INSERT_JOB, row)
            except IntegrityError as error:
                raise AlreadyExists(
                    f"Job id {job.id!r} is taken, or was; ids are not used again.", fix="Choose another, or none."
                ) from error
            if labels := job.requested_spec.labels:
                rows = [{"job_uid": job.uid, "key": key, "value": value} for key, value in labels.items()]
                connection.execute(_INSERT_LABEL, rows)
            if request:
                self._keep_request(connection, job, request)
            fields = {"state": str(job.state), "reason": job.state_reason}
            first = Event(seq=0, time=job.create_time, type=EventType.STATE, message=job.state_reason, fields=fields)
            self._write_events(connection, job, [(first, None)])
        crash_point("create-after-commit")
        self._tell(job.namespace)
        return job

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
        with self._database.write() as connection:
            row = connection.execute(_LOCKED_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            if row is None:
                raise _no_job(namespace, job_id)
            found = connection.execute(_ATTEMPTS, {"b_uid": row.uid}).all()
            job = to_job(row, tuple(to_attempt(attempt) for attempt in found))
            change = Change(job, last_seqs={attempt.number: attempt.last_seq for attempt in found}, now=now)
            yield change
            if change.is_needed:
                self._write(connection, change)
                crash_point("change-before-commit")
        if change.is_needed:
            crash_point("change-after-commit")
            self._tell(namespace)

    def bury(self, namespace: str, job_id: str, *, now: datetime) -> None:
        """Remove a job whose deletion is done: its id stays taken, its last event says that it is gone.

        Its other events go with it: whoever reads on later finds a gap in the numbers where a deleted job's were.
        """
        with self._database.write() as connection:
            row = connection.execute(_LOCKED_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            if row is None:
                return
            job, uid = to_job(row, ()), row.uid
            for table in (events, attempts, job_labels):
                connection.execute(delete(table).where(table.c.job_uid == uid))
            old = request_ids.c.create_time < to_us(now - REQUEST_IDS_KEPT)
            connection.execute(delete(request_ids).where(request_ids.c.job_uid == uid, old))
            emptied = {"requested_spec": "", "resolved_spec": "", "plan": "", "progress": None, "failure": None}
            connection.execute(
                _UPDATE_JOB.values(**emptied, buried=True, unfinished=False, outputs="[]"), {"b_uid": uid}
            )
            gone = Event(
                seq=0, time=now, type=EventType.NOTE, message=f"Job {job.id} was deleted.", fields={"deleted": "true"}
            )
            self._write_events(connection, job, [(gone, None)])
            crash_point("bury-before-commit")
        crash_point("bury-after-commit")
        self._tell(namespace)

    def job_version(self, namespace: str, job_id: str) -> tuple[str, int] | None:
        """Uid and version of a job, as cheaply as can be: whoever keeps what was made of that version may use it."""
        row = self._database.read_row(_VERSION, {"b_namespace": namespace, "b_id": job_id})
        return None if row is None else (row[0], row[1])

    def find(self, namespace: str, job_id: str) -> Job | None:
        """A job by its id."""
        with self._database.read() as connection:
            row = connection.execute(_JOB, {"b_namespace": namespace, "b_id": job_id}).first()
            return None if row is None else self._with_attempts(connection, [row])[0]

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

    def unfinished(self) -> Sequence[tuple[str, str, int]]:
        """(namespace, id, version) of every job that somebody has to see to, oldest first."""
        query = select(jobs.c.namespace, jobs.c.id, jobs.c.version).where(jobs.c.unfinished.is_(True))
        with self._database.read() as connection:
            found = connection.execute(query.order_by(jobs.c.create_time, jobs.c.uid))
            return [(row.namespace, row.id, row.version) for row in found]

    def last_seqs(self, job: Job) -> dict[int, int]:
        """Attempt → the attempt's own number of its last stored event."""
        with self._database.read() as connection:
            return {row.number: row.last_seq for row in connection.execute(_ATTEMPTS, {"b_uid": job.uid})}

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

    def metric_events(self, job: Job, *, min_step: int, max_step: int | None) -> Sequence[Event]:
        """Events of a job that carry numbers, in order of commit; one without a step counts as step 0."""
        step = func.coalesce(events.c.step, 0)
        chosen = [events.c.job_uid == job.uid, events.c.metrics != "{}", step >= min_step]
        if max_step is not None:
            chosen.append(step <= max_step)
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(select(events).where(*chosen).order_by(events.c.seq))]

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

    def _keep_request(self, connection: Connection, job: Job, request: Request) -> None:
        row = {
            "namespace": job.namespace,
            "request_id": request.id,
            "body_hash": request.body_hash,
            "job_uid": job.uid,
            "create_time": to_us(job.create_time),
        }
        connection.execute(_INSERT_REQUEST, row)

    def _with_attempts(self, connection: Connection, rows: Sequence[Any]) -> list[Job]:
        uids = [row.uid for row in rows]
        query = select(attempts).where(attempts.c.job_uid.in_(uids)).order_by(attempts.c.number)
        found: dict[str, list[Any]] = {uid: [] for uid in uids}
        for attempt in connection.execute(query) if uids else ():
            found[attempt.job_uid].append(to_attempt(attempt))
        return [to_job(row, tuple(found[row.uid])) for row in rows]

    def _write(self, connection: Connection, change: Change) -> None:
        job = change.written
        columns = changing_columns(job)
        if change.delete_artifacts is not None:
            columns["delete_artifacts"] = change.delete_artifacts
        connection.execute(_UPDATE_JOB.values(**columns), {"b_uid": job.uid})
        for number in change.changed_attempts:
            row = attempt_row(job.uid, change.attempt(number), last_seq=change.last_seqs[number])
            chosen = and_(attempts.c.job_uid == job.uid, attempts.c.number == number)
            if not connection.execute(update(attempts).where(chosen).values(**row)).rowcount:
                connection.execute(_INSERT_ATTEMPT, row)
        self._write_events(connection, job, change.events)

    def _write_events(self, connection: Connection, job: Job, new: Sequence[tuple[Event, int | None]]) -> None:
        if not new:
            return
        connection.execute(self._raise_seq, {"name": job.namespace, "seq": len(new)})
        last = int(connection.execute(_SEQ, {"b_namespace": job.namespace}).scalar_one())
        first = last - len(new) + 1
        rows = [
            event_row(job, event, seq=seq, source_seq=source_seq)
            for seq, (event, source_seq) in enumerate(new, start=first)
        ]
        connection.execute(_INSERT_EVENT, rows)

    def _tell(self, namespace: str) -> None:
        for callback in self._subscribers:
            callback(namespace)


def _raise_seq(insert_or_update: Callable[[Any], Any]) -> Any:
    """The statement that raises a namespace's counter, and makes it where there is none."""
    add = insert_or_update(namespaces)
    raised = {"seq": namespaces.c.seq + add.excluded.seq}
    return add.on_conflict_do_update(index_elements=[namespaces.c.name], set_=raised)


def _no_job(namespace: str, job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r} in namespace {namespace!r}.", fix="`hone list` shows them.")
