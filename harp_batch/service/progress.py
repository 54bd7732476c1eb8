"""How far a run is, in plain values that the command line (or a notebook) renders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from harp_batch.records import Answer, Evaluation

if TYPE_CHECKING:
    from harp_batch.store import RunSummary


@dataclass(frozen=True, slots=True)
class EvaluationProgress:
    """One evaluation: ``done`` counts answers ever committed, tokens count those of this session."""

    model: str
    task: str
    method: str
    total: int  # answers that make it complete
    done: int = 0
    errors: int = 0  # of the done ones
    scored: int = 0  # of the done ones, those with a yes-or-no metric
    correct: int = 0  # of the scored ones
    output_tokens: int = 0  # generated or scored since this session started
    traced_tokens: int = 0
    hesitations: int = 0  # of the traced ones

    def plus(self, answer: Answer) -> EvaluationProgress:
        """The same, one newly decoded answer further."""
        return replace(
            self.known(answer),
            output_tokens=self.output_tokens + len(answer.trace),
            traced_tokens=self.traced_tokens + len(answer.trace),
            hesitations=self.hesitations + sum(answer.trace.hesitated),
        )

    def known(self, answer: Answer) -> EvaluationProgress:
        """The same, one answer further that an earlier session committed."""
        return replace(
            self,
            done=self.done + 1,
            errors=self.errors + (answer.error is not None),
            scored=self.scored + (answer.correct is not None),
            correct=self.correct + (answer.correct is True),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """A whole run at one moment; evaluations in job order."""

    evaluations: tuple[EvaluationProgress, ...]
    seconds: float = 0.0  # since this session began to decode
    actors: int = 0  # alive now


class Observer(Protocol):
    """Who wants to know what a run does; called from the driver's own thread."""

    def started(self, run: RunSummary) -> None:
        """The run exists in the database."""

    def phase(self, text: str) -> None:
        """What happens now, in a few words."""

    def note(self, text: str) -> None:
        """Something went wrong that the run survives: an actor was lost, the database is away."""

    def progress(self, progress: Progress) -> None:
        """Answers were committed, or some time has passed."""

    def finished(self, run: RunSummary) -> None:
        """The run ended; its status says how."""


class Silent:
    """An observer that does not care."""

    def started(self, run: RunSummary) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def finished(self, run: RunSummary) -> None:
        pass


class Tally:
    """Adds up answers into the progress of a run."""

    def __init__(self, evaluations: Iterable[Evaluation]) -> None:
        self._by_id = {
            e.id: EvaluationProgress(model=e.model, task=e.task, method=e.method, total=e.requests)
            for e in evaluations
        }

    def remember(self, answers: Iterable[Answer]) -> None:
        """Count answers of an earlier session."""
        for answer in answers:
            self._by_id[answer.evaluation_id] = self._by_id[answer.evaluation_id].known(answer)

    def add(self, answers: Iterable[Answer]) -> None:
        """Count answers that were decoded and committed now."""
        for answer in answers:
            self._by_id[answer.evaluation_id] = self._by_id[answer.evaluation_id].plus(answer)

    def progress(self, seconds: float, actors: int) -> Progress:
        """The run as it stands."""
        return Progress(tuple(self._by_id.values()), seconds, actors)
