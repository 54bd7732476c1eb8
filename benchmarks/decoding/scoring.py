"""Log-likelihood: the engine beside lm-eval's own `hf` model, on the requests that `submit` would build."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.decoding.drive import answer_all
from benchmarks.decoding.options import Options
from benchmarks.decoding.report import Part, Ratio, best, quotient, value_of
from benchmarks.decoding.subjects import without_stops
from benchmarks.decoding.turns import Contender, Figure, Made, take_turns
from harp_batch.decode import Engine, Greedy, Harp, Method
from harp_batch.models import load_model, load_tokenizer, resolve
from harp_batch.records import Request
from harp_batch.tasks import load_task

# name, whether jobs/ has a chat template for it, few-shot examples there
_TASKS: tuple[tuple[str, bool, int], ...] = (("lambada_openai", False, 0), ("commonsense_qa", True, 0))
_SHIPPED: tuple[tuple[str, bool, int], ...] = (("demo_choice", True, 0),)
_UNIT = "requests/s"
_GOAL = 1.5


@dataclass(frozen=True, slots=True)
class _Questions:
    """One task's requests, as this project and as lm-eval have them."""

    task: str
    requests: tuple[Request, ...]
    instances: list[Any]  # one for each choice

    @property
    def work(self) -> str:
        return f"{len(self.requests)} documents, {len(self.instances)} choices"


def measure(options: Options) -> list[Part]:
    """Documents a second, task by task."""
    local = resolve(options.model)
    tokenizer = load_tokenizer(local)

    def load() -> Any:
        return without_stops(load_model(local, dtype=options.dtype, device=options.device))

    engine = Engine(load(), slots=options.sizes.slots)
    rival = load()
    wanted = _TASKS if options.data_dir else _SHIPPED
    return [
        _measure_task(_build(name, chat, shots, tokenizer, options), engine, rival, tokenizer, options)
        for name, chat, shots in wanted
    ]


def _build(name: str, chat: bool, shots: int, tokenizer: Any, options: Options) -> _Questions:
    task = load_task(name, num_fewshot=shots, data_dir=options.data_dir)
    requests = task.build_requests(tokenizer, chat_template=chat, limit=options.sizes.documents)
    return _Questions(name, requests, list(task.task.instances))


def _measure_task(
    questions: _Questions, engine: Engine, rival: Any, tokenizer: Any, options: Options
) -> Part:
    rivals = {
        f"lm_eval --model hf, batch {size}": _lm_eval(rival, tokenizer, size)
        for size in options.sizes.score_batches
    }
    contenders = [
        *(_rival(name, model, questions, options) for name, model in rivals.items()),
        *(
            _ours(f"harp-batch, {name}", engine, method, questions, options)
            for name, method in (("greedy", Greedy()), ("HARP sequence", Harp(mask="sequence")))
        ),
    ]
    figures = tuple(take_turns(contenders))
    workload = {
        "model": options.model,
        "dtype": options.dtype,
        "documents": len(questions.requests),
        "slots": options.sizes.slots,
    }
    difference = _largest_difference(questions, engine, next(iter(rivals.values())))
    note = f"Largest difference of a log-probability between the engine and lm-eval: {difference:.1e} nats."
    return Part(
        f"Log-likelihood, {questions.task}",
        workload,
        figures,
        tuple(_ratios(figures, questions.task)),
        (note,),
    )


def _lm_eval(model: Any, tokenizer: Any, size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)


def _rival(name: str, model: Any, questions: _Questions, options: Options) -> Contender:
    encoded = [(i.args, *model._encode_pair(*i.args)) for i in questions.instances]  # we get token ids, too

    def run() -> Made:
        model._loglikelihood_tokens(encoded, disable_tqdm=True)
        return Made(len(questions.requests))

    return Contender(name, run, options.sizes.rounds, questions.work, _UNIT)


def _ours(name: str, engine: Engine, method: Method, questions: _Questions, options: Options) -> Contender:
    def run() -> Made:
        answer_all(engine, questions.requests, method)
        return Made(len(questions.requests))

    return Contender(name, run, options.sizes.rounds, questions.work, _UNIT)


def _largest_difference(questions: _Questions, engine: Engine, rival: Any) -> float:
    """How far the two are apart at most, in nats: the same work must have been done."""
    found, _ = answer_all(engine, questions.requests, Greedy())
    ours: dict[tuple[int, int], float] = {
        (request.doc_id, index): score.logprob
        for place, request in enumerate(questions.requests)
        for index, score in enumerate(found[place])
    }
    theirs: list[tuple[float, bool]] = rival.loglikelihood(questions.instances, disable_tqdm=True)
    return max(
        abs(ours[instance.doc_id, instance.idx] - logprob)
        for instance, (logprob, _) in zip(questions.instances, theirs, strict=True)
    )


def _ratios(figures: Sequence[Figure], task: str) -> list[Ratio]:
    rival = best([f for f in figures if f.name.startswith("lm_eval")])
    greedy, harp = (value_of(figures, f"harp-batch, {name}") for name in ("greedy", "HARP sequence"))
    return [
        Ratio(
            f"log-likelihood, {task}: greedy here / `lm_eval --model hf` at its best batch",
            quotient(greedy, rival),
            _GOAL,
        ),
        Ratio(
            f"log-likelihood, {task}: seconds, HARP `mask: sequence` / greedy here", quotient(greedy, harp)
        ),
    ]
