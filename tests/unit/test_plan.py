"""The plan: what it decides, what it keeps, what it answers when nothing fits."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.errors import InvalidRequest
from hone.gpus import load_profiles
from hone.job import Launch, Plan
from hone.modelinfo import load_shape
from hone.plan import Hardware, Planned, make_plan
from hone.plan.memory import NF4_BYTES
from hone.spec.parse import parse

PROFILES = load_profiles()
GIB = 1024**3
LAPTOP = Hardware(profiles=PROFILES, installed=(), cpu_cores=2, memory_bytes=24 * GIB)
MISTRAL = "hf://mistralai/Mistral-7B-v0.3"


def plan(hardware: Hardware = LAPTOP, **changes: Any) -> Planned:
    data = {
        "name": "demo",
        "model": {"source": MISTRAL},
        "dataset": {"source": "hf://org/data"},
        "method": {"sft": {"max_length": 2048}},
        **changes,
    }
    spec = parse(data)
    return make_plan(spec, load_shape(spec.model.source), hardware)


def installed(name: str, count: int) -> Hardware:
    return Hardware(profiles=PROFILES, installed=(PROFILES[name],) * count, cpu_cores=16, memory_bytes=512 * GIB)


def test_the_usual_tutorial_counts_what_peft_counts() -> None:
    answer = plan(adapter={"lora": {"rank": 16}}).plan
    assert answer.parameters == 7_248_023_552
    assert answer.trainable_parameters == 41_943_040


def test_qlora_of_7b_fits_a_24_gib_card_and_its_weights_are_4_13_gb() -> None:
    answer = plan(
        adapter={"lora": {"target_modules": "attention"}}, quantization="nf4", compute={"gpu": "RTX-4090"}
    ).plan
    assert answer.fits
    weights = next(item for item in answer.memory if item.name == "weights nf4")
    assert weights.size_bytes == int(6_979_321_856 * NF4_BYTES + 268_701_696 * 2)
    assert round(weights.size_bytes / 1e9, 2) == 4.14


def test_the_breakdown_sums_to_the_peak() -> None:
    answer = plan(adapter={"lora": {}}).plan
    assert sum(item.size_bytes for item in answer.memory) == answer.peak_bytes
    assert all(item.formula for item in answer.memory)


def test_what_does_not_fit_names_the_smallest_changes_that_do() -> None:
    planned = plan(
        model={"source": "hf://meta-llama/Llama-3.3-70B-Instruct"}, compute={"gpu": "H100-80GB", "gpus_per_node": 8}
    )
    assert not planned.plan.fits
    assert planned.plan.sentence.startswith("Does not fit: sft with full fine-tuning needs ")
    assert not planned.runs_here
    qlora = next(other for other in planned.plan.alternatives if "nf4" in other.change)
    assert qlora.peak_bytes <= PROFILES["H100-80GB"].memory_bytes


def test_what_the_caller_fixed_stays_fixed() -> None:
    answer = plan(
        adapter={"lora": {}},
        training={"micro_batch_size": 2, "gradient_accumulation_steps": 3, "activation_checkpointing": False},
        compute={"gpu": "H100-80GB", "gpus_per_node": 2, "strategy": "ddp"},
    )
    launch = answer.plan.launch
    assert (launch.micro_batch_size, launch.gradient_accumulation_steps) == (2, 3)
    assert (launch.gpus_per_node, launch.strategy, launch.activation_checkpointing) == (2, "ddp", False)
    assert answer.spec.training.global_batch_size == 12


def test_the_resolved_request_leaves_nothing_open_and_is_itself_a_valid_request() -> None:
    planned = plan(adapter={"lora": {}})
    training = planned.spec.training
    assert training.epochs == 1
    assert training.learning_rate == 2e-4
    assert training.warmup_ratio == 0.03
    assert training.precision == "bf16"
    assert training.global_batch_size == 16
    assert parse(planned.spec.to_mapping()) == planned.spec


def test_planning_the_resolved_request_again_changes_nothing() -> None:
    first = plan(adapter={"lora": {}})
    again = make_plan(first.spec, load_shape(MISTRAL), LAPTOP)
    assert again.spec == first.spec
    assert again.plan.launch == first.plan.launch


def test_a_small_model_trains_on_the_cpu_of_a_machine_without_gpus() -> None:
    planned = plan(model={"source": "hf://HuggingFaceTB/SmolLM2-135M"}, method={"sft": {"max_length": 256}})
    assert planned.runs_here
    assert planned.plan.launch.device == "cpu"
    assert planned.plan.launch.launcher == "direct"
    assert planned.spec.training.precision == "fp32"


def test_two_processes_on_a_cpu_share_the_batch() -> None:
    planned = plan(
        model={"source": "hf://HuggingFaceTB/SmolLM2-135M"},
        method={"sft": {"max_length": 128}},
        compute={"gpus_per_node": 0, "processes_per_node": 2},
        training={"global_batch_size": 8},
    )
    launch = planned.plan.launch
    assert (launch.launcher, launch.strategy, launch.world_size, launch.global_batch_size) == (
        "accelerate",
        "ddp",
        2,
        8,
    )


def test_what_needs_a_gpu_does_not_run_on_a_laptop_and_says_what_it_needs() -> None:
    planned = plan(adapter={"lora": {}}, compute={"gpu": "H100-80GB"})
    assert planned.plan.fits
    assert planned.why_not_here == "It needs 1 × H100-80GB; this machine has no GPU."


def test_installed_gpus_are_taken() -> None:
    planned = plan(installed("H100-80GB", 4), adapter={"lora": {}})
    assert planned.runs_here
    assert planned.plan.gpu == "H100-80GB"


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"adapter": {"lora": {"target_modules": "q_projj"}}}, "adapter.lora.target_modules", "Did you mean q_proj?"),
        ({"adapter": {"lora": {"modules_to_save": "lmhead"}}}, "adapter.lora.modules_to_save", "lm_head"),
        ({"compute": {"gpu": "H1000"}}, "compute.gpu", "H100-80GB"),
        (
            {"training": {"global_batch_size": 3}, "compute": {"gpus_per_node": 2, "gpu": "H200"}},
            "training.global_batch_size",
            "multiple of 2",
        ),
    ],
)
def test_what_only_the_model_or_the_hardware_can_tell_is_a_violation_too(
    changes: dict[str, Any], path: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(**changes)
    assert [violation.path for violation in caught.value.violations] == [path]
    assert words in caught.value.violations[0].message


def peak(**changes: Any) -> int:
    return plan(compute={"gpu": "H200", "gpus_per_node": 1}, **changes).plan.peak_bytes


@given(st.integers(6, 12), st.integers(0, 4), st.integers(2, 6))
def test_longer_sequences_larger_batches_and_higher_ranks_never_need_less(length: int, micro: int, rank: int) -> None:
    def needed(length: int, micro: int, rank: int) -> int:
        return peak(
            adapter={"lora": {"rank": 2**rank}},
            method={"sft": {"max_length": 2**length}},
            training={
                "micro_batch_size": 2**micro,
                "gradient_accumulation_steps": 1,
                "activation_checkpointing": True,
            },
        )

    here = needed(length, micro, rank)
    assert here <= needed(length + 1, micro, rank)
    assert here <= needed(length, micro + 1, rank)
    assert here <= needed(length, micro, rank + 1)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_more_gpus_never_need_more_memory_each(strategy: str) -> None:
    def needed(count: int) -> int:
        compute = {"gpu": "H200", "gpus_per_node": count, "strategy": strategy}
        training = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "activation_checkpointing": True}
        return plan(compute=compute, training=training).plan.peak_bytes

    assert needed(2) >= needed(4) >= needed(8)


def test_the_page_lists_exactly_the_keys_of_the_json() -> None:
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text().split("## JSON")[1]
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert listed == [field.name for part in (Plan, Launch) for field in dataclasses.fields(part)]
