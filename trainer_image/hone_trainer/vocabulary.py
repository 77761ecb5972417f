"""Tokens that a request adds (model.new_tokens): in the tokenizer, in the model, and what of them is trained.

Called by model.py, lora.py and the methods. A new token starts as the mean of all others, in the embedding and in the
head, so that it says nothing yet. Beside an adapter only the rows of the new tokens are trained (PEFT's
trainable_token_indices); they are saved in the adapter, whose base is grown again wherever it is loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hone.modelinfo import SavedAdapter
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed
from hone_trainer.sharding import shape


def add_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    """Put tokens behind the tokenizer's own. Raises RunFailed (USER) where it has one of them."""
    from tokenizers import AddedToken

    if known := [name for name in names if name in tokenizer.get_vocab()]:
        raise RunFailed(
            TrainerExit.USER,
            f"model.new_tokens: {', '.join(map(repr, known))} {'is a token' if len(known) == 1 else 'are tokens'} of "
            "the model already.",
            fix="Remove it from model.new_tokens." if len(known) == 1 else "Remove them from model.new_tokens.",
        )
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def token_ids(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Where the added tokens stand."""
    return [int(tokenizer.convert_tokens_to_ids(name)) for name in names]


def num_rows(model: Any) -> int:
    """Tokens that the model has places for."""
    return int(shape(model.get_input_embeddings().weight)[0])


@torch.no_grad()
def grow(model: Any, rows: int, *, new: Sequence[int] = ()) -> None:
    """Give the model this many places where it has fewer; those, and the `new` ones, are the mean of all before."""
    before = num_rows(model)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    fresh = sorted({*new, *range(before, rows)})
    if not fresh:
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight[fresh] = module.weight[: fresh[0]].float().mean(0).to(module.weight.dtype)


def trained_rows(model: Any, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """What PEFT gets: the rows of these tokens, in the embedding and in a head of its own."""
    if not ids:
        return None
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings:
        modules = modules[:1]  # PEFT lets the head follow
    names = [path for path, module in model.named_modules() for wanted in modules if module is wanted]
    return {name.rpartition(".")[2]: list(ids) for name in names}


def complete_head(model: Any) -> None:
    """Give PEFT's wrapper of a head the `bias` that TRL's fused head asks for. Raises RunFailed (USER) where the head
    has one: the wrapper would leave it out."""
    from peft.utils import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    if head.original_module.bias is not None:
        raise RunFailed(
            TrainerExit.USER,
            "model.new_tokens: the head of this model has a bias, beside which rows cannot be trained alone.",
            fix="Train embedding and head whole (adapter.lora.modules_to_save), or use full fine-tuning.",
        )
    head.bias = None


@torch.no_grad()
def copy_rows(model: Any, source: str, target: str) -> None:
    """Give one adapter the rows of another: TRL's copy `ref` of an adapter leaves them out."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(f"trainable_tokens_delta.{source}"):
            parameters[name.removesuffix(source) + target].copy_(parameter)


def rows_of(adapter: SavedAdapter) -> int:
    """Places that a model needs to carry a saved adapter; 0 where it adds no tokens."""
    found = adapter.config.get("trainable_token_indices") or {}
    lists = found.values() if isinstance(found, dict) else [found]
    return max((index + 1 for ids in lists for index in ids), default=0)
