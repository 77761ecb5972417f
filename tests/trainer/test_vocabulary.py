"""model.new_tokens: what is added, what of it is trained, and that it comes back wherever the adapter is loaded."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hone.run import TrainerExit
from hone_trainer.failure import RunFailed
from hone_trainer.lora import load_adapter
from hone_trainer.merging import logits
from hone_trainer.model import load_tokenizer
from hone_trainer.trial import Wanted
from hone_trainer.vocabulary import grow

from .conftest import Attempt, MakeAttempt, RunHere, make_model, preferences, reversals, write_rows
from .test_adapters import adapter_of, load, source
from .test_answering import answers_here, candidate, plain_peft
from .test_checkpoints import merged
from .test_ppo import VARIED
from .test_supervisor import Start, start

__all__ = ["start"]
TOKENS = ["<say>", "<end>"]
FIRST = 259
"""The tiny tokenizer has so many, and the tiny model five places more."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    tasks = [{"prompt": f"<say>{row['prompt']}", "completion": f"{row['completion']}<end>"} for row in reversals(48)]
    return write_rows(tmp_path / "tokens.jsonl", tasks)


def request(model: Path, rows: Path, *changes: Any) -> dict[str, Any]:
    base = {
        "model": {"source": f"file://{model}", "new_tokens": TOKENS},
        "dataset": {"source": f"file://{rows}"},
        "training": {"warmup_ratio": None, "scheduler": "constant"},
    }
    return merged(base, *changes)


