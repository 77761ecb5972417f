"""The Kubernetes backend against a real cluster; the trainer's part is played by stand_in.py.

What waits says why, what ends says how, nothing is made twice or taken for another's, and a bad line to the API server
costs time only.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hone.backends.base import Observation, Phase
from hone.backends.kubernetes.answers import ApiUnavailable
from hone.backends.kubernetes.backend import KubernetesBackend, Owner
from hone.backends.kubernetes.client import Api, jobs_path, load_configuration, path_of, pods_path
from hone.cluster import Cluster as Platform
from hone.errors import ClusterError, InvalidRequest, Unavailable, WrongState
from hone.job import EventType, FailureClass, Plan
from hone.machine import plan_here
from hone.manifests import render_job, render_tenant
from hone.run import Run
from hone.spec import JobSpec

from .fault_proxy import FaultProxy
from .harness.access import Cluster
from .harness.api import wait_until

MIB = 1024**2
STORE = "s3://bucket"
STAND_IN = Path(__file__).with_name("stand_in.py")


@dataclass(kw_only=True)
class House:
    """One tenant of a platform, and backends that serve it."""

    cluster: Cluster
    namespace: str
    make_spec: Callable[..., JobSpec]
    backends: list[KubernetesBackend] = field(default_factory=list)

    def platform(self, **changes: Any) -> Platform:
        """The stand-in lies where the image looks for modules first."""
        return Platform.model_validate(
            {
                "image": self.cluster.service_image,
                "image_pull_policy": "Never",
                "store": {"uri": STORE},
                "namespaces": [self.namespace],
                "volumes": [{"name": "stand-in", "configMap": {"name": "stand-in"}}],
                "volume_mounts": [{"name": "stand-in", "mountPath": "/home/hone"}],
                "scratch_bytes": 64 * MIB,
                "grace_period_s": 5,
                "cpus_per_process": 0.05,
                **changes,
            }
        )

    def backend(self, *, api: Api | None = None, **changes: Any) -> KubernetesBackend:
        """One that has seen the namespace."""
        made = KubernetesBackend(self.platform(**changes), api or Api(self.configuration()))
        self.backends.append(made)
        assert made.wait_until_ready(10), made.problems
        return made

    def configuration(self) -> Any:
        """The administrator's."""
        return load_configuration()

    def run(self, *, nodes: int = 1, processes: int = 1, **labels: str) -> tuple[Run, Plan]:
        """An attempt that takes little room."""
        compute = {"gpus_per_node": 0, "nodes": nodes, "processes_per_node": processes}
        planned = plan_here(self.make_spec(labels=labels, compute=compute), self.platform().hardware())
        plan = replace(planned.plan, host_memory_bytes=64 * MIB, disk_bytes=16 * MIB)
        run = Run(
            namespace=self.namespace,
            job=f"sft-{secrets.token_hex(3)}",
            attempt=1,
            nonce=secrets.token_hex(16),
            spec=planned.spec,
            launch=plan.launch,
            store=STORE,
            inputs={},
        )
        return run, plan

    def pods(self, run: Run) -> list[dict[str, Any]]:
        """The pods of an attempt."""
        return self.cluster.kubectl.items("pods", "-l", f"hone.dev/job={run.job}", namespace=self.namespace)

    def start(self, backend: KubernetesBackend, run: Run, plan: Plan) -> Observation:
        """Make it, and wait until it runs and has said something."""
        backend.ensure(run, plan)
        seen = look_until(backend, run, Phase.RUNNING, until=lambda seen: seen.start_time is not None)
        wait_for(lambda: b"step 1 " in log(backend, run))
        return seen


@pytest.fixture
def house(
    cluster: Cluster, namespace: str, make_spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> Iterator[House]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made = House(cluster=cluster, namespace=namespace, make_spec=make_spec)
    script = {"hone_trainer.py": STAND_IN.read_text()}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "stand-in"}, "data": script}
    cluster.kubectl.apply(config_map, *render_tenant(namespace, made.platform()), namespace=namespace)
    yield made
    for backend in made.backends:
        backend.close()


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[FaultProxy]:
    made = FaultProxy(cluster.kubeconfig)
    yield made
    made.close()


def look_until(
    backend: KubernetesBackend,
    run: Run,
    *phases: Phase,
    until: Callable[[Observation], bool] = lambda seen: True,
    timeout_s: float = 90,
) -> Observation:
    """Look as the reconciler does, only more often."""
    deadline = time.monotonic() + timeout_s
    seen = None
    while time.monotonic() < deadline:
        seen = backend.observe(run, after_seq=0)
        if seen.phase in phases and until(seen):
            return seen
        time.sleep(0.05)
    raise AssertionError(f"still {seen and replace(seen, events=())}")


def waits_with(backend: KubernetesBackend, run: Run, text: str) -> Observation:
    """Until it waits for that reason."""
    return look_until(backend, run, Phase.WAITING, until=lambda seen: text in seen.reason)


