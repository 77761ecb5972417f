"""How commands fail: exit codes, the sentences on stderr, and the JSON object of `--json`.

The one place where errors become exit codes; docs/exit-codes.md says the same in words.
"""

import os
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

import typer

from hone import errors
from hone.cli.answer import print_json
from hone.cli.console import remarks
from hone.cli.request import FileRefused


class ExitCode(IntEnum):
    """What scripts can rely on."""

    DONE = 0
    FAILED = 1
    """The run failed or was cancelled, the plan does not fit, something is missing (doctor), or Hone has a bug."""
    BAD_REQUEST = 2
    """Wrong usage, or a request that cannot work; nothing was started."""
    NOT_FOUND = 3
    REFUSED = 4
    """Permission, or a quota."""
    UNREACHABLE = 5
    """The service, its database, the cluster, the artefact store or the Hub cannot be used."""
    INTERRUPTED = 130


EXIT_CODES: tuple[tuple[type[errors.HoneError], ExitCode], ...] = (
    (errors.NotFound, ExitCode.NOT_FOUND),
    (errors.Unauthenticated, ExitCode.REFUSED),
    (errors.Refused, ExitCode.REFUSED),
    (errors.UserError, ExitCode.BAD_REQUEST),
    (errors.TemporaryError, ExitCode.UNREACHABLE),
    (errors.StorageError, ExitCode.UNREACHABLE),
    (errors.ClusterError, ExitCode.UNREACHABLE),
    (errors.PermanentError, ExitCode.FAILED),
)
"""Error type → exit code; the first that matches."""

EPILOG = (
    "Exit codes: 0 done · 1 the run failed, or the plan does not fit · 2 wrong usage or bad request · 3 not found · "
    "4 refused · 5 service, cluster or store not reachable · 130 interrupted."
)


def exit_code(error: errors.HoneError) -> ExitCode:
    """The exit code of an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def tell(error: BaseException, *, command: str, as_json: bool) -> ExitCode:
    """Say what went wrong, on stderr or as JSON on stdout; the answer is the exit code."""
    if isinstance(error, errors.HoneError):
        code = exit_code(error)
        message = _sentence(error, command)
    elif isinstance(error, typer.TyperException):
        code = ExitCode.BAD_REQUEST
        message = _usage(error, command)
    elif isinstance(error, (KeyboardInterrupt, typer.Abort)):
        code = ExitCode.INTERRUPTED
        message = "Interrupted."
    else:
        code = ExitCode.FAILED
        message = _unforeseen(error, command)
    if as_json:
        print_json({"error": _error_data(error, message, code)})
    elif isinstance(error, errors.InvalidRequest):
        _print_violations(error)
    else:
        remarks().print(message)
    return code


def _error_data(error: BaseException, message: str, code: ExitCode) -> dict[str, Any]:
    violations = error.violations if isinstance(error, errors.InvalidRequest) else ()
    return {
        "reason": _reason(error),
        "message": message,
        "violations": [
            {"path": violation.path, "message": violation.message, "value": _plain(violation.value)}
            for violation in violations
        ],
        "exit_code": int(code),
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, errors.HoneError):
        return error.reason
    if isinstance(error, typer.TyperException):
        return "USAGE"
    return "INTERRUPTED" if isinstance(error, (KeyboardInterrupt, typer.Abort)) else errors.InternalError.reason


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, list, dict)) or value is None else str(value)


def _sentence(error: errors.HoneError, command: str) -> str:
    if isinstance(error, errors.InvalidRequest):
        return headline(error)
    if not str(error):
        return f"{command} failed: {error.reason}."
    return str(error)


def headline(error: errors.InvalidRequest) -> str:
    """`broken.yaml cannot run: 3 problems, nothing was started.`"""
    subject, cannot = (error.subject, error.cannot) if isinstance(error, FileRefused) else ("The request", "run")
    number = len(error.violations)
    return f"{subject} cannot {cannot}: {number} {'problem' if number == 1 else 'problems'}, nothing was started."


def _print_violations(error: errors.InvalidRequest) -> None:
    from rich.table import Table

    remarks().print(headline(error))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for violation in error.violations:
        table.add_row("", violation.path or "the request", violation.message)
    remarks().print(table)


def _usage(error: typer.TyperException, command: str) -> str:
    return f"{error.format_message()}\nTry: {command} --help"


def _unforeseen(error: BaseException, command: str) -> str:
    if os.environ.get("HONE_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    head = f"{command} met an error that nobody foresaw: {type(error).__name__}: {error}".rstrip(": ")
    return f"{head}\nThis is a bug of Hone's. Details: {_write_down(error, command)}"


def _write_down(error: BaseException, command: str) -> Path:
    text = f"\n{datetime.now(UTC).isoformat()}  {command}\n{''.join(traceback.format_exception(error))}"
    for directory in (_home(), Path(tempfile.gettempdir())):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / "cli-errors.log"
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            continue
        return path
    return Path(os.devnull)


def _home() -> Path:
    from hone.cli.environment import read_settings

    try:
        return read_settings().home
    except errors.InvalidRequest:  # that is another error's story
        return Path(tempfile.gettempdir())
