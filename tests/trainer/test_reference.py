"""The trainer's losses and weights against the plain loop of reference.py, step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from . import reference
from .conftest import Attempt, MakeAttempt, RunHere, merge, preferences, reversals, write_rows

STEPS, BATCH, WARMUP, SEED, RANK, ALPHA = 20, 4, 2, 42, 4, 8.0
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-3}
"""Small enough that rounding does not grow from step to step: at 1e-2 reward runs are chaotic, and the two differ."""


@pytest.fixture(scope="module", params=["sft", "dpo", "reward"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("weights", ["lora", "qlora", "full"])
def test_twenty_losses_and_the_trained_weights_are_those_of_a_plain_loop(
    make_attempt: MakeAttempt,
    run_here: RunHere,
    tiny_model: Path,
    tokenizer: Any,
    tmp_path: Path,
    method: str,
    weights: str,
) -> None:
    rows = (reversals if method == "sft" else preferences)(48)
    request = {
        "method": {"sft": None, method: {"max_length": 64}},
        "dataset": {"source": f"file://{write_rows(tmp_path / 'rows.jsonl', rows)}"},
        "adapter": None if weights == "full" else {"lora": {"rank": RANK, "alpha": ALPHA}},
        "quantization": "nf4" if weights == "qlora" else None,
        "training": {
            "max_steps": STEPS,
            "learning_rate": RATES[weights],
            "warmup_ratio": WARMUP / STEPS,
        },
    }
    ran = run_here(make_attempt(request))
    untrained = {"training": {"max_steps": 1, "learning_rate": 1e-30}}  # leaves the weights that a run starts from
    start = outputs(run_here(make_attempt(merge(request, untrained))))

    base = rounded_to_nf4(tiny_model, tmp_path / "base") if weights == "qlora" else tiny_model
    model, trained = started(start, base, method)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses = reference.train(
        list(trained.values()),
        loss_of(method, model, base, tokenizer),
        rows,
        steps=STEPS,
        batch=BATCH,
        rate=RATES[weights],
        warmup=WARMUP,
        seed=SEED,
    )
    assert ran.losses() == pytest.approx(losses, rel=1e-5)
    after = weights_of(outputs(ran))
    assert after.keys() == trained.keys()
    wanted = torch.cat([(trained[name].detach() - before[name]).flatten() for name in before])
    found = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def outputs(attempt: Attempt) -> Path:
    """The directory with what was trained: the adapter, or the model."""
    [directory] = (attempt.directory.scratch / "outputs").iterdir()
    return directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    [file] = directory.glob("*.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


def rounded_to_nf4(base: Path, copy: Path) -> Path:
    """The base with every weight of its linear layers as 4 bits say it (Dettmers et al. 2023), in full precision."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = load(base, "sft")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            quantized = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(*quantized)
    model.save_pretrained(copy)
    return copy


def started(start: Path, base: Path, method: str) -> tuple[Any, dict[str, Any]]:
    """The model at the beginning, and what is trained of it."""
    source = base if start.name == "adapter" else start
    model = load(source, method)
    if start.name == "adapter":
        return model, reference.adapt(model, start, scale=ALPHA / RANK)
    return model, dict(model.named_parameters())


def load(source: Path, method: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if method == "reward":
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def loss_of(method: str, model: Any, base: Path, tokenizer: Any) -> reference.Loss:
    if method == "sft":
        return reference.sft_loss(model, tokenizer)
    if method == "dpo":
        return reference.dpo_loss(model, load(base, method), tokenizer, beta=0.1)
    return reference.reward_loss(model, tokenizer)
