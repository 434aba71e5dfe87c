"""Runs the revisions of metrics.db inside the transaction that `store.migrations` began."""

from alembic import context

from store.tables import MetricsBase

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=MetricsBase.metadata,
    version_table="tuner_metrics_version",
    render_as_batch=True,  # SQLite changes a column by copying its table
)
with context.begin_transaction():
    context.run_migrations()
