"""What is kept of each Kubernetes object: the few fields that are used, so that a thousand live jobs stay small.

Pure: JSON as the API server sends it in, frozen records out. An absent field has the value that Kubernetes gives it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from hone.manifests.names import (
    ANNOTATION_SPEC,
    CONTAINER,
    LABEL_ATTEMPT,
    LABEL_JOB,
    LABEL_MANAGED_BY,
    LABEL_QUEUE,
    MANAGED_BY_HONE,
)

ANNOTATION_ENDING = "hone.dev/ending"
"""Why the service ended an attempt, as JSON: written in the same request that ends it."""
LABEL_INDEX = "batch.kubernetes.io/job-completion-index"

Json = Mapping[str, Any]

_NONCE = re.compile(r"^nonce:[ ]*(?P<quote>['\"]?)(?P<nonce>.+?)(?P=quote)[ ]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition that is true or false, with why and since when."""

    is_true: bool
    reason: str = ""
    message: str = ""
    time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A Job: one attempt, or one that a person applied."""

    namespace: str
    name: str
    uid: str
    version: str
    """Its resourceVersion."""
    create_time: datetime
    job: str = ""
    """Id in hone.dev/job."""
    attempt: int = 0
    nonce: str = ""
    """As the run file in its annotation has it; only who stored it before can know it."""
    is_managed: bool = False
    is_suspended: bool = False
    is_deleted: bool = False
    """Somebody asked for its deletion."""
    is_gone: bool = False
    """It was there, and is not any more."""
    queue: str = ""
    """Kueue's queue."""
    spec: str = ""
    """The run file; kept for what people applied, where nobody else has it."""
    ending: str = ""
    completions: int = 1
    start_time: datetime | None = None
    end_time: datetime | None = None
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    def has(self, condition: str) -> bool:
        """Whether that condition is there and true."""
        found = self.conditions.get(condition)
        return bool(found and found.is_true)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerView:
    """The state of one container: waiting, running or ended."""

    waiting_reason: str = ""
    waiting_message: str = ""
    start_time: datetime | None = None
    exit_code: int | None = None
    """None while it has not ended."""
    ended_reason: str = ""
    ended_message: str = ""
    """The termination message."""
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """One pod of an attempt."""

    namespace: str
    name: str
    uid: str
    version: str
    owner: str
    """Name of its Job."""
    owner_uid: str
    create_time: datetime
    job: str = ""
    attempt: int = 0
    index: int = 0
    """Its node's number in the gang."""
    node: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    delete_time: datetime | None = None
    """When its deletion was asked for."""
    grace_s: float = 0.0
    """How long it may take to end then."""
    is_gone: bool = False
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    trainer: ContainerView | None = None
    others: tuple[ContainerView, ...] = ()
    """Containers that run before or beside the trainer."""

    @property
    def has_ended(self) -> bool:
        """Nothing of it runs any more, confirmed by its node or by its absence."""
        return self.is_gone or self.phase in ("Succeeded", "Failed")

    @property
    def has_started(self) -> bool:
        """Whether its trainer ran at some time."""
        return self.trainer is not None and self.trainer.start_time is not None

    def has(self, condition: str) -> bool:
        """Whether that condition is there and true."""
        found = self.conditions.get(condition)
        return bool(found and found.is_true)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """A warning that a controller, the scheduler or a kubelet wrote about a Job or a pod."""

    about_uid: str
    reason: str
    message: str
    time: datetime
    """The last time."""
    first_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadView:
    """What Kueue says of a Job."""

    namespace: str
    name: str
    uid: str
    version: str
    owner_uid: str
    """Uid of its Job."""
    queue: str = ""
    is_active: bool = True
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    def has(self, condition: str) -> bool:
        """Whether that condition is there and true."""
        found = self.conditions.get(condition)
        return bool(found and found.is_true)


class View(Protocol):
    """What the cache needs to know of a Job, a pod or a Workload."""

    @property
    def uid(self) -> str: ...
    @property
    def version(self) -> str: ...


