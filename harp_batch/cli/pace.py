"""From snapshots of a run to what people want to see of each evaluation: speed, accuracy, time left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harp_batch.cli import numbers

if TYPE_CHECKING:
    from harp_batch.service.progress import EvaluationProgress, Progress


@dataclass(frozen=True, slots=True)
class Line:
    """One evaluation at one moment; ``None`` means undefined so far."""

    label: str
    done: int
    total: int
    errors: int
    accuracy: float | None  # of the answers with a yes-or-no metric
    tokens_per_second: float | None  # of this session
    hesitation_rate: float | None  # and for methods that do not know hesitation
    seconds_left: float | None

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    @property
    def facts(self) -> list[str]:
        """What is known, in words; what is undefined is left out."""
        known = [
            (self.seconds_left is not None, f"{numbers.duration(self.seconds_left)} left"),
            (self.errors > 0, f"{self.errors} error{'s' * (self.errors != 1)}"),
            (self.accuracy is not None, f"{numbers.percent(self.accuracy)} right"),
            (self.tokens_per_second is not None, f"{numbers.rate(self.tokens_per_second)} tokens/s"),
            (self.hesitation_rate is not None, f"hesitates at {numbers.percent(self.hesitation_rate)}"),
        ]
        return [text for shown, text in known if shown]

    def __str__(self) -> str:
        return ", ".join([f"{self.label}: {self.done}/{self.total}", *self.facts])


@dataclass(slots=True)
class _Span:
    """When this session worked on an evaluation, in seconds since the run's session began."""

    begin: float
    end: float
    done_before: int  # answers that an earlier session committed


class Pace:
    """Remembers when each evaluation began, so that its speed does not count the others' time."""

    def __init__(self) -> None:
        self._spans: dict[int, _Span] = {}
        self._previous = 0.0

    def lines(self, progress: Progress) -> list[Line]:
        """One line an evaluation, in the run's order."""
        several = len({e.model for e in progress.evaluations}) > 1
        lines = [
            self._line(index, e, progress.seconds, with_model=several)
            for index, e in enumerate(progress.evaluations)
        ]
        self._previous = progress.seconds
        return lines

    def _line(self, index: int, e: EvaluationProgress, now: float, *, with_model: bool) -> Line:
        span = self._span(index, e, now)
        seconds = span.end - span.begin
        fresh = e.done - span.done_before
        return Line(
            label=" · ".join([e.model, e.task, e.method][not with_model :]),
            done=e.done,
            total=e.total,
            errors=e.errors,
            accuracy=_share(e.correct, e.scored),
            tokens_per_second=_share(e.output_tokens, seconds) or None,
            hesitation_rate=_share(e.hesitations, e.traced_tokens) or None,
            seconds_left=(e.total - e.done) * seconds / fresh if fresh and e.done < e.total else None,
        )

    def _span(self, index: int, e: EvaluationProgress, now: float) -> _Span:
        """Work began with the snapshot before the first new token, and ends with the last answer."""
        span = self._spans.setdefault(index, _Span(now, now, e.done))
        if not e.output_tokens and e.done == span.done_before:
            span.begin = span.end = now
        elif e.done < e.total or span.end == span.begin:
            span.begin = min(span.begin, self._previous)
            span.end = now
        return span


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
