"""judgements of contributions, standings of nodes with their evidence, validations"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

FLOAT = sa.Float(precision=53)


def LEASE() -> sa.ForeignKey:  # noqa: N802 - one constraint object a column
    return sa.ForeignKey("contributions.lease_id")


def NODE() -> sa.ForeignKey:  # noqa: N802
    return sa.ForeignKey("nodes.node_id")


def upgrade() -> None:
    op.create_table(
        "judgements",
        sa.Column(
            "lease_id",
            sa.String(length=32),
            LEASE(),
            nullable=False,
        ),
        sa.Column("run_id", sa.String(length=63), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("node_id", sa.String(length=16), NODE(), nullable=False),
        sa.Column("scaled_norm", FLOAT, nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=True),
        sa.Column("shares", sa.LargeBinary(), nullable=True),
        sa.Column("influence", FLOAT, nullable=True),
        sa.Column("agreement", FLOAT, nullable=True),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("lease_id"),
    )
    op.create_index("ix_judgements_node_id", "judgements", ["node_id"])
    op.create_index("ix_judgements_round", "judgements", ["run_id", "round"])
    op.create_table(
        "standings",
        sa.Column("node_id", sa.String(length=16), NODE(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("suspicion", FLOAT, nullable=False),
        sa.Column("counted", sa.BigInteger(), nullable=False),
        sa.Column("since_unix", FLOAT, nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
    )
    op.create_table(
        "evidence",
        sa.Column("evidence_id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("node_id", sa.String(length=16), NODE(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=True),
        sa.Column("lease_id", sa.String(length=32), nullable=True),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("points", FLOAT, nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("unix", FLOAT, nullable=False),
        sa.PrimaryKeyConstraint("evidence_id"),
    )
    op.create_index("ix_evidence_node_id", "evidence", ["node_id"])
    op.create_table(
        "validations",
        sa.Column(
            "lease_id",
            sa.String(length=32),
            LEASE(),
            nullable=False,
        ),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("run_id", sa.String(length=63), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("asked_unix", FLOAT, nullable=False),
        sa.Column("done_unix", FLOAT, nullable=True),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("figures", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("lease_id", "kind"),
    )
    op.create_index("ix_validations_state", "validations", ["state"])
