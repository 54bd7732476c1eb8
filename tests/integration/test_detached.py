"""`--detach`: the driver is a job of a real Ray cluster; other processes follow, stop, resume and cancel it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from harp_batch.cli.standing import Standing
from harp_batch.cluster.jobs import Jobs
from harp_batch.errors import DatabaseError, RunNotFound
from harp_batch.records import RunStatus
from harp_batch.store import RunSummary, open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        find_spec("opencensus") is None, reason="the dashboard needs pip install 'harp-batch[cluster]'"
    ),
]

JOB = """
name: away
models: [{ref: model, chat_template: false}]
tasks: [{task: demo_choice, limit: 6}]
methods: [greedy, harp]
"""
METHODS = ", ".join(f"harp: {{name: h{n}, theta: 0.{n}}}" for n in range(30))
# Enough to be busy for longer than a driver takes to be noticed, stopped and resumed.
LONG = f"""
name: long
models: [{{ref: model, chat_template: false}}]
tasks: [demo_arithmetic]
methods: [{METHODS}]
generation: {{max_new_tokens: 90}}
cluster: {{slots: 1, shard_size: 2}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with a dashboard, as `ray start --head` makes it; ports that no other cluster has."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    head = {
        "num_cpus": 2,
        "include_dashboard": True,
        "dashboard_port": port,
        "dashboard_agent_listen_port": 0,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def dashboard(cluster: Cluster) -> str:
    return f"http://{cluster.webui_url}"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """Where the user works: the job files and the model, which they name by a relative path."""
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    (tmp_path / "long.yaml").write_text(LONG, encoding="utf-8")
    return tmp_path


def harp_batch(*arguments: str, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("harp-batch")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HARP_BATCH")} | env
    done = subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == code, done.stderr
    return done


def run_of(folder: Path) -> RunSummary | None:
    """The newest run, once there is one."""
    try:
        with open_store(f"sqlite:///{folder / 'harp-batch.db'}", create=False, read_only=True) as store:
            return store.find_run("latest")
    except (DatabaseError, RunNotFound):
        return None


def wait_for(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def more_answers_than(count: int, folder: Path) -> Callable[[], bool]:
    def there() -> bool:
        run = run_of(folder)
        return run is not None and run.answered > count and run.status is RunStatus.RUNNING

    return there


def driven(folder: Path) -> bool:
    """Whether somebody is heard to drive the newest run."""
    with open_store(f"sqlite:///{folder / 'harp-batch.db'}", create=False, read_only=True) as store:
        run = store.find_run("latest")
        standing = Standing.of(run, store.attempts(run.id))
    return run.status is RunStatus.RUNNING and not standing.in_doubt


def test_a_detached_run_goes_its_way(dashboard: str, folder: Path) -> None:
    """The address that is typed counts, not the environment's, whatever Ray's client says."""
    begun = harp_batch(
        "submit", "job.yaml", "--detach", "--address", dashboard, cwd=folder, RAY_ADDRESS="127.0.0.1:1"
    )
    run_id = begun.stdout.strip()
    assert begun.stderr.startswith(f"run away ({run_id[:8]}) was handed")
    assert f"harp-batch logs {run_id[:8]} --follow --address {dashboard}" in begun.stderr

    followed = harp_batch("logs", run_id, "--follow", "--address", dashboard, cwd=folder)
    log = followed.stdout
    assert followed.stderr == ""
    assert "is done, 12 of 12 answers" in log
    assert "demo_choice" in log

    (record,) = json.loads(harp_batch("status", run_id[:8], "--format", "json", cwd=folder).stdout)
    assert (record["id"], record["name"], record["status"]) == (run_id, "away", "done")
    assert (record["answered"], record["requests"]) == (12, 12)
    assert harp_batch("logs", "away", "--address", dashboard, cwd=folder).stdout == log
    assert len(harp_batch("results", "latest", "--format", "csv", cwd=folder).stdout.splitlines()) == 5


def test_a_detached_run_is_stopped_resumed_and_cancelled(cluster: Cluster, folder: Path) -> None:
    address = cluster.address
    run_id = harp_batch("submit", "long.yaml", "--detach", "--address", address, cwd=folder).stdout.strip()
    wait_for(more_answers_than(0, folder))
    shown = harp_batch("status", "latest", cwd=folder).stdout
    assert " running " in shown
    assert "demo_arithmetic" in shown

    jobs = Jobs(address)
    jobs.stop(f"harp-batch-{run_id}")
    wait_for(lambda: not driven(folder))  # Ray gives it 3 s to stop by itself
    stopped = run_of(folder)
    assert stopped is not None

    assert (
        run_id == harp_batch("resume", "latest", "--detach", "--address", address, cwd=folder).stdout.strip()
    )
    assert jobs.newest(run_id) == f"harp-batch-{run_id}-2"
    wait_for(more_answers_than(stopped.answered, folder))
    cancelled = harp_batch("cancel", run_id[:8], cwd=folder)
    assert "is cancelled" in cancelled.stderr
    wait_for(lambda: jobs.status(f"harp-batch-{run_id}-2") not in ("PENDING", "RUNNING"))
    log = harp_batch("logs", "latest", "--address", address, cwd=folder).stdout
    assert f"harp-batch resume {run_id}" in log  # the newest driver's
    assert "is cancelled" in log
    run = run_of(folder)
    assert run is not None
    assert run.status is RunStatus.CANCELLED
    assert run.requests > run.answered > stopped.answered
    harp_batch("resume", "latest", "--detach", "--address", address, cwd=folder, code=2)


def test_a_run_is_cancelled_before_its_driver_has_got_anywhere(dashboard: str, folder: Path) -> None:
    run_id = harp_batch("submit", "long.yaml", "--detach", "--address", dashboard, cwd=folder).stdout.strip()
    cancelled = harp_batch("cancel", run_id, "--address", dashboard, cwd=folder)
    assert "stopp" in cancelled.stderr or "is cancelled" in cancelled.stderr  # the driver may have been quick
    run = run_of(folder)
    assert run is None or run.status is RunStatus.CANCELLED
    jobs = Jobs(dashboard)
    wait_for(lambda: jobs.status(f"harp-batch-{run_id}") not in ("PENDING", "RUNNING"))


@pytest.mark.parametrize("form", ["dashboard", "dashboard without http", "cluster"])
def test_a_run_without_a_job_has_no_log(cluster: Cluster, dashboard: str, folder: Path, form: str) -> None:
    address = {
        "dashboard": dashboard,
        "dashboard without http": cluster.webui_url,
        "cluster": cluster.address,
    }
    refused = harp_batch("logs", "0123abcd", "--address", address[form], cwd=folder, code=2)
    assert len(refused.stderr.splitlines()) == 1
    assert "harp-batch.db does not exist" in refused.stderr
