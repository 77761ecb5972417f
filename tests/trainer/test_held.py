"""What memory.py plans beside what a step holds: families, methods, adapters, precisions, sizes drawn by a seed.

The formulas were written from the graphs of models of one size (width 64, rows of 48 tokens). Combinations here have
other sizes; earlier seeds showed what recomputed layers leave behind, this one was drawn afterwards. `make learn` draws
GRID of them for the figures in docs/planning.md.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.modelinfo import ENCODERS, load_shape
from hone.plan import Hardware, make_plan
from hone.run import Run
from hone.spec.parse import parse

from .conftest import Attempt, RunHere, make_tokenizer, merge, write_rows
from .held import Held, counted

GRID = 200
SEED = 14
HARDWARE = Hardware(profiles={}, cpu_cores=2, memory_bytes=8 << 30)
KEPT = (
    "layer inputs", "norms", "attention", "attention scores", "attention mask", "mlp", "experts", "dropout",
    "adapter activations", "recomputation", "within attention", "head input",
)  # fmt: skip
MOE = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "gpt2": {},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"head_dim": 24},
    "mixtral": MOE,
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "olmo2": {},
    "opt": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 56},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**MOE, "head_dim": 24},
    "smollm3": {},
    "starcoder2": {},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination; what it does not fix, the plan decides."""

    family: str
    method: str = "sft"
    adapter: str = "lora"
    precision: str = "fp32"
    checkpointing: bool = False
    dropout: float = 0.0
    rank: int = 6
    rows: int = 3
    length: int = 40
    layers: int = 3
    hidden: int = 80
    inner: int = 208
    attention: str = "auto"
    packing: bool = False
    dora: bool = False

    def __str__(self) -> str:
        words = [self.family, self.method, self.adapter, self.precision, f"{self.rows}x{self.length}"]
        flags = ("checkpointing", "packing", "dora")
        words += [flag for flag in flags if getattr(self, flag)] + ["dropout"] * bool(self.dropout)
        return " ".join(
            [*words, f"{self.layers}x{self.hidden}x{self.inner}", self.attention.replace("auto", "")]
        ).strip()


def drawn(number: int) -> Case:
    """Combination `number` of the grid."""
    pick = random.Random(f"{SEED}-{number}")
    family = sorted(FAMILIES)[number % len(FAMILIES)]
    method = "reward" if family in ENCODERS else pick.choice(["sft", "sft", "sft", "dpo", "reward"])
    is_moe = family in ("mixtral", "qwen2_moe", "qwen3_moe")
    adapter = pick.choice(["lora", "lora", "full"] if is_moe else ["lora", "lora", "qlora", "full"])
    is_lora = adapter != "full"
    can_be_eager = family not in (*ENCODERS, "falcon", "gpt2") and not (method == "sft" and family == "opt")
    eager = can_be_eager and pick.random() < 0.15
    return Case(
        family=family,
        method=method,
        adapter=adapter,
        precision=pick.choice(["fp32", "bf16"]),
        checkpointing=pick.random() < 0.4,
        dropout=pick.choice([0.0, 0.1]) if is_lora and method == "sft" else 0.0,
        rank=pick.choice([2, 6, 12]),
        rows=pick.choice([1, 2, 4, 5]),
        length=pick.choice([24, 56, 96, 144]),
        layers=pick.choice([2, 3, 5]),
        hidden=pick.choice([48, 80, 112, 144]),
        inner=pick.choice([96, 208, 320, 416]),
        attention="eager" if eager else "auto",
        packing=method == "sft"
        and family not in ("gemma2", "falcon", "gpt2", "opt")
        and not eager
        and pick.random() < 0.15,
        dora=adapter == "lora" and not is_moe and pick.random() < 0.1,
    )


