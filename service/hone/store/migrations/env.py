"""What Alembic runs migrations with: the connection and transaction that hone.store.migrate hands over."""

from alembic import context

from hone.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
