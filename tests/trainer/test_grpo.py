"""GRPO on TRL's trainer: its advantages and losses against the paper's, and what Hone adds around it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hone_trainer.methods import grpo

from . import reference_grpo
from .conftest import MakeAttempt, RunHere
from .test_checkpoints import going_on, merged, weights
from .test_ppo import VARIED, figures, prompts
from .test_reference import ALPHA, RANK, in_float64, load, outputs, started, weights_of
from .test_supervisor import Start, start

__all__ = ["in_float64", "prompts", "start"]


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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[reference_grpo.Told]]:
    """The answers of each draw, as a run drew them, with the paper's advantages."""
    totals: list[list[float]] = []
    found: list[list[reference_grpo.Told]] = []
    reward, draw = grpo.Trainer._reward, grpo.Trainer._generate_and_score_completions

    def scored(self: Any, *arguments: Any, **columns: Any) -> list[float]:
        totals.append(reward(self, *arguments, **columns))
        return totals[-1]

    def noted(self: Any, inputs: Any) -> Any:
        batch = draw(self, inputs)
        wanted = reference_grpo.advantages(torch.tensor(totals[-1], dtype=torch.float64).view(-1, 4)).flatten()
        assert batch["advantages"].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)  # TRL's are fp32
        kept = [
            [ids[mask.bool()].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        ]
        found.append([reference_grpo.Told(*told) for told in zip(*kept, batch["advantages"].tolist(), strict=True)])
        return batch

    monkeypatch.setattr(grpo.Trainer, "_reward", scored)
    monkeypatch.setattr(grpo.Trainer, "_generate_and_score_completions", noted)
    return found


CASES = {
    "once": {},
    "twice": {"method": {"grpo": {"num_iterations": 2}}},
    "near its reference": {"method": {"grpo": {"num_iterations": 2, "beta": 0.1}}},
    "full": {"adapter": None, "method": {"grpo": {"num_iterations": 2}}},
    "full, near its reference": {"adapter": None, "method": {"grpo": {"num_iterations": 2, "beta": 0.1}}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_losses_and_weights_in_float64_are_a_plain_loops_to_the_last_digits(
    make_attempt: MakeAttempt,
    run_here: RunHere,
    in_float64: list[float],
    drawn: list[list[reference_grpo.Told]],
    prompts: Path,
    tiny_model: Path,
    changes: dict[str, Any],
) -> None:
    steady = {
        "scheduler": "constant",
        "warmup_ratio": None,
        "warmup_steps": 0,
        "max_steps": 4,
        "eval": {"at_start": False},
    }
    lora = {"lora": {"rank": RANK, "alpha": ALPHA}}
    asked = request(prompts, {"adapter": lora, "training": steady}, changes)
    ran = run_here(make_attempt(asked, micro_batch_size=8))
    told, answers = list(in_float64), list(drawn)
    start = outputs(run_here(make_attempt(merged(asked, {"training": {"max_steps": 1, "learning_rate": 1e-30}}))))
    base = load(tiny_model, "sft").double()
    model, trained = started(start, tiny_model, "sft")
    model.double()
    trained = trained if start.name == "adapter" else dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    settings = ran.run.spec.method.grpo
    assert settings is not None and len(told) == 4
    losses = reference_grpo.train(
        model,
        base,
        list(trained.values()),
        answers,
        iterations=settings.num_iterations,
        rate=1e-3,
        beta=settings.beta,
        epsilon=settings.epsilon,
    )
    assert told == pytest.approx(losses, rel=1e-8, abs=1e-8)
    after = weights_of(outputs(ran))
    wanted = torch.cat([(trained[name].detach() - before[name]).flatten() for name in before])
    found = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float((found - wanted).norm() / wanted.norm()) < (
        1e-8 if asked["adapter"] else 1e-6
    )  # a model is saved in fp32


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


def test_the_reference_of_a_full_fine_tuning_is_what_it_started_from(
    make_attempt: MakeAttempt, run_here: RunHere, prompts: Path
) -> None:
    full = {"adapter": None, "training": {"learning_rate": 1e-4}, "method": {"grpo": {"beta": 0.1}}}
    grown = {"model": {"new_tokens": [f"<{n}>" for n in range(200)]}}  # which the files of the model do not have
    ran = run_here(make_attempt(request(prompts, full, grown), micro_batch_size=8))
    told = figures(ran)
    assert told[0]["kl"] == pytest.approx(0, abs=1e-6) and told[-1]["kl"] != 0
