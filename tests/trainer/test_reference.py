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


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Everything in float64, and what the libraries always do in fp32 too: RMSNorm, the angles of positions, TRL's head
    in tiles, and the losses that are told; here they are the answer."""
    import trl.trainer.utils
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    from hone_trainer import model, trained, training

    def normed(self: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return found

    def turned(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rates = 1.0 / self.config.rope_parameters["rope_theta"] ** (
            torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        )
        angles = position_ids[..., None] * torch.cat([rates, rates])
        return angles.cos().to(x), angles.sin().to(x)

    monkeypatch.setattr(trained, "weights_dtype", lambda *_, **__: torch.float64)
    monkeypatch.setattr(training, "train_in", lambda found, _: model.train_in(found, torch.float64))
    monkeypatch.setattr(LlamaRMSNorm, "forward", normed)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", turned)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", WholeHead)
    losses: list[float] = []
    checked = training.Watch.checked

    def noted(self: Any, loss: torch.Tensor, **where: Any) -> torch.Tensor:
        assert loss.dtype == torch.float64
        losses.append(loss.item())
        return checked(self, loss, **where)

    monkeypatch.setattr(training.Watch, "checked", noted)
    return losses


class WholeHead:
    """Log-probabilities from all logits at once, in the place of TRL's function of tiles."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, _bias: None, labels: torch.Tensor, *_: Any) -> Any:
        logits = hidden @ weight.T
        table = logits.log_softmax(-1)
        told = torch.zeros_like(logits[:, 0])  # entropy, and others that no loss here is made of
        return table.gather(1, labels[:, None])[:, 0], told, told, told, logits.argmax(-1) == labels


def test_losses_and_weights_in_float64_are_the_loops_to_the_last_digits(
    make_attempt: MakeAttempt,
    run_here: RunHere,
    in_float64: list[float],
    tiny_model: Path,
    tokenizer: Any,
    tmp_path: Path,
    method: str,
) -> None:
    steps, rate = 6, 1e-3
    rows = (reversals if method == "sft" else preferences)(48)
    request = {
        "method": {"sft": None, method: {"max_length": 64}},
        "dataset": {"source": f"file://{write_rows(tmp_path / 'rows.jsonl', rows)}"},
        "adapter": {"lora": {"rank": RANK, "alpha": ALPHA}},
        "training": {"max_steps": steps, "learning_rate": rate, "warmup_ratio": WARMUP / steps},
    }
    ran = run_here(make_attempt(request))
    told = list(in_float64)
    untrained = {"training": {"max_steps": 1, "learning_rate": 1e-30}}
    start = outputs(run_here(make_attempt(merge(request, untrained))))
    model = load(tiny_model, method).double()
    trained = reference.adapt(model, start, scale=ALPHA / RANK)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float64}
    losses = reference.train(
        list(trained.values()),
        loss_of(method, model, tiny_model, tokenizer, dtype=torch.float64),
        rows,
        steps=steps,
        batch=BATCH,
        rate=rate,
        warmup=WARMUP,
        seed=SEED,
    )
    assert told == pytest.approx(losses, rel=1e-8)
    after = weights_of(outputs(ran))
    wanted = torch.cat([(trained[name].detach() - before[name]).flatten() for name in before])
    found = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-8


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


def loss_of(
    method: str, model: Any, base: Path, tokenizer: Any, *, dtype: torch.dtype = torch.float32
) -> reference.Loss:
    if method == "sft":
        return reference.sft_loss(model, tokenizer)
    if method == "dpo":
        return reference.dpo_loss(model, load(base, method).to(dtype), tokenizer, beta=0.1)
    return reference.reward_loss(model, tokenizer)
