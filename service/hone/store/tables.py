"""The tables. Portable SQL only: SQLite by default, PostgreSQL by URL.

Times are integers, microseconds since 1970 in UTC: exact, and in order. What is read as a whole is JSON in a text
column; what is searched has a column of its own.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

namespaces = Table(
    "namespaces",
    metadata,
    Column("name", String(63), primary_key=True),
    # Raised in the transaction of the event that gets the number, so numbers are in order of commit and without gaps.
    Column("seq", BigInteger, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("uid", String(36), primary_key=True),
    Column("namespace", String(63), nullable=False),
    Column("id", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("method", String(16), nullable=False),
    Column("creator", Text, nullable=False),
    Column("requested_spec", Text, nullable=False),
    Column("resolved_spec", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("update_time", BigInteger, nullable=False),
    Column("start_time", BigInteger),
    Column("end_time", BigInteger),
    Column("delete_time", BigInteger),
    Column("delete_artifacts", Boolean, nullable=False),
    # Somebody has to see to it: it has not ended and is not paused, or is to be deleted.
    Column("unfinished", Boolean, nullable=False),
    # A deleted job keeps its row, without its content: ids are not used again.
    Column("buried", Boolean, nullable=False),
    # Somebody started it past the service: it is shown, and never managed.
    Column("observed", Boolean, nullable=False, server_default=false()),
    Column("progress", Text),
    Column("outputs", Text, nullable=False),
    Column("failure", Text),
    UniqueConstraint("namespace", "id"),
    Index(None, "namespace", "create_time", "uid"),
    Index(None, "namespace", "name"),
    Index(None, "unfinished"),
)

job_labels = Table(
    "job_labels",
    metadata,
    Column("job_uid", ForeignKey("jobs.uid"), primary_key=True),
    Column("key", String(63), primary_key=True),
    Column("value", String(63), nullable=False),
    Index(None, "key", "value"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_uid", ForeignKey("jobs.uid"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("nonce", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("start_time", BigInteger),
    Column("end_time", BigInteger),
    Column("failure", Text),
    Column("counted", Boolean, nullable=False),
    Column("gpus", Integer, nullable=False),
    # The attempt's own number of its last stored event.
    Column("last_seq", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("job_uid", ForeignKey("jobs.uid"), nullable=False),
    Column("job", String(63), nullable=False),
    Column("attempt", Integer, nullable=False),
    # Null for events of the service itself; nulls are distinct from one another.
    Column("source_seq", BigInteger),
    Column("time", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("step", BigInteger),
    Column("metrics", Text, nullable=False),
    Column("fields", Text, nullable=False),
    UniqueConstraint("job_uid", "attempt", "source_seq"),
    Index(None, "job_uid", "seq"),
)

# What a rank wrote last, of attempts whose backend keeps no logs; compressed.
attempt_logs = Table(
    "attempt_logs",
    metadata,
    Column("job_uid", ForeignKey("jobs.uid"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

request_ids = Table(
    "request_ids",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("request_id", String(128), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("job_uid", ForeignKey("jobs.uid"), nullable=False),
    Column("create_time", BigInteger, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("holder", Text, nullable=False),
    # Raised each time that the lease is taken; whoever writes under it checks that it is still the same.
    Column("epoch", BigInteger, nullable=False),
    Column("expire_time", BigInteger, nullable=False),
)
