"""A bad database is one sentence, without a password in it."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from harp_batch.errors import DatabaseError, StoreUnavailable
from harp_batch.store import Store, open_store
from harp_batch.store.database import parse_url, show
from tests.conftest import as_role


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "not valid"),
        ("runs.db", "expected sqlite:///FILE"),
        ("mysql://me:secret@host/x", "of a kind that is not supported"),
        ("postgresql//me:secret@host/x", "not valid"),
        ("postgresql://me:secret@host:port/x", "not valid"),
        ("sqlite://", "is not a file"),
        ("sqlite:///:memory:", "is not a file"),
        ("sqlite:///x.db?mode=ro", "is not a file"),
        ("postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2", "cannot be used: .*refused"),
        ("sqlite:////no/such/folder/x.db", "there is no folder /no/such/folder"),
    ],
)
def test_bad_urls(url: str, sentence: str) -> None:
    with pytest.raises(DatabaseError, match=sentence) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_postgresql(scheme: str) -> None:
    url = parse_url(f"{scheme}://me:secret@host/x")
    assert url.drivername == "postgresql+psycopg"
    assert show(url) == "postgresql+psycopg://me:***@host/x"


def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database " * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        open_store(f"sqlite:///{tmp_path / 'notes.txt'}")


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="unable to open"):
        open_store(f"sqlite:///{tmp_path}")


def test_awkward_file_names(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a b #1 100% ü.db'}"
    open_store(url).close()
    with open_store(url, create=False, read_only=True) as store:
        assert store.runs() == []


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"x\.db does not exist: submit a job first"):
        open_store(f"sqlite:///{tmp_path / 'x.db'}", create=False)
    assert list(tmp_path.iterdir()) == []


def test_sqlite_is_opened_durably(sqlite_url: str) -> None:
    with open_store(sqlite_url) as store, store._reading() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]


def test_a_server_that_went_away(postgres_url: str) -> None:
    gone = parse_url(postgres_url).update_query_dict({"host": "/no/such/socket"})
    with pytest.raises(StoreUnavailable, match="does not answer"):
        Store(gone).runs()


def test_a_role_without_rights_is_told_so(postgres_url: str, postgres_superuser: str) -> None:
    schema = postgres_url.rpartition("%3D")[2]
    with open_store(postgres_url), psycopg.connect(postgres_superuser) as connection:
        connection.execute("CREATE ROLE visitor LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO visitor")
        connection.execute(f"GRANT SELECT ON {schema}.harp_batch_version TO visitor")
    with (
        open_store(as_role(postgres_url, "visitor"), create=False, read_only=True) as store,
        pytest.raises(DatabaseError, match="cannot be used: permission denied for table runs"),
    ):
        store.runs()
