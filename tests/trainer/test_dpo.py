"""DPO in this process on the tiny model: each measured trap of the libraries that touches it, by what it guards."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.spec.enumerations import DPO_LOSSES

from .conftest import Attempt, Golden, MakeAttempt, RunHere, make_model, merge, preferences, write_rows

FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}
EVAL = {"dataset": {"eval_fraction": 0.25}, "training": {"eval": {"at_start": True}}}
FIGURES = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
RunDpo = Callable[..., Attempt]


@pytest.fixture
def dpo(make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path) -> RunDpo:
    """Runs a small DPO request, with changes of it and of the launch."""
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    request = {"method": {"sft": None, "dpo": {"max_length": 64}}, "dataset": {"source": f"file://{pairs}"}}

    def run(changes: Mapping[str, Any] | None = None, **launch: Any) -> Attempt:
        return run_here(make_attempt(merge(request, changes or {}), **launch))

    return run


def method(**changes: Any) -> dict[str, Any]:
    return {"method": {"dpo": changes}}


ONCE = method(precompute_reference=True)


AT_THE_START = {
    "lora": {},
    "full": FULL,
    "lora once": ONCE,
    "full once": {**FULL, **ONCE},
    "qlora": {"quantization": "nf4"},
}


@pytest.mark.parametrize("name", ["lora", "full", "qlora"])
def test_losses_are_golden(dpo: RunDpo, golden: Golden, name: str) -> None:
    golden(f"dpo {name}", dpo(AT_THE_START[name]).losses())


@pytest.mark.parametrize("changes", AT_THE_START.values(), ids=AT_THE_START)
def test_before_the_first_step_policy_and_reference_are_one_and_the_loss_is_ln_2(
    dpo: RunDpo, changes: dict[str, Any]
) -> None:
    attempt = dpo(changes)
    first, *_, last = attempt.events("progress")
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first.metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last.metrics["loss"] < math.log(2)


@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_a_reference_that_is_computed_once_changes_nothing(dpo: RunDpo, changes: dict[str, Any]) -> None:
    live, once = dpo({**EVAL, **changes}), dpo({**EVAL, **changes, **ONCE})
    assert once.losses() == pytest.approx(live.losses(), abs=1e-6)
    assert [event.metrics for event in once.events("eval")] == [
        pytest.approx(event.metrics, abs=1e-6) for event in live.events("eval")
    ]


AT_START = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": (1 / 0.2) ** 2,
    "exo_pair": math.log(0.5) - 0.5 * (math.log(0.9) + math.log(0.1)),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid_norm": math.log(2),
}
"""Each loss where policy and reference are one, from its paper, with beta 0.1 and label smoothing 0.1."""
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


@pytest.mark.parametrize("name", AT_START)
def test_every_loss_is_the_one_of_its_paper_where_policy_and_reference_are_one(dpo: RunDpo, name: str) -> None:
    smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    losses = dpo({**method(loss=[name], **smoothing), "training": {"max_steps": 3}}).losses()
    assert losses[0] == pytest.approx(AT_START[name], rel=1e-5)
    assert losses[-1] != losses[0]


def test_no_loss_is_left_out_above() -> None:
    assert {*AT_START, "sft"} == set(DPO_LOSSES)


def test_several_losses_add_up(dpo: RunDpo) -> None:
    one = {"training": {"max_steps": 1}}
    alone = [dpo({**method(loss=[name]), **one}).losses()[0] for name in ("sigmoid", "sft")]
    assert dpo({**method(loss=["sigmoid", "sft"]), **one}).losses()[0] == pytest.approx(sum(alone), rel=1e-5)


def test_accumulation_under_unequal_lengths_is_one_large_batch(dpo: RunDpo) -> None:
    whole = dpo(micro_batch_size=8)
    parts = dpo(micro_batch_size=1, gradient_accumulation_steps=8)
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5)
    figures = [run.events("progress")[-1].metrics for run in (whole, parts)]
    assert [figures[0][name] for name in FIGURES] == pytest.approx([figures[1][name] for name in FIGURES], abs=1e-5)


def test_two_runs_of_one_seed_are_bitwise_equal(dpo: RunDpo) -> None:
    assert dpo().losses() == dpo().losses() != dpo({"training": {"seed": 7}}).losses()


def test_activation_checkpointing_changes_no_loss(dpo: RunDpo) -> None:
    assert dpo(activation_checkpointing=True).losses() == pytest.approx(dpo().losses(), abs=1e-6)


def test_steps_and_evaluations_tell_rewards_margin_and_accuracy(dpo: RunDpo) -> None:
    attempt = dpo({**EVAL, "training": {"max_steps": 8, "eval": {"at_start": True}}})
    last = attempt.events("progress")[-1].metrics
    assert {"loss", "learning_rate", "grad_norm", *FIGURES} <= last.keys()
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    before, after = (event.metrics for event in attempt.events("eval"))
    assert before.keys() == {"eval_loss", *(f"eval_{name}" for name in FIGURES)}
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > 0


def test_the_evaluation_is_per_pair_whatever_the_batch_size(dpo: RunDpo) -> None:
    def evaluated(size: int) -> dict[str, float]:
        found = dpo({**EVAL, "training": {"max_steps": 2, "eval": {"batch_size": size}}})
        return dict(found.events("eval")[-1].metrics)

    assert evaluated(1) == pytest.approx(evaluated(7), abs=1e-6)


def test_neither_the_reference_nor_anything_else_is_shipped_beside_the_adapter(dpo: RunDpo) -> None:
    outputs = dpo().directory.scratch / "outputs"
    names = {file.relative_to(outputs).as_posix() for file in outputs.rglob("*") if file.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= names
    assert not [name for name in names if "ref" in name.rpartition("adapter/")[2].split("/")[:-1]]


def test_from_an_sft_adapter_the_reference_is_that_adapter_and_is_not_shipped(
    dpo: RunDpo, make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path
) -> None:
    learned = run_here(make_attempt({"training": {"max_steps": 20}})).directory.scratch / "outputs" / "adapter"
    source = {"model": {"source": f"file://{learned}"}, **EVAL}
    attempt = dpo(source)
    assert attempt.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    moved, before = (
        load(attempt, "adapter", "adapter_model.safetensors"),
        load_file(learned / "adapter_model.safetensors"),
    )
    assert moved.keys() == before.keys()
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
    assert not (attempt.directory.scratch / "outputs" / "adapter" / "ref").exists()
    assert attempt.events("eval")[0].metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_new_adapter_is_not_held_twice(dpo: RunDpo) -> None:
    """TRL copies the adapter as its own reference; switching it off costs nothing."""
    attempt = dpo()
    record = json.loads((attempt.directory.scratch / "worker.json").read_text())
    tensors = load(attempt, "adapter", "adapter_model.safetensors")
    assert record["parameters"]["trainable"] == sum(tensor.numel() for tensor in tensors.values())


def load(attempt: Attempt, kind: str, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(attempt.directory.scratch / "outputs" / kind / name)
    return tensors


def test_dropout_of_the_base_is_off(dpo: RunDpo, tmp_path: Path) -> None:
    """Otherwise policy and reference differ before anything was learned."""
    base = make_model(tmp_path / "dropping", attention_dropout=0.5)
    attempt = dpo({"model": {"source": f"file://{base}", "attention": "eager"}, "training": {"max_steps": 1}})
    assert attempt.losses()[0] == pytest.approx(math.log(2), abs=1e-6)


def test_the_best_weights_are_kept(dpo: RunDpo, tmp_path: Path) -> None:
    """Held-out pairs that prefer the other answers: the more is learned, the higher their loss."""
    flipped = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in preferences(8, start=70)
    ]
    file = write_rows(tmp_path / "flipped.jsonl", flipped)
    evaluation = {"steps": 2, "at_start": True, "keep_best": True, "early_stopping_patience": 2}
    attempt = dpo({"dataset": {"eval_source": f"file://{file}"}, "training": {"max_steps": 20, "eval": evaluation}})
    *during, final = [event.metrics["eval_loss"] for event in attempt.events("eval")]
    assert attempt.events("progress")[-1].step < 20
    assert final == pytest.approx(min(during), abs=1e-6)
    assert final < during[-1]


def test_sample_prompts_are_answered_as_in_sft(dpo: RunDpo) -> None:
    changes = {**EVAL, "reporting": {"samples": {"prompts": 1, "max_new_tokens": 4}}}
    before, after = dpo(changes).events("sample")
    assert before.fields["prompt"] == after.fields["prompt"]
    assert before.fields["expected"] == before.fields["prompt"].split()[1][::-1]


def test_outputs_load_in_plain_transformers_and_peft(dpo: RunDpo, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    outputs = dpo({"output": {"merged": True}}).directory.scratch / "outputs"
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, outputs / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(outputs / "merged")(ids).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.allclose(merged, adapted, atol=2e-5)
