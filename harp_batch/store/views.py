"""The views: what people and dashboards read, and the only public names in the database.

Their SQL stands in the revisions of db/migrations, frozen, because a revision must not change its meaning
when this file changes. A test compares these columns with those of a migrated database.
"""

from __future__ import annotations

RESULTS = (
    "run_id", "run_name", "model", "task", "method", "metric", "filter", "value", "stderr", "ci_low",
    "ci_high", "n", "baseline", "delta", "delta_ci_low", "delta_ci_high", "p_value", "output_tokens",
    "tokens_per_second", "forward_tokens_per_token", "relative_cost", "relative_time", "hesitation_rate",
    "flip_rate",
)  # fmt: skip
ANSWERS = (
    "run_id", "model", "task", "method", "doc_id", "repeat", "target", "text", "correct", "finish_reason",
    "prompt_tokens", "output_tokens", "hesitations", "flips", "forward_tokens", "seconds", "error",
)  # fmt: skip
TOKENS = (
    "run_id", "model", "task", "method", "doc_id", "repeat", "step", "token_id", "entropy", "hesitated",
    "vanilla_token_id", "flipped",
)  # fmt: skip

VIEWS = {"results": RESULTS, "answers": ANSWERS, "tokens": TOKENS}