def fails(backend: KubernetesBackend, run: Run, **options: Any) -> Any:
    """The observation of its end, which has a failure."""
    seen = look_until(backend, run, Phase.FAILED, **options)
    assert seen.failure and seen.failure.message and seen.failure.next_step
    return seen


def log(backend: KubernetesBackend, run: Run, **options: Any) -> bytes:
    return b"".join(backend.logs(run, **{"rank": 0, **options}))


def wait_for(condition: Callable[[], Any], timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def test_an_attempt_goes_from_absent_to_succeeded_and_every_event_is_read(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="5")
    told: list[tuple[str, str]] = []
    unsubscribe = backend.subscribe(lambda namespace, job: told.append((namespace, job)))
    assert backend.observe(run, after_seq=0).phase == Phase.ABSENT
    assert log(backend, run) == b""
    assert backend.ensure(run, plan).phase == Phase.WAITING
    seen = look_until(backend, run, Phase.SUCCEEDED)
    assert [event.seq for event in seen.events] == [1, 2, 3, 4, 5, 6]
    assert seen.events[1].metrics == {"loss": 1.0} and seen.events[1].type == EventType.PROGRESS
    assert seen.start_time and seen.end_time and seen.start_time <= seen.end_time
    assert backend.observe(run, after_seq=4).events == seen.events[4:]
    assert backend.observe(run, after_seq=6).events == ()
    assert set(told) == {(house.namespace, run.job)}
    unsubscribe()


def test_ensure_makes_one_job_however_often_and_by_whomever_it_is_called(house: House) -> None:
    first, second = house.backend(), house.backend()
    run, plan = house.run(steps="200")
    for backend in (first, second, first, second):
        assert backend.ensure(run, plan).phase in (Phase.WAITING, Phase.RUNNING)
    house.start(second, run, plan)
    later = house.backend()
    assert later.observe(run, after_seq=0).phase == Phase.RUNNING
    assert len(house.pods(run)) == 1
    owner = Owner(namespace=run.namespace, job=run.job, attempt=1, nonce=run.nonce)
    assert later.present() == (owner,)


def test_a_pod_is_known_by_the_job_that_controls_it(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="200", pause_ms="50")
    house.start(backend, run, plan)
    pod = house.pods(run)[0]["metadata"]
    owner = Owner(namespace=run.namespace, job=run.job, attempt=1, nonce=run.nonce)
    assert backend.owner_of(house.namespace, pod["name"], pod["uid"]) == owner
    assert backend.owner_of(house.namespace, pod["name"], "another uid") is None
    assert backend.owner_of(house.namespace, "no-such-pod", pod["uid"]) is None
    assert backend.owner_of("default", pod["name"], pod["uid"]) is None
    poser = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "poser", "labels": pod["labels"]},
        "spec": {**house.pods(run)[0]["spec"], "nodeName": None, "serviceAccountName": "hone-trainer"},
    }
    house.cluster.kubectl.apply(poser, namespace=house.namespace)
    made = house.cluster.kubectl.get("pod", "poser", namespace=house.namespace)["metadata"]
    assert backend.owner_of(house.namespace, "poser", made["uid"]) is None
    assert backend.observe(run, after_seq=0).phase == Phase.RUNNING
    house.cluster.kubectl("delete", "pod", pod["name"], "--grace-period=1", namespace=house.namespace)
    wait_until(
        "a pod that is gone reports nothing",
        lambda: backend.owner_of(house.namespace, pod["name"], pod["uid"]) is None,
        timeout_s=10,
    )


def test_a_look_alike_is_told_and_left_alone(house: House) -> None:
    backend = house.backend()
    run, plan = house.run()
    stranger = render_job(replace(run, nonce="0" * 32), plan, house.platform(), managed=True)
    house.cluster.kubectl.apply(stranger, namespace=house.namespace)
    for look in (lambda: backend.ensure(run, plan), lambda: backend.observe(run, after_seq=0)):
        seen = look()
        assert (seen.phase, seen.final) == (Phase.FAILED, True)
        assert seen.failure and seen.failure.failure_class == FailureClass.INTERNAL
        assert f"{house.namespace}/{run.job}-a1 is not the one that was recorded" in seen.failure.message
    backend.stop(run, grace_s=5)
    backend.remove(run)
    assert log(backend, run) == b""
    left = house.cluster.kubectl.get("job", f"{run.job}-a1", namespace=house.namespace)
    assert "activeDeadlineSeconds" not in left["spec"]


def test_a_job_with_our_mark_and_another_template_is_told(house: House) -> None:
    backend = house.backend()
    run, plan = house.run()
    stranger = render_job(run, plan, house.platform(), managed=True)
    stranger["spec"]["template"]["spec"]["containers"][0]["command"] = ["sleep", "60"]
    house.cluster.kubectl.apply(stranger, namespace=house.namespace)
    seen = backend.ensure(run, plan)
    assert seen.phase == Phase.FAILED and seen.failure
    assert "spec.template.spec.containers[trainer].command differs" in seen.failure.message


