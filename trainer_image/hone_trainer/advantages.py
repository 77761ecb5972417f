"""The arithmetic of PPO on answers: rewards of tokens, advantages, clipped losses, the KL controller.

Pure functions of tensors of shape (answers, tokens), answers padded on the right; `mask` is 1 at their tokens, the
stop token included. Called by methods/ppo.py. Sources: Schulman et al. 2016 (GAE) and 2017 (PPO), Ziegler et al. 2019
(KL penalty, adaptive coefficient, clipped values).
"""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
HORIZON = 10_000
"""Answers over which the adaptive coefficient may change by a fifth (Ziegler et al. 2019, section 2.2)."""


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Every token pays for its distance from the reference, the last one earns the score of its answer.

    `log_ratio`: log π_old − log π_ref of each token; `scores`: (answers,).
    """
    rewards = -kl_coef * log_ratio * mask
    last = mask.sum(1, keepdim=True).long() - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """GAE: Σ (γλ)ᵏ δₜ₊ₖ with δₜ = rₜ + γ·V(t+1) − V(t); nothing comes after the last token. Schulman 2016, eq. 16."""
    advantage, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    found = torch.zeros_like(values)
    for place in range(values.shape[1] - 1, -1, -1):
        here = mask[:, place]
        delta = rewards[:, place] + gamma * following - values[:, place]
        advantage = (delta + gamma * gae_lambda * advantage) * here
        found[:, place], following = advantage, values[:, place] * here
    return found


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the mask; 0 elsewhere. One token alone, or equal ones, become 0."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    centred = (values - mean) * mask
    variance = (centred**2).sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


def policy_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, *, cliprange: float) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether the clip holds it: −min(r·A, clip(r)·A). Schulman 2017, eq. 7."""
    ratio = torch.exp(log_probs - old)
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, held), held > free


def value_losses(values: Tensor, old: Tensor, returns: Tensor, *, cliprange: float) -> Tensor:
    """Loss of each token: half the squared error, of the value or of the clipped value, whichever is larger."""
    near = old + (values - old).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) over the tokens of the mask; 0 where returns do not vary."""
    kept = mask.bool()
    variance = returns[kept].var(correction=0)
    if not variance > 0:
        return 0.0
    return float(1 - (returns - values)[kept].var(correction=0) / variance)


@dataclass
class KlController:
    """The coefficient of the KL penalty: fixed, or steered to a target."""

    coefficient: float
    target: float | None = None
    """KL of an answer, in nats."""

    def update(self, kl: float, *, answers: int) -> None:
        """After a batch whose answers had this mean KL. Ziegler et al. 2019, eq. after (5)."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * answers / HORIZON
