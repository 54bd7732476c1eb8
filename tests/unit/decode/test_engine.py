"""The engine against the plain uncached loop, on tiny models of every supported kind of architecture."""

from __future__ import annotations

import copy
import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Llama4TextConfig

from harp_batch.decode import Engine, Greedy, Harp, Method, RequestError, require_supported
from harp_batch.errors import ModelError, UserError
from harp_batch.records import Choice, Completion, FinishReason, Request, RequestKind, Score
from tests.support import oracle
from tests.support.tiny import CONFIGS, VOCAB, tiny_model

NEW_TOKENS = 16
STOP = (2,)


def prompts(count: int = 9, longest: int = 40, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@cache
def reference(name: str) -> Any:
    return tiny_model(name)


@cache
def median_entropy(name: str) -> float:
    """A θ at which about half of the steps hesitate, well clear of any single entropy."""
    entropies = sorted(
        t.entropy
        for p in prompts()
        for t in oracle.decode(reference(name), p, oracle.Setting(), steps=NEW_TOKENS)
    )
    middle = len(entropies) // 2
    gaps = [(entropies[i + 1] - entropies[i], i) for i in range(middle - 10, middle + 10)]
    _, i = max(gaps)
    return (entropies[i] + entropies[i + 1]) / 2


def method_and_setting(name: str, kind: str) -> tuple[Method, oracle.Setting]:
    if kind == "greedy":
        return Greedy(), oracle.Setting()
    theta = median_entropy(name)
    return Harp(theta, 0.2, 0.5, kind), oracle.Setting(theta, 0.2, 0.5, kind)  # type: ignore[arg-type]


def assert_same(completion: Completion, tokens: list[oracle.Token]) -> None:
    trace = completion.trace
    assert completion.token_ids == trace.token_ids == tuple(t.token for t in tokens)
    assert trace.hesitated == tuple(t.hesitated for t in tokens)
    assert trace.vanilla_token_ids == tuple(t.vanilla for t in tokens)
    assert trace.flipped == tuple(t.vanilla != t.token for t in tokens)
    assert trace.entropy == pytest.approx([t.entropy for t in tokens], abs=1e-5)


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_the_uncached_loop(name: str, kind: str) -> None:
    method, setting = method_and_setting(name, kind)
    engine = Engine(tiny_model(name), slots=4)
    completions = engine.generate(
        prompts(), method=method, max_new_tokens=NEW_TOKENS, stop_token_ids=STOP, seed=3
    )
    for i, (prompt, completion) in enumerate(zip(prompts(), completions, strict=True)):
        expected = oracle.decode(
            reference(name), prompt, setting, steps=NEW_TOKENS, stop=STOP, seed=3, key=str(i)
        )
        assert_same(completion, expected)
    if kind != "greedy":
        hesitations = [h for c in completions for h in c.trace.hesitated]
        assert 0 < sum(hesitations) < len(hesitations), "the test must see both branches"
        assert any(any(c.trace.flipped) for c in completions)


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_the_uncached_loop(name: str, kind: str) -> None:
    method, setting = method_and_setting(name, kind)
    engine = Engine(tiny_model(name), slots=4)
    pairs = [(p, [5, 7, 9, 2][: 1 + i % 4]) for i, p in enumerate(prompts())]
    greedy = engine.generate([prompts()[0]], method=method, max_new_tokens=3, seed=4)[0].token_ids
    pairs[0] = (prompts()[0], list(greedy))
    for i, (pair, got) in enumerate(
        zip(pairs, engine.loglikelihood(pairs, method=method, seed=4), strict=True)
    ):
        logprob, is_greedy, tokens = oracle.score(reference(name), *pair, setting, seed=4, key=str(i))
        assert got.logprob == pytest.approx(logprob, abs=1e-4)
        assert got.is_greedy == is_greedy
        assert got.trace.token_ids == tuple(pair[1])
        assert got.trace.hesitated == tuple(t.hesitated for t in tokens)
        assert got.trace.vanilla_token_ids == tuple(t.vanilla for t in tokens)
        assert got.trace.flipped == tuple(t.vanilla != t.token for t in tokens)
        assert got.trace.entropy == pytest.approx([t.entropy for t in tokens], abs=1e-5)
    if kind == "greedy":
        assert engine.loglikelihood([pairs[0]], method=method)[0].is_greedy


CONTINUATIONS = ((5,), (7, 9, 11), (5, 8), (13, 4, 6, 10))


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_choices_that_share_a_context_equal_the_uncached_loop(name: str, kind: str) -> None:
    method, setting = method_and_setting(name, kind)
    engine = Engine(tiny_model(name), slots=4)
    for doc, context in enumerate(prompts()):
        choices = tuple(Choice(tuple(context), "", c) for c in CONTINUATIONS)
        engine.submit(doc, score_request(doc, choices), method, seed=6)
    outcomes = run(engine)
    for doc, context in enumerate(prompts()):
        for continuation, got in zip(CONTINUATIONS, outcomes[doc], strict=True):
            logprob, is_greedy, tokens = oracle.score(
                reference(name), context, list(continuation), setting, seed=6, key=f"tiny/{doc}/0"
            )
            assert got.logprob == pytest.approx(logprob, abs=1e-4)
            assert got.is_greedy == is_greedy
            assert got.trace.token_ids == continuation
            assert got.trace.hesitated == tuple(t.hesitated for t in tokens)
            assert got.trace.flipped == tuple(t.vanilla != t.token for t in tokens)
            assert got.trace.entropy == pytest.approx([t.entropy for t in tokens], abs=1e-5)


def test_choices_with_contexts_of_their_own_come_back_in_order() -> None:
    engine = Engine(tiny_model("llama"))
    pairs = [((5, 6), (7,)), ((8, 9, 10), (7, 11)), ((5, 6), (12, 13)), ((8, 9, 10), (14,))]
    engine.submit("mixed", score_request(0, tuple(Choice(c, "", t) for c, t in pairs)), Greedy(), 0)
    for got, (context, targets) in zip(run(engine)["mixed"], pairs, strict=True):
        expected = oracle.score(reference("llama"), list(context), list(targets), oracle.Setting())
        assert got.trace.token_ids == targets
        assert got.logprob == pytest.approx(expected[0], abs=1e-4)


def test_a_shared_context_is_paid_for_once() -> None:
    context = tuple(prompts()[1])
    choices = tuple(Choice(context, "", c) for c in CONTINUATIONS)
    engine = Engine(tiny_model("llama"))

    def cost(method: Method) -> int:
        engine.submit(0, score_request(0, choices), method, 0)
        return sum(score.forward_tokens for score in run(engine)[0])

    fed = sum(len(c) - 1 for c in CONTINUATIONS)  # the last token of a continuation is never fed
    assert cost(Greedy()) == len(context) + fed
    assert cost(Harp(theta=0.0, mask="sequence")) == 2 * (len(context) + fed)
    # a mask a step: the context again for every target index, behind it the branches that are that long
    longer = [[len(c) > j for c in CONTINUATIONS].count(True) for j in range(1, 4)]
    again = 4 * len(context) + sum(j * count for j, count in zip(range(1, 4), longer, strict=True))
    assert cost(Harp(theta=0.0, mask="step")) == len(context) + fed + again


def test_a_request_without_choices_is_an_error_and_not_a_wait() -> None:
    engine = Engine(tiny_model("llama"))
    engine.submit("none", score_request(0, ()), Greedy(), 0)
    assert run(engine) == {"none": RequestError("the request has no continuation to score")}


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
def test_a_long_prompt_is_prefilled_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harp_batch.decode.sequence.PREFILL_CHUNK", 16)
    method, setting = method_and_setting("mistral-window", kind)
    long = prompts(count=4, longest=100, seed=8)
    long[0] = long[0] + [5] * (33 - len(long[0]) % 16)  # one row past a chunk's end
    engine = Engine(tiny_model("mistral-window"), slots=3)
    completions = engine.generate(long, method=method, max_new_tokens=6)
    for i, (prompt, completion) in enumerate(zip(long, completions, strict=True)):
        assert_same(
            completion, oracle.decode(reference("mistral-window"), prompt, setting, steps=6, key=str(i))
        )


def test_a_step_may_bring_no_logits_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harp_batch.decode.sequence.PREFILL_CHUNK", 16)
    completion = Engine(tiny_model("llama"), slots=1).generate([[5] * 40], method=Greedy(), max_new_tokens=2)[
        0
    ]
    expected = oracle.decode(reference("llama"), [5] * 40, oracle.Setting(), steps=2)
    assert completion.token_ids == tuple(t.token for t in expected)


@pytest.mark.parametrize("kind", ["greedy", "step", "sequence"])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_slots_change_nothing(kind: str, slots: int) -> None:
    method, _ = method_and_setting("llama", kind)
    one = Engine(tiny_model("llama"), slots=5).generate(prompts(20), method=method, max_new_tokens=12)
    other = Engine(tiny_model("llama"), slots=slots).generate(prompts(20), method=method, max_new_tokens=12)
    assert [(c.token_ids, c.trace, c.forward_tokens) for c in one] == [
        (c.token_ids, c.trace, c.forward_tokens) for c in other
    ]


def test_methods_share_a_batch_without_touching_each_other() -> None:
    methods = [method_and_setting("llama", kind)[0] for kind in ("greedy", "step", "sequence")]
    keys = [f"tiny/{i}/0" for i in range(len(prompts()))]
    alone = [
        Engine(tiny_model("llama")).generate(
            prompts(), method=m, max_new_tokens=8, seed=7, stop_token_ids=STOP, request_keys=keys
        )
        for m in methods
    ]
    engine = Engine(tiny_model("llama"), slots=6)
    for m, method in enumerate(methods):
        for i, prompt in enumerate(prompts()):
            engine.submit((m, i), generate_request(i, prompt, 8), method, seed=7)
    together = run(engine)
    for m, completions in enumerate(alone):
        for i, completion in enumerate(completions):
            assert together[m, i].trace == completion.trace
            assert together[m, i].forward_tokens == completion.forward_tokens


def generate_request(doc: int, prompt: list[int], new: int) -> Request:
    return Request("tiny", doc, 0, RequestKind.GENERATE, "", tuple(prompt), max_new_tokens=new)


def run(engine: Engine) -> dict[Any, Any]:
    outcomes: dict[Any, Any] = {}
    while engine.busy:
        for ticket, outcome in engine.step():
            assert ticket not in outcomes, "an outcome came twice"
            outcomes[ticket] = outcome
    return outcomes


def test_forward_tokens_count_every_position() -> None:
    engine = Engine(tiny_model("llama"))
    prompt = prompts()[0]
    vanilla = engine.generate([prompt], method=Greedy(), max_new_tokens=5)[0]
    assert vanilla.forward_tokens == len(prompt) + 4  # the last token is never fed
    step = engine.generate([prompt], method=Harp(theta=0.0), max_new_tokens=5)[0]
    assert step.forward_tokens == len(prompt) + 4 + sum(len(prompt) + i for i in range(5))
    sequence = engine.generate([prompt], method=Harp(theta=0.0, mask="sequence"), max_new_tokens=5)[0]
    assert sequence.forward_tokens == 2 * (len(prompt) + 4)


def test_a_finished_slot_is_refilled_at_once() -> None:
    engine = Engine(tiny_model("llama"), slots=2)
    for i, new in enumerate([1, 8, 8]):
        engine.submit(i, generate_request(i, [5, 6, 7 + i], new), Greedy(), 0)
    while not engine.step():
        assert engine.waiting == 1
    engine.step()
    assert engine.waiting == 0
    assert len(engine.batcher.live) == 2


def test_what_has_finished_survives_a_forward_that_breaks() -> None:
    engine = Engine(tiny_model("llama"), slots=1)
    engine.submit("good", generate_request(0, [5, 6], 3), Greedy(), 0)
    engine.submit("too long", generate_request(1, [5] * 300, 3), Greedy(), 0)
    forward = engine.runner.forward
    engine.runner.forward = lambda chunks: 1 / 0  # type: ignore[method-assign,assignment]
    engine._ready.append(("earlier", RequestError("kept")))
    engine.runner.device = torch.device(
        "cuda"
    )  # where the next forward is launched before outcomes are handed over
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.runner.forward, engine.runner.device = forward, torch.device("cpu")  # type: ignore[method-assign]
    assert set(run(engine)) == {"good", "too long", "earlier"}


def test_prompts_that_are_no_token_ids_leave_nothing_behind() -> None:
    engine = Engine(tiny_model("llama"))
    with pytest.raises(TypeError):
        engine.generate([[5], None], method=Greedy(), max_new_tokens=1)  # type: ignore[list-item]
    assert not engine.busy
    assert len(engine.generate([[5]], method=Greedy(), max_new_tokens=1)) == 1


def test_busy_seconds_are_shared_out_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    account = Engine._account

    def note(self: Engine, work: Any, seconds: float) -> None:
        steps.append(seconds)
        account(self, work, seconds)

    monkeypatch.setattr(Engine, "_account", note)
    engine = Engine(tiny_model("llama"), slots=3)
    completions = engine.generate(prompts(), method=Harp(theta=1.0), max_new_tokens=8)
    assert sum(c.seconds for c in completions) == pytest.approx(sum(steps))
    assert engine.steps == len(steps)


def test_pools_that_grow_under_live_sequences_keep_every_one_of_them() -> None:
    """A long request arrives when retired slots were refilled with sequences that are not prefilled yet."""
    rng = random.Random(4)
    sizes = [(100, 1), *[(100, 20)] * 15, (150, 20), (60, 3), (200, 9)]
    requests = [
        generate_request(i, [rng.randrange(3, VOCAB) for _ in range(n)], new)
        for i, (n, new) in enumerate(sizes)
    ]

    def answers(slots: int) -> list[Any]:
        engine = Engine(tiny_model("llama"), slots=slots)
        engine._stop_ids = frozenset()
        for i, request in enumerate(requests):
            engine.submit(i, request, Harp(theta=median_entropy("llama"), mask="sequence"), 0)
        outcomes = run(engine)
        return [outcomes[i].trace for i in range(len(requests))]

    assert answers(16) == answers(1)


def test_a_prompt_that_is_too_long_fails_alone() -> None:
    engine = Engine(tiny_model("llama"), slots=2)
    engine.submit("long", generate_request(0, [5] * 256, 4), Greedy(), 0)
    engine.submit("empty", generate_request(1, [], 4), Greedy(), 0)
    engine.submit("full", generate_request(2, [5] * 255, 4), Greedy(), 0)
    engine.submit("good", generate_request(3, [5] * 9, 4), Greedy(), 0)
    outcomes = run(engine)
    assert outcomes["long"] == RequestError("the prompt needs 257 positions and the model's context has 256")
    assert outcomes["empty"] == RequestError("the prompt or the continuation is empty")
    assert outcomes["full"].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert len(outcomes["full"].token_ids) == 1
    assert isinstance(outcomes["good"], Completion)


def test_a_too_long_choice_fails_its_whole_request_and_nothing_else() -> None:
    engine = Engine(tiny_model("llama"), slots=2)
    good = Choice((5, 6), "x", (7,))
    bad = Choice((5,) * 256, "x", (7, 8))
    engine.submit("bad", score_request(0, (good, bad)), Greedy(), 0)
    engine.submit("good", score_request(1, (good, good, good)), Greedy(), 0)
    outcomes = run(engine)
    assert isinstance(outcomes["bad"], RequestError)
    assert [type(s) for s in outcomes["good"]] == [Score, Score, Score]


def score_request(doc: int, choices: tuple[Choice, ...]) -> Request:
    return Request("tiny", doc, 0, RequestKind.LOGLIKELIHOOD, "", (), choices=choices)


@pytest.mark.parametrize("mask", ["step", "sequence"])
def test_logits_that_are_not_finite_fail_their_sample_alone(mask: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[90] = math.nan
    engine = Engine(model, slots=2)
    method = Harp(theta=0.0, mask=mask)
    engine.submit("bad", generate_request(0, [5, 90] + [6] * 30, 4), method, 0)
    engine.submit("worse", score_request(1, (Choice((5,), "", (6,)), Choice((90,), "", (6,)))), method, 0)
    good = {
        f"good {i}": generate_request(i, [5, 7 + i, 6], 40) for i in range(2, 6)
    }  # into the bad one's slot
    for ticket, request in good.items():
        engine.submit(ticket, request, method, 0)
    outcomes = run(engine)
    assert outcomes["bad"] == outcomes["worse"] == RequestError("the model's logits are not finite")
    assert all(isinstance(outcomes[ticket], Completion) for ticket in good)


def test_reframed_logits_that_are_not_finite_fail_their_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harp_batch.decode.harp.reframe", lambda embeddings, keep: embeddings * math.nan)
    engine = Engine(tiny_model("llama"))
    engine.submit("text", generate_request(0, [5, 6], 3), Harp(theta=0.0), 0)
    engine.submit("choice", score_request(1, (Choice((5,), "", (6,)),)), Harp(theta=0.0, mask="sequence"), 0)
    engine.submit("greedy", generate_request(2, [5, 6], 3), Greedy(), 0)
    outcomes = run(engine)
    assert outcomes["text"] == outcomes["choice"] == RequestError("the model's logits are not finite")
    assert isinstance(outcomes["greedy"], Completion)


def test_what_the_model_cannot_read_fails_alone() -> None:
    engine = Engine(tiny_model("llama"))
    engine.submit("token", generate_request(0, [5, VOCAB], 3), Greedy(), 0)
    engine.submit("choice", score_request(1, (Choice((5,), "", (-1,)),)), Greedy(), 0)
    engine.submit("nothing", generate_request(2, [5, 6], 0), Greedy(), 0)
    engine.submit("good", generate_request(3, [5, 6], 3), Greedy(), 0)
    outcomes = run(engine)
    assert outcomes["token"] == RequestError(
        "token 97 is not one of the model's 97: is the tokenizer its own?"
    )
    assert "token -1" in outcomes["choice"].message
    assert outcomes["nothing"] == RequestError("max_new_tokens must be 1 or more, not 0")
    assert isinstance(outcomes["good"], Completion)


def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    engine = Engine(tiny_model("llama"))
    with pytest.raises(UserError, match="1 request_keys for 2 requests"):
        engine.generate([[5, 6], [6, 7]], method=Greedy(), max_new_tokens=9, request_keys=["a"])
    assert len(engine.generate([[9, 9]], method=Greedy(), max_new_tokens=3)[0].token_ids) == 3
    engine.submit("x", generate_request(0, [5, 6], 3), Greedy(), 0)
    with pytest.raises(UserError, match="ticket 'x'"):
        engine.submit("x", generate_request(0, [5, 6], 3), Greedy(), 0)
    with pytest.raises(UserError, match="still has requests"):
        engine.generate([[5]], method=Greedy(), max_new_tokens=1)
    assert set(run(engine)) == {"x"}
    engine.submit("x", generate_request(0, [5, 6], 3), Greedy(), 0)
    assert set(run(engine)) == {"x"}


def test_a_small_kv_budget_takes_turns_and_loses_nothing() -> None:
    plenty = Engine(tiny_model("llama"), slots=8)
    tight = Engine(tiny_model("llama"), slots=8)
    tight.batcher.limits = type(tight.batcher.limits)(slots=8, positions=300, step_rows=64)
    long = prompts(12, longest=150, seed=3)
    a, b = (e.generate(long, method=Harp(theta=4.0), max_new_tokens=5) for e in (plenty, tight))
    assert [c.token_ids for c in a] == [c.token_ids for c in b]
    assert tight.runner.backend.original.slots * tight.runner.backend.original.length <= 300


def test_the_api_refuses_what_it_cannot_answer() -> None:
    engine = Engine(tiny_model("llama"))
    with pytest.raises(UserError, match="request 1: the prompt needs 301 positions"):
        engine.generate([[5], [5] * 300], method=Greedy(), max_new_tokens=2)
    assert not engine.busy
    with pytest.raises(UserError, match="slots"):
        Engine(tiny_model("llama"), slots=0)
    with pytest.raises(UserError, match="tokenizer"):
        engine.submit(
            0, Request("t", 0, 0, RequestKind.GENERATE, "", (5,), stop=("x",), max_new_tokens=1), Greedy(), 0
        )


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_supported_architectures_are_known_before_their_weights_are_read(name: str) -> None:
    require_supported(on_meta(CONFIGS[name]))


def test_an_architecture_without_attention_interface_is_refused_by_name() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        require_supported(on_meta(config))


def test_an_attention_pattern_that_lives_in_a_mask_is_refused_by_name() -> None:
    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=8,
    )
    with pytest.raises(ModelError, match=r"Llama4ForCausalLM .*chunked_attention"):
        require_supported(on_meta(config))


def test_the_model_is_given_back_as_it_was() -> None:
    model = tiny_model("llama").train()
    tokens = torch.tensor([[5, 6, 7]])
    before, names = model(tokens).logits, set(model.state_dict())
    first, second = Engine(model), Engine(model)
    first.close()
    second.close()
    assert torch.equal(model(tokens).logits, before)
    assert set(model.state_dict()) == names
    assert model.training


def test_an_engine_whose_model_was_given_back_says_so() -> None:
    model = tiny_model("llama")
    closed, other = Engine(model), Engine(model)
    closed.close()
    for engine in (closed, other):
        with pytest.raises(UserError, match="given back"):
            engine.generate([[5, 6]], method=Greedy(), max_new_tokens=1)
    assert len(Engine(model).generate([[5, 6]], method=Greedy(), max_new_tokens=1)) == 1


def test_a_refused_model_is_left_as_it_was() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    names = set(model.state_dict())
    with pytest.raises(ModelError):
        Engine(model)
    assert set(model.state_dict()) == names
