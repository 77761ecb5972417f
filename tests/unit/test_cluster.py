"""The platform's configuration: read from both of its homes, every fault told at once."""

from pathlib import Path
from typing import Any

import pytest

from hone.cluster import Cluster, load_cluster, parse_cluster
from hone.errors import InvalidRequest
from hone.gpus import load_profiles
from hone.manifests import names
from hone.spec.document import with_table

H100 = {
    "memory_bytes": 84_930_000_000,
    "gpus_per_node": 8,
    "interconnect": "nvlink",
    "bf16": True,
    "dense_tflops": 989,
    "product_label": "NVIDIA-H100-80GB-HBM3",
}


def good(**changes: Any) -> dict[str, Any]:
    return {"image": "registry.example.com/hone-trainer:1", "store": {"uri": "s3://models/hone"}, **changes}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no image": ({"store": {"uri": "s3://models"}}, "image", "no default registry: build it"),
    "no store": ({"image": "x"}, "store", "is required"),
    "unknown field": (good(pull_policy="Always"), "pull_policy", "Did you mean image_pull_policy?"),
    "image with a scheme": (good(image="docker://x/y"), "image", "registry.example.com"),
    "image with a short digest": (good(image="x@sha256:abc"), "image", "@sha256"),
    "store of another kind": (good(store={"uri": "gs://models"}), "store.uri", "s3://bucket/prefix"),
    "store with user-info": (good(store={"uri": "s3://key:secret@models/x"}), "store.uri", "user-info"),
    "directory that no volume holds": (good(store={"uri": "file:///data"}), "store.uri", "no volume of volume_mounts"),
    "endpoint without scheme": (good(store={"uri": "s3://models", "endpoint": "minio:9000"}), "store.endpoint", "http"),
    "report without port": (good(report={"address": "hone.hone.svc"}), "report.address", "host:port"),
    "namespace": (good(namespaces=["Team_A"]), "namespaces.0", "lower-case"),
    "own label": (good(labels={"hone.dev/job": "x"}), "labels.hone.dev/job", "choose another key"),
    "own label of Kubernetes": (good(labels={"job-name": "x"}), "labels.job-name", "choose another key"),
    "queue by a label": (
        good(labels={"kueue.x-k8s.io/queue-name": "x"}),
        "labels.kueue.x-k8s.io/queue-name",
        "choose another key",
    ),
    "value of a label": (good(labels={"team": "a b"}), "labels.team", "at most 63"),
    "own annotation": (good(annotations={"hone.dev/spec": "x"}), "annotations.hone.dev/spec", "choose another key"),
    "own variable": (good(environment={"AWS_SECRET_ACCESS_KEY": "x"}), "environment.AWS_SECRET_ACCESS_KEY", "decides"),
    "proxy by a variable": (good(environment={"HTTPS_PROXY": "x"}), "environment.HTTPS_PROXY", "decides"),
    "number for a variable": (good(environment={"NCCL_IB_HCA": 1}), "environment.NCCL_IB_HCA", "not a text"),
    "own variable by a Secret": (
        good(secret_environment={"AWS_SECRET_ACCESS_KEY": {"name": "s", "key": "k"}}),
        "secret_environment.AWS_SECRET_ACCESS_KEY",
        "decides",
    ),
    "variable given twice": (
        good(environment={"X": "x"}, secret_environment={"X": {"name": "s", "key": "k"}}),
        "secret_environment.X",
        "give one",
    ),
    "token in a variable": (good(environment={"X": f"hf_{'a' * 34}"}), "environment.X", "a Hugging Face token"),
    "password in a proxy": (
        good(proxy={"https_proxy": "http://me:pw@proxy:3128"}),
        "proxy.https_proxy",
        "an address with user-info",
    ),
    "token of the Hub": (good(hub={"token": f"hf_{'a' * 34}"}), "hub.token", "by the name of a Secret"),
    "toleration": (good(tolerations=[{"key": "a", "efect": "NoSchedule"}]), "tolerations.0.efect", "mean effect?"),
    "volume of the node": (good(volumes=[{"name": "d", "hostPath": {"path": "/"}}]), "volumes.0", "hostPath is given"),
    "volume of nothing": (good(volumes=[{"name": "d"}]), "volumes.0", "nothing is given"),
    "volume of ours": (good(volumes=[{"name": "shm", "emptyDir": {}}]), "volumes.0.name", "no free name"),
    "mount of nothing": (good(volume_mounts=[{"name": "d", "mountPath": "/d"}]), "volume_mounts.0.name", "one of the"),
    "mount over ours": (
        good(volumes=[{"name": "d", "emptyDir": {}}], volume_mounts=[{"name": "d", "mountPath": "/work/d"}]),
        "volume_mounts.0.mountPath",
        "meets /work",
    ),
    "profile without a field": (
        good(gpu_profiles={"H100": {name: H100[name] for name in H100 if name != "bf16"}}),
        "gpu_profiles.H100.bf16",
        "is required",
    ),
    "profile in GiB": (
        good(gpu_profiles={"H100": {**H100, "memory_bytes": 80}}),
        "gpu_profiles.H100.memory_bytes",
        "too small",
    ),
}


