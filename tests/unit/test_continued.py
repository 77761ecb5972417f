import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.errors import InvalidRequest
from hone.machine import Planner, plan_here
from hone.modelinfo import BadConfig, SavedAdapter
from hone.plan import Hardware
from hone.plan.continued import continued, lora_of
from hone.spec import Adapter, JobSpec, Lora
from hone.spec.parse import parse

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "target_modules": ("k_proj", "q_proj")}


def adapter(**config: Any) -> SavedAdapter:
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config}
    return SavedAdapter(source="file:///adapter", config=values, identity={})


def request(**changes: Any) -> JobSpec:
    source = {"model": {"source": "file:///adapter"}, "dataset": {"source": "file:///rows.jsonl"}}
    return parse({"name": "more", **source, "method": {"sft": {}}, **changes})


def test_an_adapter_tells_its_settings_as_a_request_would() -> None:
    saved = adapter(use_dora=True, modules_to_save=["lm_head"], lora_dropout=0.1, bias="all")
    assert lora_of(saved) == Lora(
        rank=4, alpha=8.0, dropout=0.1, bias="all", target_modules=("k_proj", "q_proj"), modules_to_save=("lm_head",),
        use_dora=True,
    )  # fmt: skip
    assert lora_of(adapter(target_modules=".*q_proj")).target_modules == ("re:.*q_proj",)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"rank_pattern": {"q_proj": 2}}, "was made with rank_pattern"), ({"r": 0}, "rank: Input should be greater")],
)
def test_what_a_request_could_not_say_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        lora_of(adapter(**config))


@pytest.mark.parametrize("changes", [{}, {"adapter": {"lora": {}}}, {"adapter": {"lora": {"rank": 4}}}])
def test_the_settings_are_the_adapters(changes: dict[str, Any]) -> None:
    spec = continued(request(**changes), lora_of(adapter()))
    assert spec.adapter == Adapter(lora=Lora(rank=4, alpha=8.0, target_modules=("k_proj", "q_proj")))


def test_dropout_is_the_requests_because_it_is_of_the_training() -> None:
    spec = continued(request(adapter={"lora": {"dropout": 0.2}}), lora_of(adapter(lora_dropout=0.1)))
    assert spec.adapter is not None
    assert spec.adapter.lora.dropout == 0.2


def test_no_tokens_are_added_to_an_adapter() -> None:
    spec = request(model={"source": "file:///adapter", "new_tokens": ["<x>"]})
    with pytest.raises(InvalidRequest, match=r"model\.new_tokens: cannot be added to the adapter"):
        continued(spec, lora_of(adapter()))


def test_a_request_that_contradicts_the_adapter_is_refused_field_by_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        continued(request(adapter={"lora": {"rank": 8, "use_dora": True}}), lora_of(adapter()))
    assert [violation.path for violation in caught.value.violations] == ["adapter.lora.rank", "adapter.lora.use_dora"]
    assert "is 4 in the adapter that training goes on from: remove it." in str(caught.value)


def test_rules_hold_for_what_was_taken_from_the_adapter_too() -> None:
    full = request(training={"optimizer": "adamw_bf16_sr"})
    with pytest.raises(InvalidRequest, match="an adapter's weights are fp32"):
        continued(full, lora_of(adapter()))


def test_a_request_for_an_adapters_directory_is_planned_with_its_base_and_its_settings(
    inputs: Path, make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    hardware = Hardware(profiles={}, cpu_cores=2, memory_bytes=8 << 30)
    base = make_spec().model.source
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**adapter().config}))
    (tmp_path / "a" / "hone_base.json").write_text(json.dumps({"source": base, "revision": ""}))
    spec = make_spec(model={"source": f"file://{tmp_path}/a"})
    planned, new = plan_here(spec, hardware), plan_here(make_spec(adapter={"lora": LORA}), hardware)
    assert planned.spec.model.source == f"file://{tmp_path}/a"
    assert planned.spec.adapter == Adapter(lora=Lora(**LORA))
    assert planned.plan.trainable_parameters == new.plan.trainable_parameters
    (tmp_path / "a" / "hone_base.json").write_text(json.dumps({"source": "file:///nowhere"}))
    with pytest.raises(InvalidRequest, match=r"is an adapter, and of its base: file:///nowhere has no config\.json"):
        plan_here(spec, hardware)


def test_merge_wants_the_base_as_its_model() -> None:
    merge = parse(
        {"name": "m", "model": {"source": "file:///a"}, "method": {"merge": {"adapters": [{"source": "file:///a"}]}}}
    )
    with pytest.raises(InvalidRequest, match=r"name the adapter under method\.merge\.adapters"):
        continued(merge, lora_of(adapter()))


@pytest.mark.parametrize(("quantization", "bases"), [("nf4", 2), ("", 1), (None, 1)])
def test_a_merge_of_adapters_of_a_base_in_4_bits_needs_memory_for_that_base_too(
    tmp_path: Path, quantization: str | None, bases: int
) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    )
    if quantization is not None:
        (tmp_path / "hone_base.json").write_text(json.dumps({"quantization": quantization}))
    adapters = [{"source": f"{tmp_path.as_uri()}"}, {"source": "hf://o/adapter"}]
    model = {"source": "hf://mistralai/Mistral-7B-v0.3"}
    merge = parse({"name": "m", "model": model, "method": {"merge": {"adapters": adapters}}})
    hardware = Hardware(profiles={}, cpu_cores=2, memory_bytes=128 << 30)
    planned, planner = plan_here(merge, hardware), Planner(hardware)(merge)
    assert planned == planner and planned.spec.quantization is None
    sizes = {item.name: item.size_bytes for item in planned.plan.memory}
    assert sizes["weights"] + sizes.get("base", 0) == bases * 4 * 7_248_023_552
