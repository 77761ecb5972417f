"""The plan: whether a request fits, on what, and exactly what would run.

Pure: request, model shape and hardware in; resolved request and Plan out. No network, no clock, no files. The launch
decided here is what backends start and what the trainer checks itself against.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hone.errors import InvalidRequest, UserError, Violation
from hone.job import Alternative, Launch, Plan
from hone.modelinfo import (
    ENCODERS,
    Linear,
    ModelShape,
    bias_parameters,
    dora_parameters,
    lora_parameters,
    saved_module_parameters,
    select,
    token_row_parameters,
    with_scores,
)
from hone.plan.coefficients import MODEL_FLOP_UTILIZATION
from hone.plan.devices import Device, Hardware, candidates, first_that_fits
from hone.plan.memory import breakdown, disk, host_memory, output_sizes
from hone.plan.sentences import notes, sentence, warnings, why_not_here
from hone.plan.workload import Workload
from hone.spec import Adapter, JobSpec, Lora, Training
from hone.spec.rewards import reward_models

__all__ = ["Hardware", "Planned", "make_plan"]
EAGER_ONLY = frozenset({"gemma2"})
"""Families for which transformers has no kernel that leaves the attention's scores out of memory."""
LEARNING_RATES = {"dpo": 5e-5, "ppo": 1e-5, "grpo": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The answer: the request with every open choice decided, and the plan."""

    spec: JobSpec
    plan: Plan
    runs_here: bool
    why_not_here: str = ""
    manifest: str = ""
    """What `kubectl apply` would run of it, as YAML; empty where no cluster is configured, or none could run it."""


def make_plan(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> Planned:
    """Decide everything that the request leaves open.

    Raises InvalidRequest for what only the model's shape or the hardware can tell: target modules that match nothing,
    an unknown GPU profile, a batch that does not divide.
    """
    _check_quantizable(spec, shape)
    _check_answers(spec, shape)
    if spec.method.reward:
        shape = with_scores(shape)
    load = _workload(spec, shape)
    devices = candidates(spec, shape, hardware)
    launch, device, fits = first_that_fits(spec, load, devices)
    memory = breakdown(load, launch, device.measured)
    peak = sum(item.size_bytes for item in memory)
    resolved = _resolve(spec, launch, device)
    outputs = output_sizes(load, spec)
    step_flops = _step_flops(load, launch)
    low, high = _seconds(spec.training.max_steps, step_flops, launch, device)
    plan = Plan(
        fits=fits,
        sentence=sentence(spec, device, launch, peak, fits=fits),
        gpu=device.gpu.name if device.gpu else "",
        launch=launch,
        memory=memory,
        peak_bytes=peak,
        capacity_bytes=device.capacity_bytes,
        host_memory_bytes=host_memory(load, launch, spec, peak),
        disk_bytes=disk(load, launch, spec, outputs),
        output_bytes=outputs,
        model_family=shape.model_type,
        parameters=shape.parameters,
        trainable_parameters=load.trained,
        max_steps=spec.training.max_steps,
        step_flops=step_flops,
        seconds_low=low,
        seconds_high=high,
        notes=notes(spec, device, hardware),
        warnings=warnings(spec, shape),
        alternatives=() if fits else tuple(_alternatives(spec, shape, hardware)),
    )
    why_not = why_not_here(plan, hardware)
    return Planned(spec=resolved, plan=plan, runs_here=not why_not, why_not_here=why_not)


def _check_quantizable(spec: JobSpec, shape: ModelShape) -> None:
    if spec.quantization and shape.parameters_of("experts"):
        message = (
            f"{spec.quantization} does not hold {shape.source} in 4 bits: its experts are fused into one tensor a "
            "layer, which bitsandbytes leaves in 16 bits. Remove quantization: plain LoRA needs about the same memory."
        )
        raise InvalidRequest([Violation(path="quantization", value=spec.quantization, message=message)])


def _check_answers(spec: JobSpec, shape: ModelShape) -> None:
    if shape.model_type in ENCODERS and spec.method.name not in ("reward", "merge"):
        message = (
            f"{shape.source} is an encoder ({shape.model_type}), which writes no answers: name a decoder, or train a "
            "reward model of it by method.reward."
        )
        raise InvalidRequest([Violation(path="model.source", value=spec.model.source, message=message)])


def _workload(spec: JobSpec, shape: ModelShape) -> Workload:
    method = spec.method
    part = method.sft or method.dpo or method.reward
    generation = method.rewarded
    length = part.max_length if part else generation.max_prompt_length + generation.max_new_tokens if generation else 8
    full = spec.adapter is None
    compares = bool(
        method.ppo or (method.grpo and method.grpo.beta) or (method.dpo and not method.dpo.precompute_reference)
    )
    return Workload(
        shape=shape,
        trained=_trained(spec, shape),
        lora=spec.adapter.lora if spec.adapter else None,
        targets=_targets(shape, spec.adapter.lora) if spec.adapter else (),
        quantized=spec.quantization == "nf4",
        sequence_length=length,
        rows_factor=2 if method.dpo or method.reward else 1,
        reward_models=len(list(reward_models(spec))),
        keeps_reference=full and compares,
        scores=method.reward is not None,
        generated_tokens=generation.max_new_tokens if generation else 0,
        answers=method.ppo.batch_size if method.ppo else 0,
        learns_answers=method.sft is not None,
        packed=bool(method.sft and method.sft.packing),
        attention=_attention(spec, shape),
        optimizer=spec.training.optimizer,
        eval_rows=(spec.training.eval.batch_size or 0) if _evaluates(spec) else 0,
        merges=method.merge is not None,
    )


def _evaluates(spec: JobSpec) -> bool:
    data = spec.dataset
    return bool(data and (data.eval_source or data.eval_split or data.eval_fraction))


def _attention(spec: JobSpec, shape: ModelShape) -> str:
    if spec.model.attention != "auto":
        return spec.model.attention
    return "eager" if shape.model_type in EAGER_ONLY else "sdpa"


def _trained(spec: JobSpec, shape: ModelShape) -> int:
    if spec.method.name == "merge":
        return 0
    if spec.adapter is None:
        return shape.parameters
    try:
        heads = shape.parameters_of("head") if spec.method.reward else 0  # trained in full beside the adapter
        rows = token_row_parameters(shape, len(spec.model.new_tokens), with_head=not spec.method.reward)
        return _adapter_parameters(shape, spec.adapter.lora) + heads + rows
    except UserError as error:
        lora = spec.adapter.lora
        at_targets = any(target in str(error) for target in lora.target_modules)
        path = "adapter.lora.target_modules" if at_targets else "adapter.lora.modules_to_save"
        value = list(lora.target_modules if at_targets else lora.modules_to_save)
        raise InvalidRequest([Violation(path=path, value=value, message=str(error))]) from error


@lru_cache(maxsize=1024)
def _targets(shape: ModelShape, lora: Lora) -> tuple[Linear, ...]:
    return select(shape.linear_layers, lora.target_modules, exclude=lora.modules_to_save)


@lru_cache(maxsize=1024)
def _adapter_parameters(shape: ModelShape, lora: Lora) -> int:
    layers = _targets(shape, lora)
    return (
        lora_parameters(layers, rank=lora.rank)
        + (dora_parameters(layers) if lora.use_dora else 0)
        + bias_parameters(shape, layers, mode=lora.bias)
        + (saved_module_parameters(shape, lora.modules_to_save) if lora.modules_to_save else 0)
    )


def _resolve(spec: JobSpec, launch: Launch, device: Device) -> JobSpec:
    training = spec.training if spec.method.name == "merge" else _resolved_training(spec, launch)
    compute = spec.compute.model_copy(
        update={
            "gpus_per_node": launch.gpus_per_node,
            "processes_per_node": launch.processes_per_node,
            "gpu": device.gpu.name if device.gpu else None,
            "strategy": "ddp" if launch.strategy == "none" else launch.strategy,
        }
    )
    return spec.model_copy(update={"training": training, "compute": compute})


def _resolved_training(spec: JobSpec, launch: Launch) -> Training:
    training = spec.training
    rate = 2e-4 if spec.adapter else 2e-5
    warmup = 0.03 if training.warmup_steps is None and training.warmup_ratio is None else training.warmup_ratio
    return training.model_copy(
        update={
            "epochs": 1.0 if training.epochs is None and training.max_steps is None else training.epochs,
            "learning_rate": training.learning_rate or LEARNING_RATES.get(spec.method.name, rate),
            "warmup_ratio": warmup,
            "micro_batch_size": launch.micro_batch_size,
            "gradient_accumulation_steps": launch.gradient_accumulation_steps,
            "global_batch_size": launch.global_batch_size,
            "activation_checkpointing": launch.activation_checkpointing,
            "precision": launch.precision,
            "eval": training.eval.model_copy(
                update={"batch_size": training.eval.batch_size or _eval_batch_size(spec, launch)}
            ),
        }
    )


def _eval_batch_size(spec: JobSpec, launch: Launch) -> int:
    """Answers are drawn for the evaluation as they are for training."""
    return max(1, spec.method.ppo.batch_size // launch.world_size) if spec.method.ppo else launch.micro_batch_size


def _step_flops(load: Workload, launch: Launch) -> float | None:
    """FLOPs of one optimizer step on all devices: 6 per parameter and token, 4 with a frozen base, a third more for
    recomputed activations; rows are taken as long as they may be. None where answers are drawn, or nothing trains."""
    if load.generated_tokens or load.merges:
        return None
    tokens = launch.global_batch_size * load.sequence_length * load.rows_factor
    again = 4 / 3 if launch.activation_checkpointing else 1
    return (4 if load.adapted else 6) * load.shape.parameters * tokens * again


def _seconds(
    steps: int | None, step_flops: float | None, launch: Launch, device: Device
) -> tuple[float | None, float | None]:
    """Shortest and longest time: by what finished runs reached on that device, else by what a calibration did, else by
    shares of its data sheet's peak."""
    if steps is None or step_flops is None:
        return None, None
    peak, measured = (device.gpu.dense_tflops * 1e12 if device.gpu else 0.0), device.measured
    if device.speed:
        low, high = device.speed.low, device.speed.high
    elif measured.flops_low and measured.flops_high:
        low, high = measured.flops_low, measured.flops_high
    elif peak:
        low, high = (share * peak for share in MODEL_FLOP_UTILIZATION)
    else:
        return None, None
    each = steps * step_flops / launch.world_size
    return each / high, each / low


def _alternatives(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> Iterator[Alternative]:
    """The smallest changes that would fit, each planned like the request itself."""
    for change, changed in _changes(spec):
        try:
            _check_quantizable(changed, shape)
            load = _workload(changed, shape)
            launch, device, fits = first_that_fits(changed, load, candidates(changed, shape, hardware))
        except InvalidRequest:
            continue
        if fits:
            peak = sum(item.size_bytes for item in breakdown(load, launch, device.measured))
            gpu = device.gpu.name if device.gpu else "CPU"
            yield Alternative(change=change, gpu=gpu, gpus=launch.gpus_per_node * launch.nodes, peak_bytes=peak)


def _changes(spec: JobSpec) -> Iterator[tuple[str, JobSpec]]:
    if spec.method.merge:
        return
    free = spec.compute.model_copy(update={"gpu": None, "gpus_per_node": None, "processes_per_node": None})
    adapter = spec.adapter or Adapter()
    if spec.adapter is None:
        yield "adapter: {lora: {rank: 16}}", spec.model_copy(update={"adapter": adapter})
    if spec.quantization is None:
        yield "quantization: nf4 with adapter.lora", spec.model_copy(update={"adapter": adapter, "quantization": "nf4"})
    if part := spec.method.sft or spec.method.dpo or spec.method.reward:
        name, length = spec.method.name, max(8, part.max_length // 2)
        half = spec.method.model_copy(update={name: part.model_copy(update={"max_length": length})})
        yield f"method.{name}.max_length: {length}", spec.model_copy(update={"method": half})
    yield "another GPU or more of them", spec.model_copy(update={"compute": free})
    for nodes in (2, 4, 8):
        compute = free.model_copy(update={"nodes": nodes, "gpus_per_node": 8, "strategy": "zero3"})
        yield f"zero3 on {nodes} nodes × 8 GPUs", spec.model_copy(update={"compute": compute})
