"""The main job on the real cluster, as its users see it: through the charts and gRPC from outside, by kubectl alone, on
two nodes, as two gangs on room for one and a half, and in pods that are killed at random.

The trainer image trains for real; what it leaves is read back from the S3 server against its manifests.
"""

import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone import Client
from hone.job import EventType, FailureClass, Job, State
from hone.storage import ArtifactStore, Credentials, JobLayout, open_store, verify_directory

from .failing import Place, administrator
from .harness.access import S3, Cluster
from .harness.api import wait_until
from .harness.places import ROOT
from .inputs import upload_inputs
from .installation import Installation, install

TRAINED_S = 240
"""A pod of the trainer starts, trains and stores well within this on two busy cores."""
STEPS = 200
SMALL = {"node_memory_bytes": "2Gi", "scratch_bytes": "1Gi", "rendezvous_s": 60, "grace_period_s": 20}


@pytest.fixture(scope="module")
def bucket(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Any]]]:
    """A bucket with a tiny model and rows, and the request that names them."""
    name = f"main-{tmp_path_factory.mktemp('names').name}-{id(cluster) % 10_000}".replace("_", "-")
    cluster.s3.make_bucket(name)
    yield name, upload_inputs(cluster.s3, name, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def hone(
    cluster: Cluster, bucket: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Installation, str]]:
    """The charts, installed: the service on SQLite, and one tenant."""
    with cluster.new_namespace(f"tenant-{id(bucket) % 100_000}") as tenant:
        values = {"store": {"existingSecret": "hone-own-store"}, "cluster": SMALL}
        directory = tmp_path_factory.mktemp("certificates")
        with install(cluster, directory, tenants=(tenant,), bucket=bucket[0], values=values, wait=False) as found:
            keys = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hone-own-store"}, "stringData": keys}
            cluster.kubectl.apply(secret, namespace=found.namespace)
            found.wait_until_ready()
            yield found, tenant


@pytest.fixture
def client(hone: tuple[Installation, str]) -> Iterator[Client]:
    with hone[0].client(hone[1]) as caller:
        yield caller


def test_a_request_from_outside_the_cluster_ends_as_verified_outputs(
    client: Client, cluster: Cluster, bucket: tuple[str, dict[str, Any]]
) -> None:
    job = client.submit(bucket[1])
    told = list(client.watch(job.id))
    job = client.get(job.id)
    assert job.state == State.SUCCEEDED, job.state_reason
    assert job.creator.endswith(":submitter")
    assert [output.kind for output in job.outputs] == ["adapter", "merged"]
    _verify(cluster.s3, bucket[0], job)
    states = [event.fields["state"] for event in told if event.type == EventType.STATE]
    assert (states[0], states[-1]) == ("PENDING", "SUCCEEDED") and "RUNNING" in states
    assert [event.step for event in told if event.type == EventType.PROGRESS] == [1, 2, 3, 4]
    phases = [event.fields["phase"] for event in told if event.type == EventType.PHASE]
    assert phases == ["loading", "data", "model", "training", "saving", "uploading"]
    seqs = [event.seq for event in told]
    assert seqs == sorted(set(seqs))
    assert "trainable" in "".join(client.logs(job.id))
    _wait_until_let_go(cluster, job)


