"""The job file: strict YAML in, a frozen :class:`JobSpec` out, or one sentence that says what to mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from harp_batch.errors import JobError
from harp_batch.job.overrides import apply_limit, apply_override, expand_shorthand
from harp_batch.job.problems import Origins, checking_error, reading_error
from harp_batch.job.reader import YamlProblem, read_yaml
from harp_batch.job.spec import (
    ClusterSpec,
    GenerationSpec,
    GreedySpec,
    HarpSpec,
    JobSpec,
    MethodSpec,
    ModelSpec,
    TaskSpec,
)

__all__ = [
    "ClusterSpec",
    "GenerationSpec",
    "GreedySpec",
    "HarpSpec",
    "JobSpec",
    "MethodSpec",
    "ModelSpec",
    "TaskSpec",
    "load_job",
    "parse_job",
]

MAX_BYTES = 1 << 20


def load_job(path: str | Path, overrides: Sequence[str] = (), limit: int | None = None) -> JobSpec:
    """The job in the file ``path``, changed by ``overrides`` (``a.b.0.c=VALUE``) and every task's ``limit``.

    Raises :class:`~harp_batch.errors.JobError`.
    """
    return parse_job(_read_file(Path(path)), str(path), overrides, limit)


def parse_job(
    text: str, source: str = "job", overrides: Sequence[str] = (), limit: int | None = None
) -> JobSpec:
    """The job that ``text`` holds; ``source`` names it in errors.

    Raises :class:`~harp_batch.errors.JobError`.
    """
    try:
        document = read_yaml(text)
    except YamlProblem as problem:
        raise reading_error(source, problem) from problem
    job, origins = document.value, Origins(source, document.lines)
    if job is None:
        raise JobError(f"{source}: the job is empty; it needs at least name, models, tasks and methods")
    expand_shorthand(job)
    for override in overrides:
        apply_override(job, override, origins)
    if limit is not None:
        apply_limit(job, limit, origins)
    try:
        return JobSpec.model_validate(job).with_origins(origins)
    except ValidationError as error:
        raise checking_error(error, job, origins) from error


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except IsADirectoryError:
        raise JobError(f"{path}: this is a directory; name the job file inside it") from None
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise JobError(f"{path}: a job file has at most 1 MiB; is this the right file?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
