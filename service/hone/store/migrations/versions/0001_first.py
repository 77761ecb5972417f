"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "jobs",
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("namespace", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=False),
        sa.Column("creator", sa.Text(), nullable=False),
        sa.Column("requested_spec", sa.Text(), nullable=False),
        sa.Column("resolved_spec", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.Column("start_time", sa.BigInteger(), nullable=True),
        sa.Column("end_time", sa.BigInteger(), nullable=True),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("delete_artifacts", sa.Boolean(), nullable=False),
        sa.Column("unfinished", sa.Boolean(), nullable=False),
        sa.Column("buried", sa.Boolean(), nullable=False),
        sa.Column("progress", sa.Text(), nullable=True),
        sa.Column("outputs", sa.Text(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_jobs")),
        sa.UniqueConstraint("namespace", "id", name=op.f("uq_jobs_namespace_id")),
    )
    op.create_index(
        op.f("ix_jobs_namespace_create_time_uid"), "jobs", ["namespace", "create_time", "uid"], unique=False
    )
    op.create_index(op.f("ix_jobs_namespace_name"), "jobs", ["namespace", "name"], unique=False)
    op.create_index(op.f("ix_jobs_unfinished"), "jobs", ["unfinished"], unique=False)
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_namespaces")),
    )
    op.create_table(
        "attempts",
        sa.Column("job_uid", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("start_time", sa.BigInteger(), nullable=True),
        sa.Column("end_time", sa.BigInteger(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["jobs.uid"], name=op.f("fk_attempts_job_uid")),
        sa.PrimaryKeyConstraint("job_uid", "number", name=op.f("pk_attempts")),
    )
    op.create_table(
        "events",
        sa.Column("namespace", sa.String(length=63), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("job_uid", sa.String(length=36), nullable=False),
        sa.Column("job", sa.String(length=63), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("source_seq", sa.BigInteger(), nullable=True),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("fields", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["jobs.uid"], name=op.f("fk_events_job_uid")),
        sa.PrimaryKeyConstraint("namespace", "seq", name=op.f("pk_events")),
        sa.UniqueConstraint("job_uid", "attempt", "source_seq", name=op.f("uq_events_job_uid_attempt_source_seq")),
    )
    op.create_index(op.f("ix_events_job_uid_seq"), "events", ["job_uid", "seq"], unique=False)
    op.create_table(
        "job_labels",
        sa.Column("job_uid", sa.String(length=36), nullable=False),
        sa.Column("key", sa.String(length=63), nullable=False),
        sa.Column("value", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["jobs.uid"], name=op.f("fk_job_labels_job_uid")),
        sa.PrimaryKeyConstraint("job_uid", "key", name=op.f("pk_job_labels")),
    )
    op.create_index(op.f("ix_job_labels_key_value"), "job_labels", ["key", "value"], unique=False)
    op.create_table(
        "request_ids",
        sa.Column("namespace", sa.String(length=63), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("job_uid", sa.String(length=36), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["jobs.uid"], name=op.f("fk_request_ids_job_uid")),
        sa.PrimaryKeyConstraint("namespace", "request_id", name=op.f("pk_request_ids")),
    )
