"""Counts what one training step holds, in this process: parameters, gradients, optimizer states, and every tensor that
the forward pass made and the backward pass waits for, each storage once. What memory.py plans is held against it.
"""

import weakref
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Held:
    """Bytes, of one step."""

    weights: int = 0
    """Those that do not train, and those of the whole model where all of it trains."""
    adapter: int = 0
    gradients: int = 0
    states: int = 0
    activations: int = 0
    """The most that waits for the backward pass while no forward pass is under way."""
    copies: int = 0
    """Of those, casts of parameters."""
    peak: int = 0
    """The most that is there at once, forward and backward, beside weights, adapter and states."""
    shape: tuple[int, int] = (0, 0)
    """Rows and tokens of the batch."""


class Tracker(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end."""

    def __init__(self, parameters: Container[int] = ()) -> None:
        super().__init__()
        self._parameters = parameters
        self._live: dict[int, tuple[int, bool]] = {}
        """Of the forward pass: size, and whether it is a cast of a parameter."""
        self._sizes: dict[int, int] = {}
        self._was_forward = True
        self.most = (0, 0)
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        is_backward = node is not None and not torch.is_grad_enabled()
        if is_backward and self._was_forward:
            whole = sum(size for size, _ in self._live.values())
            copies = sum(size for size, is_copy in self._live.values() if is_copy)
            self.most = max(self.most, (whole - copies, copies))
        self._was_forward = not is_backward
        out = func(*args, **(kwargs or {}))
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        is_copy = (
            func is torch.ops.aten._to_copy.default
            and first is not None
            and first.untyped_storage().data_ptr() in self._parameters
        )
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, is_copy, is_backward)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out

    def _follow(self, tensor: torch.Tensor, is_copy: bool, is_backward: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key and key not in self._parameters and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            if not is_backward:
                self._live[key] = (storage.nbytes(), is_copy)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._sizes.pop(key, None)
        self._live.pop(key, None)


@contextmanager
def counted() -> Iterator[Held]:
    """What the first step inside holds."""
    held = Held()
    original = transformers.Trainer.training_step

    def step(self: Any, model: Any, inputs: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        if held.weights:
            return original(self, model, inputs, *arguments, **options)
        parameters = list(model.parameters())
        held.adapter = _size(p for p in parameters if p.requires_grad)
        held.weights = _size(p for p in parameters if not p.requires_grad) or held.adapter
        reference = getattr(self, "ref_model", None)
        weights = [*parameters, *model.buffers(), *(reference.parameters() if reference else ())]
        known = {t.untyped_storage().data_ptr() for t in weights}
        known |= {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
        rows, tokens = next(t.shape for t in inputs.values() if isinstance(t, torch.Tensor) and t.dim() == 2)
        held.shape = (rows, tokens)
        with Tracker(known) as tracker:
            loss = original(self, model, inputs, *arguments, **options)
        held.activations, held.copies = tracker.most
        held.peak = tracker.peak
        held.gradients = _size(p.grad for p in parameters if p.grad is not None)
        self.add_callback(_States(held, self))
        return loss

    transformers.Trainer.training_step = step
    try:
        yield held
    finally:
        transformers.Trainer.training_step = original


class _States(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, held: Held, trainer: Any) -> None:
        self._held, self._trainer = held, trainer

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        states = self._trainer.optimizer.state.values()
        found = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        self._held.states = _size(value for value in found if value.dim())


def _size(tensors: Iterator[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
