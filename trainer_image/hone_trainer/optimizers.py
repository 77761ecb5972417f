"""Optimizers by the request's names: transformers' own where it has one, and AdamW on bf16 weights.

`adamw_bf16_sr` is for full fine-tuning: weights, gradients and moments are bf16, 8 bytes a parameter in place of 16 to
18. Rounded to the nearest, an update below half of the last bit would be lost again at every step; rounded up or down
with the probability of its nearness it is kept on average (Gupta et al. 2015, "Deep Learning with Limited Numerical
Precision"; for weights of bf16: Zamirai et al. 2020, "Revisiting BFloat16 Training").
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hone.job import Launch
from hone.plan.memory import UPDATED_AT_ONCE
from hone.spec import JobSpec

_NAMES = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def transformers_name(spec: JobSpec, launch: Launch) -> str:
    """The `optim` of transformers' arguments; what own_optimizer answers comes before it."""
    name = spec.training.optimizer
    if name == "paged_adamw_8bit" and launch.device == "cpu":
        name = "adamw_8bit"  # pages go from the GPU to the host, where everything is already
    return _NAMES.get(name, _NAMES["adamw"])


def own_optimizer(spec: JobSpec) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments for a trainer's `optimizer_cls_and_kwargs`; None where transformers makes the optimizer."""
    if not trains_in_bf16(spec):
        return None
    training = spec.training
    return StochasticAdamW, {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "seed": training.seed,
    }


def trains_in_bf16(spec: JobSpec) -> bool:
    """Whether what is trained stays bf16."""
    return spec.training.optimizer == "adamw_bf16_sr"


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on bf16 weights and moments, computed in fp32 and rounded stochastically.

    The noise is drawn from seed and step alone: every rank rounds its copy of the weights alike, and a resumed run
    goes on as if it had not stopped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            group["step"] += 1
            noise: dict[torch.device, torch.Generator] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.device not in noise:
                    seed = (group["seed"] * 1_000_003 + group["step"]) * 64 + number
                    noise[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
                self._update(parameter, group, noise[parameter.device])
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], noise: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        whole = (parameter.data, parameter.grad, state["mean"], state["square"])
        parts = [whole]
        if all(tensor.is_contiguous() for tensor in whole):
            parts = list(zip(*(tensor.view(-1).split(UPDATED_AT_ONCE) for tensor in whole), strict=True))
        for part in parts:
            _update_part(*part, group, noise)


def _update_part(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    means: torch.Tensor,
    squares: torch.Tensor,
    group: dict[str, Any],
    noise: torch.Generator,
) -> None:
    """The update of some elements, in place."""
    gradient = gradients.float()
    first, second = group["betas"]
    mean = means.float().lerp_(gradient, 1 - first)
    square = squares.float().mul_(second).addcmul_(gradient, gradient, value=1 - second)
    weight = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
    scale = math.sqrt(1 - second ** group["step"])
    denominator = (square.sqrt() / scale).add_(group["eps"])
    weight.addcdiv_(mean, denominator, value=-group["lr"] / (1 - first ** group["step"]))
    for target, exact in ((weights, weight), (means, mean), (squares, square)):
        target.copy_(round_stochastically(exact, noise) if target.dtype == torch.bfloat16 else exact)


def round_stochastically(exact: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """fp32 to bf16, up or down with the probability that makes the expected value exact.

    A bf16 number is the upper half of an fp32 one: a random lower half is added, and the sum is cut off.
    """
    bits = exact.view(torch.int32)
    random = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
    return ((bits + random) & -65536).view(torch.float32).bfloat16()
