"""What `--detach` hands to the cluster, and what it refuses before; with a cluster: integration/test_detached.py."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from threading import Event, Thread

import pytest
from click.testing import CliRunner, Result

from harp_batch.cli.app import app
from harp_batch.cli.detach import data_dir_arguments, job_for_a_driver, url_for_a_driver
from harp_batch.cluster.jobs import Errand, Jobs
from harp_batch.errors import ClusterError
from harp_batch.job import parse_job
from harp_batch.records import RunStatus
from harp_batch.store import Attempt, Store, open_store
from harp_batch.store.database import parse_url
from tests.support.store_records import a_run

JOB = "{name: a, models: [m], tasks: [t], methods: [greedy]}"
RUN = "c0ffee0123456789"
AWKWARD = "pa$HOME:/@%w"


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(JOB, encoding="utf-8")
    return path


def invoke(*arguments: str, url: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--db", url])


# What goes along


def test_a_sqlite_file_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = parse_url(url_for_a_driver("sqlite:///runs of $HOME.db"))
    assert url.database == str(tmp_path / "runs of $HOME.db")


def test_a_password_goes_along() -> None:
    url = parse_url("postgresql://me@db.example:5433/harp?sslmode=require").set(password=AWKWARD)
    sent = url_for_a_driver(url.render_as_string(hide_password=False))
    assert parse_url(sent) == url


@pytest.mark.parametrize("url", ["sqlite:////data/$HOME.db", "postgresql://u:pa$HOME${HOME}@h/d"])
def test_ray_finds_no_variable_to_expand_in_the_url(url: str) -> None:
    """Ray takes `$NAME` in a job's environment for a variable."""
    sent = url_for_a_driver(url)
    assert os.path.expandvars(sent) == sent


def test_a_password_shows_up_nowhere_else() -> None:
    errand = Errand(RUN, ("submit", "job.yaml"), f"postgresql://me:{AWKWARD}@h/d")
    assert AWKWARD in errand.environment["HARP_BATCH_DB"]
    assert AWKWARD not in errand.entrypoint + repr(errand)


def test_the_entrypoint_is_quoted_for_the_shell() -> None:
    errand = Errand(RUN, ("resume", RUN, *data_dir_arguments(Path("/my data/$x"))), "sqlite:////d.db")
    assert errand.entrypoint == f"exec harp-batch resume {RUN} --data-dir '/my data/$x'"


def test_a_data_folder_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_dir_arguments(Path("data")) == ["--data-dir", str(tmp_path / "data")]
    assert data_dir_arguments(None) == []


def test_the_job_goes_along_as_it_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "model").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    refs = ["local/model", "m.gguf", "ORG/NAME", "wheel:a==1/b.gguf", "/not/here.gguf"]
    spec = parse_job(JOB, overrides=[f"models=[{', '.join(refs)}]", "seed=7"], limit=3)
    sent = parse_job(job_for_a_driver(spec))
    assert [m.ref for m in sent.models] == [
        str(tmp_path / "local" / "model"),
        str(tmp_path / "m.gguf"),
        *refs[2:],
    ]
    assert sent.model_copy(update={"models": spec.models}) == spec
    assert (sent.seed, sent.tasks[0].limit) == (7, 3)


# What is refused


def test_a_bad_job_is_refused_before_the_cluster_is_asked(tmp_path: Path, closed_port: int) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\n", encoding="utf-8")
    address = f"127.0.0.1:{closed_port}"
    result = invoke("submit", str(path), "--detach", "--address", address, url=f"sqlite:///{tmp_path}/a.db")
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(path) in result.stderr


def test_a_database_that_cannot_be_used_is_refused_before_the_cluster_is_asked(
    job: Path, closed_port: int
) -> None:
    address = f"127.0.0.1:{closed_port}"
    result = invoke(
        "submit", str(job), "--detach", "--address", address, url="sqlite:////no/such/folder/a.db"
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert "folder" in result.stderr


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_cluster_that_does_not_answer(job: Path, closed_port: int, form: str, tmp_path: Path) -> None:
    address = form.format(closed_port)
    before = time.monotonic()
    result = invoke("submit", str(job), "--detach", "--address", address, url=f"sqlite:///{tmp_path}/a.db")
    assert (result.exit_code, result.stdout) == (2, "")
    assert address in result.stderr
    assert "pip install 'harp-batch[cluster]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert time.monotonic() - before < 10
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("address", ["cluster", "ray://127.0.0.1:10001", ":6379", "host:port", "local"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterError, match="HOST:6379") as refused:
        Jobs(address)
    assert address in str(refused.value)


def test_the_typed_address_beats_the_environment(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client has it the other way round."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=f"127.0.0.1:{closed_port}"):
        Jobs(f"http://127.0.0.1:{closed_port}")
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1 "):
        Jobs()
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"


def test_a_run_that_is_done_is_not_resumed_in_a_cluster(sqlite_url: str, closed_port: int) -> None:
    with open_store(sqlite_url) as store:
        store.create_run(a_run(id=RUN))
        store.end_attempt(store.acquire(RUN, "node-a", 4711, stale_after=15.0), RunStatus.DONE)
    result = invoke("resume", RUN, "--detach", "--address", f"127.0.0.1:{closed_port}", url=sqlite_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is done" in result.stderr


def test_a_run_that_somebody_drives_is_not_resumed_in_a_cluster(sqlite_url: str, closed_port: int) -> None:
    with open_store(sqlite_url) as store:
        store.create_run(a_run(id=RUN))
        attempt = store.acquire(RUN, "node-a#1", 4711, stale_after=15.0)
        ended = Event()
        beating = Thread(target=beat, args=(store, attempt, ended))
        beating.start()
        result = invoke("resume", RUN, "--detach", "--address", f"127.0.0.1:{closed_port}", url=sqlite_url)
        ended.set()
        beating.join()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is being driven by node-a (process 4711)" in result.stderr


def beat(store: Store, attempt: Attempt, ended: Event) -> None:
    while not ended.wait(0.3):
        store.heartbeat(attempt, {}, 0.0)


def test_logs_need_a_cluster(sqlite_url: str, closed_port: int) -> None:
    result = invoke("logs", "latest", "--address", f"127.0.0.1:{closed_port}", url=sqlite_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"127.0.0.1:{closed_port}" in result.stderr
