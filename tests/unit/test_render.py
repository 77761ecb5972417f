"""`hone render`: manifests on stdout, all else on stderr; refusals with their fix; committed examples."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone.cli import app as application
from hone.manifests import names
from hone.run import Run

ROOT = Path(__file__).parents[2]
PLATFORM = ROOT / "examples" / "kubernetes" / "platform.yaml"
RENDERED = sorted((ROOT / "k8s" / "examples").glob("*.yaml"))
REQUEST = """
name: support-chat
model: {source: "hf://mistralai/Mistral-7B-v0.3"}
dataset: {source: "hf://HuggingFaceH4/ultrachat_200k"}
method: {sft: {max_length: 128}}
adapter: {lora: {rank: 16}}
compute: {gpus_per_node: 1, gpu: H100-80GB}
"""
FLAGS = ["--image", f"registry.example.com/trainer@sha256:{'0' * 64}", "--store", "s3://models/hone"]


@pytest.fixture(autouse=True)
def plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HONE_NAMESPACE", raising=False)


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "support.yaml"
    path.write_text(REQUEST)
    return path


def rendered(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[dict[str, Any]], str]:
    """The objects, and what stands on stderr."""
    assert application.run(["render", *map(str, arguments)]) == 0
    text = capsys.readouterr()
    return list(yaml.safe_load_all(text.out)), text.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert application.run(["render", *map(str, arguments)]) == code
    text = capsys.readouterr()
    assert text.out == "", "what is piped into kubectl is a manifest or nothing"
    return text.err


def test_a_request_becomes_a_job_for_kubectl(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job,), notes = rendered(capsys, request_file, *FLAGS, "--namespace", "team-nlp")
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("support-chat", "team-nlp")
    assert job["metadata"]["labels"][names.LABEL_MANAGED_BY] == names.MANAGED_BY_KUBECTL
    run = Run.from_yaml(job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_SPEC])
    assert (run.namespace, run.job, run.attempt) == ("team-nlp", "support-chat", 1)
    assert run.store == "s3://models/hone"
    assert notes.startswith("Fits on 1 × H100-80GB: ")


def test_the_same_request_gives_the_same_bytes(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert application.run(["render", str(request_file), *FLAGS]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_line_breaks_of_an_option_stay_within_the_comment(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "model.system_prompt='be brief\nkind: Secret\x85\u2028apiVersion: v1'"
    (job,), _ = rendered(capsys, request_file, *FLAGS, "--set", prompt)
    assert job["kind"] == "Job"


def test_another_request_of_the_same_name_is_another_run(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,), _ = rendered(capsys, request_file, *FLAGS)
    (second,), _ = rendered(capsys, request_file, *FLAGS, "--set", "training.seed=7")
    runs = [
        Run.from_yaml(job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_SPEC])
        for job in (first, second)
    ]
    assert runs[0].nonce != runs[1].nonce


def test_what_the_namespace_needs_is_told(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "compute.nodes=2"]
    _, notes = rendered(capsys, request_file, "--config", PLATFORM, *changes)
    assert "Namespace default must have:" in notes
    assert "Secret hone-store with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in notes
    assert "ServiceAccount hone-trainer" in notes
    assert "headless Service hone-workers" in notes
    objects, notes = rendered(capsys, request_file, "--config", PLATFORM, *changes, "--with-tenant")
    assert [one["kind"] for one in objects] == ["ServiceAccount", "Service", "Job"]
    assert "ServiceAccount" not in notes


def test_what_the_trainer_does_not_run_yet_is_a_warning(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_cluster = ["--set", "compute.nodes=2", "--set", "scheduling.queue=team"]
    assert "warning" not in rendered(capsys, request_file, *FLAGS, *on_cluster)[1]
    unserved = ["--set", "compute.strategy=zero3", "--set", "quantization=nf4"]
    notes = rendered(capsys, request_file, *FLAGS, *on_cluster, *unserved)[1]
    assert "warning: the trainer of this version ends at once: Splitting 4-bit weights" in notes


def test_a_push_that_will_have_no_token_is_a_warning(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = rendered(capsys, request_file, *FLAGS, "--set", "output.hub.repo=org/name")[1]
    assert "warning: output.hub will not be pushed: no Secret is named" in notes


def test_a_tag_is_worth_a_note_and_a_digest_is_not(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a tag" not in rendered(capsys, request_file, *FLAGS)[1]
    flags = ["--image", "registry.example.com/trainer:1", *FLAGS[2:]]
    assert "registry.example.com/trainer:1 is a tag" in rendered(capsys, request_file, *flags)[1]


def test_flags_take_the_place_of_what_the_file_has(
    request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("cluster: {image: '', store: {uri: '', endpoint: 'https://s3.example.com'}}\nreplicas: 2\n")
    (job,), _ = rendered(capsys, request_file, "--config", values, *FLAGS)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == FLAGS[1]
    assert {"name": "AWS_ENDPOINT_URL_S3", "value": "https://s3.example.com"} in container["env"]


def test_without_a_platform_it_says_what_is_missing(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Give --config FILE" in refused(capsys, request_file)
    assert "--image and --store" in refused(capsys, request_file, "--image", "x")


def test_faults_of_the_platforms_file_are_told_all_at_once(
    request_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("cluster: {image: '', store: {uri: ''}, labls: {}}\n")
    text = refused(capsys, request_file, "--config", values)
    assert "values.yaml cannot be used: 3 problems" in text
    assert "cluster.labls" in text
    assert "Did you mean labels?" in text


def test_a_file_that_no_pod_would_see_is_refused_with_the_fix(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, ROOT / "examples" / "quickstart.yaml", *FLAGS, "--model-config", _llama(request_file.parent))
    assert "quickstart.yaml cannot run: 3 problems" in text
    assert text.count("a pod has no such file") == 3
    assert "s3://bucket/key" in text


def test_a_model_that_cannot_be_read_from_here_is_planned_by_its_configuration(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--set", "model.source=s3://models/base/llama"]
    assert "--model-config" in refused(capsys, request_file, *FLAGS, *model)
    (job,), _ = rendered(capsys, request_file, *FLAGS, *model, "--model-config", _llama(request_file.parent))
    run = Run.from_yaml(job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_SPEC])
    assert run.spec.model.source == "s3://models/base/llama"


def test_what_does_not_fit_is_told_as_plan_tells_it(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, request_file, *FLAGS, "--set", "adapter=null", "--set", "compute.gpu=L4", code=1)
    assert text.startswith("Does not fit: ")
    assert "smallest changes that fit:" in text


def test_a_namespace_that_is_none_is_refused(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'Team_A' is not a namespace" in refused(capsys, request_file, *FLAGS, "--namespace", "Team_A")


def test_there_are_rendered_examples() -> None:
    assert len(RENDERED) == 4


@pytest.mark.parametrize("path", RENDERED, ids=[path.stem for path in RENDERED])
def test_a_committed_manifest_is_what_its_example_renders_to(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = next(file for file in (ROOT / "examples").rglob(path.name))
    arguments = [str(example), "--config", str(PLATFORM), "--namespace", "team-nlp", "--with-tenant"]
    assert application.run(["render", *arguments]) == 0
    assert capsys.readouterr().out == path.read_text(encoding="utf-8"), "run make generated"


def test_the_commands_of_the_page_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    commands = [line.partition("|")[0] for line in page.splitlines() if line.startswith("hone render ")]
    assert commands
    for command in commands:
        assert application.run(shlex.split(command)[1:]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["kind"] == "Job"


def test_the_page_names_every_variable_and_field_of_a_rendered_pod(
    request_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (job,), _ = rendered(capsys, request_file, *FLAGS, "--set", "compute.nodes=2")
    container = job["spec"]["template"]["spec"]["containers"][0]
    ours = [entry["name"] for entry in container["env"] if entry["name"].startswith(("HONE_", "POD_"))]
    assert [name for name in ours if name not in page] == []
    fields = ["backoffLimit", "podReplacementPolicy", "completionMode", "ttlSecondsAfterFinished", "enableServiceLinks"]
    assert [name for name in fields if name not in page or name not in str(job)] == []


def _llama(directory: Path) -> Path:
    path = directory / "config.json"
    path.write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 264, "hidden_size": 64, '
        '"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, '
        '"max_position_embeddings": 512, "tie_word_embeddings": false}'
    )
    return path
