"""One Ray cluster and one tiny model for all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harp_batch.cluster.driver import connect
from tests.support.tiny_files import save_tiny_llama


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this machine; whatever connects to Ray meanwhile uses it."""
    with connect("local"):
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random-weight Llama with a tokenizer of its own."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
