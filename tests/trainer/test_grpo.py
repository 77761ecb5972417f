"""GRPO on TRL's trainer: its advantages and losses against the paper's, and what Hone adds around it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import MakeAttempt, RunHere
from .test_checkpoints import going_on, merged, weights
from .test_ppo import VARIED, figures, prompts
from .test_supervisor import Start, start

__all__ = ["prompts", "start"]


def request(prompts: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        "rewards": [VARIED, {"length": {"max_tokens": 3}, "weight": 0.5}],
        "num_generations": 4,
        "max_new_tokens": 6,
    }
    base = {
        "dataset": {"source": f"file://{prompts}", "eval_fraction": 0.2},
        "method": {"sft": None, "grpo": settings},
        "training": {"max_steps": 3, "learning_rate": 1e-3, "eval": {"at_start": True, "batch_size": 4}},
    }
    return merged(base, *changes)


def test_every_figure_is_told_by_the_names_of_ppo(make_attempt: MakeAttempt, run_here: RunHere, prompts: Path) -> None:
    ran = run_here(make_attempt(request(prompts, {"method": {"grpo": {"beta": 0.1}}}), micro_batch_size=8))
    told = figures(ran)
    assert {"reward", "reward/regex", "reward/length", "kl", "entropy", "answer_tokens", "truncated"} <= set(told[0])
    for one in told:
        assert one["reward"] == pytest.approx(one["reward/regex"] + 0.5 * one["reward/length"], abs=1e-5)
    assert told[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert told[-1]["tokens"] > 3 * 8
    after = ran.events("eval")[-1].metrics
    assert after["eval_loss"] == -after["eval_reward"]


def test_advantages_and_the_first_loss_are_the_papers(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hone_trainer.methods import grpo

    seen: list[dict[str, torch.Tensor]] = []
    compute = grpo.Trainer._generate_and_score_completions

    def noted(self: Any, inputs: Any) -> Any:
        found = compute(self, inputs)
        seen.append({name: value for name, value in found.items() if torch.is_tensor(value)})
        return found

    totals: list[list[float]] = []
    reward = grpo.Trainer._reward

    def scored(self: Any, *arguments: Any, **columns: Any) -> list[float]:
        totals.append(reward(self, *arguments, **columns))
        return totals[-1]

    monkeypatch.setattr(grpo.Trainer, "_generate_and_score_completions", noted)
    monkeypatch.setattr(grpo.Trainer, "_reward", scored)
    ran = run_here(make_attempt(request(prompts, {"training": {"max_steps": 1}}), micro_batch_size=8))
    rewards = torch.tensor(totals[0], dtype=torch.float64).view(-1, 4)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert seen[0]["advantages"].tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-4)
    # With a ratio of 1 the loss is minus the mean advantage of a token (dapo: over all tokens of the batch).
    mask = seen[0]["completion_mask"].double()
    loss = -(wanted.flatten()[:, None] * mask).sum() / mask.sum()
    assert figures(ran)[0]["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path
) -> None:
    asked = request(prompts, {"training": {"max_steps": 4, "checkpoint": {"steps": 2}}})
    whole = run_here(make_attempt(asked, micro_batch_size=8))
    again = run_here(going_on(make_attempt(asked, micro_batch_size=8), whole.directory.checkpoints / "step-000002"))
    assert figures(again) == figures(whole)[2:]
    assert weights(again) == weights(whole)


def test_two_ranks_train_and_agree_on_what_they_tell(make_attempt: MakeAttempt, start: Start, prompts: Path) -> None:
    two = make_attempt(request(prompts), job="two", processes=2, micro_batch_size=4)
    assert start(two).wait(240) == 0, two.exit()
    told = figures(two)
    assert len(told) == 3
    for one in told:
        assert one["reward"] == pytest.approx(one["reward/regex"] + 0.5 * one["reward/length"], abs=1e-5)


def test_a_full_fine_tuning_learns_from_rewards_too(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path
) -> None:
    full = {"adapter": None, "training": {"learning_rate": 1e-4}}
    ran = run_here(make_attempt(request(prompts, full), micro_batch_size=8))
    assert len(figures(ran)) == 3 and [event.fields.get("kind") for event in ran.events("output")] == []
    assert (ran.directory.scratch / "outputs" / "model" / "model.safetensors").exists()
