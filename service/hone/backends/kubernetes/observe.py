"""What a Job, its pods, the warnings about them and Kueue's Workload mean for the attempt.

Pure: called by backend.py with what is known and the time. The answer is an Observation, and perhaps an ending that the
service has to bring about: an attempt that holds GPUs and cannot start, or that Kueue took the room from. An attempt
has ended when every pod of it is ended or absent, never before: no two pods may hold one rank.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hone.backends.base import Observation, Phase
from hone.backends.kubernetes.endings import Ending, ending_of, pod_failure
from hone.backends.kubernetes.objects import Condition, EventView, JobView, PodView, WorkloadView
from hone.backends.kubernetes.pending import (
    Trouble,
    sentence,
    trouble_of,
    why_no_pods,
    why_suspended,
    why_unplaced,
)
from hone.job import Failure, FailureClass

SILENCE_S = 30.0
"""A pod that has not ended so long after its grace is not ended by its node."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long something may hold what it does not use."""

    start_s: float = 600.0
    """start_deadline_s of the platform."""
    gang_s: float = 120.0
    """gang_deadline_s of the platform."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that is known of one attempt."""

    job: JobView | None
    pods: Sequence[PodView] = ()
    """Those of this Job, with those that went, oldest first."""
    warnings: Mapping[str, Sequence[EventView]] = field(default_factory=dict)
    """By uid of the Job or the pod, oldest first."""
    workload: WorkloadView | None = None
    has_kueue: bool = False
    processes_per_node: int
    now: datetime
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is seen, and what is to be done about it."""

    seen: Observation
    end: Ending | None = None
    """End the attempt, for this reason."""


def judge(facts: Facts) -> Verdict:
    """Look at one attempt. Its Job is known to be the recorded one."""
    job = facts.job
    if job is None or job.is_gone:
        return Verdict(seen=_without_job(facts))
    if _has_succeeded(job, facts.pods):
        return Verdict(seen=_ended(facts, Phase.SUCCEEDED, None))
    ending = Ending.from_json(job.ending)
    if ending or job.is_deleted or job.has("Failed") or job.has("FailureTarget"):
        return Verdict(seen=_on_its_way_out(facts, job, ending))
    if job.is_suspended:
        return _suspended(facts, job)
    return _active(facts, job)


def _without_job(facts: Facts) -> Observation:
    """It was deleted, or never there."""
    job = facts.job
    if live := _live(facts.pods):
        return Observation(phase=Phase.RUNNING, reason=_still_ending(live, facts.now), start_time=_start(facts.pods))
    if job is None:
        return Observation(phase=Phase.ABSENT)
    if _has_succeeded(job, facts.pods):
        return _ended(facts, Phase.SUCCEEDED, None)
    if ending := Ending.from_json(job.ending):
        return _ended(facts, Phase.FAILED, ending)
    found = _ending_of(facts, job)
    if job.has("Failed") or job.has("FailureTarget") or not found.disrupted:  # it had failed before
        return _ended(facts, Phase.FAILED, found)
    failure = Failure(
        failure_class=FailureClass.PREEMPTED,
        message=f"Job {job.name} was deleted by somebody.",
        next_step="Nothing to do: another attempt follows, and this one does not count. To end it for good, cancel it.",
    )
    return _ended(facts, Phase.FAILED, Ending(failure=failure, disrupted=True))


def _on_its_way_out(facts: Facts, job: JobView, ending: Ending | None) -> Observation:
    if live := _live(facts.pods):
        return Observation(phase=Phase.RUNNING, reason=_still_ending(live, facts.now), start_time=_start(facts.pods))
    is_over = job.has("Failed") or job.has("FailureTarget") or (ending is not None and job.is_suspended)
    if not is_over:  # the controller may still be about to make pods
        return Observation(phase=Phase.RUNNING, start_time=_start(facts.pods))
    return _ended(facts, Phase.FAILED, _with_traces(facts, ending) if ending else _ending_of(facts, job))


def _suspended(facts: Facts, job: JobView) -> Verdict:
    """Kueue's turn. One that ran and was suspended is over: its pods are gone, and another attempt queues again."""
    if any(pod.has_started for pod in facts.pods):
        reason = _still_ending(_live(facts.pods), facts.now)
        seen = Observation(phase=Phase.RUNNING, reason=reason, start_time=_start(facts.pods))
        return Verdict(seen=seen, end=_taken_back(job, facts.workload))
    return Verdict(seen=_waiting(why_suspended(job, facts.workload, has_kueue=facts.has_kueue)))


