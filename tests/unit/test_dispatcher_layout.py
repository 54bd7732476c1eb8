"""How actors are fitted to a cluster."""

from __future__ import annotations

import pytest

from harp_batch.cluster.layout import Layout, lay_out
from harp_batch.errors import ClusterError

LAPTOP = [{"CPU": 8.0, "memory": 1e9}]
GPU_BOX = [{"CPU": 32.0, "GPU": 4.0}]
MIXED = [{"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "layout"),
    [
        (LAPTOP, "auto", "auto", Layout(1, cpus=8, gpus=0, threads=8)),
        (LAPTOP, 2, "auto", Layout(2, cpus=4, gpus=0, threads=4)),
        (LAPTOP, 3, "auto", Layout(3, cpus=2, gpus=0, threads=2)),
        (LAPTOP, 16, "auto", Layout(16, cpus=0.5, gpus=0, threads=1)),
        (LAPTOP * 3, "auto", "auto", Layout(3, cpus=8, gpus=0, threads=8)),
        (LAPTOP * 3, 4, 0, Layout(4, cpus=4, gpus=0, threads=4)),
        (GPU_BOX, "auto", "auto", Layout(4, cpus=0, gpus=1, threads=8)),
        (GPU_BOX, "auto", 0.5, Layout(8, cpus=0, gpus=0.5, threads=4)),
        (GPU_BOX, 1, 2, Layout(1, cpus=0, gpus=2, threads=16)),
        (GPU_BOX, "auto", 0, Layout(1, cpus=32, gpus=0, threads=32)),
        (MIXED, "auto", "auto", Layout(3, cpus=0, gpus=1, threads=8)),
        ([{"CPU": 0.0}, *LAPTOP], "auto", "auto", Layout(1, cpus=8, gpus=0, threads=8)),
    ],
)
def test_layouts(nodes: list[dict[str, float]], actors: object, gpus: object, layout: Layout) -> None:
    assert lay_out(nodes, actors, gpus) == layout  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus"),
    [(LAPTOP, "auto", 1), (LAPTOP, 1, 0.5), (GPU_BOX, 5, 1), (GPU_BOX, "auto", 8), (MIXED, 2, 2)],
)
def test_gpus_that_are_not_there_are_refused_and_what_is_there_is_named(
    nodes: list[dict[str, float]], actors: object, gpus: object
) -> None:
    there = sum(node.get("GPU", 0) for node in nodes)
    with pytest.raises(ClusterError, match=rf"has {there:g} GPU\(s\).*lower cluster\.actors") as refused:
        lay_out(nodes, actors, gpus)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match="no node"):
        lay_out([{"memory": 1.0}], "auto", "auto")
