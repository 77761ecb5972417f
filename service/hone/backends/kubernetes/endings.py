"""How an attempt ended: the pod that failed first, its exit code and what its trainer left as termination message.

Pure; called by observe.py once nothing of the attempt runs any more. In a gang one failure brings others: the Job
controller stops the pods that are left, and ranks that lose a peer fail too. So what came first counts, and what only
follows from another's end counts last. A disruption (the machine was taken away) is told from a failure by the pod's
DisruptionTarget condition, or by a deletion that was asked for before anything failed.
"""

import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from typing import Any

from hone.backends.kubernetes.objects import JobView, PodView
from hone.backends.kubernetes.pending import sentence
from hone.job import Failure, FailureClass
from hone.run import FAILURE_CLASSES, FOLLOW_UPS, TrainerExit

LOG_TAIL_LINES = 20
_AGAIN = "Nothing to do: another attempt follows, and this one does not count."
_MARK = re.compile(r"^\[rank \d+\] ?")
_NOT_A_TRAINER = frozenset({126, 127, 128})
_FOLLOWING = frozenset({*FOLLOW_UPS, TrainerExit.INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGKILL})
"""Exit codes that another's end can cause."""


class _Order(IntEnum):
    """Of what happened in the same second: which one is the cause."""

    DISRUPTED = 0
    FAILED = 1
    DELETED = 2
    """Perhaps because of the failure."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The end of an attempt."""

    failure: Failure
    disrupted: bool = False
    """It does not count."""
    final: bool = False
    """No other attempt may follow."""

    def to_json(self) -> str:
        """As the annotation of a Job that the service ends holds it; log lines are left out."""
        failure = {
            name: value for name, value in vars(self.failure).items() if value is not None and name != "log_tail"
        }
        return json.dumps({"failure": failure, "disrupted": self.disrupted, "final": self.final}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Ending | None":
        """The other way round; None where there is none, or somebody wrote something else there."""
        try:
            data = json.loads(text)
            failure = failure_from_json(data["failure"])
            return Ending(failure=failure, disrupted=bool(data["disrupted"]), final=bool(data["final"]))
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, kw_only=True)
class _Cause:
    time: datetime
    order: _Order
    follows: bool
    """It may be no more than the consequence of another's end."""
    pod: PodView
    ending: Ending


def ending_of(job: JobView, pods: Sequence[PodView], *, processes_per_node: int) -> Ending:
    """Why the attempt failed. Every pod has ended."""
    if _is_past_deadline(job):
        return _past_deadline()
    causes = [cause for pod in pods for cause in _causes(pod, processes_per_node)]
    if not causes:
        return _without_a_trace(job)
    failed = [cause for cause in causes if cause.order == _Order.FAILED]
    causes = [replace(cause, follows=cause.follows or _was_cleared_away(cause, failed)) for cause in causes]
    first = min(causes, key=lambda cause: (cause.follows, cause.time, cause.order, cause.pod.index))
    return _peers_missing(first.ending, job, pods) or first.ending


def failure_from_json(data: Mapping[str, Any]) -> Failure:
    """A Failure as the trainer writes it. Raises what a wrong shape raises."""
    return Failure(
        failure_class=FailureClass(str(data["failure_class"])),
        message=str(data["message"]),
        next_step=str(data.get("next_step") or ""),
        rank=None if data.get("rank") is None else int(data["rank"]),
        exit_code=None if data.get("exit_code") is None else int(data["exit_code"]),
        log_tail=tuple(str(line) for line in data.get("log_tail") or ()),
    )


def pod_failure(pod: PodView, *, processes_per_node: int) -> Ending | None:
    """What a pod that failed says of itself; None when it did not fail, or only because its end was asked for."""
    ended = pod.trainer
    if pod.phase == "Failed" and pod.reason == "DeadlineExceeded":
        return _past_deadline()
    if ended is None or ended.exit_code is None:
        return _refused(pod) if pod.phase == "Failed" and (pod.reason or not pod.delete_time) else None
    if ended.exit_code == TrainerExit.SUCCEEDED:
        return None
    said = _termination_message(ended.ended_message)
    rank = pod.index * processes_per_node
    if ended.ended_reason == "OOMKilled":
        return Ending(failure=_out_of_memory(pod, said, rank))
    if pod.reason == "Evicted" and (ended.exit_code == TrainerExit.INTERRUPTED or not isinstance(said, Failure)):
        return _refused(pod)  # a trainer that had the time says no more than that it was told to end
    if isinstance(said, Failure):
        code = ended.exit_code
        failure = replace(said, rank=rank if said.rank is None else said.rank, exit_code=code)
        return Ending(failure=failure)
    return _by_exit_code(pod, ended.exit_code, rank, said)


