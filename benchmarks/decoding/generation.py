"""Generation: the engine's methods beside the authors' loop and transformers' generation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from benchmarks.decoding import loops
from benchmarks.decoding.options import Options, Sizes
from benchmarks.decoding.report import Part, Ratio, best, quotient, value_of
from benchmarks.decoding.subjects import SEED, Prompts, Subject
from benchmarks.decoding.turns import Contender, Figure, Made, take_turns
from harp_batch.decode import Engine, Greedy, Harp, Method
from harp_batch.records import Completion

PLAIN_HARP = "plain uncached loop, HARP step"
GENERATE = "transformers generate"
CONTINUOUS = "transformers generate_batch"
GREEDY = "harp-batch, greedy"
SEQUENCE = "harp-batch, HARP sequence"
STEP = "harp-batch, HARP step"
_RATE = 0.2  # of hesitation, which θ is set to for a model with random weights
_SETTLING = 3  # rounds of setting it: what is generated depends on it
_NOTE = (
    "Stop tokens are ignored, so that everybody generates as many tokens. The plain loops get the prompts of median "
    "length and as many new tokens as the others, because their cost grows with the prefix."
)


def measure(subject: Subject, options: Options) -> Part:
    """Everybody's tokens a second."""
    sizes = options.sizes
    engine = Engine(subject.load(), slots=sizes.slots)
    theta = _theta(engine, subject.prompts, sizes) if options.random else Harp().theta
    contenders = [
        *_rivals(subject, sizes, theta),
        *_engine_contenders(engine, subject.prompts, sizes, theta),
    ]
    figures = tuple(take_turns(contenders))
    workload = {
        "model": subject.name,
        "dtype": options.dtype,
        "prompts": f"{len(subject.prompts)} of {subject.source}",
        "mean prompt tokens": round(statistics.mean(map(len, subject.prompts)), 1),
        "new tokens": sizes.new_tokens,
        "slots": sizes.slots,
        "θ": f"{theta:.4g}",
    }
    return Part(
        "Generation", workload, figures, tuple(_ratios(figures, random=bool(options.random))), (_NOTE,)
    )


def _rivals(subject: Subject, sizes: Sizes, theta: float) -> list[Contender]:
    model = subject.load()
    work = f"{len(subject.prompts)} prompts"
    batches = sorted({min(size, len(subject.prompts)) for size in sizes.batches})
    return [
        *_plain_loops(model, subject.prompts, sizes, theta),
        *(
            Contender(
                f"{GENERATE}, batch {size}",
                lambda size=size: loops.generate(model, subject.prompts, size, sizes.new_tokens),  # type: ignore[misc]
                sizes.rounds,
                work,
            )
            for size in batches
        ),
        Contender(
            CONTINUOUS,
            lambda: loops.generate_batch(model, subject.prompts, sizes.new_tokens),
            sizes.rounds,
            work,
        ),
    ]


def _plain_loops(model: object, prompts: Prompts, sizes: Sizes, theta: float) -> list[Contender]:
    chosen = median_prompts(prompts, sizes.slow_prompts)

    def run(harp: Harp | None) -> Made:
        done = [loops.plain(model, prompts[i], _key(i), sizes.new_tokens, harp) for i in chosen]
        return Made(sum(len(tokens) for tokens, _ in done), sum(n for _, n in done) if harp else None)

    work = f"{len(chosen)} of the prompts, of median length, one at a time"
    return [
        Contender("plain uncached loop, greedy", lambda: run(None), sizes.slow_rounds, work),
        Contender(PLAIN_HARP, lambda: run(Harp(theta=theta)), sizes.slow_rounds, work),
    ]


def median_prompts(prompts: Prompts, count: int) -> list[int]:
    """Places of the ``count`` prompts whose lengths are in the middle."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    start = max(0, (len(prompts) - count) // 2)
    return by_length[start : start + count]


def _engine_contenders(engine: Engine, prompts: Prompts, sizes: Sizes, theta: float) -> list[Contender]:
    def contender(name: str, method: Method, rounds: int) -> Contender:
        return Contender(
            name, lambda: _engine(engine, prompts, sizes, method), rounds, f"{len(prompts)} prompts"
        )

    return [
        contender(GREEDY, Greedy(), sizes.rounds),
        contender(SEQUENCE, Harp(theta=theta, mask="sequence"), sizes.rounds),
        contender(STEP, Harp(theta=theta, mask="step"), sizes.slow_rounds),
    ]


def _engine(engine: Engine, prompts: Prompts, sizes: Sizes, method: Method) -> Made:
    completions = _completions(engine, prompts, sizes, method)
    hesitations = sum(sum(c.trace.hesitated) for c in completions)
    return Made(sum(len(c.token_ids) for c in completions), hesitations if isinstance(method, Harp) else None)


def _completions(engine: Engine, prompts: Prompts, sizes: Sizes, method: Method) -> list[Completion]:
    return engine.generate(
        prompts,
        method=method,
        max_new_tokens=sizes.new_tokens,
        seed=SEED,
        request_keys=[_key(i) for i in range(len(prompts))],
    )


def _key(place: int) -> str:
    return f"benchmark/{place}/0"


def _theta(engine: Engine, prompts: Prompts, sizes: Sizes) -> float:
    """The θ at which HARP hesitates at a fifth of its steps, from the entropies that it meets itself."""
    method: Method = Greedy()
    theta = 0.0
    for _ in range(_SETTLING):
        completions = _completions(engine, prompts, sizes, method)
        entropies = torch.tensor([h for c in completions for h in c.trace.entropy])
        theta = float(entropies.quantile(1 - _RATE))
        method = Harp(theta=theta, mask="sequence")
    return theta


def _ratios(figures: Sequence[Figure], *, random: bool) -> list[Ratio]:
    """The issue's comparisons; the shapes with random weights have goals of their own."""
    generate = best([f for f in figures if f.name.startswith(GENERATE + ",")])
    anything = best([f for f in figures if f.name.startswith(GENERATE)])
    plain = value_of(figures, PLAIN_HARP)
    greedy, sequence, step = (value_of(figures, name) for name in (GREEDY, SEQUENCE, STEP))
    return [
        Ratio(
            "greedy here / best of `generate` and `generate_batch`",
            quotient(greedy, anything),
            None if random else 2.0,
        ),
        Ratio(
            "greedy here / `generate` at its best batch", quotient(greedy, generate), 3.0 if random else None
        ),
        Ratio(
            "HARP `mask: sequence` here / plain uncached HARP loop",
            quotient(sequence, plain),
            None if random else 40.0,
        ),
        Ratio(
            "HARP `mask: step` here / plain uncached HARP loop",
            quotient(step, plain),
            None if random else 3.5,
        ),
        Ratio(
            "seconds per token, HARP `mask: sequence` / greedy here",
            quotient(greedy, sequence),
            1.35 if random else 2.0,
            at_most=True,
        ),
        Ratio("seconds per token, HARP `mask: step` / greedy here", quotient(greedy, step)),
    ]
