"""A job as text: one row of `hone list`, one screen of `hone get`; and the table of `hone checkpoints`."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table

from hone import quantities as q
from hone.cli.ending import outputs_table, place, print_failure
from hone.cli.plan import adapter_texts, batch_text, launch_text, source_text
from hone.job import Attempt, Checkpoint, Job, Plan, State
from hone.spec import JobSpec
from hone.spec.sources import sources

MODEL_WIDTH = 22


def jobs_table(jobs: Sequence[Job], now: datetime) -> Table:
    """Name, state, method, model, progress, loss, GPUs and age; within 100 columns for names of usual length."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("NAME", "STATE", "METHOD", "MODEL"):
        table.add_column(heading, no_wrap=True)
    for heading in ("PROGRESS", "LOSS", "GPUS", "AGE"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in jobs:
        table.add_row(job.id, str(job.state), job.method, _model(job), *_numbers(job), q.age(job.create_time, now))
    return table


def checkpoints_table(found: Sequence[Checkpoint], now: datetime) -> Table:
    """Step, attempt, size, age and place of each, and the sha256 of its manifest."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("STEP", "ATTEMPT", "SIZE", "AGE"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("PLACE", overflow="fold")
    for checkpoint in found:
        numbers = (q.count(checkpoint.step), str(checkpoint.attempt), q.size(checkpoint.size_bytes))
        table.add_row(*numbers, q.age(checkpoint.time, now), place(checkpoint.uri))
        table.add_row("", "", "", "", f"sha256 of its manifest {checkpoint.sha256}")
    return table


def print_job(console: Console, job: Job, now: datetime, saved: Sequence[Checkpoint] = ()) -> None:
    """One screen: where it stands, what was asked and decided, attempts, the last checkpoint, outputs, what it cost."""
    console.print(f"{job.namespace}/{job.id}  {job.state}{_progress_text(job)}")
    if job.state_reason and job.state != State.FAILED:
        console.print(f"  {job.state_reason}")
    console.print()
    table = Table.grid(padding=(0, 2))
    for name, fact in _facts(job, now):
        table.add_row("", name, fact)
    console.print(table)
    if job.attempts:
        console.print("\n  attempts")
        console.print(_attempts(job, now))
    if complete := [checkpoint for checkpoint in saved if checkpoint.complete]:
        console.print(f"\n  last checkpoint  {_checkpoint(complete[-1], now)}")
    if job.outputs:
        console.print("\n  outputs")
        console.print(outputs_table(job.outputs, with_digest=True))
    console.print()
    if job.state == State.FAILED:
        print_failure(console, job)
    else:
        console.print(f"  Next: {_next(job)}")


def _model(job: Job) -> str:
    source = job.requested_spec.model.source
    name = source.partition("://")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
    return name if len(name) <= MODEL_WIDTH else f"{name[: MODEL_WIDTH - 1]}…"


def _numbers(job: Job) -> tuple[str, str, str]:
    progress = job.progress
    launch = job.plan.launch
    steps = f"{q.count(progress.step)}/{q.count(progress.max_steps)}" if progress and progress.max_steps else "–"
    loss = q.loss(progress.loss) if progress and progress.loss is not None else "–"
    return steps, loss, str(launch.nodes * launch.gpus_per_node)


def _progress_text(job: Job) -> str:
    progress = job.progress
    if progress is None or not progress.max_steps:
        return ""
    parts = [f"step {q.count(progress.step)}/{q.count(progress.max_steps)}"]
    if progress.loss is not None:
        parts.append(f"loss {q.loss(progress.loss)}")
    if progress.eta_s and not (job.state.is_terminal or job.state == State.PAUSED):
        parts.append(f"{q.clock(progress.eta_s)} left")
    return "  " + " · ".join(parts)


def _facts(job: Job, now: datetime) -> list[tuple[str, str]]:
    spec, plan = job.resolved_spec, job.plan
    training = spec.training
    length = (
        f"{training.max_steps} steps"
        if training.max_steps
        else f"{training.epochs:g} epochs"
        if training.epochs
        else ""
    )
    rate = f", lr {q.rate(training.learning_rate)} {training.scheduler}" if training.learning_rate else ""
    return [
        ("method", f"{job.method}{_trained(spec, plan)}"),
        ("model", source_text(spec.model.source)),
        *([("adapters", ", ".join(adapter_texts(spec)))] if spec.method.merge else []),
        *([("data", source_text(spec.dataset.source))] if spec.dataset else []),
        *([] if spec.method.merge else [("training", f"{length}{rate}"), ("batch", batch_text(plan.launch))]),
        *(
            [("needs", ", ".join(needed))]
            if (needed := dict.fromkeys(text for _, text in sources(spec, scheme="job")))
            else []
        ),
        ("launch", launch_text(plan.launch)),
        (
            "memory",
            f"{q.size(plan.peak_bytes)} of {q.size(plan.capacity_bytes)} planned on each {plan.gpu or 'CPU process'}",
        ),
        ("created", f"{q.age(job.create_time, now)} ago{f' by {job.creator}' if job.creator else ''}"),
        *([("labels", ", ".join(f"{key}={value}" for key, value in spec.labels.items()))] if spec.labels else []),
    ]


def _trained(spec: JobSpec, plan: Plan) -> str:
    """`, QLoRA rank 16: 41,943,040 trained (0.6 %)`; nothing for a merge."""
    if spec.method.merge:
        return ""
    lora = "QLoRA" if spec.quantization else "LoRA"
    adapter = f"{lora} rank {spec.adapter.lora.rank}" if spec.adapter else "full fine-tuning"
    share = q.share(plan.trainable_parameters, plan.parameters)
    return f", {adapter}: {q.count(plan.trainable_parameters)} trained ({share})"


def _attempts(job: Job, now: datetime) -> Table:
    table = Table.grid(padding=(0, 2))
    for attempt in job.attempts:
        table.add_row("  ", f"{attempt.number}", str(attempt.state), _lasted(attempt, now), _why(attempt))
    return table


def _lasted(attempt: Attempt, now: datetime) -> str:
    if attempt.start_time is None:
        return "not started"
    hours = attempt.gpu_seconds(now) / 3600
    took = q.duration(((attempt.end_time or now) - attempt.start_time).total_seconds())
    return f"{took}, {hours:.2f} GPU-hours" if attempt.gpus else took


def _why(attempt: Attempt) -> str:
    return attempt.failure.message if attempt.failure else ""


def _checkpoint(checkpoint: Checkpoint, now: datetime) -> str:
    when = f"{q.age(checkpoint.time, now)} ago by attempt {checkpoint.attempt}"
    return f"step {q.count(checkpoint.step)}, {q.size(checkpoint.size_bytes)}, {when}"


def _next(job: Job) -> str:
    if job.state == State.SUCCEEDED:
        return f"hone download {job.id} DIRECTORY"
    if job.state == State.PAUSED:
        return f"hone resume {job.id} · hone cancel {job.id}"
    if job.state == State.CANCELLED:
        return f"hone logs {job.id} · hone delete {job.id}"
    return f"hone watch {job.id} · hone cancel {job.id}"
