"""Every call of the API as data: what is sent, and how the answer is read. Client and AsyncClient only carry them.

Pure: no connection here.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from hone.errors import InvalidRequest, UserError, Violation
from hone.findings import Finding
from hone.job import Checkpoint, Event, Job, MetricSeries, Output, Plan
from hone.plan import Planned
from hone.rpc import convert
from hone.spec import JobSpec
from hone.spec.parse import load, parse
from hone.v1 import training_service_pb2 as pb

SpecLike: TypeAlias = JobSpec | Mapping[str, Any] | str | Path
"""A request: a JobSpec, a mapping as in the YAML, or the path of a YAML or JSON file."""
PAGE_EVENTS = 1000
PREFLIGHT_TIMEOUT_S = 600.0
"""A look at a request may fetch what it names."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Call(Generic[_Answer]):
    """One unary call."""

    method: str
    request: Message
    read: Callable[[Any], _Answer]


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """What would run; or everything that is wrong with the request."""

    violations: tuple[Violation, ...] = ()
    spec: JobSpec | None = None
    """With every open choice decided; None where there are violations."""
    plan: Plan | None = None
    """None where there are violations."""
    runs_here: bool = False
    """Whether the service's machine can run it."""
    why_not_here: str = ""
    manifest: str = ""
    """What `kubectl apply` would run of it; empty where the service has no cluster, or none that could run it."""


@dataclass(frozen=True)
class Page:
    """A part of a listing."""

    jobs: tuple[Job, ...]
    next_page_token: str


def read_spec(spec: SpecLike) -> JobSpec:
    """The request, checked. Raises InvalidRequest with every violation."""
    if isinstance(spec, JobSpec):
        return spec
    return load(Path(spec)) if isinstance(spec, str | Path) else parse(spec)


def plan(namespace: str, spec: JobSpec) -> Call[PlanAnswer]:
    message = convert.spec_to_message(spec)
    request = pb.PlanJobRequest(parent=convert.namespace_name(namespace), spec=message)
    return Call("PlanJob", request, _plan_answer)


def preflight(namespace: str, spec: JobSpec) -> Call[list[Finding]]:
    message = convert.spec_to_message(spec)
    request = pb.PreflightJobRequest(parent=convert.namespace_name(namespace), spec=message)
    read = lambda answer: [convert.from_message(Finding, finding) for finding in answer.findings]  # noqa: E731
    return Call("PreflightJob", request, read)


def submit(
    namespace: str, spec: SpecLike, *, job_id: str = "", request_id: str = "", validate_only: bool = False
) -> Call[Job]:
    """One request id is in the message, so that repeating the call makes no second job."""
    request = pb.CreateJobRequest(
        parent=convert.namespace_name(namespace),
        spec=convert.spec_to_message(read_spec(spec)),
        job_id=job_id,
        request_id=request_id or str(uuid.uuid4()),
        validate_only=validate_only,
    )
    return Call("CreateJob", request, convert.job_from_message)


def get(namespace: str, job: str) -> Call[Job]:
    return Call("GetJob", pb.GetJobRequest(name=_name(namespace, job)), convert.job_from_message)


def page(namespace: str, *, filter: str, page_size: int, page_token: str) -> Call[Page]:
    parent = convert.namespace_name(namespace)
    request = pb.ListJobsRequest(parent=parent, page_size=page_size, page_token=page_token, filter=filter)
    return Call("ListJobs", request, _page)


def cancel(namespace: str, job: str) -> Call[Job]:
    return Call("CancelJob", pb.CancelJobRequest(name=_name(namespace, job)), convert.job_from_message)


def pause(namespace: str, job: str) -> Call[Job]:
    return Call("PauseJob", pb.PauseJobRequest(name=_name(namespace, job)), convert.job_from_message)


def resume(namespace: str, job: str) -> Call[Job]:
    return Call("ResumeJob", pb.ResumeJobRequest(name=_name(namespace, job)), convert.job_from_message)


