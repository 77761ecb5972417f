"""`hone backup`: a copy of the database under HONE_HOME, while the service goes on."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hone import quantities as q
from hone.cli.console import answers
from hone.cli.environment import read_settings
from hone.cli.failure import ExitCode


def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A new file, or - for standard output.")],
) -> int:
    """Copy the SQLite database under HONE_HOME into FILE, and check the copy. The service goes on meanwhile.

    PostgreSQL is backed up by its own pg_dump.
    """
    from hone.store.backup import copy_database

    url = read_settings().database_url
    if file != "-":
        copy_database(url, Path(file))
        answers().print(f"{file}: {q.size(Path(file).stat().st_size)}, checked.")
        return ExitCode.DONE
    with tempfile.TemporaryDirectory(prefix="hone-") as directory:
        copy = Path(directory) / "hone.db"
        copy_database(url, copy)
        with copy.open("rb") as content:
            shutil.copyfileobj(content, sys.stdout.buffer)
    return ExitCode.DONE
