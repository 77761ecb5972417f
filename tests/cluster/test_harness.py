"""The cluster itself: what every other test of this directory takes for granted."""

from typing import Any

import pytest

from .harness.access import Cluster, Database
from .harness.api import KubectlFailed, wait_until

_RESTRICTED: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _pod_spec(image: str, command: list[str], **more: Any) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        # A UID that no image knows, as OpenShift gives them.
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1_000_680_000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "main",
                "image": image,
                "imagePullPolicy": "Never",
                "command": command,
                "resources": {"requests": {"cpu": "1"}},  # or it gets what is left by everything else on this machine
                "securityContext": _RESTRICTED,
            }
        ],
        **more,
    }


def _pod(name: str, image: str, command: list[str], **more: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": _pod_spec(image, command, **more)}


def _run(cluster: Cluster, namespace: str, pod: dict[str, Any], *, timeout_s: float = 60) -> str:
    """Run one pod to its end; its log."""
    name = pod["metadata"]["name"]
    cluster.kubectl.apply(pod, namespace=namespace)

    def look() -> str | None:
        phase = str(cluster.kubectl.get("pod", name, namespace=namespace)["status"].get("phase"))
        return phase if phase in ("Succeeded", "Failed") else None

    phase = wait_until(f"pod {name} ends", look, timeout_s=timeout_s)
    log = cluster.kubectl("logs", name, namespace=namespace)
    assert phase == "Succeeded", log
    return log


@pytest.mark.parametrize("node", ["node-a", "node-b"])
@pytest.mark.parametrize("image", ["service_image", "trainer_image"])
def test_each_image_says_its_version_on_each_node_under_restricted_pod_security(
    cluster: Cluster, namespace: str, image: str, node: str
) -> None:
    command = ["hone", "--version"]
    pod = _pod("version", getattr(cluster, image), command, nodeName=node)
    assert _run(cluster, namespace, pod).startswith("hone ")


def test_a_pod_that_is_not_restricted_is_refused(cluster: Cluster, namespace: str) -> None:
    pod = _pod("root", cluster.service_image, ["true"])
    pod["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    with pytest.raises(KubectlFailed, match="violates PodSecurity"):
        cluster.kubectl.apply(pod, namespace=namespace)


_MEET = """
import os, socket, sys, time
rank, first = int(os.environ["JOB_COMPLETION_INDEX"]), os.environ["FIRST"]
for _ in range(300):
    try:
        address = socket.gethostbyname(first)
        break
    except OSError:
        time.sleep(0.1)
if rank == 0:
    with socket.create_server(("", 29500)) as server:
        connection, peer = server.accept()
        print("rank 1 said", connection.recv(100).decode())
else:
    for _ in range(300):
        try:
            with socket.create_connection((address, 29500), timeout=5) as connection:
                connection.sendall(socket.gethostname().encode())
            break
        except OSError:
            time.sleep(0.1)
"""


def test_the_two_pods_of_an_indexed_job_meet_by_name_on_two_nodes(cluster: Cluster, namespace: str) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "workers"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "meet"}},
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"job-name": "meet"}},
    }
    template = _pod_spec(
        cluster.service_image, ["python", "-c", _MEET], subdomain="workers", topologySpreadConstraints=[spread]
    )
    template["containers"][0]["env"] = [{"name": "FIRST", "value": "meet-0.workers"}]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "meet"},
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "template": {"spec": template},
        },
    }
    cluster.kubectl.apply(service, job, namespace=namespace)
    cluster.kubectl("wait", "--for=condition=Complete", "job/meet", "--timeout=60s", namespace=namespace, timeout_s=70)
    pods = cluster.kubectl.items("pods", namespace=namespace)
    assert {pod["spec"]["nodeName"] for pod in pods} == set(cluster.node_names)
    assert cluster.kubectl("logs", "job/meet", "--all-pods", namespace=namespace).count("rank 1 said meet-1") == 1


