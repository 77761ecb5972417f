"""`python -m hone_trainer preflight`: what a request names, looked at before it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone.findings import Finding, FindingState
from hone.run import TrainerExit
from hone.spec.parse import parse
from hone_trainer.inspection import read_run
from hone_trainer.preflight import findings_of

from ..integration.hub_server import run_hub
from .conftest import make_adapter, merge, preferences, reversals, write_rows


@pytest.fixture
def look(tiny_model: Path, tmp_path: Path) -> Any:
    def run(changes: dict[str, Any], **options: bool) -> dict[str, Finding]:
        request = merge(
            {
                "name": "looked-at",
                "model": {"source": f"file://{tiny_model}"},
                "dataset": {"source": f"file://{write_rows(tmp_path / 'rows.jsonl', reversals(100))}"},
                "method": {"sft": {"max_length": 64}},
                "adapter": {"lora": {}},
            },
            changes,
        )
        (tmp_path / "request.json").write_text(json.dumps(parse(request).to_mapping()), encoding="utf-8")
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        found = findings_of(read_run(tmp_path / "request.json"), scratch, **options)
        return {finding.check: finding for finding in found}

    return run


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {check: str(finding.state) for check, finding in found.items()}


def test_a_request_whose_parts_fit_together(look: Any) -> None:
    found = look({})
    assert states(found) == {"model": "OK", "tokenizer": "OK", "data": "OK"}
    assert "a llama, whose config and weights can be read" in found["model"].message
    assert "prompt, completion; 64 rows looked at" in found["data"].message


def test_every_part_is_looked_at_where_others_are_at_fault(look: Any, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(3))
    rewards = [{"model": {"source": f"file://{tmp_path}/nowhere"}}, {"http": {"url": "http://127.0.0.1:1/score"}}]
    found = look(
        {
            "model": {"tokenizer": f"file://{tmp_path}/nowhere"},
            "dataset": {"source": f"file://{pairs}"},
            "method": {"sft": None, "ppo": {"rewards": rewards}},
            "output": {"hub": {"repo": "org/name"}},
        }
    )
    wrong = {"tokenizer": "FAILED", "reward 0": "FAILED", "hub": "FAILED"}
    assert states(found) == {"model": "OK", "data": "NOT_CHECKED", "scorer": "NOT_CHECKED", **wrong}
    assert found["reward 0"].path == "method.ppo.rewards.0.model.source"
    assert all(finding.fix for finding in found.values() if finding.state == FindingState.FAILED)


@pytest.mark.parametrize(
    ("rows", "changes", "state", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, "FAILED", "question, answer"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "FAILED", "no assistant turn to learn"),
        (reversals(70), {"method": {"sft": {"max_length": 16}}}, "WARNING", "cut for their length"),
        (
            [{"prompt": "x" * 99, "completion": "y"}] * 64 + reversals(9),
            {"method": {"sft": {"max_length": 32}}},
            "WARNING",
            "Others of its 73 rows may",
        ),
        (
            [{"prompt": "x" * 99, "completion": "y"}] * 64,
            {"method": {"sft": {"max_length": 32}}},
            "FAILED",
            "None of the 64 rows",
        ),
        (reversals(9), {"dataset": {"split": "test"}}, "FAILED", "its only split is train"),
    ],
)
def test_rows_that_do_not_fit_are_told(
    look: Any, tmp_path: Path, rows: list[Any], changes: dict[str, Any], state: str, message: str
) -> None:
    path = write_rows(tmp_path / "other.jsonl", rows)
    finding = look(merge({"dataset": {"source": f"file://{path}"}}, changes))["data"]
    assert (str(finding.state), finding.path) == (state, "dataset.source")
    assert message in finding.message


def test_an_adapter_is_looked_at_with_its_base(look: Any, tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model, seed=1)
    assert states(look({"model": {"source": f"file://{adapter}"}}))["model"] == "OK"
    gone = make_adapter(tmp_path / "gone", tiny_model, seed=1, source=f"file://{tmp_path}/gone-base")
    found = look({"model": {"source": f"file://{gone}"}})["model"]
    assert found.state == FindingState.FAILED and "its base: " in found.message


def test_outputs_of_jobs_that_run_are_waited_for(look: Any) -> None:
    found = look({"model": {"source": "job://first/merged"}})
    assert states(found) == {"model": "NOT_CHECKED", "data": "NOT_CHECKED"}
    assert "when that job has ended" in found["model"].message


@pytest.mark.parametrize(
    ("rights", "state", "message"),
    [
        ({"org"}, "OK", "The token of someone is valid; org/name will be made"),
        (set(), "FAILED", "may only read"),
        (None, "FAILED", "does not accept the token"),
    ],
)
def test_the_token_of_a_push_is_tried(
    look: Any, monkeypatch: pytest.MonkeyPatch, rights: set[str] | None, state: str, message: str
) -> None:
    with run_hub() as hub:
        hub.tokens = {} if rights is None else {"canary": rights}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "canary")
        finding = look({"output": {"hub": {"repo": "org/name"}}})["hub"]
        assert (str(finding.state), hub.repositories) == (state, {})
        assert message in finding.message


def test_what_cannot_be_reached_from_here_stands_against_nothing_elsewhere(look: Any, tmp_path: Path) -> None:
    changes = {"model": {"source": "hf://o/n"}, "output": {"hub": {"repo": "org/name"}}}
    assert states(look(changes)) == {"model": "FAILED", "data": "NOT_CHECKED", "hub": "FAILED"}
    found = look(changes, elsewhere=True)
    assert states(found) == {"model": "NOT_CHECKED", "data": "NOT_CHECKED"}
    assert "cannot be fetched from here" in found["model"].message and "hf://o/n" in found["model"].message
    rows = write_rows(tmp_path / "bad.jsonl", [{"question": "a"}])
    assert states(look({"dataset": {"source": f"file://{rows}"}}, elsewhere=True))["data"] == "FAILED"


def test_the_command_prints_findings_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"name": "x"}')
    command = [sys.executable, "-m", "hone_trainer", "preflight", str(tmp_path / "request.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    [finding] = json.loads(ended.stdout)["findings"]
    assert (finding["check"], finding["state"], ended.returncode) == ("request", "FAILED", TrainerExit.USER)
    assert "model" in finding["message"] and ended.stderr == ""
