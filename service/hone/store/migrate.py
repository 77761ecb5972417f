"""Bringing a database to the current schema, at the service's start.

Migrations only add: a service of the version before can still work on a database that this one has migrated. So a
database that is newer than this code is used as it is.
"""

from pathlib import Path

from sqlalchemy import Engine, inspect, text

HEAD = "0001"
"""The newest migration in `migrations/versions`; a test compares."""
MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(engine: Engine) -> None:
    """Run what is missing. Costs one query when nothing is."""
    version = _version(engine)
    if version is not None and version >= HEAD:
        return
    from alembic import command  # takes a third of a second, so it is not loaded by every start
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.execution_options(hone_writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


def _version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
