"""docker-compose.yml as data, and its services as plain processes of this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\}")
_MARK = "HARP_BATCH_TEST_STACK"


def load(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with its ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}`` filled in from `variables`.

    Raises KeyError with the message where a variable that must be set is not.
    """
    filled: dict[str, Any] = _fill(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), variables)
    return filled


def words(service: Mapping[str, Any]) -> list[str]:
    """What the service runs: its entry point and its command."""
    return [*service.get("entrypoint", []), *service.get("command", [])]


def _own_ports(service: Mapping[str, Any]) -> list[str]:
    """Options for ports that every container has to itself, and nodes on one machine do not."""
    command = service["command"]
    if command[:2] != ["ray", "start"]:
        return []
    options = ["--dashboard-agent-listen-port"]
    if "--head" in command and find_spec("grpc"):  # Ray's client server is there when its library is
        options.append("--ray-client-server-port")
    return [f"{option}={free_port()}" for option in options]


def _fill(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, variables) for item in value]
    return _VARIABLE.sub(lambda m: _value(m, variables), value) if isinstance(value, str) else value


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    given = variables.get(match["name"], "")
    if not given and match["kind"] == "?":
        raise KeyError(f"{match['name']} {match['text']}")
    return given or (match["text"] if match["kind"] == "-" else "")


class Stack:
    """The services of the compose file without containers.

    Every process has the command, the environment and the secrets that the file gives its service; only names that
    containers alone have (hosts, mount points, fixed ports) become those of `folder` and 127.0.0.1.
    """

    def __init__(self, folder: Path, programs: Path, database_host: Path) -> None:
        self.folder = folder
        self.secrets = folder / "docker" / "secrets"
        self._programs = programs  # of PostgreSQL
        self._mark = uuid.uuid4().hex
        self.address = f"127.0.0.1:{free_port()}"
        self._here = {
            "ray-head:6379": self.address,
            "--port=6379": f"--port={self.address.rpartition(':')[2]}",
            "--dashboard-port=8265": f"--dashboard-port={free_port()}",
            "0.0.0.0": "127.0.0.1",  # noqa: S104 - what must not be
            "/run/secrets": str(self.secrets),
            "/tmp/ray/": f"{folder}/ray/",  # noqa: S108 - the container's own
            "@postgres/": "@/",
            "--host=127.0.0.1": f"--host={database_host}",
            "/data": str(folder / "docker" / "data"),
            "on-cluster": str(folder / "docker" / "on-cluster.sh"),
        }
        self._database_host = str(database_host)
        shutil.copytree(ROOT / "docker", folder / "docker", ignore=shutil.ignore_patterns("secrets"))
        self.make_secrets()
        self._services = load({**self.settings(), "HARP_WORKER_CPUS": "1"})["services"]

    def make_secrets(self) -> None:
        """Run docker/secrets.sh in the folder."""
        subprocess.run([self.folder / "docker" / "secrets.sh"], check=True, stdout=subprocess.DEVNULL)

    def settings(self) -> dict[str, str]:
        """What docker/secrets.sh wrote to .env."""
        lines = (self.folder / ".env").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def run(self, service: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`docker compose run --rm SERVICE ARGUMENTS`, waited for."""
        return self._finish(self._command(service, arguments), {**self.environment(service), **environment})

    def check(self, service: str, **environment: str) -> bool:
        """Whether the service's health check succeeds."""
        kind, *test = self._here_all(self._services[service]["healthcheck"]["test"])
        command = ["sh", "-c", *test] if kind == "CMD-SHELL" else test
        return self._finish(command, {**self.environment(service), **environment}).returncode == 0

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """`docker compose up SERVICE`: one more process; its output goes to a file in the folder."""
        with (self.folder / f"{service}-{uuid.uuid4().hex[:4]}.log").open("wb") as log:
            return subprocess.Popen(
                self._command(service, ()), cwd=self.folder, env=self.environment(service),
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def begin(self, service: str, *arguments: str) -> subprocess.Popen[str]:
        """Like `run`, but not waited for."""
        return subprocess.Popen(
            self._command(service, arguments), cwd=self.folder, env=self.environment(service), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def environment(self, service: str) -> dict[str, str]:
        """The service's variables, and the few that an image has."""
        path = f"{Path(sys.executable).parent}:{self._programs}:{os.environ['PATH']}"
        given = {
            name: self._local(str(v)) for name, v in self._services[service].get("environment", {}).items()
        }
        image = {
            "PATH": path,
            "HOME": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
            "HF_HUB_OFFLINE": "1",
        }
        return {**image, **given, "PGHOST": self._database_host, _MARK: self._mark}

    def stop(self) -> None:
        """Kill every process that was started here, and theirs."""
        deadline = time.monotonic() + 20
        while ours := [process for process in psutil.process_iter() if self._is_ours(process)]:
            assert time.monotonic() < deadline, f"these live on: {ours}"
            for process in ours:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=2)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Return when `condition` holds; fail after `seconds`, with what the services said."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        """The output of the services that were started."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')}" for log in logs)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get(_MARK) == self._mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _finish(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60
        )

    def _command(self, service: str, arguments: tuple[str, ...]) -> list[str]:
        found = self._services[service]
        if arguments:
            found = {**found, "command": list(arguments)}
        return [*self._here_all(words(found)), *_own_ports(found)]

    def _here_all(self, texts: list[str]) -> list[str]:
        return [self._local(text) for text in texts]

    def _local(self, text: str) -> str:
        for there, here in self._here.items():
            text = text.replace(there, here)
        return text


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
