"""Memory that runs out: the budget shrinks, every answer comes, and it is the same answer."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harp_batch.decode import Engine, Greedy, Harp, Method, RequestError
from harp_batch.decode.chunk import Chunk
from harp_batch.records import Choice, Completion, Request, RequestKind
from tests.support.tiny import VOCAB, tiny_model

METHODS: list[Method] = [Greedy(), Harp(theta=4.0), Harp(theta=4.0, mask="sequence")]


def requests(count: int = 12) -> list[Request]:
    """Generations and scorings of many lengths."""
    rng = random.Random(11)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(n))

    made = [
        Request("t", i, 0, RequestKind.GENERATE, "", ids(rng.randrange(1, 150)), max_new_tokens=7)
        for i in range(count)
    ]
    context = ids(90)
    choices = tuple(Choice(context, "", ids(n)) for n in (1, 3, 2))
    return [*made, Request("t", count, 0, RequestKind.LOGLIKELIHOOD, "", (), choices=choices)]


def answers(engine: Engine, method: Method) -> dict[Any, Any]:
    for request in requests():
        engine.submit(request.doc_id, request, method, 0)
    found: dict[Any, Any] = {}
    while engine.busy:
        for ticket, outcome in engine.step():
            assert ticket not in found
            found[ticket] = bits(outcome)
    return found


def bits(outcome: Any) -> Any:
    if isinstance(outcome, Completion):
        return outcome.trace, outcome.finish_reason, outcome.forward_tokens
    if isinstance(outcome, tuple):
        return [(s.logprob, s.trace, s.forward_tokens) for s in outcome]
    return outcome


def limited(engine: Engine, fails: Callable[[list[Chunk]], bool]) -> Engine:
    """An engine whose device has no room for some forwards."""
    forward = engine.runner.forward

    def attempt(chunks: list[Chunk]) -> Any:
        if fails(chunks):
            raise torch.OutOfMemoryError("the device is full")
        return forward(chunks)

    engine.runner.forward = attempt  # type: ignore[method-assign,assignment]
    return engine


def test_forwards_get_smaller_until_they_fit() -> None:
    for method in METHODS:
        engine = limited(Engine(tiny_model("llama"), slots=8), lambda chunks: sum(map(len, chunks)) > 200)
        assert answers(engine, method) == answers(Engine(tiny_model("llama"), slots=8), method)
        assert engine.batcher.limits.step_rows <= 200


def test_the_batch_gets_smaller_until_it_fits_and_everyone_starts_again() -> None:
    for method in METHODS:
        engine = Engine(tiny_model("llama"), slots=8)
        pool = engine.runner.backend.original
        limited(engine, lambda chunks, pool=pool: pool.slots * pool.length > 700)  # type: ignore[misc]
        assert answers(engine, method) == answers(Engine(tiny_model("llama"), slots=8), method)
        assert engine.batcher.limits.slots < 8


def test_one_request_is_not_blamed_for_slots_that_it_does_not_need() -> None:
    engine = Engine(tiny_model("llama"), slots=8)
    pool = engine.runner.backend.original
    limited(engine, lambda chunks: pool.slots * pool.length > 300)
    assert len(engine.generate([[5] * 9], method=Greedy(), max_new_tokens=4)) == 1


def test_one_scoring_is_not_blamed_for_keys_and_values_of_sequences_that_are_gone() -> None:
    engine = Engine(tiny_model("llama"), slots=8)
    pool = engine.runner.backend.original
    engine.generate([[5] * 9] * 8, method=Greedy(), max_new_tokens=4)
    assert pool.slots
    limited(engine, lambda chunks: pool.slots > 0)
    assert len(engine.loglikelihood([([5] * 100, [6])], method=Greedy())) == 1


def test_a_request_that_never_fits_fails_alone() -> None:
    engine = limited(Engine(tiny_model("llama"), slots=4), lambda chunks: max(map(len, chunks)) > 120)
    expected = answers(Engine(tiny_model("llama"), slots=4), Greedy())
    too_long = {r.doc_id for r in requests() if len(r.prompt_ids) > 120}
    assert 0 < len(too_long) < 8
    found = answers(engine, Greedy())
    assert set(found) == set(expected)
    for doc, outcome in found.items():
        if doc in too_long:
            assert outcome == RequestError("there is not enough memory for this request")
        else:
            assert outcome == expected[doc]
    assert engine.batcher.limits.slots == 4, "what did not fit must not slow down what comes after it"


def test_another_runtime_error_is_not_taken_for_it() -> None:
    def broken(chunks: list[Chunk]) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine = Engine(tiny_model("llama"))
    engine.runner.forward = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="device-side assert"):
        answers(engine, Greedy())


REAL = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from harp_batch.decode import Engine, Greedy

torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(hidden_size=512, num_attention_heads=8, head_dim=64, num_hidden_layers=2, max_position_embeddings=256)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=64, **shape)).eval()
prompts = [[5 + i] * (10 + i) for i in range(64)]

def decode(slots):
    engine = Engine(model, slots=slots)
    return engine, [c.trace for c in engine.generate(prompts, method=Greedy(), max_new_tokens=60)]

expected = decode(4)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20), resource.RLIM_INFINITY))
engine, got = decode(64)
assert got == expected
print(engine.batcher.limits.slots)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an address-space limit is enforced on Linux alone")
def test_an_allocation_that_really_fails_is_survived() -> None:
    """64 slots of 256 positions take 32 MiB a tensor and there are four; the process gets 80 MiB more."""
    done = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 64
