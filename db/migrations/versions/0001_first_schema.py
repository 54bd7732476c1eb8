"""First schema: seven tables and the three views over them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATUSES = ("running", "done", "interrupted", "failed", "cancelled")

ints = sa.Text().with_variant(postgresql.ARRAY(sa.Integer), "postgresql")
reals = sa.Text().with_variant(postgresql.ARRAY(sa.REAL), "postgresql")
flags = sa.Text().with_variant(postgresql.ARRAY(sa.Boolean), "postgresql")
moment = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")

# Grouped and partitioned by the run too, so that a condition on the run reaches the answers: those of other
# runs are not summed up. An answer's output tokens are those of its trace.
RESULTS = """
CREATE VIEW results AS
SELECT speed.run_id, r.name AS run_name, speed.model, speed.task, speed.method, m.metric, m.filter,
    m.value, m.stderr, m.ci_low, m.ci_high, m.n,
    speed.baseline, m.delta, m.delta_ci_low, m.delta_ci_high, m.p_value,
    speed.output_tokens, 1 / speed.seconds_per_token AS tokens_per_second, speed.forward_tokens_per_token,
    speed.forward_tokens_per_token / nullif(speed.baseline_forward_tokens_per_token, 0) AS relative_cost,
    speed.seconds_per_token / nullif(speed.baseline_seconds_per_token, 0) AS relative_time,
    speed.hesitation_rate, speed.flip_rate
FROM (
    SELECT one.*,
        max(CASE WHEN is_baseline THEN method END) OVER same_requests AS baseline,
        max(CASE WHEN is_baseline THEN forward_tokens_per_token END) OVER same_requests
            AS baseline_forward_tokens_per_token,
        max(CASE WHEN is_baseline THEN seconds_per_token END) OVER same_requests
            AS baseline_seconds_per_token
    FROM (
        SELECT s.run_id, s.model, s.task, e.method, e.id AS evaluation_id, e.is_baseline,
            CAST(sum(a.output_tokens) AS BIGINT) AS output_tokens,
            CAST(sum(a.forward_tokens) AS DOUBLE PRECISION) / nullif(sum(a.output_tokens), 0)
                AS forward_tokens_per_token,
            nullif(sum(a.seconds), 0) / nullif(sum(a.output_tokens), 0) AS seconds_per_token,
            CAST(sum(a.hesitations) AS DOUBLE PRECISION) / nullif(sum(a.output_tokens), 0) AS hesitation_rate,
            CAST(sum(a.flips) AS DOUBLE PRECISION) / nullif(sum(a.output_tokens), 0) AS flip_rate
        FROM request_sets s
        JOIN evaluations e ON e.request_set_id = s.id
        LEFT JOIN answer_rows a ON a.evaluation_id = e.id
        GROUP BY s.run_id, s.model, s.task, e.method, e.id, e.is_baseline
    ) one
    WINDOW same_requests AS (PARTITION BY run_id, model, task)
) speed
JOIN runs r ON r.id = speed.run_id
JOIN metric_rows m ON m.evaluation_id = speed.evaluation_id
"""

ANSWERS = """
CREATE VIEW answers AS
SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, q.target, a.text, a.correct, a.finish_reason,
    a.prompt_tokens, a.output_tokens, a.hesitations, a.flips, a.forward_tokens, a.seconds, a.error
FROM request_sets s
JOIN evaluations e ON e.request_set_id = s.id
JOIN answer_rows a ON a.evaluation_id = e.id
LEFT JOIN requests q ON q.request_set_id = s.id AND q.doc_id = a.doc_id AND q.repeat = a.repeat
"""

# `entropy` goes through its shortest decimals to double precision, so that sums are sums of doubles and
# equal those of SQLite, where the decimals are what is stored.
TOKENS_POSTGRESQL = """
CREATE VIEW tokens AS
SELECT s.run_id, s.model, s.task, e.method, a.doc_id, a.repeat, CAST(t.place - 1 AS INTEGER) AS step,
    t.token_id, t.entropy, t.hesitated, t.vanilla_token_id, t.flipped
FROM request_sets s
JOIN evaluations e ON e.request_set_id = s.id
JOIN answer_rows a ON a.evaluation_id = e.id
CROSS JOIN LATERAL unnest(
    a.token_ids, CAST(CAST(a.entropy AS TEXT) AS DOUBLE PRECISION[]), a.hesitated, a.vanilla_token_ids,
    a.flipped
) WITH ORDINALITY AS t(token_id, entropy, hesitated, vanilla_token_id, flipped, place)
"""

# The arrays are read by position: joining five json_each on their keys takes the square of the length.
TOKENS_SQLITE = """
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


