"""Commands on jobs: submit, list, get, logs, pause, resume, checkpoints, cancel, delete, download."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone import quantities as q
from hone.cli.answer import as_data, print_json
from hone.cli.connection import Connection, connect
from hone.cli.console import answers, remarks
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, JobName, Namespace, Overrides, RequestFile, Server, Yes
from hone.cli.request import about, load_all

if TYPE_CHECKING:
    from hone.job import Job
    from hone.spec import JobSpec

START_S = 10.0
"""How long `submit` keeps a service of its own up so that it can start the run."""


def submit(
    file: RequestFile,
    overrides: Overrides = None,
    job_id: Annotated[str, typer.Option("--job-id", help="The job's id. Default: its name and five characters.")] = "",
    request_id: Annotated[
        str, typer.Option("--request-id", help="Sending the same request with the same id again makes no second job.")
    ] = "",
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything, record nothing.")] = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Hand a request, or a chain of several in one file, to the service and return at once."""
    specs = load_all(file, overrides)
    if len(specs) > 1:
        return _submit_chain(
            file, specs, job_id or request_id or validate_only, as_json=as_json, server=server, namespace=namespace
        )
    spec = specs[0]
    with connect(server, namespace) as connection:
        with about(file):
            job = connection.client.submit(spec, job_id=job_id, request_id=request_id, validate_only=validate_only)
        if connection.in_this_process and not validate_only:
            job = _started(connection, job)
    if as_json:
        print_json(as_data(job))
    elif validate_only:
        answers().print(f"{file.name} would be accepted: {job.plan.sentence}")
    else:
        answers().print(f"{job.namespace}/{job.id} accepted. Next: hone watch {job.id}")
    return ExitCode.DONE


def _submit_chain(
    file: Path, specs: "list[JobSpec]", single: str | bool, *, as_json: bool, server: str, namespace: str
) -> int:
    from hone.cli.chain import submit_chain

    if single:
        raise typer.BadParameter(
            f"--job-id, --request-id and --validate-only are for one request; {file} holds {len(specs)}"
        )
    with connect(server, namespace) as connection, about(file):
        steps = submit_chain(connection.client, specs)
    if as_json:
        print_json({"jobs": as_data([step.job for step in steps])})
        return ExitCode.DONE
    for step in steps:
        stands = f"is {step.job.state} already" if step.is_reused else "accepted"
        answers().print(f"{step.job.namespace}/{step.job.id} {stands}.")
    answers().print(f"Next: hone watch {steps[-1].job.id}")
    return ExitCode.DONE


def list_(
    filter: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="As 'state = RUNNING AND labels.team = \"nlp\"'.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many jobs, the newest first.")] = 50,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """List jobs, the newest first."""
    from hone.cli.job_text import jobs_table

    with connect(server, namespace) as connection:
        found = list(connection.client.list(filter=filter, limit=limit))
    if as_json:
        print_json({"jobs": as_data(found)})
    elif not found:
        remarks().print(f"No jobs{' that match' if filter else ''}. Next: hone run FILE")
    else:
        answers().print(jobs_table(found, datetime.now(UTC)))
    return ExitCode.DONE


def get(job: JobName, as_json: AsJson = False, server: Server = "", namespace: Namespace = "") -> int:
    """Show one job: what was asked and decided, where it stands, its attempts and outputs."""
    from hone.cli.job_text import print_job

    with connect(server, namespace) as connection:
        found = connection.client.get(job)
        saved = () if as_json else connection.client.checkpoints(found.id)
    if as_json:
        print_json(as_data(found))
    else:
        print_job(answers(), found, datetime.now(UTC), saved)
    return ExitCode.DONE


