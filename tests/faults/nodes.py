"""A Ray cluster of plain `ray start` nodes on this machine: a head without work, and workers that can be lost."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from random import Random

from tests.faults.sessions import Session, Sessions

HOST = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's outer address; all of 127/8 is loopback
WORKERS = 2
_RAY = Path(sys.executable).with_name("ray")
_STARTING = 60.0  # seconds for `ray start` to return
_STORE = 100 * 2**20  # bytes of a node's object store: leases and replies are all that passes
_COMMON = (
    f"--node-ip-address={HOST}",
    f"--object-store-memory={_STORE}",
    "--min-worker-port=0",  # the system chooses; the default range is the same for every node
    "--max-worker-port=0",
    "--dashboard-agent-listen-port=0",
    "--disable-usage-stats",
)


class Nodes:
    """The head is never killed; a worker that was killed is replaced."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._lost: Session | None = None
        port = _free_port()
        self.address = f"{HOST}:{port}"
        self._start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false").require(
            0, _STARTING
        )
        self.workers: list[Session] = []
        for _ in range(WORKERS):  # one after the other: two that start at once can take the same socket
            self.workers.append(self._join())
            self.workers[-1].require(0, _STARTING)

    def lose(self, rng: Random) -> int:
        """Kill the raylet of a worker, and nothing else of it; return how many actors it had. Another one joins."""
        for worker in self.workers:
            worker.require(0, _STARTING)  # it may have been started just now
        if self._lost:
            self._lost.end()  # what does not notice that its raylet is gone, such as the log monitor
        self._lost = self.workers.pop(rng.randrange(len(self.workers)))
        actors = len(self._lost.called("ray::Worker"))
        (raylet,) = [process for process in self._lost.members() if process.name() == "raylet"]
        raylet.kill()
        self.workers.append(self._join())
        return actors

    def _join(self) -> Session:
        return self._start(f"--address={self.address}", "--num-cpus=1")

    def _start(self, *options: str) -> Session:
        return self._sessions.start(_RAY, "start", *options, *_COMMON)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port
