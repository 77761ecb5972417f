"""Adapters merged into their base, and what that costs against the models that people had before.

Called by outputs.py, for `output.merged` and for the method merge. Everything is computed in fp32 on the CPU, whatever
the training ran on. Two references are measured on the same tokens before anything is merged:

- the adapted model as trained: the base as it was loaded (for QLoRA its 4-bit weights) with the adapters beside it;
- the adapters on the base in bf16, which is what most people serve them on.

An adapter of a 4-bit base was trained to correct that base, so it is merged into what the 4-bit weights stand for; into
the original weights it would fit worse by orders of magnitude.
"""

import ctypes
import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hone.run import TrainerExit
from hone.spec import Model
from hone_trainer import quantization
from hone_trainer.failure import RunFailed, first_line
from hone_trainer.inputs import Source
from hone_trainer.lora import load_adapter, read_saved

_COMBINED = "combined"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One adapter, and how much of it."""

    adapter: Source
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class References:
    """What the models that people had before answer to the probe: logits."""

    trained: torch.Tensor
    """Of the adapted model as trained."""
    served: torch.Tensor
    """Of the adapters on the base in bf16."""

    def quality(self, found: torch.Tensor) -> dict[str, float]:
        """How far a model with these logits is from both."""
        return {
            "kl_nats": divergence(self.trained, found),
            "kl_nats_bf16_base": divergence(self.served, found),
            "max_logit_difference": float((self.trained - found).abs().max()),
        }


def merge(base: Source, parts: Sequence[Part], *, combination: str, model: Model) -> tuple[Any, References]:
    """The merged model in fp32, and what to hold it against; nothing is written. Raises RunFailed (USER) where adapters
    do not belong to the base, or not together."""
    loaded_as = _loaded_as(parts)
    served = logits(_attach(_load(base, model, torch.bfloat16).float(), base, parts, combination))
    give_back()
    plain, trained = _load(base, model, torch.float32), None
    if loaded_as["quantization"]:
        dtype = getattr(torch, str(loaded_as["dtype"]))
        quantized = _load(base, model, dtype, quantization.nf4(torch.float32))
        quantization.in_fp32(quantized)
        quantization.copy_dequantized(quantized, plain)
        trained = logits(_attach(quantized, base, parts, combination))
        del quantized
        give_back()
    adapted = _attach(plain, base, parts, combination)
    if trained is None:
        trained = logits(adapted)
    with warnings.catch_warnings():
        # A head that was trained beside a tied embedding is its own from here on, in the files too.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = adapted.merge_and_unload()
    return merged, References(trained=trained, served=served)


def give_back() -> None:
    """Let go of models that are no longer used: adapted ones hold themselves in circles, and glibc keeps what was freed
    of a model, whose size in fp32 the next one then takes once more."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def check(quality: Mapping[str, float], *, limit: float, fix: str) -> None:
    """Raise RunFailed (USER) where the merged model is farther from the adapted one than is allowed."""
    if not quality["kl_nats"] <= limit:
        raise RunFailed(
            TrainerExit.USER,
            f"The merged model is not the adapted one: KL {quality['kl_nats']:.3g} nats a token, at most {limit:g} is "
            "allowed.",
            fix=fix,
        )


def sentence(quality: Mapping[str, float], *, limit: float) -> str:
    """For people."""
    return (
        f"Merged: KL {quality['kl_nats']:.2g} nats a token from the adapted model as trained (at most {limit:g} is "
        f"allowed), {quality['kl_nats_bf16_base']:.2g} from the adapter on the base in bf16."
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model answers to the probe: the same tokens for every model and run."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found.float()


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Kullback-Leibler divergence of the second from the first: nats a token, the mean over all tokens."""
    before, after = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return max(float((before.exp() * (before - after)).sum(-1).mean()), 0.0)


def _loaded_as(parts: Sequence[Part]) -> Mapping[str, Any]:
    """How the base was loaded when the adapters were trained; the same for all of them."""
    found = []
    for part in parts:
        identity = read_saved(part.adapter).identity
        found.append({"quantization": identity.get("quantization") or "", "dtype": identity.get("dtype") or "bfloat16"})
    first, *others = found
    for part, other in zip(parts[1:], others, strict=True):
        if other["quantization"] != first["quantization"]:
            raise RunFailed(
                TrainerExit.USER,
                f"{parts[0].adapter.asked} was trained on {_words(first)} and {part.adapter.asked} on {_words(other)}: "
                "no base fits both.",
                fix="Merge each by itself, or train them on the base in one precision.",
            )
    return first


def _words(loaded_as: Mapping[str, Any]) -> str:
    return (
        f"a base in 4 bits ({loaded_as['quantization']})" if loaded_as["quantization"] else "a base in full precision"
    )


def _load(base: Source, model: Model, dtype: torch.dtype, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": config, "device_map": {"": "cpu"}} if config else {}
    attention = None if model.attention in ("auto", "flash_attention_2") else model.attention
    found = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True, **options
    )
    if config:
        quantization.compute_alike(found)
    return found


def _attach(model: Any, base: Source, parts: Sequence[Part], combination: str) -> Any:
    """The model with what is merged active: the one adapter, or the combination of all."""
    names = [f"part_{number}" for number in range(len(parts))]  # names become keys: not what people call them
    for name, part in zip(names, parts, strict=True):
        model = load_adapter(model, part.adapter, base=base, name=name)
    if [part.weight for part in parts] == [1.0]:
        return model
    _check_combinable(model, parts)
    for config in model.peft_config.values():
        config.use_rslora = False  # or the combination, whose scale is 1, would be scaled by the root of its rank
    try:
        model.add_weighted_adapter(names, [part.weight for part in parts], _COMBINED, combination_type=combination)
    except ValueError as error:
        raise RunFailed(
            TrainerExit.USER,
            f"method.merge.combination {combination} cannot combine these adapters: {first_line(error)}",
            fix="Use cat, which takes any ranks.",
        ) from error
    model.set_adapter(_COMBINED)
    for name in names:
        model.delete_adapter(name)
    return model


def _check_combinable(model: Any, parts: Sequence[Part]) -> None:
    for part, config in zip(parts, model.peft_config.values(), strict=True):
        beyond = {
            "DoRA": config.use_dora,
            "modules_to_save": config.modules_to_save,
            "biases": config.bias != "none",
            "new tokens": config.trainable_token_indices,
        }
        if found := [name for name, is_there in beyond.items() if is_there]:
            raise RunFailed(
                TrainerExit.USER,
                f"{part.adapter.asked} has {' and '.join(found)}, which cannot be weighed or added to others.",
                fix="Merge it by itself, with weight 1.",
            )
