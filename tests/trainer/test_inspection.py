"""`hone data`, with the trainer's own reading."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import merge, preferences, reversals, write_rows

HONE = str(Path(sys.executable).with_name("hone"))


@pytest.fixture
def ask(tiny_model: Path, tmp_path: Path) -> Any:
    def run(changes: dict[str, Any], *words: str) -> "subprocess.CompletedProcess[str]":
        request = merge(
            {
                "name": "looked-at",
                "model": {"source": f"file://{tiny_model}"},
                "method": {"sft": {"max_length": 24}},
                "adapter": {"lora": {}},
            },
            changes,
        )
        (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
        return subprocess.run(
            [HONE, "data", str(tmp_path / "request.json"), *words], capture_output=True, text=True, check=False
        )

    return run


def test_rows_are_counted_and_the_first_is_shown_as_it_is_learned(ask: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*reversals(30), *reversals(2)])
    changes = {"dataset": {"source": f"file://{rows}", "eval_split": "train[-1:]"}}
    shown = ask(changes).stdout
    assert "train  32 of 32 rows are used" in shown
    assert "2 are copies of others" in shown and "1 are training rows too" in shown
    assert "<s>reverse ad = ⟦da</s>⟧" in shown
    told = json.loads(ask(changes, "--json", "--set", "dataset.split=train[:30]").stdout)
    train = told["counts"]["train"]
    assert (train["rows"], train["rows_repeated"]) == (30, 0)
    assert sum(train["lengths"].values()) == 30


def test_pairs_are_shown_side_by_side(ask: Any, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(8))
    method = {"sft": None, "dpo": {"max_length": 40}}
    shown = ask({"method": method, "dataset": {"source": f"file://{pairs}"}}).stdout
    assert "chosen, what is learned" in shown and "rejected, what is learned" in shown


@pytest.mark.parametrize("method", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_prompts_are_shown_as_they_are_answered(ask: Any, tmp_path: Path, method: str) -> None:
    rows = write_rows(tmp_path / "prompts.jsonl", [*reversals(7), {"prompt": "long " * 40, "completion": "x"}])
    rewards = [{"answer": {"column": "completion"}}]
    settings = {"sft": None, method: {"rewards": rewards, "max_prompt_length": 24}}
    changes = {"dataset": {"source": f"file://{rows}"}, "method": settings}
    shown = ask(changes).stdout
    assert "7 of 8 prompts are used" in shown and "1 dropped: they are longer than max_prompt_length" in shown
    assert "rewards see  completion" in shown and "<s>reverse ad = \n" in shown
    assert json.loads(ask(changes, "--json").stdout)["columns"] == ["completion"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": ""}], "has 1 row that cannot be learned: row 1 (rows.jsonl line 1)"),
        ([{"question": "a", "answer": "b"}], "question, answer"),
    ],
)
def test_data_that_cannot_be_learned_is_the_callers_fault(
    ask: Any, tmp_path: Path, rows: list[dict[str, str]], message: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ended = ask({"dataset": {"source": f"file://{path}"}})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_a_trainer_that_is_not_there_is_told(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", reversals(2))
    monkeypatch.setenv("HONE_TRAINER_PYTHON", "/usr/bin/false")
    ended = ask({"dataset": {"source": f"file://{path}"}})
    assert ended.returncode == 1
    assert "hone doctor" in ended.stderr


def test_a_method_without_rows_to_show_is_refused(ask: Any) -> None:
    method = {"sft": None, "merge": {"adapters": [{"source": "file:///adapter"}]}}
    ended = ask({"method": method, "adapter": None})
    assert ended.returncode == 2
    assert "request.json is a request for merge" in ended.stderr
