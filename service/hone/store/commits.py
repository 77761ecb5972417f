"""Write transactions of several threads, one after the other in one transaction of the database, with one commit.

A durable commit waits milliseconds for the disk, the statements before it take a fraction of one. So whoever writes
while others wait leaves the commit to them; the last one commits for all, and only then does any of them return.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from hone.errors import Unavailable

LARGEST_GROUP = 64
"""So many share a commit at most: the first of them waits for the last."""
_PATIENCE_S = 1.0


class SharedCommits:
    """Gives each writer a transaction that is its own as far as it can tell: what it raises undoes its part only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = Lock()
        self._count = Lock()
        self._num_waiting = 0
        self._group: _Group | None = None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Durable when the block has ended. Raises what the database says, then nothing of it is stored."""
        self._take_turn()
        try:
            group = self._group or self._begin()
        except BaseException:
            self._turn.release()
            raise
        try:
            with _savepoint(group.connection):
                yield group.connection
        except BaseException as error:
            self._leave(group, error)
            raise
        self._leave(group, None)
        while not group.ended.wait(_PATIENCE_S):
            self._commit_for(group)
        if group.error:
            raise group.error

    def _take_turn(self) -> None:
        with self._count:
            self._num_waiting += 1
        try:
            self._turn.acquire()
        finally:
            with self._count:
                self._num_waiting -= 1

    def _begin(self) -> "_Group":
        connection = self._engine.connect()
        try:
            connection.begin()
        except BaseException:
            connection.close()
            raise
        self._group = _Group(connection)
        return self._group

    def _leave(self, group: "_Group", error: BaseException | None) -> None:
        """Pass the turn on; the last one commits. The turn is ours."""
        group.size += 1
        try:
            if not group.is_open:  # a full disk, say: the database has undone the whole group
                self._end(group, error if isinstance(error, Exception) else None)
            elif not self._num_waiting or group.size >= LARGEST_GROUP:
                self._end(group, None)
        finally:
            self._turn.release()

    def _commit_for(self, group: "_Group") -> None:
        """Commit where the writer that the commit was left to never came."""
        with self._turn:
            if self._group is group and not self._num_waiting:
                self._end(group, None)

    def _end(self, group: "_Group", error: Exception | None) -> None:
        self._group = None
        try:
            if not group.is_open:
                raise error or Unavailable("The database undid a transaction.", fix="Try again.")
            group.connection.commit()
        except Exception as failure:
            group.error = failure
        finally:
            group.connection.close()
            group.ended.set()


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    """As `begin_nested`, whose new name for each savepoint is a new statement to compile."""
    connection.exec_driver_sql("SAVEPOINT hone")
    try:
        yield
    except BaseException:
        with suppress(DBAPIError):  # where the database has undone more than this already
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT hone")
        raise
    connection.exec_driver_sql("RELEASE SAVEPOINT hone")


class _Group:
    """Writers that share a commit."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.size = 0
        self.ended = Event()
        self.error: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether the database still holds what was written; SQLite tells, others refuse the commit."""
        return bool(getattr(self.connection.connection.dbapi_connection, "in_transaction", True))
