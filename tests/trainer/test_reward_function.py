"""Rewards by a Python function of the user's: what it is called with, how it fails, and where it may run at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.run import ENV_PYTHON_REWARDS, TrainerExit
from hone.spec.methods import PythonPart
from hone_trainer.failure import RunFailed
from hone_trainer.rewards import Answer
from hone_trainer.rewards.answers import SignalFailed
from hone_trainer.rewards.function import open_function

from .conftest import MakeAttempt, RunHere, write_rows

Signal = Callable[[list[Answer]], list[float]]
ANSWERS = [
    Answer(prompt="q = ", text=text, num_tokens=2, row={"completion": right, "hard": True})
    for text, right in (("ab", "ab"), ("b", "c"))
]


@pytest.fixture
def signal(tmp_path: Path) -> Callable[..., Signal]:
    def make(text: str, function: str = "reward") -> Signal:
        path = tmp_path / "mine.py"
        path.write_text(text)
        part = PythonPart(file=f"file://{path}", function=function)
        return open_function(part, path, field="method.ppo.rewards.0.python")  # type: ignore[return-value]

    return make


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("def reward(completions, completion):\n return [a == b for a, b in zip(completions, completion)]", [1, 0]),
        ("def reward(prompts, completions, **columns):\n return [len(p) + len(columns) for p in prompts]", [6, 6]),
        ("def reward(completions, weight=2):\n return (weight * len(c) for c in completions)", [4, 2]),
        ("import numpy as np\ndef reward(completions):\n return np.array([len(c) for c in completions])", [2, 1]),
    ],
)
def test_a_function_takes_what_it_names(signal: Callable[..., Signal], text: str, scores: list[float]) -> None:
    assert signal(text)(ANSWERS) == scores


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def reward(completions):\n return completions[7]", r"raised IndexError: .* \(line 2 of mine.py\)"),
        ("import sys\ndef reward(completions):\n sys.exit('no')", r"raised SystemExit: no \(line 3 of mine.py\)"),
        (
            "def reward(completions, solution):\n return [0, 0]",
            "takes solution, and there are completion, hard, prompts",
        ),
        ("def reward(completions):\n return 1", "gave something that is no list of numbers"),
        ("def reward(completions):\n return [None, 1]", "gave something that is no list of numbers"),
    ],
)
def test_a_function_that_fails_is_told_with_its_line(signal: Callable[..., Signal], text: str, says: str) -> None:
    with pytest.raises(SignalFailed, match=says):
        signal(text)(ANSWERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def other():\n pass", "mine.py has no function reward"),
        ("import nowhere_to_be_found", r"importing mine.py: ModuleNotFoundError: .* \(line 1 of mine.py\)"),
        ("def reward(:\n pass", "importing mine.py: SyntaxError"),
        ("async def reward(completions):\n return []", "write an ordinary def"),
    ],
)
def test_a_file_without_its_function_is_refused(signal: Callable[..., Signal], text: str, says: str) -> None:
    with pytest.raises(RunFailed, match=says) as failed:
        signal(text)
    assert failed.value.code == TrainerExit.USER


def test_a_policy_learns_from_a_function_where_it_is_allowed_and_nowhere_else(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def reward(completions, bonus):\n return [len(c) + b for c, b in zip(completions, bonus)]"
    )
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{n} = ", "bonus": 100} for n in range(16)])
    ppo: dict[str, Any] = {
        "rewards": [{"python": {"file": f"file://{tmp_path}/mine.py"}}],
        "batch_size": 4,
        "mini_batch_size": 4,
        "max_new_tokens": 8,
    }
    changes = {
        "dataset": {"source": f"file://{rows}"},
        "method": {"sft": None, "ppo": ppo},
        "training": {"max_steps": 2, "learning_rate": 1e-4},
    }
    attempt = make_attempt(changes, micro_batch_size=4)
    monkeypatch.delenv(ENV_PYTHON_REWARDS, raising=False)
    with pytest.raises(RunFailed, match="functions of Python are not allowed here") as refused:
        run_here(attempt)
    assert refused.value.code == TrainerExit.USER
    monkeypatch.setenv(ENV_PYTHON_REWARDS, "1")
    run_here(attempt)
    told = [event.metrics["reward/python"] for event in attempt.events("progress")]
    assert len(told) == 2 and all(100 <= score <= 108 for score in told)
