"""A copy of the SQLite database, taken while the service goes on. Called by `hone backup`; PostgreSQL has pg_dump.

The copy is one file, one moment in time, and has been checked.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from hone.errors import HoneError, StorageError, UserError
from hone.store.sqlite import BUSY_TIMEOUT_MS


def copy_database(url: str, target: Path) -> None:
    """Copy the database of a SQLAlchemy URL into a new file that its owner alone may read.

    Raises UserError when the database is not SQLite or the file exists, StorageError when it cannot be read or written.
    """
    source = _file_of(url)
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError as error:
        raise UserError(f"{target} exists.", fix="Name a new file, or remove that one.") from error
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}.", fix="Name a file elsewhere.") from error
    try:
        _copy(source, target)
    except (sqlite3.Error, OSError) as error:
        target.unlink()
        raise StorageError(
            f"{source} cannot be copied to {target}: {error}.", fix="Look at the disk of both."
        ) from error
    except HoneError:
        target.unlink()
        raise


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_MS / 1000)) as database:
        database.execute("VACUUM INTO ?", (str(target),))
    with closing(sqlite3.connect(target)) as copy:
        (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise StorageError(f"{source} is damaged: {found}.", fix="Keep it, and restore the last good backup.")
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _file_of(url: str) -> Path:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise UserError("HONE_DATABASE is not the address of a database.", fix="Leave it empty for SQLite.") from error
    if address.get_backend_name() != "sqlite":
        raise UserError("The database is not SQLite.", fix="Back PostgreSQL up with its own pg_dump.")
    path = Path(address.database or "").absolute()
    if not address.database or not path.is_file():
        raise UserError(f"There is no database {path}.", fix="Set HONE_HOME to the home of the service.")
    return path
