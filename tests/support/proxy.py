"""A TCP proxy before a PostgreSQL server, which breaks connections where a test wants it to."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Lock, Thread
from types import TracebackType
from typing import Literal, Self

import sqlalchemy as sa


class Proxy:
    """Forwards 127.0.0.1:PORT to a server's socket in a folder."""

    def __init__(self, server: str) -> None:
        self._url = sa.make_url(server)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = Lock()
        self._at_commit: Literal["before", "after"] | None = None
        self._bytes_left: int | None = None
        self._muted: socket.socket | None = None  # of a server whose next answer breaks the connection
        self._open = True
        Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The server's URL, by way of the proxy."""
        port = self._listener.getsockname()[1]
        query = {name: value for name, value in self._url.query.items() if name != "host"}
        return self._url.set(host="127.0.0.1", port=port, query=query).render_as_string()

    def cut_at_commit(self, when: Literal["before", "after"]) -> None:
        """Break the connection once: before the next COMMIT reaches the server, or before its answer comes back."""
        self._at_commit = when

    def cut_after(self, count: int) -> None:
        """Break all connections once so many more bytes have passed, in both directions together."""
        self._bytes_left = count

    def stop(self) -> None:
        """Break all connections and refuse new ones."""
        self._open = False
        self._cut()

    def go_on(self) -> None:
        """Take connections again."""
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        path = f"{self._url.query['host']}/.s.PGSQL.{self._url.port or 5432}"
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if not self._open:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(path)
                with self._lock:
                    self._pairs.append((client, server))
                Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, asking: bool) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                commit = self._take_commit() if asking and b"COMMIT" in data else None
                if commit == "after":
                    self._muted = target
                if commit == "before" or source is self._muted:
                    break
                if not self._pass(target, data):
                    self._cut()
        _close(source, target)

    def _take_commit(self) -> Literal["before", "after"] | None:
        when, self._at_commit = self._at_commit, None
        return when

    def _pass(self, target: socket.socket, data: bytes) -> bool:
        """Send the data as far as it may go; return whether more may."""
        with self._lock:
            left = self._bytes_left
            if left is not None:
                self._bytes_left = left - len(data) if left > len(data) else None
        if left is not None and left <= len(data):
            target.sendall(data[:left])
            return False
        target.sendall(data)
        return True

    def _cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _close(*pair)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
