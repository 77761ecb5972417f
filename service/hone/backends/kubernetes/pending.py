"""Why an attempt does not run yet: the controllers' own sentence, and what a person can do about it.

Pure; called by observe.py. The service may not look at nodes and secrets, so it quotes who may.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hone.backends.kubernetes.objects import EventView, JobView, PodView, WorkloadView
from hone.backends.kubernetes.remedies import NO_IMAGE, NOT_ADMITTED, NOT_STARTED, UNPLACED, Table, remedy

MAX_SENTENCE = 400

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
"""States of a container whose image is not there; the kubelet's words."""
_SETTLING = frozenset({"", "ContainerCreating", "PodInitializing"})
_START_WARNINGS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox")


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something that keeps a placed pod from starting, while it holds what it was given."""

    sentence: str
    since: datetime


_PREEMPTION = re.compile(r"\s*preemption: .*$", re.DOTALL)


def why_suspended(job: JobView, workload: WorkloadView | None, *, has_kueue: bool) -> str:
    """A suspended Job: Kueue's turn, or somebody's."""
    if not job.queue:
        resume = f'`kubectl patch job {job.name} -n {job.namespace} -p \'{{"spec":{{"suspend":false}}}}\'` resumes it.'
        return f"Its Job is suspended, and by no queue: {resume}"
    if not has_kueue:
        return f"It waits for queue {job.queue}, and no Kueue is seen here: install it, or take out scheduling.queue."
    if workload is None:
        return (
            f"It waits for Kueue to take it up into queue {job.queue}: does that LocalQueue exist in {job.namespace}?"
        )
    return sentence(f"It waits in Kueue's queue {job.queue}: {_why_queued(workload)}")


def why_no_pods(job: JobView, warnings: Sequence[EventView]) -> str:
    """A Job whose pods are not made."""
    for event in reversed(warnings):
        if event.reason == "FailedCreate":
            text = event.message.removeprefix("Error creating: ")
            return _with_remedy(f"Its pods are not admitted: {text}", NOT_ADMITTED)
    return "Its pods are about to be made."


def why_unplaced(pod: PodView) -> str:
    """A pod without a node, in the scheduler's words."""
    placed = pod.conditions.get("PodScheduled")
    if placed is None or not placed.message:
        return "It waits for the scheduler."
    text = _PREEMPTION.sub("", placed.message).strip()
    return _with_remedy(f"No node takes it: {text}", UNPLACED)


def trouble_of(pod: PodView, warnings: Sequence[EventView]) -> Trouble | None:
    """What keeps a placed pod from starting; None while it just takes its time."""
    by_reason = {event.reason: event for event in warnings}
    for container in (*pod.others, *([pod.trainer] if pod.trainer else [])):
        reason = container.waiting_reason
        if reason in IMAGE_REASONS:
            return _image_trouble(pod, container.waiting_message or reason, reason, by_reason)
        if reason not in _SETTLING:
            text = container.waiting_message or reason
            return Trouble(
                sentence=_with_remedy(f"Its container cannot be made on node {pod.node}: {text}", NOT_STARTED),
                since=_since(pod, by_reason.get("Failed")),
            )
    for reason in _START_WARNINGS:
        if event := by_reason.get(reason):
            what = "sandbox cannot be made" if reason == "FailedCreatePodSandBox" else "volumes cannot be mounted"
            return Trouble(
                sentence=_with_remedy(f"Its {what} on node {pod.node}: {event.message}", NOT_STARTED),
                since=_since(pod, event),
            )
    return None


def sentence(text: str) -> str:
    """One line, not too long, that ends as a sentence."""
    text = " ".join(text.split())
    text = text if len(text) <= MAX_SENTENCE else text[: MAX_SENTENCE - 1] + "…"
    return text if text[-1:] in ".?!…" else text + "."


def _image_trouble(pod: PodView, message: str, reason: str, by_reason: dict[str, EventView]) -> Trouble:
    failed = by_reason.get("Failed")
    if message.startswith("Back-off pulling image") and ": " not in message and failed:
        message = failed.message  # kubelets before 1.32 say no more than that in the pod's status
    text = message if reason != "InvalidImageName" else f"InvalidImageName: {message}"
    return Trouble(
        sentence=_with_remedy(f"Its image cannot be pulled on node {pod.node}: {text}", NO_IMAGE),
        since=_since(pod, failed),
    )


def _since(pod: PodView, event: EventView | None) -> datetime:
    placed = pod.conditions.get("PodScheduled")
    return event.first_time if event else (placed.time if placed and placed.time else pod.create_time)


def _why_queued(workload: WorkloadView) -> str:
    """The Workload's own words, the most telling first."""
    if not workload.is_active:
        return "its Workload is deactivated; set spec.active of the Workload to true."
    evicted, reserved = workload.conditions.get("Evicted"), workload.conditions.get("QuotaReserved")
    admitted = workload.conditions.get("Admitted")
    if reserved and not reserved.is_true and reserved.message:
        before = f" It was evicted before: {evicted.message}" if evicted and evicted.is_true and evicted.message else ""
        return reserved.message + before
    if reserved and reserved.is_true and not (admitted and admitted.is_true):
        return (admitted.message if admitted else "") or "quota is reserved; it waits for an admission check."
    if evicted and evicted.is_true and evicted.message:
        return evicted.message
    return "nothing is said about when its turn comes." if reserved is None else "its turn has come."


def _with_remedy(text: str, table: Table) -> str:
    return f"{sentence(text)} {remedy(table, text)}".strip()
