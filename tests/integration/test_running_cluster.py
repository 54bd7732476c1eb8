"""`--address`: the work goes to a Ray cluster that was there before, and that is there afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from harp_batch import service
from harp_batch.records import RunStatus

pytestmark = pytest.mark.ray

JOB = """
name: elsewhere
models: [{{ref: {model}, chat_template: false}}]
tasks: [{{task: demo_choice, limit: 6}}]
methods: [greedy, harp]
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes of one core each, as processes of this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def harp_batch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("harp-batch")
    return subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200, env=dict(os.environ)
    )


def test_a_running_cluster_is_used_and_left_alone(cluster: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(model=tiny_llama), encoding="utf-8")
    for _ in range(2):
        done = harp_batch("submit", "job.yaml", "--address", cluster.address, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "demo_choice" in done.stdout
    runs = service.status(f"sqlite:///{tmp_path / 'harp-batch.db'}")
    assert [(run.status, run.answered) for run in runs] == [(RunStatus.DONE, 12)] * 2


def test_more_gpus_than_the_cluster_has_are_refused_at_once(
    cluster: Cluster, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(model=tiny_llama), encoding="utf-8")
    refused = harp_batch(
        "submit", "job.yaml", "--address", cluster.address, "--set", "cluster.gpus_per_actor=1", cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "the Ray cluster has 0 GPU(s) and 2 CPU(s)" in refused.stderr
    assert not (tmp_path / "harp-batch.db").exists()
