"""Everything a run needs, gathered and checked before anything is written or started."""

from __future__ import annotations

import importlib.metadata
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harp_batch import __version__
from harp_batch.decode import method_from_settings, require_supported
from harp_batch.errors import ModelError
from harp_batch.job import JobSpec, ModelSpec, TaskSpec, parse_job
from harp_batch.models import LocalModel, load_skeleton, load_tokenizer, resolve
from harp_batch.records import Evaluation, Request, RunStatus
from harp_batch.store import ModelRecord, RunRecord, TaskRecord
from harp_batch.tasks import LoadedTask, load_task

Say = Callable[[str], None]
PACKAGES = ("torch", "transformers", "lm-eval", "ray")


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can be started: its record, and what the record's names stand for on this machine."""

    spec: JobSpec
    run: RunRecord
    models: dict[str, LocalModel]  # by reference
    tasks: dict[tuple[str, str], LoadedTask]  # by (model reference, task name)

    def requests(self, evaluation: Evaluation) -> tuple[Request, ...]:
        """All requests of ``evaluation``, in document order."""
        return next(
            t.requests for t in self.run.tasks if (t.model, t.task) == (evaluation.model, evaluation.task)
        )

    def task(self, evaluation: Evaluation) -> LoadedTask:
        """The task that scores ``evaluation``."""
        return self.tasks[evaluation.model, evaluation.task]


def plan_run(spec: JobSpec, data_dir: Path | None, say: Say, run_id: str | None = None) -> Plan:
    """Resolve every model, load every task, build every request of ``spec``.

    Raises the UserError of whatever is wrong; writes nothing but the model cache.
    """
    for place, method in enumerate(spec.methods):
        with spec.blaming("methods", place):
            method_from_settings(method.settings)
    models = _resolve_all(spec, say, {})
    tasks, records = {}, []
    for model in spec.models:
        for place, wish in enumerate(spec.tasks):
            say(f"building the requests of {wish.task}")
            with spec.blaming("tasks", place):
                task = load_task(wish.task, num_fewshot=wish.num_fewshot, data_dir=data_dir)
                records.append(_task_record(spec, model, wish, task, models[model.ref]))
            tasks[model.ref, wish.task] = task
    record = _run_record(run_id or new_run_id(), spec, models, records)
    return Plan(spec, record, models, tasks)


def replan(run: RunRecord, data_dir: Path | None, say: Say) -> Plan:
    """The plan of a run that the store holds: requests are taken as they are, only scoring is loaded anew.

    Raises ModelError where a model is no longer the one that the run began with.
    """
    spec = parse_job(run.job_yaml, f"run {run.id}")
    models = _resolve_all(spec, say, {record.ref: record.revision for record in run.models})
    for record in run.models:
        _check_unchanged(record, models[record.ref])
    say("loading the tasks")
    tasks = {
        (asked.model, asked.task): load_task(asked.task, num_fewshot=asked.num_fewshot, data_dir=data_dir)
        for asked in run.tasks
    }
    return Plan(spec, run, models, tasks)


def _resolve_all(spec: JobSpec, say: Say, commits: Mapping[str, str | None]) -> dict[str, LocalModel]:
    """Every model of the job, checked; ``commits`` are revisions that replace the job's."""
    models = {}
    for place, model in enumerate(spec.models):
        say(f"getting the model {model.ref}")
        with spec.blaming("models", place):
            models[model.ref] = resolve(model.ref, commits.get(model.ref, model.revision))
            require_supported(load_skeleton(models[model.ref]))
    return models


def _check_unchanged(record: ModelRecord, local: LocalModel) -> None:
    if local.weights_sha256 != record.weights_sha256:
        raise ModelError(
            f"the weights of {record.ref} are not those that the run began with "
            f"({local.weights_sha256[:12]} instead of {record.weights_sha256[:12]}); submit a new run"
        )


def _task_record(
    spec: JobSpec, model: ModelSpec, wish: TaskSpec, task: LoadedTask, local: LocalModel
) -> TaskRecord:
    requests = task.build_requests(
        load_tokenizer(local),
        chat_template=model.chat_template,
        limit=wish.limit,
        max_new_tokens=spec.generation.max_new_tokens,
    )
    return TaskRecord(
        model=model.ref,
        task=wish.task,
        version=task.version,
        num_fewshot=task.num_fewshot,
        info=task.config,
        requests=requests,
    )


def new_run_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex


def _run_record(
    run_id: str, spec: JobSpec, models: dict[str, LocalModel], tasks: Sequence[TaskRecord]
) -> RunRecord:
    return RunRecord(
        id=run_id,
        name=spec.name,
        status=RunStatus.RUNNING,
        created_at=datetime.now(UTC),
        job_yaml=spec.to_yaml(),
        seed=spec.seed,
        versions=_versions(),
        models=tuple(_model_record(model, models[model.ref]) for model in spec.models),
        tasks=tuple(tasks),
        evaluations=tuple(_evaluations(spec, run_id, tasks)),
        error=None,
    )


def _model_record(model: ModelSpec, local: LocalModel) -> ModelRecord:
    return ModelRecord(
        ref=model.ref,
        revision=local.revision,
        dtype=model.dtype,
        chat_template=model.chat_template,
        weights_sha256=local.weights_sha256,
        parameters=local.parameters,
    )


def _evaluations(spec: JobSpec, run_id: str, tasks: Sequence[TaskRecord]) -> Iterator[Evaluation]:
    pairs = [(task, method) for task in tasks for method in spec.methods]
    for number, (task, method) in enumerate(pairs):
        yield Evaluation(
            id=f"{run_id}-{number}",
            run_id=run_id,
            model=task.model,
            task=task.task,
            method=method.name,
            settings=method.settings,
            is_baseline=method.name == spec.baseline,
            requests=len(task.requests),
        )


def _versions() -> dict[str, str]:
    return {
        "harp-batch": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
    }
