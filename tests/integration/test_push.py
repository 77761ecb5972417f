"""Pushes to a Hub on loopback by the real huggingface_hub: by `hone push`, and at the end of a run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .hub_server import Hub, Repository, run_hub

HONE = [sys.executable, "-c", "import sys; from hone.cli import main; sys.exit(main())"]
TOKEN = "canary-hub-token"
TO_HUB = {"hub": {"repo": "org/name"}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub, and an environment in which every process of the test talks to it."""
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    with run_hub() as hub:
        hub.tokens = {TOKEN: {"org"}}
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**settings, "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, quick_python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HONE_HOME of its own, whose runs train nothing."""
    place = tmp_path / "home"
    monkeypatch.setenv("HONE_HOME", str(place))
    monkeypatch.setenv("HONE_TRAINER_PYTHON", str(quick_python))
    monkeypatch.delenv("HONE_SERVER", raising=False)
    return place


def hone(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [*HONE, *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def request_file(inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A request whose run trains nothing."""

    def write(output: dict[str, Any] | None = None, **labels: str) -> Path:
        data = {
            "name": "demo",
            "labels": labels,
            "model": {"source": f"file://{inputs / 'model'}"},
            "dataset": {"source": f"file://{inputs / 'rows.jsonl'}"},
            "method": {"sft": {}},
            "adapter": {"lora": {}},
            "compute": {"gpus_per_node": 0},
            "output": output or {},
        }
        file = tmp_path / "demo.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        return file

    return write


@pytest.fixture
def run(request_file: Callable[..., Path]) -> Callable[..., Any]:
    """Runs it, and gives the job as `hone get` has it."""

    def make(output: dict[str, Any] | None = None) -> Any:
        done = hone("run", request_file(output))
        assert done.returncode == 0, done
        return json.loads(hone("get", "demo", "--json").stdout)

    return make


def result(home: Path) -> dict[str, Any]:
    [path] = home.rglob("result.json")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_a_run_pushes_what_it_leaves_into_a_private_repository_and_says_so(
    hub: Hub, run: Callable[..., Any], home: Path
) -> None:
    job = run(TO_HUB)
    assert (hub.model().private, hub.model().commits()) == (True, 1)
    assert hub.model().files()["adapter_model.safetensors"] == b"weights"
    assert "MANIFEST.json" not in hub.model().files()
    assert hub.model().messages[0].startswith(f"Upload adapter of {job['id']} with Hone ")
    commit = hub.model().commit_id("main")
    assert job["state"] == "SUCCEEDED"
    said = f"Read back: adapter. Its adapter is on the Hub: {hub.address}/org/name (commit {commit[:7]})."
    assert job["state_reason"] == said
    assert said in hone("get", "demo").stdout
    expected = {"repo": "org/name", "what": "adapter", "branch": "main", "private": True}
    assert result(home)["hub"] == {**expected, "url": f"{hub.address}/org/name", "commit": commit}


def test_a_second_push_makes_no_new_commit(hub: Hub, run: Callable[..., Any]) -> None:
    run(TO_HUB)
    done = hone("push", "demo")
    assert done.returncode == 0, done
    assert f"org/name has all of it already (commit {hub.model().commit_id('main')[:7]}): no new commit." in done.stdout
    assert done.stdout.splitlines()[-1] == f"{hub.address}/org/name"
    assert hub.model().commits() == 1


def test_a_push_that_fails_leaves_the_run_succeeded_and_hone_push_does_it_afterwards(
    hub: Hub, run: Callable[..., Any], home: Path
) -> None:
    hub.tokens = {TOKEN: {"another"}}
    job = run(TO_HUB)
    assert job["state"] == "SUCCEEDED"
    assert re.fullmatch(
        r"Read back: adapter\. It was not pushed to org/name: The token has no right to write to org/name \(403: .*\)\."
        rf" Make a token that .*\. Next: hone push {job['id']}",
        job["state_reason"],
    ), job["state_reason"]
    assert "no right to write" in result(home)["hub"]["error"]
    hub.tokens = {TOKEN: {"org"}}
    done = hone("push", "demo")
    assert done.returncode == 0, done
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[:2] == ["made org/name, private", "sending adapter_model.safetensors, 7 bytes (1 of 1)"]
    assert lines[-1] == f"{hub.address}/org/name"
    assert (hub.model().private, hub.model().commits()) == (True, 1)


def test_an_outage_passes_and_is_not_told_as_a_failure(hub: Hub, run: Callable[..., Any]) -> None:
    hub.failures = [("/commit/", 503)]
    assert "is on the Hub" in run(TO_HUB)["state_reason"]
    assert not hub.failures
    for number, path in enumerate(("/commit/", "/preupload/", "/repos/create", "/tree/")):
        hub.failures = [(path, 503)]
        done = hone("push", "demo", "--repo", f"org/another-{number}")
        assert (done.returncode, hub.failures) == (0, []), done
        assert hub.model(f"org/another-{number}").commits() == 1


def test_a_run_without_a_token_says_so_before_it_trains(
    hub: Hub, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    job = run(TO_HUB)
    assert "It was not pushed to org/name: There is no token for the Hub" in job["state_reason"]
    assert hub.requests == []
    story = hone("watch", "demo", "--json").stdout
    early, late = (json.loads(line)["seq"] for line in story.splitlines() if '"warning"' in line)
    training = next(json.loads(line)["seq"] for line in story.splitlines() if '"progress"' in line)
    assert early < training < late


def test_no_token_is_written_anywhere(hub: Hub, run: Callable[..., Any], home: Path) -> None:
    run(TO_HUB)
    hub.tokens = {}
    refused = hone("push", "demo")
    assert refused.returncode == 4
    told = hone("watch", "demo", "--json").stdout + hone("get", "demo").stdout + refused.stdout + refused.stderr
    assert "canary" not in told
    assert b"canary" not in hub.all_bytes()
    for path in home.rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), path


def test_a_push_goes_to_a_branch_and_in_public_when_it_is_asked(hub: Hub, run: Callable[..., Any]) -> None:
    run()
    done = hone("push", "demo", "--repo", "org/name", "--branch", "v1/first", "--public", "--json")
    assert done.returncode == 0, done
    answer = json.loads(done.stdout)
    assert (answer["branch"], answer["private"], answer["sent"]) == ("v1/first", False, ["adapter_model.safetensors"])
    assert answer["url"] == f"{hub.address}/org/name/tree/v1/first"
    assert hub.model().files("v1/first") == {"adapter_model.safetensors": b"weights"}
    assert (hub.model().private, hub.model().files()) == (False, {})


def test_a_dry_run_says_what_would_be_and_asks_nobody(hub: Hub, run: Callable[..., Any]) -> None:
    job = run()["id"]
    done = hone("push", "demo", "--repo", "org/name", "--dry-run")
    assert done.stdout.splitlines() == [
        f"Would push adapter of {job} (1 file, 7 B) to org/name, branch main, private:",
        "  adapter_model.safetensors, 7 B",
    ]
    assert hub.requests == []


def test_a_job_that_is_cancelled_while_it_pushes_has_succeeded(hub: Hub, request_file: Callable[..., Path]) -> None:
    hub.failures = [("/commit/", 503)] * 20
    process = subprocess.Popen(
        [*HONE, "run", str(request_file(TO_HUB))], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        deadline = time.monotonic() + 60
        while not any("/commit/" in request for request in hub.requests):
            assert time.monotonic() < deadline, "it never pushed"
            time.sleep(0.05)
        hone("cancel", "demo")
        process.communicate(timeout=60)
    job = json.loads(hone("get", "demo", "--json").stdout)
    assert job["state"] == "SUCCEEDED"
    assert "It was not pushed to org/name: The run was asked to stop (SIGTERM) and stopped." in job["state_reason"]


def test_what_cannot_be_pushed_is_refused_in_one_sentence(
    hub: Hub, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run()["id"]
    hub.repositories = {
        ("dataset", "org/data"): Repository(kind="dataset", private=True),
        ("model", "org/public"): Repository(kind="model", private=False),
        ("model", "org/full"): Repository(kind="model", private=True),
        ("model", "org/busy"): Repository(kind="model", private=True),
    }
    hub.model("org/full").branches["main"].append({"model.safetensors": b"other weights"})
    cases: list[tuple[int, str, tuple[str, ...]]] = [
        (2, f"{job} has no output.hub that says where to push it. Give --repo ORG/NAME.", ()),
        (2, "'name' is no repository of the Hub: write organisation/name", ("--repo", "name")),
        (2, "'a..b' is no name of a branch", ("--repo", "org/name", "--branch", "a..b")),
        (2, f"{job} has no output 'merged'; it has: adapter.", ("--repo", "org/name", "--what", "merged")),
        (2, "org/data is the name of a dataset on the Hub, not of a model.", ("--repo", "org/data")),
        (4, "org/public is public on the Hub, and this push is to be private.", ("--repo", "org/public")),
        (2, "org/full holds other weights (model.safetensors)", ("--repo", "org/full")),
        (4, "The token has no right to write to other/name (403", ("--repo", "other/name")),
        (3, "No job", ("--repo", "org/name")),
    ]
    for code, sentence, options in cases:
        done = hone("push", "nobody" if code == 3 else "demo", *options)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done
        assert sentence in done.stderr or code == 3
    monkeypatch.setenv("HF_TOKEN", "unknown-token")
    done = hone("push", "demo", "--repo", "org/name")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("The Hub does not accept the token (401). Make a token that may write")
    monkeypatch.delenv("HF_TOKEN")
    done = hone("push", "demo", "--repo", "org/name", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["reason"] == "UNAUTHENTICATED"
    assert all(repository.commits() == (name == "org/full") for (_, name), repository in hub.repositories.items())


def test_a_job_that_has_not_succeeded_is_not_pushed(hub: Hub, request_file: Callable[..., Path]) -> None:
    assert hone("run", request_file(TO_HUB, ending="crash")).returncode == 1
    done = hone("push", "demo")
    assert done.returncode == 2
    assert "is FAILED: only a job that has succeeded can be pushed." in done.stderr
    assert hub.requests == []


def test_a_hub_that_is_switched_off_is_told_as_such(
    hub: Hub, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = hone("push", "demo", "--repo", "org/name")
    assert (done.returncode, done.stderr) == (2, "HF_HUB_OFFLINE forbids to push. Unset it.\n")
