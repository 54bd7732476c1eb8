"""A run and answers to it whose traces are like those of a small model on short questions, from seeded numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np

from harp_batch.records import (
    Answer,
    Evaluation,
    FinishReason,
    MetricValue,
    Request,
    RequestKind,
    RunStatus,
    TokenTrace,
)
from harp_batch.store import ModelRecord, RunRecord, TaskRecord

MODEL, TASK = "random/words", "questions"
METHODS = ("greedy", "harp")
_VOCABULARY = 49_152  # SmolLM2's; ids are log-uniform, as frequent tokens have low ones
_ENTROPY = (1.2, 1.2)  # shape and scale in bits of a gamma distribution: 47% of the tokens are above 1
_FLIPPED = 0.22  # of the tokens above: measured with HARP on the demo's task
_LETTERS = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
_WORD = 3.5  # characters a token, the blank included


def a_run(answers: int) -> RunRecord:
    """A run with so many answers to come, half of them greedy, half HARP's."""
    requests = tuple(map(_request, range(answers // len(METHODS))))
    evaluations = tuple(
        Evaluation(name, "run", MODEL, TASK, name, {"kind": name}, name == METHODS[0], len(requests))
        for name in METHODS
    )
    return RunRecord(
        id="run",
        name="benchmark",
        status=RunStatus.RUNNING,
        created_at=datetime.now(UTC),
        job_yaml="name: benchmark\n",
        seed=0,
        versions={},
        models=(ModelRecord(MODEL, None, "float32", False, "0" * 64, 0),),
        tasks=(TaskRecord(MODEL, TASK, "1", 0, requests),),
        evaluations=evaluations,
    )


def answers(run: RunRecord, tokens: int) -> list[Answer]:
    """Every answer of the run, of so many tokens each, in the order in which actors would finish them."""
    generator = np.random.default_rng(0)
    words = _words(generator)
    return [
        _answer(generator, words, evaluation.id, doc_id, tokens)
        for doc_id in range(run.evaluations[0].requests)
        for evaluation in run.evaluations
    ]


def metrics(run: RunRecord) -> list[MetricValue]:
    """Two metrics an evaluation, as most tasks have."""
    return [
        MetricValue(e.id, name, "none", 0.5, 0.01, 0.48, 0.52, e.requests)
        for e in run.evaluations
        for name in ("exact_match", "f1")
    ]


def _request(doc_id: int) -> Request:
    prompt = f"Question {doc_id}: how many?\nAnswer:"
    return Request(
        TASK, doc_id, 0, RequestKind.GENERATE, prompt, tuple(range(12)), max_new_tokens=200, target="4"
    )


def _answer(
    generator: np.random.Generator, words: list[str], evaluation_id: str, doc_id: int, tokens: int
) -> Answer:
    trace = _trace(generator, tokens, reframing=evaluation_id == "harp")
    return Answer(
        evaluation_id,
        doc_id,
        repeat=0,
        finish_reason=FinishReason.STOP,
        text="".join(words[token % len(words)] for token in trace.token_ids),
        trace=trace,
        prompt_tokens=12,
        forward_tokens=12 + 2 * tokens,
        seconds=float(generator.uniform(1, 10)),
        scores={"exact_match,none": 1.0, "f1,none": 0.5},
        correct=True,
    )


def _trace(generator: np.random.Generator, tokens: int, reframing: bool) -> TokenTrace:
    ids = _ids(generator, tokens)
    entropy = generator.gamma(*_ENTROPY, tokens).astype(np.float32)
    hesitated = (entropy > 1) & reframing
    flipped = hesitated & (generator.random(tokens) < _FLIPPED)
    vanilla = np.where(flipped, _ids(generator, tokens), ids)
    columns = (ids, entropy, hesitated, vanilla, flipped)
    return TokenTrace(*(tuple(column.tolist()) for column in columns))


def _ids(generator: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.exp(generator.uniform(0, math.log(_VOCABULARY), count)).astype(np.int64)


def _words(generator: np.random.Generator) -> list[str]:
    """Pseudo-words in which letters are as frequent as in English, roughly, so that text compresses like text."""
    frequency = 1 / np.arange(2, 2 + len(_LETTERS))
    lengths = 1 + generator.poisson(_WORD - 2, 4000)
    return list(_spell(generator, lengths.tolist(), frequency / frequency.sum()))


def _spell(
    generator: np.random.Generator,
    lengths: list[int],
    frequency: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> Iterator[str]:
    for length in lengths:
        yield " " + "".join(generator.choice(_LETTERS, length, p=frequency))
