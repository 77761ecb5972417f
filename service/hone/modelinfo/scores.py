"""A reward model's shape: the same base with a head of one score in place of the language model's."""

from dataclasses import replace
from functools import lru_cache

from hone.modelinfo.encoders import ENCODERS, score_heads
from hone.modelinfo.shape import Linear, ModelShape


@lru_cache(maxsize=256)
def with_scores(shape: ModelShape) -> ModelShape:
    """What transformers makes of the model as a classifier of one label; equal to reading its config with one label."""
    [head] = [layer for layer in shape.linear_layers if layer.role == "head"]
    words = ("vocab_", "cls.")
    base = [module for module in shape.modules if module is not head and not module.path.startswith(words)]
    score = Linear(path="score", role="head", in_features=head.in_features, out_features=1)
    heads = score_heads(shape.model_type, head.in_features, 1) if shape.model_type in ENCODERS else (score,)
    return replace(shape, tied_embeddings=False, modules=(*base, *heads))