def _active(facts: Facts, job: JobView) -> Verdict:
    """Every index has at most one pod that counts: the newest."""
    pods = {pod.index: pod for pod in facts.pods if not pod.is_gone or pod.phase in ("Succeeded", "Failed")}
    placed = [pod for pod in pods.values() if pod.node and not pod.has_ended]
    unplaced = [pod for pod in pods.values() if not pod.node and not pod.has_ended]
    missing = job.completions - len(pods)
    if not missing and not unplaced and all(pod.has_started or pod.has_ended for pod in pods.values()):
        return Verdict(seen=_running(facts, list(pods.values())))
    reason = _why_waiting(facts, job, unplaced, missing)
    if placed and (unplaced or missing):
        share = f"{len(placed)} of its {job.completions} pods have a place. "
        return Verdict(seen=_waiting(share + reason), end=_half_placed(facts, job, placed, reason))
    if unplaced or missing:
        return Verdict(seen=_waiting(reason))
    troubles = [trouble for pod in placed if (trouble := _trouble(facts, pod))]
    if not troubles:
        where = " and ".join(sorted({pod.node for pod in placed if not pod.has_started}))
        return Verdict(seen=_waiting(f"Its container is being made on node {where}."))
    worst = min(troubles, key=lambda trouble: trouble.since)
    return Verdict(seen=_waiting(worst.sentence), end=_cannot_start(facts, worst))


def _why_waiting(facts: Facts, job: JobView, unplaced: Sequence[PodView], missing: int) -> str:
    if unplaced:
        return why_unplaced(unplaced[0])
    return why_no_pods(job, facts.warnings.get(job.uid, ())) if missing else ""


def _running(facts: Facts, pods: Sequence[PodView]) -> Observation:
    reason = _still_ending([pod for pod in _live(pods) if pod.delete_time], facts.now)
    lost = sorted({pod.node for pod in _live(pods) if _is_out_of_reach(facts, pod)})
    if lost and not reason:
        until = "its pods are taken off when the platform's toleration for that is over."
        reason = f"Node {' and '.join(lost)} does not answer: {until}"
    return Observation(phase=Phase.RUNNING, reason=reason, start_time=_start(pods))


def _is_out_of_reach(facts: Facts, pod: PodView) -> bool:
    """The node controller said so after the pod was last known to be well."""
    warned = [event for event in facts.warnings.get(pod.uid, ()) if event.reason == "NodeNotReady"]
    ready = pod.conditions.get("Ready", Condition(is_true=True))
    return bool(warned) and not ready.is_true


def _trouble(facts: Facts, pod: PodView) -> Trouble | None:
    return None if pod.has_started else trouble_of(pod, facts.warnings.get(pod.uid, ()))


def _cannot_start(facts: Facts, trouble: Trouble) -> Ending | None:
    if facts.now - trouble.since < timedelta(seconds=facts.limits.start_s):
        return None
    failure = Failure(
        failure_class=FailureClass.INFRA,
        message=f"It held its place for {facts.limits.start_s:.0f} s and could not start. {trouble.sentence}",
        next_step="Mend that; another attempt follows while there are some.",
    )
    return Ending(failure=failure)


def _half_placed(facts: Facts, job: JobView, placed: Sequence[PodView], reason: str) -> Ending | None:
    """It gives back what it holds, or two such gangs could hold each other for ever."""
    allowed_s = facts.limits.gang_s * (0.5 + zlib.crc32(job.name.encode()) / 2**32)
    since = max(_placed_time(pod) for pod in placed)
    if facts.now - since < timedelta(seconds=allowed_s):
        return None
    failure = Failure(
        failure_class=FailureClass.PREEMPTED,
        message=f"Only {len(placed)} of its {job.completions} pods found a place within {allowed_s:.0f} s. {reason}",
        next_step="Nothing to do: what it held is given back, and another attempt follows, which does not count. Kueue "
        "or a gang scheduler places all pods or none.",
    )
    return Ending(failure=failure, disrupted=True)


def _placed_time(pod: PodView) -> datetime:
    placed = pod.conditions.get("PodScheduled")
    return placed.time if placed and placed.time else pod.create_time


