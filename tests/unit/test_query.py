"""The sandbox of `harp-batch query`: reading works, nothing else does, and everything ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from harp_batch.errors import DatabaseError, QueryError
from harp_batch.records import RunStatus
from harp_batch.store import RunRecord, Store, migrate, run_query
from tests.conftest import as_role
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


LEAKS = {
    "a setting that undoes another": "select set_config('role', 'none', true), (select string_agg(word, ' ') from"
    " ts_stat('select to_tsvector(''simple'', pg_read_file(''/etc/hostname''))'))",
    "a plain call": "select pg_read_file('/etc/hostname')",
}


@pytest.mark.parametrize("sql", [*LEAKS.values(), "select 1"])
def test_a_superuser_asks_nothing(postgres_store_url: str, postgres_superuser: str, sql: str) -> None:
    superuser = sa.make_url(postgres_superuser).username or ""
    with pytest.raises(DatabaseError, match=rf"no query is run as {superuser}, .*: give --db a role"):
        run_query(as_role(postgres_store_url, superuser), sql)


@pytest.mark.parametrize("group", ["postgres", "pg_read_server_files"])
def test_nor_does_a_role_that_can_become_one(
    postgres_store_url: str, postgres_superuser: str, group: str
) -> None:
    with psycopg.connect(postgres_superuser, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE deputy LOGIN IN ROLE harp, {group}")
        try:
            with pytest.raises(DatabaseError, match=f"no query is run as deputy, .* rights of {group} on"):
                run_query(as_role(postgres_store_url, "deputy"), "SELECT 1")
        finally:
            connection.execute("DROP ROLE deputy")


@pytest.mark.parametrize("sql", LEAKS.values())
def test_no_file_of_the_server_is_read(postgres_store_url: str, sql: str) -> None:
    with pytest.raises(QueryError, match="permission denied for function pg_read_file"):
        run_query(postgres_store_url, sql)


def test_the_reader_of_the_documentation(postgres_store_url: str, postgres_superuser: str) -> None:
    """The rights that docs/querying.md grants are enough, and no more."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "querying.md").read_text()
    schema = postgres_store_url.rpartition("%3D")[2]
    with psycopg.connect(f"{postgres_superuser}&options=-csearch_path%3D{schema}") as connection:
        connection.execute(text.partition("```sql")[2].partition("```")[0].encode())
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO reader")  # which `public` grants to all
    reader = as_role(postgres_store_url, "reader")
    assert run_query(reader, "TABLE tokens").rows == ()
    with pytest.raises(QueryError, match="permission denied for table runs"):
        run_query(reader, "SELECT * FROM runs")


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

    def test_the_timeout_cannot_be_lifted(self, postgres_store_url: str) -> None:
        self.assert_stopped(
            postgres_store_url,
            "select case when i = 1 then set_config('statement_timeout', '0', true)"
            " when i = 150 then pg_sleep(30)::text else '' end from generate_series(1, 200) i",
        )

    def test_a_stopped_query_leaves_the_server(self, postgres_store_url: str) -> None:
        sql = "SELECT set_config('statement_timeout', '0', true), pg_sleep(30), 'left behind'"
        self.assert_stopped(postgres_store_url, sql)
        others = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%left ' || 'behind%'"
        assert run_query(postgres_store_url, others).rows == ((0,),)

    def test_one_long_step_is_not_waited_for(self, sqlite_store_url: str) -> None:
        long = 1_200_000
        sql = f"SELECT instr(zeroblob({long}), zeroblob({long // 2}) || x'01')"
        self.assert_stopped(sqlite_store_url, sql)

    def test_no_value_fills_the_memory(self, sqlite_store_url: str) -> None:
        with pytest.raises(QueryError, match="too big"):
            run_query(sqlite_store_url, "SELECT instr(zeroblob(60000000), zeroblob(30000000) || x'01')")

    def assert_stopped(self, url: str, sql: str) -> None:
        start = time.monotonic()
        with pytest.raises(QueryError, match=r"stopped after 0\.3 seconds"):
            run_query(url, sql, timeout_s=0.3)
        assert time.monotonic() - start < 6

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


@pytest.mark.parametrize("sql", ["SELECT '\udcff'", "SELECT '\0'"])
def test_what_is_not_text(url: str, sql: str) -> None:
    with pytest.raises(QueryError, match="the query is not text"):
        run_query(url, sql)


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("round(10::numeric ^ 5000)", "1" + "0" * 5000),
        ("repeat('9', 5000)::numeric", "9" * 5000),
        ("round(-1e400::numeric / 3)", "-" + "3" * 400),
        ("10::numeric ^ 300", 10**300),
        ("ARRAY[1.5::numeric, 2]", [1.5, 2]),
        ("'Infinity'::numeric", math.inf),
    ],
)
def test_numbers_of_postgresql(postgres_store_url: str, sql: str, value: object) -> None:
    ((found,),) = run_query(postgres_store_url, f"SELECT {sql}").rows
    assert found == value
    assert str(found)  # which Python refuses for an int of so many digits


@pytest.mark.parametrize(
    "sql", ["('[' || repeat('9', 5000) || ']')::json", "(repeat('[', 3000) || repeat(']', 3000))::json"]
)
def test_values_that_python_cannot_hold(postgres_store_url: str, sql: str) -> None:
    with pytest.raises(QueryError, match="the query's result cannot be read"):
        run_query(postgres_store_url, f"SELECT {sql}")


def test_table_is_offered_where_there_is_one(sqlite_store_url: str, postgres_store_url: str) -> None:
    assert run_query(postgres_store_url, "TABLE answers").rows == ()
    with pytest.raises(QueryError, match="begin it with SELECT, WITH, VALUES or TABLE"):
        run_query(postgres_store_url, "DROP TABLE runs")
    with pytest.raises(QueryError, match=r"begin it with SELECT, WITH or VALUES$"):
        run_query(sqlite_store_url, "TABLE answers")
