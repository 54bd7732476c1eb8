"""The whole path on a tiny model: job file -> actors -> answers in SQL, whatever happens on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BloomConfig, BloomForCausalLM

from harp_batch import service
from harp_batch.cluster.loop import View
from harp_batch.errors import ClusterError, ModelError, RunFailed, TaskError, UserError
from harp_batch.job import JobSpec, parse_job
from harp_batch.records import Answer, RunStatus
from harp_batch.service.execute import Recorder
from harp_batch.store import RunSummary, open_store
from tests.support.tiny_files import CONTEXT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

DOCUMENTS = 10
REQUESTS = 4 * DOCUMENTS  # two tasks, two methods
JOB = """
name: tiny
models: [{{ref: {model}, chat_template: false}}]
tasks: [{{task: demo_arithmetic, limit: 10}}, {{task: demo_choice, limit: 10}}]
methods: [greedy, harp: {{theta: 1.0}}]
generation: {{max_new_tokens: 12}}
cluster: {{actors: 1, slots: 4, shard_size: 3}}
"""


@pytest.fixture
def spec(tiny_llama: Path) -> JobSpec:
    return parse_job(JOB.format(model=tiny_llama))


@dataclass(frozen=True)
class Finished:
    """An undisturbed run with one actor."""

    url: str
    run: RunSummary
    answers: list[Answer]


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    url = f"sqlite:///{tmp_path_factory.mktemp('finished') / 'r.db'}"
    run = service.submit(parse_job(JOB.format(model=tiny_llama)), db_url=url)
    assert run.status is RunStatus.DONE
    return Finished(url, run, answers(url, run))


def answers(url: str, run: RunSummary) -> list[Answer]:
    """Every answer of ``run`` with its trace, without what may differ between equal runs."""
    with open_store(url, create=False, read_only=True) as store:
        evaluations = store.load_run(run.id).evaluations
        return [
            replace(answer, evaluation_id=f"{e.task} {e.method}", seconds=0.0)
            for e in evaluations
            for answer in store.answers(e.id, traces=True)
        ]


def with_cluster(spec: JobSpec, **changes: Any) -> JobSpec:
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=changes)})


def test_every_request_has_one_answer_and_each_answer_its_trace(finished: Finished) -> None:
    keys = {(a.evaluation_id, a.doc_id, a.repeat) for a in finished.answers}
    assert len(keys) == len(finished.answers) == REQUESTS
    sound = [a for a in finished.answers if a.error is None]
    assert all(a.correct is not None and a.scores and a.trace and a.forward_tokens for a in sound)
    assert any(any(a.trace.hesitated) for a in sound if a.evaluation_id.endswith("harp"))


def test_a_prompt_longer_than_the_context_is_its_answers_error_and_wrong(finished: Finished) -> None:
    errors = [a for a in finished.answers if a.error]
    with open_store(finished.url) as store:
        lengths = {r.doc_id: len(r.prompt_ids) for r in store.load_run(finished.run.id).tasks[0].requests}
    too_long = {doc_id for doc_id, length in lengths.items() if length >= CONTEXT}
    assert {a.doc_id for a in errors} == too_long
    assert len(errors) == finished.run.errors == 2 * len(too_long) > 0  # for both methods
    assert all("context" in str(a.error) and a.correct is False for a in errors)


def test_results_compare_with_the_baseline_and_agree_with_the_answers(finished: Finished) -> None:
    rows = service.results(finished.url, "latest")
    metrics = {"demo_arithmetic": ["exact_match"], "demo_choice": ["acc", "acc_norm"]}
    assert [(r["task"], r["method"], r["metric"]) for r in rows] == [
        (task, method, metric)
        for task, names in metrics.items()
        for method in ("greedy", "harp")
        for metric in names
    ]
    assert {(r["baseline"], r["n"]) for r in rows} == {("greedy", DOCUMENTS)}
    assert [r["delta"] is not None for r in rows] == [r["method"] == "harp" for r in rows]
    counted = service.query(finished.url, "select task, method, avg(correct) from answers group by 1, 2")
    shares = {(task, method): share for task, method, share in counted.rows}
    for row in rows:
        if row["metric"] != "acc_norm":
            assert row["value"] == pytest.approx(shares[row["task"], row["method"]])


def test_what_was_used_is_recorded(finished: Finished, spec: JobSpec) -> None:
    with open_store(finished.url) as store:
        record = store.load_run(finished.run.id)
    wanted = {"harp-batch", "python", "torch", "transformers", "lm-eval", "ray", "platform", "device"}
    assert wanted == set(record.versions)
    assert parse_job(record.job_yaml) == spec
    assert len(record.models[0].weights_sha256) == 64


def test_actors_shards_slots_and_database_change_no_answer(
    spec: JobSpec, postgres_url: str, finished: Finished
) -> None:
    run = service.submit(with_cluster(spec, actors=2, shard_size=32, slots=7), db_url=postgres_url)
    assert answers(postgres_url, run) == finished.answers
    ours, theirs = (service.results(url, "latest") for url in (postgres_url, finished.url))
    same = (
        "task",
        "method",
        "metric",
        "value",
        "stderr",
        "delta",
        "p_value",
        "output_tokens",
        "relative_cost",
    )
    assert [[row[c] for c in same] for row in ours] == [[row[c] for c in same] for row in theirs]


def test_a_killed_actor_costs_no_answer(
    spec: JobSpec, sqlite_url: str, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    handed_over = 0
    take, tick = Recorder.answers, Recorder.tick

    def count(self: Recorder, new: Sequence[Answer]) -> None:
        nonlocal handed_over
        take(self, new)
        handed_over += len(new)

    def kill_once(self: Recorder, view: View) -> None:
        tick(self, view)
        if handed_over and not killed:
            killed.append(next(actor["pid"] for actor in view.actors if actor["state"] == "decoding"))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Recorder, "answers", count)
    monkeypatch.setattr(Recorder, "tick", kill_once)
    run = service.submit(with_cluster(spec, actors=2), db_url=sqlite_url)
    assert (run.status, len(killed)) == (RunStatus.DONE, 1)
    assert handed_over == REQUESTS  # nothing was handed over twice
    assert answers(sqlite_url, run) == finished.answers


def test_an_architecture_that_the_engine_cannot_run_is_refused_before_anything_starts(
    spec: JobSpec, sqlite_url: str, tmp_path: Path
) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ModelError, match=r"models\[0\]: BloomForCausalLM"):
        service.submit(changed(spec, {"models": [{"ref": str(tmp_path / "bloom")}]}), db_url=sqlite_url)
    assert not Path(sqlite_url.removeprefix("sqlite:///")).exists()


class Interrupter(service.Silent):
    """Sends a signal as soon as answers of this session are committed."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.first: list[int] = []

    def progress(self, progress: service.Progress) -> None:
        self.first = self.first or [sum(e.done for e in progress.evaluations)]
        if self.number is not None and any(e.output_tokens for e in progress.evaluations):
            os.kill(os.getpid(), self.number)
            self.number = None


