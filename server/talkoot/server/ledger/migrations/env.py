"""Alembic's entry point: runs the migrations on the engine that the ledger hands over."""

from alembic import context

from talkoot.server.ledger.schema import Base

with context.config.attributes["engine"].connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
