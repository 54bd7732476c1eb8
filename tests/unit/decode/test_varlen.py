"""The GPU's way of attention and of fixed shapes, on the CPU: a plain reference stands in for flash attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harp_batch.decode import Engine, Greedy, Harp, Method
from harp_batch.decode.attention import Layer, Style, varlen
from harp_batch.decode.attention.varlen import Varlen
from harp_batch.decode.chunk import Chunk, Mask
from harp_batch.decode.graphs import bucket
from harp_batch.decode.kv import PagedPool
from harp_batch.records import Choice, Completion, Request, RequestKind, Score
from tests.support import varlen_reference
from tests.support.tiny import VOCAB, tiny_model

NAMES = ("llama", "mistral-window", "qwen3")
THETA = 6.275  # about half of the steps hesitate, and none by less than 0.001
METHODS = {"greedy": Greedy(), "step": Harp(THETA), "sequence": Harp(THETA, mask="sequence")}
CPU = torch.device("cpu")


@pytest.fixture
def on_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are made from now on take the backend of GPUs."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_reference.varlen_attn)
    monkeypatch.setattr(varlen, "runs", lambda device, layers: device.type == "cpu")


def prompts(count: int, longest: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def generate(name: str, method: Method, slots: int = 3, fixed_shapes: bool = True) -> list[Completion]:
    engine = Engine(tiny_model(name), slots=slots)
    if not fixed_shapes:
        engine.runner.steps = None
    return engine.generate(prompts(5, 24), method=method, max_new_tokens=8, seed=2)


def frozen(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """As a captured graph, it has one output, which every replay overwrites."""
    first = forward()
    return lambda: first.copy_(forward())


def generate_frozen(engine: Engine, requests: list[list[int]], method: Method) -> list[Completion]:
    assert engine.runner.steps is not None
    engine.runner.steps._capture = frozen
    return engine.generate(requests, method=method, max_new_tokens=8, seed=2)


def score(name: str, method: Method) -> list[Score]:
    engine = Engine(tiny_model(name), slots=3)
    for doc, context in enumerate(prompts(3, 14)):
        choices = tuple(Choice(tuple(context), "", c) for c in ((5,), (7, 9, 11), (5, 8)))
        request = Request("tiny", doc, 0, RequestKind.LOGLIKELIHOOD, "", (), choices=choices)
        engine.submit(doc, request, method, seed=2)
    outcomes: dict[Any, Any] = {}
    while engine.busy:
        outcomes.update(engine.step())
    return [s for doc in range(3) for s in outcomes[doc]]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.trace.token_ids == b.trace.token_ids
        assert a.trace.hesitated == b.trace.hesitated
        assert a.trace.flipped == b.trace.flipped
        assert a.trace.entropy == pytest.approx(b.trace.entropy, abs=1e-4)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_the_portable_backend(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    portable = generate(name, METHODS[kind])
    request.getfixturevalue("on_varlen")
    assert_same(portable, generate(name, METHODS[kind]))
    hesitations = [h for c in portable for h in c.trace.hesitated]
    assert kind == "greedy" or 0 < sum(hesitations) < len(hesitations), "the test must see both branches"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_branches_equal_the_portable_backend(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    portable = score(name, METHODS[kind])
    request.getfixturevalue("on_varlen")
    paged = score(name, METHODS[kind])
    assert_same(portable, paged)
    assert [s.logprob for s in paged] == pytest.approx([s.logprob for s in portable], abs=1e-3)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_parked_logits_outlive_the_replays_that_follow(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    portable = generate(name, METHODS[kind])
    request.getfixturevalue("on_varlen")
    assert_same(portable, generate_frozen(Engine(tiny_model(name), slots=3), prompts(5, 24), METHODS[kind]))


@pytest.mark.parametrize("kind", ["step", "sequence"])
def test_prompts_of_more_than_a_page_equal_the_portable_backend(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = tiny_model("mistral-window")
    model.config.max_position_embeddings = 512
    rng = random.Random(3)
    long = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (300, 7, 253, 40)]
    engine = Engine(model, slots=3)
    portable = engine.generate(long, method=METHODS[kind], max_new_tokens=8, seed=2)
    engine.close()
    request.getfixturevalue("on_varlen")
    paged = Engine(model, slots=3)
    assert_same(portable, generate_frozen(paged, long, METHODS[kind]))
    assert paged.runner.backend.pools[0].pages == 2  # type: ignore[attr-defined]
    assert any(any(c.trace.hesitated) for c in portable)


@pytest.mark.usefixtures("on_varlen")
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("slots", [1, 4])
def test_fixed_shapes_change_nothing(kind: str, slots: int) -> None:
    assert_same(
        generate("mistral-window", METHODS[kind], slots),
        generate("mistral-window", METHODS[kind], slots, fixed_shapes=False),
    )


@pytest.mark.usefixtures("on_varlen")
def test_steps_of_fixed_shape_give_the_logits_of_any_other_forward() -> None:
    """Up to the largest step there is, with and without padding, in every order of streams."""
    runner = Engine(tiny_model("llama"), slots=6).runner
    runner.resize(6, 128, 0)
    assert runner.steps is not None
    rng = random.Random(1)
    ends = {(slot, masked): 0 for slot in range(6) for masked in (False, True)}
    seen = set()
    for rows in (1, 3, 1, 2, 5, 1):
        streams = rng.sample(sorted(ends), 12 if rows < 3 else 5)
        chunks = []
        for slot, masked in streams:
            tokens = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, rows + 1))]
            mask = Mask(slot - 3, 0.25) if masked else None
            chunks.append(Chunk(tokens, ends[slot, masked], (len(tokens) - 1,), slot, mask))
        assert runner.steps.takes(chunks)
        seen.add(bucket(sum(map(len, chunks))))
        fixed = runner.steps.run(chunks)
        steps, runner.steps = runner.steps, None
        torch.testing.assert_close(fixed, runner.forward(chunks))  # writes the same keys over themselves
        runner.steps = steps
        for chunk, stream in zip(chunks, streams, strict=True):
            ends[stream] = chunk.end
    assert len(seen) > 1


@pytest.mark.usefixtures("on_varlen")
@pytest.mark.parametrize("length", [128, 600])
def test_padding_rows_write_to_nobodys_page(length: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1.0  # the padding token's; else its keys are 0
    runner = Engine(model, slots=3).runner
    runner.resize(3, length, 0)
    runner.forward([Chunk([5, 6, 7], 0, (2,), slot=1)])
    pool = runner.backend.original
    keys, _ = pool._layers[0]
    written = (keys.abs().sum(dim=(2, 3)) > 0).sum(dim=1).tolist()  # of every page
    assert {page: count for page, count in enumerate(written) if count} == {
        2 * pool.pages: 3,
        pool.last_page: 5,
    }
    assert len(written) == pool.last_page + 1


@pytest.mark.usefixtures("on_varlen")
def test_only_short_kept_chunks_are_steps_of_fixed_shape() -> None:
    runner = Engine(tiny_model("llama"), slots=2).runner
    runner.resize(2, 128, 0)
    takes = runner.steps.takes  # type: ignore[union-attr]
    row = Chunk([5], 20, (0,), slot=0)
    assert takes([row, Chunk([5] * 7, 0, (6,), slot=1, mask=Mask(0, 0.1))])
    assert not takes([row, Chunk([5] * 8, 0, (7,), slot=1)]), "too many rows"
    assert not takes([row, Chunk([5], 0, (0,))]), "nothing is kept"
    assert not takes([Chunk([5], 3, (), slot=0)]), "nothing is wanted"
    assert [bucket(n) for n in (1, 8, 9, 16, 17, 32, 33, 65)] == [8, 8, 16, 16, 32, 32, 64, 96]


@pytest.mark.usefixtures("on_varlen")
def test_steps_outlive_no_pool() -> None:
    """Captured steps read memory at fixed places: when the pool moves, they must not be replayed."""
    engine = Engine(tiny_model("llama"), slots=2)
    method = METHODS["sequence"]
    captured = []

    def capture(forward: Any) -> Any:
        captured.append(engine.runner.backend.original.storage)
        return forward

    assert engine.runner.steps is not None
    engine.runner.steps._capture = capture
    engine.generate([[5, 6, 7]], method=method, max_new_tokens=4)
    first = len(captured)
    engine.generate([[5, 6, 7]], method=method, max_new_tokens=4)
    assert len(captured) == first > 0, "nothing is captured twice"
    engine.runner.release()
    again = engine.generate([[5, 6, 7]], method=method, max_new_tokens=4)
    assert captured[first:]
    assert min(captured[first:]) > max(captured[:first])
    assert_same(
        again, Engine(tiny_model("llama"), slots=2).generate([[5, 6, 7]], method=method, max_new_tokens=4)
    )


@pytest.mark.usefixtures("on_varlen")
def test_a_model_that_cannot_be_captured_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(tiny_model("llama"), slots=3)

    def refuse(forward: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert engine.runner.steps is not None
    engine.runner.steps._capture = refuse
    got = engine.generate(prompts(5, 24), method=METHODS["sequence"], max_new_tokens=8, seed=2)
    assert_same(got, generate("llama", METHODS["sequence"]))
    assert [r.levelname for r in caplog.records if "one kernel at a time" in r.message] == ["WARNING"]


@pytest.mark.usefixtures("on_varlen")
@pytest.mark.parametrize("covered", [False, True])
def test_steps_without_memory_for_a_graph_run_all_the_same(covered: bool) -> None:
    """Those for which there is memory are captured; a failure to end a capture may cover why it failed."""
    engine = Engine(tiny_model("llama"), slots=3)
    tried = []

    def capture(forward: Any) -> Any:
        tried.append(forward)
        if len(tried) > 1:
            return frozen(forward)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError:
            if covered:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            raise

    steps = engine.runner.steps
    assert steps is not None
    steps._capture = capture
    got = engine.generate(prompts(5, 24), method=METHODS["sequence"], max_new_tokens=8, seed=2)
    assert_same(got, generate("llama", METHODS["sequence"]))
    assert len(tried) == len(steps._ready) > 1, "each shape is tried once"
    assert steps._capture is capture


@pytest.mark.usefixtures("on_varlen")
def test_memory_that_a_launched_step_lacks_is_the_callers_matter() -> None:
    runner = Engine(tiny_model("llama"), slots=2).runner
    runner.resize(2, 128, 0)
    assert runner.steps is not None

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner.steps._compute = fail
    with pytest.raises(torch.OutOfMemoryError):
        runner.forward([Chunk([5], 0, (0,), slot=0)])


@pytest.mark.usefixtures("on_varlen")
def test_captured_steps_share_their_logits() -> None:
    runner = Engine(tiny_model("llama"), slots=6).runner
    runner.resize(6, 128, 0)
    steps = runner.steps
    assert steps is not None
    steps._capture = frozen
    for count in (1, 3):
        runner.forward([Chunk([5] * 7, 0, (6,), slot=slot) for slot in range(count)])
    with torch.inference_mode():
        places = {forward().data_ptr() for _, forward in steps._ready.values()}
    assert len(steps._ready) == 2
    assert len(places) == 1
    runner.resize(12, 128, 0)  # which may need more of them at a time
    runner.forward([Chunk([5], 0, (0,), slot=slot) for slot in range(12) for _ in range(2)])
    assert steps._capture is frozen, "they could not be captured"


def test_a_paged_pool_keeps_both_streams_when_it_grows_and_its_memory_when_it_need_not() -> None:
    pool = PagedPool(2, 128)
    keys = torch.zeros(3, 1, 8)
    pages, _ = pool.layer(0, keys, keys)
    assert pages.shape == (2 * 2 + 1, 256, 3, 8)
    pages[2, :5] = 1.0  # slot 1, original
    pages[3, :4] = 2.0  # reframed
    pages[4] = 9.0  # nobody's
    before = pool.storage
    pool.resize(2, 256, 2)
    assert (pool.slots, pool.length, pool.storage) == (2, 256, before)
    pool.resize(5, 300, 2)
    assert pool.storage > before
    pages, _ = pool.layer(0, keys, keys)
    assert pages.shape == (5 * 2 * 2 + 1, 256, 3, 8)
    assert pages.sum() == (5 * 1.0 + 4 * 2.0) * 3 * 8
    assert (pages[4, :5].min(), pages[6, :4].min()) == (1.0, 2.0)
    pool.move(1, 0, 5)
    assert torch.equal(pages[0:4], pages[4:8])
    pool.clear(1)
    assert not pages[4:8].any()
    assert pages[0:4].sum() == (5 * 1.0 + 4 * 2.0) * 3 * 8


def layer(**changes: Any) -> Layer:
    style = Style(0.125, changes.pop("window", None), changes.pop("softcap", None))
    return Layer(
        **{"heads": 4, "kv_heads": 2, "width": 64, "value_width": 64, "dtype": torch.bfloat16} | changes,
        style=style,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 30.0},
        {"dtype": torch.float32},
        {"width": 20, "value_width": 20},
        {"value_width": 32},
        {"width": 512, "value_width": 512},
    ],
)
def test_what_flash_attention_does_not_compute_is_not_tried(changes: dict[str, Any]) -> None:
    assert varlen._takes(layer())
    assert varlen._takes(layer(window=9, kv_heads=4, dtype=torch.float16))
    assert not varlen._takes(layer(**changes))


@pytest.mark.parametrize("window", [None, 7])
def test_the_trial_accepts_what_is_right_and_refuses_what_is_wrong(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = layer(dtype=torch.float32, width=16, value_width=16, window=window)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_reference.varlen_attn)
    assert varlen._agrees(tried, CPU)
    for wrong in (losing_rows, ignoring_pages, misaligned):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
        assert not varlen._agrees(tried, CPU), wrong.__name__


def losing_rows(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    out = varlen_reference.varlen_attn(query, *rest, **options)
    out[rest[2][1] :] = 0.0  # all sequences but the first
    return out


def ignoring_pages(*tensors: Any, **options: Any) -> torch.Tensor:
    if options["block_table"] is not None:
        options["block_table"] = options["block_table"] * 0
    return varlen_reference.varlen_attn(*tensors, **options)


def misaligned(*tensors: Any, **options: Any) -> torch.Tensor:
    return varlen_reference.varlen_attn(*tensors, **options | {"window_size": (-1, 1)})


def test_a_kernel_that_refuses_leaves_the_portable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("num_splits requires FA3")

    monkeypatch.setattr(varlen, "_agrees", refuse)
    assert not varlen.runs(torch.device("cuda"), {layer()})
    assert not varlen.runs(CPU, {layer()})
    assert not isinstance(Engine(tiny_model("llama")).runner.backend, Varlen)
