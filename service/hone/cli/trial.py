"""`hone try`: prompts answered by the base and by what jobs made of it, side by side.

From job ids to directories that hold their outputs, verified; the trainer's process (answering.py) loads them. Without
`--prompt` there is a conversation (conversation.py).
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hone.cli.answer import as_data, print_json
from hone.cli.connection import connect
from hone.cli.console import remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.options import AsJson, Namespace, Server
from hone.cli.replies import print_answers, system_for
from hone.errors import NotFound, UserError, WrongState

if TYPE_CHECKING:
    from hone.cli.answering import Answering, Sampling
    from hone.job import Job, Output
    from hone.rpc.client import Client

BASE = "base"
KINDS = ("adapter", "model", "merged")
"""Which output of a job answers: the first that it has. Adapters share one copy of their base."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A job and the output that answers for it."""

    job: "Job"
    output: "Output"
    base: str
    """Source of the model that the job started from."""
    plain: bool
    """Whether it gets prompts as they are, whatever chat template there is."""


def try_(
    job: Annotated[list[str], typer.Argument(metavar="JOB…", help="Finished jobs of one base, by id or name.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Answer this and end. Repeatable; - is all of stdin."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Draw tokens at this temperature; 0 takes the likeliest.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same draw again; with --temperature.")] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System prompt of chat bases. Default: that of the jobs, where they agree."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="By the chat template, or as it is. Default: as the job's rows were."),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not ask the base.")] = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Ask the base and what jobs made of it, side by side; without --prompt, in a conversation.

    Runs on this machine, which needs the trainer's libraries and room for one copy of the base.
    """
    from hone.cli.answering import Sampling

    prompts = _prompts(prompt, as_json=as_json)
    if seed is not None and not temperature:
        raise typer.BadParameter("--seed needs --temperature: the likeliest token is always the same.")
    if chat is False and system is not None:
        raise typer.BadParameter("--plain leaves no place for --system.")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with tempfile.TemporaryDirectory(prefix="hone-try-") as scratch:
        with connect(server, namespace) as connection:
            jobs = _jobs(connection.client, job, no_base=no_base)
            tried = [_tried(connection.client, found, chat=chat) for found in jobs]
            wanted = _wanted(tried, Path(scratch), asks_base=not no_base)
        with _loaded(wanted, Path(scratch)) as answering:
            wording = system if system is not None else _common_system(tried)
            _check_chat(answering, system, chat=bool(chat))
            for note in answering.notes:
                remarks().print(f"Note: {note}")
            if not prompts:
                from hone.cli.conversation import Conversation

                return Conversation(answering, sampling, system=wording).run()
            found = _answers(answering, prompts, sampling, wording, show=not as_json)
        if as_json:
            print_json({"models": as_data(answering.models), "notes": list(answering.notes), "prompts": found})
    return ExitCode.DONE


def _prompts(given: list[str] | None, *, as_json: bool) -> list[str]:
    if given:
        if given.count("-") > 1:
            raise typer.BadParameter("--prompt - reads all of stdin, so it can stand there once.")
        return [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in given]
    if as_json:
        raise typer.BadParameter("--json answers prompts: give --prompt.")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("nobody can be asked here: give --prompt TEXT, or --prompt - to read stdin.")
    return []


def _jobs(client: "Client", names: Sequence[str], *, no_base: bool) -> "list[Job]":
    """The jobs, each once."""
    found = {job.id: job for job in map(client.get, names)}
    if BASE in found and not no_base:
        raise UserError("The job base cannot be told from its base.", fix="Add --no-base.")
    return list(found.values())


def _tried(client: "Client", job: "Job", *, chat: bool | None) -> Tried:
    """The job with the output that answers. Raises WrongState and UserError where there is none."""
    from hone.job import State

    if not job.state.is_terminal:
        raise WrongState(f"Job {job.id} is {job.state}: it has no outputs yet.", fix=f"See: hone watch {job.id}")
    if job.state != State.SUCCEEDED:
        raise WrongState(f"Job {job.id} is {job.state}: it left no outputs.", fix=f"See: hone get {job.id}")
    if job.method == "reward":
        raise UserError(f"Job {job.id} trained a reward model, which scores answers and gives none.")
    outputs = {output.kind: output for output in job.outputs}
    output = next((outputs[kind] for kind in KINDS if kind in outputs), None)
    if output is None:
        raise NotFound(f"Job {job.id} left no output that answers.", fix=f"See: hone get {job.id}")
    base = _address(client, job.resolved_spec.model.source)
    return Tried(job=job, output=output, base=base, plain=_was_plain(client, job) if chat is None else not chat)


def _was_plain(client: "Client", job: "Job") -> bool:
    """Whether it was trained on texts and not on messages, as its trainer told; not where that told nothing of it."""
    from hone.job import EventType

    told = (event.fields.get("prompts") for event in client.events(job.id) if event.type == EventType.DATA)
    return next(told, None) == "text"


def _address(client: "Client", source: str) -> str:
    """A source; of another job's output its place, where that job is still there."""
    if not source.startswith("job://"):
        return source
    name, _, kind = source.removeprefix("job://").partition("/")
    try:
        outputs = client.get(name).outputs
    except NotFound:
        return source
    return next((output.uri for output in outputs if output.kind == kind), source)


def _wanted(tried: Sequence[Tried], scratch: Path, *, asks_base: bool) -> dict[str, Any]:
    """What the process is told: hone_trainer.trial.Wanted. Every output is verified, and fetched where it has to be."""
    from hone.cli.jobs import Transfer
    from hone.rpc.download import present

    jobs = []
    for number, one in enumerate(tried):
        with Transfer() as transfer:
            path = present(one.output, scratch / f"output-{number}", progress=transfer.report)
        jobs.append(
            {
                "name": one.job.id,
                "kind": one.output.kind,
                "asked": f"job://{one.job.id}/{one.output.kind}",
                "path": str(path),
                "base": one.base,
                "plain": one.plain,
            }
        )
    return {
        "jobs": jobs,
        "scratch": str(scratch),
        "asks_base": asks_base,
        "plain_base": all(one.plain for one in tried),
    }


@contextmanager
def _loaded(wanted: dict[str, Any], scratch: Path) -> "Iterator[Answering]":
    from hone.cli.answering import Answering

    settings = read_settings()
    with remarks().status("loading the models …"):
        answering = Answering(
            settings.trainer_python or sys.executable,
            wanted,
            log=scratch / "answering.log",
            endpoint=settings.store_endpoint,
        )
    with answering:
        yield answering


def _common_system(tried: Sequence[Tried]) -> str | None:
    """The system prompt that all jobs were trained with; None where they differ."""
    [first, *others] = {one.job.resolved_spec.model.system_prompt for one in tried}
    return None if others else first


def _check_chat(answering: "Answering", system: str | None, *, chat: bool) -> None:
    """What is asked for and cannot be had is said."""
    without = [model.name for model in answering.models if not model.chat]
    if not without or not (chat or system is not None):
        return
    if len(without) == len(answering.models):
        fix = "Leave it out." if chat else "Leave it out, or add --chat where there is a chat template."
        option = "--chat" if chat else "--system"
        raise UserError(f"{option} needs a chat template, and here every prompt is given as it is.", fix=fix)
    remarks().print(f"Note: prompts reach {', '.join(without)} as they are, without a chat template.")


def _answers(
    answering: "Answering", prompts: Sequence[str], sampling: "Sampling", system: str | None, *, show: bool
) -> list[dict[str, Any]]:
    found = []
    for prompt in prompts:
        given = []
        for model in answering.models:
            with remarks().status(f"{model.name} answers …"):
                text = system_for(model, system)
                given.append(answering.ask(model.name, prompt, system=text, sampling=sampling))
        if show:
            print_answers(prompt, given)
        found.append({"prompt": prompt, "answers": as_data(given)})
    return found
