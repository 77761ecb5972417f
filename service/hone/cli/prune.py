"""`hone prune`: make room under HONE_HOME.

What goes: working files (fetched inputs, prepared data, unfinished outputs) of every run that has ended, and the logs
of runs that ended long ago. Records and outputs stay; `hone delete` removes those. Runs that live are never touched.
"""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hone import quantities as q
from hone.cli.answer import print_json
from hone.cli.console import answers, remarks
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode
from hone.cli.jobs import confirm
from hone.cli.options import AsJson, Yes

_UNITS = {"m": 60, "h": 3600, "d": 86400}
_COMES_UP_S = 3600
"""A directory without a process is taken for a run that is about to start, until it is this old."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One directory that nobody needs any more."""

    path: Path
    what: str
    size_bytes: int
    age_s: float


def prune(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Logs go when the run ended this long ago: 90m, 12h, 30d.")
    ] = "30d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    """Remove working files of ended runs, and logs of old ones, under HONE_HOME. Asks before it does.

    Records and outputs of jobs stay; `hone delete` removes those.
    """
    limit_s = _seconds(older_than)
    runs = read_settings().home / "runs"
    found = list(find(runs, now=time.time(), older_than_s=limit_s))
    total = sum(leftover.size_bytes for leftover in found)
    if found and not dry_run:
        if not as_json:
            _print(found, total)
        confirm(f"Remove {q.size(total)}?", yes=yes)
        for leftover in found:
            _remove(leftover.path)
    if as_json:
        print_json(_as_data(found, total, removed=not dry_run))
    elif not found:
        answers().print(f"Nothing to remove under {runs}.")
    elif dry_run:
        _print(found, total)
        remarks().print("Nothing was removed (--dry-run).")
    else:
        answers().print(f"Removed {q.size(total)}.")
    return ExitCode.DONE


def find(runs: Path, *, now: float, older_than_s: float) -> Iterator[Leftover]:
    """Leftovers of the runs below a directory: `<namespace>/<job>/attempt-<n>`."""
    for attempt in sorted(runs.glob("*/*/attempt-*")):
        ended = _ended_at(attempt, now)
        if ended is None:
            continue
        scratch = attempt / "scratch"
        if now - ended >= older_than_s:
            yield _leftover(attempt, "run", now - ended)
        elif scratch.is_dir() and any(scratch.iterdir()):
            yield _leftover(scratch, "working files", now - ended)


def _ended_at(attempt: Path, now: float) -> float | None:
    """When the run ended, as a time stamp; None while it lives or may yet start."""
    from hone.backends.run_files import is_locked
    from hone.run import RunDirectory

    directory = RunDirectory(attempt)
    if directory.exit.exists():
        return directory.exit.stat().st_mtime
    if directory.process.exists():
        return None if is_locked(directory) else directory.process.stat().st_mtime
    changed = attempt.stat().st_mtime
    return changed if now - changed > _COMES_UP_S else None


def _leftover(path: Path, what: str, age_s: float) -> Leftover:
    size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return Leftover(path=path, what=what, size_bytes=size, age_s=age_s)


def _remove(path: Path) -> None:
    shutil.rmtree(path)
    for parent in (path.parent, path.parent.parent):  # the job's directory, and the namespace's, with the last run
        if path.name != "scratch" and not any(parent.iterdir()):
            parent.rmdir()


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+)\s*([mhd])\s*", text)
    if not match:
        raise typer.BadParameter(f"--older-than {text!r} is not an age: write 90m, 12h or 30d.")
    return int(match[1]) * _UNITS[match[2]]


def _as_data(found: list[Leftover], total: int, *, removed: bool) -> dict[str, object]:
    rows = [
        {"path": str(leftover.path), "what": leftover.what, "size_bytes": leftover.size_bytes, "age_s": leftover.age_s}
        for leftover in found
    ]
    return {"removed": removed, "size_bytes": total, "leftovers": rows}


def _print(found: list[Leftover], total: int) -> None:
    table = Table.grid(padding=(0, 2))
    for leftover in found:
        ended = f"ended {q.duration(leftover.age_s)} ago"
        table.add_row("", q.size(leftover.size_bytes), leftover.what, ended, str(leftover.path))
    answers().print(table)
    answers().print(f"  {q.size(total)} in all")
