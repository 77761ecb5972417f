"""What may be asked of the Hub, what its errors mean, and what is never told to it. Pushes: tests/integration."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone import errors
from hone.errors import InvalidRequest
from hone.hub import Target, push
from hone.hub.answers import push_error
from hone.hub.push import _WEIGHTS, _File
from hone.spec.outputs import branch_fault, output_kinds, pushed_kind, repo_fault
from hone.spec.parse import parse
from hone.storage import ManifestFile


def request(**changes: Any) -> dict[str, Any]:
    data = {
        "name": "tiny",
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {}},
        "adapter": {"lora": {}},
        **changes,
    }
    return {name: value for name, value in data.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "hub", "kind"),
    [
        ({}, {}, "adapter"),
        ({"output": {"merged": True}}, {}, "merged"),
        ({"output": {"merged": True}}, {"what": "adapter"}, "adapter"),
        ({"adapter": None}, {}, "model"),
        (
            {
                "method": {"merge": {"adapters": [{"source": "hf://org/adapter"}]}},
                "adapter": None,
                "dataset": None,
            },
            {},
            "merged",
        ),
    ],
)
def test_what_is_pushed_is_what_is_used_by_itself_unless_another_is_asked_for(
    changes: dict[str, Any], hub: dict[str, Any], kind: str
) -> None:
    output = {**changes.get("output", {}), "hub": {"repo": "org/name", **hub}}
    spec = parse(request(**{**changes, "output": output}))
    assert spec.output.hub and spec.output.hub.private
    assert pushed_kind(output_kinds(spec), spec.output.hub.what) == kind


@pytest.mark.parametrize(
    ("hub", "path", "fix"),
    [
        ({"repo": "org/na--me"}, "output.hub.repo", "write organisation/name"),
        ({"repo": "org/-name"}, "output.hub.repo", "write organisation/name"),
        ({"repo": "org/name.git"}, "output.hub.repo", "write organisation/name"),
        ({"repo": f"org/{'x' * 96}"}, "output.hub.repo", "write organisation/name"),
        ({"repo": "org/näme"}, "output.hub.repo", "write organisation/name"),
        ({"repo": "org/name", "branch": "refs/pr/1"}, "output.hub.branch", "experiments/rank-16"),
        ({"repo": "org/name", "branch": "a/../b"}, "output.hub.branch", "experiments/rank-16"),
        ({"repo": "org/name", "branch": "a//b"}, "output.hub.branch", "experiments/rank-16"),
        ({"repo": "org/name", "what": "merged"}, "output.hub.what", "set output.merged, or write adapter"),
        ({"repo": "org/name", "what": "model"}, "output.hub.what", "write adapter, or remove it"),
    ],
)
def test_what_the_hub_would_refuse_after_the_training_is_refused_before(
    hub: dict[str, Any], path: str, fix: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(request(output={"hub": hub}))
    [violation] = caught.value.violations
    assert violation.path == path
    assert fix in violation.message


def test_good_names_are_taken() -> None:
    assert not any(map(repo_fault, ("my-org/mistral-7b-finetuned", "a/b", "A_1/x.y_z")))
    assert not any(map(branch_fault, ("", "main", "v1.2", "experiments/rank-16")))


class Answered(Exception):
    """Looks as the library's exceptions do."""

    def __init__(self, status: int, words: str = "") -> None:
        self.response = type("Response", (), {"status_code": status})()
        self.server_message = words
        super().__init__("Client error for url 'https://storage.example/x?X-Amz-Signature=canary'")


