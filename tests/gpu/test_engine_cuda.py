"""The engine on a CUDA device: flash attention, captured steps, no waiting for the device, memory that runs out."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from harp_batch.decode import Engine, Greedy, Harp, Method, harp
from harp_batch.decode.attention import Style
from harp_batch.decode.attention.portable import Portable
from harp_batch.decode.attention.varlen import Varlen
from harp_batch.decode.chunk import Chunk
from harp_batch.decode.graphs import CudaCapture, directly
from harp_batch.records import Completion
from tests.support import oracle
from tests.support.tiny import SMALL, VOCAB

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NEW_TOKENS = 16
# Heads as wide as flash attention takes them, and a context of several pages.
_SMALL = SMALL | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SMALL),
    "mistral-window": MistralConfig(**_SMALL, sliding_window=9),
    "qwen3": Qwen3Config(**_SMALL),
}
# Differences in a logit, and in an entropy in bits, that arithmetic alone explains.
LOGIT_NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ENTROPY_NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # on a CPU, where two ways were compared: 0.015


def model_on(device: str, name: str, dtype: torch.dtype) -> Any:
    """A model with logits spread enough that hesitation comes and goes; the same weights on every device."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    return model.to(device=device, dtype=dtype).eval()


@cache
def reference(name: str, dtype: torch.dtype) -> Any:
    return model_on("cpu", name, dtype)


