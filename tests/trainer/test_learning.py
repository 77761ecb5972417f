"""The methods learn: the task of letters.py, held-out figures, one seed here and three by `make learn`.

LEARN_SEEDS names the seeds; with more than one a table of what was measured is printed at the end.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import letters
from .conftest import Attempt, MakeAttempt, RunHere, write_rows
from .test_rewards import Service

SEEDS = [int(seed) for seed in os.environ.get("LEARN_SEEDS", "1").split()]
Told = Callable[[str, str, float], None]
Run = Callable[..., Attempt]
pytestmark = pytest.mark.xdist_group("learning")


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    """Collects a figure of a method, and prints them all when several seeds ran."""
    rows: dict[str, list[str]] = {}
    yield lambda method, figure, value: rows.setdefault(f"| {method} | {figure} |", []).append(f"{value:.3f}")
    if len(SEEDS) > 1:
        print("\n\n| method | held out |", " | ".join(f"seed {seed}" for seed in SEEDS), "|")  # noqa: T201
        for head, values in rows.items():
            print(head, " | ".join(values), "|")  # noqa: T201


@pytest.fixture(scope="module", params=SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def base(seed: int, tmp_path_factory: pytest.TempPathFactory, told: Told) -> Path:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = letters.make_base(tmp_path_factory.mktemp("letters") / "base", seed=seed)
    told("base", "exact reversals, sampled", letters.exact(load(path), count=500, seed=seed))
    return path


@pytest.fixture
def run(make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, base: Path, seed: int) -> Run:
    """Trains a LoRA of rank 16 on rows, and evaluates on held-out ones."""

    def train(method: str, rows: Any, held_out: Any, *, steps: int, rate: float) -> Attempt:
        train_file = write_rows(tmp_path / "train.jsonl", rows)
        eval_file = write_rows(tmp_path / "eval.jsonl", held_out)
        changes = {
            "model": {"source": f"file://{base}"},
            "dataset": {"source": f"file://{train_file}", "eval_source": f"file://{eval_file}"},
            "method": {"sft": None, method: {"max_length": 16}},
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {
                "max_steps": steps,
                "learning_rate": rate,
                "warmup_ratio": 0.1,
                "seed": seed,
                "eval": {"at_start": True, "batch_size": 100},
            },
        }
        return run_here(make_attempt(changes, micro_batch_size=64))

    return train


@pytest.fixture
def improve(make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, base: Path, seed: int) -> Run:
    """Trains a LoRA of rank 16 by rewards of answers to prompts."""

    def train(
        method: str,
        rewards: Any,
        *,
        steps: int,
        rate: float,
        micro_batch_size: int,
        scheduler: str = "cosine",
        **settings: Any,
    ) -> Attempt:
        train_file = write_rows(tmp_path / "train.jsonl", letters.answered(7680, seed=seed))
        eval_file = write_rows(tmp_path / "eval.jsonl", letters.answered(256, seed=seed, held_out=True))
        changes = {
            "model": {"source": f"file://{base}"},
            "dataset": {"source": f"file://{train_file}", "eval_source": f"file://{eval_file}"},
            "method": {"sft": None, method: {"rewards": rewards, "max_new_tokens": 6, **settings}},
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {
                "max_steps": steps,
                "learning_rate": rate,
                "scheduler": scheduler,
                "warmup_ratio": 0.1,
                "seed": seed,
                "eval": {"at_start": True, "batch_size": 256},
            },
        }
        return run_here(make_attempt(changes, micro_batch_size=micro_batch_size))

    return train


def load(path: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def evaluations(attempt: Attempt) -> list[dict[str, float]]:
    return [dict(event.metrics) for event in attempt.events("eval")]


def test_sft_learns_to_reverse(run: Run, base: Path, seed: int, told: Told) -> None:
    rows, held_out = letters.answered(7680, seed=seed), letters.answered(500, seed=seed, held_out=True)
    attempt = run("sft", rows, held_out, steps=120, rate=4e-3)
    before, after = (found["eval_loss"] for found in evaluations(attempt))
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told("sft", "loss before", before)
    told("sft", "loss after", after)
    told("sft", "exact reversals, sampled", share)
    assert share >= 0.95


def test_dpo_learns_what_is_preferred(run: Run, base: Path, seed: int, told: Told) -> None:
    rows, held_out = letters.preferred(6400, seed=seed), letters.preferred(500, seed=seed, held_out=True)
    attempt = run("dpo", rows, held_out, steps=100, rate=5e-4)
    before, after = evaluations(attempt)
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told("dpo", "loss before", before["eval_loss"])
    told("dpo", "loss after", after["eval_loss"])
    told("dpo", "accuracy", after["eval_rewards/accuracies"])
    told("dpo", "exact reversals, sampled", share)
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert after["eval_rewards/accuracies"] >= 0.95


def test_a_reward_model_learns_what_is_preferred(run: Run, seed: int, told: Told) -> None:
    rows, held_out = letters.preferred(12_800, seed=seed), letters.preferred(500, seed=seed, held_out=True)
    before, after = evaluations(run("reward", rows, held_out, steps=200, rate=2e-3))
    told("reward", "accuracy before", before["eval_rewards/accuracies"])
    told("reward", "accuracy after", after["eval_rewards/accuracies"])
    told("reward", "loss after", after["eval_loss"])
    assert after["eval_rewards/accuracies"] >= 0.95


def test_a_reward_model_learns_nothing_from_labels_by_a_coin(run: Run, seed: int, told: Told) -> None:
    rows = letters.preferred(3840, seed=seed, shuffled=True)
    held_out = letters.preferred(500, seed=seed, held_out=True, shuffled=True)
    after = evaluations(run("reward", rows, held_out, steps=60, rate=2e-3))[-1]
    told("reward, labels by a coin", "loss after", after["eval_loss"])
    told("reward, labels by a coin", "accuracy after", after["eval_rewards/accuracies"])
    assert after["eval_loss"] >= 0.69


REVERSED = {"answer": {"column": "completion"}}


def test_ppo_learns_from_a_rule(improve: Run, base: Path, seed: int, told: Told) -> None:
    settings = {"batch_size": 128, "mini_batch_size": 32, "init_kl_coef": 0.2}
    attempt = improve("ppo", [{**REVERSED, "weight": 4.0}], steps=40, rate=1e-3, micro_batch_size=32, **settings)
    before, after = evaluations(attempt)
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told("ppo, rule", "right answers before", before["eval_reward/answer"])
    told("ppo, rule", "right answers after", after["eval_reward/answer"])
    told("ppo, rule", "KL after, nats", after["eval_kl"])
    told("ppo, rule", "exact reversals, sampled", share)
    assert share >= 0.85


def test_grpo_learns_from_a_rule(improve: Run, base: Path, seed: int, told: Told) -> None:
    settings = {"num_generations": 8, "scheduler": "constant_with_warmup"}
    attempt = improve("grpo", [REVERSED], steps=90, rate=1e-3, micro_batch_size=128, **settings)
    before, after = evaluations(attempt)
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told("grpo, rule", "right answers before", before["eval_reward/answer"])
    told("grpo, rule", "right answers after", after["eval_reward/answer"])
    told("grpo, rule", "exact reversals, sampled", share)
    assert share >= 0.85


@pytest.mark.slow  # and `make learn`
def test_ppo_learns_from_a_reward_model(
    run: Run, improve: Run, base: Path, seed: int, told: Told, tmp_path: Path
) -> None:
    rows, held_out = letters.preferred(12_800, seed=seed), letters.preferred(100, seed=seed, held_out=True)
    trained = run("reward", rows, held_out, steps=200, rate=2e-3).directory.scratch / "outputs" / "adapter"
    rewards = [{"model": {"source": f"file://{trained}"}}, {**REVERSED, "weight": 0.0}]
    settings = {"batch_size": 128, "mini_batch_size": 32, "init_kl_coef": 2.0}
    attempt = improve("ppo", rewards, steps=60, rate=1e-3, micro_batch_size=32, **settings)
    before, after = evaluations(attempt)
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told("ppo, reward model", "score before", before["eval_reward/model"])
    told("ppo, reward model", "score after", after["eval_reward/model"])
    told("ppo, reward model", "KL after, nats", after["eval_kl"])
    told("ppo, reward model", "exact reversals, sampled", share)
    assert share >= 0.6
    assert after["eval_kl"] <= 3


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_rewards_by_a_coin_teach_nothing(improve: Run, base: Path, seed: int, told: Told, method: str) -> None:
    chance = random.Random(seed)
    service = Service(
        lambda body, _call: (200, json.dumps({"scores": [chance.randint(0, 1) for _ in body["answers"]]}).encode())
    )
    coin = [{"http": {"url": service.url}, "weight": 4.0}]
    settings = {"batch_size": 128, "mini_batch_size": 32} if method == "ppo" else {"num_generations": 8}
    size = 32 if method == "ppo" else 128
    attempt = improve(method, coin, steps=20, rate=1e-3, micro_batch_size=size, **settings)
    service.close()
    share = letters.exact(load(base, attempt.directory.scratch / "outputs" / "adapter"), count=500, seed=seed)
    told(f"{method}, rewards by a coin", "exact reversals, sampled", share)
    assert share <= 0.25
