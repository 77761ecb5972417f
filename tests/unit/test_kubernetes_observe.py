"""From objects to an Observation: what waits says why and what to do, what failed says how, and when an attempt ended.

Objects are written as an API server sends them, with the sentences of real controllers.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hone.backends.base import Phase
from hone.backends.kubernetes.endings import Ending
from hone.backends.kubernetes.objects import (
    ANNOTATION_ENDING,
    EventView,
    JobView,
    PodView,
    WorkloadView,
    job_view,
    pod_view,
    workload_view,
)
from hone.backends.kubernetes.observe import Facts, Limits, Verdict, judge
from hone.job import Failure, FailureClass
from hone.run import FAILURE_CLASSES, TrainerExit

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
ENDING = Ending(failure=Failure(failure_class=FailureClass.PREEMPTED, message="It was stopped on request."), final=True)


def at(seconds: float) -> str:
    """Seconds before now."""
    return (NOW - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def job(*conditions: tuple[str, str, str], **changes: Any) -> JobView:
    spec = {"completions": changes.pop("nodes", 1), "suspend": changes.pop("suspend", False)}
    labels = {"hone.dev/job": "sft-1", "hone.dev/attempt": "1", "app.kubernetes.io/managed-by": "hone"}
    if "queue" in changes:
        labels["kueue.x-k8s.io/queue-name"] = changes.pop("queue")
    metadata: dict[str, Any] = {
        "namespace": "team-a",
        "name": "sft-1-a1",
        "uid": "job-uid",
        "resourceVersion": "10",
        "creationTimestamp": at(1000),
        "labels": labels,
    }
    if ending := changes.pop("ending", None):
        metadata["annotations"] = {ANNOTATION_ENDING: ending.to_json()}
    if changes.pop("deleted", False):
        metadata["deletionTimestamp"] = at(1)
    status = {"conditions": [_condition(*condition) for condition in conditions]}
    assert not changes
    return job_view({"metadata": metadata, "spec": spec, "status": status})


def _condition(kind: str, reason: str = "", message: str = "", *, seconds: float = 10, status: str = "True") -> Any:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(seconds)}


def pod(index: int = 0, *, node: str = "node-a", phase: str = "Pending", **status: Any) -> PodView:
    metadata: dict[str, Any] = {
        "namespace": "team-a",
        "name": f"sft-1-a1-{index}",
        "uid": f"pod-{index}",
        "resourceVersion": "11",
        "creationTimestamp": at(900),
        "labels": {"hone.dev/job": "sft-1", "batch.kubernetes.io/job-completion-index": str(index)},
        "ownerReferences": [{"kind": "Job", "uid": "job-uid"}],
    }
    if (deleted := status.pop("deleted", None)) is not None:
        grace = 30
        metadata["deletionTimestamp"] = at(deleted - grace)
        metadata["deletionGracePeriodSeconds"] = grace
    if "state" in status:
        status["containerStatuses"] = [{"name": "trainer", "state": status.pop("state")}]
    conditions = status.pop("conditions", [_condition("PodScheduled", seconds=800)])
    return pod_view(
        {
            "metadata": metadata,
            "spec": {"nodeName": node},
            "status": {"phase": phase, "conditions": conditions, **status},
        }
    )


def waits(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def runs() -> dict[str, Any]:
    return {"running": {"startedAt": at(100)}}


def ended(code: int, *, reason: str = "Error", seconds: float = 5, message: str = "") -> dict[str, Any]:
    times = {"startedAt": at(100), "finishedAt": at(seconds)}
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, **times}}


def said(failure_class: FailureClass, message: str, **further: Any) -> str:
    return json.dumps({"failure_class": failure_class, "message": message, "next_step": "Do it.", **further})


def unplaced(message: str, index: int = 0) -> PodView:
    condition = _condition("PodScheduled", "Unschedulable", message, status="False")
    return pod(index, node="", conditions=[condition])


def warning(about: str, reason: str, message: str, *, seconds: float = 20) -> dict[str, Sequence[EventView]]:
    time = NOW - timedelta(seconds=seconds)
    return {about: [EventView(about_uid=about, reason=reason, message=message, time=time, first_time=time)]}


def workload(*conditions: Any, **spec: Any) -> WorkloadView:
    metadata = {
        "namespace": "team-a",
        "name": "job-sft",
        "uid": "w",
        "resourceVersion": "9",
        "ownerReferences": [{"kind": "Job", "uid": "job-uid"}],
    }
    return workload_view({"metadata": metadata, "spec": spec, "status": {"conditions": list(conditions)}})


def look(found: JobView | None, *pods: PodView, **facts: Any) -> Verdict:
    return judge(Facts(job=found, pods=pods, processes_per_node=2, now=NOW, **facts))


FAILED = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
PULL = 'failed to pull and unpack image "registry.example.com/t:1": failed to resolve reference'


def test_what_is_not_there_is_absent() -> None:
    assert look(None).seen.phase == Phase.ABSENT


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available: 2 No "
            "preemption victims found for incoming pod.",
            "No node takes it: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu. It starts when one node has",
        ),
        (
            "0/3 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, 2 "
            "Insufficient memory.",
            "It starts when a node has so much free",
        ),
        ("0/2 nodes are available: 2 node(s) had untolerated taint {gpu: true}.", "cluster.tolerations"),
        ("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.", "name another compute.gpu"),
        ("0/2 nodes are available: 2 node(s) were unschedulable.", "kubectl uncordon"),
        ("0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.", "waits for a volume"),
        ('persistentvolumeclaim "models" not found', "Create that claim"),
        ("no nodes available to schedule pods", "no node that takes pods"),
    ],
)
def test_unschedulable_quotes_the_scheduler_and_says_what_to_do(message: str, wanted: str) -> None:
    seen = look(job(), unplaced(message)).seen
    assert seen.phase == Phase.WAITING
    assert wanted in seen.reason and seen.reason.startswith("No node takes it: ")
    assert "preemption victims" not in seen.reason


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8', "ResourceQuota raised"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest": host namespaces', "Pod Security level"),
        ('admission webhook "cost.example.com" denied the request: no cost label', "ask who runs the cluster"),
        ('pods "x" is forbidden: error looking up service account: serviceaccount "hone-trainer" not found', "tenant"),
        ('pods "x" is forbidden: no PriorityClass with name high was found', "priority class"),
        ('pods "x" is forbidden: pod rejected: RuntimeClass "nvidia" not found', "runtime class"),
    ],
)
def test_pods_that_are_not_admitted_keep_the_sentence_and_say_what_to_do(message: str, wanted: str) -> None:
    seen = look(job(), warnings=warning("job-uid", "FailedCreate", f"Error creating: {message}")).seen
    assert seen.phase == Phase.WAITING
    assert seen.reason.startswith(f"Its pods are not admitted: {message}") and wanted in seen.reason


def test_without_a_warning_the_pods_are_about_to_be_made() -> None:
    assert look(job()).seen.reason == "Its pods are about to be made."


@pytest.mark.parametrize(
    ("reason", "message", "wanted"),
    [
        ("ErrImagePull", f"{PULL}: not found", "Push the image, or correct cluster.image."),
        ("ImagePullBackOff", f"Back-off pulling image: {PULL}: 401 unauthorized", "image_pull_secrets"),
        ("ErrImagePull", f"{PULL}: dial tcp: lookup registry.example.com: no such host", "cannot reach the registry"),
        ("ErrImageNeverPull", 'Container image "t:1" is not present with pull policy of Never', "Load the image"),
        ("InvalidImageName", 'Failed to apply default image tag "T"', "Correct cluster.image."),
        ("CreateContainerConfigError", 'secret "hone-store" not found', "Create that Secret"),
        ("CreateContainerConfigError", "couldn't find key AWS_ACCESS_KEY_ID in Secret team-a/s", "lacks that key"),
        ("CreateContainerConfigError", 'configmap "ca" not found', "Create that ConfigMap"),
        ("CreateContainerConfigError", "container has runAsNonRoot and image will run as root", "runs as root"),
        ("CreateContainerError", "context deadline exceeded", "context deadline exceeded."),
    ],
)
def test_a_container_that_cannot_be_made_says_why_and_what_to_do(reason: str, message: str, wanted: str) -> None:
    seen = look(job(), pod(state=waits(reason, message))).seen
    assert seen.phase == Phase.WAITING
    assert message in seen.reason and wanted in seen.reason and "node-a" in seen.reason


def test_a_bare_back_off_takes_the_reason_from_the_event() -> None:
    events = warning("pod-0", "Failed", f"Failed to pull image: {PULL}: not found")
    seen = look(job(), pod(state=waits("ImagePullBackOff", 'Back-off pulling image "t:1"')), warnings=events).seen
    assert "not found. Push the image" in seen.reason


@pytest.mark.parametrize(
    ("reason", "message", "wanted"),
    [
        ("FailedMount", 'MountVolume.SetUp failed for volume "ca" : configmap "ca" not found', "Create that ConfigMap"),
        ("FailedMount", 'MountVolume.SetUp failed for volume "token" : secret "x" not found', "Create that Secret"),
        ("FailedAttachVolume", "Multi-Attach error for volume", "volumes cannot be mounted on node node-a"),
        ("FailedCreatePodSandBox", 'plugin type="bridge" failed (add): no room', "network is at fault"),
    ],
)
def test_a_pod_whose_volumes_or_sandbox_cannot_be_made_says_why(reason: str, message: str, wanted: str) -> None:
    seen = look(job(), pod(state=waits("ContainerCreating")), warnings=warning("pod-0", reason, message)).seen
    assert seen.phase == Phase.WAITING
    assert message in seen.reason and wanted in seen.reason


def test_a_large_image_takes_its_time_and_is_not_ended() -> None:
    found = look(job(), pod(state=waits("ContainerCreating")))
    assert (found.seen.reason, found.end) == ("Its container is being made on node node-a.", None)


def test_what_cannot_start_gives_its_place_back_after_the_deadline() -> None:
    stuck = pod(state=waits("ImagePullBackOff", f"{PULL}: not found"))
    early = look(job(), stuck, warnings=warning("pod-0", "Failed", "x", seconds=599))
    late = look(job(), stuck, warnings=warning("pod-0", "Failed", "x", seconds=600))
    assert early.end is None
    assert late.end and late.end.failure.failure_class == FailureClass.INFRA
    assert not late.end.disrupted and not late.end.final
    assert "held its place for 600 s" in late.end.failure.message and "not found" in late.end.failure.message


def test_a_gang_half_placed_says_so_and_gives_back_what_it_holds() -> None:
    second = unplaced("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.", 1)
    held = [_condition("PodScheduled", seconds=59)]
    early = look(job(nodes=2), pod(0, state=runs(), conditions=held, phase="Running"), second)
    late = look(job(nodes=2), pod(0, state=runs(), phase="Running"), second)
    assert early.end is None
    assert early.seen.phase == Phase.WAITING
    assert early.seen.reason.startswith("1 of its 2 pods have a place. No node takes it: 0/2 nodes")
    assert late.end and late.end.disrupted and "Only 1 of its 2 pods" in late.end.failure.message


def test_two_gangs_that_hold_each_other_do_not_give_way_at_once() -> None:
    def deadline(name: str) -> int:
        view = job(nodes=2)
        for seconds in range(1, 400):
            held = [_condition("PodScheduled", seconds=seconds)]
            found = look(replace(view, name=name), pod(0, state=runs(), conditions=held), unplaced("none", 1))
            if found.end:
                return seconds
        raise AssertionError("never")

    deadlines = {deadline(f"gang-{number}-a1") for number in range(8)}
    assert len(deadlines) > 5 and min(deadlines) >= 60 and max(deadlines) <= 180


def test_a_pod_that_quota_keeps_out_of_a_gang_counts_as_unplaced() -> None:
    events = warning("job-uid", "FailedCreate", 'Error creating: pods "x" is forbidden: exceeded quota: q')
    found = look(job(nodes=2), pod(0, state=runs(), phase="Running"), warnings=events)
    assert found.end and "exceeded quota" in found.end.failure.message


def test_it_runs_once_every_pod_has_started() -> None:
    first = pod(0, phase="Running", state=runs())
    assert look(job(nodes=2), first, pod(1, state=waits("ContainerCreating"))).seen.phase == Phase.WAITING
    seen = look(job(nodes=2), first, pod(1, phase="Running", state=runs())).seen
    assert (seen.phase, seen.reason, seen.start_time) == (Phase.RUNNING, "", NOW - timedelta(seconds=100))


def test_a_pod_that_failed_runs_on_until_its_job_has_taken_notice() -> None:
    assert look(job(), pod(phase="Failed", state=ended(10))).seen.phase == Phase.RUNNING


def test_success_is_every_index_ended_well() -> None:
    good = [pod(index, phase="Succeeded", state=ended(0, reason="Completed")) for index in (0, 1)]
    assert look(job(nodes=2), *good).seen.phase == Phase.SUCCEEDED
    assert look(job(nodes=2), good[0]).seen.phase != Phase.SUCCEEDED
    seen = look(job(("Complete", "", "")), good[0]).seen
    assert (seen.phase, seen.end_time) == (Phase.SUCCEEDED, NOW - timedelta(seconds=5))


def test_who_had_finished_when_the_stop_came_has_succeeded() -> None:
    assert look(job(FAILED, ending=ENDING), pod(phase="Succeeded", state=ended(0))).seen.phase == Phase.SUCCEEDED


def fails(*pods: PodView, found: JobView | None = None) -> Any:
    seen = look(found or job(FAILED, nodes=len(pods)), *pods).seen
    assert seen.phase == Phase.FAILED and seen.failure
    return seen


def test_the_trainers_own_word_is_taken_as_it_is() -> None:
    message = said(FailureClass.DATA, "Row 7 has no text.", rank=1, exit_code=12, log_tail=["a", "b"])
    seen = fails(pod(phase="Failed", state=ended(12, message=message)))
    assert seen.failure == Failure(
        failure_class=FailureClass.DATA,
        message="Row 7 has no text.",
        next_step="Do it.",
        rank=1,
        exit_code=12,
        log_tail=("a", "b"),
    )
    assert not seen.disrupted and not seen.final


@pytest.mark.parametrize("code", [code for code in TrainerExit if code])
def test_a_code_without_a_word_has_its_class_and_its_last_lines(code: TrainerExit) -> None:
    failure = fails(pod(phase="Failed", state=ended(code, message="one\ntwo\n"))).failure
    assert failure.failure_class == FAILURE_CLASSES[code]
    assert (failure.exit_code, failure.log_tail) == (code, ("one", "two"))
    assert code.name in failure.message


@pytest.mark.parametrize(
    ("code", "reason", "failure_class", "word"),
    [
        (137, "OOMKilled", FailureClass.OOM, "more memory than its limit"),
        (20, "OOMKilled", FailureClass.OOM, "more memory than its limit"),
        (137, "Error", FailureClass.INFRA, "SIGKILL"),
        (143, "Error", FailureClass.PREEMPTED, "SIGTERM"),
        (139, "Error", FailureClass.INTERNAL, "signal 11"),
        (1, "Error", FailureClass.INTERNAL, "ended with code 1"),
        (128, "StartError", FailureClass.INFRA, "cannot be started"),
        (127, "Error", FailureClass.INFRA, "cannot be started"),
        (137, "ContainerStatusUnknown", FailureClass.INFRA, "lost pod"),
    ],
)
def test_a_foreign_code_is_explained(code: int, reason: str, failure_class: FailureClass, word: str) -> None:
    failure = fails(pod(phase="Failed", state=ended(code, reason=reason))).failure
    assert failure.failure_class == failure_class and word in failure.message and failure.next_step


def test_memory_is_named_even_where_the_trainer_saw_only_a_dead_worker() -> None:
    message = said(FailureClass.INFRA, "The worker of rank 1 was killed by SIGKILL.", rank=1, log_tail=["x"])
    failure = fails(pod(phase="Failed", state=ended(20, reason="OOMKilled", message=message))).failure
    assert (failure.failure_class, failure.rank, failure.log_tail) == (FailureClass.OOM, 1, ("x",))


@pytest.mark.parametrize(
    ("reason", "failure_class", "word"),
    [
        ("EvictionByEvictionAPI", FailureClass.PREEMPTED, "evicted"),
        ("PreemptionByScheduler", FailureClass.PREEMPTED, "higher priority"),
        ("TerminationByKubelet", FailureClass.PREEMPTED, "by its node"),
        ("DeletionByTaintManager", FailureClass.INFRA, "tainted"),
        ("DeletionByPodGC", FailureClass.INFRA, "gone with its node"),
        ("DeviceTaint", FailureClass.PREEMPTED, "DeviceTaint"),
    ],
)
def test_a_disruption_does_not_count(reason: str, failure_class: FailureClass, word: str) -> None:
    target = _condition("DisruptionTarget", reason, "because so", seconds=20)
    seen = fails(pod(phase="Failed", deleted=20, conditions=[target], state=ended(17)))
    assert seen.disrupted and seen.failure.failure_class == failure_class and word in seen.failure.message


def test_a_disruption_that_was_called_off_is_none() -> None:
    target = _condition("DisruptionTarget", "PreemptionByScheduler", status="False", seconds=20)
    assert not fails(pod(phase="Failed", conditions=[target], state=ended(12))).disrupted


def test_a_failure_before_the_eviction_stays_a_failure() -> None:
    target = _condition("DisruptionTarget", "EvictionByEvictionAPI", seconds=3)
    seen = fails(pod(phase="Failed", conditions=[target], state=ended(12, seconds=60)))
    assert (seen.disrupted, seen.failure.failure_class) == (False, FailureClass.DATA)


def test_a_pod_deleted_by_hand_does_not_count() -> None:
    seen = fails(pod(phase="Failed", deleted=8, state=ended(17)))
    assert seen.disrupted and "deleted by somebody" in seen.failure.message
    assert seen.failure.failure_class == FailureClass.PREEMPTED and "cancel" in seen.failure.next_step


def test_what_is_put_out_for_its_own_use_of_disk_counts() -> None:
    message = 'Usage of EmptyDir volume "work" exceeds the limit "8Gi". '
    stopped = said(FailureClass.PREEMPTED, "The run was asked to stop (SIGTERM) and stopped.")
    lost = said(FailureClass.INFRA, "Node 0 went away without a word.", rank=1)
    for state in (ended(137), ended(17, message=stopped)):
        out = pod(0, phase="Failed", reason="Evicted", message=message, state=state)
        for pods in ([out], [out, pod(1, phase="Failed", state=ended(25, message=lost))]):
            seen = fails(*pods)
            assert not seen.disrupted and seen.failure.failure_class == FailureClass.INFRA
            assert "exceeds the limit" in seen.failure.message and "scratch_bytes" in seen.failure.next_step


def test_what_is_put_out_is_known_by_its_event_too() -> None:
    stopped = said(FailureClass.PREEMPTED, "The run was asked to stop (SIGTERM) and stopped.")
    out = pod(phase="Failed", state=ended(17, message=stopped))
    event = warning(out.uid, "Evicted", 'Usage of EmptyDir volume "work" exceeds the limit "8Gi".')
    found = look(job(FAILED), out, warnings=event).seen
    assert found.failure and not found.disrupted and found.failure.failure_class == FailureClass.INFRA
    assert "exceeds the limit" in found.failure.message
    mere = look(job(FAILED), out, warnings=warning(out.uid, "BackOff", "x")).seen
    assert mere.failure and mere.failure.failure_class == FailureClass.PREEMPTED


def test_a_node_that_refuses_a_placed_pod_disrupts() -> None:
    seen = fails(pod(phase="Failed", reason="OutOfcpu", message="Node didn't have enough resource: cpu"))
    assert seen.disrupted and "did not run pod" in seen.failure.message


def test_of_a_gang_the_first_failure_counts_and_not_what_it_brings_about() -> None:
    lost = said(FailureClass.INFRA, "Another rank went away: Connection closed by peer", rank=0)
    memory = said(FailureClass.OOM, "Out of memory: CUDA", rank=3)
    first = pod(0, phase="Failed", state=ended(25, seconds=9, message=lost))
    second = pod(1, phase="Failed", state=ended(13, seconds=8, message=memory))
    third = pod(2, phase="Failed", deleted=8, state=ended(17, seconds=2))
    assert fails(first, second, third).failure.message == "Out of memory: CUDA"


def test_the_pod_that_the_job_controller_clears_away_is_not_the_cause() -> None:
    for code in (20, 25):
        dead = said(FailureClass.INFRA, "The worker of rank 0 was killed by SIGKILL.", rank=0)
        first = pod(0, phase="Failed", state=ended(code, seconds=9, message=dead))
        seen = fails(first, pod(1, phase="Failed", deleted=9, state=ended(17, seconds=2)))
        assert seen.failure.message == "The worker of rank 0 was killed by SIGKILL." and not seen.disrupted


def test_a_peer_lost_to_an_eviction_is_a_disruption() -> None:
    target = _condition("DisruptionTarget", "EvictionByEvictionAPI", seconds=20)
    lost = said(FailureClass.INTERNAL, "DistBackendError: NCCL", rank=0)
    first = pod(0, phase="Failed", state=ended(10, seconds=15, message=lost))
    assert fails(first, pod(1, phase="Failed", deleted=20, conditions=[target], state=ended(17, seconds=5))).disrupted


def test_the_rank_of_a_silent_pod_is_its_nodes_first() -> None:
    seen = fails(pod(0, phase="Succeeded", state=ended(0)), pod(1, phase="Failed", state=ended(1)))
    assert seen.failure.rank == 2


def test_pods_that_went_without_a_trace_do_not_count() -> None:
    seen = look(job(FAILED)).seen
    assert seen.phase == Phase.FAILED and seen.disrupted and seen.failure
    assert "backoff limit" in seen.failure.message


@pytest.mark.parametrize(
    "seen",
    [
        fails(
            pod(phase="Failed", deleted=9, state=ended(17)),
            found=job(("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")),
        ),
        fails(pod(phase="Failed", reason="DeadlineExceeded", message="Pod was active too long", state=ended(17))),
    ],
)
def test_the_deadline_of_the_request_is_the_requests(seen: Any) -> None:
    assert (seen.failure.failure_class, seen.final) == (FailureClass.USER, True)
    assert "scheduling.deadline" in seen.failure.message


def test_a_gang_that_waited_in_vain_for_a_pod_without_a_place_does_not_count() -> None:
    message = said(FailureClass.INFRA, "Node 1 did not come.", rank=0)
    waited = pod(0, phase="Failed", state=ended(24, message=message))
    seen = fails(waited, pod(1, phase="Failed", deleted=3))
    assert seen.disrupted and "Only 1 of its 2 pods had started" in seen.failure.message
    both = fails(waited, pod(1, phase="Failed", state=ended(25, seconds=1)))
    assert not both.disrupted and both.failure.message == "Node 1 did not come."


@pytest.mark.parametrize("condition", [("FailureTarget", "BackoffLimitExceeded", ""), FAILED])
def test_an_attempt_has_not_ended_while_a_pod_of_it_may_run(condition: tuple[str, str, str]) -> None:
    failed = pod(0, phase="Failed", state=ended(10))
    seen = look(job(condition, nodes=2), failed, pod(1, phase="Running", deleted=5, state=runs())).seen
    assert (seen.phase, seen.reason) == (Phase.RUNNING, "")
    assert look(job(condition, nodes=2), failed).seen.phase == Phase.FAILED


def test_a_node_that_died_without_a_word_names_the_operators_step() -> None:
    lost = pod(1, node="node-b", phase="Running", deleted=100, state=runs())
    seen = look(job(("FailureTarget", "", ""), nodes=2), pod(0, phase="Failed", state=ended(20)), lost).seen
    assert seen.phase == Phase.RUNNING
    assert "kubectl taint nodes node-b node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in seen.reason


def test_a_node_that_does_not_answer_is_told_while_its_pod_still_counts_as_running() -> None:
    ready = _condition("Ready", status="False")
    events = warning("pod-0", "NodeNotReady", "Node is not ready")
    seen = look(job(), pod(phase="Running", state=runs(), conditions=[ready]), warnings=events).seen
    assert seen.phase == Phase.RUNNING and seen.reason.startswith("Node node-a does not answer")
    well = look(job(), pod(phase="Running", state=runs(), conditions=[_condition("Ready")]), warnings=events).seen
    assert well.reason == ""
    taken_off = pod(phase="Running", state=runs(), conditions=[ready], deleted=70)
    assert "kubectl taint nodes node-a" in look(job(), taken_off, warnings=events).seen.reason


def test_what_was_asked_to_end_runs_until_it_has_ended_and_then_says_why() -> None:
    running = pod(phase="Running", deleted=5, state=runs())
    assert look(job(ending=ENDING), running).seen.phase == Phase.RUNNING
    assert look(job(ending=ENDING)).seen.phase == Phase.RUNNING
    message = said(FailureClass.PREEMPTED, "Stopped on request.", rank=0, log_tail=["bye"])
    seen = fails(pod(phase="Failed", deleted=9, state=ended(17, message=message)), found=job(FAILED, ending=ENDING))
    assert seen.final and seen.failure.message == "It was stopped on request." and seen.failure.log_tail == ("bye",)


def test_a_suspended_job_that_was_asked_to_end_has_ended() -> None:
    assert look(job(suspend=True, ending=ENDING)).seen.phase == Phase.FAILED


def test_a_job_that_somebody_deletes_runs_until_its_pods_are_gone() -> None:
    running = pod(phase="Running", deleted=3, state=runs())
    gone = replace(job(), is_gone=True)
    assert look(job(deleted=True), running).seen.phase == Phase.RUNNING
    assert look(gone, running).seen.phase == Phase.RUNNING
    assert look(None, running).seen.phase == Phase.RUNNING
    seen = look(gone).seen
    assert seen.phase == Phase.FAILED and seen.disrupted and seen.failure
    assert seen.failure.message == "Job sft-1-a1 was deleted by somebody."
    assert look(gone, pod(phase="Failed", deleted=9, state=ended(17))).seen.failure == seen.failure
    failed = look(gone, pod(phase="Failed", deleted=3, state=ended(12, seconds=9))).seen.failure
    assert failed and failed.failure_class == FailureClass.DATA


@pytest.mark.parametrize(
    ("found", "has_kueue", "wanted"),
    [
        (None, False, "no Kueue is seen here"),
        (None, True, "does that LocalQueue exist in team-a?"),
        (workload(), True, "nothing is said about when its turn comes"),
        (
            workload(
                _condition(
                    "QuotaReserved",
                    "Pending",
                    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor "
                    "h100, 8 more needed",
                    status="False",
                )
            ),
            True,
            "It waits in Kueue's queue gpus: couldn't assign flavors to pod set main: insufficient unused quota",
        ),
        (workload(_condition("QuotaReserved", "Inadmissible", "LocalQueue gpus doesn't exist", status="False")), True,
         "LocalQueue gpus doesn't exist"),
        (workload(_condition("QuotaReserved"), _condition("Admitted", "", "Waiting for checks", status="False")), True,
         "Waiting for checks"),
        (workload(_condition("QuotaReserved")), True, "waits for an admission check"),
        (workload(active=False), True, "deactivated"),
    ],
)  # fmt: skip
def test_a_job_in_a_queue_says_what_kueue_says(found: WorkloadView | None, has_kueue: bool, wanted: str) -> None:
    seen = look(job(suspend=True, queue="gpus"), workload=found, has_kueue=has_kueue).seen
    assert seen.phase == Phase.WAITING and wanted in seen.reason and "gpus" in seen.reason


def test_a_job_that_somebody_suspended_says_how_it_goes_on() -> None:
    assert "kubectl patch job sft-1-a1 -n team-a" in look(job(suspend=True)).seen.reason


def test_a_job_that_kueue_took_the_room_from_is_over_and_does_not_count() -> None:
    evicted = workload(
        _condition("Evicted", "Preempted", "Preempted to accommodate a workload of higher priority"),
        _condition("Preempted", "InClusterQueue", "Preempted to accommodate a workload (UID: 1) of higher priority"),
    )
    found = look(job(suspend=True, queue="gpus"), pod(phase="Running", deleted=4, state=runs()), workload=evicted)
    assert found.seen.phase == Phase.RUNNING
    assert found.end and found.end.disrupted and not found.end.final
    assert found.end.failure.failure_class == FailureClass.PREEMPTED
    assert "Preempted to accommodate a workload (UID: 1)" in found.end.failure.message


def test_a_job_at_kueues_longest_run_time_is_the_requests_fault() -> None:
    evicted = workload(_condition("Evicted", "DeactivatedDueToMaximumExecutionTimeExceeded", "exceeded the maximum"))
    found = look(job(suspend=True, queue="gpus"), pod(phase="Running", state=runs()), workload=evicted)
    assert found.end and found.end.final and found.end.failure.failure_class == FailureClass.USER


def test_an_ending_survives_its_annotation_and_foreign_text_there_is_none() -> None:
    assert Ending.from_json(ENDING.to_json()) == ENDING
    for text in ("", "{}", "[]", "null", '{"failure": 1}', '{"failure": {"failure_class": "X", "message": ""}}'):
        assert Ending.from_json(text) is None


def test_limits_are_the_platforms() -> None:
    stuck = pod(state=waits("ErrImagePull", "not found"))
    assert look(job(), stuck, limits=Limits(start_s=900)).end is None
    assert look(job(), stuck, limits=Limits(start_s=800)).end
