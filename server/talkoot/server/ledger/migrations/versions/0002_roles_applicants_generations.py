"""roles of nodes, invites that can be revoked, applicants, and the generation of a run"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("runs") as batch:
        batch.add_column(
            sa.Column("generation", sa.BigInteger(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("invites") as batch:
        batch.add_column(
            sa.Column("role", sa.String(length=16), nullable=False, server_default="volunteer")
        )
        batch.add_column(sa.Column("revoked_unix", sa.Float(precision=53), nullable=True))
    with op.batch_alter_table("nodes") as batch:
        batch.add_column(
            sa.Column("role", sa.String(length=16), nullable=False, server_default="volunteer")
        )
        batch.add_column(sa.Column("certified_until_unix", sa.Float(precision=53), nullable=True))
    op.create_table(
        "applicants",
        sa.Column("node_id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("capability", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("applied_unix", sa.Float(precision=53), nullable=False),
        sa.Column("seen_unix", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
    )
