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
from hone.plan.memory import MAX_LIVE_PARAMETERS, NCCL_BYTES, NF4_BYTES, REDUCE_BUCKET_SIZE
from hone.spec import Training
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


PAIRS = {"max_length": 1024}
ONE_H200 = {"gpu": "H200", "gpus_per_node": 1}


def sizes(answer: Plan) -> dict[str, int]:
    return {item.name: item.size_bytes for item in answer.memory}


def test_eager_attention_keeps_the_scores_of_all_heads() -> None:
    fixed = {"adapter": {"lora": {}}, "training": {"micro_batch_size": 2}, "compute": ONE_H200}
    eager = plan(model={"source": MISTRAL, "attention": "eager"}, **fixed).plan
    layers = 1 if eager.launch.activation_checkpointing else 32
    assert sizes(eager)["attention scores"] == layers * 2 * 32 * 2048**2 * (4 + 2)
    assert "attention scores" not in sizes(plan(**fixed).plan)


def test_an_evaluation_in_larger_batches_than_training_is_counted() -> None:
    fixed = {"adapter": {"lora": {}}, "compute": ONE_H200, "dataset": {"source": "hf://o/d", "eval_split": "test"}}
    step = {"micro_batch_size": 1, "activation_checkpointing": True}
    alike, large = plan(training=step, **fixed).plan, plan(training={**step, "eval": {"batch_size": 64}}, **fixed).plan
    assert "evaluation" not in sizes(alike)
    assert sizes(large)["evaluation"] > 64 * 2048 * 3 * 14_336 * 2
    without = {**fixed, "dataset": {"source": "hf://o/d"}}
    assert "evaluation" not in sizes(plan(training={**step, "eval": {"batch_size": 64}}, **without).plan)


def test_disk_is_for_the_base_and_for_outputs_or_checkpoints() -> None:
    parameters, trained = 7_248_023_552, 41_943_040
    adapted = plan(adapter={"lora": {}}, output={"merged": True}, compute=ONE_H200).plan
    assert adapted.output_bytes == {"adapter": 4 * trained, "merged": 2 * parameters}
    assert adapted.disk_bytes == 2 * parameters + 4 * trained + 2 * parameters
    often = {"checkpoint": {"steps": 100}}
    more = plan(adapter={"lora": {}}, output={"merged": True}, compute=ONE_H200, training=often).plan
    assert more.disk_bytes == adapted.disk_bytes + 2 * 12 * trained
    full = plan(compute=ONE_H200).plan
    assert (full.output_bytes, full.disk_bytes) == ({"model": 2 * parameters}, (2 + 2 * 12) * parameters)
    rounded = plan(compute=ONE_H200, training={"optimizer": "adamw_bf16_sr", **often}).plan
    assert rounded.disk_bytes == (2 + 3 * 6) * parameters


def test_grpo_keeps_a_reference_where_it_pays_for_its_distance() -> None:
    rewards = [{"regex": {"pattern": "x"}}]
    for beta, keeps in ((0.0, False), (0.1, True)):
        answer = plan(method={"grpo": {"rewards": rewards, "beta": beta}}, compute=ONE_H200).plan
        assert ("reference model" in sizes(answer)) is keeps


def test_a_pair_is_two_sequences() -> None:
    fixed = {"adapter": {"lora": {}}, "training": {"micro_batch_size": 2}, "compute": {"gpu": "H100-80GB"}}
    one = plan(method={"sft": {"max_length": 1024}}, **fixed).plan
    two = plan(method={"dpo": PAIRS}, **fixed).plan
    for line in ("norms", "attention", "mlp", "attention mask"):
        assert sizes(two)[line] == pytest.approx(2 * sizes(one)[line], rel=1e-6)


def test_full_dpo_keeps_a_copy_as_its_reference_unless_it_is_computed_once() -> None:
    live = plan(method={"dpo": PAIRS}, compute=ONE_H200).plan
    once = plan(method={"dpo": {**PAIRS, "precompute_reference": True}}, compute=ONE_H200).plan
    adapted = plan(method={"dpo": PAIRS}, adapter={"lora": {}}).plan
    assert sizes(live)["reference model"] == pytest.approx(4 * live.parameters, rel=1e-6)
    assert "reference model" not in {**sizes(once), **sizes(adapted)}


def test_a_reward_model_has_a_head_of_one_score_that_is_trained_beside_an_adapter() -> None:
    answer = plan(method={"reward": PAIRS}, adapter={"lora": {"rank": 16}}).plan
    assert answer.parameters == 7_248_023_552 - 32_768 * 4096 + 4096
    assert answer.trainable_parameters == 41_943_040 + 4096
    assert "logits" not in sizes(answer)
    encoder = plan(model={"source": "hf://distilbert/distilbert-base-uncased"}, method={"reward": PAIRS}).plan
    assert encoder.parameters == 66_954_241
    assert any("512 positions" in warning for warning in encoder.warnings)


@pytest.mark.parametrize("method", [{"sft": {}}, {"dpo": {}}, {"grpo": {"rewards": [{"regex": {"pattern": "x"}}]}}])
def test_an_encoder_writes_no_answers(method: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidRequest, match=r"model\.source: .*bert-base-uncased is an encoder \(bert\), which writes no"
    ):
        plan(model={"source": "hf://google-bert/bert-base-uncased"}, method=method)


