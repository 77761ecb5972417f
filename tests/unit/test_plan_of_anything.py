"""Whatever a valid request asks for, it is planned, and what it fixed stays fixed."""

import random
from typing import Any

import pytest

from hone.errors import InvalidRequest
from hone.gpus import load_profiles
from hone.modelinfo import load_shape
from hone.modelinfo.sources import shipped_configs
from hone.plan import Hardware, Planned, make_plan
from hone.spec import JobSpec
from hone.spec.parse import parse

PROFILES = load_profiles()
HARDWARE = Hardware(profiles=PROFILES, cpu_cores=8, memory_bytes=64 << 30)
MODELS = sorted(shipped_configs())
REWARDS = [{"regex": {"pattern": "x"}}, {"model": {"source": "hf://a/judge"}}]


def drawn(pick: random.Random) -> dict[str, Any]:
    """A request; some are refused for what does not go together."""

    def some(**choices: list[Any]) -> dict[str, Any]:
        """Each value with one chance in two."""
        return {name: pick.choice(values) for name, values in choices.items() if pick.random() < 0.5}

    method = pick.choice(["sft", "sft", "dpo", "reward", "ppo", "grpo"])
    part: dict[str, Any] = some(max_length=[64, 512, 2048, 8192])
    if method in ("ppo", "grpo"):
        part = {"rewards": [pick.choice(REWARDS)], **some(max_prompt_length=[64, 512], max_new_tokens=[16, 128, 1024])}
    if method == "sft":
        part |= some(packing=[True, False])
    request: dict[str, Any] = {
        "name": "drawn",
        "model": {"source": f"hf://{pick.choice(MODELS)}", **some(attention=["auto", "sdpa", "eager"])},
        "dataset": {"source": "hf://org/data"},
        "method": {method: part},
        "training": some(
            micro_batch_size=[1, 2, 8],
            gradient_accumulation_steps=[1, 4],
            activation_checkpointing=[True, False],
            optimizer=["adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_bf16_sr"],
            max_steps=[1, 1000],
        ),
        "compute": some(
            gpu=sorted(PROFILES), gpus_per_node=[0, 1, 2, 8], nodes=[1, 2], strategy=["auto", "ddp", "zero3"]
        ),
    }
    if pick.random() < 0.7:
        request["adapter"] = {
            "lora": some(rank=[1, 16, 256], dropout=[0.0, 0.1], use_dora=[True], bias=["all", "none"])
        }
        request |= some(quantization=["nf4"])
    return request


def check(spec: JobSpec, planned: Planned) -> None:
    plan, launch = planned.plan, planned.plan.launch
    assert sum(item.size_bytes for item in plan.memory) == plan.peak_bytes
    assert plan.fits is (plan.peak_bytes <= plan.capacity_bytes)
    assert plan.fits or all(other.peak_bytes > 0 for other in plan.alternatives)
    fixed = {
        "micro_batch_size": launch.micro_batch_size,
        "gradient_accumulation_steps": launch.gradient_accumulation_steps,
        "activation_checkpointing": launch.activation_checkpointing,
    }
    for name, chosen in fixed.items():
        asked = getattr(spec.training, name)
        is_told_otherwise = spec.method.ppo and name == "gradient_accumulation_steps"  # its mini-batch decides
        assert asked is None or asked == chosen or is_told_otherwise, name
    assert spec.compute.gpu in (None, plan.gpu)
    assert spec.compute.gpus_per_node in (None, launch.gpus_per_node)
    assert spec.compute.nodes == launch.nodes
    assert spec.compute.strategy in ("auto", launch.strategy) or launch.strategy == "none"


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_valid_request_is_planned_or_refused_with_its_field(count: int) -> None:
    pick, planned = random.Random(count), 0
    while planned < count:
        try:
            spec = parse(drawn(pick))
        except InvalidRequest:
            continue
        try:
            check(spec, make_plan(spec, load_shape(spec.model.source), HARDWARE))
            planned += 1
        except InvalidRequest as refused:
            assert all(violation.path and violation.message for violation in refused.violations)
