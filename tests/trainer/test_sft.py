"""SFT in this process on the tiny model: each measured trap of the libraries that touches it, by what it guards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

from .conftest import Attempt, Golden, MakeAttempt, RunHere, make_model, reversals, write_rows

POISON, POISONED_TOKEN = "v", 88
"""A letter that is in no other row, and its token."""
FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}
PACKED = {"method": {"sft": {"packing": True, "max_length": 128}}}
EVAL = {"dataset": {"eval_fraction": 0.25}, "training": {"eval": {"at_start": True}}}


def evals(attempt: Attempt) -> list[tuple[int | None, float]]:
    return [(event.step, event.metrics["eval_loss"]) for event in attempt.events("eval")]


@pytest.mark.parametrize(
    ("name", "changes"), [("lora", {}), ("full", FULL), ("packed", PACKED), ("qlora", {"quantization": "nf4"})]
)
def test_losses_are_golden(
    make_attempt: MakeAttempt, run_here: RunHere, golden: Golden, name: str, changes: dict[str, Any]
) -> None:
    golden(f"sft {name}", run_here(make_attempt(changes)).losses())


def test_two_runs_of_one_seed_are_bitwise_equal_and_another_seed_is_not(
    make_attempt: MakeAttempt, run_here: RunHere
) -> None:
    first, second = run_here(make_attempt()), run_here(make_attempt())
    other = run_here(make_attempt({"training": {"seed": 7}}))
    assert first.losses() == second.losses() != other.losses()


def test_accumulation_under_unequal_lengths_is_one_large_batch(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    whole = run_here(make_attempt(micro_batch_size=8)).losses()
    parts = run_here(make_attempt(micro_batch_size=1, gradient_accumulation_steps=8)).losses()
    assert parts == pytest.approx(whole, abs=1e-5)


def test_activation_checkpointing_changes_no_loss(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    without = run_here(make_attempt()).losses()
    assert run_here(make_attempt(activation_checkpointing=True)).losses() == pytest.approx(without, abs=1e-6)


def test_progress_tells_all_that_was_promised(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    attempt = run_here(make_attempt())
    last = attempt.events("progress")[-1]
    wanted = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "eta_s", "epoch", "max_steps"}
    assert wanted <= last.metrics.keys()
    assert (last.step, last.metrics["max_steps"], last.metrics["eta_s"]) == (4, 4.0, 0.0)
    phases = [event.fields["phase"] for event in attempt.events("phase")]
    assert phases == ["data", "model", "training", "saving"]


def test_tokens_are_counted_without_padding(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    plain = run_here(make_attempt({"training": {"max_steps": None, "epochs": 1}}))
    packed = run_here(make_attempt({**PACKED, "training": {"max_steps": None, "epochs": 1}}))
    expected = plain.events("data")[0].metrics["tokens"]
    assert [run.events("progress")[-1].metrics["tokens"] for run in (plain, packed)] == [expected, expected]


def test_the_rate_warms_up_and_falls_as_a_cosine(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    attempt = run_here(make_attempt({"training": {"max_steps": 10, "warmup_ratio": 0.2}}))
    rates = [event.metrics["learning_rate"] for event in attempt.events("progress")]
    wanted = [1e-2 * s / 2 if s < 2 else 5e-3 * (1 + math.cos(math.pi * (s - 2) / 8)) for s in range(10)]
    assert rates == pytest.approx(wanted, abs=1e-9)


def test_warm_up_may_be_given_in_steps(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    changes = {
        "training": {"max_steps": 6, "warmup_ratio": None, "warmup_steps": 3, "scheduler": "constant_with_warmup"}
    }
    rates = [event.metrics["learning_rate"] for event in run_here(make_attempt(changes)).events("progress")]
    assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])


def test_gradients_are_clipped(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    def moved(max_grad_norm: float) -> torch.Tensor:
        training = {"max_steps": 1, "warmup_ratio": 0.0, "max_grad_norm": max_grad_norm, "adam_epsilon": 1.0}
        return adapter_of(run_here(make_attempt({"training": training})))

    # With a large epsilon Adam is close to plain descent, so a clipped gradient moves the weights less.
    assert moved(1e-3).abs().sum() < moved(0.0).abs().sum() / 10


def adapter_of(attempt: Attempt) -> torch.Tensor:
    from safetensors.torch import load_file

    tensors = load_file(attempt.directory.scratch / "outputs" / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name])


def test_the_evaluation_is_per_token_whatever_the_batch_size(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    def loss(size: int) -> float:
        changes = {**EVAL, "training": {"max_steps": 1, "eval": {"at_start": True, "batch_size": size}}}
        return evals(run_here(make_attempt(changes)))[0][1]

    assert loss(1) == pytest.approx(loss(7), abs=1e-6)


def test_the_evaluation_is_the_models_own_loss_on_the_answers(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    rows = reversals(5, start=90)
    file = write_rows(tmp_path / "eval.jsonl", rows)
    changes = {"dataset": {"eval_source": f"file://{file}"}, "training": {"max_steps": 1, "eval": {"at_start": True}}}
    attempt = run_here(make_attempt(changes))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    losses: list[float] = []
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"][1:], 1]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
    assert evals(attempt)[0][1] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_evaluations_come_at_the_start_in_between_and_at_the_end(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    attempt = run_here(make_attempt({**EVAL, "training": {"max_steps": 5, "eval": {"at_start": True, "steps": 2}}}))
    assert [step for step, _ in evals(attempt)] == [0, 2, 4, 5]
    record = json.loads((attempt.directory.scratch / "worker.json").read_text())
    assert record["metrics"]["eval_before"]["eval_loss"] == evals(attempt)[0][1]
    assert record["metrics"]["eval_after"]["eval_loss"] == evals(attempt)[-1][1]


@pytest.fixture
def worsening(tmp_path: Path) -> dict[str, Any]:
    """Evaluation rows whose answers hold no letter that is trained on: the more is learned, the less likely they
    are."""
    file = write_rows(tmp_path / "other.jsonl", [{"prompt": "reverse ab = ", "completion": "~#~#"}] * 4)
    evaluation = {"steps": 2, "at_start": True, "keep_best": True}
    return {"dataset": {"eval_source": f"file://{file}"}, "training": {"max_steps": 8, "eval": evaluation}}


def test_the_best_weights_are_kept(make_attempt: MakeAttempt, run_here: RunHere, worsening: dict[str, Any]) -> None:
    attempt = run_here(make_attempt(worsening))
    steps = [step for step, _ in evals(attempt)]
    assert steps == [0, 2, 4, 6, 8, 8]
    *during, (_, final) = evals(attempt)
    assert final == pytest.approx(min(loss for _, loss in during), abs=1e-6)
    assert final < during[-1][1]
    assert any("are kept" in event.message for event in attempt.events("note"))


def test_it_stops_when_the_loss_no_longer_falls(
    make_attempt: MakeAttempt, run_here: RunHere, worsening: dict[str, Any]
) -> None:
    worsening["training"] |= {"max_steps": 40, "learning_rate": 5e-2}
    worsening["training"]["eval"]["early_stopping_patience"] = 2
    attempt = run_here(make_attempt(worsening))
    best = min(evals(attempt)[:-1], key=lambda found: found[1])[0]
    assert best is not None
    assert attempt.events("progress")[-1].step == best + 4 < 40
    assert any(event.message.startswith("Stopping early") for event in attempt.events("note"))


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = make_model(tmp_path / "spoiled")

    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISONED_TOKEN] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(
        tmp_path / "bad.jsonl", [{"prompt": "aa", "completion": "aa"}] * 15 + [{"prompt": "aa", "completion": POISON}]
    )
    changes = {"model": {"source": f"file://{base}"}, "dataset": {"source": f"file://{rows}"}}
    attempt = make_attempt({**changes, "training": {"max_steps": 16}}, micro_batch_size=1)
    with pytest.raises(RunFailed, match=r"The loss is nan at step \d+ on the batch of data set rows 16\.") as caught:
        run_here(attempt)
    assert caught.value.code == TrainerExit.DIVERGED
    assert not (attempt.directory.scratch / "outputs").exists()


def test_samples_are_answered_before_and_after(make_attempt: MakeAttempt, run_here: RunHere) -> None:
    changes = {**EVAL, "reporting": {"samples": {"prompts": 2, "max_new_tokens": 4}}}
    samples = run_here(make_attempt(changes)).events("sample")
    assert [event.fields["when"] for event in samples] == ["before", "before", "after", "after"]
    assert samples[0].fields["prompt"] == samples[2].fields["prompt"]
    assert samples[0].fields["expected"] == samples[0].fields["prompt"].split()[1][::-1]


def test_packed_losses_equal_unpacked_ones_and_rows_do_not_see_each_other(tiny_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from hone_trainer.collate import Collator, PackedCollator

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in reversals(6)]
    apart = [{"input_ids": ids, "labels": ids, "rows": [1]} for ids in texts]
    groups = [texts[:4], texts[4:]]
    together = []
    for group in groups:
        flat = [token for ids in group for token in ids]
        together.append({"input_ids": flat, "labels": flat, "seq_lengths": [len(ids) for ids in group], "rows": [1]})

    def logits(batch: dict[str, Any]) -> torch.Tensor:
        inputs = {
            name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")
        }
        with torch.no_grad():
            found: torch.Tensor = model(**inputs, use_cache=False).logits.log_softmax(-1)
        return found

    plain, packed = logits(Collator(pad_token_id=2)(apart)), logits(PackedCollator(pad_token_id=2)(together))
    row = 0
    for sequence, group in enumerate(groups):
        start = 0
        for ids in group:
            span = packed[sequence, start : start + len(ids)]
            assert torch.allclose(span, plain[row, : len(ids)], atol=1e-5)
            start, row = start + len(ids), row + 1

    together[0]["input_ids"] = [7] * len(texts[0]) + together[0]["input_ids"][len(texts[0]) :]
    perturbed = logits(PackedCollator(pad_token_id=2)(together))
    assert torch.equal(perturbed[0, len(texts[0]) :], packed[0, len(texts[0]) :])


def test_batches_for_flash_attention_are_those_of_trl() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from hone_trainer.collate import FlatCollator

    examples = [
        {"input_ids": [4, 5, 6, 7, 8], "labels": [-100, 5, 6, -100, 8], "seq_lengths": [3, 2], "rows": [1, 2]},
        {"input_ids": [9, 3], "labels": [-100, 3], "seq_lengths": [2], "rows": [3]},
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    ours = FlatCollator()(examples)
    assert (ours.pop("rows"), ours.pop("num_tokens")) == ([1, 2, 3], 7)
    theirs.pop("seq_idx")  # for state-space models, which this trainer does not pack
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)


def test_losses_are_those_of_trl_on_the_same_rows(
    make_attempt: MakeAttempt, run_here: RunHere, tiny_model: Path, rows_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The preparation of the data is ours; on rows without traps it must not change what is trained."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=4,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert run_here(make_attempt(FULL)).losses() == pytest.approx(theirs, abs=1e-5)
