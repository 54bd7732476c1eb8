"""The sandbox of `harp-batch query`: reading works, nothing else does, and everything ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harp_batch.errors import DatabaseError, QueryError
from harp_batch.records import RunStatus
from harp_batch.store import RunRecord, Store, migrate, run_query
from tests.support.store_records import a_run, an_answer

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"


@pytest.fixture
def run(store: Store) -> RunRecord:
    created = a_run(id="r1")
    store.create_run(created)
    store.commit([an_answer(created.evaluations[0].id, n) for n in range(3)])
    return created


@pytest.fixture
def url(store_url: str, run: RunRecord, store: Store) -> Iterator[str]:
    """A database with three answers, which must be as it was after the test."""
    before = store.load_run(run.id), list(store.answers(run.evaluations[0].id, traces=True)), store.runs()
    yield store_url
    after = store.load_run(run.id), list(store.answers(run.evaluations[0].id, traces=True)), store.runs()
    assert before == after
    assert store.runs()[0].status is RunStatus.RUNNING


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT doc_id, text FROM answers WHERE doc_id = 1", [(1, "4 is the answer")]),
        ("  -- why\n /* because */ SELECT count(*) FROM tokens WHERE hesitated", [(6,)]),
        ("WITH a AS (SELECT * FROM answers) SELECT max(doc_id) FROM a;", [(2,)]),
        ("VALUES (1, 'x'), (2, '%s {}')", [(1, "x"), (2, "%s {}")]),
        ("SELECT avg(output_tokens), sum(seconds) FROM answers", [(3, 0.75)]),
        ("SELECT doc_id FROM answers WHERE doc_id > 5", []),
    ],
)
def test_reading(url: str, sql: str, rows: list[tuple[object, ...]]) -> None:
    result = run_query(url, sql)
    assert list(result.rows) == rows
    assert not result.truncated


def test_columns_are_named_even_without_rows(url: str) -> None:
    result = run_query(url, "SELECT doc_id, text AS said FROM answers WHERE doc_id > 5")
    assert result.columns == ("doc_id", "said")


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "DELETE FROM answer_rows",
        "INSERT INTO runs (id) VALUES ('x')",
        "UPDATE runs SET status = 'done'",
        "DROP VIEW tokens",
        "CREATE TABLE t (x INTEGER)",
        "CREATE TEMP TABLE t (x INTEGER)",
        "VACUUM",
        "ATTACH DATABASE '/tmp/evil.db' AS evil",
        "PRAGMA user_version = 7",
        "SET default_transaction_read_only = off",
        "COPY runs TO '/tmp/evil.csv'",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "BEGIN",
        "COMMIT",
        "SELECT 1; SELECT 2",
        "SELECT 1; UPDATE runs SET status = 'done'",
        "SELECT 1; COMMIT; UPDATE runs SET status = 'done'",
        "/* SELECT */ UPDATE runs SET status = 'done'",
        "WITH x AS (SELECT 'r1') UPDATE runs SET status = 'done'",
        "WITH x AS (UPDATE runs SET status = 'done' RETURNING id) SELECT * FROM x",
        "WITH x AS (SELECT 1) INSERT INTO runs (id) SELECT 'x'",
        "SELECT * INTO stolen FROM runs",
        "SELECT id FROM runs FOR UPDATE",
        "EXPLAIN ANALYZE DELETE FROM runs",
    ],
)
def test_everything_else_is_refused(url: str, sql: str) -> None:
    with pytest.raises(QueryError) as caught:
        run_query(url, sql)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["load_extension('x')", "nonsense(1)"])
def test_functions_that_are_not_there(url: str, function: str) -> None:
    with pytest.raises(QueryError, match="refused"):
        run_query(url, f"SELECT {function}")


def test_sqlite_settings_cannot_be_read_around_the_back(sqlite_store_url: str) -> None:
    with pytest.raises(QueryError, match=r"not authorized|prohibited"):
        run_query(sqlite_store_url, "SELECT * FROM pragma_table_info('runs')")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT lo_import('/etc/passwd')",
        "SELECT pg_reload_conf()",
        "SELECT set_config('transaction_read_only', 'off', true)",
        "SELECT nextval('request_sets_id_seq')",
    ],
)
def test_the_server_is_out_of_reach(postgres_store_url: str, sql: str) -> None:
    with pytest.raises(QueryError, match="refused"):
        run_query(postgres_store_url, sql)


@pytest.fixture(scope="module")
def sqlite_store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('query') / 'x.db'}"
    migrate.upgrade(url)
    return url


@pytest.fixture
def postgres_store_url(postgres_url: str) -> str:
    migrate.upgrade(postgres_url)
    return postgres_url


class TestEnds:
    @pytest.mark.parametrize("what", ["count(*)", "max(i)"])
    def test_an_endless_count_is_stopped(self, url: str, what: str) -> None:
        self.assert_stopped(url, ENDLESS.format(what))

    def test_sleep_is_stopped(self, postgres_store_url: str) -> None:
        self.assert_stopped(postgres_store_url, "SELECT pg_sleep(60)")

    def assert_stopped(self, url: str, sql: str) -> None:
        start = time.monotonic()
        with pytest.raises(QueryError, match=r"stopped after 0\.3 seconds"):
            run_query(url, sql, timeout_s=0.3)
        assert time.monotonic() - start < 15

    def test_endless_rows_are_cut(self, url: str) -> None:
        result = run_query(url, ENDLESS.format("i"), max_rows=7)
        assert [row[0] for row in result.rows] == [1, 2, 3, 4, 5, 6, 7]
        assert result.truncated

    def test_exactly_as_many_rows_as_asked_for_are_not_cut(self, url: str) -> None:
        assert not run_query(url, "SELECT doc_id FROM answers", max_rows=3).truncated
        assert run_query(url, "SELECT doc_id FROM answers", max_rows=2).truncated

    def test_long_texts_are_cut(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("harp_batch.store.query.MAX_BYTES", 1000)
        result = run_query(url, "SELECT '" + "x" * 300 + "' FROM tokens")
        assert (len(result.rows), result.truncated) == (3, True)


@pytest.mark.parametrize(
    ("sql", "hint"),
    [
        ("SELECT hesitation FROM answers", "did you mean 'hesitations'"),
        ("SELECT a.hesitation FROM answers a", "did you mean 'hesitations'"),
        ("SELECT * FROM answer", "did you mean 'answers'"),
        ("SELECT * FROM nonsense", "the views are results, answers, tokens"),
    ],
)
def test_an_unknown_name_gets_a_hint(url: str, sql: str, hint: str) -> None:
    with pytest.raises(QueryError, match=hint):
        run_query(url, sql)


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="does not exist"):
        run_query(f"sqlite:///{tmp_path / 'x.db'}", "SELECT 1")
