"""Records for the tests of the store."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count
from typing import Any

from harp_batch.records import (
    Answer,
    Choice,
    Evaluation,
    FinishReason,
    Request,
    RequestKind,
    RunStatus,
    TokenTrace,
)
from harp_batch.store import ModelRecord, RunRecord, Store, TaskRecord

_numbers = count()
METHODS = {"greedy": {"kind": "greedy"}, "harp": {"kind": "harp", "theta": 1.0}}


def a_request(doc_id: int = 0, repeat: int = 0, **changes: Any) -> Request:
    fields = {
        "task": "sums",
        "doc_id": doc_id,
        "repeat": repeat,
        "kind": RequestKind.GENERATE,
        "prompt": f"What is {doc_id} + 1?",
        "prompt_ids": (1, 2, doc_id),
        "stop": ("\n", "Q:"),
        "max_new_tokens": 8,
        "target": str(doc_id + 1),
        "doc": {"question": f"{doc_id} + 1", "parts": [doc_id, 1], "hard": None},
    }
    return Request(**{**fields, **changes})


def a_choice_request(doc_id: int = 0) -> Request:
    choices = (Choice((1, 2), " red", (3,)), Choice((1, 2), " dark blue", (4, 5)))
    return a_request(
        doc_id, task="colours", kind=RequestKind.LOGLIKELIHOOD, prompt_ids=(), stop=(), choices=choices
    )


def a_run(requests: tuple[Request, ...] = (), **changes: Any) -> RunRecord:
    """A run of one model on one task with greedy (the baseline) and harp."""
    run_id = changes.get("id", f"run-{next(_numbers):04}")
    asked = requests or tuple(map(a_request, range(4)))
    task = asked[0].task
    evaluations = tuple(
        Evaluation(f"{run_id}/{name}", run_id, "tiny", task, name, settings, name == "greedy", len(asked))
        for name, settings in METHODS.items()
    )
    fields = {
        "id": run_id,
        "name": "nightly",
        "status": RunStatus.RUNNING,
        "created_at": datetime.now(UTC),
        "job_yaml": "name: nightly\n",
        "seed": 2**40,
        "versions": {"harp-batch": "0.1", "ray": "2.52"},
        "models": (ModelRecord("tiny", "main", "float32", True, "ab" * 32, 135_000_000_000),),
        "tasks": (TaskRecord("tiny", task, "3", 5, asked, {"filters": ["none"]}),),
        "evaluations": evaluations,
    }
    return RunRecord(**{**fields, **changes})


def an_answer(evaluation_id: str, doc_id: int = 0, repeat: int = 0, **changes: Any) -> Answer:
    """Three tokens; the model hesitates at the last two, and the last is another than it would have been."""
    fields = {
        "finish_reason": FinishReason.STOP,
        "text": "4 is the answer",
        "trace": TokenTrace(
            (7, 8, 9), (0.5, 1.25, 3.0), (False, True, True), (7, 8, 2), (False, False, True)
        ),
        "prompt_tokens": 3,
        "forward_tokens": 12,
        "seconds": 0.25,
        "scores": {"exact_match,strict": 1.0},
        "correct": True,
    }
    return Answer(evaluation_id, doc_id, repeat, **{**fields, **changes})


def end_run(store: Store, run_id: str, status: RunStatus) -> None:
    """Let the run be driven for a moment, and end so."""
    store.end_attempt(store.acquire(run_id, "here", 1, stale_after=60), status)