def test_padded_rows_take_a_mask_in_every_layer_and_repeat_grouped_keys() -> None:
    fixed = {"adapter": {"lora": {}}, "compute": ONE_H200}
    steps = {"gradient_accumulation_steps": 1, "activation_checkpointing": False}
    one, two = (sizes(plan(training={"micro_batch_size": rows, **steps}, **fixed).plan) for rows in (1, 2))
    assert "attention mask" not in one
    assert two["attention mask"] == 2 * 2048 * 2048 * (32 * 2 + 1)
    keys, values = 8 * 128, 8 * 128
    repeated = 2 * 2048 * 32 * 2 * (2 * 32 * 128 - keys - values)
    assert two["attention"] - 2 * one["attention"] == repeated
    flash = sizes(
        plan(
            model={"source": MISTRAL, "attention": "flash_attention_2"},
            training={"micro_batch_size": 2, **steps},
            **fixed,
        ).plan
    )
    assert "attention mask" not in flash and flash["attention"] == 2 * one["attention"]


def test_lora_dropout_keeps_a_copy_of_every_adapted_input() -> None:
    fixed = {"training": {"micro_batch_size": 1, "activation_checkpointing": False}, "compute": ONE_H200}
    inputs = 32 * (3 * 4096 + 4096 + 2 * 4096 + 14336)
    dropped = sizes(plan(adapter={"lora": {"dropout": 0.05}}, **fixed).plan)
    assert dropped["dropout"] == 2048 * inputs * (2 + 1)
    assert "dropout" not in sizes(plan(adapter={"lora": {}}, **fixed).plan)


def test_a_dequantized_layer_is_no_larger_than_what_is_quantized() -> None:
    answer = plan(
        model={"source": "hf://meta-llama/Llama-3.2-1B"}, adapter={"lora": {}}, quantization="nf4", compute=ONE_H200
    ).plan
    assert sizes(answer)["dequantization"] == 2 * 2048 * 8192  # not its head of 128,256 rows, which stays as it is


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