def test_labels_that_somebody_changes_do_not_hide_a_job(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="400", pause_ms="50")
    house.start(backend, run, plan)
    name = f"{run.job}-a1"
    house.cluster.kubectl(
        "label", "job", name, "hone.dev/job-", "hone.dev/attempt=7", "--overwrite", namespace=house.namespace
    )
    time.sleep(0.5)
    assert backend.observe(run, after_seq=0).phase == Phase.RUNNING
    backend.stop(run, grace_s=5)
    assert fails(backend, run).final


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"node_selector": {"no-such": "label"}}, ("No node takes it", "didn't match Pod's node affinity/selector")),
        ({"image": "127.0.0.1:9/none:1", "image_pull_policy": "Always"}, ("image cannot be pulled", "registry")),
        ({"image": "localhost/none:1"}, ("image cannot be pulled", "Never", "Load the image onto the node")),
        (
            {"store": {"uri": STORE, "secret_name": "store"}},
            ('secret "store" not found', "Create that Secret in the namespace"),
        ),
        (
            {"volumes": [{"name": "stand-in", "configMap": {"name": "none"}}]},
            ('configmap "none" not found', "Create that ConfigMap"),
        ),
        (
            {"volumes": [{"name": "stand-in", "persistentVolumeClaim": {"claimName": "none"}}]},
            ('persistentvolumeclaim "none" not found', "Create that claim"),
        ),
        ({"service_account": "none"}, ('serviceaccount "none" not found', "Install the tenant chart")),
        ({"priority_class_name": "none"}, ("no PriorityClass with name none", "Create that priority class")),
        ({"runtime_class_name": "none"}, ('RuntimeClass "none" not found', "Create that runtime class")),
        (
            {"annotations": {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}},
            ('violates PodSecurity "restricted:latest"', "Pod Security level"),
        ),
        ({"scheduler_name": "nobody"}, ("It waits for the scheduler.",)),
    ],
    ids=[
        "no node", "no registry", "no image", "no secret", "no config map", "no claim", "no service account",
        "no priority class", "no runtime class", "pod security", "no scheduler",
    ],
)  # fmt: skip
def test_what_waits_says_why_and_what_to_do_and_can_be_stopped(
    house: House, changes: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    backend = house.backend(**changes)
    run, plan = house.run()
    backend.ensure(run, plan)
    seen = waits_with(backend, run, wanted[0])
    assert all(part in seen.reason for part in wanted), seen.reason
    backend.stop(run, grace_s=5)
    ended = fails(backend, run, timeout_s=20)
    assert ended.final and "stopped on request" in ended.failure.message
    assert all(pod["status"]["phase"] in ("Failed", "Succeeded") for pod in house.pods(run))


def test_more_gpus_than_a_node_has_are_waited_for_in_the_schedulers_words(house: House) -> None:
    backend = house.backend()
    run, plan = house.run()
    gpus = replace(plan.launch, gpus_per_node=9, device="cuda")
    backend.ensure(run, replace(plan, launch=gpus))
    seen = waits_with(backend, run, "Insufficient nvidia.com/gpu")
    assert "fewer start sooner: compute.gpus_per_node" in seen.reason


@pytest.mark.parametrize(
    ("hard", "wanted"),
    [
        ({"count/jobs.batch": "0"}, "Its Job is not admitted: "),
        ({"pods": "0"}, "Its pods are not admitted: "),
        ({"requests.memory": "1Mi", "limits.memory": "1Mi"}, "Its pods are not admitted: "),
    ],
)
def test_a_quota_is_waited_for_and_taken_when_it_is_raised(house: House, hard: dict[str, str], wanted: str) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}}
    house.cluster.kubectl.apply(quota, namespace=house.namespace)
    wait_for(lambda: house.cluster.kubectl.get("quota", "q", namespace=house.namespace)["status"].get("hard"))
    backend = house.backend()
    run, plan = house.run()
    seen = backend.ensure(run, plan)
    if "jobs" not in str(hard):
        seen = waits_with(backend, run, wanted)
    assert seen.phase == Phase.WAITING and seen.reason.startswith(wanted)
    assert "exceeded quota: q" in seen.reason
    house.cluster.kubectl("delete", "quota", "q", namespace=house.namespace)
    if "jobs" in str(hard):
        backend.ensure(run, plan)
    look_until(backend, run, Phase.SUCCEEDED, timeout_s=90)


