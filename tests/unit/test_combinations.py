"""The table of what may stand together, held against the parser: every pair of every two axes."""

from itertools import combinations, product
from typing import Any

import pytest

from hone.errors import InvalidRequest, NotServed
from hone.spec.combinations import AXES, FORMATS, RULES, UNSERVED, Rule, choices, refuse_unserved
from hone.spec.parse import parse

_REWARDS = [{"regex": {"pattern": "x"}}]
_METHODS: dict[str, Any] = {
    "sft": {},
    "dpo": {},
    "reward": {},
    "ppo": {"rewards": _REWARDS},
    "grpo": {"rewards": _REWARDS},
    "merge": {"adapters": [{"source": "hf://org/adapter"}]},
}


def request(**chosen: str) -> dict[str, Any]:
    """A request that stands on these values of the axes, and on harmless ones elsewhere."""
    method = chosen.get("method", "sft")
    lora: dict[str, Any] = {"dropout": 0.1} if chosen.get("dropout") == "positive" else {}
    adapted = chosen.get("weights", "lora" if method != "merge" else "full") == "lora" or bool(lora)
    data: dict[str, Any] = {
        "name": "pair",
        "model": {"source": "hf://org/model"},
        "method": {method: dict(_METHODS[method])},
        "training": {"optimizer": chosen.get("optimizer", "adamw"), "precision": chosen.get("precision", "auto")},
        "compute": {"strategy": chosen.get("strategy", "auto")},
        "output": {"merged": chosen.get("merged") == "on"},
    }
    if method != "merge":
        data["dataset"] = {"source": "hf://org/data"}
    if chosen.get("packing") == "on":
        data["method"] = {"sft": {"packing": True}} if method == "sft" else {method: {"packing": True}}
    if adapted:
        data["adapter"] = {"lora": lora}
    if chosen.get("quantization") == "nf4":
        data["quantization"] = "nf4"
    return data


def possible(chosen: dict[str, str]) -> bool:
    """Whether the shape of the request can say it at all: packing is a field of sft, dropout of an adapter."""
    if chosen.get("packing") == "on" and chosen.get("method", "sft") != "sft":
        return False
    return not (chosen.get("dropout") == "positive" and chosen.get("weights") == "full")


PAIRS = [
    {first: a, second: b}
    for first, second in combinations(AXES, 2)
    for a, b in product(AXES[first], AXES[second])
    if possible({first: a, second: b})
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair.values()))
def test_every_pair_is_refused_exactly_when_the_table_says_so(pair: dict[str, str]) -> None:
    data = request(**pair)
    try:
        stands_on = choices(parse(data))
        paths: set[str] = set()
        assert pair.items() <= stands_on.items()
    except InvalidRequest as error:
        paths = {violation.path for violation in error.violations}
        stands_on = _chosen_by(data)
    expected = {rule.path for rule in RULES if rule.when.items() <= stands_on.items()}
    assert paths == expected


def _chosen_by(data: dict[str, Any]) -> dict[str, str]:
    """The axes' values read from the plain mapping, without the code under test."""
    method = next(iter(data["method"]))
    lora = data.get("adapter", {}).get("lora")
    return {
        "method": method,
        "weights": "full" if lora is None else "lora",
        "quantization": data.get("quantization", "none"),
        "strategy": data["compute"]["strategy"],
        "optimizer": data["training"]["optimizer"],
        "precision": data["training"]["precision"],
        "packing": "on" if data["method"][method].get("packing") else "off",
        "dropout": "positive" if lora and lora.get("dropout") else "zero",
        "merged": "on" if data["output"]["merged"] else "off",
    }


@pytest.mark.parametrize("rule", [*RULES, *UNSERVED], ids=lambda rule: rule.path + "-" + "-".join(rule.when.values()))
def test_every_rule_names_known_values_and_a_fix(rule: Rule) -> None:
    for axis, value in rule.when.items():
        assert value in AXES[axis]
    assert rule.message.endswith(".")
    assert any(word in rule.message for word in (": ", ";", " is.", " are."))


