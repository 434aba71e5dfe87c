"""What a GPU's own clock said of a step, and the graph that was replayed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("step", sa.Column("device_s", sa.Double(), nullable=True))
    op.add_column("step", sa.Column("graph_rows", sa.Integer(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("step") as step:
        step.drop_column("graph_rows")
        step.drop_column("device_s")