def _causes(pod: PodView, processes_per_node: int) -> list[_Cause]:
    causes = []
    if pod.has("DisruptionTarget"):
        condition = pod.conditions["DisruptionTarget"]
        time = condition.time or pod.delete_time or pod.create_time
        causes.append(_cause(pod, time, _Order.DISRUPTED, _disruption(pod)))
    failed = pod_failure(pod, processes_per_node=processes_per_node)
    if failed:
        ended = pod.trainer.end_time if pod.trainer else None
        code = pod.trainer.exit_code if pod.trainer else None
        follows = code in _FOLLOWING and failed.failure.failure_class != FailureClass.OOM and pod.reason != "Evicted"
        causes.append(_cause(pod, ended or pod.create_time, _Order.FAILED, failed, follows=follows))
    if pod.phase != "Succeeded":
        if pod.delete_time:
            causes.append(_cause(pod, pod.delete_time, _Order.DELETED, _deleted(pod)))
        elif pod.is_gone and not failed:
            causes.append(_cause(pod, pod.create_time, _Order.DELETED, _deleted(pod), follows=True))
    return causes


def _peers_missing(ending: Ending, job: JobView, pods: Sequence[PodView]) -> Ending | None:
    """Some pods had found a place and waited in vain for those that had none: that is nobody's failure."""
    started = {pod.index for pod in pods if pod.has_started}
    if ending.failure.exit_code != TrainerExit.PEERS_MISSING or len(started) >= job.completions:
        return None
    message = f"Only {len(started)} of its {job.completions} pods had started when the others gave up waiting."
    failure = replace(ending.failure, failure_class=FailureClass.PREEMPTED, message=message, next_step=_AGAIN)
    return Ending(failure=failure, disrupted=True)


def _was_cleared_away(cause: _Cause, failed: Sequence[_Cause]) -> bool:
    """Deleted after another pod had failed: the Job controller does that."""
    return cause.order == _Order.DELETED and any(
        other.pod is not cause.pod and other.time <= cause.time for other in failed
    )


def _cause(pod: PodView, time: datetime, order: _Order, ending: Ending, *, follows: bool = False) -> _Cause:
    return _Cause(time=time, order=order, follows=follows, pod=pod, ending=ending)


def _disruption(pod: PodView) -> Ending:
    """DisruptionTarget, in the words of who set it."""
    condition = pod.conditions["DisruptionTarget"]
    where = f"Pod {pod.name} on node {pod.node}" if pod.node else f"Pod {pod.name}"
    said = sentence(pod.message or condition.message) if pod.message or condition.message else ""
    what, failure_class = {
        "PreemptionByScheduler": ("gave way to a pod of higher priority", FailureClass.PREEMPTED),
        "EvictionByEvictionAPI": (
            "was evicted: its node was drained, or somebody asked for it",
            FailureClass.PREEMPTED,
        ),
        "TerminationByKubelet": ("was ended by its node", FailureClass.PREEMPTED),
        "DeletionByTaintManager": ("was taken off its node, which failed or was tainted", FailureClass.INFRA),
        "DeletionByPodGC": ("is gone with its node", FailureClass.INFRA),
    }.get(condition.reason, (f"was disrupted ({condition.reason})", FailureClass.PREEMPTED))
    failure = Failure(failure_class=failure_class, message=f"{where} {what}. {said}".strip(), next_step=_AGAIN)
    return Ending(failure=failure, disrupted=True)


def _deleted(pod: PodView) -> Ending:
    where = f"Pod {pod.name} on node {pod.node}" if pod.node else f"Pod {pod.name}"
    failure = Failure(
        failure_class=FailureClass.PREEMPTED,
        message=f"{where} was deleted by somebody.",
        next_step=f"{_AGAIN} To end the job for good, cancel it.",
    )
    return Ending(failure=failure, disrupted=True)


def _refused(pod: PodView) -> Ending:
    """A pod that its node would not run, or put out, before or without a word of the trainer."""
    said = sentence(pod.message or pod.reason or "Its node gave no reason.")
    where = f"Node {pod.node or '(none)'}"
    if pod.reason == "Evicted":
        return Ending(
            failure=Failure(
                failure_class=FailureClass.INFRA,
                message=f"{where} put pod {pod.name} out: {said}",
                next_step="It used more disk than it had asked for: a platform raises cluster.scratch_bytes, or gives "
                "`work` a volume of its own.",
            )
        )
    failure = Failure(
        failure_class=FailureClass.INFRA, message=f"{where} did not run pod {pod.name}: {said}", next_step=_AGAIN
    )
    return Ending(failure=failure, disrupted=True)


