"""`hone calibrate`: a small grid of real steps on this machine, and what it says of memory and speed, for every plan to
come. The runs are the trainer's own, of a model of random weights, in a temporary home of their own.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hone import quantities as q
from hone.cli.answer import as_data, print_json
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson
from hone.errors import PermanentError, UserError
from hone.trainer_process import TrainerProcess

if TYPE_CHECKING:
    from hone.job import Job
    from hone.plan import Hardware
    from hone.plan.coefficients import Coefficients
    from hone.settings import Settings

STEPS = 8
WARM_STEPS = 2
"""Steps that are left out of the times."""
LEAST_MARGIN = 0.03
"""What no calibration takes away: runs to come are not those of the grid."""
_ON_GPU = "meta-llama/Llama-3.2-1B"
_ON_SMALL_GPU = "Qwen/Qwen2.5-0.5B"
_SMALL_GPU_BYTES = 20 * 2**30
_ON_CPU = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


class CalibrationFailed(PermanentError):
    """No case of the grid ran."""

    reason = "CALIBRATION_FAILED"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a few steps."""

    adapter: str
    """lora, qlora or full."""
    batch: int
    length: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """`lora 4 × 1024, checkpointing`."""
        return f"{self.adapter} {self.batch} × {self.length}{', checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one case took; sizes in bytes, on a CPU none."""

    case: str
    step_s: float
    flops_per_second: float
    """By the plan's own count."""
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    planned_bytes: int | None = None
    """Without context, fragmentation and margin: what the allocator is asked for."""


GPU_GRID = (
    Case(adapter="lora", batch=1, length=1024),
    Case(adapter="lora", batch=4, length=1024),
    Case(adapter="lora", batch=4, length=1024, checkpointing=True),
    Case(adapter="lora", batch=2, length=4096, checkpointing=True),
    Case(adapter="qlora", batch=4, length=1024, checkpointing=True),
    Case(adapter="full", batch=2, length=1024, checkpointing=True),
)
CPU_GRID = (
    Case(adapter="lora", batch=2, length=256),
    Case(adapter="lora", batch=4, length=256, checkpointing=True),
    Case(adapter="full", batch=2, length=256),
)


def calibrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and tell; keep nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Measure this machine by a few real steps of training, so that plans for its kind of GPU say what it takes.

    What was measured is kept in calibration.json of HONE_HOME (HONE_CALIBRATION), by GPU profile; a platform puts it
    under cluster.calibration. On a machine without a GPU, speed is measured and memory is not.
    """
    from hone.calibration import write_calibration
    from hone.machine import look

    settings = read_settings()
    hardware = look(settings.gpu_profiles, settings.calibration_path)
    gpu = hardware.installed[0].name if hardware.installed else ""
    with tempfile.TemporaryDirectory(prefix="hone-calibrate-") as place:
        measured = list(_measure(Path(place), settings, hardware))
    found = coefficients(measured, source=_source(measured))
    if not dry_run:
        write_calibration(settings.calibration_path, {gpu: found})
    if as_json:
        print_json({"gpu": gpu, "coefficients": as_data(found), "measured": as_data(measured)})
    else:
        _print(gpu, found, measured, kept="" if dry_run else str(settings.calibration_path))
    return ExitCode.DONE


def coefficients(measured: Sequence[Measured], *, source: str) -> "Coefficients":
    """What the grid says: the worst of what memory did, and the range of the speeds.

    The margin is what the worst case took beyond its plan, and LEAST_MARGIN more.
    """
    from hone.plan.coefficients import SHIPPED

    speeds = [one.flops_per_second for one in measured]
    found = replace(SHIPPED, flops_low=min(speeds), flops_high=max(speeds), source=source)
    on_gpu = [
        (one.allocated_bytes, one.reserved_bytes, one.planned_bytes)
        for one in measured
        if one.allocated_bytes and one.reserved_bytes and one.planned_bytes
    ]
    if not on_gpu:
        return found
    fragmentation = max(reserved / allocated - 1 for allocated, reserved, _ in on_gpu)
    beyond = max(allocated / planned - 1 for allocated, _, planned in on_gpu)
    return replace(found, fragmentation=fragmentation, margin=max(beyond, 0.0) + LEAST_MARGIN)


def _measure(place: Path, settings: "Settings", hardware: "Hardware") -> Iterator[Measured]:
    """Run the grid; a case that does not fit is left out, and said to be."""
    with remarks().status("making a model of random weights …"):
        TrainerProcess(settings.trainer_python).ask("random-model", json.dumps(_shape(hardware)), str(place))
    grid = GPU_GRID if hardware.installed else CPU_GRID
    problems, ran = list[str](), 0
    for number, case in enumerate(grid, start=1):
        with remarks().status(f"{number}/{len(grid)}  {case.name}: {STEPS} steps …"):
            answer = _run(case, place, settings, on_gpu=bool(hardware.installed))
        if isinstance(answer, str):
            problems.append(f"{case.name}: {answer}")
            remarks().print(f"  {case.name} is left out: {answer}")
        else:
            ran += 1
            yield answer
    if not ran:
        raise CalibrationFailed(f"No case ran. {problems[0]}", fix="`hone doctor` looks at this machine.")


def _shape(hardware: "Hardware") -> dict[str, Any]:
    from hone.modelinfo.sources import shipped_configs

    if not hardware.installed:
        return _ON_CPU
    small = hardware.installed[0].memory_bytes < _SMALL_GPU_BYTES
    return dict(shipped_configs()[_ON_SMALL_GPU if small else _ON_GPU])


def _run(case: Case, place: Path, settings: "Settings", *, on_gpu: bool) -> Measured | str:
    """What the case took, or why it did not run."""
    from hone.job import State
    from hone.rpc.client import Client
    from hone.rpc.server import LocalService

    changes = {"home": place / "home", "store": "", "server": "", "cluster": None, "database": "", "http_address": ""}
    own = settings.model_copy(update=changes)
    try:
        with LocalService(own) as service, Client(service.address, namespace="calibrate") as client:
            job = client.submit(_request(case, place, on_gpu=on_gpu))
            try:
                job = client.wait(job.id)
            except BaseException:
                client.cancel(job.id)
                client.wait(job.id)
                raise
            if job.state != State.SUCCEEDED:
                return job.failure.message if job.failure else job.state_reason
            return _measured(case, job, list(client.events(job.id)))
    except UserError as error:
        return str(error)


def _measured(case: Case, job: "Job", events: Sequence[Any]) -> Measured:
    from hone.job import EventType
    from hone.report.compared import compared

    ends = [event.time.timestamp() for event in events if event.type == EventType.PROGRESS]
    step_s = statistics.median(after - before for before, after in pairwise(ends[WARM_STEPS:]))
    assert job.plan.step_flops is not None
    found = Measured(case=case.name, step_s=step_s, flops_per_second=job.plan.step_flops / step_s)
    if job.plan.launch.device != "cuda":
        return found
    allocated, reserved = compared(job.plan, events)[:2]
    return replace(
        found,
        allocated_bytes=allocated.measured_bytes,
        reserved_bytes=reserved.measured_bytes,
        planned_bytes=allocated.planned_bytes,
    )


def _request(case: Case, place: Path, *, on_gpu: bool) -> dict[str, Any]:
    lora = {} if case.adapter == "full" else {"adapter": {"lora": {"rank": 16}}}
    return {
        "name": "calibrate",
        "model": {"source": f"file://{place / 'model'}"},
        "dataset": {"source": f"file://{place / 'rows.jsonl'}"},
        "method": {"sft": {"max_length": case.length}},
        "training": {
            "max_steps": STEPS,
            "learning_rate": 1e-6,
            "micro_batch_size": case.batch,
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": case.checkpointing,
        },
        "compute": {"gpus_per_node": int(on_gpu)},
        **lora,
        **({"quantization": "nf4"} if case.adapter == "qlora" else {}),
    }


def _source(measured: Sequence[Measured]) -> str:
    return f"on {datetime.now(UTC):%Y-%m-%d} by {len(measured)} runs of {STEPS} steps"


def _print(gpu: str, found: "Coefficients", measured: Sequence[Measured], *, kept: str) -> None:
    console = answers()
    assert found.flops_low and found.flops_high
    console.print(f"{gpu or 'The CPU'} trains at {_speed(found.flops_low)} to {_speed(found.flops_high)}.")
    if any(one.reserved_bytes for one in measured):
        console.print(
            f"Up to {found.fragmentation:.1%} of its memory is held in vain; plans keep {found.margin:.1%} free."
        )
    console.print()
    table = Table.grid(padding=(0, 2))
    for one in measured:
        sizes = ""
        if one.reserved_bytes and one.planned_bytes and one.allocated_bytes:
            ratio = one.allocated_bytes / one.planned_bytes
            sizes = f"{q.size(one.allocated_bytes)} of {q.size(one.planned_bytes)} planned ({ratio:.2f})"
        table.add_row("", one.case, f"{one.step_s * 1000:,.0f} ms a step", _speed(one.flops_per_second), sizes)
    console.print(table)
    console.print(f"\n  Kept in {kept}; every plan of this machine uses it." if kept else "\n  Nothing was kept.")


def _speed(flops_per_second: float) -> str:
    teras = flops_per_second / 1e12
    return f"{teras:.3g} TFLOP/s" if teras >= 1 else f"{teras * 1000:.3g} GFLOP/s"
