"""Who reconciles, where several services share one PostgreSQL: one row, and a number that rises with each taking of it.

    lease = Lease(store, holder="hone-7d9f/hone-0")
    if (epoch := lease.take()) is not None:
        reconcile(store.fenced(lease.check(epoch)))

Called by leader.py. Time is the database's own, so clocks of machines need not agree. A leader that was paused past its
lease and does not know it yet can write nothing: every write under the lease reads its number in the same transaction,
with a lock that whoever takes the lease waits for. SQLite has one process: its home's lock is all the lease that it
needs.
"""

from collections.abc import Callable

from sqlalchemy import Connection, text

from hone.errors import Unavailable
from hone.store.database import Database

TTL_S = 6.0
"""How long a leader that says nothing more stays one."""
_NAME = "reconciler"
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_FIRST = text("INSERT INTO leases (name, holder, epoch, expire_time) VALUES (:name, '', 0, 0) ON CONFLICT DO NOTHING")
_LOOK = text(f"SELECT epoch FROM leases WHERE name = :name AND (holder = :holder OR expire_time < {_NOW})")
_LOOK_ALONE = text(f"{_LOOK.text} FOR UPDATE")
_TAKE = text(
    f"UPDATE leases SET holder = :holder, epoch = epoch + 1, expire_time = {_NOW} + :ttl_us "
    "WHERE name = :name RETURNING epoch"
)
_RENEW = text(f"UPDATE leases SET expire_time = {_NOW} + :ttl_us WHERE name = :name AND epoch = :epoch RETURNING epoch")
_GIVE_BACK = text("UPDATE leases SET expire_time = 0 WHERE name = :name AND epoch = :epoch")
# The lock that foreign keys take: it keeps a taker out, who locks the whole row, and lets renewals pass.
_CHECK = text("SELECT epoch FROM leases WHERE name = :name FOR KEY SHARE")
_HOLDER = text(f"SELECT holder FROM leases WHERE name = :name AND expire_time >= {_NOW}")

Fence = Callable[[Connection], None]
"""Called at the beginning of a write; raises LeaseLost where another process may write now."""


class LeaseLost(Unavailable):
    """Another process reconciles now, or this one was silent for too long."""

    def __init__(self) -> None:
        super().__init__("This service does not lead any more; another one goes on with its jobs.")


class Lease:
    """The one lease of a database. Each method is one transaction; raises Unavailable when the database is away."""

    def __init__(self, database: Database, *, holder: str, ttl_s: float = TTL_S) -> None:
        """`holder` must be nobody else's while this process lives; one of the same name takes over at once."""
        self.holder = holder
        self.ttl_s = ttl_s
        self._database = database

    def take(self) -> int | None:
        """Take the lease where it is free, has run out, or is still held under this name; its new epoch, or None."""
        values = {"name": _NAME, "holder": self.holder, "ttl_us": self._ttl_us}
        with self._database.write() as connection:
            connection.execute(_FIRST, values)
            # Whoever waits for the lease asks often, and is not to stand in the way of those who write under it.
            if connection.execute(_LOOK, values).first() is None:
                return None
            if connection.execute(_LOOK_ALONE, values).first() is None:
                return None
            return connection.execute(_TAKE, values).scalar()

    def renew(self, epoch: int) -> bool:
        """Hold it for another while; False when somebody else took it."""
        with self._database.write() as connection:
            values = {"name": _NAME, "epoch": epoch, "ttl_us": self._ttl_us}
            return connection.execute(_RENEW, values).scalar() is not None

    def give_back(self, epoch: int) -> None:
        """Let the next one take it at once."""
        with self._database.write() as connection:
            connection.execute(_GIVE_BACK, {"name": _NAME, "epoch": epoch})

    def current_holder(self) -> str | None:
        """Who holds it now; None when it is free."""
        with self._database.read() as connection:
            return connection.execute(_HOLDER, {"name": _NAME}).scalar()

    def check(self, epoch: int) -> Fence:
        """The fence of whoever leads in this epoch."""

        def fence(connection: Connection) -> None:
            if connection.execute(_CHECK, {"name": _NAME}).scalar() != epoch:
                raise LeaseLost

        return fence

    @property
    def _ttl_us(self) -> int:
        return int(self.ttl_s * 1_000_000)
