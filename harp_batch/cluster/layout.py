"""How many actors, and how much of the cluster each of them gets; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from harp_batch.errors import ClusterError

Node = Mapping[str, float]  # Ray's resources of one live node: {"CPU": 16.0, "GPU": 2.0, ...}


@dataclass(frozen=True, slots=True)
class Group:
    """Actors of one kind."""

    actors: int
    cpus: float  # reserved per actor
    gpus: float  # reserved per actor
    threads: int  # torch's CPU threads per actor

    @property
    def device(self) -> str:
        """Torch's name for what the model lives on."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a job says about its actors."""

    actors: int | Literal["auto"] = "auto"
    gpus_per_actor: float | Literal["auto"] = "auto"
    cpu_actors: int = 0  # beside those with GPUs

    @property
    def elastic(self) -> bool:
        """Whether the number of actors follows the cluster."""
        return self.actors == "auto"


def lay_out(nodes: Sequence[Node], wishes: Wishes) -> list[Group]:
    """Fit the wishes to the live ``nodes``: the groups of actors, the one that does most of the work first.

    ``auto`` means one actor a GPU; without GPUs one actor a node that uses all of its cores. Given numbers of
    CPU actors split the cores. Raises ClusterError where the cluster can never have what is asked for.
    """
    nodes = [node for node in nodes if node.get("CPU", 0) or node.get("GPU", 0)]
    if not nodes:
        raise ClusterError("the Ray cluster has no node with CPUs or GPUs; start one with `ray start`")
    gpus = _gpus_each(nodes, wishes.gpus_per_actor)
    if not gpus and wishes.cpu_actors:
        raise ClusterError(
            "cluster.cpu_actors is for CPU actors beside those with GPUs, and there are none of those; "
            "set cluster.actors instead"
        )
    if not gpus:
        return [_on_cpus(nodes, wishes.actors)]
    beside = [_on_cpus(_without_gpus(nodes), wishes.cpu_actors)] if wishes.cpu_actors else []
    return [_on_gpus(nodes, wishes.actors, gpus), *beside]


def _gpus_each(nodes: Sequence[Node], wish: float | Literal["auto"]) -> float:
    if wish == "auto":
        return 1.0 if _total(nodes, "GPU") else 0.0
    return float(wish)


def _on_gpus(nodes: Sequence[Node], wish: int | Literal["auto"], gpus: float) -> Group:
    places = sum(floor(node.get("GPU", 0) / gpus) for node in nodes)
    actors = max(places, 1) if wish == "auto" else wish
    if actors > places:
        raise ClusterError(
            f"the job asks for {actors} actor(s) with {gpus:g} GPU(s) each, but the Ray cluster has "
            f"{_total(nodes, 'GPU'):g} GPU(s) and {_total(nodes, 'CPU'):g} CPU(s) on {len(nodes)} node(s); "
            "lower cluster.actors or cluster.gpus_per_actor"
        )
    return Group(actors, cpus=0, gpus=gpus, threads=_threads_beside_gpus(nodes, gpus))


def _threads_beside_gpus(nodes: Sequence[Node], gpus: float) -> int:
    shares = [node.get("CPU", 1) / floor(node["GPU"] / gpus) for node in nodes if node.get("GPU", 0) >= gpus]
    return max(1, floor(min(shares)))


def _without_gpus(nodes: Sequence[Node]) -> Sequence[Node]:
    """Nodes whose cores are not there to feed GPUs; all nodes where there are none."""
    return [node for node in nodes if not node.get("GPU", 0)] or nodes


def _on_cpus(nodes: Sequence[Node], wish: int | Literal["auto"]) -> Group:
    actors = len(nodes) if wish == "auto" else wish
    cores = min(node.get("CPU", 0) for node in nodes) / ceil(actors / len(nodes))
    return Group(actors, cpus=floor(cores) if cores >= 1 else cores, gpus=0, threads=max(1, floor(cores)))


def _total(nodes: Sequence[Node], resource: str) -> float:
    return sum(node.get(resource, 0) for node in nodes)
