"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) in float32, for make_base.py.

torch.optim.Muon makes the same steps in bfloat16, which most CPUs have to emulate: five times slower there.
"""

from collections.abc import Iterable

import torch

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, as published."""


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), made orthogonal; for matrices (2-D parameters) only."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(buffer, group["momentum"]))
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """About U·Vᵀ of the singular value decomposition U·S·Vᵀ, by Newton and Schulz: singular values of 0.5 to 1.5."""
    if matrix.size(0) > matrix.size(1):
        return orthogonal(matrix.T, iterations=iterations).T
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
