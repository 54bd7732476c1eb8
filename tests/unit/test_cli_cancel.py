"""`cancel RUN` for runs that nobody drives, on a real SQLite database; with drivers: integration/test_detached.py."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from harp_batch.cli.app import app
from harp_batch.records import RunStatus
from harp_batch.store import open_store
from tests.support.store_records import a_run, an_answer

RUN = "c0ffee0123456789"


@pytest.fixture
def url(sqlite_url: str) -> str:
    """A database with one run, two of whose eight answers are there."""
    with open_store(sqlite_url) as store:
        store.create_run(a_run(id=RUN))
        store.commit([an_answer(f"{RUN}/greedy", doc_id) for doc_id in (0, 1)])
    return sqlite_url


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def end(url: str, outcome: RunStatus) -> None:
    with open_store(url) as store:
        store.end_attempt(store.acquire(RUN, "node-a", 4711, stale_after=15.0), outcome)


def invoke(*arguments: str, url: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--db", url])


@pytest.mark.parametrize("before", [None, RunStatus.INTERRUPTED, RunStatus.FAILED])
def test_a_run_that_nobody_drives_is_cancelled_at_once(url: str, before: RunStatus | None) -> None:
    if before:
        end(url, before)
    result = invoke("cancel", RUN[:6], url=url)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"run nightly ({RUN[:8]}) is cancelled, 2 of 8 answers\n" in result.stderr
    assert "harp-batch resume" not in result.stderr
    with open_store(url, read_only=True) as store:
        assert store.find_run(RUN).status is RunStatus.CANCELLED
        assert store.answered(f"{RUN}/greedy") == {(0, 0), (1, 0)}


def test_cancelling_twice_is_fine(url: str) -> None:
    results = [invoke("cancel", RUN, url=url) for _ in range(2)]
    assert [r.exit_code for r in results] == [0, 0]


def test_a_cancelled_run_is_not_resumed(url: str) -> None:
    invoke("cancel", RUN, url=url)
    for arguments in (["resume", RUN], ["resume", RUN, "--detach"]):
        refused = invoke(*arguments, url=url)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "cancelled" in refused.stderr


def test_a_done_run_cannot_be_cancelled(url: str) -> None:
    end(url, RunStatus.DONE)
    result = invoke("cancel", RUN, url=url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "done" in result.stderr
    with open_store(url, read_only=True) as store:
        assert store.find_run(RUN).status is RunStatus.DONE


def test_a_run_that_does_not_exist(url: str) -> None:
    """Where no cluster is named, none is asked."""
    result = invoke("cancel", "zzz", url=url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'zzz'" in result.stderr
