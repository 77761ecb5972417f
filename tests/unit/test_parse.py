"""Bad requests: every violation at once, each with path, value and fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.errors import InvalidRequest
from hone.spec.parse import load, load_chain, parse


def good(**changes: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {}},
        **changes,
    }


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown field": (good(training={"learnig_rate": 1}), "training.learnig_rate", "Did you mean learning_rate?"),
    "name of another tool": (good(training={"lora_alpha": 1}), "training.lora_alpha", "adapter.lora.alpha"),
    "field of another part": (good(rank=3), "rank", "adapter.lora.rank"),
    "remote code": (
        good(model={"source": "hf://a/b", "trust_remote_code": True}),
        "model.trust_remote_code",
        "never runs",
    ),
    "a function in no file of Python": (
        good(method={"ppo": {"rewards": [{"python": {"file": "hf://org/functions"}}]}}),
        "method.ppo.rewards.0.python.file",
        "no file of Python",
    ),
    "a function that cannot have its name": (
        good(method={"ppo": {"rewards": [{"python": {"file": "s3://b/f.py", "function": "a b"}}]}}),
        "method.ppo.rewards.0.python.function",
        "no name of a function",
    ),
    "two methods": (good(method={"sft": {}, "dpo": {}}), "method", "sft and dpo are given"),
    "no method": (good(method={}), "method", "none is given"),
    "unknown method": (good(method={"sfft": {}}), "method.sfft", "Did you mean sft?"),
    "wrong type": (good(training={"epochs": "many"}), "training.epochs", "'many' is not a number"),
    "fraction for a count": (good(training={"max_steps": 1.5}), "training.max_steps", "1.5 is not a whole number"),
    "true for a number": (good(training={"max_steps": True}), "training.max_steps", "a number is expected"),
    "text for true or false": (good(method={"sft": {"packing": "maybe"}}), "method.sft.packing", "not true or false"),
    "rank zero": (good(adapter={"lora": {"rank": 0}}), "adapter.lora.rank", "at least 1. Usual: 8 to 64."),
    "infinite rate": (good(training={"adam_epsilon": float("inf")}), "training.adam_epsilon", "finite"),
    "mapping expected": (good(training=[1]), "training", "a mapping of fields"),
    "word of a list": (good(quantization="nf5"), "quantization", "Did you mean nf4?"),
    "word of an open list": (good(training={"scheduler": "cosin"}), "training.scheduler", "cosine"),
    "source without scheme": (good(model={"source": "mistral"}), "model.source", "hf://organisation/name"),
    "relative file": (good(model={"source": "file://x"}), "model.source", "not absolute"),
    "no such repository": (good(model={"source": "hf://a/b/c/d"}), "model.source", "hf://organisation/name"),
    "upper-case name": (good(name="Demo"), "name", "lower-case"),
    "long name": (good(name="x" * 45), "name", "44"),
    "label": (good(labels={"team": "a b"}), "labels.team", "label"),
    "missing name": ({k: v for k, v in good().items() if k != "name"}, "name", "is required"),
    "missing data set": ({k: v for k, v in good().items() if k != "dataset"}, "dataset", "required by sft"),
    "nf4 without adapter": (good(quantization="nf4"), "quantization", "add an adapter"),
    "fsdp": (good(compute={"strategy": "fsdp"}), "compute.strategy", "zero3"),
    "epochs and steps": (good(training={"epochs": 1, "max_steps": 2}), "training.max_steps", "give one"),
    "two warm-ups": (good(training={"warmup_ratio": 0.1, "warmup_steps": 2}), "training.warmup_steps", "give one"),
    "warm-up longer than the run": (
        good(training={"max_steps": 5, "warmup_steps": 5}),
        "training.warmup_steps",
        "below",
    ),
    "a new token that is none": (
        good(model={"source": "hf://a/b", "new_tokens": [" <x>"]}),
        "model.new_tokens.0",
        "white space around it",
    ),
    "a new token twice": (
        good(model={"source": "hf://a/b", "new_tokens": ["<x>", "<y>", "<x>"]}),
        "model.new_tokens.2",
        "is named before",
    ),
    "rows of an embedding that is trained whole": (
        good(
            model={"source": "hf://a/b", "new_tokens": ["<x>"]},
            adapter={"lora": {"modules_to_save": ["embed_tokens"]}},
        ),
        "model.new_tokens",
        "trains whole (embed_tokens)",
    ),
    "batch contradiction": (
        good(
            training={"micro_batch_size": 4, "gradient_accumulation_steps": 4, "global_batch_size": 32},
            compute={"gpus_per_node": 1},
        ),
        "training.global_batch_size",
        "= 16",
    ),
    "batch that does not divide": (
        good(training={"micro_batch_size": 3, "global_batch_size": 16}),
        "training.global_batch_size",
        "multiple of 3",
    ),
    "processes and GPUs": (
        good(compute={"gpus_per_node": 2, "processes_per_node": 3}),
        "compute.processes_per_node",
        "one process for each GPU",
    ),
    "bf16 on a CPU": (
        good(compute={"gpus_per_node": 0}, training={"precision": "bf16"}),
        "training.precision",
        "set auto or fp32",
    ),
    "evaluation without data": (good(training={"eval": {"steps": 5}}), "training.eval.steps", "eval_fraction"),
    "best without steps": (
        good(dataset={"source": "hf://a/b", "eval_fraction": 0.1}, training={"eval": {"keep_best": True}}),
        "training.eval.keep_best",
        "needs training.eval.steps",
    ),
    "patience without best": (
        good(dataset={"source": "hf://a/b", "eval_fraction": 0.1}, training={"eval": {"early_stopping_patience": 2}}),
        "training.eval.early_stopping_patience",
        "keep_best",
    ),
    "two evaluation sets": (
        good(dataset={"source": "hf://a/b", "eval_fraction": 0.1, "eval_split": "test"}),
        "dataset.eval_fraction",
        "give one",
    ),
    "a split that is none": (
        good(dataset={"source": "hf://a/b", "split": "train[10-20]"}),
        "dataset.split",
        "write train, train[:5000]",
    ),
    "a mixed split that is none": (
        good(dataset={"source": "hf://a/b", "mix": [{"source": "hf://a/c", "split": "train++test"}]}),
        "dataset.mix.0.split",
        "'' is not a split",
    ),
    "a weight of nothing": (
        good(dataset={"source": "hf://a/b", "mix": [{"source": "hf://a/c", "weight": 0}]}),
        "dataset.mix.0.weight",
        "is too small",
    ),
    "a job among the data": (
        good(dataset={"source": "hf://a/b", "mix": [{"source": "job://sft/adapter"}]}),
        "dataset.mix.0.source",
        "leaves models and adapters, no data set",
    ),
    "format of another method": (
        good(dataset={"source": "hf://a/b", "format": "preference"}),
        "dataset.format",
        "messages",
    ),
    "head as a target": (
        good(adapter={"lora": {"target_modules": ["q_proj", "lm_head"]}}),
        "adapter.lora.target_modules",
        "modules_to_save",
    ),
    "no target": (good(adapter={"lora": {"target_modules": []}}), "adapter.lora.target_modules", "is empty"),
    "bad expression": (good(adapter={"lora": {"target_modules": "re:("}}), "adapter.lora.target_modules", "expression"),
    "all-linear and more": (
        good(adapter={"lora": {"target_modules": ["all-linear", "x"]}}),
        "adapter.lora.target_modules",
        "stands alone",
    ),
    "credentials in an address": (good(dataset={"source": "s3://key:pw@bucket/x"}), "dataset.source", "of a Secret"),
    "user in an address": (good(dataset={"source": "s3://key@bucket/x"}), "dataset.source", "user-info"),
    "label of ours": (good(labels={"hone.dev/job": "x"}), "labels.hone.dev/job", "label"),
    "label without a name": (good(labels={"": "x"}), "labels.", "label"),
    "queue without a name": (good(scheduling={"queue": ""}), "scheduling.queue", "label"),
    "priority without a queue": (good(scheduling={"priority": "high"}), "scheduling.priority", "scheduling.queue"),
    "unknown tracker": (good(reporting={"trackers": "comet"}), "reporting.trackers", "wandb"),
    "hub repository": (good(output={"hub": {"repo": "name"}}), "output.hub.repo", "organisation/name"),
    "more steps than the wire carries": (
        good(training={"max_steps": 2**31}),
        "training.max_steps",
        "2147483648 is too large: max_steps is at most 2147483647",
    ),
    "more rows than the wire carries, as a text": (
        good(training={"micro_batch_size": "4000000000"}),
        "training.micro_batch_size",
        "at most 2147483647",
    ),
    "a deadline of centuries": (good(scheduling={"deadline": "999999d"}), "scheduling.deadline", "too large"),
    "short deadline": (good(scheduling={"deadline": "5s"}), "scheduling.deadline", "at least 60"),
}


@pytest.mark.parametrize(("data", "path", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_names_the_field_and_the_fix(data: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(data)
    found = {violation.path: violation.message for violation in caught.value.violations}
    assert path in found
    assert words in found[path]
    assert len(found) == 1, f"one fault, but also: {found}"


TOKENS = {
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an AWS access key": "AKIA" + "IOSFODNN7EXAMPLE",
    "a private key": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE\n",
    "a GitHub token": "ghp_" + "aB3" * 12,
    "a JSON web token": ".".join(["eyJ" + "a" * 12, "eyJ" + "b" * 12, "c" * 12]),
    "an address with user-info": "https://me:" + "pass@example.com/x",
}
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "model.system_prompt": lambda text: {"model": {"source": "hf://a/b", "system_prompt": f"Use {text} for all."}},
    "model.chat_template": lambda text: {"model": {"source": "hf://a/b", "chat_template": text}},
    "dataset.columns.text": lambda text: {"dataset": {"source": "hf://a/b", "columns": {"text": text}}},
    "labels.team": lambda text: {"labels": {"team": text}},
    "model.new_tokens": lambda text: {"model": {"source": "hf://a/b", "new_tokens": ["x", text]}},
    "training.learning_rate": lambda text: {"training": {"learning_rate": text}},
    "output.token": lambda text: {"output": {"token": text}},
    "output.hub": lambda text: {"output": {"hub": [{"repo": text}]}},
}


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("place", PLACES)
def test_a_text_that_looks_like_a_token_is_refused_and_never_repeated(kind: str, place: str) -> None:
    token = TOKENS[kind]
    with pytest.raises(InvalidRequest) as caught:
        parse(good(**PLACES[place](token)))
    found = {violation.path: violation for violation in caught.value.violations}
    assert kind in found[place].message
    assert "of a Secret" in found[place].message
    shown = [str(caught.value), *(repr(violation.value) for violation in caught.value.violations)]
    assert not [text for text in shown if token in text or token.split()[-1] in text]


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@main",
        "hf_",
        "AKIA is a prefix",
        "https://example.com/@me?x=a@b.example",
        "file:///data/a@b",
        "d2a9a3ce0b1f4f0e9a2d6f3c5b8e7d1a4c6f8e0b",
        "mail me@example.com",
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_what_only_resembles_a_token_is_let_through(text: str) -> None:
    spec = parse(good(model={"source": "hf://org/name", "system_prompt": text}))
    assert spec.model.system_prompt == text


def test_faults_of_fields_and_of_their_combinations_come_together() -> None:
    data = good(name="X", quantization="nf4", training={"learnig_rate": 1, "epochs": 1, "max_steps": 1}, model={})
    with pytest.raises(InvalidRequest) as caught:
        parse(data)
    paths = {violation.path for violation in caught.value.violations}
    assert paths == {"name", "quantization", "training.learnig_rate", "training.max_steps", "model.source"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


REQUEST = "name: demo\nmodel: {source: 'file://base'}\ndataset: {source: 'file:///data.jsonl'}\nmethod: {sft: {}}\n"


def test_relative_files_stand_beside_the_request(tmp_path: Path) -> None:
    spec = load(write(tmp_path, REQUEST))
    assert spec.model.source == f"file://{tmp_path}/base"
    assert spec.dataset is not None
    assert spec.dataset.source == "file:///data.jsonl"


def test_set_overrides_the_file_with_yaml_values(tmp_path: Path) -> None:
    spec = load(write(tmp_path, REQUEST), ["training.epochs=2", "adapter.lora.rank=8", "method.sft.packing=true"])
    assert spec.training.epochs == 2
    assert spec.adapter is not None
    assert spec.adapter.lora.rank == 8
    assert spec.method.sft is not None
    assert spec.method.sft.packing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", 'the key "name" is given twice'),
        ("{", "is not valid YAML"),
        ("", "holds no request"),
        ("- a\n", "holds no request"),
        ("name: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_request_says_why(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        load(write(tmp_path, text))


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.yaml: no such file"):
        load(tmp_path / "missing.yaml")


def test_a_set_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="path=value"):
        load(write(tmp_path, REQUEST), ["training.epochs"])


def test_a_command_for_one_request_refuses_a_chain(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds 2 requests"):
        load(write(tmp_path, REQUEST + "---\n" + REQUEST))


CHAIN = """
name: judge
model: {source: "hf://a/b"}
dataset: {source: "file://pairs.jsonl"}
method: {reward: {}}
---
name: policy
model: {source: "hf://a/b"}
dataset: {source: "hf://a/c"}
adapter: {lora: {}}
method: {ppo: {rewards: [{model: {source: "job://judge"}}]}}
"""


def test_a_chain_is_read_in_its_order(tmp_path: Path) -> None:
    judge, policy = load_chain(write(tmp_path, CHAIN))
    assert (judge.name, policy.name) == ("judge", "policy")
    assert judge.dataset and judge.dataset.source == f"file://{tmp_path}/pairs.jsonl"
    assert len(load_chain(write(tmp_path, REQUEST))) == 1


def test_everything_wrong_in_a_chain_is_told_with_the_request_that_has_it(tmp_path: Path) -> None:
    judge, policy = CHAIN.strip().split("---\n")
    text = "\n---\n".join([judge.replace("hf://a/b", "nowhere"), policy, policy, "- 1"])
    with pytest.raises(InvalidRequest) as caught:
        load_chain(write(tmp_path, text))
    found = [str(violation) for violation in caught.value.violations]
    assert any(one.startswith("judge: model.source: ") for one in found)
    assert "policy: name: is given twice in this file." in found
    assert "document 4: is no mapping of a request's fields." in found


def test_a_request_of_a_chain_comes_after_what_it_needs(tmp_path: Path) -> None:
    judge, policy = CHAIN.strip().split("---\n")
    with pytest.raises(InvalidRequest, match=r"policy: method.ppo.rewards.0.model.source: judge stands later"):
        load_chain(write(tmp_path, f"{policy}\n---\n{judge}"))
