"""Every golden manifest and every rendered example before the real API server: valid, restricted, idempotent."""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone.cluster import Cluster as Configuration
from hone.cluster import parse_cluster
from hone.manifests import names, render_job, render_tenant, to_yaml
from hone.modelinfo import load_shape
from hone.plan import make_plan
from hone.run import Run
from hone.spec.parse import parse

from .harness.access import Cluster
from .harness.api import KubectlFailed, wait_until

ROOT = Path(__file__).parents[2]
FILES = {
    path.stem: path
    for directory in ("tests/golden/manifests", "k8s/examples")
    for path in sorted((ROOT / directory).glob("*.yaml"))
}
JOBS = [name for name in FILES if name != "tenant"]
NAMESPACE = "team-nlp"
"""The namespace that they were rendered for."""
NO_PODS = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
PLATFORM: list[dict[str, Any]] = [
    {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "batch-low"}, "value": 10},
    {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"},
]
"""What the platform of the golden file `platform` has."""


@pytest.fixture(scope="module")
def home(cluster: Cluster) -> Iterator[str]:
    """A namespace with what pods of the golden files need to be admitted, and no room for one to start."""
    with cluster.new_namespace(f"test-{secrets.token_hex(4)}") as name:
        accounts = [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}
            for account in ("hone-trainer", "ml-training")
        ]
        cluster.kubectl.apply(NO_PODS, *accounts, namespace=name)
        cluster.kubectl.apply(*PLATFORM)
        yield name
        cluster.kubectl("delete", "priorityclass/batch-low", "runtimeclass/nvidia")


def _text(name: str, namespace: str) -> str:
    """The file as it is, but for its namespace."""
    return FILES[name].read_text(encoding="utf-8").replace(f"namespace: {NAMESPACE}", f"namespace: {namespace}")


def _strictly(cluster: Cluster, text: str, namespace: str) -> list[dict[str, Any]]:
    """What the API server would make of it, with fieldValidation=Strict."""
    words = ["apply", "--dry-run=server", "--validate=strict", "-f", "-", "-o", "json"]
    answer = json.loads(cluster.kubectl(*words, namespace=namespace, stdin=text))
    return list(answer["items"]) if answer["kind"] == "List" else [answer]


def _pod(name: str, namespace: str) -> dict[str, Any]:
    """The pod template of a file, as a Pod."""
    job = next(one for one in yaml.safe_load_all(_text(name, namespace)) if one["kind"] == "Job")
    template = job["spec"]["template"]
    metadata = {"name": "pod", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("name", FILES)
def test_the_api_server_knows_every_field(cluster: Cluster, home: str, name: str) -> None:
    text = _text(name, home)
    answered = _strictly(cluster, text, home)
    for ours, theirs in zip(yaml.safe_load_all(text), answered, strict=True):
        assert (theirs["kind"], theirs["metadata"]["name"]) == (ours["kind"], ours["metadata"]["name"])
        assert _lost(ours, theirs) == []


def _lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where the API server has another value than the file: kubectl's YAML parser reads what Python's does."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [one for key, value in ours.items() for one in _lost(value, theirs.get(key), f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [one for index, (mine, other) in pairs for one in _lost(mine, other, f"{path}[{index}]")]
    return [] if ours == theirs or str(ours) == theirs else [f"{path}: {ours!r} became {theirs!r}"]


def test_a_field_that_kubernetes_does_not_know_would_be_found(cluster: Cluster, home: str) -> None:
    text = _text("one-cpu", home).replace("podReplacementPolicy:", "podReplacmentPolicy:")
    with pytest.raises(KubectlFailed, match="podReplacmentPolicy"):
        _strictly(cluster, text, home)


def _admit(cluster: Cluster, namespace: str, pod: dict[str, Any]) -> None:
    """Ask for the pod, which is not made."""
    cluster.kubectl("create", "--dry-run=server", "-f", "-", namespace=namespace, stdin=json.dumps(pod))


@pytest.fixture(scope="module")
def admitting(cluster: Cluster, home: str) -> Iterator[str]:
    """The same namespace with room for pods."""
    cluster.kubectl("delete", "resourcequota/none", namespace=home)
    yield home
    cluster.kubectl.apply(NO_PODS, namespace=home)


Mutation = Callable[[dict[str, Any]], Any]
MUTANTS: dict[str, Mutation] = {
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(
        privileged=True, allowPrivilegeEscalation=True
    ),
    "capabilities": lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"),
    "root": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "seccomp": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "host path": lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "host network": lambda spec: spec.update(hostNetwork=True),
}


@pytest.mark.parametrize("name", JOBS)
def test_its_pod_is_admitted_under_restricted(cluster: Cluster, admitting: str, name: str) -> None:
    """The Job's own admission does not look at the pod template."""
    _admit(cluster, admitting, _pod(name, admitting))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_pod_that_takes_more_is_refused(cluster: Cluster, admitting: str, mutant: str) -> None:
    pod = _pod("one-gpu", admitting)
    MUTANTS[mutant](pod["spec"])
    with pytest.raises(KubectlFailed, match="violates PodSecurity"):
        _admit(cluster, admitting, pod)


@pytest.mark.parametrize("name", FILES)
def test_applying_it_again_changes_nothing(cluster: Cluster, namespace: str, name: str) -> None:
    cluster.kubectl.apply(NO_PODS, namespace=namespace)
    text = _text(name, namespace)
    assert "created" in cluster.kubectl("apply", "-f", "-", stdin=text)
    before = _settled_versions(cluster, namespace, text)
    again = cluster.kubectl("apply", "-f", "-", stdin=text)
    assert {line.rsplit(" ", 1)[1] for line in again.splitlines()} == {"unchanged"}
    assert _versions(cluster, namespace, text) == before


def _versions(cluster: Cluster, namespace: str, text: str) -> dict[str, str]:
    """resourceVersion of every object of the file."""
    found = {}
    for one in yaml.safe_load_all(text):
        reference = f"{one['kind']}/{one['metadata']['name']}".lower()
        found[reference] = cluster.kubectl.get(reference, namespace=namespace)["metadata"]["resourceVersion"]
    return found


def _settled_versions(cluster: Cluster, namespace: str, text: str) -> dict[str, str]:
    """The same, once the controllers have said what they have to say."""

    seen: list[dict[str, str]] = []

    def look() -> dict[str, str] | None:
        seen.append(_versions(cluster, namespace, text))
        return seen[-1] if seen[-3:] == [seen[-1]] * 3 else None

    return wait_until("the objects settle", look, timeout_s=30, every_s=0.5)


HARD = ["on", "y", "NO", "null", "~", "", "1", "1e3", "0x1f", "0o7", "010", "1_000", "12:30:45", "2026-11-23", ".5",
        "=", "<<", "nan", ".inf", "1e1000", "+1", "0b1", "1.", "190:20:30", "é☕", "a\tb", " a", "a ", "ends:", "#",
        "two\nlines\n", "  indented\nlines", "trailing \nspace", "\x85\u2028", "Ünïcode: {}", "- a", "%x", "@x", "`x",
        "deadbeef", "1234e10", "12e03", "0.1.0", "1Gi", "500m", "-m"]  # fmt: skip


def test_kubectl_reads_every_text_as_it_was_meant(cluster: Cluster, home: str) -> None:
    data = {f"k{index}": text for index, text in enumerate(HARD)}
    labels = {text: text for text in ("on", "y", "null", "1e3", "010", "1_000", "0x1f", "1234e10", "2026-11-23")}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "texts", "namespace": home, "labels": labels},
        "data": data,
    }
    (answered,) = _strictly(cluster, to_yaml([config_map]), home)
    assert answered["data"] == data
    assert answered["metadata"]["labels"] == labels