DPO_RULES = {
    "no loss": ({"loss": []}, "method.dpo.loss"),
    "a loss twice": ({"loss": ["ipo", "ipo"]}, "method.dpo.loss"),
    "an unknown loss": ({"loss": ["sigmoid", "simpo"]}, "method.dpo.loss"),
    "a smoothing that sigmoid would ignore": ({"label_smoothing": 0.1}, "method.dpo.label_smoothing"),
    "exo_pair without its smoothing": ({"loss": ["exo_pair"]}, "method.dpo.label_smoothing"),
}


@pytest.mark.parametrize("name", DPO_RULES)
def test_what_a_dpo_loss_would_ignore_or_cannot_do_is_refused(name: str) -> None:
    options, path = DPO_RULES[name]
    with pytest.raises(InvalidRequest) as caught:
        parse({**request(method="dpo"), "method": {"dpo": options}})
    assert [violation.path for violation in caught.value.violations] == [path]


def test_an_adapter_that_changes_the_bases_biases_gives_no_reference_when_it_is_switched_off() -> None:
    data = request(method="dpo")
    data["adapter"] = {"lora": {"bias": "all"}}
    with pytest.raises(InvalidRequest, match="gives no reference"):
        parse(data)
    parse({**data, "method": {"dpo": {"precompute_reference": True}}})


def test_margins_are_for_reward_and_sample_prompts_are_not() -> None:
    margin = {"source": "hf://org/data", "eval_split": "test", "columns": {"margin": "gap"}}
    parse({**request(method="reward"), "dataset": margin})
    with pytest.raises(InvalidRequest, match="dpo knows no margins"):
        parse({**request(method="dpo"), "dataset": margin})
    samples = {"samples": {"prompts": 2}}
    with pytest.raises(InvalidRequest, match="answers no prompts"):
        parse({**request(method="reward"), "dataset": margin, "reporting": samples})


@pytest.mark.parametrize(
    "served",
    [
        {},
        {"quantization": "nf4"},
        {"method": "merge"},
        {"method": "dpo"},
        {"method": "dpo", "weights": "full"},
        {"method": "reward"},
        {"method": "reward", "weights": "full"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "paged_adamw_8bit", "weights": "full"},
        {"optimizer": "adamw_bf16_sr", "weights": "full"},
        {"strategy": "zero2", "quantization": "nf4"},
        {"strategy": "zero3"},
        {"strategy": "zero3", "method": "dpo", "weights": "full"},
    ],
    ids=lambda chosen: "-".join(chosen.values()) or "plain",
)
def test_what_runs_is_served(served: dict[str, str]) -> None:
    refuse_unserved(parse(request(**served)))


def test_a_push_to_the_hub_is_served() -> None:
    refuse_unserved(parse({**request(), "output": {"hub": {"repo": "org/name", "branch": "v1"}}}))


def test_strategies_that_a_method_does_not_run_under_yet_are_not_promised() -> None:
    for method, strategy in (("ppo", "zero2"), ("grpo", "zero2"), ("grpo", "zero3")):
        with pytest.raises(NotServed, match=f"{method} under strategy {strategy} is not served"):
            refuse_unserved(parse(request(method=method, strategy=strategy)))


def test_all_that_is_not_served_is_told_at_once() -> None:
    data = request(strategy="zero3", quantization="nf4", method="dpo")
    data["model"]["new_tokens"] = ["<x>"]
    data["method"] = {"dpo": {"precompute_reference": True}}
    with pytest.raises(NotServed) as caught:
        refuse_unserved(parse(data))
    expected = ("4-bit", "precompute_reference", "new_tokens")
    assert all(word in str(caught.value) for word in expected)


def test_every_method_says_which_rows_it_reads() -> None:
    assert set(FORMATS) == set(AXES["method"])


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"training": {"learning_rate": 1e-4}}, "training.learning_rate"),
        ({"training": {"seed": 3}}, "training.seed"),
        ({"compute": {"gpus_per_node": 1}}, "compute.gpus_per_node"),
        ({"compute": {"nodes": 2}}, "compute.nodes"),
        ({"compute": {"processes_per_node": 2}}, "compute.processes_per_node"),
    ],
)
def test_what_a_merge_would_ignore_is_refused(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({**request(method="merge"), **changes})
    assert [violation.path for violation in caught.value.violations] == [path]
    assert "remove it" in caught.value.violations[0].message
