"""Optimizers by the request's names, and stochastic rounding: right on average, the same on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.plan.memory import UPDATE_BYTES, UPDATED_AT_ONCE
from hone_trainer import optimizers
from hone_trainer.optimizers import StochasticAdamW, round_stochastically, transformers_name

from .conftest import Attempt, MakeAttempt, RunHere, make_model
from .held import Tracker

FULL: dict[str, Any] = {"adapter": None, "training": {"learning_rate": 1e-3}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-20, -2.5e10, 0.0, 1.0])
def test_rounding_is_right_on_average_and_never_farther_than_a_neighbour(value: float) -> None:
    exact = torch.full((200_000,), value)
    found = round_stochastically(exact, generator()).double()
    down, up = sorted({float(number) for number in found.unique()})[0], float(found.max())
    assert len(found.unique()) <= 2
    step = abs(value) * 2**-7
    assert down <= value * (1 + 1e-7) + 1e-30 and up >= value * (1 - 1e-7) - 1e-30
    assert up - down <= step
    assert float(found.mean()) == pytest.approx(value, abs=max(step * 0.005, 1e-30))


def test_numbers_that_bf16_has_are_kept_and_infinity_stays_infinite() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**100, float("inf"), -float("inf")])
    for seed in range(50):
        assert torch.equal(round_stochastically(exact, generator(seed)).float(), exact)
    assert round_stochastically(torch.tensor([float("nan")]), generator()).isnan().all()


def steps(dtype: torch.dtype, count: int, *, seed: int = 0, rate: float = 1e-5) -> torch.Tensor:
    """Weights of 1 that a constant gradient pushes down by `rate` a step."""
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = StochasticAdamW([weight], lr=rate, seed=seed)
    for _ in range(count):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def momentary(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a later update takes beside weights, gradients and moments."""
    optimizer.step()
    known = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    known += [t for group in optimizer.param_groups for p in group["params"] for t in (p, p.grad)]
    with Tracker({tensor.untyped_storage().data_ptr() for tensor in known}) as tracker:
        optimizer.step()
    return tracker.peak


def test_an_update_takes_no_more_than_planned_where_foreach_takes_as_much_as_the_weights(
    make_attempt: MakeAttempt,
) -> None:
    run = make_attempt(FULL).run
    count = 4 * 1024 * 1024
    weights = [torch.nn.Parameter(torch.ones(count // 4)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert momentary(torch.optim.AdamW(weights, foreach=True)) >= 4 * count
    assert transformers_name(run.spec, run.launch) == "adamw_torch_fused"
    assert momentary(torch.optim.AdamW(weights, fused=True)) < 1000
    halves = torch.nn.Parameter(torch.ones(2 * UPDATED_AT_ONCE + 1, dtype=torch.bfloat16))
    halves.grad = torch.ones_like(halves)
    assert (
        0.5 * UPDATE_BYTES * UPDATED_AT_ONCE
        < momentary(StochasticAdamW([halves], lr=1e-3))
        <= UPDATE_BYTES * UPDATED_AT_ONCE
    )


def test_updates_that_plain_bf16_loses_are_kept_on_average() -> None:
    plain = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    assert torch.equal(plain, torch.ones_like(plain))
    exact = steps(torch.float32, 100)
    assert float(exact.mean()) == pytest.approx(1 - 100 * 1e-5, abs=1e-5)
    assert float(steps(torch.bfloat16, 100).double().mean()) == pytest.approx(float(exact.mean()), abs=1e-4)


@pytest.mark.parametrize("part", [optimizers.UPDATED_AT_ONCE, 7], ids=["whole", "parts"])
def test_in_fp32_it_is_adamw(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "UPDATED_AT_ONCE", part)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    both = [StochasticAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)]
    for _ in range(10):
        gradient = torch.randn(50)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in both:
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_copies_of_one_seed_round_alike_and_a_resumed_one_goes_on_as_if_it_had_not_stopped() -> None:
    assert torch.equal(steps(torch.bfloat16, 5), steps(torch.bfloat16, 5))
    assert not torch.equal(steps(torch.bfloat16, 5), steps(torch.bfloat16, 5, seed=1))
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    first = StochasticAdamW([weight], lr=1e-5)
    for number in range(5):
        if number == 3:
            second = StochasticAdamW([weight], lr=1e-5)
            second.load_state_dict(first.state_dict())
            first = second
        weight.grad = torch.ones_like(weight)
        first.step()
    assert torch.equal(weight, steps(torch.bfloat16, 5))


def weights(attempt: Attempt) -> dict[str, torch.Tensor]:
    return load_file(attempt.directory.scratch / "outputs" / "model" / "model.safetensors")


def test_a_training_run_moves_what_plain_bf16_would_not(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", dtype="bfloat16")
    training = {"optimizer": "adamw_bf16_sr", "learning_rate": 1e-5, "max_steps": 4, "precision": "auto"}
    changes = {"model": {"source": f"file://{base}"}, "adapter": None, "training": training}
    found = weights(run_here(make_attempt(changes, precision="bf16")))
    before = load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    # The norms are 1: an update of 1e-5 is a 400th of bf16's step there, and would always be lost.
    norms = [name for name in found if "norm" in name]
    assert any(not torch.equal(found[name], before[name]) for name in norms)


def test_stochastic_rounding_learns_as_fp32_does(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    def losses(**training: Any) -> list[float]:
        changes = {"adapter": None, "training": {"learning_rate": 3e-3, "max_steps": 30, **training}}
        precision = "bf16" if "optimizer" in training else "fp32"
        return run_here(make_attempt(changes, precision=precision)).losses()

    exact, rounded = losses(), losses(optimizer="adamw_bf16_sr", precision="auto")
    assert rounded != exact
    assert sum(rounded[-5:]) == pytest.approx(sum(exact[-5:]), rel=0.1)
    assert sum(rounded[-5:]) < 0.8 * sum(rounded[:5])


@pytest.mark.parametrize("changes", [FULL, {}], ids=["full", "lora"])
def test_eight_bit_moments_train_almost_as_fp32_ones_do(
    make_attempt: MakeAttempt, run_here: RunHere, changes: dict[str, Any]
) -> None:
    def losses(optimizer: str) -> list[float]:
        training = {**changes.get("training", {}), "optimizer": optimizer, "max_steps": 8}
        return run_here(make_attempt({**changes, "training": training})).losses()

    exact, eight, paged = losses("adamw"), losses("adamw_8bit"), losses("paged_adamw_8bit")
    assert eight == pytest.approx(exact, abs=0.05)
    assert paged == eight
    if changes:
        assert eight != exact  # an adapter of this size has too few numbers in a tensor to be held in 8 bits


def test_the_moments_of_eight_bits_are_eight_bits() -> None:
    from bitsandbytes.optim import AdamW8bit

    weights = [torch.nn.Parameter(torch.ones(128, 64)) for _ in range(16)]
    optimizer = AdamW8bit(weights, lr=1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # Embeddings that transformers asked to be kept in 32 bits are known by the address that they had.
    assert torch.uint8 in {optimizer.state[weight]["state1"].dtype for weight in weights}
