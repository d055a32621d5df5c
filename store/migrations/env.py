"""Where Alembic meets the record: SQLModel's tables, one SQLite file, batch mode for changes to columns."""

from alembic import context
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import store.tables  # noqa: F401 makes the tables known

engine = create_engine(context.config.get_main_option("sqlalchemy.url"))
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