def test_what_splits_its_work_is_planned_for_several_gpus() -> None:
    planned = plan(adapter={"lora": {}}, compute={"gpu": "H100-80GB", "strategy": "zero3"})
    assert (planned.plan.launch.strategy, planned.plan.launch.gpus_per_node) == ("zero3", 2)


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
        ({"compute": {"gpus_per_node": 1, "strategy": "zero2"}}, "compute.strategy", "and this is one: leave it out"),
    ],
)
def test_what_only_the_model_or_the_hardware_can_tell_is_a_violation_too(
    changes: dict[str, Any], path: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(**changes)
    assert [violation.path for violation in caught.value.violations] == [path]
    assert words in caught.value.violations[0].message


def test_a_merge_is_planned_for_one_process_on_the_cpu_with_the_weights_in_fp32() -> None:
    merge = {"merge": {"adapters": [{"source": "file:///adapter"}]}}
    planned = plan(method=merge, dataset=None)
    launch, parameters = planned.plan.launch, load_shape(MISTRAL).parameters
    assert (launch.device, launch.world_size, planned.plan.trainable_parameters) == ("cpu", 1, 0)
    assert 6 * parameters < planned.plan.peak_bytes < 7 * parameters + 2 * 2**30
    assert planned.spec.training == Training()
    assert planned.plan.output_bytes == {"merged": 2 * parameters}
    small = plan(Hardware(profiles=PROFILES, cpu_cores=2, memory_bytes=8 * GIB), method=merge, dataset=None).plan
    assert small.sentence.startswith("Does not fit: merge needs 44.")
    assert small.alternatives == ()


def test_stochastic_rounding_needs_eight_bytes_a_parameter_and_lets_7b_fit_80_gb() -> None:
    compute = {"gpu": "H100-80GB", "gpus_per_node": 1}
    assert not plan(compute=compute).plan.fits
    planned = plan(compute=compute, training={"optimizer": "adamw_bf16_sr", "micro_batch_size": 1})
    assert planned.plan.fits
    kept = {item.name: item.size_bytes for item in planned.plan.memory}
    assert kept["weights"] + kept["gradients"] + kept["optimizer"] == 8 * load_shape(MISTRAL).parameters


def full(**changes: Any) -> dict[str, int]:
    """The lines of full fine-tuning on H200s."""
    training = {"optimizer": "adamw_bf16_sr", "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    compute = {"gpu": "H200", "gpus_per_node": 1} | changes.pop("compute", {})
    answer = plan(compute=compute, training=training | changes).plan
    assert answer.peak_bytes == sum(item.size_bytes for item in answer.memory)
    return sizes(answer)


def test_gradients_that_come_as_activations_go_are_counted_once() -> None:
    whole = 2 * load_shape(MISTRAL).parameters
    once, twice = full(activation_checkpointing=False), full(gradient_accumulation_steps=2)
    assert twice["gradients"] == whole
    assert 0 < once["gradients"] < whole
    gone = sum(once.get(name, 0) for name in ("norms", "attention", "mlp", "head input", "logits", "backward"))
    assert whole < once["gradients"] + gone < 1.1 * whole
    longer = sizes(plan(
        compute={"gpu": "H200", "gpus_per_node": 1}, method={"sft": {"max_length": 8192}},
        training={"optimizer": "adamw_bf16_sr", "micro_batch_size": 1, "gradient_accumulation_steps": 1,
                  "activation_checkpointing": False},
    ).plan)  # fmt: skip
    assert longer["gradients"] == 2 * 32_768 * 4096  # of the head, at which the backward pass begins


def test_gradients_are_exchanged_through_buckets() -> None:
    whole = 2 * load_shape(MISTRAL).parameters
    assert "communication" not in full()
    assert full(compute={"gpus_per_node": 2})["communication"] == whole + NCCL_BYTES
    lora = {"compute": {"gpu": "H200", "gpus_per_node": 2}, "adapter": {"lora": {}}}
    found = sizes(plan(**lora).plan)
    assert found["communication"] == 4 * plan(**lora).plan.trainable_parameters + NCCL_BYTES
    for strategy, count in (("zero2", 2), ("zero3", 1)):
        compute = {"gpu": "H200", "gpus_per_node": 2, "strategy": strategy}
        assert sizes(plan(compute=compute).plan)["communication"] == count * REDUCE_BUCKET_SIZE * 2 + NCCL_BYTES
    assert sizes(plan(compute=compute).plan)["gathered layers"] == 2 * MAX_LIVE_PARAMETERS


def test_weights_that_train_in_fp32_are_converted_in_the_host_memory_of_each_process() -> None:
    llama = {"model": {"source": "hf://meta-llama/Llama-3.2-1B"}, "compute": {"gpu": "H200", "gpus_per_node": 2}}
    full, lora = plan(**llama), plan(**llama, adapter={"lora": {}})
    parameters = full.plan.parameters
    assert full.plan.host_memory_bytes - lora.plan.host_memory_bytes == 2 * 4 * parameters - 2 * parameters


def test_stochastic_rounding_computes_in_bf16_on_a_cpu_too() -> None:
    model = {"source": "hf://HuggingFaceTB/SmolLM2-135M"}
    planned = plan(model=model, training={"optimizer": "adamw_bf16_sr"}, compute={"gpus_per_node": 0})
    assert planned.plan.launch.precision == "bf16"


def test_stochastic_rounding_is_refused_on_a_gpu_without_bf16() -> None:
    [old] = [name for name, profile in PROFILES.items() if not profile.bf16][:1]
    with pytest.raises(InvalidRequest, match=f"needs a GPU that computes in bf16, and {old} does not"):
        plan(training={"optimizer": "adamw_bf16_sr"}, compute={"gpu": old, "gpus_per_node": 1})


def test_qlora_on_fused_experts_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidRequest, match=r"quantization: nf4 does not hold .*Mixtral.* experts are fused"):
        plan(model={"source": "hf://mistralai/Mixtral-8x7B-v0.1"}, adapter={"lora": {}}, quantization="nf4")


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
    page = (Path(__file__).parents[2] / "docs/planning.md").read_text().split("## JSON")[1]
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert listed == [field.name for part in (Plan, Launch) for field in dataclasses.fields(part)]


PPO = {"rewards": [{"model": {"source": "hf://a/judge"}}], "batch_size": 32, "mini_batch_size": 8}
TWO_H100 = {"gpu": "H100-80GB", "gpus_per_node": 2}


def test_an_optimizer_step_of_ppo_takes_its_mini_batch_and_ppo_runs_under_ddp() -> None:
    found = plan(method={"ppo": PPO}, adapter={"lora": {}}, compute=TWO_H100)
    assert found.plan.launch.global_batch_size == 8 and found.plan.launch.strategy == "ddp"
    assert found.spec.training.eval.batch_size == 16  # answers are drawn as in training
    assert {"reward models", "generation cache"} <= set(sizes(found.plan)) and "reference model" not in sizes(
        found.plan
    )
    full = plan(method={"ppo": PPO}, compute=TWO_H100).plan
    assert full.launch.strategy == "ddp" and "reference model" in sizes(full)


def test_an_optimizer_step_of_grpo_takes_whole_groups() -> None:
    grpo = {"rewards": [{"regex": {"pattern": "a"}}], "num_generations": 12}
    assert plan(method={"grpo": grpo}, adapter={"lora": {}}).plan.launch.global_batch_size % 12 == 0
    with pytest.raises(
        InvalidRequest, match=r"4 answers in an optimizer step are no multiple of num_generations \(12\)"
    ):
        plan(
            method={"grpo": grpo}, training={"micro_batch_size": 4, "gradient_accumulation_steps": 1}, compute=ONE_H200
        )


def test_answers_that_the_model_has_no_positions_for_are_warned_of() -> None:
    long = {**PPO, "max_prompt_length": 32_768}
    [warning] = plan(method={"ppo": long}, adapter={"lora": {}}).plan.warnings
    assert "the longest prompt and answer have 32896 tokens" in warning
