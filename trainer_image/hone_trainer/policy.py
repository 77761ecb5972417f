"""The policy that PPO trains: a language model and a value head, both asked by one forward pass, and the reference that
it must not leave.

Called by methods/ppo.py. The head of the model is TRL's fused one: log-probabilities in tiles, never all logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn

from hone_trainer.sharding import shape
from hone_trainer.tokens import IGNORED

REFERENCE = "reference"
"""Name of the frozen copy of an adapter that training goes on from."""


def without_adapter(model: Any) -> Any:
    """The transformers model within, adapted layers and all."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class Sequences(NamedTuple):
    """Prompts with their answers, padded on the right."""

    ids: torch.Tensor
    """(answers, length)"""
    starts: torch.Tensor
    """(answers,): where the answer begins."""
    lengths: torch.Tensor
    """(answers,): tokens of prompt and answer."""

    def rows(self, index: torch.Tensor) -> "Sequences":
        """Some of them."""
        return Sequences(*(part[index] for part in self))


class Judged(NamedTuple):
    """What a forward pass says of the tokens of answers, each of shape (answers, width); 0 behind an answer's end."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class Policy(nn.Module):
    """A causal language model with a value for every token, computed in fp32 from the last hidden state."""

    def __init__(self, model: Any, *, temperature: float) -> None:
        """`temperature`: of sampling; probabilities are those that answers are drawn with."""
        from trl.trainer.utils import add_fused_lm_head

        super().__init__()
        self.model = model
        base = without_adapter(model)
        add_fused_lm_head(base, temperature=temperature, outputs=("log_probs", "entropy"))
        width = shape(base.get_input_embeddings().weight)[1]
        hidden = getattr(base.config.get_text_config(), "hidden_size", width)
        self.value_head = nn.Linear(hidden, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._hidden: list[torch.Tensor] = []
        base.base_model.register_forward_hook(self._keep)

    def forward(self, ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, width: int) -> Judged:
        """Log-probability, entropy and value of the first `width` tokens of every answer."""
        places = torch.arange(ids.shape[1], device=ids.device)
        attention = places < lengths[:, None]
        labels = ids.masked_fill(~attention | (places < starts[:, None]), IGNORED)
        found = self.model(input_ids=ids, attention_mask=attention.long(), labels=labels, fused_lm_head=True)
        [hidden], self._hidden = self._hidden, []
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)
        # A token is predicted one place before it stands.
        index = starts[:, None] - 1 + torch.arange(width, device=ids.device)
        inside = index < lengths[:, None] - 1
        index = index.clamp(max=ids.shape[1] - 2)
        return Judged(*(tensor.gather(1, index) * inside for tensor in (found.log_probs, found.entropy, values)))

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.is_tensor(hidden := getattr(output, "last_hidden_state", None)):
            self._hidden = [hidden]


class Reference:
    """The policy as it was before the first step."""

    def __init__(self, policy: Policy, *, adapted: bool) -> None:
        """`adapted`: the model has an adapter; else a frozen copy of it is made."""
        self._policy = policy
        self._has_copy = adapted and REFERENCE in policy.model.peft_config
        self.copy = None if adapted else deepcopy(policy).eval().requires_grad_(False)

    @contextmanager
    def judge(self, policy: Any) -> Iterator[Any]:
        """What to call in place of `policy`, the wrapped one, for the reference's answer. No gradients."""
        model = self._policy.model
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
            elif self._has_copy:
                model.set_adapter(REFERENCE)
                try:
                    yield policy
                finally:
                    model.set_adapter("default")
            else:
                with model.disable_adapter():
                    yield policy
