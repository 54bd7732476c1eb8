"""One driver a run, actors that hang or are killed by what they decode, cancelling, and nodes that come and go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from harp_batch import service
from harp_batch.cluster import driver
from harp_batch.cluster.dispatcher import ALONE, IN_COMPANY
from harp_batch.cluster.loop import View
from harp_batch.errors import RunBusy, UserError
from harp_batch.job import JobSpec, parse_job
from harp_batch.records import Answer, RunStatus
from harp_batch.service.execute import Recorder
from harp_batch.store import RunSummary, open_store
from tests.support.mortal import Mortal

pytestmark = pytest.mark.ray

DOCUMENTS = 24
JOB = """
name: driven
models: [{{ref: {model}, chat_template: false}}]
tasks: [{{task: demo_arithmetic, limit: 24}}]
methods: [harp: {{theta: 0.5}}]
generation: {{max_new_tokens: 40}}
cluster: {{actors: 2, slots: 2, shard_size: 3, hang_timeout: 4}}
"""


@pytest.fixture
def spec(tiny_llama: Path) -> JobSpec:
    return parse_job(JOB.format(model=tiny_llama))


@pytest.fixture
def every_view(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[View], None]]:
    """Functions to be called with every view of a run."""
    watching: list[Callable[[View], None]] = []
    tick = Recorder.tick

    def watch(self: Recorder, view: View) -> None:
        tick(self, view)
        for function in watching:
            function(view)

    monkeypatch.setattr(Recorder, "tick", watch)
    return watching


def answers(url: str, run: RunSummary) -> list[Answer]:
    with open_store(url, create=False, read_only=True) as store:
        (evaluation,) = store.load_run(run.id).evaluations
        return list(store.answers(evaluation.id))


def texts(url: str, run: RunSummary) -> dict[int, str | None]:
    return {answer.doc_id: answer.text for answer in answers(url, run)}


def given_up(url: str, run: RunSummary) -> list[Answer]:
    """Errors that are not the prompt's, which may be longer than the tiny model's context."""
    return [a for a in answers(url, run) if a.error and "context" not in a.error]


@pytest.mark.usefixtures("ray_cluster")
class TestOnOneMachine:
    def test_a_hung_actor_is_replaced(
        self, spec: JobSpec, sqlite_url: str, every_view: list[Callable[[View], None]]
    ) -> None:
        stopped: list[int] = []
        losses: list[int] = []

        def stop_one(view: View) -> None:
            busy = [a["pid"] for a in view.actors if a["state"] == "decoding" and a["steps"] > 3]
            if busy and not stopped:
                stopped.append(busy[0])
                os.kill(busy[0], signal.SIGSTOP)
            losses.append(view.losses)

        every_view.append(stop_one)
        run = service.submit(spec, db_url=sqlite_url)
        assert (run.status, run.answered, given_up(sqlite_url, run)) == (RunStatus.DONE, DOCUMENTS, [])
        assert (len(stopped), losses[-1] >= 1) == (1, True)
        with pytest.raises(ProcessLookupError):
            wait_until_gone(stopped[0])

    def test_a_request_that_kills_its_actors_is_isolated_and_the_rest_is_answered(
        self, spec: JobSpec, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver, "Worker", Mortal)
        run = service.submit(spec, db_url=sqlite_url)
        assert (run.status, run.answered) == (RunStatus.DONE, DOCUMENTS)
        (failed,) = given_up(sqlite_url, run)
        assert failed.doc_id == 3
        assert failed.correct is False
        assert f"given up after {ALONE} actors were lost with it alone" in str(failed.error)
        with open_store(sqlite_url, create=False) as store:
            (attempt,) = store.attempts(run.id)
        assert attempt.state["losses"] <= IN_COMPANY + ALONE
        assert attempt.state["notes"][-1] == f"document 3 of demo_arithmetic: {failed.error}"

    def test_there_is_one_driver_and_it_can_be_cancelled_from_elsewhere(
        self, spec: JobSpec, sqlite_url: str, every_view: list[Callable[[View], None]]
    ) -> None:
        refused: list[RunBusy] = []
        threads: list[threading.Thread] = []

        def interfere() -> None:
            with pytest.raises(RunBusy) as busy:
                service.resume("latest", db_url=sqlite_url)
            refused.append(busy.value)
            service.cancel("latest", db_url=sqlite_url)

        def begin(view: View) -> None:
            if not threads and any(a["state"] == "decoding" for a in view.actors):
                threads.append(threading.Thread(target=interfere))
                threads[0].start()
            time.sleep(2)  # so that the run lasts until it is cancelled

        every_view.append(begin)
        run = service.submit(spec, db_url=sqlite_url)
        threads[0].join()
        assert run.status is RunStatus.CANCELLED
        assert f"(process {os.getpid()})" in str(refused[0])
        with pytest.raises(UserError, match="cancelled, which is final"):
            service.resume("latest", db_url=sqlite_url)
        assert service.cancel("latest", db_url=sqlite_url) == run

    def test_an_interrupted_run_is_cancelled_without_a_driver_and_a_finished_one_is_not(
        self, spec: JobSpec, sqlite_url: str, every_view: list[Callable[[View], None]]
    ) -> None:
        every_view.append(lambda view: os.kill(os.getpid(), signal.SIGINT) if view.actors else None)
        assert service.submit(spec, db_url=sqlite_url).status is RunStatus.INTERRUPTED
        assert service.cancel("latest", db_url=sqlite_url).status is RunStatus.CANCELLED
        every_view.clear()
        service.submit(spec, db_url=sqlite_url)
        with pytest.raises(UserError, match="is done already"):
            service.cancel("latest", db_url=sqlite_url)


def wait_until_gone(pid: int) -> None:
    """Raises ProcessLookupError as soon as the process is gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        os.kill(pid, 0)
        time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that decodes nothing, as a cluster of its own; this process is not connected to it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_nodes_join_and_leave_a_run(
    cluster: Cluster,
    tiny_llama: Path,
    sqlite_url: str,
    every_view: list[Callable[[View], None]],
    tmp_path: Path,
) -> None:
    """One node begins, two join, and one of three is lost without a word."""
    ray.shutdown()  # another test's cluster
    elastic = parse_job(JOB.replace("actors: 2", "actors: auto").replace("24", "80").format(model=tiny_llama))
    nodes = [cluster.add_node(num_cpus=1)]
    most: list[int] = []
    notes: list[tuple[str, ...]] = []

    def change(view: View) -> None:
        working = [a for a in view.actors if a["state"] == "decoding"]
        most.append(len(working))
        notes.append(view.notes)
        if len(nodes) == 1 and working:
            nodes.extend([cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)])
        elif len(nodes) == 3 and len(working) == 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        time.sleep(1 if max(most) < 3 else 0)  # so that the run lasts until all have come

    every_view.append(change)
    run = service.submit(elastic, db_url=sqlite_url, address=cluster.address)
    assert (run.status, run.answered, given_up(sqlite_url, run)) == (RunStatus.DONE, 80, [])
    assert (max(most), len(nodes)) == (3, 2)
    assert len(notes[-1]) == 1  # an actor was lost, and it was the only one
    undisturbed = f"sqlite:///{tmp_path / 'undisturbed.db'}"
    every_view.clear()
    again = service.submit(elastic, db_url=undisturbed, address=cluster.address)
    assert texts(undisturbed, again) == texts(sqlite_url, run)
