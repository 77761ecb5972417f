"""A reward model's shape: the same base with a head of one score in place of the language model's."""

from dataclasses import replace
from functools import lru_cache

from hone.modelinfo.shape import Linear, ModelShape, Module


@lru_cache(maxsize=256)
def with_scores(shape: ModelShape) -> ModelShape:
    """What transformers makes of the model as a classifier of one label; equal to reading its config with one label."""
    [head] = [layer for layer in shape.linear_layers if layer.role == "head"]
    base = [module for module in shape.modules if module is not head and not module.path.startswith("vocab_")]
    return replace(shape, tied_embeddings=False, modules=(*base, *_heads(shape, head)))


def _heads(shape: ModelShape, head: Linear) -> list[Module]:
    width = head.in_features
    if shape.model_type != "distilbert":
        return [Linear(path="score", role="head", in_features=width, out_features=1)]
    return [
        Linear(path="pre_classifier", role="head", in_features=width, out_features=width, bias=True),
        Linear(path="classifier", role="head", in_features=width, out_features=1, bias=True),
    ]
