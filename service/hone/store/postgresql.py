"""PostgreSQL behind the store: a server that several processes share. Called by database.py.

Its sessions have limits of their own, so that a process that was paused, or cut off, in the middle of a transaction
does not hold the others up for longer than that.
"""

from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from hone.errors import HoneError, PermanentError, StorageError, Unavailable

CONNECT_TIMEOUT_S = 5
LIMITS_MS = {
    "statement_timeout": 30_000,
    "lock_timeout": 15_000,
    # A process that was stopped inside a transaction loses it, and the locks with it.
    "idle_in_transaction_session_timeout": 10_000,
}
SNAPSHOT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
"""Execution options of a reader: all its statements see one state."""
MIGRATION_LOCK = 0x686F6E65
"""Advisory lock of whoever brings the schema up to date."""
_POOL = {"pool_size": 16, "max_overflow": 32, "pool_timeout": 10}
_NETWORK = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "hone",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def open_engine(url: URL) -> Engine:
    """An engine; connections open when they are needed."""
    # A plain postgresql:// means another driver to SQLAlchemy, and everybody writes it.
    engine = create_engine(url.set(drivername="postgresql+psycopg"), connect_args=_NETWORK, **_POOL)
    event.listen(engine, "connect", _on_connect)
    return engine


def _on_connect(connection: Any, _record: object) -> None:
    connection.autocommit = True
    # Not as startup options: connection poolers refuse those.
    connection.execute("; ".join(f"SET {name} = {limit}" for name, limit in LIMITS_MS.items()))
    connection.autocommit = False


def meaning(error: DBAPIError, name: str) -> HoneError:
    """What an error of the server or of the driver says to people; by SQLSTATE, where there is one."""
    cause = " ".join(str(error.orig).split())
    state = getattr(error.orig, "sqlstate", None) or _state_at_connect(cause)
    if state in _REFUSED:
        return StorageError(f"The database {name} cannot be used ({cause}).", fix=_REFUSED[state])
    if state[:2] in _TEMPORARY or state in _TEMPORARY:
        return Unavailable(f"The database {name} did not do it now ({cause}).", fix="Try again.")
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return Unavailable(
            f"The database {name} does not answer ({cause}).", fix="Look at its server; trying again helps."
        )
    return PermanentError(f"The database {name} refused a statement ({cause}).", fix="Report it as a bug.")


_REFUSED = {
    "28000": "Set user and password in HONE_DATABASE as the server knows them, and let pg_hba.conf admit this host.",
    "28P01": "Set user and password in HONE_DATABASE as the server knows them.",
    "3D000": "Create the database (CREATE DATABASE …), or name another in HONE_DATABASE.",
    "42501": "Make this user the owner of the database, or grant it all on its schema.",
    "53100": "Free space on the server's disk.",
}
"""What a person has to see to."""
_TEMPORARY = frozenset(
    {
        "08",  # connection
        "40",  # deadlock, serialization: the other one went first
        "53",  # too many connections, out of memory
        "55",  # a lock was not given in time
        "57",  # cancelled, shut down, starting up
        "25006",  # a standby
        "25P03",  # idle in a transaction for too long: this process was paused
    }
)
_TEXT_AT_CONNECT = {
    "password authentication failed": "28P01",
    "no pg_hba.conf entry": "28000",
    'role "': "28000",
    'database "': "3D000",
}


def _state_at_connect(cause: str) -> str:
    """The driver keeps no SQLSTATE of a connection that failed; the server's words are all there is."""
    if "FATAL" not in cause:
        return ""
    return next((state for text, state in _TEXT_AT_CONNECT.items() if text in cause), "")
