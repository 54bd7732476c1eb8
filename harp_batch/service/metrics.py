"""From the answers in the store to the run's metrics."""

from __future__ import annotations

from harp_batch.analysis.summary import Scored, summarise
from harp_batch.records import Evaluation
from harp_batch.service.plan import Plan
from harp_batch.store import Store


def save_metrics(plan: Plan, store: Store) -> None:
    """Compute every metric of every evaluation, compare it with the baseline's and store it."""
    scored = [_scored(plan, store, evaluation) for evaluation in plan.run.evaluations]
    baselines = {_setting(s.evaluation): s for s in scored if s.evaluation.is_baseline}
    rows = []
    for own in scored:
        baseline = baselines.get(_setting(own.evaluation))
        rows += summarise(own, None if own is baseline else baseline, seed=plan.run.seed)
    store.save_metrics(plan.run.id, rows)


def _scored(plan: Plan, store: Store, evaluation: Evaluation) -> Scored:
    scores = {(answer.doc_id, answer.repeat): answer.scores for answer in store.answers(evaluation.id)}
    return Scored(evaluation, scores, plan.task(evaluation).aggregate(list(scores.values())))


def _setting(evaluation: Evaluation) -> tuple[str, str]:
    """What a method and its baseline have in common."""
    return evaluation.model, evaluation.task