@pytest.fixture(params=["own head", "tied head", "no place"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Without a place for new tokens it has to grow."""
    changes = {"own head": {}, "tied head": {"tie_word_embeddings": True}, "no place": {"vocab_size": FIRST}}
    return make_model(tmp_path / "base", **changes[request.param])


def test_only_the_rows_of_new_tokens_are_trained_beside_the_adapter(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path
) -> None:
    ran = run_here(make_attempt(request(model, rows, {"output": {"merged": True}})))
    before, after = load(model), load(ran.directory.scratch / "outputs" / "merged")
    is_tied = before.config.tie_word_embeddings
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(after, name)().weight
        assert torch.equal(old[:FIRST], new[:FIRST])
        assert torch.equal(old[FIRST + 2 :], new[FIRST + 2 : len(old)])
        assert (new[FIRST : FIRST + 2] - old[:FIRST].mean(0)).abs().max() > 1e-3
    saved = load_file(adapter_of(ran) / "adapter_model.safetensors")
    deltas = {name: tensor.shape for name, tensor in saved.items() if "trainable_tokens" in name}
    assert len(deltas) == (1 if is_tied else 2) and set(deltas.values()) == {(2, 64)}
    assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in saved)
    trainable = ran.events("note")[1].metrics["trainable_parameters"]
    assert trainable == 8192 + 2 * 64 * (1 if is_tied else 2)
    tokenizer = load_tokenizer(source(adapter_of(ran)), ran.run.spec.model.model_copy(update={"new_tokens": ()}))
    assert tokenizer("<say>ab<end>")["input_ids"][1:] == [FIRST, *tokenizer("ab")["input_ids"][1:], FIRST + 1]
    assert tokenizer.decode([FIRST, FIRST + 1], skip_special_tokens=True) == "<say><end>"


def test_new_tokens_start_as_the_mean_and_move_against_their_gradient(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, rows: Path
) -> None:
    """The first step of AdamW moves every number by the learning rate, against the sign of its gradient."""
    path = make_model(tmp_path / "base")
    one = {"training": {"max_steps": 1, "micro_batch_size": None}, "adapter": {"lora": {"rank": 4}}}
    ran = run_here(make_attempt(request(path, rows, one), micro_batch_size=48))
    plain = load(path)
    mean = {}
    with torch.no_grad():
        for name, module in (
            ("embed_tokens", plain.get_input_embeddings()),
            ("lm_head", plain.get_output_embeddings()),
        ):
            mean[name] = module.weight[:FIRST].mean(0)
            module.weight[FIRST : FIRST + 2] = mean[name]
    tokenizer = load_tokenizer(source(path), ran.run.spec.model)
    losses, count = [], 0
    for line in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(line["prompt"])["input_ids"]
        whole = [*tokenizer(line["prompt"] + line["completion"])["input_ids"], tokenizer.eos_token_id]
        found = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(whole))
        losses.append(-sum(found[place - 1, whole[place]] for place in places))
        count += len(places)
    loss = torch.stack(losses).sum() / count
    assert ran.losses()[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    saved = load_file(adapter_of(ran) / "adapter_model.safetensors")
    for name, module in (("embed_tokens", plain.get_input_embeddings()), ("lm_head", plain.get_output_embeddings())):
        [rows_now] = [tensor for key, tensor in saved.items() if f"{name}.token_adapter" in key]
        gradient = module.weight.grad[FIRST : FIRST + 2]
        clear = gradient.abs() > 1e-5
        assert clear.any()
        moved = rows_now - mean[name]
        assert torch.equal(moved.sign()[clear], -gradient.sign()[clear])
        assert moved[clear].abs() == pytest.approx(0.01, rel=1e-2)


def test_a_saved_adapter_grows_its_base_wherever_it_is_loaded(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path
) -> None:
    ran = run_here(make_attempt(request(model, rows, {"output": {"merged": True}})))
    again = load_adapter(load(model), source(adapter_of(ran)), base=source(model))
    whole = load(ran.directory.scratch / "outputs" / "merged")
    assert logits(again) == pytest.approx(logits(whole), abs=1e-4)


def test_training_goes_on_from_an_adapter_with_new_tokens(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path, tmp_path: Path
) -> None:
    first = run_here(make_attempt(request(model, rows)))
    pairs = [
        {"prompt": f"<say>{row['prompt']}", "chosen": f"{row['chosen']}<end>", "rejected": row["rejected"]}
        for row in preferences(16)
    ]
    changes = {
        "model": {"source": f"file://{adapter_of(first)}", "new_tokens": []},
        "dataset": {"source": f"file://{write_rows(tmp_path / 'pairs.jsonl', pairs)}"},
        "method": {"sft": None, "dpo": {"max_length": 64}},
        "training": {"max_steps": 3},
    }
    ran = run_here(make_attempt(merged(request(model, rows), changes), job="dpo"))
    assert ran.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    old, new = (load_file(adapter_of(one) / "adapter_model.safetensors") for one in (first, ran))
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert any("token_adapter" in name for name in moved)


@pytest.mark.parametrize("method", ["dpo", "reward", "ppo", "grpo"])
def test_every_method_trains_new_tokens(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, tmp_path: Path, method: str
) -> None:
    rows = [{**row, "prompt": f"<say>{row['prompt']}"} for row in preferences(16)]
    drawn = {"rewards": [VARIED], "max_new_tokens": 6}
    settings: dict[str, Any] = {
        "dpo": {"max_length": 64},
        "reward": {"max_length": 64},
        "ppo": {**drawn, "batch_size": 8, "mini_batch_size": 8},
        "grpo": {**drawn, "num_generations": 8, "beta": 0.1},
    }[method]
    changes = {"method": {"sft": None, method: settings}, "training": {"max_steps": 2}}
    wanted = request(model, write_rows(tmp_path / "rows.jsonl", rows), changes)
    ran = run_here(make_attempt(wanted, micro_batch_size=8))
    first = ran.events("progress")[0].metrics
    if method == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if method in ("ppo", "grpo"):
        assert first["kl"] == pytest.approx(0, abs=1e-6)
    [name, *_] = [name for name in load_file(adapter_of(ran) / "adapter_model.safetensors") if "embed_tokens" in name]
    found = load_file(adapter_of(ran) / "adapter_model.safetensors")[name]
    assert (found - load(model).get_input_embeddings().weight[:FIRST].mean(0)).abs().max() > 1e-4


def test_full_fine_tuning_leaves_a_model_of_that_vocabulary(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path
) -> None:
    ran = run_here(make_attempt(request(model, rows, {"adapter": None, "training": {"learning_rate": 1e-3}})))
    found = load(ran.directory.scratch / "outputs" / "model")
    assert found.get_input_embeddings().weight.shape[0] == max(FIRST + 2, load(model).config.vocab_size)
    assert found.config.vocab_size == found.get_output_embeddings().weight.shape[0]


def test_new_tokens_beside_a_base_in_4_bits(
    make_attempt: MakeAttempt, run_here: RunHere, tmp_path: Path, rows: Path
) -> None:
    path = make_model(tmp_path / "base", vocab_size=FIRST)
    changes = {"quantization": "nf4", "output": {"merged": True}}
    ran = run_here(make_attempt(request(path, rows, changes)))
    merged_model = load(ran.directory.scratch / "outputs" / "merged")
    assert merged_model.get_input_embeddings().weight.shape[0] == FIRST + 2


def test_an_adapter_with_new_tokens_is_merged_with_its_tokenizer(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path
) -> None:
    ran = run_here(make_attempt(request(model, rows)))
    adapters = [{"source": f"file://{adapter_of(ran)}"}]
    changes = {
        "model": {"new_tokens": []}, "dataset": None, "adapter": None, "training": None,
        "method": {"sft": None, "merge": {"adapters": adapters}},
    }  # fmt: skip
    found = run_here(make_attempt(merged(request(model, rows), changes), job="merge")).directory.scratch / "outputs"
    tokenizer = load_tokenizer(source(found / "merged"), ran.run.spec.model.model_copy(update={"new_tokens": ()}))
    assert tokenizer("<end>")["input_ids"] == [0, FIRST + 1]
    assert load(found / "merged").get_input_embeddings().weight.shape[0] >= FIRST + 2


def test_an_adapter_with_new_tokens_answers_beside_its_base(
    make_attempt: MakeAttempt, run_here: RunHere, model: Path, rows: Path, tmp_path: Path
) -> None:
    outputs = run_here(make_attempt(request(model, rows, {"output": {"merged": True}}))).directory.scratch / "outputs"
    jobs = (candidate("one-1", outputs / "adapter"), candidate("whole-1", outputs / "merged", base=model))
    found = answers_here(Wanted(jobs=jobs, scratch=str(tmp_path)))
    assert found["one-1"] == found["whole-1"]
    assert found["base"] == plain_peft(model, None, max_new_tokens=12)


def test_a_token_that_the_model_has_is_refused(make_attempt: MakeAttempt, run_here: RunHere, rows: Path) -> None:
    with pytest.raises(RunFailed, match=r"model\.new_tokens: '</s>' is a token of the model already\.") as caught:
        run_here(make_attempt({"model": {"new_tokens": ["<end>", "</s>"]}, "dataset": {"source": f"file://{rows}"}}))
    assert caught.value.code == TrainerExit.USER and caught.value.fix == "Remove it from model.new_tokens."


def test_growing_touches_nothing_that_was_there(tiny_model: Path) -> None:
    found, before = load(tiny_model), load(tiny_model)
    grow(found, 300)
    assert torch.equal(found.get_input_embeddings().weight[:264], before.get_input_embeddings().weight)
    assert (found.lm_head.weight[264:] == before.lm_head.weight.mean(0)).all()
    grow(found, 10)
    assert found.config.vocab_size == 300


@pytest.mark.slow
def test_two_processes_train_new_tokens_as_one_does(
    make_attempt: MakeAttempt, start: Start, model: Path, rows: Path
) -> None:
    def run(job: str, **launch: Any) -> Attempt:
        attempt = make_attempt(request(model, rows), job=job, **launch)
        assert start(attempt).wait(240) == 0, attempt.exit()
        return attempt

    one, two = run("one", micro_batch_size=4), run("two", processes=2, micro_batch_size=2)
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