LOOK = """
import getpass, hashlib, json, os, pathlib, shutil, tempfile
e = os.environ
def writable(place):
    try:
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(place) / "probe").write_text("x")
        return True
    except OSError:
        return False
print(json.dumps({
    "uid": os.getuid(),
    "user": getpass.getuser(),
    "writable": {place: writable(place) for place in [
        "/tmp", "/dev/shm", e["HONE_WORK"], e["HOME"], e["TMPDIR"], e["HF_HOME"],
        e["TRITON_CACHE_DIR"], e["TORCHINDUCTOR_CACHE_DIR"], "/", "/etc/hone", "/opt"]},
    "same_tmp": os.path.exists(e["TMPDIR"] + "/probe"),
    "tempdir": tempfile.gettempdir(),
    "spec": hashlib.sha256(pathlib.Path(e["HONE_SPEC_FILE"]).read_bytes()).hexdigest(),
    "token": len(pathlib.Path(e["HONE_REPORT_TOKEN_FILE"]).read_text().split(".")),
    "ca": pathlib.Path(e["HONE_REPORT_CA_FILE"]).read_text(),
    "bundle": pathlib.Path(e["SSL_CERT_FILE"]).read_text(),
    "shm": shutil.disk_usage("/dev/shm").total,
    "memory": int(e["HONE_MEMORY_LIMIT_BYTES"]),
    "cpu": e["HONE_CPU_LIMIT"],
    "gpus": e["HONE_GPUS"],
    "key": e["AWS_ACCESS_KEY_ID"],
    "pod": [e["POD_NAME"], e["POD_NAMESPACE"], bool(e["POD_UID"])],
    "kubernetes_token": os.path.exists("/var/run/secrets/kubernetes.io"),
}))
"""
"""What the trainer would find; run in its place."""


