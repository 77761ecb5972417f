"""Whether a Job can hold what its request asks for: planned again in the pod, because people edit manifests by hand.

Called by the supervisor of a pod before anything is fetched, and again once the model's config.json is there, where
its shape was not known before; by every worker before the model is loaded. What does not fit is refused with the field
or the figure, and with what to do.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hone.errors import InvalidRequest, UserError
from hone.gpus import GpuProfile
from hone.job import Launch, Plan
from hone.manifests import names
from hone.modelinfo import ModelShape, load_shape
from hone.plan import Hardware, make_plan
from hone.run import Run, TrainerExit
from hone.spec import JobSpec
from hone_trainer.failure import RunFailed
from hone_trainer.node import Node

_PLENTY = 1 << 60
"""Memory of the devices that are planned for here: the launch is given, so nothing is left to be chosen by size."""
_FIX = "Do not edit the request in the manifest: change the request's own file, and render the manifest again."


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the Job asks for, as its pods are told; None for what they are not told."""

    gpus: int | None = None
    memory_bytes: int | None = None
    is_indexed: bool = False
    """Whether it has several nodes."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Asked":
        """As the manifest and Kubernetes tell it."""
        gpus, memory = environment.get(names.ENV_GPUS, ""), environment.get(names.ENV_MEMORY_LIMIT_BYTES, "")
        return Asked(
            gpus=int(gpus) if gpus.isdecimal() else None,
            memory_bytes=int(memory) if memory.isdecimal() and int(memory) else None,
            is_indexed=names.ENV_NODE_RANK in environment,
        )


def check_request(run: Run, asked: Asked, node: Node) -> Plan | None:
    """Compare request, launch and Job. Raises RunFailed (USER); None where the model's shape is not known yet."""
    if problems := [*_against_launch(run.spec, run.launch), *_against_job(run.launch, asked, node)]:
        raise _refused(problems)
    try:
        shape = load_shape(run.inputs.get(run.spec.model.source, run.spec.model.source))
    except UserError:
        return None
    return check_plan(run, asked, shape)


def check_model(run: Run, asked: Asked, model: Path) -> Plan:
    """The same with the model that was fetched. Raises RunFailed (USER), or a UserError of modelinfo."""
    return check_plan(run, asked, load_shape(f"file://{model}"))


def planned(run: Run, model: Path) -> Plan | None:
    """The plan of the request, for the report; None where it cannot be made here."""
    try:
        return make_plan(run.spec, load_shape(f"file://{model}"), _hardware(run.spec)).plan
    except UserError:
        return None


def check_plan(run: Run, asked: Asked, shape: ModelShape) -> Plan:
    """Plan the request again, and hold the plan against the launch and the Job. Raises RunFailed (USER)."""
    try:
        plan = make_plan(run.spec, shape, _hardware(run.spec)).plan
    except InvalidRequest as error:
        raise _refused([str(violation) for violation in error.violations]) from error
    problems = list(_differences(run.launch, plan.launch))
    if asked.memory_bytes is not None and plan.host_memory_bytes > asked.memory_bytes:
        needs, has = _gib(plan.host_memory_bytes), _gib(asked.memory_bytes)
        problems.append(f"the request needs {needs} of memory on each node, and the Job's container may use {has}")
    if problems:
        raise _refused(problems)
    return plan


def write_plan(plan: Plan, path: Path) -> None:
    """For the workers, as JSON."""
    path.write_text(json.dumps({"peak_bytes": plan.peak_bytes, "gpu": plan.gpu}), encoding="utf-8")


def check_gpu(launch: Launch, path: Path) -> None:
    """In a worker: whether its GPU is there and as large as the plan needs it. Raises RunFailed."""
    if launch.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise RunFailed(
            TrainerExit.GPU_FAILED,
            "The plan has a GPU for this process, and PyTorch finds none that it can use.",
            fix="Look at the node's driver and device plugin (nvidia-smi).",
        )
    if path.exists():
        planned = json.loads(path.read_text(encoding="utf-8"))
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        check_gpu_memory(device.name, device.total_memory, planned)


def check_gpu_memory(name: str, total_bytes: int, planned: Mapping[str, object]) -> None:
    """Raise RunFailed (OUT_OF_MEMORY) when the plan's peak does not fit this GPU."""
    peak_bytes = int(str(planned["peak_bytes"]))
    if peak_bytes > total_bytes:
        raise RunFailed(
            TrainerExit.OUT_OF_MEMORY,
            f"This GPU is too small: {name} has {_gib(total_bytes)}, and the plan, made for {planned['gpu']}, needs "
            f"{_gib(peak_bytes)} at its peak.",
            fix="Ask for that GPU (compute.gpu), or lower training.micro_batch_size or the length of rows.",
        )


def _against_launch(spec: JobSpec, launch: Launch) -> Iterator[str]:
    """Fields that the plan has decided stand in the request too; an edit of one only is found by the other."""
    compute, training = spec.compute, spec.training
    decided = {
        "compute.nodes": (compute.nodes, launch.nodes),
        "compute.gpus_per_node": (compute.gpus_per_node, launch.gpus_per_node),
        "compute.processes_per_node": (compute.processes_per_node, launch.processes_per_node),
        "training.micro_batch_size": (training.micro_batch_size, launch.micro_batch_size),
        "training.gradient_accumulation_steps": (
            training.gradient_accumulation_steps,
            launch.gradient_accumulation_steps,
        ),
        "training.global_batch_size": (training.global_batch_size, launch.global_batch_size),
        "training.activation_checkpointing": (training.activation_checkpointing, launch.activation_checkpointing),
        "training.precision": (None if training.precision == "auto" else training.precision, launch.precision),
    }
    for path, (asked, planned) in decided.items():
        if asked is not None and asked != planned:
            yield f"{path} is {asked} in the request, and the launch plan beside it has {planned}"


def _against_job(launch: Launch, asked: Asked, node: Node) -> Iterator[str]:
    if launch.nodes > 1 and not asked.is_indexed:
        yield f"the request has {launch.nodes} nodes, and the Job has one"
    if asked.is_indexed and (launch.nodes == 1 or node.rank >= launch.nodes):
        yield f"the request has {launch.nodes} node(s), and the Job has more: this is its node {node.rank + 1}"
    if asked.gpus is not None and asked.gpus != launch.gpus_per_node:
        yield f"the request has {launch.gpus_per_node} GPUs on each node, and the Job asks for {asked.gpus}"


def _differences(given: Launch, planned: Launch) -> Iterator[str]:
    for name in ("launcher", "strategy", "device", "processes_per_node", "precision", "micro_batch_size"):
        if getattr(given, name) != getattr(planned, name):
            yield f"the launch plan has {name} {getattr(given, name)}, and the request gives {getattr(planned, name)}"


def _hardware(spec: JobSpec) -> Hardware:
    """Devices as the request names them: what they are like is the worker's to see."""
    name = spec.compute.gpu or "GPU"
    gpu = GpuProfile(
        name=name,
        memory_bytes=_PLENTY,
        gpus_per_node=1024,
        interconnect="pcie",
        bf16=spec.training.precision == "bf16",
        dense_tflops=0.0,
        product_label=name,
    )
    return Hardware(profiles={name: gpu}, cpu_cores=1, memory_bytes=_PLENTY)


def _refused(problems: list[str]) -> RunFailed:
    return RunFailed(TrainerExit.USER, f"The request does not fit its Job: {'; '.join(problems)}.", fix=_FIX)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