def job_view(data: Json) -> JobView:
    """A Job."""
    metadata, spec, status = data["metadata"], data.get("spec", {}), data.get("status", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    is_managed = labels.get(LABEL_MANAGED_BY) == MANAGED_BY_HONE
    text = spec_text(data)
    return JobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        create_time=_time(metadata["creationTimestamp"]),
        job=labels.get(LABEL_JOB, ""),
        attempt=_int(labels.get(LABEL_ATTEMPT)),
        nonce=_nonce(text),
        is_managed=is_managed,
        is_suspended=bool(spec.get("suspend")),
        is_deleted="deletionTimestamp" in metadata,
        queue=labels.get(LABEL_QUEUE, ""),
        spec="" if is_managed else text,
        ending=annotations.get(ANNOTATION_ENDING, ""),
        completions=spec.get("completions") or 1,
        start_time=_maybe_time(status.get("startTime")),
        end_time=_maybe_time(status.get("completionTime")),
        conditions=_conditions(status),
    )


def spec_text(data: Json) -> str:
    """The run file that a Job carries: the pod template's, which is the one that its pods read."""
    template = data.get("spec", {}).get("template", {}).get("metadata") or {}
    annotations = {**(data["metadata"].get("annotations") or {}), **(template.get("annotations") or {})}
    return str(annotations.get(ANNOTATION_SPEC, ""))


def pod_view(data: Json) -> PodView:
    """A pod."""
    metadata, status = data["metadata"], data.get("status", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    grace_s = float(metadata.get("deletionGracePeriodSeconds") or 0)
    deadline = _maybe_time(metadata.get("deletionTimestamp"))  # the moment at which its grace ends
    statuses = {entry["name"]: entry for entry in status.get("containerStatuses") or ()}
    trainer = statuses.pop(CONTAINER, None)
    others = [*(status.get("initContainerStatuses") or ()), *statuses.values()]
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        owner=_owner(metadata, "name"),
        owner_uid=_owner(metadata, "uid"),
        create_time=_time(metadata["creationTimestamp"]),
        job=labels.get(LABEL_JOB, ""),
        attempt=_int(labels.get(LABEL_ATTEMPT)),
        index=_int(labels.get(LABEL_INDEX) or annotations.get(LABEL_INDEX)),
        node=data.get("spec", {}).get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        delete_time=deadline - timedelta(seconds=grace_s) if deadline else None,
        grace_s=grace_s,
        conditions=_conditions(status),
        trainer=_container(trainer) if trainer else None,
        others=tuple(_container(other) for other in others),
    )


def event_view(data: Json) -> EventView:
    """A core/v1 Event."""
    metadata = data["metadata"]
    series = data.get("series") or {}
    time = series.get("lastObservedTime") or data.get("lastTimestamp") or data.get("eventTime")
    return EventView(
        about_uid=data.get("involvedObject", {}).get("uid", ""),
        reason=data.get("reason", ""),
        message=data.get("message", ""),
        time=_time(time or metadata["creationTimestamp"]),
        first_time=_time(data.get("firstTimestamp") or data.get("eventTime") or metadata["creationTimestamp"]),
    )


def workload_view(data: Json) -> WorkloadView:
    """A Kueue Workload, of any version that has these fields."""
    metadata, spec = data["metadata"], data.get("spec", {})
    return WorkloadView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        owner_uid=_owner(metadata, "uid"),
        queue=spec.get("queueName", ""),
        is_active=spec.get("active", True),
        conditions=_conditions(data.get("status", {})),
    )


def _owner(metadata: Json, key: str) -> str:
    """The Job that controls it; empty where none does."""
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
    return str(owners[0][key]) if owners and owners[0].get("kind") == "Job" else ""


def _conditions(status: Json) -> dict[str, Condition]:
    return {
        entry["type"]: Condition(
            is_true=entry.get("status") == "True",
            reason=entry.get("reason", ""),
            message=entry.get("message", ""),
            time=_maybe_time(entry.get("lastTransitionTime")),
        )
        for entry in status.get("conditions") or ()
    }


def _container(entry: Json) -> ContainerView:
    state = entry.get("state") or {}
    waiting, running = state.get("waiting") or {}, state.get("running") or {}
    ended = state.get("terminated") or (entry.get("lastState") or {}).get("terminated") or {}
    return ContainerView(
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        start_time=_maybe_time(running.get("startedAt") or ended.get("startedAt")),
        exit_code=ended.get("exitCode"),
        ended_reason=ended.get("reason", ""),
        ended_message=ended.get("message", ""),
        end_time=_maybe_time(ended.get("finishedAt")),
    )


def _nonce(text: str) -> str:
    """Read without parsing the rest: a thousand run files are listed at once."""
    match = _NONCE.search(text)
    return match["nonce"] if match else ""


def _int(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _maybe_time(text: str | None) -> datetime | None:
    """A container that never started has the year 1970."""
    return _time(text) if text and not text.startswith("1970-") else None
