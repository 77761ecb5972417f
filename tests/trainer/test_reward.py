"""Reward modelling in this process, on a tiny decoder and a tiny encoder: each trap by what it guards."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.machine import plan_here
from hone.plan import Hardware
from hone.run import TrainerExit
from hone_trainer.failure import RunFailed

from .conftest import Attempt, Golden, MakeAttempt, RunHere, make_model, make_tokenizer, merge, preferences, write_rows

FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}
EVAL = {"dataset": {"eval_fraction": 0.25}, "training": {"eval": {"at_start": True}}}
FIGURES = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
RunReward = Callable[..., Attempt]


def make_encoder(path: Path, family: str = "distilbert") -> Path:
    """An encoder as published, with a language head, and a tokenizer that knows no end-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz= "]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if family == "distilbert":
        sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=40, max_position_embeddings=64, **sizes, **ids)
    AutoModelForMaskedLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "distilbert")


@pytest.fixture
def reward(make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path) -> RunReward:
    """Runs a small reward request, with changes of it and of the launch."""
    pairs = write_rows(tmp_path / "pairs.jsonl", preferences(64))
    request = {"method": {"sft": None, "reward": {"max_length": 64}}, "dataset": {"source": f"file://{pairs}"}}

    def run(changes: Mapping[str, Any] | None = None, **launch: Any) -> Attempt:
        return run_here(make_attempt(merge(request, changes or {}), **launch))

    return run


def method(**changes: Any) -> dict[str, Any]:
    return {"method": {"reward": changes}}


def texts() -> list[str]:
    return [row["prompt"] + row["chosen"] for row in preferences(6, start=100)]


def scores(model: Any, directory: Path) -> torch.Tensor:
    """Of some texts, as anybody would score them: the tokenizer that was saved, one batch, padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ends = "" if tokenizer.cls_token else tokenizer.eos_token
    batch = tokenizer([text + ends for text in texts()], padding=True, return_tensors="pt")
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, 0
        ]
    return found


HEADS = {"tiny": {"score"}, "distilbert": {"pre_classifier", "classifier"}, "modernbert": {"classifier"}}
HEADS |= {"bert": {"pooler", "classifier"}}


@pytest.fixture(params=["decoder", "distilbert", "bert", "modernbert"])
def base(request: pytest.FixtureRequest, tiny_model: Path, encoder: Path, tmp_path: Path) -> Path:
    if request.param in ("decoder", "distilbert"):
        return tiny_model if request.param == "decoder" else encoder
    return make_encoder(tmp_path / request.param, request.param)


WEIGHTS = {"lora": {}, "full": FULL, "qlora": {"quantization": "nf4"}}


@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_are_golden(reward: RunReward, golden: Golden, name: str) -> None:
    golden(f"reward {name}", reward(WEIGHTS[name]).losses())


def test_an_adapter_carries_its_head_and_loads_in_plain_peft(reward: RunReward, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    attempt = reward({"model": {"source": f"file://{base}"}})
    directory = attempt.directory.scratch / "outputs" / "adapter"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "AutoModelForSequenceClassification" in (directory / "README.md").read_text()
    saved = [key.split(".") for key in load_file(directory / "adapter_model.safetensors") if "lora" not in key]
    assert {part for key in saved for part in key} & set().union(*HEADS.values()) == HEADS[base.name]
    found = []
    for seed in (1, 2):  # the head of a base that is loaded as a classifier is random until the adapter brings its own
        torch.manual_seed(seed)
        fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        found.append(scores(PeftModel.from_pretrained(fresh, directory), directory))
    assert torch.equal(*found)
    assert len(set(found[0].tolist())) == len(texts())


def test_a_whole_model_loads_as_a_classifier_of_one_label(reward: RunReward, base: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    attempt = reward({"model": {"source": f"file://{base}"}, **FULL})
    directory = attempt.directory.scratch / "outputs" / "model"
    config = json.loads((directory / "config.json").read_text())
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.num_labels == 1
    assert config["pad_token_id"] == (2 if base.name == "tiny" else 0)
    assert len(set(scores(model, directory).tolist())) == len(texts())


def test_as_many_parameters_train_as_the_plan_says(reward: RunReward, base: Path) -> None:
    attempt = reward({"model": {"source": f"file://{base}"}})
    hardware = Hardware(profiles={}, cpu_cores=1, memory_bytes=1 << 40)
    planned = plan_here(attempt.run.spec, hardware).plan
    record = json.loads((attempt.directory.scratch / "worker.json").read_text())
    assert record["parameters"]["trainable"] == planned.trainable_parameters


def test_all_linear_adapts_every_layer_but_the_head(reward: RunReward, encoder: Path) -> None:
    attempt = reward({"model": {"source": f"file://{encoder}"}})
    config = json.loads((attempt.directory.scratch / "outputs" / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"]


def test_steps_and_evaluations_tell_scores_margin_and_accuracy(reward: RunReward) -> None:
    attempt = reward({**EVAL, "training": {"max_steps": 30, "eval": {"at_start": True}}})
    last = attempt.events("progress")[-1].metrics
    assert {"loss", "learning_rate", "grad_norm", *FIGURES} <= last.keys()
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    before, after = (event.metrics for event in attempt.events("eval"))
    assert before.keys() == {"eval_loss", *(f"eval_{name}" for name in FIGURES)}
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]


def test_the_evaluation_is_per_pair_whatever_the_batch_size(reward: RunReward) -> None:
    def evaluated(size: int) -> dict[str, float]:
        found = reward({**EVAL, "training": {"max_steps": 2, "eval": {"batch_size": size}}})
        return dict(found.events("eval")[-1].metrics)

    assert evaluated(1) == pytest.approx(evaluated(7), abs=1e-6)


def test_accumulation_under_unequal_lengths_is_one_large_batch(reward: RunReward) -> None:
    whole = reward(micro_batch_size=8).losses()
    parts = reward(micro_batch_size=1, gradient_accumulation_steps=8).losses()
    assert parts == pytest.approx(whole, abs=1e-5)


def test_two_runs_of_one_seed_are_bitwise_equal(reward: RunReward) -> None:
    assert reward().losses() == reward().losses() != reward({"training": {"seed": 7}}).losses()


def test_activation_checkpointing_changes_no_loss(reward: RunReward) -> None:
    assert reward(activation_checkpointing=True).losses() == pytest.approx(reward().losses(), abs=1e-6)


def test_a_margin_is_taken_from_the_difference(reward: RunReward, tmp_path: Path) -> None:
    """At the start, where scores are near each other, the loss is −log σ(−margin)."""
    rows = [{**row, "margin": 3, "gap": 0} for row in preferences(16)]
    data = {"dataset": {"source": f"file://{write_rows(tmp_path / 'margins.jsonl', rows)}"}}
    once = {"training": {"max_steps": 1}}
    apart = reward({**data, **once}).losses()[0]
    assert apart == pytest.approx(math.log(1 + math.exp(3)), abs=0.3)
    none = reward({"dataset": {**data["dataset"], "columns": {"margin": "gap"}}, **once}).losses()[0]
    assert none == pytest.approx(math.log(2), abs=0.3)


def test_rewards_are_pulled_to_the_centre(reward: RunReward) -> None:
    """By the square of a pair's sum (Eisenstein et al. 2023)."""
    plain, centred = reward(micro_batch_size=1), reward(method(center_rewards_coefficient=5.0), micro_batch_size=1)
    first = plain.events("progress")[0].metrics
    pull = 5.0 * (first["rewards/chosen"] + first["rewards/rejected"]) ** 2
    assert centred.losses()[0] == pytest.approx(plain.losses()[0] + pull, rel=1e-5)
    assert pull > 1e-4


