"""`hone run` and `hone watch`: from a request to its outputs, and back to a run that goes on."""

import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hone.cli.answer import as_data, print_json, print_json_line
from hone.cli.connection import Connection, connect
from hone.cli.console import answers, remarks
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, JobName, Namespace, Overrides, RequestFile, Server
from hone.cli.request import about, load_all
from hone.errors import InvalidRequest, Violation

if TYPE_CHECKING:
    from hone.cli.follow import Display, Interrupts
    from hone.job import Job
    from hone.rpc.client import Client
    from hone.spec import JobSpec


def run(
    file: RequestFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Plan a request, run it to its end, and show where the model is.

    A file of several requests is a chain: each runs when what it names as job://<name> is there; given once more, only
    what is missing runs. Ctrl-C asks once and cancels cleanly. When this command is killed the run goes on: `hone
    watch` comes back to it.
    With --json, progress goes to stderr and the finished job to stdout.
    """
    from hone.cli.follow import Interrupts

    specs = load_all(file, overrides)
    console = remarks() if as_json else answers()
    with connect(server, namespace) as connection, Interrupts() as interrupts:
        if len(specs) > 1:
            jobs, was_asked_to_cancel = _run_chain(connection, specs, file, console, interrupts)
        else:
            job = _submit(connection.client, specs[0], file, console)
            job, was_asked_to_cancel = _to_the_end(connection, job, console, interrupts)
            jobs = [job]
    if as_json:
        print_json(as_data(jobs[0]) if len(specs) == 1 else {"jobs": as_data(jobs)})
    return max(_exit_code(job, was_asked_to_cancel) for job in jobs)


def watch(
    job: JobName,
    samples: Annotated[
        bool, typer.Option("--samples", help="Show sample answers as they come (reporting.samples).")
    ] = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Follow a job to its end, over pauses. Ctrl-C leaves it running.

    Ends with 0 when the job succeeded and 1 when it did not. With --json, one event a line.
    """
    with connect(server, namespace) as connection:
        found = connection.get(job)
        return _print_events(connection, found) if as_json else _watch(connection, found, samples=samples)


def _run_chain(
    connection: Connection, specs: "list[JobSpec]", file: Path, console: Console, interrupts: "Interrupts"
) -> tuple[list["Job"], bool]:
    """Every job of a chain, at its end; once one is cancelled, so are those behind it."""
    from hone.cli.chain import submit_chain

    with about(file):
        steps = submit_chain(connection.client, specs, must_run_here=True)
    jobs, was_asked_to_cancel = list["Job"](), False
    for number, step in enumerate(steps, start=1):
        console.print(f"\n{number}/{len(steps)}  {step.job.id}{', done before' if step.is_done else ''}")
        if was_asked_to_cancel:
            jobs.append(connection.client.cancel(step.job.id))
            continue
        job, was_asked_to_cancel = _to_the_end(connection, step.job, console, interrupts)
        jobs.append(job)
    return jobs, was_asked_to_cancel


def _submit(client: "Client", spec: "JobSpec", file: Path, console: Console) -> "Job":
    from hone.cli.plan import print_plan

    with about(file):
        answer = client.plan(spec)
        if answer.violations or answer.spec is None or answer.plan is None:
            raise InvalidRequest(answer.violations)
        if not answer.runs_here:
            fix = f"{answer.why_not_here} See: hone plan {file}"
            raise InvalidRequest([Violation(path="compute", message=fix)])
        job = client.submit(spec)
    print_plan(console, job.resolved_spec, job.plan)
    console.print()
    return job


def _to_the_end(connection: Connection, job: "Job", console: Console, interrupts: "Interrupts") -> tuple["Job", bool]:
    from hone.cli.ending import print_end
    from hone.cli.follow import display_on, follow

    display = display_on(console)
    display.say(f"  {job.namespace}/{job.id}")
    question = _CancelQuestion(connection, job, display, interrupts)
    story = follow(connection.watch(job.id), interrupts, display, on_interrupt=question)
    job = connection.get(job.id)
    if job.state.is_terminal:
        print_end(console, job, story)
    else:
        console.print(f"  {job.id} is {job.state}; hone watch {job.id} comes back to it.")
    return job, question.cancelled


class _CancelQuestion:
    """What Ctrl-C does during `hone run`; answers whether to leave without waiting for the end."""

    def __init__(self, connection: Connection, job: "Job", display: "Display", interrupts: "Interrupts") -> None:
        self._connection, self._job, self._display, self._interrupts = connection, job, display, interrupts
        self.cancelled = False

    def __call__(self) -> bool:
        if self.cancelled:  # once more while it is being cancelled: do not wait
            return True
        if self._is_wanted():
            self.cancelled = True
            self._connection.client.cancel(self._job.id)
            self._display.say("  Cancelling; Ctrl-C once more leaves without waiting.")
        else:
            self._display.say("  Goes on.")
        return False

    def _is_wanted(self) -> bool:
        if not sys.stdin.isatty():
            return True
        self._display.pause()
        with self._interrupts.as_usual():
            try:
                answer = _ask("\n  Cancel the run? [y/N] ")
            except KeyboardInterrupt:
                return True
            except EOFError:
                return False
        return answer.strip().lower() in ("y", "yes")


def _ask(question: str) -> str:
    """As input(), which does not hear a Ctrl-C that comes between its question and its wait for a key."""
    sys.stdout.write(question)
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        pass
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _exit_code(job: "Job", was_asked_to_cancel: bool) -> ExitCode:
    from hone.cli.ending import exit_code
    from hone.job import State

    if was_asked_to_cancel and job.state not in (State.SUCCEEDED, State.FAILED):
        return ExitCode.INTERRUPTED
    return exit_code(job)


def _watch(connection: Connection, job: "Job", *, samples: bool) -> ExitCode:
    from hone.cli.ending import exit_code, print_end
    from hone.cli.follow import Interrupts, display_on, follow
    from hone.job import State

    console = answers()
    with Interrupts() as interrupts:
        display = display_on(console, samples=samples)
        story = follow(connection.watch(job.id), interrupts, display, on_interrupt=lambda: True)
    job = connection.get(job.id)
    if not job.state.is_terminal:
        stands = "It is paused; hone resume has it go on" if job.state == State.PAUSED else "Still running"
        console.print(f"\n  {stands}. hone watch {job.id} comes back to it; hone cancel {job.id} stops it.")
        return ExitCode.INTERRUPTED
    print_end(console, job, story)
    return exit_code(job)


def _print_events(connection: Connection, job: "Job") -> ExitCode:
    from hone.cli.ending import exit_code

    for event in connection.watch(job.id):
        print_json_line(as_data(event))
    return exit_code(connection.get(job.id))