def upgrade() -> None:
    create_run_tables()
    create_request_tables()
    create_answer_tables()
    op.execute(RESULTS)
    op.execute(ANSWERS)
    op.execute(TOKENS_POSTGRESQL if op.get_bind().dialect.name == "postgresql" else TOKENS_SQLITE)


def downgrade() -> None:
    for view in ("tokens", "answers", "results"):
        op.execute(f"DROP VIEW {view}")
    for table in ("metric_rows", "answer_rows", "evaluations", "requests", "request_sets", "models", "runs"):
        op.drop_table(table)


def create_run_tables() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("finished_at", moment),
        sa.Column("job_yaml", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.CheckConstraint(f"status IN {STATUSES}", name="ck_runs_status"),
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index("ix_runs_name", "runs", ["name"])
    op.create_table(
        "models",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("ref", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("revision", sa.Text),
        sa.Column("dtype", sa.Text, nullable=False),
        sa.Column("chat_template", sa.Boolean, nullable=False),
        sa.Column("weights_sha256", sa.Text, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "ref", name="pk_models"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_models_run_id", ondelete="CASCADE"),
    )


def create_request_tables() -> None:
    op.create_table(
        "request_sets",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("num_fewshot", sa.Integer, nullable=False),
        sa.Column("info", sa.JSON, nullable=False),
        sa.Column("requests_sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_request_sets"),
        sa.UniqueConstraint("run_id", "model", "task", name="uq_request_sets_run_id"),
        sa.ForeignKeyConstraint(
            ["run_id", "model"],
            ["models.run_id", "models.ref"],
            name="fk_request_sets_run_id",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "requests",
        sa.Column("request_set_id", sa.Integer, nullable=False),
        sa.Column("doc_id", sa.Integer, nullable=False),
        sa.Column("repeat", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("prompt_sha256", sa.Text, nullable=False),
        sa.Column("prompt_ids", ints, nullable=False),
        sa.Column("choices", sa.JSON, nullable=False),
        sa.Column("stop", sa.JSON, nullable=False),
        sa.Column("max_new_tokens", sa.Integer, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("doc", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("request_set_id", "doc_id", "repeat", name="pk_requests"),
        sa.ForeignKeyConstraint(
            ["request_set_id"], ["request_sets.id"], name="fk_requests_request_set_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("request_set_id", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("is_baseline", sa.Boolean, nullable=False),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.UniqueConstraint("request_set_id", "method", name="uq_evaluations_request_set_id"),
        sa.ForeignKeyConstraint(
            ["request_set_id"], ["request_sets.id"], name="fk_evaluations_request_set_id", ondelete="CASCADE"
        ),
    )
    op.create_index(
        "uq_evaluations_baseline",
        "evaluations",
        ["request_set_id"],
        unique=True,
        sqlite_where=sa.text("is_baseline"),
        postgresql_where=sa.text("is_baseline"),
    )


def create_answer_tables() -> None:
    op.create_table(
        "answer_rows",
        sa.Column("evaluation_id", sa.Text, nullable=False),
        sa.Column("doc_id", sa.Integer, nullable=False),
        sa.Column("repeat", sa.Integer, nullable=False),
        sa.Column("correct", sa.Boolean),
        sa.Column("finish_reason", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("hesitations", sa.Integer, nullable=False),
        sa.Column("flips", sa.Integer, nullable=False),
        sa.Column("forward_tokens", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("choices", sa.JSON, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("token_ids", ints, nullable=False),
        sa.Column("entropy", reals, nullable=False),
        sa.Column("hesitated", flags, nullable=False),
        sa.Column("vanilla_token_ids", ints, nullable=False),
        sa.Column("flipped", flags, nullable=False),
        sa.PrimaryKeyConstraint("evaluation_id", "doc_id", "repeat", name="pk_answer_rows"),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluations.id"], name="fk_answer_rows_evaluation_id", ondelete="CASCADE"
        ),
    )
    op.create_index(
        "ix_answer_rows_errors",
        "answer_rows",
        ["evaluation_id"],
        sqlite_where=sa.text("error IS NOT NULL"),
        postgresql_where=sa.text("error IS NOT NULL"),
    )
    op.create_table(
        "metric_rows",
        sa.Column("evaluation_id", sa.Text, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("filter", sa.Text, nullable=False),
        *(sa.Column(name, sa.Double) for name in ("value", "stderr", "ci_low", "ci_high")),
        sa.Column("n", sa.Integer, nullable=False),
        *(sa.Column(name, sa.Double) for name in ("delta", "delta_ci_low", "delta_ci_high", "p_value")),
        sa.PrimaryKeyConstraint("evaluation_id", "metric", "filter", name="pk_metric_rows"),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluations.id"], name="fk_metric_rows_evaluation_id", ondelete="CASCADE"
        ),
    )
