"""Attempts: who drives a run. And flags of a trace as 0110 in SQLite, where they were [0,1,1,0]."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATUSES = ("running", "done", "interrupted", "failed", "cancelled")

moment = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")

TOKENS_SQLITE = """
CREATE VIEW tokens AS
SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, t.key AS step, t.value AS token_id,
    json_extract(a.entropy, '$[' || t.key || ']') AS entropy,
    CAST(substr(a.hesitated, t.key + 1, 1) AS INTEGER) AS hesitated,
    json_extract(a.vanilla_token_ids, '$[' || t.key || ']') AS vanilla_token_id,
    CAST(substr(a.flipped, t.key + 1, 1) AS INTEGER) AS flipped
FROM request_sets s
JOIN evaluations e ON e.request_set_id = s.id
JOIN answer_rows a ON a.evaluation_id = e.id
JOIN json_each(a.token_ids) t
"""

# As revision 0001 made it.
TOKENS_SQLITE_BEFORE = """
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
"""

FLAGS_WITHOUT_COMMAS = """
UPDATE answer_rows SET
    hesitated = replace(replace(replace(hesitated, '[', ''), ']', ''), ',', ''),
    flipped = replace(replace(replace(flipped, '[', ''), ']', ''), ',', '')
"""
FLAGS_AS_JSON = """
UPDATE answer_rows SET
    hesitated = '[' || rtrim(replace(replace(hesitated, '0', '0,'), '1', '1,'), ',') || ']',
    flipped = '[' || rtrim(replace(replace(flipped, '0', '0,'), '1', '1,'), ',') || ']'
"""


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
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW tokens")
        op.execute(FLAGS_WITHOUT_COMMAS)
        op.execute(TOKENS_SQLITE)


def downgrade() -> None:
    op.drop_table("attempts")
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW tokens")
        op.execute(FLAGS_AS_JSON)
        op.execute(TOKENS_SQLITE_BEFORE)
