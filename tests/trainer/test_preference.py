"""dpo and reward in real processes: what two of them train and measure together is what one does alone."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone_trainer.preference import FIGURES, pair_figures

from .conftest import Attempt, MakeAttempt, RunHere, merge, preferences, write_rows

RUNS: dict[str, dict[str, Any]] = {
    "dpo-lora": {"method": {"dpo": {"max_length": 64}}},
    "dpo-full-once": {
        "method": {"dpo": {"max_length": 64, "precompute_reference": True}},
        "adapter": None,
        "training": {"learning_rate": 1e-3},
    },
    "dpo-full": {"method": {"dpo": {"max_length": 64}}, "adapter": None, "training": {"learning_rate": 1e-3}},
    "reward-lora": {"method": {"reward": {"max_length": 64}}},
}

FIRST = ("dpo-full-once", "reward-lora")
"""The others by `make soak`."""


def start(attempt: Attempt) -> int:
    """The trainer as backends start it; its exit code."""
    command = [sys.executable, "-m", "hone_trainer", "run", str(attempt.directory.path)]
    return subprocess.run(command, capture_output=True, timeout=240, check=False).returncode


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in RUNS])
def test_two_processes_train_and_measure_as_one(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, name: str
) -> None:
    """Seven held-out pairs in batches of two: the ranks have unequal numbers of them, and of batches."""
    rows = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    held_out = write_rows(tmp_path / "held-out.jsonl", preferences(7, start=70))
    changes = merge(
        {
            "method": {"sft": None},
            "dataset": {"source": f"file://{rows}", "eval_source": f"file://{held_out}"},
            "training": {"eval": {"at_start": True, "batch_size": 2}},
        },
        RUNS[name],
    )
    alone = run_here(make_attempt(changes, micro_batch_size=4))
    together = make_attempt(changes, processes=2, micro_batch_size=2, job="tiny-2")
    assert start(together) == 0
    assert together.losses() == pytest.approx(alone.losses(), abs=1e-5)
    figures = [[dict(event.metrics) for event in run.events("eval")] for run in (alone, together)]
    assert [pytest.approx(found, abs=1e-5) for found in figures[0]] == figures[1]
    steps = [run.events("progress")[-1].metrics for run in (alone, together)]
    assert [steps[1][name] for name in FIGURES] == pytest.approx([steps[0][name] for name in FIGURES], abs=1e-5)


def test_the_figures_of_a_reward_model_are_told_by_the_names_of_dpo() -> None:
    noted = {"mean_reward": [1.0, 3.0], "margin": [0.5, 1.5], "accuracy": [1.0, 0.5], "min_reward": [0.0]}
    assert pair_figures(noted) == {
        "rewards/chosen": 2.5,
        "rewards/rejected": 1.5,
        "rewards/margins": 1.0,
        "rewards/accuracies": 0.75,
    }
    assert pair_figures({"rewards/chosen": [1.0], "entropy": [math.pi]}) == {"rewards/chosen": 1.0}
    assert pair_figures({}) == {}
