"""`hone report`: a job on one page, at any time of its life."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hone.cli.answer import print_json
from hone.cli.connection import connect
from hone.cli.console import answers
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, JobName, Namespace, Server
from hone.errors import UserError

if TYPE_CHECKING:
    from hone.job import Event, Job

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to; - is stdout. Default: JOB.html in this directory."),
]


def report(
    job: JobName, output: Output = None, as_json: AsJson = False, server: Server = "", namespace: Namespace = ""
) -> int:
    """Write one self-contained page about a job: curves, plan against measured, data, samples, versions.

    Made of what its trainer has reported, so it shows a job that still runs as well. A trainer leaves such a page in
    the store, as report.html beside the outputs.
    """
    with connect(server, namespace) as connection:
        found = connection.client.get(job)
        page = _page(found, list(connection.client.events(found.id)))
    if output == Path("-"):
        typer.echo(page, nl=False)
        return ExitCode.DONE
    path = output or Path(f"{found.id}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", fix="Give another --output.") from error
    if as_json:
        print_json({"job": found.id, "file": str(path)})
    else:
        answers().print(f"  {path}")
    return ExitCode.DONE


def _page(job: "Job", events: "list[Event]") -> str:
    from hone.report import Facts, render

    return render(
        Facts(
            namespace=job.namespace,
            job=job.id,
            state=str(job.state),
            spec=job.resolved_spec,
            plan=job.plan,
            events=events,
            failure=job.failure,
            attempts=len(job.attempts),
        )
    )
