"""The canonical form of a run's answers: the same job gives the same bytes, on any database.

It holds what a job asked for and what came out, down to the last bit of the trace, and nothing that depends on
where, when or how often it was run: no run id or name, no time or duration, no worker, shard or attempt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from harp_batch.records import Answer, Evaluation
from harp_batch.store.run_records import ModelRecord
from harp_batch.store.store import Store

HEADER = {"format": "harp-batch canonical export", "version": 1}  # another form is another version


def canonical_lines(store: Store, run_id: str) -> Iterator[bytes]:
    """The header, then one line for each committed answer of the run; only a few answers are in memory.

    A line is UTF-8 JSON with its newline. Lines are in the order of model, task and method (by code point),
    document and repeat; keys are sorted, and a number has the fewest digits that read back as the same float64.
    """
    yield _line(HEADER)
    for model, evaluation, answer in store.run_answers(run_id):
        yield _line(_record(model, evaluation, answer))


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, allow_nan=False, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def _record(model: ModelRecord, evaluation: Evaluation, answer: Answer) -> dict[str, Any]:
    return {
        "model": {"ref": model.ref, "weights_sha256": model.weights_sha256, "dtype": model.dtype},
        "task": evaluation.task,
        "method": {"name": evaluation.method, "settings": evaluation.settings},
        "doc_id": answer.doc_id,
        "repeat": answer.repeat,
        "finish_reason": answer.finish_reason.value,
        "text": answer.text,
        "choices": [{"logprob": logprob, "is_greedy": is_greedy} for logprob, is_greedy in answer.choices],
        "correct": answer.correct,
        "scores": answer.scores,
        "prompt_tokens": answer.prompt_tokens,
        "forward_tokens": answer.forward_tokens,
        "error": answer.error,
        "trace": asdict(answer.trace),
    }
