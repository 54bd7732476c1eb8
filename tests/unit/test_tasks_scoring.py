"""Answers become scores, and scores become metric values."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp_batch.records import Answer, FinishReason, Request
from harp_batch.tasks import LoadedTask, load_task
from harp_batch.tasks.plain import plain
from tests.support.model_files import tiny_tokenizer

GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 5)]
LAMBADA = [{"text": f"The dog saw number {n} of the cats"} for n in range(4)]
CSQA = {
    "question": "What barks?",
    "choices": {"label": list("ABCDE"), "text": ["a cat", "a dog", "a tree", "a car", "a fish"]},
    "answerKey": "B",
}

Prepared = tuple[LoadedTask, tuple[Request, ...]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    splits = {"gsm8k/test": GSM8K, "lambada_openai/test": LAMBADA, "commonsense_qa/validation": [CSQA] * 3}
    for name, rows in splits.items():
        (folder / name).parent.mkdir()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(name: str, data: Path) -> Prepared:
    task = load_task(name, 0, data)
    return task, task.build_requests(tiny_tokenizer(), chat_template=False)


@pytest.fixture(scope="module")
def gsm8k(data: Path) -> Prepared:
    return prepare("gsm8k", data)


@pytest.fixture(scope="module")
def lambada(data: Path) -> Prepared:
    return prepare("lambada_openai", data)


@pytest.fixture(scope="module")
def csqa(data: Path) -> Prepared:
    return prepare("commonsense_qa", data)


def text(answer: str | None, error: str | None = None) -> Answer:
    return Answer("e", 0, 0, FinishReason.STOP, text=answer, error=error)


def likelihoods(*choices: tuple[float, bool]) -> Answer:
    return Answer("e", 0, 0, FinishReason.SCORED, choices=choices)


FAILED = Answer("e", 0, 0, FinishReason.ERROR, error="the prompt is too long")


# -- per document ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("Twice one.\n#### 2", 1.0, 1.0),
        ("The answer is 2", 0.0, 1.0),
        ("#### 3", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_each_filter_has_its_score(gsm8k: Prepared, answer: str, strict: float, flexible: float) -> None:
    task, requests = gsm8k
    scores, correct = task.score(requests[0], text(answer))
    assert scores == {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}
    assert correct is bool(flexible), "an answer is right however it is written"


def test_best_choice_decides(csqa: Prepared) -> None:
    task, requests = csqa
    right = [(-2.0, False), (-1.0, True), (-3.0, False), (-4.0, False), (-5.0, False)]
    assert task.score(requests[0], likelihoods(*right)) == ({"acc,none": 1.0}, True)
    assert task.score(requests[0], likelihoods(*right[::-1])) == ({"acc,none": 0.0}, False)


def test_lambada_gives_log_likelihood_and_hit(lambada: Prepared) -> None:
    task, requests = lambada
    assert task.score(requests[0], likelihoods((-0.25, True))) == (
        {"perplexity,none": -0.25, "acc,none": 1},
        True,
    )


def test_scores_come_from_the_stored_document(gsm8k: Prepared) -> None:
    task, requests = gsm8k
    stored = replace(requests[0], doc={"question": "?", "answer": "#### 99"})
    assert task.score(stored, text("#### 99"))[1] is True


def test_scoring_does_not_depend_on_what_was_scored_before(gsm8k: Prepared) -> None:
    task, requests = gsm8k
    before = [task.score(request, text("#### 4")) for request in requests]
    after = [task.score(request, text("#### 4")) for request in reversed(requests)]
    assert before == after[::-1]


def test_failed_generation_scores_as_empty_text(gsm8k: Prepared) -> None:
    task, requests = gsm8k
    assert task.score(requests[0], FAILED) == task.score(requests[0], text(""))


def test_failed_choice_is_wrong_and_has_no_perplexity(csqa: Prepared, lambada: Prepared) -> None:
    for task, requests in (csqa, lambada):
        assert task.score(requests[0], FAILED) == ({"acc,none": 0.0}, False)


def test_impossible_answer_is_undefined_rather_than_infinite(lambada: Prepared) -> None:
    task, requests = lambada
    scores, correct = task.score(requests[0], likelihoods((-math.inf, False)))
    assert scores == {"perplexity,none": None, "acc,none": 0}
    assert correct is False
    json.dumps(scores, allow_nan=False)


# -- over all documents ----------------------------------------------------------------------------------------


def test_mean_and_its_standard_error(gsm8k: Prepared) -> None:
    task, requests = gsm8k
    answers = ["#### 2", "#### 4", "no", "#### 8"]
    scores = [task.score(r, text(a))[0] for r, a in zip(requests, answers, strict=True)]
    value, stderr = task.aggregate(scores)["exact_match,strict-match"]
    assert value == 0.75
    assert stderr == pytest.approx(statistics.stdev([1, 1, 0, 1]) / math.sqrt(4))


def test_perplexity_is_the_exponential_of_the_mean(lambada: Prepared) -> None:
    task, requests = lambada
    logprobs = [-0.5, -1.5, -2.0, -4.0]
    scores = [task.score(r, likelihoods((lp, False)))[0] for r, lp in zip(requests, logprobs, strict=True)]
    values = task.aggregate(scores)
    value, stderr = values["perplexity,none"]
    assert value == pytest.approx(math.exp(2.0))
    assert stderr is not None
    assert 0 < stderr < math.exp(4.0)
    assert values["acc,none"] == (0.0, 0.0)


def test_bootstrap_is_the_same_every_time(lambada: Prepared, capfd: pytest.CaptureFixture[str]) -> None:
    task, _ = lambada
    scores = [{"perplexity,none": -float(n)} for n in range(6)]
    assert task.aggregate(scores) == task.aggregate(scores)
    assert capfd.readouterr() == ("", "")


def test_one_document_has_no_standard_error(lambada: Prepared) -> None:
    task, _ = lambada
    values = task.aggregate([{"perplexity,none": -1.0, "acc,none": 1}])
    assert values == {"perplexity,none": (pytest.approx(math.e), None), "acc,none": (1.0, None)}


def test_undefined_document_makes_the_value_undefined(lambada: Prepared) -> None:
    task, _ = lambada
    values = task.aggregate(
        [{"perplexity,none": None, "acc,none": 0}, {"perplexity,none": -1.0, "acc,none": 1}]
    )
    assert values["perplexity,none"] == (None, None)
    assert values["acc,none"][0] == 0.5


def test_failed_documents_count_as_wrong_but_not_for_perplexity(lambada: Prepared) -> None:
    task, requests = lambada
    scores = [task.score(requests[0], answer)[0] for answer in (likelihoods((-2.0, True)), FAILED)]
    values = task.aggregate(scores)
    assert values["acc,none"][0] == 0.5
    assert values["perplexity,none"] == (pytest.approx(math.exp(2.0)), None)


def test_nothing_scored_is_no_metric(gsm8k: Prepared) -> None:
    assert gsm8k[0].aggregate([]) == {}


# -- plain values ----------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES | LEAVES.map(lambda leaf: np.array(leaf)) | st.datetimes(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_becomes_json(value: Any) -> None:
    result = plain(value)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert plain(result) == result


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        ((1, np.array([1.5, np.nan])), [1, [1.5, None]]),
        ({1: (2,)}, {"1": [2]}),
        (json.dumps, "json.dumps"),
    ],
)
def test_numbers_become_python_numbers(value: Any, expected: Any) -> None:
    result = plain(value)
    assert result == expected
    assert type(result) is type(expected)
