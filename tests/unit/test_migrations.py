"""Migrations: one head, up and down, equal to the models, and a sentence for every other state."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from harp_batch.errors import DatabaseError
from harp_batch.records import TokenTrace
from harp_batch.store import VIEWS, Store, migrate, open_store
from harp_batch.store.database import make_engine, parse_url
from harp_batch.store.schema import Base
from tests.support.store_records import a_run, an_answer

FOLDER = Path(__file__).resolve().parents[2] / "db" / "migrations"


def tables(url: str) -> set[str]:
    engine = make_engine(parse_url(url), "rw")
    found = set(sa.inspect(engine).get_table_names())
    engine.dispose()
    return found - {migrate.VERSION_TABLE}


def execute(url: str, sql: str) -> None:
    engine = make_engine(parse_url(url), "rwc")
    with engine.begin() as connection:
        connection.execute(sa.text(sql))
    engine.dispose()


def test_one_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_up_down_and_up_again(database_url: str) -> None:
    assert migrate.upgrade(database_url) is migrate.SchemaState.EMPTY
    assert tables(database_url) == set(Base.metadata.tables)
    assert migrate.check(database_url) is migrate.SchemaState.CURRENT
    with open_store(database_url) as store:
        run = a_run()
        store.create_run(run)
        store.commit([an_answer(run.evaluations[0].id)])
    migrate.downgrade(database_url, "base")
    assert tables(database_url) == set()
    assert migrate.check(database_url) is migrate.SchemaState.EMPTY
    migrate.upgrade(database_url)
    with open_store(database_url, create=False) as store:
        assert store.runs() == []


def test_upgrading_again_keeps_the_data(database_url: str) -> None:
    run = a_run()
    with open_store(database_url) as store:
        store.create_run(run)
    assert migrate.upgrade(database_url) is migrate.SchemaState.CURRENT
    with open_store(database_url) as store:
        assert store.load_run(run.id) == run


def test_attempts_come_and_go_and_traces_stay(database_url: str) -> None:
    """Revision 0002, up and down and up, with answers whose flags it rewrites in SQLite."""
    run = a_run()
    greedy = run.evaluations[0].id
    flags = (True, False, False, True, True)
    long = TokenTrace((1, 2, 3, 4, 5), (0.5,) * 5, flags, (1, 0, 10, 11, 5), flags[::-1])
    answers = [
        an_answer(greedy, 0),
        an_answer(greedy, 1, trace=long),
        an_answer(greedy, 2, trace=TokenTrace()),
    ]
    with open_store(database_url) as store:
        store.create_run(run)
        store.commit(answers)
        tokens = everything(store)
        assert (the_token(tokens, 1, 4), len(tokens)) == ((5, 0.5, True, 5, True), 8)
        store.acquire(run.id, "here", 1, stale_after=60)
    migrate.downgrade(database_url, "0001")
    assert "attempts" not in tables(database_url)
    with Store(parse_url(database_url)) as store:
        assert everything(store) == tokens
    execute(database_url, "SELECT vanilla_token_ids FROM answer_rows")
    if database_url.startswith("sqlite"):
        assert stored(database_url, "hesitated") == ["[0,1,1]", "[1,0,0,1,1]", "[]"]
        assert stored(database_url, "vanilla_token_ids") == ["[7,8,2]", "[1,0,10,11,5]", "[]"]
    assert migrate.upgrade(database_url) is migrate.SchemaState.BEHIND
    if database_url.startswith("sqlite"):
        assert stored(database_url, "hesitated") == ["011", "10011", ""]
        assert stored(database_url, "vanilla_offsets") == ["[0,0,-7]", "[0,-2,7,7,0]", "[]"]
    with open_store(database_url) as store:
        assert everything(store) == tokens
        assert list(store.answers(greedy, traces=True)) == answers
        assert store.attempts(run.id) == []
        assert store.acquire(run.id, "here", 1, stale_after=60).epoch == 1


def test_who_may_read_the_tokens_still_may(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    migrate.downgrade(postgres_url, "0001")
    execute(postgres_url, "GRANT SELECT ON tokens TO pg_monitor")  # any role but the owner
    migrate.upgrade(postgres_url)
    engine = make_engine(parse_url(postgres_url), "ro")
    with engine.connect() as connection:
        asked = "SELECT has_table_privilege('pg_monitor', 'tokens', 'SELECT')"
        assert connection.exec_driver_sql(asked).scalar_one()
    engine.dispose()


def everything(store: Store) -> list[tuple[Any, ...]]:
    with store._reading() as connection:
        rows = connection.exec_driver_sql(
            "SELECT doc_id, step, token_id, entropy, hesitated, vanilla_token_id, flipped FROM tokens"
            " ORDER BY doc_id, step"
        )
        return [tuple(row) for row in rows]


def the_token(tokens: list[tuple[Any, ...]], doc_id: int, step: int) -> tuple[Any, ...]:
    (found,) = (row[2:] for row in tokens if row[:2] == (doc_id, step))
    return found


def stored(url: str, column: str) -> list[str]:
    with closing(sqlite3.connect(parse_url(url).database or "")) as connection:
        return [row[0] for row in connection.execute(f"SELECT {column} FROM answer_rows ORDER BY doc_id")]


def test_models_equal_migrations(database_url: str) -> None:
    migrate.upgrade(database_url)
    engine = make_engine(parse_url(database_url), "ro")
    with engine.connect() as connection:
        options = {"version_table": migrate.VERSION_TABLE, "compare_type": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata) == []
        inspector = sa.inspect(connection)
        assert set(inspector.get_view_names()) == set(VIEWS)
        for view, columns in VIEWS.items():
            assert tuple(column["name"] for column in inspector.get_columns(view)) == columns
    engine.dispose()


def test_constraints_hold_in_the_database(database_url: str) -> None:
    migrate.upgrade(database_url)
    insert = "INSERT INTO runs (id, name, status, created_at, job_yaml, seed, versions) VALUES "
    with pytest.raises(sa.exc.IntegrityError, match="ck_runs_status"):
        execute(database_url, insert + "('a', 'a', 'asleep', '2026-01-01 00:00:00', '', 0, '{}')")
    with pytest.raises(sa.exc.IntegrityError):
        execute(
            database_url, "INSERT INTO metric_rows (evaluation_id, metric, filter, n) VALUES ('a','b','c',1)"
        )


@pytest.mark.parametrize("create", [True, False])
def test_an_older_schema_names_the_command(
    database_url: str, create: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    migrate.upgrade(database_url)
    _add_revision(tmp_path, monkeypatch)
    assert migrate.check(database_url) is migrate.SchemaState.BEHIND
    with pytest.raises(DatabaseError, match="older schema: run `harp-batch db upgrade`"):
        open_store(database_url, create=create)
    migrate.upgrade(database_url)
    open_store(database_url, create=create).close()


def _add_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this version of harp-batch one revision newer than it is."""
    for path in FOLDER.rglob("*.py"):
        copy = folder / path.relative_to(FOLDER)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    text = "revision = '9999'\ndown_revision = '0002'\ndef upgrade(): pass\ndef downgrade(): pass\n"
    (folder / "versions" / "9999_next.py").write_text(text)
    monkeypatch.setattr(migrate, "_migrations", lambda: folder)