def test_a_policy_of_the_platform_is_quoted(house: House) -> None:
    name = house.namespace
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
                "resourceRules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                ],
            },
            "validations": [{"expression": "'cost' in object.metadata.labels", "message": "no cost label"}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    run, plan = house.run()
    backend = house.backend()
    assert [finding.state for finding in backend.preflight(run, plan) if finding.check == "cluster"] == ["OK"]
    house.cluster.kubectl.apply(policy, binding)
    try:
        api = Api(house.configuration())
        body = render_job(run, plan, house.platform(), managed=True)
        wait_for(lambda: _is_refused(api, house.namespace, body))  # policies take effect a moment later
        [told] = [finding for finding in backend.preflight(run, plan) if finding.check == "cluster"]
        assert told.state == "FAILED" and "no cost label" in told.message
        seen = backend.ensure(run, plan)
        assert seen.phase == Phase.WAITING
        assert "no cost label" in seen.reason and "ask who runs the cluster" in seen.reason.lower()
    finally:
        for kind in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
            house.cluster.kubectl("delete", kind, name, "--ignore-not-found")


def _is_refused(api: Api, namespace: str, body: dict[str, Any]) -> bool:
    try:
        api.create(jobs_path(namespace), body, dryRun="All")
    except ClusterError:
        return True
    return False


def test_a_namespace_that_is_not_there_is_waited_for(house: House) -> None:
    backend = house.backend(namespaces=[house.namespace, "not-there-yet"])
    run, plan = house.run()
    seen = backend.ensure(replace(run, namespace="not-there-yet"), plan)
    assert seen.phase == Phase.WAITING and "Namespace not-there-yet does not exist" in seen.reason


def test_what_cannot_start_gives_its_place_back(house: House) -> None:
    backend = house.backend(image="localhost/none:1", start_deadline_s=2)
    run, plan = house.run()
    backend.ensure(run, plan)
    seen = fails(backend, run, timeout_s=30)
    assert seen.failure.failure_class == FailureClass.INFRA and not seen.disrupted and not seen.final
    assert "held its place for 2 s" in seen.failure.message and "Never" in seen.failure.message
    assert all(pod["status"]["phase"] == "Failed" for pod in house.pods(run))


@pytest.mark.parametrize(
    ("code", "failure_class"),
    [(10, "INTERNAL"), (11, "USER"), (12, "DATA"), (13, "OOM"), (14, "INTERNAL"), (15, "INFRA"), (16, "USER")],
)
def test_a_trainer_that_fails_is_quoted(house: House, code: int, failure_class: str) -> None:
    backend = house.backend()
    run, plan = house.run(ending=str(code))
    backend.ensure(run, plan)
    seen = fails(backend, run)
    failure = seen.failure
    assert (failure.failure_class, failure.exit_code, failure.rank) == (failure_class, code, 0)
    assert failure.message == f"It was asked to end with {code}."
    assert (failure.next_step, failure.log_tail) == ("Mend it.", ("the last line",))
    assert [event.seq for event in seen.events] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("code", "failure_class", "word"),
    [(1, "INTERNAL", "ended with code 1"), (127, "INFRA", "cannot be started"), (139, "INTERNAL", "signal 11")],
)
def test_a_trainer_that_says_nothing_leaves_its_last_lines(
    house: House, code: int, failure_class: str, word: str
) -> None:
    backend = house.backend()
    run, plan = house.run(ending=f"mute-{code}")
    backend.ensure(run, plan)
    failure = fails(backend, run).failure
    assert failure.failure_class == failure_class and word in failure.message
    assert failure.log_tail[-2:] == ("step 3 of rank 0", "the last words")


