"""Rendered manifests: golden files for what people will read, and what must hold of every one of them."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tests.unit.test_convert import part_values, valid

from hone.checkpoints import MAX_RESUME_POINTS
from hone.cluster import Cluster, parse_cluster
from hone.errors import InvalidRequest
from hone.manifests import applied_run, names, refuse, render_job, render_tenant, to_yaml
from hone.manifests.job import MOST_YAML, REST_BYTES
from hone.manifests.refusals import longest_run
from hone.manifests.resources import cores, size
from hone.modelinfo import load_shape
from hone.plan import Planned, make_plan
from hone.run import FAILURE_CLASSES, RETRIED_CLASSES, ResumePoint, Run, TrainerExit, spec_hash
from hone.spec import JobSpec
from hone.spec.parse import parse
from hone.spec.part import Label
from hone.spec.words import Key

DIGEST = f"sha256:{hashlib.sha256(b'an image').hexdigest()}"
SMALL = "hf://HuggingFaceTB/SmolLM2-135M"
LARGE = "hf://mistralai/Mistral-7B-v0.3"
PLAIN: dict[str, Any] = {
    "image": f"registry.example.com/ml/hone-trainer@{DIGEST}",
    "store": {"uri": "s3://models/hone", "secret_name": "hone-store"},
    "report": {"address": "hone.hone-system.svc:7465", "ca_config_map": {"name": "hone-service-ca"}},
}
EVERYTHING: dict[str, Any] = {
    **PLAIN,
    "image_pull_policy": "Always",
    "image_pull_secrets": ["registry-example"],
    "store": {
        "uri": "s3://models/hone",
        "endpoint": "https://s3.example.com",
        "region": "eu-central-1",
        "secret_name": "hone-store",
    },
    "hub": {"endpoint": "https://hub.example.com", "token_secret": {"name": "hub", "key": "token"}},
    "ca_config_map": {"name": "example-ca", "key": "ca-bundle.crt"},
    "proxy": {"https_proxy": "http://proxy.example.com:3128", "no_proxy": [".example.com", "10.0.0.0/8"]},
    "environment": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"},
    "python_rewards": True,
    "secret_environment": {"WANDB_API_KEY": {"name": "wandb", "key": "api-key"}},
    "service_account": "ml-training",
    "priority_class_name": "batch-low",
    "runtime_class_name": "nvidia",
    "scheduler_name": "gang-scheduler",
    "fs_group": 2000,
    "tolerations": [{"key": "example.com/pool", "value": "training", "effect": "NoExecute", "tolerationSeconds": 600}],
    "node_selector": {"example.com/pool": "training"},
    "topology_label": "topology.example.com/rack",
    "labels": {"example.com/cost-center": "4711", "environment": "on"},
    "annotations": {"example.com/owner": "ml-platform@example.com"},
    "volumes": [
        {"name": "work", "ephemeral": {"volumeClaimTemplate": {"spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "500Gi"}}}}}},
        {"name": "datasets", "persistentVolumeClaim": {"claimName": "datasets", "readOnly": True}},
    ],
    "volume_mounts": [{"name": "datasets", "mountPath": "/datasets", "readOnly": True}],
    "cpus_per_gpu": 7.5,
    "shm_bytes": "16Gi",
    "grace_period_s": "10m",
    "ttl_seconds_after_finished": "1h",
    "safe_to_evict": True,
    "gpu_profiles": {"H100": {
        "memory_bytes": 84_930_000_000, "gpus_per_node": 8, "interconnect": "nvlink", "bf16": True,
        "dense_tflops": 989, "product_label": "NVIDIA-H100-80GB-HBM3",
        "node_labels": {"cloud.example.com/accelerator": "h100-80gb"}}},
}  # fmt: skip


def request(**changes: Any) -> dict[str, Any]:
    return {
        "name": "support-chat",
        "model": {"source": LARGE},
        "dataset": {"source": "hf://HuggingFaceH4/ultrachat_200k", "split": "train_sft[:5000]"},
        "method": {"sft": {"max_length": 2048}},
        "adapter": {"lora": {"rank": 16}},
        **changes,
    }


def cpu(**compute: int) -> dict[str, Any]:
    return request(model={"source": SMALL}, compute={"gpus_per_node": 0, **compute})


GOLDEN: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "one-cpu": (cpu(), PLAIN, True),
    "one-gpu": (request(labels={"team": "nlp"}), PLAIN, True),
    "four-gpus": (request(compute={"gpu": "A100-80GB", "gpus_per_node": 4}), PLAIN, True),
    "two-nodes-cpu": (cpu(nodes=2, processes_per_node=1), PLAIN, True),
    "two-nodes-zero3": (
        request(
            model={"source": "hf://meta-llama/Llama-3.1-8B-Instruct"},
            adapter=None,
            compute={"nodes": 2, "gpu": "H100-80GB", "gpus_per_node": 8, "strategy": "zero3"},
        ),
        PLAIN,
        True,
    ),
    "queue": (
        request(scheduling={"queue": "team-gpus", "priority": "high", "deadline": "12h"}, compute={"gpu": "L40S"}),
        PLAIN,
        True,
    ),
    "platform": (
        request(
            dataset={"source": "file:///datasets/support/train.jsonl"},
            compute={"nodes": 2, "gpu": "H100", "gpus_per_node": 8},
        ),
        EVERYTHING,
        True,
    ),
    "applied": (cpu(), {"image": PLAIN["image"], "store": PLAIN["store"]}, False),
    "applied-two-nodes": (
        cpu(nodes=2, processes_per_node=1),
        {"image": PLAIN["image"], "store": PLAIN["store"]},
        False,
    ),
}


def planned(data: dict[str, Any], cluster: Cluster) -> Planned:
    spec = parse(data)
    return make_plan(spec, load_shape(spec.model.source, hub_cache=Path("/nowhere")), cluster.hardware())


def managed_run(plan: Planned, cluster: Cluster, **changes: Any) -> Run:
    facts = {
        "namespace": "team-nlp",
        "job": f"{plan.spec.name}-x7k2p",
        "attempt": 1,
        "nonce": "c2f1e0a94b7d4d1c",
        "spec": plan.spec,
        "launch": plan.plan.launch,
        "store": cluster.store.uri,
        "inputs": {},
    }
    return Run(**{**facts, **changes})


def render(data: dict[str, Any], configuration: dict[str, Any], managed: bool) -> dict[str, Any]:
    cluster = parse_cluster(configuration)
    plan = planned(data, cluster)
    assert plan.plan.fits
    refuse(plan.spec, plan.plan, cluster)
    run = managed_run(plan, cluster) if managed else applied_run(plan, cluster, namespace="team-nlp")
    return render_job(run, plan.plan, cluster, managed=managed)


@pytest.fixture(params=GOLDEN)
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    return render(*GOLDEN[request.param])


@pytest.mark.parametrize("case", GOLDEN)
def test_the_manifest_is_the_one_that_was_read_and_committed(case: str, golden: Callable[[str, str], None]) -> None:
    golden(f"manifests/{case}.yaml", to_yaml([render(*GOLDEN[case])]))


def test_what_a_namespace_needs_once_is_the_one_that_was_read(golden: Callable[[str, str], None]) -> None:
    golden("manifests/tenant.yaml", to_yaml(render_tenant("team-nlp", parse_cluster(PLAIN))))


def test_every_golden_file_has_its_case() -> None:
    files = {path.stem for path in (Path(__file__).parents[1] / "golden" / "manifests").iterdir()}
    assert files == {*GOLDEN, "tenant"}


def test_rendering_again_gives_the_same_bytes(job: dict[str, Any]) -> None:
    first, second = (to_yaml([render(*GOLDEN["platform"])]) for _ in range(2))
    assert first == second


def test_the_text_reads_back_as_the_object(job: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml([job])) == job


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(job)["containers"]
    assert isinstance(only, dict)
    return only


def variables(job: dict[str, Any]) -> dict[str, Any]:
    listed = container(job)["env"]
    named = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in listed}
    assert len(named) == len(listed), "a variable is given twice"
    return named


def test_the_pod_reads_the_very_run_that_was_rendered(job: dict[str, Any]) -> None:
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    run = Run.from_yaml(annotations[names.ANNOTATION_SPEC])
    assert run.to_yaml() == annotations[names.ANNOTATION_SPEC]
    assert annotations[names.ANNOTATION_SPEC_HASH] == spec_hash(run.spec)
    (item,) = pod(job)["volumes"][0]["projected"]["sources"][0]["downwardAPI"]["items"]
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{names.ANNOTATION_SPEC}']"
    mount = next(mount for mount in container(job)["volumeMounts"] if mount["mountPath"] == names.CONFIG_DIRECTORY)
    assert f"{mount['mountPath']}/{item['path']}" == variables(job)[names.ENV_SPEC_FILE] == names.SPEC_FILE


def test_labels_are_what_kubernetes_takes(job: dict[str, Any]) -> None:
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        for key, value in labels.items():
            TypeAdapter(Key).validate_python(key)
            TypeAdapter(Label).validate_python(value)


def test_a_version_between_two_releases_is_a_label_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.manifests.job.__version__", "0.2.0.dev3+g1a2b3c4.d20261124")
    labels = render(*GOLDEN["one-cpu"])["metadata"]["labels"]
    assert labels["app.kubernetes.io/version"] == "0.2.0.dev3-g1a2b3c4.d20261124"


def test_the_pod_is_restricted_and_has_no_rights(job: dict[str, Any]) -> None:
    assert pod(job)["securityContext"]["runAsNonRoot"] is True
    assert pod(job)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(job)["automountServiceAccountToken"] is False
    assert container(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for user in ("runAsUser", "runAsGroup"):
        assert user not in pod(job)["securityContext"], "a fixed user is refused where the cluster chooses one"


def test_whatever_writes_has_room_that_can_be_written(job: dict[str, Any]) -> None:
    writable = [mount["mountPath"] for mount in container(job)["volumeMounts"] if not mount.get("readOnly")]
    assert set(writable) == {"/work", "/tmp", "/dev/shm"}
    for name in ("HOME", "HF_HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert variables(job)[name].startswith("/work/")


def test_every_volume_is_mounted_and_every_mount_has_its_volume(job: dict[str, Any]) -> None:
    volumes = [volume["name"] for volume in pod(job)["volumes"]]
    assert len(set(volumes)) == len(volumes)
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == set(volumes)


def test_secrets_stand_there_by_reference_only(job: dict[str, Any]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        if name in variables(job):
            assert set(variables(job)[name]) == {"secretKeyRef"}


def test_memory_counts_the_plan_the_supervisor_and_shared_memory() -> None:
    cluster = parse_cluster(PLAIN)
    plan = planned(request(compute={"gpu": "A100-80GB", "gpus_per_node": 4}), cluster)
    job = render_job(managed_run(plan, cluster), plan.plan, cluster, managed=True)
    asked = container(job)["resources"]["requests"]["memory"]
    assert asked == size(plan.plan.host_memory_bytes + 2**29 + 4 * 2**30)
    shm = next(volume for volume in pod(job)["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


def test_a_managed_job_ends_with_its_first_failure_and_stays_until_the_service_has_read_it() -> None:
    for case in ("one-gpu", "two-nodes-cpu"):
        spec = render(*GOLDEN[case])["spec"]
        assert spec["backoffLimit"] == 0
        assert "ttlSecondsAfterFinished" not in spec
        assert "podFailurePolicy" not in spec


def test_an_applied_job_starts_again_after_what_another_try_may_mend() -> None:
    spec = render(*GOLDEN["applied"])["spec"]
    assert spec["backoffLimit"] == 2  # three attempts
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert fail["action"] == "FailJob"
    hopeless = set(fail["onExitCodes"]["values"])
    assert {11, 12, 13, 16} <= hopeless
    assert not {TrainerExit.STORAGE, TrainerExit.INTERRUPTED, TrainerExit.WORKER_DIED, 0} & hopeless
    for code in TrainerExit:
        if code and FAILURE_CLASSES[code] not in RETRIED_CLASSES:
            assert code in hopeless


def test_pods_of_a_gang_are_never_replaced_one_by_one() -> None:
    spec = render(*GOLDEN["applied-two-nodes"])["spec"]
    assert spec["backoffLimit"] == 0
    assert "podFailurePolicy" not in spec
    assert spec["podReplacementPolicy"] == "Failed"


def test_an_applied_job_reports_to_nobody_and_needs_no_token() -> None:
    job = render(cpu(), PLAIN, False)
    assert names.ENV_REPORT_ADDRESS not in variables(job)
    assert "serviceAccountToken" not in to_yaml([job])


def test_a_gang_meets_at_the_host_name_that_kubernetes_gives_its_first_pod() -> None:
    job = render(*GOLDEN["two-nodes-cpu"])
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 2, 2)
    assert pod(job)["subdomain"] == names.WORKERS_SERVICE
    main = f"{job['metadata']['name']}-0.{names.WORKERS_SERVICE}"
    assert (variables(job)[names.ENV_MAIN_ADDRESS], variables(job)[names.ENV_MAIN_PORT]) == (main, "29500")
    service = next(one for one in render_tenant("team-nlp", parse_cluster(PLAIN)) if one["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    apart = pod(job)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert apart["labelSelector"]["matchLabels"].items() <= labels.items()


def test_queue_labels_are_on_the_job_and_not_on_its_pods() -> None:
    job = render(*GOLDEN["queue"])
    assert job["metadata"]["labels"][names.LABEL_QUEUE] == "team-gpus"
    assert job["metadata"]["labels"][names.LABEL_QUEUE_PRIORITY] == "high"
    assert job["metadata"]["labels"][names.LABEL_QUEUE_MAX_SECONDS] == "43200"
    assert not [label for label in job["spec"]["template"]["metadata"]["labels"] if "kueue" in label]


def test_the_clock_of_the_deadline_starts_when_the_pod_has_a_node() -> None:
    managed, applied = (render(GOLDEN["queue"][0], PLAIN, managed) for managed in (True, False))
    assert "activeDeadlineSeconds" not in managed["spec"]
    assert pod(applied)["activeDeadlineSeconds"] == 43_200
    assert pod(managed)["activeDeadlineSeconds"] == 43_260, "the service is there first, and says why"


def test_a_topology_is_asked_of_kueue_where_it_places_and_of_the_scheduler_elsewhere() -> None:
    queued = render(request(scheduling={"queue": "q"}, compute=GOLDEN["platform"][0]["compute"]), EVERYTHING, True)
    annotations = queued["spec"]["template"]["metadata"]["annotations"]
    assert annotations[names.ANNOTATION_QUEUE_TOPOLOGY] == "topology.example.com/rack"
    assert "podAffinity" not in pod(queued)["affinity"]
    assert "podAffinity" in pod(render(*GOLDEN["platform"]))["affinity"]


@pytest.mark.parametrize(
    ("data", "configuration", "path", "words"),
    [
        (request(dataset={"source": "file:///rows.jsonl"}), PLAIN, "dataset.source", "s3://bucket/key"),
        (request(dataset={"source": "file:///x.jsonl"}), EVERYTHING, "dataset.source", "below /datasets"),
        (
            request(method={"ppo": {"rewards": [{"python": {"file": "s3://b/mine.py"}}]}}),
            PLAIN,
            "method.ppo.rewards.0.python",
            "cluster.python_rewards",
        ),
        (request(labels={"job-name": "x"}), PLAIN, "labels.job-name", "choose another key"),
        (request(labels={"environment": "off"}), EVERYTHING, "labels.environment", "every job of this platform"),
        (request(compute={"gpu": "T4", "gpus_per_node": 16}), PLAIN, "compute.gpus_per_node", "at most 4"),
        (
            request(model={"source": LARGE, "chat_template": "x" * 70_000}),
            PLAIN,
            "model.chat_template",
            "takes 65,536, and this text alone has 70,000",
        ),
    ],
)
def test_what_a_cluster_cannot_run_is_told_with_its_fix(
    data: dict[str, Any], configuration: dict[str, Any], path: str, words: str
) -> None:
    cluster = parse_cluster(configuration)
    data = {**data, "compute": {"gpu": "H100"} | data.get("compute", {})} if configuration is EVERYTHING else data
    plan = planned(data, cluster)
    with pytest.raises(InvalidRequest) as caught:
        refuse(plan.spec, plan.plan, cluster)
    (violation,) = caught.value.violations
    assert violation.path == path
    assert words in violation.message


def test_a_request_that_is_taken_leaves_room_for_the_checkpoints_of_later_attempts() -> None:
    cluster = parse_cluster(PLAIN)
    for characters in range(64_000, 0, -100):  # down to the longest that is taken
        plan = planned(request(model={"source": LARGE, "chat_template": "x" * characters}), cluster)
        with suppress(InvalidRequest):
            refuse(plan.spec, plan.plan, cluster)
            break
    places = (f"attempt-{number}/claim-2/checkpoints/step-999999" for number in range(1, MAX_RESUME_POINTS + 1))
    points = tuple(ResumePoint(step=999_999, place=place, sha256="0" * 64) for place in places)
    run = managed_run(plan, cluster, job="x" * 50, attempt=999, resume=points)
    assert render_job(run, plan.plan, cluster, managed=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_request_that_is_not_written_out_to_be_checked_is_short_enough(data: st.DataObject) -> None:
    spec = data.draw(part_values(JobSpec).map(valid).filter(lambda found: found is not None))
    cluster = parse_cluster(PLAIN)
    run = longest_run(spec, planned(request(), cluster).plan, cluster)
    assert len(run.to_yaml().encode()) <= MOST_YAML * len(spec.model_dump_json().encode()) + REST_BYTES


def test_names_fit_host_names_up_to_the_longest_id_and_many_attempts() -> None:
    cluster = parse_cluster(PLAIN)
    plan = planned(cpu(nodes=1024, processes_per_node=1), cluster)
    longest = managed_run(plan, cluster, job="x" * 50, attempt=999)
    name = render_job(longest, plan.plan, cluster, managed=True)["metadata"]["name"]
    assert len(f"{name}-1023") <= 63
    with pytest.raises(InvalidRequest, match="too long"):
        render_job(managed_run(plan, cluster, job="x" * 57), plan.plan, cluster, managed=True)


@pytest.mark.parametrize(("number", "text"), [(1, "1"), (0.5, "500m"), (7.5, "7500m"), (24.0, "24"), (0.0001, "1m")])
def test_cores_are_written_as_the_api_server_writes_them(number: float, text: str) -> None:
    assert cores(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(1, "64Mi"), (2**30, "1Gi"), (2**30 + 1, "1088Mi"), (3 * 2**29, "1536Mi"), (2**40, "1024Gi")]
)
def test_sizes_are_rounded_up_and_written_as_the_api_server_writes_them(number: int, text: str) -> None:
    assert size(number) == text


MISREAD = ["on", "y", "NO", "null", "~", "", "1", "1e3", "0x1f", "0o7", "010", "1_000", "12:30:45", "2026-11-23", ".5",
           "0.1.0", "-", "- a", "a: b", "a #b", "#a", "&a", "*a", "!a", "%a", "@a", "`a", "{a", "[a", "'a", '"a',
           "=", "<<", "nan", ".inf", "1e1000", "é", "a\tb", " a", "a ", "ends:"]  # fmt: skip


@pytest.mark.parametrize("text", MISREAD)
def test_no_parser_misreads_a_text(text: str) -> None:
    """kubectl's parser has other numbers and truths than Python's: what begins with a letter and is none of their words
    stays plain, all else is quoted."""
    written = to_yaml([{"key": text, text: "value"}])
    assert yaml.safe_load(written) == {"key": text, text: "value"}
    for line in written.splitlines():
        scalar = line.removeprefix("key: ").removesuffix(": value")
        quoted = scalar[:1] in "'\"?"
        assert quoted or scalar[0].isalpha(), line
        assert quoted or scalar.lower() not in ("on", "y", "no", "null", "nan"), line


@given(
    st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_any_text_reads_back(value: Any) -> None:
    assert yaml.safe_load(to_yaml([{"value": value}])) == {"value": value}


def test_a_long_text_is_a_literal_block_and_reads_back_exactly() -> None:
    template = "{% for m in messages %}\n  {{ m.role }}: {{ m.content }}\n\n{% endfor %}\n"
    cluster = parse_cluster(PLAIN)
    plan = planned(
        request(model={"source": LARGE, "chat_template": template, "system_prompt": "Be brief.\t☕"}), cluster
    )
    job = render_job(managed_run(plan, cluster), plan.plan, cluster, managed=True)
    text = to_yaml([job])
    assert "hone.dev/spec: |\n" in text
    back = yaml.safe_load(text)["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_SPEC]
    assert Run.from_yaml(back).spec.model.chat_template == template


def test_nothing_of_a_request_becomes_a_field_of_the_pod() -> None:
    """Every text of a request, set to a mark: it is found in the request's annotation and in labels, nowhere else."""
    mark = "m4rk"
    data = request(
        labels={"team": mark},
        model={"source": LARGE, "system_prompt": f"{mark}: {{}}", "eos_token": f"{mark}\n  privileged: true"},
        dataset={"source": f"s3://{mark}/x", "split": mark},
    )
    job = render(data, PLAIN, True)
    template = job["spec"]["template"]
    assert mark in template["metadata"]["annotations"].pop(names.ANNOTATION_SPEC)
    assert [path for path, text in texts(job) if mark in text] == [
        ("metadata", "labels", "team"),
        ("spec", "template", "metadata", "labels", "team"),
    ]


def texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, path)
    elif isinstance(value, str):
        yield path, value
