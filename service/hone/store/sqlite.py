"""SQLite behind the store: a file, one process that writes, durable at each commit. Called by database.py."""

import sqlite3

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from hone.errors import HoneError, PermanentError, StorageError, Unavailable

BUSY_TIMEOUT_MS = 5000
"""How long SQLite waits for another process that writes."""


def open_engine(url: URL) -> Engine:
    """An engine over one file; connections open when they are needed."""
    engine = create_engine(url, pool_size=16, max_overflow=48)
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # Python's own BEGIN comes too late to protect what was read before it
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("hone_plain"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("hone_writes") else "BEGIN")


def meaning(error: DBAPIError, name: str) -> HoneError:
    """What an error of the driver says to people."""
    cause = str(error.orig).strip()
    text = cause.lower()
    if "locked" in text or "busy" in text:
        return Unavailable(
            f"The database {name} is locked by another process.",
            fix="Stop the other service or tool that writes to it, or give this one a HONE_HOME of its own.",
        )
    if "not a database" in text or "malformed" in text:
        return StorageError(
            f"{name} is not a database that can be read ({cause}).", fix="Restore it from a backup, or move it away."
        )
    if "readonly" in text or "read-only" in text or "unable to open" in text:
        return StorageError(
            f"The database {name} cannot be written ({cause}).",
            fix="Give this user the right to write to its directory.",
        )
    if "full" in text or "disk i/o" in text:
        return StorageError(f"The disk of the database {name} fails or is full ({cause}).", fix="Free space there.")
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return Unavailable(f"The database {name} does not answer ({cause}).", fix="Trying again helps.")
    return PermanentError(f"The database {name} refused a statement ({cause}).", fix="Report it as a bug.")