_STORE_AND_RECORD = """
import os, boto3, psycopg
store = boto3.client("s3")
store.put_object(Bucket=os.environ["BUCKET"], Key="a/b", Body=b"from a pod", IfNoneMatch="*")
try:
    store.put_object(Bucket=os.environ["BUCKET"], Key="a/b", Body=b"again", IfNoneMatch="*")
except store.exceptions.ClientError as error:
    print(error.response["Error"]["Code"])
print(psycopg.connect(os.environ["DATABASE"]).execute("SELECT 'from PostgreSQL'").fetchone()[0])
"""


def test_pods_reach_the_s3_server_and_postgresql(cluster: Cluster, namespace: str, database: Database) -> None:
    bucket = cluster.s3.make_bucket(f"{namespace}-bucket")
    pod = _pod("clients", cluster.service_image, ["python", "-c", _STORE_AND_RECORD])
    environment = {
        "AWS_ENDPOINT_URL_S3": cluster.s3.pod_endpoint,
        "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "BUCKET": bucket.name,
        "DATABASE": database.pod_url,
    }
    pod["spec"]["containers"][0]["env"] = [{"name": name, "value": value} for name, value in environment.items()]
    assert _run(cluster, namespace, pod).split("\n")[:2] == ["PreconditionFailed", "from PostgreSQL"]
    assert (bucket / "a" / "b").read_bytes() == b"from a pod"


def test_a_killed_api_server_and_a_killed_etcd_come_back_with_what_they_knew(cluster: Cluster, namespace: str) -> None:
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"key": "value"}}
    cluster.kubectl.apply(settings, namespace=namespace)
    with cluster.stopped("apiserver"), pytest.raises(KubectlFailed, match="refused"):
        cluster.kubectl("get", "nodes")
    cluster.restart("etcd")
    assert cluster.kubectl.get("configmap", "kept", namespace=namespace)["data"] == {"key": "value"}


@pytest.mark.slow
def test_a_dead_node_is_noticed_and_comes_back(cluster: Cluster, namespace: str) -> None:
    pod = _pod("waits", cluster.service_image, ["sleep", "1000"], nodeName="node-b", terminationGracePeriodSeconds=1)
    cluster.kubectl.apply(pod, namespace=namespace)
    cluster.kubectl("wait", "--for=condition=Ready", "pod/waits", "--timeout=30s", namespace=namespace)
    with cluster.node_dead("node-b"):
        # 12 s until its lease is too old, 5 s of toleration, and what the controllers need.
        wait_until(
            "the pod of the dead node is to be deleted",
            lambda: cluster.kubectl.get("pod", "waits", namespace=namespace)["metadata"].get("deletionTimestamp"),
            timeout_s=40,
        )
    wait_until("the pod is gone", lambda: not cluster.kubectl.items("pods", namespace=namespace), timeout_s=30)


_COMPILE = """
import bitsandbytes, datasets, pyarrow.parquet, torch, transformers, triton, trl, peft
from deepspeed.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(8))
optimizer = DeepSpeedCPUAdam([weight], lr=0.5)
weight.grad = torch.ones(8)
optimizer.step()
print("stepped to", round(weight[0].item(), 3))
compiled = torch.compile(lambda x: x * 2 + 1)
print("compiled gives", compiled(torch.ones(2))[0].item())
print("4 bits have", bitsandbytes.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4")[0].numel(), "bytes")
"""


@pytest.mark.slow  # ten minutes of a C++ compiler
@pytest.mark.timeout(900)
def test_the_trainer_image_compiles_what_is_compiled_while_training(cluster: Cluster, namespace: str) -> None:
    work = {"name": "work", "emptyDir": {}}
    pod = _pod("compile", cluster.trainer_image, ["python", "-c", _COMPILE], volumes=[work])
    container = pod["spec"]["containers"][0]
    container["volumeMounts"] = [{"name": "work", "mountPath": "/work"}]
    container["env"] = [{"name": name, "value": "/work"} for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")]
    log = _run(cluster, namespace, pod, timeout_s=540)
    assert "stepped to 0.5" in log
    assert "compiled gives 3.0" in log
    assert "4 bits have 2048 bytes" in log