def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="LINES", help="Only the last lines.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Which process.")] = 0,
    attempt: Annotated[int, typer.Option(min=0, help="Which attempt; 0 is the last.")] = 0,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Print what a process of the job wrote. Ctrl-C leaves the job running."""
    with connect(server, namespace) as connection:
        try:
            for text in connection.client.logs(job, follow=follow, tail=tail, rank=rank, attempt=attempt):
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
    return ExitCode.DONE


def pause(job: JobName, as_json: AsJson = False, server: Server = "", namespace: Namespace = "") -> int:
    """Free what a job holds. Its trainer saves a checkpoint first; `hone resume` goes on from there."""
    from hone.job import State

    with connect(server, namespace) as connection:
        found = connection.client.pause(job)
        while connection.in_this_process and found.state == State.PAUSING:  # nobody else would stop it
            time.sleep(0.1)
            found = connection.client.get(found.id)
    if as_json:
        print_json(as_data(found))
    else:
        following = f"hone resume {found.id}" if found.state == State.PAUSED else f"hone watch {found.id}"
        answers().print(f"{found.namespace}/{found.id} is {found.state}. Next: {following}")
    return ExitCode.DONE


def resume(job: JobName, as_json: AsJson = False, server: Server = "", namespace: Namespace = "") -> int:
    """Have a paused job go on from its last checkpoint."""
    with connect(server, namespace) as connection:
        found = connection.client.resume(job)
        if connection.in_this_process:
            found = _started(connection, found)
    if as_json:
        print_json(as_data(found))
    else:
        answers().print(f"{found.namespace}/{found.id} is {found.state}. Next: hone watch {found.id}")
    return ExitCode.DONE


def checkpoints(job: JobName, as_json: AsJson = False, server: Server = "", namespace: Namespace = "") -> int:
    """List what a job's trainer saved to go on from. With --json also what was removed for newer ones."""
    from hone.cli.job_text import checkpoints_table

    with connect(server, namespace) as connection:
        found = connection.client.checkpoints(job)
    complete = [checkpoint for checkpoint in found if checkpoint.complete]
    if as_json:
        print_json({"checkpoints": as_data(found)})
    elif not complete:
        remarks().print("No checkpoints. One is saved every training.checkpoint.steps, and when the job is paused.")
    else:
        answers().print(checkpoints_table(complete, datetime.now(UTC)))
    return ExitCode.DONE


def cancel(job: JobName, as_json: AsJson = False, server: Server = "", namespace: Namespace = "") -> int:
    """Stop a job for good. Asking again does no harm.

    Its trainer saves a checkpoint before it ends, which stays in the store (hone checkpoints); hone pause is for going
    on later.
    """
    with connect(server, namespace) as connection:
        found = connection.client.cancel(job)
        if connection.in_this_process:
            found = connection.client.wait(found.id)  # nobody else would stop it
    if as_json:
        print_json(as_data(found))
    else:
        answers().print(f"{found.namespace}/{found.id} is {found.state}.")
    return ExitCode.DONE


def delete(
    job: JobName,
    artifacts: Annotated[bool, typer.Option("--artifacts", help="Delete its outputs too.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Delete the record of a job that has ended, and with --artifacts its outputs."""
    with connect(server, namespace) as connection:
        found = connection.client.get(job)
        confirm(f"Delete {found.namespace}/{found.id}{_outputs_of(found) if artifacts else ''}?", yes=yes)
        found = connection.client.delete(found.id, artifacts=artifacts)
    if as_json:
        print_json(as_data(found))
    else:
        kept = "" if artifacts or not found.outputs else " Its outputs are kept in the store."
        answers().print(f"{found.namespace}/{found.id} is deleted.{kept}")
    return ExitCode.DONE


def download(
    job: JobName,
    directory: Annotated[
        Path, typer.Argument(metavar="[DIRECTORY]", help="Where to; default: one of the job's id.")
    ] = Path(),
    kind: Annotated[str, typer.Option(help="Only this output: adapter, merged or model.")] = "",
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Fetch a job's outputs; every file is checked against its digest."""
    with connect(server, namespace) as connection:
        found = connection.client.get(job)
        target = directory if directory != Path() else Path(found.id)
        with Transfer() as transfer:
            paths = connection.client.download(found.id, target, kind=kind, progress=transfer.report)
    if as_json:
        print_json({"job": found.id, "directories": [str(path) for path in paths]})
    else:
        for path in paths:
            answers().print(f"  {path}")
    return ExitCode.DONE


def confirm(question: str, *, yes: bool) -> None:
    """Ask, or raise: declined, or nobody there to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked here: give --yes to go ahead.")
    if not typer.confirm(question):
        raise typer.Abort


def _started(connection: Connection, job: "Job") -> "Job":
    """Keep our own service up until it has started the run, which then goes on by itself."""
    from hone.job import State

    end = time.monotonic() + START_S
    while job.state == State.PENDING and time.monotonic() < end:
        time.sleep(0.1)
        job = connection.client.get(job.id)
    if job.state in (State.PENDING, State.QUEUED):
        remarks().print(f"{job.id} waits, and no `hone serve` runs that would start it: hone watch {job.id} does, too.")
    return job


def _outputs_of(job: "Job") -> str:
    names = ", ".join(f"{output.kind} {q.size(output.size_bytes)}" for output in job.outputs)
    return f" and its outputs ({names})" if names else ""


class Transfer:
    """A bar for bytes on stderr; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=remarks(), transient=True, disable=not remarks().is_terminal)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "Transfer":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, done: int, total: int) -> None:
        """Bytes so far, of how many."""
        self._progress.update(self._task, completed=done, total=total)
