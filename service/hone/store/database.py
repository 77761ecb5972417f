"""The database behind the store: connections, transactions, and what the driver's errors mean.

Foreign exceptions are mapped here and nowhere else.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)

from hone.errors import HoneError, PermanentError, StorageError, Unavailable
from hone.store.commits import SharedCommits
from hone.store.migrate import migrate

BUSY_TIMEOUT_MS = 5000
"""How long SQLite waits for another process that writes."""
_WRITES = {"hone_writes": True}
_READS_ONE_STATEMENT = {"isolation_level": "AUTOCOMMIT", "hone_plain": True}


class Database:
    """One database, open and of the current schema. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.name = _without_password(url)
        self._quick_lock = Lock()
        self._quick: Connection | None = None
        self._engine = _engine(url)
        self._commits = SharedCommits(self._engine.execution_options(**_WRITES))
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        with self._mapped():
            migrate(self._engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot."""
        with self._mapped(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, durable at the end of the block. Threads that write at the same time share the commit."""
        with self._mapped(), self._commits.write() as connection:
            yield connection

    def read_row(self, statement: Any, values: dict[str, Any]) -> Any:
        """The first row of one statement, on a connection that is kept: five times cheaper than `read`."""
        with self._quick_lock, self._mapped():
            if self._quick is None:
                self._quick = self._engine.connect().execution_options(**_READS_ONE_STATEMENT)
            try:
                return self._quick.execute(statement, values).first()
            except DBAPIError:
                self._quick.invalidate()
                self._quick = None
                raise

    def close(self) -> None:
        """Give every connection back. The database is not used again."""
        with self._quick_lock:
            if self._quick is not None:
                self._quick.close()
                self._quick = None
        self._engine.dispose()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # a taken key is an answer; the store knows whose
        except DBAPIError as error:
            raise _meaning(error, self.name) from error


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise PermanentError(
            f"{url!r} is not the address of a database.", fix="Set HONE_DATABASE to a SQLAlchemy URL, or to nothing."
        ) from error


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, pool_size=16, max_overflow=48)
    except (NoSuchModuleError, ImportError) as error:
        raise PermanentError(
            f"There is no driver for {_without_password(url)}: {error}.",
            fix="Install it, or leave HONE_DATABASE empty.",
        ) from error
    if engine.dialect.name == "sqlite":
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


def _meaning(error: DBAPIError, name: str) -> HoneError:
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
        return Unavailable(
            f"The database {name} does not answer ({cause}).", fix="Look at its server; trying again helps."
        )
    return PermanentError(f"The database {name} refused a statement ({cause}).", fix="Report it as a bug.")
