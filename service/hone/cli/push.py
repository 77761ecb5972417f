"""hone push: an output of a job to the Hugging Face Hub, from this machine, with the person's own token.

What is not said by options is as the job's request says (output.hub). The output comes from the store, each file
verified against the manifest, so TMPDIR needs room for it.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hone import quantities as q
from hone.cli.answer import as_data, print_json
from hone.cli.connection import connect
from hone.cli.console import answers, remarks
from hone.cli.failure import ExitCode
from hone.cli.jobs import Transfer
from hone.cli.options import AsJson, JobName, Namespace, Server

if TYPE_CHECKING:
    from hone.hub import Pushed, Target
    from hone.job import Job, Output


def push(
    job: JobName,
    repo: Annotated[
        str, typer.Option("--repo", metavar="ORG/NAME", help="The repository. Default: the request's output.hub.repo.")
    ] = "",
    what: Annotated[
        str,
        typer.Option(
            "--what", metavar="KIND", help="adapter, merged or model. Default: the request's, else what needs no base."
        ),
    ] = "",
    branch: Annotated[
        str, typer.Option("--branch", metavar="NAME", help="The branch. Default: the request's, else main.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public. Default: private, or as the request says.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed; the Hub is not asked.")] = False,
    as_json: AsJson = False,
    server: Server = "",
    namespace: Namespace = "",
) -> int:
    """Push an output of a job to the Hugging Face Hub, with HF_TOKEN or the token of `hf auth login`.

    Doing it again does no harm: what is there already is not sent, and when all of it is, there is no new commit.
    """
    with connect(server, namespace) as connection:
        found = connection.client.get(job)
    target, output = _target(found, repo, branch, public=public), _output(found, what)
    if dry_run:
        _tell_plan(found, target, output, as_json=as_json)
        return ExitCode.DONE
    pushed = _push(found, target, output, quiet=as_json)
    if as_json:
        print_json({"job": found.id, "what": output.kind, **as_data(pushed)})
    else:
        _tell(pushed)
    return ExitCode.DONE


def _target(job: "Job", repo: str, branch: str, *, public: bool) -> "Target":
    """Where to; raises UserError where nobody has said it, or as no such thing can be called."""
    from hone.errors import UserError
    from hone.hub import Target
    from hone.spec.outputs import branch_fault, repo_fault

    asked = job.resolved_spec.output.hub
    name = repo or (asked.repo if asked else "")
    if not name:
        raise UserError(f"{job.id} has no output.hub that says where to push it.", fix="Give --repo ORG/NAME.")
    chosen = branch or (asked.branch if asked else None) or "main"
    if fault := repo_fault(name) or branch_fault(chosen):
        raise UserError(fault)
    return Target(repo=name, branch=chosen, private=not public and (asked.private if asked else True))


def _output(job: "Job", what: str) -> "Output":
    from hone.errors import UserError, WrongState
    from hone.job import State
    from hone.spec.outputs import pushed_kind

    if job.state != State.SUCCEEDED:
        raise WrongState(
            f"{job.id} is {job.state}: only a job that has succeeded can be pushed.",
            fix=f"Try again then: hone watch {job.id}." if not job.state.is_terminal else f"See: hone get {job.id}.",
        )
    by_kind = {output.kind: output for output in job.outputs}
    if not by_kind:
        raise UserError(f"{job.id} has no outputs that the service knows of.")
    asked = job.resolved_spec.output.hub
    kind = pushed_kind(tuple(by_kind), what or (asked.what if asked else None))
    if kind not in by_kind:
        raise UserError(f"{job.id} has no output {kind!r}; it has: {', '.join(by_kind)}.", fix="Name one by --what.")
    return by_kind[kind]


def _push(job: "Job", target: "Target", output: "Output", *, quiet: bool) -> "Pushed":
    from hone import __version__
    from hone.errors import Unauthenticated
    from hone.hub import push as push_files
    from hone.hub import saved_token
    from hone.rpc.download import download, manifest_of

    token = saved_token()
    if not token:
        fix = "Set HF_TOKEN, or log in: hf auth login."
        raise Unauthenticated("There is no token for the Hub on this machine.", fix=fix)
    with TemporaryDirectory(prefix="hone-push-") as place:
        with Transfer() as transfer:
            [directory] = download([output], Path(place), progress=transfer.report)
        return push_files(
            directory,
            manifest_of(output).files,
            target,
            token=token,
            message=f"Upload {output.kind} of {job.id} with Hone {__version__}",
            tell=(lambda _: None) if quiet else lambda line: answers().print(f"  {line}"),
            shows_bars=not quiet and answers().is_terminal and remarks().is_terminal,
        )


def _tell(pushed: "Pushed") -> None:
    commit = f"(commit {pushed.commit[:7]})"
    if pushed.sent:
        where = f"{pushed.repo}, branch {pushed.branch}, {_seen(pushed)}"
        answers().print(f"Pushed {_count(pushed.sent)} to {where} {commit}.")
    else:
        answers().print(f"{pushed.repo} has all of it already {commit}: no new commit.")
    answers().print(pushed.url)


def _tell_plan(job: "Job", target: "Target", output: "Output", *, as_json: bool) -> None:
    from hone.rpc.download import manifest_of

    files = manifest_of(output).files
    if as_json:
        print_json({"job": job.id, "what": output.kind, **as_data(target), "files": as_data(files)})
        return
    where = f"{target.repo}, branch {target.branch}, {_seen(target)}"
    what = f"{output.kind} of {job.id} ({_count(files)}, {q.size(output.size_bytes)})"
    answers().print(f"Would push {what} to {where}:")
    for file in files:
        answers().print(f"  {file.path}, {q.size(file.size)}")


def _seen(by: "Pushed | Target") -> str:
    return "private" if by.private else "public"


def _count(files: Sequence[object]) -> str:
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}"