def make_base(path: Path, case: Case) -> Path:
    """A model of random weights with the byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    common: dict[str, Any] = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes: dict[str, Any] = {
        "hidden_size": case.hidden, "intermediate_size": case.inner, "num_hidden_layers": case.layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    other: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": case.hidden, "n_inner": case.inner, "n_layer": case.layers, "n_head": 4, "n_positions": 256},
        "distilbert": {"dim": case.hidden, "hidden_dim": case.inner, "n_layers": case.layers, "n_heads": 4},
        "opt": {**sizes, "ffn_dim": case.inner, "word_embed_proj_dim": case.hidden},
        "falcon": {**sizes, "ffn_hidden_size": case.inner},
    }
    config = AutoConfig.for_model(case.family, **common, **other.get(case.family, sizes), **FAMILIES[case.family])
    torch.manual_seed(1)
    kind = AutoModelForMaskedLM if case.family in ENCODERS else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def rows_of(case: Case) -> list[dict[str, str]]:
    """One batch: rows that fill their length, the last one half of it; packed, four rows fill it."""
    rows = []
    for number in range(case.rows * (4 if case.packing else 1)):
        size = case.length - 2
        if case.packing:
            size = case.length // 4 - 2
        elif number and number == case.rows - 1:
            size //= 2
        text = "".join(chr(97 + (number * 7 + k * 3) % 16) for k in range(size))
        prompt, answer = text[: size // 2], text[size // 2 :]
        row = {"prompt": prompt, "completion": answer}
        rows.append(row if case.method == "sft" else {"prompt": prompt, "chosen": answer, "rejected": answer[-2::-1]})
    return rows


def request_of(case: Case, base: Path, rows: Path) -> dict[str, Any]:
    request: dict[str, Any] = {
        "name": "held",
        "model": {"source": f"file://{base}", "attention": case.attention},
        "dataset": {"source": f"file://{rows}"},
        "method": {case.method: {"max_length": case.length, **({"packing": True} if case.packing else {})}},
        "training": {
            "max_steps": 1,
            "learning_rate": 1e-4,
            "micro_batch_size": case.rows,
            "global_batch_size": case.rows,
            "activation_checkpointing": case.checkpointing,
        },
        "compute": {"gpus_per_node": 0},
    }
    if case.adapter == "full":
        return request
    lora = {"rank": case.rank, "dropout": case.dropout, "use_dora": case.dora}
    quantized = {"quantization": "nf4"} if case.adapter == "qlora" else {}
    return merge(request, {"adapter": {"lora": lora}, **quantized})


Measure = Callable[[Case], tuple[Held, dict[str, int]]]


@pytest.fixture
def measure(tmp_path: Path, run_here: RunHere) -> Measure:
    return partial(_measure, tmp_path, run_here)


def _measure(place: Path, run_here: RunHere, case: Case) -> tuple[Held, dict[str, int]]:
    """What a step holds, and the plan's lines. The service refuses bf16 on a CPU, where it is slow: not here."""
    number = len(list(place.iterdir()))
    base = make_base(place / f"base-{number}", case)
    spec = parse(request_of(case, base, write_rows(place / f"rows-{number}.jsonl", rows_of(case))))
    training = spec.training.model_copy(update={"precision": case.precision})
    planned = make_plan(spec.model_copy(update={"training": training}), load_shape(spec.model.source), HARDWARE)
    run = Run(
        namespace="default", job="held-1", attempt=1, nonce="n", spec=planned.spec, launch=planned.plan.launch,
        store=f"file://{place}/store", inputs={},
    )  # fmt: skip
    with counted() as held:
        run_here(Attempt(place / f"run-{number}", run))
    factor = 1 if case.method == "sft" else 2
    assert held.shape[0] == case.rows * factor and case.length - 2 <= held.shape[1] <= case.length, held.shape
    return held, {item.name: item.size_bytes for item in planned.plan.memory}


def check_states(case: Case, held: Held, lines: dict[str, int]) -> None:
    """Weights, gradients and optimizer states are exact."""
    if case.adapter != "qlora":
        assert held.weights == lines["weights"]
    if case.adapter != "full":
        assert held.adapter == lines["adapter"]
    # Gradients of all weights come as activations go, which the peak is about; in the end they are as large as these.
    assert held.gradients == lines["gradients" if case.adapter != "full" else "weights"]
    assert held.states == lines["optimizer"]


def ratio(case: Case, held: Held, lines: dict[str, int]) -> float:
    """Planned by held; what DoRA's norm takes for a moment still stands when a layer was computed again."""
    moment = lines.get("dora norm", 0) if case.checkpointing else 0
    return (moment + sum(lines.get(name, 0) for name in KEPT)) / held.activations


def ratio_of_peak(case: Case, held: Held, lines: dict[str, int]) -> float:
    """Planned by held, at the peak of forward and backward pass: everything, logits and gradients too."""
    planned = sum(size for name, size in lines.items() if name not in ("context", "margin"))
    weights = held.weights + (held.adapter if case.adapter != "full" else 0)
    return planned / (weights + held.states + held.peak)


@pytest.mark.parametrize(
    "case",
    [
        Case(family="llama", adapter="full", precision="bf16"),
        Case(family="qwen3", dropout=0.1, checkpointing=True, precision="bf16"),
        Case(family="qwen2_moe", method="dpo"),
        Case(family="gpt_neox", adapter="qlora", method="reward"),
        Case(family="gpt2"),
    ],
    ids=str,
)
def test_what_a_step_holds_is_what_was_planned(measure: Measure, case: Case) -> None:
    held, lines = measure(case)
    check_states(case, held, lines)
    assert 0.95 <= ratio(case, held, lines) <= 1.10


def show(line: str) -> None:
    """In the output of `make learn`, whose figures stand in docs/planning.md."""
    sys.stdout.write(f"{line}\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_grid_is_planned_as_it_is_held(measure: Measure) -> None:
    saved, peaks = [], []
    for number in range(GRID):
        case = drawn(number)
        held, lines = measure(case)
        check_states(case, held, lines)
        saved.append(ratio(case, held, lines))
        peaks.append(ratio_of_peak(case, held, lines))
        show(f"{number:4} {case!s:90} {held.activations:9,} B, planned {saved[-1]:.3f}, peak {peaks[-1]:.3f}")
    for name, ratios, least in (("saved", saved, 0.9), ("peaks", peaks, 0.85)):
        near, low = (sum(0.9 <= r <= 1.1 for r in ratios) / GRID, sum(r < 0.95 for r in ratios))
        show(f"{name}: {near:.1%} within 10 %, {low} below 0.95, from {min(ratios):.3f} to {max(ratios):.3f}")
        assert near >= least
        assert low <= 0.02 * GRID


@pytest.mark.parametrize(
    "case",
    [
        Case(family="llama", adapter="full", rows=1, length=24, hidden=144, inner=416, layers=5),
        Case(family="llama", adapter="full", rows=5, length=144, layers=5),
        Case(family="qwen2", adapter="full", rows=2, length=96, hidden=144, layers=5, checkpointing=True),
        Case(family="gpt2", rows=2, length=96, hidden=144, layers=5),
        Case(family="llama", method="reward", rows=5, length=96, hidden=144, layers=5),
    ],
    ids=str,
)
def test_the_peak_of_a_step_is_what_was_planned(measure: Measure, case: Case) -> None:
    held, lines = measure(case)
    assert 0.95 <= ratio_of_peak(case, held, lines) <= 1.10
