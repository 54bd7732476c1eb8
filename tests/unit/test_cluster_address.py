"""Addresses where no Ray cluster answers are refused at once, in one sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harp_batch.cluster.driver import connect
from harp_batch.errors import ClusterError


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_nobody_listens(closed_port: int) -> None:
    before = time.monotonic()
    with (
        pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{closed_port}.*ray start --head"),
        connect(f"127.0.0.1:{closed_port}"),
    ):
        pass
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "address", ["cluster", "ray://127.0.0.1:10001", ":6379", "host:port", "127.0.0.1:99999999"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterError, match="Ray cluster") as refused, connect(address):
        pass
    assert address in str(refused.value)


def test_a_token_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: Ray reads its settings once."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing"),
    }
    program = "from harp_batch.cluster.driver import connect\nwith connect('local'): pass"
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "ClusterError: Ray cannot be used at 'local'" in ended.stderr
    assert "RAY_AUTH_TOKEN_PATH must name the same one here" in ended.stderr
