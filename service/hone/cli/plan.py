"""`hone plan`: whether a request fits, and exactly what would run. The answer first, then why, then the next step."""

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hone import quantities as q
from hone.cli.answer import as_data, print_json
from hone.cli.connection import connect
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, Namespace, Overrides, RequestFileOrNone, Server
from hone.cli.request import about, load
from hone.errors import HoneError, UserError

if TYPE_CHECKING:
    from hone.findings import Finding
    from hone.job import Launch, Plan
    from hone.plan.coefficients import Speed
    from hone.settings import Settings
    from hone.spec import JobSpec

BAR_WIDTH = 24


def plan(
    file: RequestFileOrNone = None,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the formula of every figure.")] = False,
    compare: Annotated[
        str, typer.Option(metavar="JOB", help="Put what a job took beside what its plan said, instead of a FILE.")
    ] = "",
    offline: Annotated[
        bool, typer.Option("--offline", help="Plan only: do not look at model, data, store and Hub.")
    ] = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Say whether a request fits, on what, and what would run; then look at everything that it names. Starts nothing,
    needs no service.

    Ends with 0 when it fits and nothing stands against it, else with 1. With a server, the answer is about that
    server's machines, and what it cannot look at this machine does, with your own credentials.
    """
    if bool(file) == bool(compare):
        raise UserError("One of FILE and --compare JOB is needed: a request, or a job that has run.")
    if file is None:
        return _compare(compare, server, namespace, as_json=as_json)
    from hone.cli.preflight import print_findings
    from hone.findings import is_ready

    spec = load(file, overrides)
    with about(file):
        resolved, planned, why_not_here = _planned_by(server, namespace, spec) if server else _planned_here(spec)
    if not as_json:
        print_plan(answers(), resolved, planned, explain=explain)
        print_alternatives(answers(), planned)
    found = [] if offline else _look(server, namespace, spec)
    if as_json:
        print_json(_as_data(resolved, planned, why_not_here, not_served(resolved)) | {"findings": as_data(found)})
    else:
        if found:
            print_findings(answers(), found, explain=explain)
        _print_rest(resolved, planned, why_not_here, file, runs=is_ready(found))
    return ExitCode.DONE if planned.fits and is_ready(found) else ExitCode.FAILED


def _look(server: str, namespace: str, spec: "JobSpec") -> "list[Finding]":
    """What the service finds, and what it could not look at by the trainer of this machine."""
    from hone.cli.preflight import look_here, trainer_findings
    from hone.findings import FindingState, together

    with remarks().status("looking at what the request names (--offline leaves it out) …"):
        if not server:
            return look_here(spec)
        with connect(server, namespace) as connection:
            found = list(connection.client.preflight(spec))
        if all(finding.state != FindingState.NOT_CHECKED for finding in found):
            return found
        return together(found, trainer_findings(spec, elsewhere=True))


def _compare(job_id: str, server: str, namespace: str, *, as_json: bool) -> int:
    """Lines of the plan that a job was started with, and what it measured."""
    from hone.report.compared import compared

    with connect(server, namespace) as connection:
        job = connection.client.get(job_id)
        found = compared(job.plan, list(connection.client.events(job.id))) if job.plan else ()
    if job.plan is None:
        raise UserError(f"{job.id} has no plan: it was applied by hand.")
    if as_json:
        rows = [{**as_data(one), "ratio": one.ratio} for one in found]
        print_json({"job": job.id, "plan": as_data(job.plan), "compared": rows})
        return ExitCode.DONE
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column()
    for _ in range(3):
        table.add_column(justify="right")
    table.add_row("", "", "planned", "measured", "ratio")
    for item in job.plan.memory:
        table.add_row("", item.name, q.size(item.size_bytes))
    for one in found:
        measured = "–" if one.measured_bytes is None else q.size(one.measured_bytes)
        table.add_row("", one.name, q.size(one.planned_bytes), measured, f"{one.ratio:.2f}" if one.ratio else "")
    console = answers()
    console.print(f"{job.id}: what its plan said, line by line, and what its first rank took.")
    console.print(table)
    return ExitCode.DONE


def not_served(spec: "JobSpec") -> str:
    """What this version does not run yet of a request; empty when it runs all of it."""
    from hone.errors import NotServed
    from hone.spec.combinations import refuse_unserved

    try:
        refuse_unserved(spec)
    except NotServed as error:
        return str(error)
    return ""


def print_plan(console: Console, spec: "JobSpec", plan: "Plan", *, explain: bool = False) -> None:
    """The answer, the memory of one device, and what would run."""
    console.print(plan.sentence)
    console.print()
    console.print(_memory(plan))
    console.print()
    if explain:
        console.print(_formulas(plan))
        console.print()
    facts = Table.grid(padding=(0, 2))
    for name, fact in _facts(spec, plan):
        facts.add_row("", name, fact)
    console.print(facts)


def print_alternatives(console: Console, plan: "Plan") -> None:
    """What to change, where it does not fit."""
    if not plan.alternatives:
        return
    console.print("\n  smallest changes that fit:")
    table = Table.grid(padding=(0, 2))
    for other in plan.alternatives:
        where = f"{other.gpus} × {other.gpu}" if other.gpus else other.gpu
        table.add_row("   ", other.change, f"→ {where} ({q.size(other.peak_bytes)} each)")
    console.print(table)


def source_text(source: str) -> str:
    """As people call it: the Hub's name, a path from here where it is below here, else the whole."""
    scheme, _, place = source.partition("://")
    if scheme == "file" and Path(place).is_relative_to(Path.cwd()):
        return str(Path(place).relative_to(Path.cwd()))
    return place if scheme in ("hf", "file") else source


def adapter_texts(spec: "JobSpec") -> list[str]:
    """What a merge adds to its base: `adapters/first × 0.5`."""
    parts = spec.method.merge.adapters if spec.method.merge else ()
    return [f"{source_text(part.source)} × {part.weight:g}" for part in parts]


def batch_text(launch: "Launch") -> str:
    """`4 rows × 4 accumulated × 1 GPU = 16`."""
    rows = "row" if launch.micro_batch_size == 1 else "rows"
    devices = "GPU" if launch.gpus_per_node else "process"
    world = launch.world_size
    plural = devices if world == 1 else f"{devices}s" if launch.gpus_per_node else "processes"
    return (
        f"{launch.micro_batch_size} {rows} × {launch.gradient_accumulation_steps} accumulated × {world} {plural} "
        f"= {launch.global_batch_size}"
    )


def launch_text(launch: "Launch") -> str:
    """`1 process, bf16, activation checkpointing`."""
    processes = "1 process" if launch.world_size == 1 else f"{launch.world_size} processes"
    nodes = f" on {launch.nodes} machines" if launch.nodes > 1 else ""
    parts = [f"{processes}{nodes}", launch.precision]
    if launch.strategy != "none":
        parts.append(launch.strategy)
    if launch.activation_checkpointing:
        parts.append("activation checkpointing")
    return ", ".join(parts)


def _as_data(resolved: "JobSpec", plan: "Plan", why_not_here: str, not_served_yet: str) -> dict[str, Any]:
    return {
        "plan": as_data(plan),
        "spec": resolved.model_dump(mode="json"),
        "runs_here": not why_not_here,
        "why_not_here": why_not_here,
        "not_served_yet": not_served_yet,
    }


def _planned_here(spec: "JobSpec") -> tuple["JobSpec", "Plan", str]:
    from hone.machine import look, plan_here

    settings = read_settings()
    hardware = replace(look(settings.gpu_profiles, settings.calibration_path), speeds=speeds_here(settings))
    planned = plan_here(spec, hardware)
    return planned.spec, planned.plan, planned.why_not_here


def speeds_here(settings: "Settings") -> "Mapping[str, Speed]":
    """What finished runs of this machine reached. A home without a database is left without; one that cannot be read
    says nothing."""
    if settings.database or not settings.database_file.exists():
        return {}
    from hone.speeds import RUNS, speeds
    from hone.store import Store

    with suppress(HoneError), closing(Store(settings.database_url)) as store:
        return speeds(store.finished(RUNS))
    return {}


def _planned_by(server: str, namespace: str, spec: "JobSpec") -> tuple["JobSpec", "Plan", str]:
    from hone.errors import InvalidRequest

    with connect(server, namespace) as connection:
        answer = connection.client.plan(spec)
    if answer.violations or answer.spec is None or answer.plan is None:
        raise InvalidRequest(answer.violations)
    return answer.spec, answer.plan, answer.why_not_here


def _memory(plan: "Plan") -> Table:
    share = plan.peak_bytes / plan.capacity_bytes if plan.capacity_bytes else 1.0
    filled = round(min(share, 1.0) * BAR_WIDTH)
    table = Table.grid(padding=(0, 2))
    bar = "█" * filled + "░" * (BAR_WIDTH - filled)
    table.add_row("", plan.gpu or "CPU", f"{bar}  {q.share(plan.peak_bytes, plan.capacity_bytes)}")
    table.add_row("", "", q.sizes([(item.name, item.size_bytes) for item in plan.memory]))
    return table


def _formulas(plan: "Plan") -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for item in plan.memory:
        table.add_row("", item.name, q.size(item.size_bytes), item.formula)
    table.add_row("", "peak", q.size(plan.peak_bytes), f"of {q.size(plan.capacity_bytes)}")
    return table


def _facts(spec: "JobSpec", plan: "Plan") -> list[tuple[str, str]]:
    launch = plan.launch
    merge = spec.method.merge
    share = q.share(plan.trainable_parameters, plan.parameters)
    trained = "" if merge else f", {q.count(plan.trainable_parameters)} trained ({share})"
    outputs = ", ".join(f"{kind} {q.size(size)}" for kind, size in plan.output_bytes.items())
    facts = [
        ("model", f"{source_text(spec.model.source)}   {q.count(plan.parameters)} parameters{trained}"),
        ("adapters", ", ".join(adapter_texts(spec))),
        ("data", _data(spec)),
        ("batch", "" if merge else batch_text(launch)),
        ("launch", launch_text(launch)),
        ("outputs", outputs),
        ("push", _push(spec)),
        ("needs", f"{q.size(plan.host_memory_bytes)} of memory and {q.size(plan.disk_bytes)} of disk on each machine"),
    ]
    if plan.max_steps:
        facts.append(("steps", q.count(plan.max_steps) + _time(plan)))
    facts += [("note", note) for note in plan.notes]
    facts += [("warning", warning) for warning in plan.warnings]
    return [(name, fact) for name, fact in facts if fact]


def _push(spec: "JobSpec") -> str:
    """`merged → my-org/name on the Hub, private`; nothing where it is not asked for."""
    from hone.spec.outputs import output_kinds, pushed_kind

    hub = spec.output.hub
    if hub is None:
        return ""
    branch = f", branch {hub.branch}" if hub.branch else ""
    kind = pushed_kind(output_kinds(spec), hub.what)
    return f"{kind} → {hub.repo} on the Hub{branch}, {'private' if hub.private else 'public'}"


def _data(spec: "JobSpec") -> str:
    if spec.dataset is None:
        return ""
    packing = " · packed" if spec.method.sft and spec.method.sft.packing else ""
    length = f" · up to {q.count(spec.method.sft.max_length)} tokens a row" if spec.method.sft else ""
    return f"{source_text(spec.dataset.source)} ({spec.dataset.split}){length}{packing}"


def _time(plan: "Plan") -> str:
    if plan.seconds_low is None or plan.seconds_high is None:
        return ""
    return f", about {q.duration(plan.seconds_low)} to {q.duration(plan.seconds_high)}"


def _print_rest(spec: "JobSpec", plan: "Plan", why_not_here: str, file: Path, *, runs: bool) -> None:
    console = answers()
    console.print()
    if unserved := not_served(spec):
        console.print(f"  Not yet: {unserved}")
    console.print(f"  {_next(plan, why_not_here, file, runs=runs and not unserved)}")


def _next(plan: "Plan", why_not_here: str, file: Path, *, runs: bool) -> str:
    formulas = "hone plan --explain shows every formula"
    if not plan.fits:
        return f"Next: change {file.name} as above · {formulas}" if plan.alternatives else f"Next: {formulas}"
    if why_not_here:
        return f"Not on this machine: {why_not_here} Next: {formulas}"
    return f"Next: hone run {file} · {formulas}" if runs else f"Next: {formulas}"