def _out_of_memory(pod: PodView, said: Failure | tuple[str, ...], rank: int) -> Failure:
    tail = said.log_tail if isinstance(said, Failure) else said
    return Failure(
        failure_class=FailureClass.OOM,
        message=f"Pod {pod.name} needed more memory than its limit, and the kernel killed it (OOMKilled).",
        next_step="Lower what the machine's memory holds: training.micro_batch_size, dataset size, "
        "compute.processes_per_node; or have a platform raise the limit.",
        rank=said.rank if isinstance(said, Failure) and said.rank is not None else rank,
        exit_code=pod.trainer.exit_code if pod.trainer else None,
        log_tail=tail,
    )


def _by_exit_code(pod: PodView, code: int, rank: int, tail: tuple[str, ...]) -> Ending:
    """The trainer left no word of its own."""
    reason = pod.trainer.ended_reason if pod.trainer else ""
    if code in _NOT_A_TRAINER or reason in ("StartError", "ContainerCannotRun"):
        said = sentence(tail[-1] if tail else reason or f"code {code}")
        return _ending(
            FailureClass.INFRA, f"The trainer cannot be started in pod {pod.name}: {said}", rank, code, tail,
            next_step="That image is no trainer image: correct cluster.image.", final=True,
        )  # fmt: skip
    if reason == "ContainerStatusUnknown":
        ending = _ending(
            FailureClass.INFRA, f"Node {pod.node} lost pod {pod.name}: nobody knows how it ended.", rank, None, tail
        )
        return replace(ending, disrupted=True)
    if code in {int(known) for known in TrainerExit}:
        known = TrainerExit(code)
        return _ending(
            FAILURE_CLASSES[known], f"The trainer ended with code {code} ({known.name}) and left no reason.", rank,
            code, tail, next_step="The last lines of its log may tell more.",
        )  # fmt: skip
    if code == 128 + signal.SIGTERM:
        return _ending(FailureClass.PREEMPTED, f"Pod {pod.name} was told to end (SIGTERM).", rank, code, tail)
    if code == 128 + signal.SIGKILL:
        return _ending(
            FailureClass.INFRA, f"The trainer of pod {pod.name} was killed from outside (SIGKILL).", rank, code, tail,
            next_step=f"Look at the kernel's log of node {pod.node} when it repeats.",
        )  # fmt: skip
    how = f"was ended by signal {code - 128}" if 128 < code <= 192 else f"ended with code {code}"
    return _ending(
        FailureClass.INTERNAL, f"The trainer {how} and left no reason.", rank, code, tail,
        next_step="Report it as a bug, with the log.",
    )  # fmt: skip


def _ending(
    failure_class: FailureClass,
    message: str,
    rank: int,
    code: int | None,
    tail: tuple[str, ...],
    *,
    next_step: str = "Nothing to do: another attempt follows while there are some.",
    final: bool = False,
) -> Ending:
    failure = Failure(
        failure_class=failure_class, message=message, next_step=next_step, rank=rank, exit_code=code, log_tail=tail
    )
    return Ending(failure=failure, final=final)


def _termination_message(text: str) -> Failure | tuple[str, ...]:
    """The trainer's own Failure; or, when it could not write one, the last lines of the log that Kubernetes took,
    without events and marks of ranks."""
    try:
        return failure_from_json(json.loads(text))
    except (ValueError, KeyError, TypeError):
        lines = [_MARK.sub("", line) for line in text.splitlines() if not (line.startswith("{") and '"seq"' in line)]
        return tuple(lines[-LOG_TAIL_LINES:])


def _is_past_deadline(job: JobView) -> bool:
    return any(
        job.has(condition) and job.conditions[condition].reason == "DeadlineExceeded"
        for condition in ("FailureTarget", "Failed")
    )


def _past_deadline() -> Ending:
    failure = Failure(
        failure_class=FailureClass.USER,
        message="The attempt was stopped at its deadline (scheduling.deadline).",
        next_step="Raise scheduling.deadline, or make the run shorter.",
    )
    return Ending(failure=failure, final=True)


def _without_a_trace(job: JobView) -> Ending:
    condition = job.conditions.get("Failed") or job.conditions.get("FailureTarget")
    said = f" Its Job says: {sentence(condition.message)}" if condition and condition.message else ""
    failure = Failure(
        failure_class=FailureClass.INFRA,
        message=f"The pods of Job {job.name} are gone, and with them the reason of their end.{said}",
        next_step=_AGAIN,
    )
    return Ending(failure=failure, disrupted=True)
