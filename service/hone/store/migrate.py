"""Bringing a database to the current schema, at the service's start.

Migrations only add: a service of the version before can still work on a database that this one has migrated. So a
database that is newer than this code is used as it is.
"""

from pathlib import Path

from sqlalchemy import Engine, inspect, text

HEAD = "0003"
"""The newest migration in `migrations/versions`; a test compares."""
MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(engine: Engine, *, lock: int | None = None) -> None:
    """Run what is missing. Costs one query when nothing is.

    `lock` is an advisory lock for databases that several processes may open at once; the second finds nothing to do.
    """
    version = _version(engine)
    if version is not None and version >= HEAD:
        return
    from alembic import command  # takes a third of a second, so it is not loaded by every start
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.execution_options(hone_writes=True).begin() as connection:
        if lock is not None:
            # Loading migrations takes a while on a busy machine, and none of it is asked of the server.
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
