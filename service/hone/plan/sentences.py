"""What people are told of a plan: the answer in a sentence, what to know of it, what is unwise. Called by make_plan."""

from collections.abc import Iterator

from hone.job import Launch, Plan
from hone.modelinfo import ModelShape
from hone.plan.devices import Device, Hardware
from hone.plan.memory import GIB
from hone.spec import JobSpec


def sentence(spec: JobSpec, device: Device, launch: Launch, peak: int, *, fits: bool) -> str:
    """Whether it fits, on what, with how much to spare."""
    where = _where(device, launch)
    if fits:
        free = device.capacity_bytes - peak
        return f"Fits on {where}: {_gib(peak)} of {_gib(device.capacity_bytes)} at the peak, {_gib(free)} free."
    has = f"{where} has {_gib(device.capacity_bytes)}"
    if spec.method.merge:
        return f"Does not fit: merge needs {_gib(peak)} of memory, and {has}. Merge on a machine that has more."
    kind = "QLoRA" if spec.quantization else "LoRA" if spec.adapter else "full fine-tuning"
    return f"Does not fit: {spec.method.name} with {kind} needs {_gib(peak)} on each device, and {has}."


def _where(device: Device, launch: Launch) -> str:
    if device.gpu is None:
        return f"the CPU ({launch.processes_per_node} process{'es' if launch.processes_per_node > 1 else ''})"
    nodes = f"{launch.nodes} nodes × " if launch.nodes > 1 else ""
    return f"{nodes}{device.count} × {device.gpu.name}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def notes(spec: JobSpec, device: Device, hardware: Hardware) -> tuple[str, ...]:
    """What to know of this plan."""
    if spec.method.name == "merge":
        return ("Merging computes in fp32 on the CPU, and keeps the precision of the base's files.",)
    found = list(_figures(device))
    if spec.training.optimizer == "paged_adamw_8bit" and device.gpu is None:
        found.append("Pages of optimizer states go from a GPU to the host; on a CPU this is adamw_8bit.")
    if spec.training.max_steps is None:
        found.append("Steps and time depend on the number of rows, which is known when the data has been read.")
    if device.gpu and not hardware.installed and spec.compute.gpu is None:
        found.append("This machine has no GPU: the smallest of the known GPU profiles that fits was taken.")
    return tuple(found)


def _figures(device: Device) -> Iterator[str]:
    """Where the coefficients come from."""
    measured = device.measured
    if measured.source and device.gpu:
        yield f"Memory is estimated from formulas, calibrated on {device.gpu.name} {measured.source}."
    else:
        yield "Memory is estimated from formulas that were not calibrated on this device."
    if device.speed:
        yield f"Time is what {device.speed.runs} finished runs on this kind of device took."
    elif measured.source and measured.flops_low:
        yield f"Time is estimated from steps that were measured {measured.source}."


def warnings(spec: JobSpec, shape: ModelShape) -> tuple[str, ...]:
    """What is supported, but unwise."""
    part, places = spec.method.sft or spec.method.dpo or spec.method.reward, shape.max_position_embeddings
    learns = spec.method.rewarded
    if learns and places and (longest := learns.max_prompt_length + learns.max_new_tokens) > places:
        return (
            f"method.{spec.method.name}: the longest prompt and answer have {longest} tokens, more than the model was "
            f"made for ({places} positions): lower max_prompt_length or max_new_tokens.",
        )
    if part and places and part.max_length > places:
        return (
            f"method.{spec.method.name}.max_length {part.max_length} is longer than the model was made for "
            f"({places} positions): shorten it.",
        )
    return ()


def why_not_here(plan: Plan, hardware: Hardware) -> str:
    """Why this machine does not run it; empty where it does."""
    if not plan.fits:
        return plan.sentence
    launch = plan.launch
    if launch.nodes > 1:
        return f"It needs {launch.nodes} machines; this is one."
    if launch.device == "cpu":
        return ""
    here = [gpu.name for gpu in hardware.installed]
    if here.count(plan.gpu) >= launch.gpus_per_node:
        return ""
    has = f"has {len(here)} × {here[0]}" if here else "has no GPU"
    return f"It needs {launch.gpus_per_node} × {plan.gpu}; this machine {has}."
