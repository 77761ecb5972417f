"""SFT, DPO and reward modelling as one short loop in plain torch, written from the papers: what the trainer is held to.

No TRL, no trainer of transformers, no collator: one row at a time, without padding. LoRA is a matrix product beside a
linear layer (Hu et al. 2021, section 4.1), the optimizer is AdamW (Loshchilov & Hutter 2019, algorithm 2).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

Row = Mapping[str, str]
Loss = Callable[[Sequence[Row]], torch.Tensor]


class Adapted(nn.Module):
    """A frozen linear layer with W·x + alpha/rank · B·A·x."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of both."""
        out: torch.Tensor = self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)
        return out


def adapt(model: nn.Module, adapter: Path, *, scale: float) -> dict[str, nn.Parameter]:
    """Put the adapter of a directory beside the layers that it names; what is trained, by the names of its file."""
    model.requires_grad_(False)
    tensors, trained = load_file(adapter / "adapter_model.safetensors"), {}
    for name, tensor in tensors.items():
        path = name.removeprefix("base_model.model.")
        if path.endswith("lora_A.weight"):
            path = path.removesuffix(".lora_A.weight")
            parent, _, leaf = path.rpartition(".")
            other = name.replace("lora_A", "lora_B")
            layer = Adapted(model.get_submodule(path), tensor, tensors[other], scale=scale)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), leaf, layer)
            trained |= {name: layer.a, other: layer.b}
        elif "lora" not in path:  # a head that is trained in full
            parameter = model.get_parameter(path)
            parameter.data.copy_(tensor)
            trained[name] = parameter.requires_grad_(True)
    return trained


def log_probabilities(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """Of each token of the answer, the stop token included, given what stands before it."""
    asked = tokenizer(prompt)["input_ids"]
    ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return scores[torch.arange(len(asked) - 1, len(ids) - 1), torch.tensor(ids[len(asked) :])]


def sft_loss(model: Any, tokenizer: Any) -> Loss:
    """Cross-entropy over the tokens of the answers."""

    def loss(rows: Sequence[Row]) -> torch.Tensor:
        return -torch.cat(
            [log_probabilities(model, tokenizer, row["prompt"], row["completion"]) for row in rows]
        ).mean()

    return loss


def dpo_loss(model: Any, reference: Any, tokenizer: Any, *, beta: float) -> Loss:
    """Rafailov et al. 2023, equation 7."""

    def ratio(row: Row, side: str) -> torch.Tensor:
        with torch.no_grad():
            before = log_probabilities(reference, tokenizer, row["prompt"], row[side]).sum()
        return log_probabilities(model, tokenizer, row["prompt"], row[side]).sum() - before

    def loss(rows: Sequence[Row]) -> torch.Tensor:
        margins = torch.stack([ratio(row, "chosen") - ratio(row, "rejected") for row in rows])
        return -nn.functional.logsigmoid(beta * margins).mean()

    return loss


def reward_loss(model: Any, tokenizer: Any) -> Loss:
    """Ouyang et al. 2022, equation 1, with one pair for each prompt: the score is that of the last token."""

    def score(text: str) -> torch.Tensor:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        found: torch.Tensor = model.score(hidden)[0]
        return found

    def loss(rows: Sequence[Row]) -> torch.Tensor:
        margins = [score(row["prompt"] + row["chosen"]) - score(row["prompt"] + row["rejected"]) for row in rows]
        return -nn.functional.logsigmoid(torch.stack(margins)).mean()

    return loss


def train(
    parameters: Sequence[nn.Parameter],
    loss_of: Loss,
    rows: Sequence[Row],
    *,
    steps: int,
    batch: int,
    rate: float,
    warmup: int,
    seed: int,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> list[float]:
    """The loss of each step; a cosine after a linear warm-up, gradients clipped to a norm, no weight decay."""
    means = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    losses, batches = [], batches_of(rows, batch, seed=seed)
    for step in range(steps):
        loss = loss_of(next(batches))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        lr = rate * (
            step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        )
        with torch.no_grad():
            for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
                gradient = gradient * min(1.0, clip / (norm + 1e-6))
                mean.lerp_(gradient, 1 - betas[0])
                square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
                corrected = (square / (1 - betas[1] ** (step + 1))).sqrt() + epsilon
                parameter -= lr * mean / (1 - betas[0] ** (step + 1)) / corrected
    return losses


def batches_of(rows: Sequence[Row], size: int, *, seed: int) -> Iterator[list[Row]]:
    """Every row once an epoch, in the order of torch's random sampler under accelerate: its seed grows by one."""
    epoch = 0
    while True:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        yield from ([rows[index] for index in order[start : start + size]] for start in range(0, len(rows), size))
        epoch += 1