def prompts(count: int = 9, longest: int = 40, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@cache
def median_entropy(name: str, dtype: torch.dtype) -> float:
    model = reference(name, dtype)
    entropies = sorted(
        t.entropy for p in prompts(4) for t in oracle.decode(model, p, oracle.Setting(), steps=NEW_TOKENS)
    )
    return entropies[len(entropies) // 2]


def method_and_setting(name: str, kind: str, dtype: torch.dtype) -> tuple[Method, oracle.Setting]:
    if kind == "greedy":
        return Greedy(), oracle.Setting()
    theta = median_entropy(name, dtype)
    return Harp(theta, 0.2, 0.5, kind), oracle.Setting(theta, 0.2, 0.5, kind)  # type: ignore[arg-type]


@cache
def decoded(name: str, kind: str, dtype: torch.dtype) -> list[list[oracle.Token]]:
    _, setting = method_and_setting(name, kind, dtype)
    model = reference(name, dtype)
    return [
        oracle.decode(model, p, setting, steps=NEW_TOKENS, seed=3, key=str(i))
        for i, p in enumerate(prompts())
    ]


def agreed(completion: Completion, tokens: list[oracle.Token], theta: float, dtype: torch.dtype) -> int:
    """How many tokens were compared: up to the first whose decision is within the noise."""
    for i, expected in enumerate(tokens):
        best, second = expected.logits.topk(2).values.tolist()
        unsure = best - second <= LOGIT_NOISE[dtype] or abs(expected.entropy - theta) <= ENTROPY_NOISE[dtype]
        if unsure:
            return i
        assert completion.token_ids[i] == expected.token
        assert completion.trace.hesitated[i] == expected.hesitated
        assert completion.trace.entropy[i] == pytest.approx(expected.entropy, abs=ENTROPY_NOISE[dtype])
    return len(tokens)


@pytest.mark.parametrize("slots", [1, 7, 64])
@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_the_uncached_loop(name: str, dtype: torch.dtype, kind: str, slots: int) -> None:
    method, setting = method_and_setting(name, kind, dtype)
    engine = Engine(model_on("cuda", name, dtype), slots=slots)
    assert isinstance(engine.runner.backend, Portable if dtype == torch.float32 else Varlen)
    completions = engine.generate(prompts(), method=method, max_new_tokens=NEW_TOKENS, seed=3)
    expected = decoded(name, kind, dtype)
    pairs = zip(completions, expected, strict=True)
    compared = sum(agreed(completion, tokens, setting.theta, dtype) for completion, tokens in pairs)
    assert compared >= len(prompts()), "too little was compared to mean anything"


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_the_uncached_loop(name: str, kind: str) -> None:
    dtype = torch.bfloat16
    method, setting = method_and_setting(name, kind, dtype)
    pairs = [(p, [5, 7, 9, 2][: 1 + i % 4]) for i, p in enumerate(prompts())]
    scores = Engine(model_on("cuda", name, dtype), slots=4).loglikelihood(pairs, method=method, seed=4)
    compared = 0
    for i, (pair, got) in enumerate(zip(pairs, scores, strict=True)):
        logprob, _, tokens = oracle.score(reference(name, dtype), *pair, setting, seed=4, key=str(i))
        if all(abs(t.entropy - setting.theta) > ENTROPY_NOISE[dtype] for t in tokens):
            compared += 1
            assert got.logprob == pytest.approx(logprob, abs=2 * LOGIT_NOISE[dtype] * len(tokens))
    assert compared


@pytest.mark.parametrize("kind", ["greedy", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_equal_those_that_are_launched(name: str, kind: str) -> None:
    method, _ = method_and_setting(name, kind, torch.bfloat16)
    replaying, launching = (Engine(model_on("cuda", name, torch.bfloat16), slots=8) for _ in range(2))
    assert launching.runner.steps is not None
    launching.runner.steps._capture = directly
    one, other = (
        e.generate(prompts(20), method=method, max_new_tokens=NEW_TOKENS) for e in (replaying, launching)
    )
    assert replaying.runner.steps is not None
    assert isinstance(replaying.runner.steps._capture, CudaCapture), "the model could not be captured"
    assert replaying.runner.steps._ready
    assert [(c.token_ids, c.trace) for c in one] == [(c.token_ids, c.trace) for c in other]


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    capture, values = CudaCapture(device), torch.arange(8.0, device=device)
    runs = []

    def third_reads_a_value() -> torch.Tensor:  # the warm-up is two runs
        runs.append(values * 2)
        if len(runs) == 3:
            runs[-1].sum().item()
        return runs[-1]

    before = torch.cuda.current_stream()
    for forward in (third_reads_a_value, lambda: values[values.sum().int() :]):
        with pytest.raises(RuntimeError):
            capture(forward)
        assert torch.cuda.current_stream() == before
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.cuda.get_sync_debug_mode() == 0
    replay = capture(lambda: values + 1)
    values.fill_(4.0)
    assert replay().tolist() == [5.0] * 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("kind", ["greedy", "sequence"])
def test_a_model_on_another_device_than_the_current_one_is_captured(kind: str) -> None:
    method, _ = method_and_setting("llama", kind, torch.bfloat16)
    engines = [Engine(model_on(f"cuda:{i}", "llama", torch.bfloat16), slots=8) for i in range(2)]
    one, other = (e.generate(prompts(20), method=method, max_new_tokens=NEW_TOKENS) for e in engines)
    steps = engines[1].runner.steps
    assert steps is not None
    assert isinstance(steps._capture, CudaCapture), "the model could not be captured"
    assert steps._ready
    assert [(c.token_ids, c.trace) for c in one] == [(c.token_ids, c.trace) for c in other]


def test_attention_of_a_row_has_the_same_bits_among_any_neighbours() -> None:
    """Bit for bit. Whole answers are not promised to: cuBLAS chooses a product's kernel by its number of rows."""
    device, style = torch.device("cuda"), Style(0.125, None, None)
    prompt, row = Chunk([0] * 300, 0, slot=0), Chunk([0], 300, slot=0)
    others = [Chunk([0] * n, 0, slot=slot) for slot, n in ((1, 700), (2, 5), (3, 64))]
    generator = torch.Generator().manual_seed(0)
    drawn = [
        [torch.randn(h, 1100, 64, generator=generator).to(device, torch.bfloat16) for h in (8, 2, 2)]
        for _ in (prompt, row)
    ]

    def last_row(neighbours: list[Chunk]) -> torch.Tensor:
        backend = Varlen(4, 1024)
        for (q, k, v), first in zip(drawn, (prompt, row), strict=True):
            chunks = [first, *neighbours]
            rows = sum(map(len, chunks))
            packing = backend.pack(chunks, device)
            out = packing.attend(0, q[:, :rows], k[:, :rows], v[:, :rows], style)
        return out[: len(row)]

    alone = last_row([])
    for count in (1, 2, 3):
        assert torch.equal(last_row(others[:count]), alone)


def test_masks_are_equal_on_both_devices() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
    positions = torch.randint(0, 4096, (64,), generator=generator)
    deltas = torch.rand(64, generator=generator, dtype=torch.float64)
    here = harp.keep_mask(keys, positions, 576, deltas)
    there = harp.keep_mask(keys.cuda(), positions.cuda(), 576, deltas.cuda())
    assert torch.equal(here, there.cpu())
    assert 0 < int(here.sum()) < here.numel()


@pytest.fixture
def restored_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("restored_memory")
def test_memory_that_runs_out_costs_no_answer() -> None:
    engine = Engine(model_on("cuda", "llama", torch.bfloat16), slots=64)
    before = engine.batcher.limits.positions
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # 64 slots of 1,024 positions need 128 MiB: two layers, two streams, keys and values of two heads
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    method = Harp(median_entropy("llama", torch.bfloat16), mask="sequence")
    long = [[5 + i % 80] * 900 for i in range(64)]
    completions = engine.generate(long, method=method, max_new_tokens=4)
    assert [len(c.token_ids) for c in completions] == [4] * 64
    assert engine.batcher.limits.positions < before, "the memory was meant to run out"


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
def test_nothing_in_a_step_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = method_and_setting("llama", kind, torch.bfloat16)
    engine = Engine(model_on("cuda", "llama", torch.bfloat16), slots=4)
    first = engine.generate(prompts(), method=method, max_new_tokens=8)  # captures what is to be captured
    launch = Engine._launch
    launches = []

    def watched(self: Engine) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launches.append(self.steps)

    monkeypatch.setattr(Engine, "_launch", watched)
    again = engine.generate(prompts(), method=method, max_new_tokens=8)
    assert launches
    assert [len(c.token_ids) for c in again] == [len(c.token_ids) for c in first]
    assert all(math.isfinite(e) for c in again for e in c.trace.entropy)