class OfflineModeIsEnabled(ConnectionError):
    """The library's, by its name."""


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (Answered(401), errors.Unauthenticated, "The Hub does not accept the token (401)."),
        (Answered(403, "no write access"), errors.Refused, "no right to write to org/name (403: no write access)."),
        (Answered(404), errors.NotFound, "org/name is not on the Hub, or the token may not see it (404)."),
        (Answered(429), errors.Unavailable, "The Hub answers 429"),
        (Answered(503), errors.Unavailable, "The Hub answers 503"),
        (Answered(413, "too large"), errors.UserError, "The Hub refuses the push to org/name (413): too large"),
        (OfflineModeIsEnabled("x"), errors.UserError, "HF_HUB_OFFLINE forbids to push."),
        (ConnectionError("refused"), errors.Unavailable, "The Hub cannot be reached (refused)."),
        (json.JSONDecodeError("x", "", 0), errors.Unavailable, "something else than JSON"),
        (ConnectionError("CERTIFICATE_VERIFY_FAILED"), errors.PermanentError, "is not trusted"),
        (ValueError("odd"), errors.PermanentError, "The push to org/name failed: ValueError: odd"),
    ],
)
def test_an_error_of_the_library_has_a_type_and_a_sentence(
    error: Exception, kind: type[errors.HoneError], sentence: str
) -> None:
    found = push_error(error, repo="org/name")
    assert isinstance(found, kind)
    assert sentence in str(found)
    assert isinstance(found, errors.TemporaryError) == (kind is errors.Unavailable)


def test_the_cause_counts_and_not_what_it_was_wrapped_in() -> None:
    wrapped = RuntimeError("Error while uploading 'x' to the Hub.")
    wrapped.__cause__ = Answered(503)
    assert isinstance(push_error(wrapped, repo="org/name"), errors.Unavailable)
    stopped = errors.WrongState("asked to stop")
    wrapped.__cause__ = stopped
    assert push_error(wrapped, repo="org/name") is stopped


def test_a_signature_in_an_address_is_not_repeated() -> None:
    class Odd(Exception):
        pass

    said = str(push_error(Odd("at https://storage.example/x?X-Amz-Signature=canary it broke"), repo="org/name"))
    assert "canary" not in said and "https://storage.example/x it broke" in said


@pytest.mark.parametrize(
    ("path", "is_weights"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("adapter_model.safetensors", True),
        ("adapter_config.json", True),
        ("training_args.bin", False),
        ("older/model.safetensors", False),
        ("config.json", False),
    ],
)
def test_weights_are_known_by_the_names_that_loaders_look_for(path: str, is_weights: bool) -> None:
    assert bool(_WEIGHTS.fullmatch(path)) is is_weights


def test_without_a_token_nothing_is_tried(tmp_path: Path) -> None:
    with pytest.raises(errors.Unauthenticated, match="HF_TOKEN is not set"):
        push(tmp_path, [], Target(repo="org/name"), token="", message="x")


@pytest.mark.parametrize("token", ["canary one", "canary\ntwo", "canarÿ"])
def test_a_token_that_cannot_be_sent_is_refused_without_repeating_it(tmp_path: Path, token: str) -> None:
    with pytest.raises(errors.Unauthenticated) as caught:
        push(tmp_path, [], Target(repo="org/name"), token=token, message="x")
    assert "canar" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [("file:///home/me/models/tiny/", "tiny"), ("hf://org/base@main", "hf://org/base@main"), ("s3://b/x", "s3://b/x")],
)
def test_the_hub_is_told_no_path_of_a_machine(tmp_path: Path, source: str, told: str) -> None:
    file = tmp_path / "hone_base.json"
    file.write_text(json.dumps({"source": source, "revision": "", "weights_sha256": "x"}))
    listed = ManifestFile(path=file.name, size=file.stat().st_size, sha256="0" * 64)
    found = _File.of(tmp_path, listed)
    data = found.data or file.read_bytes()
    assert json.loads(data) == {"source": told, "revision": "", "weights_sha256": "x"}
    assert found.size == len(data)


def test_the_service_needs_no_huggingface_hub() -> None:
    script = "import sys, hone.hub, hone.cli, hone.cli.push; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_where_the_library_is_missing_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.UserError, match="pip install 'huggingface_hub"):
        push(tmp_path, [], Target(repo="org/name"), token="x", message="x")
