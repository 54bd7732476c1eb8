"""Records to rows and back. What cannot be stored is refused here, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import add, sub
from typing import Any

import sqlalchemy as sa

from harp_batch.records import (
    Answer,
    Choice,
    Evaluation,
    FinishReason,
    Request,
    RequestKind,
    TokenTrace,
)
from harp_batch.store.run_records import ModelRecord, RunRecord, TaskRecord
from harp_batch.store.types import float32, require_json

Row = dict[str, Any]


def answer_row(answer: Answer) -> Row:
    """The answer's row; raises ValueError naming the answer where a number is not finite."""
    name = f"answer {answer.evaluation_id}/{answer.doc_id}/{answer.repeat}"
    trace = answer.trace
    entropy = float32(trace.entropy)
    choices = [[logprob, is_greedy] for logprob, is_greedy in answer.choices]
    _require_finite(f"{name}: entropy", entropy)
    _require_finite(f"{name}: seconds", [answer.seconds])
    require_json(f"{name}: choices", choices)
    require_json(f"{name}: scores", answer.scores)
    _require_one_length(name, trace)
    return {
        "evaluation_id": answer.evaluation_id,
        "doc_id": answer.doc_id,
        "repeat": answer.repeat,
        "correct": answer.correct,
        "finish_reason": answer.finish_reason.value,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": len(trace),
        "hesitations": sum(trace.hesitated),
        "flips": sum(trace.flipped),
        "forward_tokens": answer.forward_tokens,
        "seconds": answer.seconds,
        "error": answer.error,
        "scores": answer.scores,
        "choices": choices,
        "text": answer.text,
        "token_ids": trace.token_ids,
        "entropy": entropy,
        "hesitated": trace.hesitated,
        "vanilla_offsets": tuple(map(sub, trace.vanilla_token_ids, trace.token_ids)),
        "flipped": trace.flipped,
    }


def _require_finite(name: str, values: Iterable[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is not a finite number")


def _require_one_length(name: str, trace: TokenTrace) -> None:
    columns = (trace.token_ids, trace.entropy, trace.hesitated, trace.vanilla_token_ids, trace.flipped)
    if len(set(map(len, columns))) > 1:
        raise ValueError(f"{name}: the columns of its trace differ in length")


def answer_of(row: sa.RowMapping) -> Answer:
    """The answer of a row; its trace is empty where the row was read without it."""
    return Answer(
        evaluation_id=row["evaluation_id"],
        doc_id=row["doc_id"],
        repeat=row["repeat"],
        finish_reason=FinishReason(row["finish_reason"]),
        text=row["text"],
        choices=tuple((logprob, is_greedy) for logprob, is_greedy in row["choices"]),
        trace=_trace_of(row) if "token_ids" in row else TokenTrace(),
        prompt_tokens=row["prompt_tokens"],
        forward_tokens=row["forward_tokens"],
        seconds=row["seconds"],
        error=row["error"],
        scores=row["scores"],
        correct=row["correct"],
    )


def _trace_of(row: sa.RowMapping) -> TokenTrace:
    return TokenTrace(
        token_ids=row["token_ids"],
        entropy=row["entropy"],
        hesitated=row["hesitated"],
        vanilla_token_ids=tuple(map(add, row["vanilla_offsets"], row["token_ids"])),
        flipped=row["flipped"],
    )


def run_row(run: RunRecord) -> Row:
    """The run's own row, without its parts."""
    return {
        "id": run.id,
        "name": run.name,
        "status": run.status.value,
        "error": run.error,
        "created_at": run.created_at,
        "job_yaml": run.job_yaml,
        "seed": run.seed,
        "versions": run.versions,
    }


def model_row(run_id: str, position: int, model: ModelRecord) -> Row:
    return {
        "run_id": run_id,
        "position": position,
        "ref": model.ref,
        "revision": model.revision,
        "dtype": model.dtype,
        "chat_template": model.chat_template,
        "weights_sha256": model.weights_sha256,
        "parameters": model.parameters,
    }


def model_of(row: sa.RowMapping) -> ModelRecord:
    return ModelRecord(
        ref=row["ref"],
        revision=row["revision"],
        dtype=row["dtype"],
        chat_template=row["chat_template"],
        weights_sha256=row["weights_sha256"],
        parameters=row["parameters"],
    )


def task_row(run_id: str, position: int, task: TaskRecord) -> Row:
    """The request set's row, without its requests."""
    return {
        "run_id": run_id,
        "position": position,
        "model": task.model,
        "task": task.task,
        "version": task.version,
        "num_fewshot": task.num_fewshot,
        "info": task.info,
        "requests_sha256": task.requests_sha256,
    }


def task_of(row: sa.RowMapping, requests: tuple[Request, ...]) -> TaskRecord:
    return TaskRecord(
        model=row["model"],
        task=row["task"],
        version=row["version"],
        num_fewshot=row["num_fewshot"],
        info=row["info"],
        requests=requests,
    )


def request_row(request_set_id: int, position: int, request: Request) -> Row:
    """The request's row; raises ValueError naming it where its document is not JSON."""
    require_json(f"the document of request {request.key}", request.doc)
    return {
        "request_set_id": request_set_id,
        "position": position,
        "doc_id": request.doc_id,
        "repeat": request.repeat,
        "kind": request.kind.value,
        "prompt": request.prompt,
        "prompt_sha256": request.prompt_sha256,
        "prompt_ids": request.prompt_ids,
        "choices": [[c.context_ids, c.continuation, c.continuation_ids] for c in request.choices],
        "stop": list(request.stop),
        "max_new_tokens": request.max_new_tokens,
        "target": request.target,
        "doc": request.doc,
    }


def request_of(task: str, row: sa.RowMapping) -> Request:
    return Request(
        task=task,
        doc_id=row["doc_id"],
        repeat=row["repeat"],
        kind=RequestKind(row["kind"]),
        prompt=row["prompt"],
        prompt_ids=row["prompt_ids"],
        choices=tuple(
            Choice(tuple(context), continuation, tuple(ids)) for context, continuation, ids in row["choices"]
        ),
        stop=tuple(row["stop"]),
        max_new_tokens=row["max_new_tokens"],
        target=row["target"],
        doc=row["doc"],
    )


def evaluation_row(request_set_id: int, position: int, evaluation: Evaluation) -> Row:
    return {
        "id": evaluation.id,
        "request_set_id": request_set_id,
        "position": position,
        "method": evaluation.method,
        "settings": evaluation.settings,
        "is_baseline": evaluation.is_baseline,
        "requests": evaluation.requests,
    }


def evaluation_of(row: sa.RowMapping) -> Evaluation:
    """From an evaluation's row joined with its request set's."""
    return Evaluation(
        id=row["id"],
        run_id=row["run_id"],
        model=row["model"],
        task=row["task"],
        method=row["method"],
        settings=row["settings"],
        is_baseline=row["is_baseline"],
        requests=row["requests"],
    )
