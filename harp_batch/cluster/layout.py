"""How many actors, and how much of the cluster each of them gets; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from harp_batch.errors import ClusterError

Node = Mapping[str, float]  # Ray's resources of one live node: {"CPU": 16.0, "GPU": 2.0, ...}


@dataclass(frozen=True, slots=True)
class Layout:
    """The actors of a run: all alike."""

    actors: int
    cpus: float  # reserved per actor
    gpus: float  # reserved per actor
    threads: int  # torch's CPU threads per actor

    @property
    def device(self) -> str:
        """Torch's name for what the model lives on."""
        return "cuda" if self.gpus else "cpu"


def lay_out(
    nodes: Sequence[Node], actors: int | Literal["auto"], gpus_per_actor: float | Literal["auto"]
) -> Layout:
    """Fit the job's wishes to the live ``nodes``.

    ``auto`` means one actor a GPU; without GPUs one actor a node that uses all of its cores. Given numbers of
    CPU actors split the cores. Raises ClusterError where GPUs are asked for that the nodes do not have.
    """
    nodes = [node for node in nodes if node.get("CPU", 0) or node.get("GPU", 0)]
    if not nodes:
        raise ClusterError("the Ray cluster has no node with CPUs or GPUs; start one with `ray start`")
    gpus = _gpus_each(nodes, gpus_per_actor)
    return _on_gpus(nodes, actors, gpus) if gpus else _on_cpus(nodes, actors)


def _gpus_each(nodes: Sequence[Node], wish: float | Literal["auto"]) -> float:
    if wish == "auto":
        return 1.0 if _total(nodes, "GPU") else 0.0
    return float(wish)


def _on_gpus(nodes: Sequence[Node], wish: int | Literal["auto"], gpus: float) -> Layout:
    places = sum(floor(node.get("GPU", 0) / gpus) for node in nodes)
    actors = max(places, 1) if wish == "auto" else wish
    if actors > places:
        raise ClusterError(
            f"the job asks for {actors} actor(s) with {gpus:g} GPU(s) each, but the Ray cluster has "
            f"{_total(nodes, 'GPU'):g} GPU(s) and {_total(nodes, 'CPU'):g} CPU(s); "
            "lower cluster.actors or cluster.gpus_per_actor"
        )
    return Layout(actors, cpus=0, gpus=gpus, threads=_threads_beside_gpus(nodes, gpus))


def _threads_beside_gpus(nodes: Sequence[Node], gpus: float) -> int:
    shares = [node.get("CPU", 1) / floor(node["GPU"] / gpus) for node in nodes if node.get("GPU", 0) >= gpus]
    return max(1, floor(min(shares)))


def _on_cpus(nodes: Sequence[Node], wish: int | Literal["auto"]) -> Layout:
    actors = len(nodes) if wish == "auto" else wish
    cores = min(node.get("CPU", 0) for node in nodes) / ceil(actors / len(nodes))
    return Layout(actors, cpus=floor(cores) if cores >= 1 else cores, gpus=0, threads=max(1, floor(cores)))


def _total(nodes: Sequence[Node], resource: str) -> float:
    return sum(node.get(resource, 0) for node in nodes)