@pytest.mark.parametrize("uid", [None, 1_000_680_000], ids=["the image's user", "a user that no image knows"])
def test_its_pod_finds_what_it_needs_under_any_user(cluster: Cluster, namespace: str, uid: int | None) -> None:
    platform = parse_cluster(
        {
            "image": cluster.trainer_image,
            "store": {"uri": "s3://models/x", "secret_name": "hone-store"},
            "report": {"address": "hone.example.com:7465", "ca_config_map": {"name": "hone-service-ca"}},
            "ca_config_map": {"name": "example-ca", "key": "bundle.crt"},
            "cpus_per_process": 0.1,
            "node_memory_bytes": "4Gi",
            "scratch_bytes": "64Mi",
        }
    )
    job = _tiny_job(platform, namespace)
    pod = job["spec"]["template"]["spec"]
    pod["containers"][0]["command"] = ["python", "-c", LOOK]
    if uid:
        pod["securityContext"]["runAsUser"] = uid
    cluster.kubectl.apply(
        *render_tenant(namespace, platform),
        _config_map("hone-service-ca", "ca.crt"),
        _config_map("example-ca", "bundle.crt"),
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hone-store"},
         "stringData": {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-key"}},
        job,
        namespace=namespace,
    )  # fmt: skip
    name = f"job/{job['metadata']['name']}"
    cluster.kubectl("wait", "--for=condition=Complete", name, "--timeout=120s", namespace=namespace, timeout_s=130)
    seen = json.loads(cluster.kubectl("logs", name, namespace=namespace))
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    assert seen.pop("writable") == {
        **dict.fromkeys(("/tmp", "/dev/shm", "/work", "/work/home", "/work/tmp", "/work/huggingface"), True),
        **dict.fromkeys(("/work/cache/triton", "/work/cache/inductor"), True),
        **dict.fromkeys(("/", "/etc/hone", "/opt"), False),
    }
    assert seen.pop("uid") == (uid or 65532)
    assert seen.pop("spec") == hashlib.sha256(annotations[names.ANNOTATION_SPEC].encode()).hexdigest()
    assert seen.pop("pod")[1:] == [namespace, True]
    assert seen.pop("memory") == _bytes(pod["containers"][0]["resources"]["limits"]["memory"])
    assert seen == {
        "user": "hone",
        "same_tmp": True,
        "tempdir": "/work/tmp",
        "token": 3,
        "ca": "certificates of hone-service-ca",
        "bundle": "certificates of example-ca",
        "shm": 256 * 2**20,
        "cpu": "1",
        "gpus": "0",
        "key": "an-id",
        "kubernetes_token": False,
    }


MEET = """
import os, socket, sys, time
address = (os.environ["HONE_MAIN_ADDRESS"], int(os.environ["HONE_MAIN_PORT"]))
if os.environ["JOB_COMPLETION_INDEX"] == "0":
    with socket.create_server(("", address[1])) as server:
        peer = server.accept()[0]
        print(peer.recv(100).decode())
else:
    for _ in range(300):
        try:
            with socket.create_connection(address, timeout=5) as first:
                first.sendall(b"met")
            print("met")
            sys.exit()
        except OSError:
            time.sleep(0.2)
    sys.exit(1)
"""


def test_pods_of_a_gang_stand_on_different_nodes_and_meet(cluster: Cluster, namespace: str) -> None:
    platform = parse_cluster(
        {
            "image": cluster.trainer_image,
            "store": {"uri": "s3://models/x"},
            "cpus_per_process": 0.1,
            "scratch_bytes": "64Mi",
        }
    )
    job = _tiny_job(platform, namespace, nodes=2)
    job["spec"]["template"]["spec"]["containers"][0]["command"] = ["python", "-c", MEET]
    cluster.kubectl.apply(*render_tenant(namespace, platform), job, namespace=namespace)
    name = f"job/{job['metadata']['name']}"
    cluster.kubectl("wait", "--for=condition=Complete", name, "--timeout=120s", namespace=namespace, timeout_s=130)
    pods = cluster.kubectl.items("pods", namespace=namespace)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    assert {pod["spec"]["hostname"] for pod in pods} == {f"{job['metadata']['name']}-{index}" for index in (0, 1)}
    for pod in pods:
        assert cluster.kubectl("logs", pod["metadata"]["name"], namespace=namespace).strip() == "met"


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 2**20, "Gi": 2**30}[quantity[-2:]]


def _config_map(name: str, key: str) -> dict[str, Any]:
    data = {key: f"certificates of {name}"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _tiny_job(platform: Configuration, namespace: str, *, nodes: int = 1) -> dict[str, Any]:
    spec = parse(
        {
            "name": "look",
            "model": {"source": "hf://HuggingFaceTB/SmolLM2-135M"},
            "dataset": {"source": "hf://a/b"},
            "method": {"sft": {"max_length": 8}},
            "adapter": {"lora": {"rank": 1}},
            "training": {"global_batch_size": nodes},
            "compute": {"gpus_per_node": 0, "nodes": nodes, "processes_per_node": 1},
        }
    )
    plan = make_plan(spec, load_shape(spec.model.source, hub_cache=Path("/nowhere")), platform.hardware())
    run = Run(
        namespace=namespace,
        job="look-x7k2p",
        attempt=1,
        nonce="c2f1e0a94b7d4d1c",
        spec=plan.spec,
        launch=plan.plan.launch,
        store=platform.store.uri,
        inputs={},
    )
    return render_job(run, plan.plan, platform, managed=True)