def test_the_same_request_is_run_by_kubectl_alone_and_found_complete_when_it_is_applied_again(
    cluster: Cluster, namespace: str, bucket: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    manifest = _render(cluster, bucket, namespace, tmp_path)
    _apply(cluster, manifest, namespace)
    _wait_for_job(cluster, namespace, "tiny")
    layout = JobLayout(namespace, "tiny")
    with closing(_store(cluster.s3, bucket[0], "rendered")) as store:
        for kind in (layout.adapter, layout.merged):
            verify_directory(store, kind)
        first = store.get_bytes(layout.result)
        cluster.kubectl("delete", "job", "tiny", "--wait", namespace=namespace)
        _apply(cluster, manifest, namespace)
        _wait_for_job(cluster, namespace, "tiny")
        assert store.get_bytes(layout.result) == first, "it trained again"


def test_the_manifest_of_a_plan_is_applied_by_hand_and_shown_where_a_service_runs(
    client: Client, hone: tuple[Installation, str], cluster: Cluster, bucket: tuple[str, dict[str, Any]]
) -> None:
    _apply(cluster, client.plan(bucket[1]).manifest, hone[1])
    shown = wait_until("the job is shown", lambda: _listed(client, "tiny"), timeout_s=30)
    assert shown.observed and shown.creator == ""
    wait_until("it has ended", lambda: client.get("tiny").state.is_terminal or None, timeout_s=TRAINED_S)
    assert client.get("tiny").state == State.SUCCEEDED
    assert [output.kind for output in client.get("tiny").outputs] == ["adapter", "merged"]
    cluster.kubectl("delete", "job", "tiny", "--wait", namespace=hone[1])


def test_two_nodes_train_as_one_and_lose_what_one_machine_loses(
    client: Client, cluster: Cluster, bucket: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    two_nodes = {"gpus_per_node": 0, "processes_per_node": 1, "nodes": 2}
    job = client.submit({**bucket[1], "name": "pair", "compute": two_nodes})
    placed = wait_until("both pods have a node", lambda: _nodes(cluster, job), timeout_s=120)
    assert placed == {"0": placed["0"], "1": placed["1"]} and placed["0"] != placed["1"]
    losses = _losses(client, job)
    one_machine = {"gpus_per_node": 0, "processes_per_node": 2}
    expected = _losses(client, client.submit({**bucket[1], "name": "single", "compute": one_machine}))
    assert len(losses) == 4
    assert losses == pytest.approx(expected, rel=1e-5)


def test_two_gangs_of_two_on_room_for_three_pods_both_finish(
    client: Client, hone: tuple[Installation, str], cluster: Cluster, bucket: tuple[str, dict[str, Any]]
) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "three"},
        "spec": {"hard": {"pods": "3"}},
    }
    cluster.kubectl.apply(quota, namespace=hone[1])
    try:
        two_nodes = {"gpus_per_node": 0, "processes_per_node": 1, "nodes": 2}
        jobs = [client.submit({**bucket[1], "name": f"gang-{name}", "compute": two_nodes}) for name in ("a", "b")]
        for job in jobs:
            ended = client.wait(job.id, timeout_s=2 * TRAINED_S)
            assert ended.state == State.SUCCEEDED, ended.state_reason
    finally:
        cluster.kubectl("delete", "resourcequota", "three", namespace=hone[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pods_killed_at_random_end_with_the_weights_of_one_that_was_not(
    client: Client,
    hone: tuple[Installation, str],
    cluster: Cluster,
    bucket: tuple[str, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("SOAK_SEED") or secrets.randbelow(10**6))
    chance = random.Random(seed)
    long = {"training": {**bucket[1]["training"], "max_steps": STEPS, "checkpoint": {"steps": 10}}}
    request = {**bucket[1], **long, "scheduling": {"max_attempts": 3}}
    place = Place(hone=hone[0], tenant=hone[1], request=request, api=administrator(cluster), client=client)
    whole, killed = client.submit({**request, "name": "whole"}), client.submit({**request, "name": "killed"})
    evicted_at, killed_at = chance.randint(1, STEPS // 3), chance.randint(STEPS // 2, STEPS - 20)
    who = chance.choice(("main", "supervisor", "worker"))
    with capfd.disabled():
        sys.stdout.write(f"\nSOAK_SEED={seed}: evicted at step {evicted_at}, its {who} killed at {killed_at}\n")
    place.evict(place.reach_step(killed.id, evicted_at))
    place.kill(place.reach_step(killed.id, killed_at, attempt=2), who)
    ended = client.wait(killed.id, timeout_s=2 * TRAINED_S)
    assert ended.state == State.SUCCEEDED, place.describe(killed.id)
    classes = [attempt.failure.failure_class for attempt in ended.attempts if attempt.failure]
    assert classes == [FailureClass.PREEMPTED, FailureClass.INFRA] and len(ended.attempts) == 3
    first_steps = _first_steps(client, ended)
    assert first_steps[2] > evicted_at, "what was saved on request is not what it went on from"
    assert first_steps[3] > first_steps[2], "no checkpoint of the second attempt was gone on from"
    other = client.wait(whole.id, timeout_s=2 * TRAINED_S)
    assert _weights(cluster.s3, bucket[0], ended) == _weights(cluster.s3, bucket[0], other)


def _first_steps(client: Client, job: Job) -> dict[int, int]:
    """Attempt → the first optimizer step that it told."""
    told = [event for event in client.events(job.id) if event.type == EventType.PROGRESS]
    return {event.attempt: event.step or 0 for event in reversed(told)}


def _weights(s3: S3, bucket: str, job: Job) -> bytes:
    place = next(output.uri for output in job.outputs if output.kind == "adapter").removeprefix(f"s3://{bucket}/hone/")
    with closing(_store(s3, bucket, "hone")) as store:
        return store.get_bytes(f"{place}/adapter_model.safetensors")


def _listed(client: Client, job_id: str) -> Job | None:
    return next((job for job in client.list() if job.id == job_id), None)


def _losses(client: Client, job: Job) -> list[float]:
    told = list(client.watch(job.id))
    ended = client.get(job.id)
    assert ended.state == State.SUCCEEDED, ended.state_reason
    return [event.metrics["loss"] for event in told if event.type == EventType.PROGRESS]


def _nodes(cluster: Cluster, job: Job) -> dict[str, str] | None:
    """Index of each pod → its node, once both have one."""
    pods = cluster.kubectl.items("pods", "-l", f"hone.dev/job={job.id}", namespace=job.namespace)
    index = "batch.kubernetes.io/job-completion-index"
    found = {pod["metadata"]["annotations"][index]: pod["spec"].get("nodeName", "") for pod in pods}
    return found if len(found) == 2 and all(found.values()) else None


def _store(s3: S3, bucket: str, prefix: str) -> ArtifactStore:
    keys = Credentials(access_key=s3.access_key, secret_key=s3.secret_key)
    return open_store(f"s3://{bucket}/{prefix}", endpoint=s3.endpoint, region="us-east-1", credentials=keys)


def _verify(s3: S3, bucket: str, job: Job) -> None:
    layout = JobLayout(job.namespace, job.id)
    with closing(_store(s3, bucket, "hone")) as store:
        for output in job.outputs:
            manifest = verify_directory(store, getattr(layout, output.kind))
            assert (manifest.digest, manifest.size_bytes) == (output.sha256, output.size_bytes)
        result = json.loads(store.get_bytes(layout.result))
    assert result["launch"]["nodes"] == 1 and result["steps"]["done"] == 4


def _wait_until_let_go(cluster: Cluster, job: Job) -> None:
    def gone() -> bool | None:
        return not cluster.kubectl.items("jobs", "-l", f"hone.dev/job={job.id}", namespace=job.namespace) or None

    wait_until("the Job is removed once its logs are kept", gone, timeout_s=30)


def _render(cluster: Cluster, bucket: tuple[str, dict[str, Any]], namespace: str, directory: Path) -> str:
    """What `hone render` prints, with the credentials' Secret that it asks for made."""
    name, request = bucket
    model = directory / "config.json"
    with closing(_store(cluster.s3, name, "inputs")) as store:
        model.write_bytes(store.get_bytes("tiny/config.json"))
    (directory / "request.yaml").write_text(yaml.safe_dump(request))
    access = {"uri": f"s3://{name}/rendered", "endpoint": cluster.s3.pod_endpoint, "secret_name": "hone-store"}
    platform = {"image": cluster.trainer_image, "store": access, **SMALL}
    (directory / "platform.yaml").write_text(yaml.safe_dump({"cluster": platform}))
    keys = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hone-store"}, "stringData": keys}
    cluster.kubectl.apply(secret, namespace=namespace)
    command = [str(ROOT / ".venv/bin/hone"), "render", "request.yaml", "--config", "platform.yaml", "--with-tenant"]
    command += ["--namespace", namespace, "--model-config", "config.json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _apply(cluster: Cluster, manifest: str, namespace: str) -> None:
    command = [cluster.kubectl.program, f"--kubeconfig={cluster.kubeconfig}", "apply", "-n", namespace, "-f", "-"]
    done = subprocess.run(command, input=manifest, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _wait_for_job(cluster: Cluster, namespace: str, name: str) -> None:
    def ended() -> dict[str, Any] | None:
        status = cluster.kubectl.get("job", name, namespace=namespace).get("status", {})
        held = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
        return held if held.keys() & {"Complete", "Failed"} else None

    assert "Complete" in wait_until("the Job ends", ended, timeout_s=TRAINED_S)
