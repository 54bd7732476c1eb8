"""How actors are fitted to a cluster."""

from __future__ import annotations

import pytest

from harp_batch.cluster.layout import Group, Wishes, lay_out
from harp_batch.errors import ClusterError

LAPTOP = [{"CPU": 8.0, "memory": 1e9}]
GPU_BOX = [{"CPU": 32.0, "GPU": 4.0}]
MIXED = [{"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "group"),
    [
        (LAPTOP, "auto", "auto", Group(1, cpus=8, gpus=0, threads=8)),
        (LAPTOP, 2, "auto", Group(2, cpus=4, gpus=0, threads=4)),
        (LAPTOP, 3, "auto", Group(3, cpus=2, gpus=0, threads=2)),
        (LAPTOP, 16, "auto", Group(16, cpus=0.5, gpus=0, threads=1)),
        (LAPTOP * 3, "auto", "auto", Group(3, cpus=8, gpus=0, threads=8)),
        (LAPTOP * 3, 4, 0, Group(4, cpus=4, gpus=0, threads=4)),
        (GPU_BOX, "auto", "auto", Group(4, cpus=0, gpus=1, threads=8)),
        (GPU_BOX, "auto", 0.5, Group(8, cpus=0, gpus=0.5, threads=4)),
        (GPU_BOX, 1, 2, Group(1, cpus=0, gpus=2, threads=16)),
        (GPU_BOX, "auto", 0, Group(1, cpus=32, gpus=0, threads=32)),
        (MIXED, "auto", "auto", Group(3, cpus=0, gpus=1, threads=8)),
        ([{"CPU": 0.0}, *LAPTOP], "auto", "auto", Group(1, cpus=8, gpus=0, threads=8)),
    ],
)
def test_layouts(nodes: list[dict[str, float]], actors: object, gpus: object, group: Group) -> None:
    assert lay_out(nodes, Wishes(actors, gpus)) == [group]  # type: ignore[arg-type]


def test_cpu_actors_stand_beside_those_with_gpus_on_nodes_without_any() -> None:
    groups = lay_out(MIXED, Wishes("auto", "auto", cpu_actors=2))
    assert groups == [Group(3, cpus=0, gpus=1, threads=8), Group(2, cpus=2, gpus=0, threads=2)]
    assert [group.device for group in groups] == ["cuda", "cpu"]


def test_cpu_actors_beside_nothing_are_refused() -> None:
    with pytest.raises(ClusterError, match=r"set cluster\.actors instead"):
        lay_out(LAPTOP, Wishes(cpu_actors=2))


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus"),
    [(LAPTOP, "auto", 1), (LAPTOP, 1, 0.5), (GPU_BOX, 5, 1), (GPU_BOX, "auto", 8), (MIXED, 2, 2)],
)
def test_gpus_that_are_not_there_are_refused_and_what_is_there_is_named(
    nodes: list[dict[str, float]], actors: object, gpus: object
) -> None:
    there = sum(node.get("GPU", 0) for node in nodes)
    with pytest.raises(ClusterError, match=rf"has {there:g} GPU\(s\).*lower cluster\.actors") as refused:
        lay_out(nodes, Wishes(actors, gpus))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match="no node"):
        lay_out([{"memory": 1.0}], Wishes())