def test_an_interrupted_run_is_resumed_without_recomputing(
    spec: JobSpec, sqlite_url: str, finished: Finished
) -> None:
    stopped = service.submit(spec, db_url=sqlite_url, observer=Interrupter(signal.SIGINT))
    assert stopped.status is RunStatus.INTERRUPTED
    assert 0 < stopped.answered < REQUESTS
    observer = Interrupter(None)
    run = service.resume("tiny", db_url=sqlite_url, observer=observer)
    assert (run.id, run.status) == (stopped.id, RunStatus.DONE)
    assert observer.first == [stopped.answered]
    assert answers(sqlite_url, run) == finished.answers


def test_actors_that_cannot_load_the_model_fail_the_run_in_one_sentence(
    spec: JobSpec, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = service.execute._recipe
    monkeypatch.setattr(service.execute, "_recipe", lambda *a: replace(recipe(*a), dtype="float31"))
    with pytest.raises(RunFailed, match="could not load the model") as failure:
        service.submit(spec, db_url=sqlite_url)
    assert "\n" not in str(failure.value)
    (run,) = service.status(sqlite_url)
    assert (run.status, run.error) == (RunStatus.FAILED, str(failure.value))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"cluster": {"gpus_per_actor": 1, "actors": 99}}, ClusterError),
        ({"tasks": [{"task": "demo_aritmetic"}]}, TaskError),
        ({"models": [{"ref": "./there/is/no/model"}]}, ModelError),
    ],
)
def test_bad_input_is_refused_and_leaves_no_run(
    spec: JobSpec, sqlite_url: str, change: dict[str, Any], refusal: type[UserError]
) -> None:
    bad = changed(spec, change)
    with pytest.raises(refusal) as refused:
        service.submit(bad, db_url=sqlite_url)
    assert "\n" not in str(refused.value)
    assert not Path(sqlite_url.removeprefix("sqlite:///")).exists()


def test_a_run_that_is_done_is_not_resumed(finished: Finished) -> None:
    assert service.resume("tiny", db_url=finished.url) == finished.run


def changed(spec: JobSpec, change: dict[str, Any]) -> JobSpec:
    return parse_job(yaml.safe_dump(yaml.safe_load(spec.to_yaml()) | change))
