"""Figures that others published of their stacks: a band that plans are within, and nothing that they are fitted to.

Where that stack keeps all logits (14 bytes for each token and word of the vocabulary) and ours a tile, they are added;
where a figure is PyTorch's own, which does not see the CUDA context, the plan's context is left out. No margin.
docs/planning.md has the same table.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hone.gpus import load_profiles
from hone.modelinfo import load_shape
from hone.plan import Hardware, make_plan
from hone.spec.parse import parse

HARDWARE = Hardware(profiles=load_profiles(), cpu_cores=2, memory_bytes=512 << 30)
PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
GB, GIB = 10**9, 2**30
LLAMA_2, LLAMA_3, LLAMA_3B = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.2-3B"
LLAMA_70B = "meta-llama/Llama-2-70b-hf"
OF_A_LAYER = ("norms", "attention", "adapter activations", "mlp", "recomputation")
"""What is computed again when logits are gone."""
BAND, MEAN = 0.20, 0.08


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published peak, and the request that is like it."""

    name: str
    published: float
    unit: int
    model: str
    batch: int
    length: int
    lora: dict[str, Any] | None = None
    quantized: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    attention: str = "flash_attention_2"
    packing: bool = False
    all_logits: bool = False
    by_torch: bool = False

    def planned(self) -> float:
        """In its unit."""
        request = {
            "name": "x",
            "model": {"source": f"hf://{self.model}", "attention": self.attention},
            "dataset": {"source": "hf://o/d"},
            "method": {"sft": {"max_length": self.length, "packing": self.packing}},
            "training": {
                "micro_batch_size": self.batch,
                "gradient_accumulation_steps": 1,
                "precision": "bf16",
                "activation_checkpointing": True,
                **self.training,
            },
            "compute": {"gpu": "H100-80GB", "gpus_per_node": 1, **self.compute},
            **({"adapter": {"lora": self.lora}} if self.lora else {}),
            **({"quantization": "nf4"} if self.quantized else {}),
        }
        spec = parse(request)
        shape = load_shape(spec.model.source)
        sizes = {item.name: item.size_bytes for item in make_plan(spec, shape, HARDWARE).plan.memory}
        total = sum(size for name, size in sizes.items() if name != "margin")
        if self.all_logits:
            again = spec.training.activation_checkpointing and "strategy" not in self.compute
            layer = sum(sizes.get(name, 0) for name in OF_A_LAYER) if again else 0
            logits = 14 * self.batch * self.length * shape.vocab_size
            total += max(0, logits - layer - sizes.get("logits", 0) - sizes.get("backward", 0))
        return (total - (sizes["context"] if self.by_torch else 0)) / self.unit


def wiki(length: int, published: float) -> Figure:
    name = f"Llama-2-7B in 4 bits, 1 × {length:,} (LLaMA-Factory wiki)"
    return Figure(
        name=name, published=published, unit=GB, model=LLAMA_2, batch=1, length=length, lora={"rank": 8},
        quantized=True, all_logits=True,
    )  # fmt: skip


FIGURES = (
    Figure(
        name="Llama-2-7B, LoRA rank 8, 4 × 1,024 (LLaMA-Factory wiki)", published=17, unit=GB, model=LLAMA_2, batch=4,
        length=1024, lora={"rank": 8},
    ),
    *(wiki(length, size) for length, size in ((1024, 6), (4096, 9), (8192, 12), (16_384, 19), (32_768, 32))),
    Figure(
        name="Llama-3-8B, LoRA, 2 × 2,048, compiled (torchtune README)", published=16.2, unit=GIB, model=LLAMA_3,
        batch=2, length=2048, lora={"rank": 8}, packing=True, by_torch=True,
    ),
    Figure(
        name="Llama-3-8B, QLoRA, 2 × 2,048, compiled (torchtune README)", published=7.4, unit=GIB, model=LLAMA_3,
        batch=2, length=2048, lora={"rank": 8}, quantized=True, packing=True, by_torch=True,
    ),
    Figure(
        name="Llama-3.2-3B, LoRA rank 32 of q and v, 4 × 768 (PEFT MetaMathQA)", published=22.3, unit=GB,
        model=LLAMA_3B, batch=4, length=768, lora={"rank": 32, "target_modules": ["q_proj", "v_proj"]},
        attention="auto", training={"activation_checkpointing": False}, compute={"gpu": "L40S"}, all_logits=True,
        by_torch=True,
    ),
    Figure(
        name="Llama-3.2-3B in full, bf16 states, 4 × 768 (PEFT MetaMathQA)", published=38.9, unit=GB, model=LLAMA_3B,
        batch=4, length=768, attention="auto", compute={"gpu": "L40S"}, all_logits=True, by_torch=True,
        training={"activation_checkpointing": False, "optimizer": "adamw_bf16_sr"},
    ),
    Figure(
        name="Llama-2-70B, ZeRO-3 LoRA on 8 × H100, 8 × 2,048 each (PEFT docs)", published=64, unit=GB, model=LLAMA_70B,
        batch=8, length=2048, lora={"rank": 8}, compute={"gpus_per_node": 8, "strategy": "zero3"}, all_logits=True,
    ),
)  # fmt: skip


def row(figure: Figure) -> str:
    planned, unit = figure.planned(), "GB" if figure.unit == GB else "GiB"
    ratio = planned / figure.published
    return f"| {figure.name} | {figure.published:g} {unit} | {planned:.1f} {unit} | {ratio:.2f} |"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_published_figure_is_met_within_the_band(figure: Figure) -> None:
    assert abs(figure.planned() / figure.published - 1) <= BAND
    assert row(figure) in PAGE, row(figure)


def test_all_of_them_are_met_on_average() -> None:
    mean = sum(abs(figure.planned() / figure.published - 1) for figure in FIGURES) / len(FIGURES)
    assert mean <= MEAN
    assert re.search(rf"mean\s+of\s+{mean * 100:.1f}\s+%", PAGE), f"{mean * 100:.1f}"
