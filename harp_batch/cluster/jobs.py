"""Detached runs: a driver as a job of Ray's Jobs API, its log and its end.

Requests go to the cluster's dashboard over HTTP. Nothing here joins the cluster or loads the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import RayError

from harp_batch.errors import ClusterError

JOB_FILE = "job.yaml"  # its name in the driver's working directory
PREFIX = "harp-batch-"  # of a submission id; the run's id follows and, for a run's later jobs, "-2", "-3", …
KNOCK = 5.0  # seconds for a connection to the address
ENDING = 30.0  # seconds for a stopped job to end: Ray kills it after 3 (RAY_JOB_STOP_WAIT_TIME_S)
EXTRA = "pip install 'harp-batch[cluster]'"
# Ray lets these win over the address that it is given.
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Errand:
    """What a driver in the cluster is to do."""

    run_id: str
    arguments: tuple[str, ...]  # of the program harp-batch; whoever can list the cluster's jobs can read them
    db_url: str = field(repr=False)  # may hold a password, and therefore goes through the environment
    job_yaml: str | None = None  # becomes JOB_FILE

    @property
    def entrypoint(self) -> str:
        """The job's shell command; ``exec``, so that signals reach the driver itself."""
        return shlex.join(["exec", "harp-batch", *self.arguments])

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the driver, in Ray's notation.

        Where the cluster is this machine, its ``harp-batch`` may be on no PATH: ours is looked for last.
        """
        scripts = sysconfig.get_path("scripts")
        return {"HARP_BATCH_DB": self.db_url, "PATH": f"${{PATH}}{os.pathsep}{scripts}"}


class Jobs:
    """The jobs of one Ray cluster; every method raises ClusterError where the cluster refuses or does not answer."""

    def __init__(self, address: str | None = None) -> None:
        """``address`` is HOST:6379, the dashboard's http://HOST:8265 or auto; else Ray's variables say it."""
        self.address = address or default_address() or "auto"
        with self._sentences():
            self._client = _connect(self.address)

    def submit(self, errand: Errand) -> str:
        """Start the errand's driver in the cluster; return the job's submission id."""
        with self._sentences(), TemporaryDirectory(prefix=PREFIX) as folder:
            surroundings: dict[str, Any] = {"env_vars": errand.environment}
            if errand.job_yaml is not None:
                Path(folder, JOB_FILE).write_text(errand.job_yaml, encoding="utf-8")
                surroundings["working_dir"] = folder
            submission_id: str = self._client.submit_job(
                entrypoint=errand.entrypoint,
                submission_id=self._free_id(errand.run_id),
                runtime_env=surroundings,
            )
        return submission_id

    def newest(self, run_id: str) -> str | None:
        """The submission id of the last job of the run with that id, or of the one run whose id begins so."""
        with self._sentences():
            found = self._of(run_id)
        if len({_run_of(job.submission_id) for job in found}) != 1:
            return None
        newest: str = max(found, key=lambda job: job.start_time or 0).submission_id
        return newest

    def log(self, job: str) -> str:
        """What the job has written so far."""
        with self._sentences():
            text: str = self._client.get_job_logs(job)
        return text

    def follow(self, job: str, write: Callable[[str], object]) -> None:
        """Hand the job's log to ``write``, piece by piece, until the job ends."""

        async def copy() -> None:
            async for piece in self._client.tail_job_logs(job):
                write(piece)

        with self._sentences():
            asyncio.run(copy())

    def status(self, job: str) -> str:
        """Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        with self._sentences():
            return str(self._client.get_job_status(job))

    def obstacle(self, job: str) -> str | None:
        """What keeps the job's driver from running, or killed it; None where it runs or ended by itself."""
        with self._sentences():
            info = self._client.get_job_info(job)
        if info.status in ("RUNNING", "SUCCEEDED") or info.driver_exit_code is not None:
            return None
        return str(info.message).strip().partition("\n")[0]

    def stop(self, job: str) -> None:
        """Have the job's driver terminated, and wait until it is gone."""
        deadline = time.monotonic() + ENDING
        with self._sentences():
            self._client.stop_job(job)
            while not self._client.get_job_status(job).is_terminal():
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the job {job} at {self.address} does not end; see `ray job status {job}`"
                    )
                time.sleep(0.5)

    def _free_id(self, run_id: str) -> str:
        earlier = len(self._of(run_id))
        return f"{PREFIX}{run_id}-{earlier + 1}" if earlier else f"{PREFIX}{run_id}"

    def _of(self, run_id: str) -> list[Any]:
        """Ray's records of the jobs of runs whose id begins so."""
        jobs = self._client.list_jobs()
        return [job for job in jobs if (job.submission_id or "").startswith(f"{PREFIX}{run_id}")]

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn what Ray's client raises into one sentence."""
        try:
            yield
        except ConnectionError as exc:
            raise ClusterError(
                f"no dashboard of a Ray cluster answers at {self.address} ({_first_line(exc)}); detached runs need a "
                f"cluster whose head was started with `ray start --head` after {EXTRA}"
            ) from exc
        except (RayError, OSError, RuntimeError, ValueError) as exc:
            raise ClusterError(f"the Ray cluster at {self.address} refused: {_first_line(exc)}") from exc


def default_address() -> str | None:
    """The cluster that the environment names."""
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)


def _connect(address: str) -> Any:
    """Ray's client for the jobs of the cluster."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as exc:
        raise ClusterError(
            f"detached runs go through Ray's Jobs API, which is not installed: {EXTRA}"
        ) from exc
    for chatty in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):
        logging.getLogger(f"ray{chatty}").setLevel(logging.ERROR)
    reached = address if address == "auto" else _reach(address)
    with _no_other_address():
        return JobSubmissionClient(reached)


@contextmanager
def _no_other_address() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _reach(address: str) -> str:
    """The address as Ray's client takes it: with ``http://`` where a dashboard answers.

    Raises ConnectionError where nobody listens, for Ray itself would try for long; ClusterError for nonsense.
    """
    host, port = _host_and_port(address)
    connection = HTTPConnection(host, port, timeout=KNOCK)
    try:
        connection.connect()
    except OSError as exc:
        raise ConnectionError(str(exc)) from exc
    with closing(connection):
        return f"http://{address}" if "://" not in address and _speaks_http(connection) else address


def _speaks_http(connection: HTTPConnection) -> bool:
    try:
        connection.request("GET", "/api/version")
        connection.getresponse()
    except (HTTPException, OSError):
        return False
    return True


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        port = None
    if not port or not url.hostname or url.scheme not in ("", "http", "https"):
        raise ClusterError(
            f"{address!r} names no cluster that can take a detached run; it must look like HOST:6379 or "
            "http://HOST:8265, or be auto"
        )
    return url.hostname, port


def _run_of(submission_id: str) -> str:
    return submission_id.removeprefix(PREFIX).partition("-")[0]


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0] or type(exc).__name__
