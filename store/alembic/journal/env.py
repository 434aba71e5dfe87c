"""Runs the revisions of journal.db inside the transaction that `store.migrations` began."""

from alembic import context

from store.tables import JournalBase

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=JournalBase.metadata,
    version_table="tuner_journal_version",
    render_as_batch=True,  # SQLite changes a column by copying its table
)
with context.begin_transaction():
    context.run_migrations()
