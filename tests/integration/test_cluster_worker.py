"""The worker without Ray: leases in, answers out, and nothing breaks silently."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harp_batch.cluster.actor import Recipe, Reply, Worker
from harp_batch.cluster.dispatcher import Lease
from harp_batch.decode import Engine
from harp_batch.models import load_tokenizer, resolve
from harp_batch.records import Answer, Choice, FinishReason, Request, RequestKind

METHODS = {
    "g": {"kind": "greedy"},
    "h": {"kind": "harp", "theta": 1.0, "delta": 0.2, "beta": 0.5, "mask": "step"},
}
PATIENCE = 0.2


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path) -> Recipe:
    return Recipe(resolve(str(tiny_llama)), "float32", METHODS, seed=3, slots=4)


def ask(recipe: Recipe, doc_id: int, prompt: str = "How many apples?") -> Request:
    ids = tuple(load_tokenizer(recipe.model).encode(prompt))
    return Request("t", doc_id, 0, RequestKind.GENERATE, prompt, ids, stop=("\n",), max_new_tokens=8)


def ask_choices(recipe: Recipe, doc_id: int) -> Request:
    encode = load_tokenizer(recipe.model).encode
    choices = tuple(Choice(tuple(encode("One")), c, tuple(encode(c))) for c in (" two", " three", " apples"))
    return Request("t", doc_id, 0, RequestKind.LOGLIKELIHOOD, "One", (), choices)


def collect(worker: Worker, count: int) -> tuple[dict[tuple[tuple[int, int], int], Answer], Reply]:
    """The next ``count`` answers by (lease, document), and the last reply."""
    found: dict[tuple[tuple[int, int], int], Answer] = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        reply = worker.poll(PATIENCE)
        found |= {(lease, answer.doc_id): answer for lease, answer in reply.answers}
        if reply.error or len(found) >= count:
            return found, reply
    raise AssertionError(f"{len(found)} of {count} answers came")


def test_answers_come_back_once_under_their_lease(recipe: Recipe) -> None:
    worker = Worker(recipe)
    asked = tuple(ask(recipe, doc, f"{doc} apples") for doc in range(6))
    worker.assign(Lease(0, 1, "g", "a", asked))
    worker.assign(Lease(7, 2, "h", "a", (ask_choices(recipe, 0),)))
    found, reply = collect(worker, 7)
    assert set(found) == {((0, 1), doc) for doc in range(6)} | {((7, 2), 0)}
    assert {found[key].evaluation_id for key in found} == {"g", "h"}
    assert (reply.ready, reply.error, reply.waiting) == (True, None, 0)
    assert reply.steps > 0
    assert reply.forward_tokens == sum(answer.forward_tokens for answer in found.values())
    assert worker.poll().answers == ()
    worker.stop()


def test_an_answer_carries_text_choices_and_trace(recipe: Recipe) -> None:
    worker = Worker(recipe)
    worker.assign(Lease(0, 1, "h", "a", (ask(recipe, 0), ask_choices(recipe, 1))))
    found, _ = collect(worker, 2)
    worker.stop()
    generated, scored = found[(0, 1), 0], found[(0, 1), 1]
    assert generated.text is not None
    assert "\n" not in generated.text
    assert 1 <= len(generated.trace) <= 8
    assert generated.prompt_tokens == len(ask(recipe, 0).prompt_ids)
    assert scored.finish_reason is FinishReason.SCORED
    assert [len(scored.choices), scored.text] == [3, None]
    assert all(math.isfinite(logprob) and logprob < 0 for logprob, _ in scored.choices)
    assert len(scored.trace) == sum(len(c.continuation_ids) for c in ask_choices(recipe, 1).choices)


def test_a_prompt_that_does_not_fit_is_that_answers_error(recipe: Recipe) -> None:
    worker = Worker(recipe)
    worker.assign(Lease(0, 1, "g", "a", (ask(recipe, 0, "apples " * 600), ask(recipe, 1))))
    found, _ = collect(worker, 2)
    worker.stop()
    assert found[(0, 1), 0].finish_reason is FinishReason.ERROR
    assert "context" in (found[(0, 1), 0].error or "")
    assert found[(0, 1), 1].error is None


def test_a_model_that_does_not_load_is_reported(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    worker = Worker(replace(recipe, model=replace(recipe.model, path=str(tmp_path))))
    _, reply = collect(worker, 1)
    assert not reply.ready
    assert reply.error
    assert "\n" not in reply.error


def test_an_engine_that_breaks_is_reported(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_: Engine) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Engine, "step", break_down)
    worker = Worker(recipe)
    worker.assign(Lease(0, 1, "g", "a", (ask(recipe, 0),)))
    found, reply = collect(worker, 1)
    assert (found, reply.ready) == ({}, True)
    assert reply.error == "RuntimeError: the device is gone"
