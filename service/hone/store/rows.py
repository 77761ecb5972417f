"""Rows ↔ records: times as microseconds, parts that are read as a whole as JSON."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter
from sqlalchemy import Row

from hone.job import Attempt, Event, Failure, Job, Output, Plan, Progress, State
from hone.remembered import Remembered
from hone.spec import JobSpec

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

Part = TypeVar("Part")


def to_us(time: datetime) -> int:
    """Microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def from_us(microseconds: int) -> datetime:
    """The other way round."""
    return _EPOCH + microseconds * _MICROSECOND


def job_row(job: Job) -> dict[str, Any]:
    """A new job's row. The request keeps what was set and nothing more; the resolved one says everything."""
    return {
        "uid": job.uid,
        "namespace": job.namespace,
        "id": job.id,
        "name": job.requested_spec.name,
        "method": job.method,
        "creator": job.creator,
        "requested_spec": _requested_text(job.requested_spec),
        "resolved_spec": _resolved_text(job.resolved_spec),
        "plan": _plan_text(job.plan),
        "create_time": to_us(job.create_time),
        "delete_artifacts": False,
        "buried": False,
        "observed": job.observed,
        **changing_columns(job),
    }


_requested_text = Remembered[JobSpec, str](lambda spec: spec.model_dump_json(exclude_unset=True))
_resolved_text = Remembered[JobSpec, str](lambda spec: spec.model_dump_json(exclude_none=True))
_plan_text = Remembered[Plan, str](lambda plan: _dump(Plan, plan))


def changing_columns(job: Job) -> dict[str, Any]:
    """What a job's row holds that can change."""
    return {
        "state": str(job.state),
        "reason": writable(job.state_reason),
        "version": job.version,
        "update_time": to_us(job.update_time),
        "start_time": _optional_us(job.start_time),
        "end_time": _optional_us(job.end_time),
        "delete_time": _optional_us(job.delete_time),
        "unfinished": not (job.state.is_terminal or job.state == State.PAUSED) or job.delete_time is not None,
        "progress": _dump(Progress, job.progress) if job.progress else None,
        "outputs": _dump(tuple[Output, ...], job.outputs),
        "failure": _failure(job.failure) if job.failure else None,
    }


def attempt_row(job_uid: str, attempt: Attempt, *, last_seq: int) -> dict[str, Any]:
    """An attempt's row."""
    return {
        "job_uid": job_uid,
        "number": attempt.number,
        "nonce": attempt.nonce,
        "state": str(attempt.state),
        "create_time": to_us(attempt.create_time),
        "start_time": _optional_us(attempt.start_time),
        "end_time": _optional_us(attempt.end_time),
        "failure": _failure(attempt.failure) if attempt.failure else None,
        "counted": attempt.counted,
        "gpus": attempt.gpus,
        "last_seq": last_seq,
    }


def event_row(job: Job, event: Event, *, seq: int, source_seq: int | None) -> dict[str, Any]:
    """An event's row under its number in the namespace."""
    return {
        "namespace": job.namespace,
        "seq": seq,
        "job_uid": job.uid,
        "job": job.id,
        "attempt": event.attempt,
        "source_seq": source_seq,
        "time": to_us(event.time),
        "type": writable(str(event.type))[:32],
        "message": writable(event.message),
        "step": event.step,
        "metrics": json.dumps(dict(event.metrics)),
        "fields": writable(json.dumps(dict(event.fields), ensure_ascii=False)),
    }


def writable(text: str) -> str:
    """A text as every database takes it: what a trainer printed can hold zeros and halves of characters."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _failure(failure: Failure) -> str:
    lines = tuple(map(writable, failure.log_tail))
    return _dump(Failure, replace(failure, message=writable(failure.message), log_tail=lines))


def to_job(row: Row[Any], attempts: tuple[Attempt, ...], *, like: Job | None = None) -> Job:
    """A job out of its row and its attempts; what never changes is taken from an earlier version of it, where one is
    at hand."""
    requested, resolved, plan = (
        (like.requested_spec, like.resolved_spec, like.plan)
        if like
        else _fixed_parts(row.requested_spec, row.resolved_spec, row.plan)
    )
    return Job(
        namespace=row.namespace,
        id=row.id,
        uid=row.uid,
        requested_spec=requested,
        resolved_spec=resolved,
        plan=plan,
        state=State(row.state),
        state_reason=row.reason,
        creator=row.creator,
        create_time=from_us(row.create_time),
        update_time=from_us(row.update_time),
        version=row.version,
        start_time=_optional_time(row.start_time),
        end_time=_optional_time(row.end_time),
        delete_time=_optional_time(row.delete_time),
        attempts=attempts,
        progress=_load(Progress, row.progress) if row.progress else None,
        outputs=_load(tuple[Output, ...], row.outputs) if row.outputs != "[]" else (),
        failure=_load(Failure, row.failure) if row.failure else None,
        observed=row.observed,
    )


@lru_cache(maxsize=1024)
def _fixed_parts(requested: str, resolved: str, plan: str) -> tuple[JobSpec, JobSpec, Plan]:
    """What never changes of a job, parsed once."""
    return JobSpec.model_validate_json(requested), JobSpec.model_validate_json(resolved), _load(Plan, plan)


def to_attempt(row: Row[Any]) -> Attempt:
    """An attempt out of its row."""
    return Attempt(
        number=row.number,
        nonce=row.nonce,
        state=State(row.state),
        create_time=from_us(row.create_time),
        start_time=_optional_time(row.start_time),
        end_time=_optional_time(row.end_time),
        failure=_load(Failure, row.failure) if row.failure else None,
        counted=row.counted,
        gpus=row.gpus,
    )


def to_event(row: Row[Any]) -> Event:
    """An event out of its row."""
    return Event(
        seq=row.seq,
        time=from_us(row.time),
        type=row.type,
        message=row.message,
        job=row.job,
        attempt=row.attempt,
        step=row.step,
        metrics=json.loads(row.metrics),
        fields=json.loads(row.fields),
    )


def failure_fields(failure: Failure) -> Mapping[str, str]:
    """A failure as the fields of its event."""
    fields = {
        "failure_class": str(failure.failure_class),
        "next_step": failure.next_step,
        "log_tail": "\n".join(failure.log_tail),
    }
    if failure.rank is not None:
        fields["rank"] = str(failure.rank)
    if failure.exit_code is not None:
        fields["exit_code"] = str(failure.exit_code)
    return fields


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _dump(kind: Any, value: Any) -> str:
    data: bytes = _adapter(kind).dump_json(value, exclude_none=True)
    return data.decode()


def _load(kind: type[Part], text: str) -> Part:
    adapter: TypeAdapter[Part] = _adapter(kind)  # type: ignore[arg-type]  # a class can be hashed
    value = adapter.validate_json(text)
    return value


def _optional_us(time: datetime | None) -> int | None:
    return None if time is None else to_us(time)


def _optional_time(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else from_us(microseconds)
