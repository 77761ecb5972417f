"""What this machine has: GPUs, cores, memory, model configurations. The one place that looks; plan/ is pure."""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import psutil

from hone.calibration import read_calibration
from hone.errors import InvalidRequest, NotFound, StorageError, UserError, Violation
from hone.gpus import GpuProfile, load_profiles
from hone.modelinfo import (
    ADAPTER_CONFIG,
    ADAPTER_IDENTITY,
    ModelShape,
    SavedAdapter,
    load_shape,
    read_adapter,
    read_adapter_directory,
    read_shape,
)
from hone.plan import Hardware, Planned, make_plan
from hone.plan.coefficients import Speed
from hone.plan.continued import continued, lora_of, plan_on_4_bits
from hone.remembered import Remembered
from hone.spec import JobSpec
from hone.storage import join_path, open_store

Look = Callable[[str], ModelShape | SavedAdapter]
"""What lies at a model's source."""
BF16_COMPUTE_CAPABILITY = 8.0
"""Ampere is the first generation with bf16 tensor cores."""


def look(gpu_profiles: Path | None = None, calibration: Path | None = None) -> Hardware:
    """Profiles of the platform, what is installed here, and what was measured of it."""
    profiles = load_profiles(gpu_profiles)
    return Hardware(
        profiles=profiles,
        installed=tuple(_profile_of(*gpu, profiles=profiles) for gpu in installed_gpus()),
        cpu_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        measured=read_calibration(calibration) if calibration else {},
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


class Planner:
    """Plans requests for one set of hardware, as plan_here does, also for models in S3; remembers plans. Files of a
    model are looked at once a second, objects once a minute."""

    def __init__(
        self,
        hardware: Hardware,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        speeds: Callable[[], Mapping[str, Speed]] = dict,
    ) -> None:
        """`endpoint` and `region` are those of the S3 store; its keys come from the usual AWS_* variables. `speeds` are
        those of finished runs."""
        self._plan = Remembered[JobSpec, Planned](
            lambda spec, shape, reached: make_plan(spec, shape, replace(hardware, speeds=reached))
        )
        self._speeds = speeds
        self._model = lru_cache(maxsize=1024)(lambda source, second: _model_here(source))
        self._remote = lru_cache(maxsize=1024)(lambda source, minute: _model_in_s3(source, endpoint, region))

    def __call__(self, spec: JobSpec) -> Planned:
        """The plan. Raises InvalidRequest."""
        return _planned(spec, self._look, lambda exact, shape: self._plan(exact, shape, self._speeds()))

    def _look(self, source: str) -> "ModelShape | SavedAdapter":
        now = int(time.monotonic())
        return self._remote(source, now // 60) if source.startswith("s3://") else self._model(source, now)


def plan_here(spec: JobSpec, hardware: Hardware) -> Planned:
    """Plan a request with what this machine can read: a local config.json or the shipped table of shapes.

    Raises InvalidRequest, also for a model whose shape nothing here tells.
    """
    return _planned(spec, _model_here, lambda exact, shape: make_plan(exact, shape, hardware))


def _planned(spec: JobSpec, look: Look, plan: Callable[[JobSpec, ModelShape], Planned]) -> Planned:
    """By `plan`, of the base where the source is an adapter, and as adapters say that the base was loaded."""
    shape, adapter = _shape_and_adapter(spec.model.source, look)
    if _is_merged_on_4_bits(spec, look):
        return plan_on_4_bits(lambda exact: plan(exact, shape), spec)
    return plan(_continued(spec, adapter) if adapter else spec, shape)


def _is_merged_on_4_bits(spec: JobSpec, look: Look) -> bool:
    """Whether adapters that are merged say that their base was in 4 bits. What cannot be read here says nothing."""
    for part in spec.method.merge.adapters if spec.method.merge else ():
        if part.source.startswith(("file://", "s3://")):
            with suppress(InvalidRequest):
                found = look(part.source)
                if isinstance(found, SavedAdapter) and found.identity.get("quantization"):
                    return True
    return False


def _shape_and_adapter(source: str, look: Look) -> tuple[ModelShape, SavedAdapter | None]:
    """The shape to plan with, which is the base's where the source is an adapter."""
    found = look(source)
    if not isinstance(found, SavedAdapter):
        return found, None
    try:
        base = found.base
    except UserError as error:
        raise _no_shape(source, str(error)) from error
    try:
        shape = look(base)
    except InvalidRequest as error:
        raise _no_shape(source, f"is an adapter, and of its base: {error.violations[0].message}") from error
    if isinstance(shape, SavedAdapter):
        raise _no_shape(source, f"is an adapter, and its base {base} is one too: merge that one first.")
    return shape, found


def _continued(spec: JobSpec, adapter: SavedAdapter) -> JobSpec:
    try:
        own = lora_of(adapter)
    except UserError as error:
        raise _no_shape(spec.model.source, str(error)) from error
    return continued(spec, own)


def _model_here(source: str) -> ModelShape | SavedAdapter:
    try:
        scheme, _, place = source.partition("://")
        return (read_adapter_directory(Path(place), source) if scheme == "file" else None) or load_shape(source)
    except UserError as error:
        raise _no_shape(source, str(error)) from error


def _model_in_s3(source: str, endpoint: str | None, region: str | None) -> ModelShape | SavedAdapter:
    bucket, _, prefix = source.removeprefix("s3://").partition("/")

    def read(name: str) -> bytes | None:
        with suppress(NotFound):
            return store.get_bytes(join_path("", f"{prefix.rstrip('/')}/{name}"))
        return None

    try:
        with closing(open_store(f"s3://{bucket}", endpoint=endpoint, region=region)) as store:
            if config := read("config.json"):
                return read_shape(config, source)
            if adapter := read(ADAPTER_CONFIG):
                return read_adapter(source, adapter, read(ADAPTER_IDENTITY))
    except UserError as error:
        raise _no_shape(source, f"the model's config.json cannot be read: {error}") from error
    except StorageError as error:
        raise _no_shape(source, f"the service cannot read it, to plan for it: {error.message}") from error
    raise _no_shape(source, f"the model's config.json cannot be read: there is none at {source}.")


def _no_shape(source: str, message: str) -> InvalidRequest:
    return InvalidRequest([Violation(path="model.source", value=source, message=message)])