@pytest.mark.parametrize(("data", "path", "words"), BAD.values(), ids=BAD.keys())
def test_a_fault_names_the_field_and_the_fix(data: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_cluster(data)
    found = {violation.path: violation.message for violation in caught.value.violations}
    assert words in found.get(path, f"nothing at {path}: {found}")
    assert len(found) == 1, f"one fault, but also: {found}"


def test_all_faults_come_in_one_round() -> None:
    data = good(
        image="X Y",
        labels={"hone.dev/a": "b"},
        report={"address": "nowhere"},
        gpu_profiles={"H100": {}},
        environment={"TOKEN": f"hf_{'a' * 34}"},
        volumes=[{"name": "d", "hostPath": {"path": "/"}}],
    )
    with pytest.raises(InvalidRequest) as caught:
        parse_cluster(data)
    paths = {violation.path.partition(".")[0] for violation in caught.value.violations}
    assert paths == {"image", "labels", "report", "gpu_profiles", "environment", "volumes"}


def test_a_value_that_looks_like_a_secret_is_never_shown() -> None:
    token = f"hf_{'a' * 34}"
    data = good(image=token, hub={"token": token}, environment={"X": token}, tolerations=token, labels={"team": token})
    with pytest.raises(InvalidRequest) as caught:
        parse_cluster(data)
    assert len(caught.value.violations) == 5
    assert token not in str(caught.value)
    assert all(token not in str(violation.value) for violation in caught.value.violations)


@pytest.mark.parametrize(
    "text",
    [
        "image: a/b:1\nstore: {uri: s3://models}\n",
        "cluster: {image: 'a/b:1', store: {uri: s3://models}}\nreplicas: 1\n",
    ],
)
def test_the_plain_file_and_the_values_of_the_chart_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_cluster(path) == parse_cluster({"image": "a/b:1", "store": {"uri": "s3://models"}})


def test_paths_of_faults_are_those_of_the_values_file(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("cluster: {image: a, store: {uri: s3://models}, labls: {}}\n")
    with pytest.raises(InvalidRequest, match=r"cluster\.labls: unknown field\. Did you mean labels\?"):
        load_cluster(path)


@pytest.mark.parametrize("text", ["", "- a\n", "a: 1\n---\nb: 2\n"])
def test_a_file_that_is_no_configuration_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="holds no platform configuration"):
        load_cluster(path)


def test_profiles_are_the_shipped_ones_unless_the_platform_has_its_own() -> None:
    assert parse_cluster(good()).profiles() == load_profiles()
    own = parse_cluster(
        good(node_memory_bytes="64Gi", gpu_profiles={"Big": {**H100, "node_labels": {"cloud.example.com/gpu": "h100"}}})
    )
    assert list(own.profiles()) == ["Big"]
    assert own.hardware().memory_bytes == 64 * 2**30
    assert own.node_labels("Big") == {"cloud.example.com/gpu": "h100"}
    assert parse_cluster(good()).node_labels("L4") == {"nvidia.com/gpu.product": "NVIDIA-L4"}


@pytest.mark.parametrize(
    ("path", "held"),
    [("/data/x", True), ("/data", True), ("/database", False), ("/data/../etc", False), ("/data/%2e%2e/etc", False)],
)
def test_a_path_is_held_below_a_mounted_volume_only(path: str, held: bool) -> None:
    data = good(
        volumes=[{"name": "d", "persistentVolumeClaim": {"claimName": "d"}}],
        volume_mounts=[{"name": "d", "mountPath": "/data"}],
    )
    assert parse_cluster(data).holds_path(path) is held


def test_every_field_has_a_text() -> None:
    assert [name for name, field in Cluster.model_fields.items() if not field.description] == []


def test_the_page_lists_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert with_table(page, Cluster) == page, "run make generated"
    assert "`gpu_profiles.<name>.node_labels`" in page


def test_defaults_are_the_names_that_everybody_uses() -> None:
    assert parse_cluster(good()).service_account == names.TRAINER_ACCOUNT
