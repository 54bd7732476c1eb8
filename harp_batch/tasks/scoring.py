"""Answers -> lm-eval's metrics, per document and over all of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, stderr_for_metric
from lm_eval.api.task import ConfigurableTask

from harp_batch.records import Answer, Request, RequestKind
from harp_batch.tasks.plain import plain
from harp_batch.tasks.quiet import quiet_lm_eval

Scores = dict[str, Any]
_PREFERRED = ("acc", "exact_match")
_LENIENT = "flexible-extract"  # lm-eval's name for a filter that finds the answer however it is written
_BOOTSTRAP_ITERS = 1000  # for the metrics without a formula, such as perplexity; lm-eval seeds it with 0
_UNDEFINED = (ValueError, ZeroDivisionError, OverflowError, IndexError)


def score(task: ConfigurableTask, request: Request, answer: Answer) -> tuple[Scores, bool | None]:
    """Return the document's values by "metric,filter", and whether the answer is correct.

    `correct` is the value of acc, else of exact_match, else of the first metric that gives a whole 0 or 1;
    None where the task has no such metric. It says whether the answer is right rather than whether it is written
    as the examples are: of several filters flexible-extract decides where there is one, else the first.

    An answer with an error counts as wrong: to leave it out would flatter the method that failed.
    A generation is scored as empty text. Log-likelihoods give 0 for every mean where higher is better, and
    nothing for the rest, since no perplexity can be made up.
    """
    if answer.error is not None and request.kind is RequestKind.LOGLIKELIHOOD:
        scores = dict.fromkeys(_wrong_keys(task), 0.0)
    else:
        scores = _processed(task, request, answer)
    return scores, _correct(scores, _deciding_filter([ensemble.name for ensemble in task._filters]))


def _processed(task: ConfigurableTask, request: Request, answer: Answer) -> Scores:
    instances = _instances(request, answer)
    scores = {}
    for ensemble in task._filters:
        ensemble.apply(instances)
        filtered = [instance.filtered_resps[ensemble.name] for instance in instances]
        for metric, value in task.process_results(request.doc, filtered).items():
            scores[f"{metric},{ensemble.name}"] = plain(value)
    return scores


def _instances(request: Request, answer: Answer) -> list[Instance]:
    """Return what lm-eval's evaluator holds for one document after the model has answered."""
    replies: Sequence[Any] = [answer.text or ""]
    kind = "generate_until"
    if request.kind is RequestKind.LOGLIKELIHOOD:
        replies, kind = [tuple(choice) for choice in answer.choices], "loglikelihood"
    return [
        Instance(kind, request.doc, (request.prompt,), index, (request.task, request.doc_id, 1), [reply])
        for index, reply in enumerate(replies)
    ]


def _wrong_keys(task: ConfigurableTask) -> list[str]:
    better = task.higher_is_better()
    metrics = [metric for metric, agg in task.aggregation().items() if agg is mean and better.get(metric)]
    return [f"{metric},{ensemble.name}" for ensemble in task._filters for metric in metrics]


def _deciding_filter(names: Sequence[str]) -> str:
    return _LENIENT if _LENIENT in names else names[0]


def _correct(scores: Scores, filter_name: str) -> bool | None:
    values = {
        key.rpartition(",")[0]: value for key, value in scores.items() if key.endswith(f",{filter_name}")
    }
    for metric in _PREFERRED:
        if metric in values and values[metric] in (0, 1):
            return bool(values[metric])
    whole = [value for value in values.values() if isinstance(value, int) and value in (0, 1)]
    return bool(whole[0]) if whole else None


def aggregate(
    task: ConfigurableTask, scores: Sequence[Scores]
) -> dict[str, tuple[float | None, float | None]]:
    """Return (value, standard error) by "metric,filter" over the documents' scores, as lm-eval computes them.

    None means undefined: a standard error of fewer than two documents or of a metric for which lm-eval has
    none, and both where a document's own value is undefined. A bootstrap has 1,000 resamples, seeded.
    """
    keys = dict.fromkeys(key for document in scores for key in document)
    return {key: _aggregated(task, key, [each[key] for each in scores if key in each]) for key in keys}


def _aggregated(task: ConfigurableTask, key: str, items: list[Any]) -> tuple[float | None, float | None]:
    metric = key.rpartition(",")[0]
    function = task.aggregation().get(metric, mean)
    if any(item is None for item in items):
        return None, None
    value = _defined(function, items)
    stderr = stderr_for_metric(function, bootstrap_iters=_BOOTSTRAP_ITERS) if len(items) > 1 else None
    with _single_process(), quiet_lm_eval():
        return value, _defined(stderr, items) if stderr else None


def _defined(function: Callable[[list[Any]], Any], items: list[Any]) -> float | None:
    try:
        value = float(function(items))
    except _UNDEFINED:
        return None
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _single_process() -> Iterator[None]:
    """lm-eval's bootstrap forks a pool of processes, which a program with threads must not do."""
    before: Mapping[str, str] = {key: os.environ[key] for key in ["DISABLE_MULTIPROC"] if key in os.environ}
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        os.environ.update(before)
