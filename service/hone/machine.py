"""What this machine has: GPUs, cores, memory, model configurations. The one place that looks; plan/ is pure."""

import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import psutil

from hone.errors import InvalidRequest, UserError, Violation
from hone.gpus import GpuProfile, load_profiles
from hone.modelinfo import load_shape
from hone.plan import Hardware, Planned, make_plan
from hone.spec import JobSpec

BF16_COMPUTE_CAPABILITY = 8.0
"""Ampere is the first generation with bf16 tensor cores."""


def look(gpu_profiles: Path | None = None) -> Hardware:
    """Profiles of the platform and what is installed here."""
    profiles = load_profiles(gpu_profiles)
    return Hardware(
        profiles=profiles,
        installed=tuple(_profile_of(*gpu, profiles=profiles) for gpu in installed_gpus()),
        cpu_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) or 1


@lru_cache(maxsize=1)
def installed_gpus() -> tuple[tuple[str, int, float], ...]:
    """Product name, memory in bytes and compute capability of each NVIDIA GPU; none where nvidia-smi finds none."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.count(",") == 2]
    return tuple((name, int(mebibytes) * 1024**2, float(capability)) for name, mebibytes, capability in rows)


def _profile_of(name: str, memory_bytes: int, capability: float, *, profiles: Mapping[str, GpuProfile]) -> GpuProfile:
    """The platform's profile of an installed GPU, or one made of what the driver says (speed unknown)."""
    label = name.replace(" ", "-")
    for profile in profiles.values():
        if profile.product_label == label:
            return profile
    return GpuProfile(
        name=name,
        memory_bytes=memory_bytes,
        gpus_per_node=len(installed_gpus()),
        interconnect="pcie",
        bf16=capability >= BF16_COMPUTE_CAPABILITY,
        dense_tflops=0.0,
        product_label=label,
    )


def plan_here(spec: JobSpec, hardware: Hardware) -> Planned:
    """Plan a request with what this machine can read: a local config.json or the shipped table of shapes.

    Raises InvalidRequest, also for a model whose shape nothing here tells.
    """
    try:
        shape = load_shape(spec.model.source)
    except UserError as error:
        violation = Violation(path="model.source", value=spec.model.source, message=str(error))
        raise InvalidRequest([violation]) from error
    return make_plan(spec, shape, hardware)
