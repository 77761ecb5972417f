"""One PPO update as a short loop in plain torch, written from the papers: what methods/ppo.py is held to.

One answer at a time, without padding; GAE by its definition, a double sum. Sources: Schulman et al. 2016 (eq. 16), 2017
(eq. 7 and 9), Ziegler et al. 2019 (section 2.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Told:
    """An answer that was given, with its score."""

    prompt: list[int]
    answer: list[int]
    score: float


def says(model: Any, head: nn.Linear, told: Told) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and value of every token of an answer."""
    ids = torch.tensor([[*told.prompt, *told.answer]])
    found = model(ids, output_hidden_states=True)
    first = len(told.prompt) - 1
    logits, hidden = found.logits[0, first:-1], found.hidden_states[-1][0, first:-1]
    log_probs = logits.log_softmax(-1)[torch.arange(len(told.answer)), torch.tensor(told.answer)]
    return log_probs, head(hidden)[:, 0]


def advantages(rewards: torch.Tensor, values: torch.Tensor, *, gamma: float, lam: float) -> torch.Tensor:
    """Â(t) = Σ_k (γλ)^k · (r(t+k) + γ·V(t+k+1) − V(t+k))."""
    after = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * after - values
    length = len(deltas)
    return torch.stack(
        [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]  # type: ignore[misc]
    )


def update(
    model: Any,
    head: nn.Linear,
    parameters: Sequence[nn.Parameter],
    answers: Sequence[Told],
    order: Sequence[Sequence[int]],
    *,
    rate: float,
    kl_coef: float,
    gamma: float,
    lam: float,
    clip: float,
    clip_value: float,
    vf_coef: float,
) -> list[float]:
    """The loss of each optimizer step; `order` names the answers of each. The reference is the model as it comes."""
    with torch.no_grad():
        before = [says(model, head, told) for told in answers]
    gains, returns = [], []
    for told, (log_probs, values) in zip(answers, before, strict=True):
        rewards = -kl_coef * (log_probs - log_probs)
        rewards[-1] += told.score
        gain = advantages(rewards, values, gamma=gamma, lam=lam)
        gains.append(gain)
        returns.append(gain + values)
    every = torch.cat(gains)
    whitened = [(gain - every.mean()) / torch.sqrt(every.var() + 1e-8) for gain in gains]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for part in order:
        total, tokens = torch.zeros((), dtype=every.dtype), 0
        for index in part:
            log_probs, values = says(model, head, answers[index])
            ratio = (log_probs - before[index][0]).exp()
            gain, old = whitened[index], before[index][1]
            policy = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
            near = old + (values - old).clamp(-clip_value, clip_value)
            value = 0.5 * torch.maximum((values - returns[index]) ** 2, (near - returns[index]) ** 2)
            total, tokens = total + (policy + vf_coef * value).sum(), tokens + len(gain)
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