def _taken_back(job: JobView, workload: WorkloadView | None) -> Ending:
    """Suspended after it had started."""
    evicted = workload.conditions.get("Evicted") if workload else None
    preempted = workload.conditions.get("Preempted") if workload else None
    said = next((found.message for found in (preempted, evicted) if found and found.is_true and found.message), "")
    if evicted and evicted.is_true and "Deactivated" in evicted.reason and "MaximumExecutionTime" in evicted.reason:
        failure = Failure(
            failure_class=FailureClass.USER,
            message=f"Kueue ended it at its longest run time. {sentence(said)}",
            next_step="Raise scheduling.deadline, or make the run shorter.",
        )
        return Ending(failure=failure, final=True)
    who = f"Kueue took its room back (queue {job.queue})" if job.queue else "Its Job was suspended by somebody"
    failure = Failure(
        failure_class=FailureClass.PREEMPTED,
        message=f"{who}: {sentence(said)}" if said else f"{who}.",
        next_step="Nothing to do: another attempt queues again, and this one does not count.",
    )
    return Ending(failure=failure, disrupted=True)


def _ending_of(facts: Facts, job: JobView) -> Ending:
    pods = [_put_out(pod, facts.warnings.get(pod.uid, ())) for pod in facts.pods]
    return ending_of(job, pods, processes_per_node=facts.processes_per_node)


def _put_out(pod: PodView, warnings: Sequence[EventView]) -> PodView:
    """The pod with its kubelet's reason from the event, where its status lacks it: a trainer that ends at once on
    SIGTERM is faster than the kubelet's note of why it sent that."""
    event = next((event for event in warnings if event.reason == "Evicted"), None)
    if event is None or pod.reason or pod.phase != "Failed":
        return pod
    return replace(pod, reason=event.reason, message=event.message)


def _first_failure(facts: Facts) -> Ending | None:
    found = (pod_failure(pod, processes_per_node=facts.processes_per_node) for pod in facts.pods)
    return next((ending for ending in found if ending), None)


def _with_traces(facts: Facts, ending: Ending) -> Ending:
    """The service's own reason, with the last lines that a pod left."""
    found = _first_failure(facts)
    if found is None:
        return ending
    traces = found.failure
    failure = replace(ending.failure, rank=traces.rank, exit_code=traces.exit_code, log_tail=traces.log_tail)
    return replace(ending, failure=failure)


def _has_succeeded(job: JobView, pods: Sequence[PodView]) -> bool:
    """The Job says so, or every index has ended well, whatever was asked of the Job meanwhile."""
    if job.has("Complete"):
        return not _live(pods)
    return len({pod.index for pod in pods if pod.phase == "Succeeded"}) >= job.completions and not _live(pods)


def _live(pods: Sequence[PodView]) -> list[PodView]:
    return [pod for pod in pods if not pod.has_ended]


def _still_ending(live: Sequence[PodView], now: datetime) -> str:
    """Empty while pods end as they should; one whose node does not answer needs a person."""
    late = [pod for pod in live if pod.delete_time and _is_overdue(pod, now)]
    if not late:
        return ""
    if not (pod := late[0]).node:
        return f"Pod {pod.name} is deleted and does not go: look at its finalizers."
    taint = f"kubectl taint nodes {pod.node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    return (
        f"Node {pod.node} does not confirm that pod {pod.name} has ended. If that machine is off for good: `{taint}`, "
        f"or `kubectl delete node {pod.node}`. Until then nothing takes the pod's place, so that no rank runs twice."
    )


def _is_overdue(pod: PodView, now: datetime) -> bool:
    return pod.delete_time is not None and now > pod.delete_time + timedelta(seconds=pod.grace_s + SILENCE_S)


def _waiting(reason: str) -> Observation:
    return Observation(phase=Phase.WAITING, reason=reason)


def _ended(facts: Facts, phase: Phase, ending: Ending | None) -> Observation:
    return Observation(
        phase=phase,
        failure=ending.failure if ending else None,
        disrupted=bool(ending and ending.disrupted),
        final=bool(ending and ending.final),
        start_time=_start(facts.pods),
        end_time=_end(facts),
    )


def _start(pods: Sequence[PodView]) -> datetime | None:
    """When the last pod of the attempt had started."""
    started = [pod.trainer.start_time for pod in pods if pod.trainer and pod.trainer.start_time]
    return max(started, default=None)


def _end(facts: Facts) -> datetime | None:
    ended = [pod.trainer.end_time for pod in facts.pods if pod.trainer and pod.trainer.end_time]
    if ended:
        return max(ended)
    job = facts.job
    for name in ("Complete", "Failed", "FailureTarget"):
        if job and job.has(name):
            return job.conditions[name].time
    return None
