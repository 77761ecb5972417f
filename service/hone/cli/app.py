"""All commands in one application, the global options, and the end of every command: an exit code."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hone.cli import backup, calibrate, data, doctor, jobs, plan, prune, render, serve, spec, trial
from hone.cli import push as pushes
from hone.cli import report as reports
from hone.cli import run as runs
from hone.cli.failure import EPILOG, ExitCode, tell

app = typer.Typer(
    name="hone",
    help="Fine-tune language models: one request, planned, run and verified.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_START, _JOBS, _HERE = "Start", "Jobs", "This machine"
_COMMANDS: tuple[tuple[str, str, Any], ...] = (
    ("run", _START, runs.run),
    ("plan", _START, plan.plan),
    ("data", _START, data.data),
    ("submit", _START, jobs.submit),
    ("render", _START, render.render),
    ("spec", _START, spec.spec),
    ("list", _JOBS, jobs.list_),
    ("get", _JOBS, jobs.get),
    ("watch", _JOBS, runs.watch),
    ("logs", _JOBS, jobs.logs),
    ("pause", _JOBS, jobs.pause),
    ("resume", _JOBS, jobs.resume),
    ("checkpoints", _JOBS, jobs.checkpoints),
    ("cancel", _JOBS, jobs.cancel),
    ("delete", _JOBS, jobs.delete),
    ("download", _JOBS, jobs.download),
    ("report", _JOBS, reports.report),
    ("push", _JOBS, pushes.push),
    ("try", _JOBS, trial.try_),
    ("serve", _HERE, serve.serve),
    ("doctor", _HERE, doctor.doctor),
    ("calibrate", _HERE, calibrate.calibrate),
    ("prune", _HERE, prune.prune),
    ("backup", _HERE, backup.backup),
)
for _name, _panel, _function in _COMMANDS:
    app.command(_name, rich_help_panel=_panel)(_function)


def _show_version(wanted: bool) -> None:
    if wanted:
        from hone import __version__

        typer.echo(f"hone {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="HONE_SERVER", metavar="ADDRESS", help="The service to talk to, for every command.")
    ] = "",
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", envvar="HONE_NAMESPACE", metavar="NAME", help="The jobs' namespace.")
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    given = {key: value for key, value in (("server", server), ("namespace", namespace)) if value}
    context.default_map = {name: given for name, _, _ in _COMMANDS}


def run(arguments: Sequence[str] | None = None) -> int:
    """One command, from its arguments to its exit code. Never raises."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["hone", *_command_name(arguments)])
    try:
        answer = app(args=arguments, prog_name="hone", standalone_mode=False)
        code = answer if isinstance(answer, int) else ExitCode.DONE
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:  # the reader of a pipe has seen enough; how a run ends is then not known
        _close_quietly()
        return int(ExitCode.INTERRUPTED if command in ("hone run", "hone watch") else ExitCode.DONE)
    except Exception as error:
        return int(tell(error, command=command, as_json="--json" in arguments))
    except KeyboardInterrupt as error:
        return int(tell(error, command=command, as_json="--json" in arguments))


def _command_name(arguments: Sequence[str]) -> list[str]:
    names = {name for name, _, _ in _COMMANDS}
    return [word for word in arguments if word in names][:1]


def _close_quietly() -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
