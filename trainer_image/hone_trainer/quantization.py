"""The base in 4 bits (QLoRA, Dettmers et al. 2023): NF4 with double quantisation, and the way back for merging.

Called by trained.py and merging.py. Refuses models that bitsandbytes would not hold in 4 bits: fused experts, which it
leaves as they are, and models without linear layers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hone.job import Launch
from hone.run import TrainerExit
from hone_trainer import sharding
from hone_trainer.failure import RunFailed
from hone_trainer.inputs import Source
from hone_trainer.model import HEADS, auto_model


def nf4(compute_dtype: torch.dtype, *, sharded: bool = False, scores: bool = False) -> Any:
    """transformers' configuration; its own defaults would be fp4 without double quantisation.

    A head of scores is trained in full, so all of it stays as it is; transformers would leave its last layer only.
    Sharded weights are stored as bf16 numbers, four bits each as ever: DeepSpeed and FSDP shard floating point only.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
        llm_int8_skip_modules=[rf"(.*\.)?{name}" for name in HEADS] if scores else None,
    )


def nf4_for(launch: Launch, *, scores: bool = False) -> Any:
    """The configuration of a run."""
    compute = torch.bfloat16 if launch.precision == "bf16" else torch.float32
    return nf4(compute, sharded=sharding.splits_weights(launch), scores=scores)


def check_quantizable(source: Source, *, scores: bool = False) -> None:
    """Raise RunFailed (USER) for a model that would not be held in 4 bits; its weights are not read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        check_layers(auto_model(scores=scores).from_config(config), source.asked)


def check_layers(model: Any, asked: str) -> None:
    """The same for a model, on whatever device."""
    from transformers.pytorch_utils import Conv1D

    if any(parameter.dim() > 2 and "expert" in name for name, parameter in model.named_parameters()):
        raise RunFailed(
            TrainerExit.USER,
            f"quantization: nf4 does not hold {asked} in 4 bits: its experts are fused into one tensor a layer, which "
            "bitsandbytes leaves in 16 bits.",
            fix="Remove quantization: plain LoRA needs about the same memory here.",
        )
    head = model.get_output_embeddings()
    if not any(isinstance(m, torch.nn.Linear | Conv1D) and m is not head for m in model.modules()):
        raise RunFailed(
            TrainerExit.USER,
            f"quantization: {asked} has no linear layer beside its head, so there is nothing to hold in 4 bits.",
            fix="Remove quantization.",
        )


def compute_alike(model: Any) -> None:
    """Let evaluation compute as training does.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer at its first forward pass in evaluation, and computes in bf16
    from then on, whatever the compute precision is: losses before and after would not be comparable.
    """
    for layer in _layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def copy_dequantized(quantized: Any, plain: Any) -> None:
    """Put what a 4-bit model computes with into the same model in full precision."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    for path, layer in _layers(quantized).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        target = plain.get_submodule(path)
        with torch.no_grad():
            # transformers' own dequantize() makes a Linear of a Conv1D, whose file is the other way round.
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)


def in_fp32(model: Any) -> None:
    """Compute with a 4-bit model in fp32: its 4-bit weights stay, the rest is widened."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()
    for layer in _layers(model).values():
        layer.compute_dtype, layer.compute_type_is_set = torch.float32, True


def _layers(model: Any) -> Mapping[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
