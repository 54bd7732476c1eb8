"""A benchmark as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from harp_batch.records import Answer, Request
from harp_batch.tasks import building, scoring
from harp_batch.tasks.opening import open_task
from harp_batch.tasks.plain import plain
from harp_batch.tasks.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """An lm-eval task with its documents: makes requests, scores answers, aggregates scores."""

    name: str
    version: str
    num_fewshot: int
    config: dict[str, Any]  # the task's settings as JSON values, for the run's record
    metrics: tuple[str, ...]  # in the task's order
    task: ConfigurableTask

    def build_requests(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: bool,
        limit: int | None = None,
        max_new_tokens: int | None = None,
    ) -> tuple[Request, ...]:
        """Return one request per document, the first `limit` of them; equal arguments give equal requests.

        `max_new_tokens` replaces the task's own limit where it is given. Nothing is truncated: the engine
        says which prompts are too long. Raises TaskError where a chat template is missing.
        """
        return building.build_requests(
            self.task,
            self.name,
            tokenizer,
            chat_template=chat_template,
            limit=limit,
            max_new_tokens=max_new_tokens,
        )

    def score(self, request: Request, answer: Answer) -> tuple[dict[str, Any], bool | None]:
        """Return the document's values by "metric,filter", and whether it is correct: see scoring.score."""
        return scoring.score(self.task, request, answer)

    def aggregate(self, scores: Sequence[dict[str, Any]]) -> dict[str, tuple[float | None, float | None]]:
        """Return (value, standard error) by "metric,filter" over all documents: see scoring.aggregate."""
        return scoring.aggregate(self.task, scores)


def load_task(name: str, num_fewshot: int | None = None, data_dir: str | Path | None = None) -> LoadedTask:
    """Return the lm-eval task `name`, ours included; `num_fewshot` None means the task's own number.

    Its documents come from DATA_DIR/NAME/SPLIT.jsonl where there is such a folder, else from the hub.
    Raises TaskError where the task does not exist, is not supported or its data cannot be had.
    """
    folder = Path(data_dir).expanduser() if data_dir is not None else None
    task = open_task(name, num_fewshot, folder)
    config = plain(task.config.to_dict(keep_callable=True))
    config.get("metadata", {}).pop("config_source", None)
    return LoadedTask(
        name, str(task.VERSION), task.config.num_fewshot, config, tuple(task.aggregation()), task
    )
