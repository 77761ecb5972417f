"""Logs of attempts that are gone, and jobs that people started past the service."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add a table and a column; an earlier version goes on working beside them."""
    op.create_table(
        "attempt_logs",
        sa.Column("job_uid", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_uid"], ["jobs.uid"], name=op.f("fk_attempt_logs_job_uid_jobs")),
        sa.PrimaryKeyConstraint("job_uid", "number", "rank", name=op.f("pk_attempt_logs")),
    )
    op.add_column("jobs", sa.Column("observed", sa.Boolean(), nullable=False, server_default=sa.false()))
