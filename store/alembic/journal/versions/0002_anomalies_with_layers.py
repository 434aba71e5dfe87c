"""Anomalies with layers, quality checks, planning, roles."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quality_check",
        sa.Column("quality_check_id", sa.Integer(), nullable=False),
        sa.Column("snapshot_id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("config_id", sa.String(length=16), nullable=False),
        sa.Column("reference_config_id", sa.String(length=16), nullable=False),
        sa.Column("checked_at", sa.Double(), nullable=False),
        sa.Column("num_positions", sa.Integer(), nullable=False),
        sa.Column("delta_nll", sa.Double(), nullable=False),
        sa.Column("delta_nll_high", sa.Double(), nullable=False),
        sa.Column("top1_agreement", sa.Double(), nullable=False),
        sa.Column("top1_low", sa.Double(), nullable=False),
        sa.Column("is_passed", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["config_id"], ["config.config_id"], name=op.f("fk_quality_check_config_id_config")
        ),
        sa.ForeignKeyConstraint(
            ["reference_config_id"],
            ["config.config_id"],
            name=op.f("fk_quality_check_reference_config_id_config"),
        ),
        sa.ForeignKeyConstraint(
            ["snapshot_id"], ["snapshot.snapshot_id"], name=op.f("fk_quality_check_snapshot_id_snapshot")
        ),
        sa.PrimaryKeyConstraint("quality_check_id", name=op.f("pk_quality_check")),
    )
    with op.batch_alter_table("anomaly", schema=None) as batch_op:
        batch_op.add_column(sa.Column("layer", sa.String(length=1), server_default="A", nullable=False))
        batch_op.add_column(sa.Column("severity", sa.String(), server_default="ticket", nullable=False))
        batch_op.add_column(sa.Column("label", sa.String(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("worst", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("change_id", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("details", sa.JSON(), server_default="{}", nullable=False))

    with op.batch_alter_table("experiment", schema=None) as batch_op:
        batch_op.add_column(sa.Column("planning", sa.JSON(), server_default="{}", nullable=False))

    with op.batch_alter_table("operator_action", schema=None) as batch_op:
        batch_op.add_column(sa.Column("role", sa.String(), server_default="operator", nullable=False))

    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.add_column(sa.Column("anomaly_id", sa.Integer(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.drop_column("anomaly_id")

    with op.batch_alter_table("operator_action", schema=None) as batch_op:
        batch_op.drop_column("role")

    with op.batch_alter_table("experiment", schema=None) as batch_op:
        batch_op.drop_column("planning")

    with op.batch_alter_table("anomaly", schema=None) as batch_op:
        batch_op.drop_column("details")
        batch_op.drop_column("change_id")
        batch_op.drop_column("worst")
        batch_op.drop_column("label")
        batch_op.drop_column("severity")
        batch_op.drop_column("layer")

    op.drop_table("quality_check")