def delete(namespace: str, job: str, *, artifacts: bool) -> Call[Job]:
    request = pb.DeleteJobRequest(name=_name(namespace, job), artifacts=artifacts)
    return Call("DeleteJob", request, convert.job_from_message)


def events(namespace: str, job: str, *, after_seq: int) -> Call[tuple[list[Event], int]]:
    """Events, and the after_seq of the next page; 0 at the end."""
    parent = _name(namespace, job) if job else convert.namespace_name(namespace)
    request = pb.ListEventsRequest(parent=parent, after_seq=after_seq, page_size=PAGE_EVENTS)
    return Call("ListEvents", request, lambda answer: (read_events(answer), int(answer.next_after_seq)))


def metrics(namespace: str, job: str, *, names: Sequence[str]) -> Call[list[MetricSeries]]:
    request = pb.QueryMetricsRequest(name=_name(namespace, job), metrics=names)
    read = lambda answer: [convert.from_message(MetricSeries, series) for series in answer.series]  # noqa: E731
    return Call("QueryMetrics", request, read)


def outputs(namespace: str, job: str) -> Call[list[Output]]:
    request = pb.ListOutputsRequest(parent=_name(namespace, job))
    read = lambda answer: [convert.from_message(Output, output) for output in answer.outputs]  # noqa: E731
    return Call("ListOutputs", request, read)


def checkpoints(namespace: str, job: str) -> Call[list[Checkpoint]]:
    request = pb.ListCheckpointsRequest(parent=_name(namespace, job))
    read = lambda answer: [convert.from_message(Checkpoint, found) for found in answer.checkpoints]  # noqa: E731
    return Call("ListCheckpoints", request, read)


def watch(namespace: str, job: str, *, after_seq: int) -> tuple[str, Message]:
    """Method and request of a stream of events; of the whole namespace where no job is named."""
    if not job:
        return "WatchJobs", pb.WatchJobsRequest(parent=convert.namespace_name(namespace), after_seq=after_seq)
    return "WatchJob", pb.WatchJobRequest(name=_name(namespace, job), after_seq=after_seq)


def logs(namespace: str, job: str, *, follow: bool, tail: int | None, rank: int, attempt: int) -> Message:
    return pb.StreamLogsRequest(name=_name(namespace, job), follow=follow, tail=tail, rank=rank, attempt=attempt)


def read_events(answer: Any) -> list[Event]:
    """The events of an answer."""
    return [convert.from_message(Event, event) for event in answer.events]


def wrong_plan(error: InvalidRequest) -> PlanAnswer:
    """The answer to a request that is wrong before it is sent."""
    return PlanAnswer(violations=error.violations)


def chosen(found: Sequence[Output], *, job: str, kind: str) -> list[Output]:
    """The outputs to download. Raises UserError when there is none of the kind."""
    of_kind = [output for output in found if kind in ("", output.kind)]
    if not of_kind:
        have = ", ".join(output.kind for output in found) or "none yet"
        raise UserError(
            f"Job {job} has no output {kind or 'at all'}; it has: {have}.", fix="Wait until it has succeeded."
        )
    return of_kind


def _name(namespace: str, job: str) -> str:
    name = convert.job_name(namespace, job)
    convert.split_job_name(name)
    return name


def _plan_answer(answer: pb.PlanJobResponse) -> PlanAnswer:
    if answer.violations:
        return PlanAnswer(violations=tuple(convert.violation_from_message(found) for found in answer.violations))
    found = convert.from_message(Planned, answer)
    return PlanAnswer(
        spec=found.spec,
        plan=found.plan,
        runs_here=found.runs_here,
        why_not_here=found.why_not_here,
        manifest=found.manifest,
    )


def _page(answer: pb.ListJobsResponse) -> Page:
    return Page(tuple(convert.job_from_message(job) for job in answer.jobs), answer.next_page_token)
