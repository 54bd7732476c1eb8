"""Attempts: who drives a run. And traces that take less room.

The token that the original logits would have given is mostly the one that was given; the differences of the two are
mostly zeros. Flags are 0110 in SQLite, where they were [0,1,1,0].
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATUSES = ("running", "done", "interrupted", "failed", "cancelled")

moment = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")

# The view is replaced and not dropped: who may read it, may still.
UPGRADE_POSTGRESQL = (
    "ALTER TABLE answer_rows RENAME COLUMN vanilla_token_ids TO vanilla_offsets",
    """
    UPDATE answer_rows SET vanilla_offsets = ARRAY(
        SELECT vanilla - id
        FROM unnest(vanilla_offsets, token_ids) WITH ORDINALITY AS t(vanilla, id, place) ORDER BY place
    )
    """,
    """
    CREATE OR REPLACE VIEW tokens AS
    SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, CAST(t.place - 1 AS INTEGER) AS step,
        t.token_id, t.entropy, t.hesitated, t.token_id + t.vanilla_offset AS vanilla_token_id, t.flipped
    FROM request_sets s
    JOIN evaluations e ON e.request_set_id = s.id
    JOIN answer_rows a ON a.evaluation_id = e.id
    CROSS JOIN LATERAL unnest(
        a.token_ids, CAST(CAST(a.entropy AS TEXT) AS DOUBLE PRECISION[]), a.hesitated, a.vanilla_offsets,
        a.flipped
    ) WITH ORDINALITY AS t(token_id, entropy, hesitated, vanilla_offset, flipped, place)
    """,
)
UPGRADE_SQLITE = (
    "DROP VIEW tokens",
    "ALTER TABLE answer_rows RENAME COLUMN vanilla_token_ids TO vanilla_offsets",
    """
    UPDATE answer_rows SET
        vanilla_offsets = (
            SELECT json_group_array(v.value - json_extract(token_ids, '$[' || v.key || ']'))
            FROM json_each(vanilla_offsets) v
        ),
        hesitated = replace(replace(replace(hesitated, '[', ''), ']', ''), ',', ''),
        flipped = replace(replace(replace(flipped, '[', ''), ']', ''), ',', '')
    """,
    """
    CREATE VIEW tokens AS
    SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, t.key AS step, t.value AS token_id,
        json_extract(a.entropy, '$[' || t.key || ']') AS entropy,
        CAST(substr(a.hesitated, t.key + 1, 1) AS INTEGER) AS hesitated,
        t.value + json_extract(a.vanilla_offsets, '$[' || t.key || ']') AS vanilla_token_id,
        CAST(substr(a.flipped, t.key + 1, 1) AS INTEGER) AS flipped
    FROM request_sets s
    JOIN evaluations e ON e.request_set_id = s.id
    JOIN answer_rows a ON a.evaluation_id = e.id
    JOIN json_each(a.token_ids) t
    """,
)

# The views of revision 0001.
DOWNGRADE_POSTGRESQL = (
    "ALTER TABLE answer_rows RENAME COLUMN vanilla_offsets TO vanilla_token_ids",
    """
    UPDATE answer_rows SET vanilla_token_ids = ARRAY(
        SELECT vanilla + id
        FROM unnest(vanilla_token_ids, token_ids) WITH ORDINALITY AS t(vanilla, id, place) ORDER BY place
    )
    """,
    """
    CREATE OR REPLACE VIEW tokens AS
    SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, CAST(t.place - 1 AS INTEGER) AS step,
        t.token_id, t.entropy, t.hesitated, t.vanilla_token_id, t.flipped
    FROM request_sets s
    JOIN evaluations e ON e.request_set_id = s.id
    JOIN answer_rows a ON a.evaluation_id = e.id
    CROSS JOIN LATERAL unnest(
        a.token_ids, CAST(CAST(a.entropy AS TEXT) AS DOUBLE PRECISION[]), a.hesitated, a.vanilla_token_ids,
        a.flipped
    ) WITH ORDINALITY AS t(token_id, entropy, hesitated, vanilla_token_id, flipped, place)
    """,
)
DOWNGRADE_SQLITE = (
    "DROP VIEW tokens",
    "ALTER TABLE answer_rows RENAME COLUMN vanilla_offsets TO vanilla_token_ids",
    """
    UPDATE answer_rows SET
        vanilla_token_ids = (
            SELECT json_group_array(v.value + json_extract(token_ids, '$[' || v.key || ']'))
            FROM json_each(vanilla_token_ids) v
        ),
        hesitated = '[' || rtrim(replace(replace(hesitated, '0', '0,'), '1', '1,'), ',') || ']',
        flipped = '[' || rtrim(replace(replace(flipped, '0', '0,'), '1', '1,'), ',') || ']'
    """,
    """
    CREATE VIEW tokens AS
    SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, t.key AS step, t.value AS token_id,
        json_extract(a.entropy, '$[' || t.key || ']') AS entropy,
        json_extract(a.hesitated, '$[' || t.key || ']') AS hesitated,
        json_extract(a.vanilla_token_ids, '$[' || t.key || ']') AS vanilla_token_id,
        json_extract(a.flipped, '$[' || t.key || ']') AS flipped
    FROM request_sets s
    JOIN evaluations e ON e.request_set_id = s.id
    JOIN answer_rows a ON a.evaluation_id = e.id
    JOIN json_each(a.token_ids) t
    """,
)


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("heartbeat_at", moment, nullable=False),
        sa.Column("ended_at", moment),
        sa.Column("outcome", sa.Text),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "epoch", name="pk_attempts"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_attempts_run_id", ondelete="CASCADE"),
        sa.CheckConstraint(f"outcome IN {STATUSES}", name="ck_attempts_outcome"),
    )
    postgresql = op.get_bind().dialect.name == "postgresql"
    for statement in UPGRADE_POSTGRESQL if postgresql else UPGRADE_SQLITE:
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("attempts")
    postgresql = op.get_bind().dialect.name == "postgresql"
    for statement in DOWNGRADE_POSTGRESQL if postgresql else DOWNGRADE_SQLITE:
        op.execute(statement)