def test_dropout_of_an_encoder_is_off(reward: RunReward, encoder: Path) -> None:
    """Its published configuration drops a tenth of everything: batches of other shapes would draw other noise."""
    model = {"model": {"source": f"file://{encoder}"}}
    assert json.loads((encoder / "config.json").read_text())["dropout"] > 0
    whole, parts = (reward(model, micro_batch_size=8), reward(model, micro_batch_size=1, gradient_accumulation_steps=8))
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5)


def test_the_head_of_a_base_in_four_bits_is_not(reward: RunReward, base: Path) -> None:
    """It is trained in full, so it has to be numbers that can be trained."""
    attempt = reward({"model": {"source": f"file://{base}"}, "quantization": "nf4"})
    tensors = load_file(attempt.directory.scratch / "outputs" / "adapter" / "adapter_model.safetensors")
    heads = [tensor for name, tensor in tensors.items() if "lora" not in name]
    assert heads
    assert all(tensor.is_floating_point() and tensor.ndim in (1, 2) for tensor in heads)
    assert attempt.losses()[-1] != attempt.losses()[0]


def test_a_stop_token_is_seen_though_the_tokenizer_has_no_padding(reward: RunReward, tmp_path: Path) -> None:
    base = make_model(tmp_path / "unpadded")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    attempt = reward({"model": {"source": f"file://{base}"}, **FULL})
    config = json.loads((attempt.directory.scratch / "outputs" / "model" / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)


def test_long_pairs_are_left_out_and_counted(reward: RunReward) -> None:
    attempt = reward(method(max_length=24))
    counts = attempt.events("data")[0].metrics
    assert 0 < counts["rows_dropped"] < counts["rows"] == counts["rows_used"] + counts["rows_dropped"]
    assert counts["rows_truncated"] == 0
    assert any("left out: they are longer than max_length" in event.message for event in attempt.events("warning"))


def test_pairs_that_are_longer_than_an_encoders_table_of_positions_are_refused_before_training(
    reward: RunReward, encoder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 90, "chosen": "b", "rejected": "c"}])
    changes = {"model": {"source": f"file://{encoder}"}, "dataset": {"source": f"file://{rows}"}}
    with pytest.raises(RunFailed, match="has 64 positions, and the longest pair 93 tokens") as caught:
        reward({**changes, **method(max_length=128)})
    assert caught.value.code == TrainerExit.USER


def test_a_model_that_can_be_no_classifier_is_refused_before_training(reward: RunReward, tmp_path: Path) -> None:
    base = make_model(tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "musicgen"}))
    with pytest.raises(RunFailed, match="does not know as a classifier") as caught:
        reward({"model": {"source": f"file://{base}"}})
    assert caught.value.code == TrainerExit.USER
