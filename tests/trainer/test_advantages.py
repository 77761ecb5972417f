"""The arithmetic of PPO against its definitions, token by token, in float64."""

import math

import pytest
import torch

from hone_trainer.advantages import (
    KlController,
    explained_variance,
    generalised_advantages,
    policy_losses,
    token_rewards,
    value_losses,
    whitened,
)

from . import reference_ppo

LENGTHS = [5, 1, 3, 4]


def table(seed: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask() -> torch.Tensor:
    return (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()


def test_the_score_is_earned_by_the_last_token_and_every_token_pays_for_its_distance() -> None:
    scores, ratio = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), table(0)
    found = token_rewards(scores, ratio, mask(), kl_coef=0.2)
    for row, length in enumerate(LENGTHS):
        for place in range(5):
            paid = -0.2 * float(ratio[row, place]) if place < length else 0.0
            assert float(found[row, place]) == pytest.approx(paid + (float(scores[row]) if place == length - 1 else 0))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_double_sum_of_the_paper(gamma: float, lam: float) -> None:
    rewards, values = table(1) * mask(), table(2) * mask()
    found = generalised_advantages(rewards, values, mask(), gamma=gamma, gae_lambda=lam)
    for row, length in enumerate(LENGTHS):
        wanted = reference_ppo.advantages(rewards[row, :length], values[row, :length], gamma=gamma, lam=lam)
        assert found[row, :length].tolist() == pytest.approx(wanted.tolist(), abs=1e-12)
        assert not found[row, length:].any()


def test_whitening_counts_the_tokens_of_answers_alone() -> None:
    values = table(3) + 1e6 * (1 - mask())
    found = whitened(values, mask())
    kept = found[mask().bool()]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-9)
    assert float(kept.std()) == pytest.approx(1, abs=1e-6)
    assert not found[~mask().bool()].any()
    assert not whitened(torch.ones(4, 5), mask().float()).any()


def test_the_clip_holds_what_would_go_too_far_and_nothing_else() -> None:
    new, old = torch.log(torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])), torch.zeros(1, 5)
    gains = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]])
    losses, held = policy_losses(new, old, gains, cliprange=0.2)
    assert losses[0].tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -1.1])
    assert held[0].tolist() == [True, False, False, True, False]


def test_a_value_is_clipped_towards_the_old_one() -> None:
    found = value_losses(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0]), cliprange=0.2)
    assert found.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])


def test_values_explain_returns_fully_not_at_all_or_worse() -> None:
    returns = table(4)
    assert explained_variance(returns, returns, mask()) == pytest.approx(1)
    assert explained_variance(torch.zeros(4, 5), returns, mask()) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask()) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4, 5), mask()) == 0


def test_the_controller_steers_to_its_target_and_a_fixed_one_stays() -> None:
    fixed, adaptive = KlController(0.2), KlController(0.2, target=6.0)
    for _ in range(10):
        fixed.update(60.0, answers=100)
        adaptive.update(60.0, answers=100)
    assert fixed.coefficient == 0.2
    assert adaptive.coefficient == pytest.approx(0.2 * (1 + 0.2 * 100 / 10_000) ** 10)
    adaptive.update(0.0, answers=100)
    assert math.isclose(adaptive.coefficient, 0.2 * (1.002**10) * 0.998)
