"""What a request could run on, and how: devices, strategies and batches, of which the first that fits is taken.

Called by make_plan. Pure; what the request fixed stays fixed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hone.errors import InvalidRequest, Violation
from hone.gpus import GpuProfile
from hone.job import Launch
from hone.modelinfo import ModelShape
from hone.plan.coefficients import SHIPPED, Coefficients, Speed
from hone.plan.memory import breakdown
from hone.plan.workload import Workload
from hone.spec import JobSpec

DEFAULT_GLOBAL_BATCH_SIZE = 16
LARGEST_MICRO_BATCH_SIZE = 64
CPU_PARAMETERS = 500_000_000
"""A model up to this size trains on the CPU when there is no GPU and nobody asked for one."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What could run it: profiles of GPUs to choose from, and what this machine has."""

    profiles: Mapping[str, GpuProfile]
    installed: tuple[GpuProfile, ...] = ()
    cpu_cores: int
    memory_bytes: int
    measured: Mapping[str, Coefficients] = field(default_factory=dict)
    """Coefficients by the name of the GPU profile; that of the CPU is empty."""
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    """What finished runs reached, by the same names."""

    def device(self, gpu: GpuProfile | None, count: int, capacity_bytes: int) -> "Device":
        """So many of that kind, with what was measured of it."""
        name = gpu.name if gpu else ""
        return Device(
            gpu=gpu,
            count=count,
            capacity_bytes=capacity_bytes,
            measured=self.measured.get(name, SHIPPED),
            speed=self.speeds.get(name),
        )


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device to try, in how many copies on each machine."""

    gpu: GpuProfile | None
    count: int
    capacity_bytes: int
    measured: Coefficients = SHIPPED
    speed: Speed | None = None
    """What finished runs reached on it."""


def candidates(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> Iterator[Device]:
    """Kinds and counts to try, the fewest and smallest first; what the request fixed stays fixed."""
    compute = spec.compute
    if compute.gpu is not None and compute.gpu not in hardware.profiles:
        known = ", ".join(sorted(hardware.profiles))
        message = f"{compute.gpu!r} is not a GPU profile of this platform: use one of {known}."
        raise InvalidRequest([Violation(path="compute.gpu", value=compute.gpu, message=message)])
    if spec.method.name == "merge":
        yield hardware.device(None, 1, hardware.memory_bytes)
        return
    small = shape.parameters <= CPU_PARAMETERS and not hardware.installed and compute.gpus_per_node is None
    if compute.gpus_per_node == 0 or (small and compute.gpu is None):
        processes = compute.processes_per_node or 1
        yield hardware.device(None, processes, hardware.memory_bytes // processes)
        return
    if compute.gpu:
        kinds = [hardware.profiles[compute.gpu]]
    elif hardware.installed:
        kinds = [hardware.installed[0]]
    else:
        kinds = sorted(hardware.profiles.values(), key=lambda gpu: (gpu.memory_bytes, gpu.dense_tflops))
    wanted = compute.gpus_per_node or compute.processes_per_node
    for count in [wanted] if wanted else (1, 2, 4, 8):
        for gpu in kinds:
            if wanted or count <= (len(hardware.installed) if gpu in hardware.installed else gpu.gpus_per_node):
                yield hardware.device(gpu, count, gpu.memory_bytes)


def first_that_fits(spec: JobSpec, load: Workload, devices: Iterable[Device]) -> tuple[Launch, Device, bool]:
    """The first way that fits; where none does, the last that was tried, and False."""
    last: tuple[Launch, Device] | None = None
    refusal: InvalidRequest | None = None
    for device in devices:
        try:
            for launch in _launches(spec, device):
                last = (launch, device)
                if sum(item.size_bytes for item in breakdown(load, launch, device.measured)) <= device.capacity_bytes:
                    return launch, device, True
        except InvalidRequest as error:
            refusal = refusal or error
    if last is None:
        raise refusal or AssertionError("a request always has a device to try")
    return (*last, False)


def _launches(spec: JobSpec, device: Device) -> Iterator[Launch]:
    """Ways to run it on one kind of device, the fastest first."""
    compute, training = spec.compute, spec.training
    world = compute.nodes * device.count
    if compute.strategy != "auto":
        strategies: tuple[str, ...] = (compute.strategy,)
    else:
        shards = world > 1 and not spec.method.rewarded and not (spec.adapter and not device.gpu)
        strategies = ("ddp", "zero2", "zero3") if shards else ("ddp",)
    precision = training.precision
    if precision == "auto":
        # Rounding bf16 weights stochastically is computing with them, on a CPU too.
        has_bf16 = device.gpu.bf16 if device.gpu else training.optimizer == "adamw_bf16_sr"
        precision = "bf16" if has_bf16 else "fp32"
    if training.optimizer == "adamw_bf16_sr" and precision != "bf16":
        message = f"adamw_bf16_sr needs a GPU that computes in bf16, and {device.gpu and device.gpu.name} does not."
        raise InvalidRequest([Violation(path="training.optimizer", value=training.optimizer, message=message)])
    asked = training.activation_checkpointing if spec.method.merge is None else False
    if world == 1 and (splitting := strategies[0]).startswith("zero"):
        message = f"{splitting} splits its work over several processes, and this is one: leave it out, or ask for more."
        raise InvalidRequest([Violation(path="compute.strategy", value=splitting, message=message)])
    for strategy in strategies:
        for checkpointing in (False, True) if asked is None else (asked,):
            for micro, accumulation in _batches(spec, world):
                yield Launch(
                    launcher="direct" if world == 1 else "accelerate",
                    strategy="none" if world == 1 and strategy == "ddp" else strategy,
                    device="cuda" if device.gpu else "cpu",
                    nodes=compute.nodes,
                    processes_per_node=device.count,
                    gpus_per_node=device.count if device.gpu else 0,
                    precision=precision,
                    micro_batch_size=micro,
                    gradient_accumulation_steps=accumulation,
                    activation_checkpointing=checkpointing,
                )


def _batches(spec: JobSpec, world: int) -> list[tuple[int, int]]:
    """Micro-batch and accumulation, the largest micro-batch first; all of the same global batch."""
    training = spec.training
    path = "method.ppo.mini_batch_size" if spec.method.ppo else "training.global_batch_size"
    micro, accumulation = training.micro_batch_size, training.gradient_accumulation_steps
    if spec.method.name == "merge":
        return [(1, 1)]
    if micro and accumulation and not spec.method.ppo:
        _check_groups(spec, micro * accumulation * world)
        return [(micro, accumulation)]
    whole = spec.method.ppo.mini_batch_size if spec.method.ppo else training.global_batch_size
    if whole is None:
        fixed = (micro or 1) * (accumulation or 1) * world
        if spec.method.grpo:
            fixed = math.lcm(fixed, spec.method.grpo.num_generations)
        whole = fixed * max(1, DEFAULT_GLOBAL_BATCH_SIZE // fixed)
    if whole % world:
        message = f"{whole} is no multiple of {world} processes: every process takes as many rows."
        raise InvalidRequest([Violation(path=path, value=whole, message=message)])
    _check_groups(spec, whole)
    rows = whole // world
    sizes = [micro] if micro else [n for n in range(min(rows, LARGEST_MICRO_BATCH_SIZE), 0, -1) if rows % n == 0]
    pairs = [(size, rows // size) for size in sizes if rows % size == 0 and accumulation in (None, rows // size)]
    if not pairs:
        message = f"{whole} cannot be made of the given micro_batch_size and accumulation on {world} processes."
        raise InvalidRequest([Violation(path=path, value=whole, message=message)])
    return pairs


def _check_groups(spec: JobSpec, answers: int) -> None:
    if spec.method.grpo and answers % (size := spec.method.grpo.num_generations):
        message = f"{answers} answers in an optimizer step are no multiple of num_generations ({size})."
        raise InvalidRequest([Violation(path="training.global_batch_size", value=answers, message=message)])