@pytest.mark.parametrize("create", [True, False])
def test_a_newer_schema_says_to_upgrade_the_program(database_url: str, create: bool) -> None:
    migrate.upgrade(database_url)
    execute(database_url, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(DatabaseError, match=r"newer schema .*: upgrade harp-batch"):
        open_store(database_url, create=create)
    with pytest.raises(DatabaseError, match="newer schema"):
        migrate.upgrade(database_url)


def test_an_empty_database_is_not_set_up_by_a_reader(database_url: str) -> None:
    with pytest.raises(DatabaseError, match=r"does not exist|has no runs yet: submit a job first"):
        open_store(database_url, create=False, read_only=True)
    if database_url.startswith("sqlite"):
        assert not Path(parse_url(database_url).database or "").exists()


def test_tables_of_somebody_else_are_left_alone(database_url: str) -> None:
    execute(database_url, "CREATE TABLE evaluations (mine INTEGER)")
    with pytest.raises(DatabaseError, match="evaluations"):
        open_store(database_url)
    assert tables(database_url) == {"evaluations"}  # the migration is one transaction


def test_two_first_submits_at_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(lambda _: open_store(database_url), range(4)):
            store.close()
    assert migrate.check(database_url) is migrate.SchemaState.CURRENT


def test_a_shared_file_keeps_its_settings(sqlite_url: str) -> None:
    execute(sqlite_url, "PRAGMA user_version = 7")
    migrate.upgrade(sqlite_url)
    migrate.ensure(sqlite_url)
    with closing(sqlite3.connect(parse_url(sqlite_url).database or "")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (7,)
    migrate.downgrade(sqlite_url, "base")
    with closing(sqlite3.connect(parse_url(sqlite_url).database or "")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (7,)
