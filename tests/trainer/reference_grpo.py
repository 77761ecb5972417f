"""GRPO as its papers have it, in a plain loop on given answers: Shao et al. 2024, equations 3 and 4; the mean over all
tokens is that of DAPO (Yu et al. 2025), the factor of the distance, for which its gradient has no bias, that of
DeepSeek-V3.2 (2025). Nothing of TRL or Hone is in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Told:
    """An answer and what it was worth beside the others of its group."""

    prompt: list[int]
    answer: list[int]
    advantage: float


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Of (groups, answers): against the mean of the group, in units of its standard deviation."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def says(model: Any, told: Told) -> torch.Tensor:
    """Log-probability of each token of an answer."""
    ids = torch.tensor([[*told.prompt, *told.answer]])
    table = model(ids).logits[0, :-1].log_softmax(-1)
    return table[torch.arange(len(told.prompt) - 1, ids.shape[1] - 1), torch.tensor(told.answer)]


def train(
    model: Any,
    base: Any,
    parameters: Sequence[nn.Parameter],
    drawn: Sequence[Sequence[Told]],
    *,
    iterations: int,
    rate: float,
    beta: float,
    epsilon: float,
) -> list[float]:
    """The loss of each step: every batch of answers is learned from `iterations` times."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for answers in drawn:
        with torch.no_grad():
            old, reference = [says(model, told) for told in answers], [says(base, told) for told in answers]
        for _ in range(iterations):
            tokens = []
            for told, before, frozen in zip(answers, old, reference, strict=True):
                log_probs = says(model, told)
                ratio = (log_probs - before).exp()
                gain = torch.minimum(ratio * told.advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * told.advantage)
                distance = (frozen - log_probs).exp() - (frozen - log_probs) - 1
                tokens.append(beta * ratio * distance - gain)
            loss = torch.cat(tokens).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses
