"""Roll-ups of samples, fits of forecasts."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "forecast_fit",
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("tried_at", sa.Double(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("fitted_at", sa.Double(), nullable=True),
        sa.Column("num_points", sa.Integer(), nullable=False),
        sa.Column("history_s", sa.Double(), nullable=False),
        sa.Column("residual_scale", sa.Double(), nullable=True),
        sa.Column("is_log", sa.Boolean(), nullable=False),
        sa.Column("fit_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("metric", name=op.f("pk_forecast_fit")),
    )
    op.create_table(
        "sample_rollup",
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("label", sa.String(length=32), nullable=False),
        sa.Column("bin_s", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("num_samples", sa.Integer(), nullable=False),
        sa.Column("mean", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("high", sa.Double(), nullable=False),
        sa.Column("config_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("metric", "label", "bin_s", "at", name=op.f("pk_sample_rollup")),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("sample_rollup")
    op.drop_table("forecast_fit")
