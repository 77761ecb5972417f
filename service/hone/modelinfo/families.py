"""One function for each family: config.json to modules.

A family that is not listed in FAMILIES is refused, never guessed. Paths and sizes are those of the transformers classes
for causal language models, of the masked language model where the family has no other, or, with `num_labels`, of the
classes for sequence classification, which reward models use.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from hone.modelinfo import classic, encoders, gated
from hone.modelinfo.config import Config
from hone.modelinfo.shape import BadConfig, ModelShape, UnknownFamily

FAMILIES: Mapping[str, Callable[[Config], ModelShape]] = {
    "bert": encoders.bert,
    "distilbert": encoders.distilbert,
    "falcon": classic.falcon,
    "gemma": gated.gemma,
    "gemma2": gated.gemma2,
    "gemma3_text": gated.gemma3_text,
    "gpt2": classic.gpt2,
    "gpt_neox": classic.gpt_neox,
    "llama": gated.llama,
    "mistral": gated.mistral,
    "mixtral": gated.mixtral,
    "modernbert": encoders.modernbert,
    "olmo2": gated.olmo2,
    "opt": classic.opt,
    "phi3": gated.phi3,
    "qwen2": gated.qwen2,
    "qwen2_moe": gated.qwen2_moe,
    "qwen3": gated.qwen3,
    "qwen3_moe": gated.qwen3_moe,
    "smollm3": gated.smollm3,
    "starcoder2": classic.starcoder2,
}


IN_PARTS: Mapping[str, str] = {
    "gemma3": "which reads pictures too, and is not trained here: use its text part (gemma3_text), as the 1B model is.",
}


def read_config(values: Mapping[str, Any], *, source: str = "config.json", num_labels: int | None = None) -> ModelShape:
    """The shape of the model that a config.json describes.

    Raises UnknownFamily with the families that are known, BadConfig for a missing or impossible value.
    """
    family = values.get("model_type")
    if not isinstance(family, str):
        raise BadConfig(f"config.json of {source} lacks 'model_type'.", fix="Is it the configuration of a model?")
    if family in IN_PARTS:
        raise UnknownFamily(f"{source} is of the family {family!r}, {IN_PARTS[family]}")
    if family not in FAMILIES:
        close = get_close_matches(family, FAMILIES, n=1)
        raise UnknownFamily(
            f"the model family {family!r} of {source} is not known here.",
            fix=f"{f'Close: {close[0]}. ' if close else ''}Known families: {', '.join(sorted(FAMILIES))}.",
        )
    return FAMILIES[family](Config(values=values, source=source, num_labels=num_labels))
