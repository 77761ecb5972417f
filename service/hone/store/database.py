"""The database behind the store: connections, transactions, and what the driver's errors mean.

Foreign exceptions are mapped here, in the words of the database's kind (sqlite.py, postgresql.py), and nowhere else.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from types import ModuleType
from typing import Any

from sqlalchemy import Connection, Engine, Table
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as NoConnection

from hone.errors import PermanentError, Unavailable
from hone.store import postgresql, sqlite
from hone.store.commits import SharedCommits
from hone.store.migrate import migrate

MAX_VALUES = 30_000
"""In one statement; SQLite takes 32,766."""
_WRITES = {"hone_writes": True}
_READS_ONE_STATEMENT = {"isolation_level": "AUTOCOMMIT", "hone_plain": True}
_KINDS: dict[str, ModuleType] = {"sqlite": sqlite, "postgresql": postgresql}


class Database:
    """One database, open and of the current schema. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        address = _address(url)
        self.name = address.render_as_string(hide_password=True)
        self._kind, self._engine = _open(address, self.name)
        self.is_sqlite = self._kind is sqlite
        self._quick_lock = Lock()
        self._quick: Connection | None = None
        self._readers = self._engine if self.is_sqlite else self._engine.execution_options(**postgresql.SNAPSHOT)
        # Between processes, writers that hold several jobs at once would wait for each other; one job each never does.
        self._write = SharedCommits(self._engine.execution_options(**_WRITES)).write if self.is_sqlite else self._begin
        with self._mapped():
            migrate(self._engine, lock=None if self.is_sqlite else postgresql.MIGRATION_LOCK)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot."""
        with self._mapped(), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, durable at the end of the block. Threads that write at the same time share the commit: of
        SQLite here, PostgreSQL sees to that itself."""
        with self._mapped(), self._write() as connection:
            yield connection

    def read_row(self, statement: Any, values: dict[str, Any]) -> Any:
        """The first row of one statement; None where there is none."""
        return next(iter(self.read_rows(statement, values)), None)

    def read_rows(self, statement: Any, values: dict[str, Any]) -> Any:
        """The rows of one statement, on a connection that is kept: five times cheaper than `read`."""
        with self._quick_lock, self._mapped():
            for is_last in (False, True):
                if self._quick is None:
                    self._quick = self._engine.connect().execution_options(**_READS_ONE_STATEMENT)
                try:
                    return self._quick.execute(statement, values).all()
                except DBAPIError as error:
                    self._quick.invalidate()
                    self._quick = None
                    if is_last or not error.connection_invalidated:  # the server was started again meanwhile
                        raise

    def close(self) -> None:
        """Give every connection back. The database is not used again."""
        with self._quick_lock:
            if self._quick is not None:
                self._quick.close()
                self._quick = None
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # a taken key is an answer; the store knows whose
        except DBAPIError as error:
            raise self._kind.meaning(error, self.name) from error
        except NoConnection as error:
            raise Unavailable(f"Every connection to {self.name} is in use.", fix="Try again.") from error


def insert_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of the same columns, as few statements as can be: sqlite3 lets another thread in at each row of an
    executemany, and a service of several threads then waits for itself most of the time."""
    if not rows:
        return
    columns = list(rows[0])
    most = MAX_VALUES // len(columns)
    mark = "?" if connection.dialect.name == "sqlite" else "%s"
    one = f"({', '.join([mark] * len(columns))})"
    for first in range(0, len(rows), most):
        part = rows[first : first + most]
        values = tuple(row[column] for row in part for column in columns)
        statement = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES {', '.join([one] * len(part))}"
        connection.exec_driver_sql(statement, values)


def _address(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise PermanentError(
            "HONE_DATABASE is not the address of a database.",
            fix="Set it to postgresql://user:password@host/database, or to nothing.",
        ) from error
    return address.set(drivername="postgresql") if address.drivername == "postgres" else address


def _open(address: URL, name: str) -> tuple[ModuleType, Engine]:
    try:
        kind = _KINDS[address.get_backend_name()]
        return kind, kind.open_engine(address)
    except (KeyError, NoSuchModuleError, ImportError) as error:
        raise PermanentError(
            f"There is no driver for {name}.",
            fix="Use PostgreSQL (postgresql://user:password@host/database), or leave HONE_DATABASE empty for SQLite.",
        ) from error