@pytest.mark.slow
def test_more_memory_than_the_limit_is_out_of_memory(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(ending="greedy")
    backend.ensure(run, plan)
    failure = fails(backend, run).failure
    assert (failure.failure_class, failure.exit_code) == (FailureClass.OOM, 137)
    assert "OOMKilled" in failure.message and "micro_batch_size" in failure.next_step


def test_an_eviction_does_not_count(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="400", pause_ms="50")
    house.start(backend, run, plan)
    name = house.pods(run)[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    Api(house.configuration()).create(pods_path(house.namespace, name, "eviction"), eviction)
    seen = fails(backend, run)
    assert seen.disrupted and seen.failure.failure_class == FailureClass.PREEMPTED
    assert f"Pod {name} on node" in seen.failure.message and "was evicted" in seen.failure.message


def test_a_pod_deleted_by_hand_does_not_count(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="400", pause_ms="50")
    house.start(backend, run, plan)
    name = house.pods(run)[0]["metadata"]["name"]
    house.cluster.kubectl("delete", "pod", name, "--wait=false", namespace=house.namespace)
    seen = fails(backend, run)
    assert seen.disrupted and seen.failure.failure_class == FailureClass.PREEMPTED
    assert f"Pod {name} on node" in seen.failure.message and "deleted by somebody" in seen.failure.message


def test_a_job_deleted_by_hand_runs_until_its_pods_are_gone_and_does_not_count(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="400", pause_ms="50", ending="deaf")
    house.start(backend, run, plan)
    house.cluster.kubectl("delete", "job", f"{run.job}-a1", "--wait=false", namespace=house.namespace)
    wait_for(lambda: backend.present() == ())
    assert backend.observe(run, after_seq=0).phase == Phase.RUNNING
    assert backend.ensure(run, plan).reason.endswith("of a deleted Job has yet to end.")
    seen = fails(backend, run)
    assert seen.disrupted and seen.failure.message == f"Job {run.job}-a1 was deleted by somebody."
    assert not [pod for pod in house.pods(run) if pod["status"]["phase"] in ("Pending", "Running")]
    wait_for(lambda: house.pods(run) == [])
    assert house.backend().observe(run, after_seq=0).phase == Phase.ABSENT


def test_a_trainer_is_stopped_by_sigterm_and_says_so(house: House) -> None:
    backend = house.backend(grace_period_s=60)
    run, plan = house.run(steps="400", pause_ms="50")
    house.start(backend, run, plan)
    began = time.monotonic()
    assert backend.stop(run, grace_s=60).phase == Phase.RUNNING
    assert backend.stop(run, grace_s=60).phase == Phase.RUNNING
    seen = fails(backend, run)
    assert time.monotonic() - began < 20
    assert seen.final and seen.failure.failure_class == FailureClass.PREEMPTED
    assert seen.failure.message == "The attempt was stopped on request."
    later = house.backend()  # one that saw nothing of it reads the reason from the Job
    assert fails(later, run).failure.message == seen.failure.message
    backend.remove(run)
    wait_for(lambda: house.pods(run) == [])
    assert backend.present() == () and backend.observe(run, after_seq=0).phase == Phase.ABSENT
    backend.remove(run)


def test_a_trainer_that_does_not_listen_is_killed_after_its_grace(house: House) -> None:
    backend = house.backend(grace_period_s=3)
    run, plan = house.run(steps="4000", pause_ms="50", ending="deaf")
    house.start(backend, run, plan)
    with pytest.raises(WrongState, match="runs"):
        backend.remove(run)
    began = time.monotonic()
    backend.stop(run, grace_s=3)
    assert fails(backend, run).final
    assert 2 < time.monotonic() - began < 15


def test_one_that_has_ended_well_stays_so_when_it_is_stopped(house: House) -> None:
    backend = house.backend()
    run, plan = house.run()
    backend.ensure(run, plan)
    look_until(backend, run, Phase.SUCCEEDED)
    assert backend.stop(run, grace_s=5).phase == Phase.SUCCEEDED


def test_a_suspended_job_is_explained_stopped_and_never_runs_again(house: House) -> None:
    backend = house.backend(node_selector={"no-such": "label"})
    run, plan = house.run()
    backend.ensure(run, plan)
    name = f"{run.job}-a1"
    _suspend(house, name, True)
    waits_with(backend, run, "is suspended, and by no queue")
    backend.stop(run, grace_s=5)
    assert fails(backend, run).final
    _suspend(house, name, False)
    time.sleep(2)
    assert all(pod["metadata"].get("deletionTimestamp") for pod in house.pods(run))


def _suspend(house: House, name: str, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    house.cluster.kubectl("patch", "job", name, "--type=merge", "-p", patch, namespace=house.namespace)


def test_a_gang_runs_when_all_of_it_runs_and_ends_as_a_whole(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(nodes=2, processes=2, steps="40", pause_ms="50", ending="12", on="1")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=lambda seen: seen.start_time is not None)
    wait_for(lambda: b"step 1 of rank 3" in log(backend, run, rank=3))
    assert b"rank 2" not in log(backend, run, rank=3)
    seen = fails(backend, run)
    failure = seen.failure
    assert (failure.failure_class, failure.rank, failure.exit_code) == (FailureClass.DATA, 2, 12)
    assert not [pod for pod in house.pods(run) if pod["status"]["phase"] in ("Pending", "Running")]


def test_a_gang_that_loses_a_pod_to_an_eviction_ends_as_a_whole_and_does_not_count(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(nodes=2, steps="400", pause_ms="50")
    house.start(backend, run, plan)
    second = next(pod["metadata"]["name"] for pod in house.pods(run) if "-a1-1-" in pod["metadata"]["name"])
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": second}}
    Api(house.configuration()).create(pods_path(house.namespace, second, "eviction"), eviction)
    seen = fails(backend, run)
    assert seen.disrupted and second in seen.failure.message


@pytest.fixture
def dead_node(house: House) -> Iterator[str]:
    """A machine that joined and was never heard of again: a Node that says Ready, and no kubelet behind it."""
    name = f"dead-{secrets.token_hex(3)}"
    room = {"cpu": "4", "memory": "8Gi", "pods": "10", "ephemeral-storage": "8Gi"}
    ready = {**_condition("Ready", "True", "KubeletReady", ""), "lastHeartbeatTime": _now()}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}
    api = Api(house.configuration())
    api.create(path_of("nodes"), node)
    status = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
    api.patch(path_of("nodes", name, "status"), status)
    yield name
    house.cluster.kubectl("delete", "node", name, "--ignore-not-found")


@pytest.mark.slow
def test_a_node_that_dies_without_a_word_holds_the_attempt_until_an_operator_says_that_it_is_off(
    house: House, dead_node: str
) -> None:
    backend = house.backend(grace_period_s=1, node_selector={"kubernetes.io/hostname": dead_node})
    run, plan = house.run()
    backend.ensure(run, plan)
    name = wait_for(lambda: [pod["metadata"]["name"] for pod in house.pods(run) if pod["spec"].get("nodeName")])[0]
    running = {"name": "trainer", "image": "x", "imageID": "x", "ready": True, "restartCount": 0, "started": True}
    running["state"] = {"running": {"startedAt": _now()}}
    conditions = [_condition("Ready", "True", "", ""), _condition("PodScheduled", "True", "", "")]
    status = {"status": {"phase": "Running", "conditions": conditions, "containerStatuses": [running]}}
    Api(house.configuration()).patch(pods_path(house.namespace, name, "status"), status)  # its kubelet's last words
    seen = look_until(backend, run, Phase.RUNNING, until=lambda seen: bool(seen.reason))
    assert seen.reason.startswith(f"Node {dead_node} does not answer")
    seen = look_until(backend, run, Phase.RUNNING, until=lambda seen: "taint" in seen.reason, timeout_s=120)
    assert f"kubectl taint nodes {dead_node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in seen.reason
    with pytest.raises(WrongState):
        backend.remove(run)
    command = seen.reason.partition("`kubectl ")[2].partition("`")[0]
    house.cluster.kubectl(*command.split())
    ended = fails(backend, run)
    assert ended.disrupted and ended.failure.failure_class == FailureClass.INFRA
    assert f"Pod {name} on node {dead_node} was taken off its node" in ended.failure.message


def test_a_gang_with_room_for_half_of_it_gives_back_what_it_holds(house: House) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": {"pods": "1"}}}
    house.cluster.kubectl.apply(quota, namespace=house.namespace)
    wait_for(lambda: house.cluster.kubectl.get("quota", "q", namespace=house.namespace)["status"].get("hard"))
    backend = house.backend(gang_deadline_s=4)
    run, plan = house.run(nodes=2, steps="4000", pause_ms="50")
    backend.ensure(run, plan)
    waits_with(backend, run, "1 of its 2 pods have a place. Its pods are not admitted")
    seen = fails(backend, run)
    assert seen.disrupted and "Only 1 of its 2 pods found a place" in seen.failure.message
    assert not [pod for pod in house.pods(run) if pod["status"]["phase"] in ("Pending", "Running")]


def test_logs_are_read_from_any_byte_and_followed_to_the_end(house: House) -> None:
    backend, later = house.backend(), house.backend()
    run, plan = house.run(processes=2, steps="60", pause_ms="50")
    house.start(backend, run, plan)
    followed = b""
    while (phase := backend.observe(run, after_seq=0).phase) == Phase.RUNNING:
        followed += log(backend, run, rank=1, offset=len(followed))
        time.sleep(0.2)
    assert phase == Phase.SUCCEEDED
    followed += log(backend, run, rank=1, offset=len(followed))
    whole = b"".join(b"step %d of rank 1\n" % step for step in range(1, 61))
    assert followed == whole == log(later, run, rank=1)
    assert log(later, run, rank=1, offset=100) == whole[100:]
    assert log(later, run, rank=1, tail=2) == b"step 59 of rank 1\nstep 60 of rank 1\n"
    first = log(later, run, rank=0)
    assert first.startswith(b"the trainer starts\nstep 1 of rank 0\n") and first.endswith(b"the trainer ends\n")
    assert b'"seq"' not in first
    assert later.tail_logs(run) == {0: first, 1: whole}


@pytest.mark.slow
def test_events_that_a_long_log_has_pushed_out_are_told_as_lost(house: House) -> None:
    backend = house.backend()
    run, plan = house.run(steps="3", ending="chatty")
    backend.ensure(run, plan)
    seen = look_until(backend, run, Phase.SUCCEEDED, timeout_s=120)
    assert [(event.seq, event.type) for event in seen.events] == [(4, "warning"), (5, "note")]
    assert "Events 1 to 4 of the attempt are lost" in seen.events[0].message
    assert house.backend().observe(run, after_seq=2).events[0].message.startswith("Events 3 to 4 ")
    assert len(backend.tail_logs(run)[0]) <= 1 << 20


def test_what_a_person_applied_is_shown_and_never_touched(house: House) -> None:
    backend = house.backend(start_deadline_s=1)
    run, plan = house.run(steps="2")
    house.cluster.kubectl.apply(render_job(run, plan, house.platform(), managed=False), namespace=house.namespace)
    shown = wait_for(lambda: [job for job in backend.foreign() if job.seen.phase == Phase.SUCCEEDED])
    assert [(job.name, job.run, job.problem) for job in shown] == [(run.job, run, "")]
    assert b"step 2 of rank 0" in b"".join(backend.foreign_logs(shown[0].uid, rank=0))
    assert backend.present() == ()
    odd = render_job(replace(run, job="odd"), plan, house.platform(image="localhost/none:1"), managed=False)
    odd["spec"]["template"]["metadata"]["annotations"]["hone.dev/spec"] = "{not: [yaml"
    house.cluster.kubectl.apply(odd, namespace=house.namespace)
    found = wait_for(lambda: [job for job in backend.foreign() if job.name == "odd" and "Never" in job.seen.reason])
    assert found[0].run is None and found[0].problem
    assert "activeDeadlineSeconds" not in house.cluster.kubectl.get("job", "odd", namespace=house.namespace)["spec"]


WORKLOADS = "workloads.kueue.x-k8s.io"


@pytest.fixture
def kueue(house: House) -> Iterator[Callable[..., None]]:
    """Kueue's Workload as a resource, without Kueue: the test writes what Kueue would."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    resource = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": WORKLOADS},
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": {"plural": "workloads", "singular": "workload", "kind": "Workload", "listKind": "WorkloadList"},
            "versions": [{"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }
    house.cluster.kubectl.apply(resource)
    house.cluster.kubectl("wait", "--for=condition=Established", f"crd/{WORKLOADS}")

    def tell(job: str, *conditions: dict[str, Any]) -> None:
        uid = house.cluster.kubectl.get("job", job, namespace=house.namespace)["metadata"]["uid"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid, "controller": True}
        workload = {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "Workload",
            "metadata": {"name": f"job-{job}", "ownerReferences": [owner]},
            "spec": {"queueName": "gpus"},
            "status": {"conditions": list(conditions)},
        }
        house.cluster.kubectl.apply(workload, namespace=house.namespace)

    yield tell
    house.cluster.kubectl("delete", "crd", WORKLOADS)


def _condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def test_kueue_is_quoted_while_it_holds_a_job_and_its_preemption_does_not_count(
    house: House, kueue: Callable[..., None]
) -> None:
    backend = house.backend()
    run, plan = house.run(steps="400", pause_ms="50")
    spec = run.spec.model_copy(update={"scheduling": run.spec.scheduling.model_copy(update={"queue": "gpus"})})
    run = replace(run, spec=spec)
    name = f"{run.job}-a1"
    body = render_job(run, plan, house.platform(), managed=True)
    body["spec"]["suspend"] = True  # what Kueue's webhook does
    house.cluster.kubectl.apply(body, namespace=house.namespace)
    waits_with(backend, run, "It waits for Kueue to take it up into queue gpus")
    why = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu, 8 more needed"
    kueue(name, _condition("QuotaReserved", "False", "Pending", why))
    assert waits_with(backend, run, "insufficient").reason == f"It waits in Kueue's queue gpus: {why}."
    kueue(
        name, _condition("QuotaReserved", "True", "QuotaReserved", ""), _condition("Admitted", "True", "Admitted", "")
    )
    _suspend(house, name, False)
    look_until(backend, run, Phase.RUNNING, until=lambda seen: seen.start_time is not None)
    why = "Preempted to accommodate a workload (UID: 1) due to prioritization in the ClusterQueue"
    kueue(name, _condition("Evicted", "True", "Preempted", why), _condition("Preempted", "True", "InClusterQueue", why))
    _suspend(house, name, True)
    seen = fails(backend, run)
    assert seen.disrupted and not seen.final
    assert seen.failure.failure_class == FailureClass.PREEMPTED and why in seen.failure.message
    _suspend(house, name, False)  # its turn comes again: too late, another attempt has taken its place
    time.sleep(2)
    assert all(pod["metadata"].get("deletionTimestamp") for pod in house.pods(run))
    assert backend.observe(run, after_seq=0).phase == Phase.FAILED


def test_an_answer_that_is_lost_leaves_one_job(house: House, proxy: FaultProxy) -> None:
    backend = house.backend(api=Api(proxy.configuration))
    run, plan = house.run()
    proxy.loses = lambda method, path: method == "POST"
    with pytest.raises(Unavailable):
        backend.ensure(run, plan)
    proxy.loses = lambda method, path: False
    assert backend.ensure(run, plan).phase in (Phase.WAITING, Phase.RUNNING)
    look_until(backend, run, Phase.SUCCEEDED)
    assert len(house.cluster.kubectl.items("jobs", namespace=house.namespace)) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_an_api_server_that_is_busy_costs_time_only(house: House, proxy: FaultProxy, code: int) -> None:
    backend = house.backend(api=Api(proxy.configuration))
    run, plan = house.run()
    rolls = iter(range(10**9))
    proxy.answer = lambda method, path: (code, {"Retry-After": "1"}) if next(rolls) % 2 else None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if backend.ensure(run, plan).phase and backend.observe(run, after_seq=0).phase == Phase.SUCCEEDED:
                break
        except Unavailable:
            continue
    seen = wait_for(lambda: _quietly(lambda: backend.observe(run, after_seq=0)))
    assert seen.phase == Phase.SUCCEEDED and [event.seq for event in seen.events] == [1, 2, 3, 4]
    assert len(house.cluster.kubectl.items("jobs", namespace=house.namespace)) == 1


def _quietly(look: Callable[[], Observation]) -> Observation | None:
    try:
        return look()
    except Unavailable:
        return None


def test_a_watch_that_is_cut_every_second_misses_nothing(house: House, proxy: FaultProxy) -> None:
    proxy.cut_after_s = 1.0
    backend = house.backend(api=Api(proxy.configuration))
    run, plan = house.run(steps="60", pause_ms="50")
    backend.ensure(run, plan)
    look_until(backend, run, Phase.RUNNING, until=lambda seen: seen.start_time is not None)
    look_until(backend, run, Phase.SUCCEEDED)
    assert proxy.requests["WATCH"] > 6 and backend.problems == ()


@pytest.mark.slow
def test_a_version_that_is_no_longer_kept_is_followed_by_a_list(house: House, proxy: FaultProxy) -> None:
    gone = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}
    backend = house.backend(api=Api(proxy.configuration))
    run, plan = house.run()
    proxy.first_event = {"type": "ERROR", "object": gone}
    proxy.cut()
    backend.ensure(run, plan)
    before = proxy.requests["GET"]
    look_until(backend, run, Phase.SUCCEEDED)  # by lists alone: every watch ends at once
    assert proxy.requests["GET"] > before
    proxy.first_event = None
    second, plan = house.run()
    backend.ensure(second, plan)
    look_until(backend, second, Phase.SUCCEEDED)


def test_an_outage_is_told_and_what_happened_meanwhile_is_seen_after_it(house: House, proxy: FaultProxy) -> None:
    backend = house.backend(api=Api(proxy.configuration))
    run, plan = house.run(steps="120", pause_ms="50")
    house.start(backend, run, plan)
    with proxy.down():
        told = wait_for(lambda: [problem for problem in backend.problems if house.namespace in problem.what])
        assert all("API server" in problem.why for problem in told)
        assert backend.observe(run, after_seq=0).phase == Phase.RUNNING  # as it was last seen
        with pytest.raises(Unavailable):
            backend.ensure(house.run()[0], plan)
        with pytest.raises(ApiUnavailable):
            backend.stop(run, grace_s=5)
        # It ends, and nobody looks.
        direct = house.backend()
        look_until(direct, run, Phase.SUCCEEDED)
    began = time.monotonic()
    seen = look_until(backend, run, Phase.SUCCEEDED)
    assert time.monotonic() - began < 10 and len(seen.events) == 121
    wait_for(lambda: not backend.problems, timeout_s=10)


def test_a_service_that_starts_during_an_outage_says_so_and_sees_afterwards(house: House, proxy: FaultProxy) -> None:
    run, plan = house.run()
    house.backend().ensure(run, plan)
    with proxy.down():
        backend = KubernetesBackend(house.platform(), Api(proxy.configuration))
        house.backends.append(backend)
        assert not backend.wait_until_ready(1)
        for call in (lambda: backend.observe(run, after_seq=0), lambda: backend.ensure(run, plan)):
            with pytest.raises(Unavailable, match="is not known yet"):
                call()
    assert backend.wait_until_ready(20)
    look_until(backend, run, Phase.SUCCEEDED)


def test_a_missing_right_is_named_and_seen_once_it_is_given(house: House) -> None:
    namespace = house.namespace
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "service"}}
    house.cluster.kubectl.apply(account, namespace=namespace)
    configuration = house.configuration()
    token = house.cluster.kubectl("create", "token", "service", namespace=namespace).strip()
    configuration.cert_file = configuration.key_file = None
    configuration.api_key = {"authorization": f"Bearer {token}"}
    backend = KubernetesBackend(house.platform(), Api(configuration))
    house.backends.append(backend)
    problem = wait_for(lambda: [found for found in backend.problems if found.what.startswith("jobs")])[0]
    user = f"system:serviceaccount:{namespace}:service"
    assert f"{user} has no right to list jobs.batch in namespace {namespace}." in problem.why
    assert "Install the tenant chart" in problem.why
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods", "events", "pods/log"], "verbs": ["get", "list", "watch"]},
    ]
    kind = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{kind}/v1", "kind": "Role", "metadata": {"name": "service"}, "rules": rules}
    binding = {
        "apiVersion": f"{kind}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "service"},
        "roleRef": {"apiGroup": kind, "kind": "Role", "name": "service"},
        "subjects": [{"kind": "ServiceAccount", "name": "service", "namespace": namespace}],
    }
    house.cluster.kubectl.apply(role, binding, namespace=namespace)
    assert backend.wait_until_ready(20)
    run, plan = house.run()
    backend.ensure(run, plan)
    look_until(backend, run, Phase.SUCCEEDED)  # these rights are all that it needs
    backend.stop(run, grace_s=5)
    backend.remove(run)


def test_a_token_that_is_not_accepted_is_told(house: House) -> None:
    configuration = house.configuration()
    configuration.cert_file = configuration.key_file = None
    configuration.api_key = {"authorization": "Bearer nonsense"}
    backend = KubernetesBackend(house.platform(), Api(configuration))
    house.backends.append(backend)
    problem = wait_for(lambda: backend.problems)[0]
    assert "does not accept the service's credentials" in problem.why


def test_a_request_that_no_pod_could_run_is_refused_before_anything_is_made(house: House) -> None:
    backend = house.backend()
    planned = plan_here(house.make_spec(), house.platform().hardware())
    with pytest.raises(InvalidRequest) as refused:
        backend.check(planned, namespace="elsewhere")
    assert {violation.path for violation in refused.value.violations} == {"namespace", "model.source", "dataset.source"}
