"""Progress: what is shown of a run, from plain snapshots."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from harp_batch.cli.pace import Line, Pace
from harp_batch.cli.progress import LiveBars, PlainLines, ProgressReport, bars
from harp_batch.records import RunStatus
from harp_batch.service.progress import EvaluationProgress, Progress
from harp_batch.store import RunSummary


def evaluation(
    method: str = "greedy", *, model: str = "m", total: int = 10, **counts: int
) -> EvaluationProgress:
    return EvaluationProgress(model=model, task="t", method=method, total=total, **counts)


def lines_after(*snapshots: Progress) -> list[Line]:
    pace = Pace()
    return [pace.lines(snapshot) for snapshot in snapshots][-1]


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Remembered:
    """A display that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[Line] = []

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    phase = say

    def show(self, lines: list[Line]) -> None:
        self.shown = lines


def test_nothing_is_claimed_before_the_first_answer() -> None:
    (line,) = lines_after(Progress((evaluation(),), 0.0), Progress((evaluation(),), 30.0))
    assert str(line) == "t · greedy: 0/10"


def test_speed_and_time_left_count_from_the_snapshot_before_the_first_token() -> None:
    (line,) = lines_after(
        Progress((evaluation(),), 20.0),  # the model was loading
        Progress((evaluation(done=4, output_tokens=200),), 24.0),
    )
    assert line.tokens_per_second == pytest.approx(50.0)
    assert line.seconds_left == pytest.approx(6.0)


def test_a_complete_evaluation_keeps_its_speed() -> None:
    ended = evaluation(done=10, output_tokens=100)
    (line,) = lines_after(
        Progress((evaluation(),), 0.0),
        Progress((ended,), 5.0),
        Progress((ended,), 50.0),
        Progress((ended,), 99.0),
    )
    assert line.tokens_per_second == pytest.approx(20.0)
    assert line.seconds_left is None


def test_a_later_evaluation_does_not_pay_for_the_earlier() -> None:
    first = evaluation(done=10, output_tokens=100)
    _, line = lines_after(
        Progress((evaluation(), evaluation("harp")), 0.0),
        Progress((first, evaluation("harp")), 10.0),
        Progress((first, evaluation("harp", done=1, output_tokens=30)), 13.0),
    )
    assert line.tokens_per_second == pytest.approx(10.0)
    assert line.seconds_left == pytest.approx(27.0)


def test_answers_of_an_earlier_session_are_no_speed() -> None:
    (line,) = lines_after(
        Progress((evaluation(done=8),), 0.0), Progress((evaluation(done=9, output_tokens=5),), 2.0)
    )
    assert line.seconds_left == pytest.approx(2.0)


def test_facts_of_a_line() -> None:
    (line,) = lines_after(
        Progress((evaluation("harp"),), 0.0),
        Progress(
            (
                evaluation(
                    "harp",
                    done=5,
                    errors=1,
                    scored=4,
                    correct=3,
                    output_tokens=50,
                    traced_tokens=50,
                    hesitations=20,
                ),
            ),
            10.0,
        ),
    )
    assert str(line) == ("t · harp: 5/10, 10 s left, 1 error, 75.0% right, 5.0 tokens/s, hesitates at 40.0%")


def test_the_model_is_named_where_there_are_several() -> None:
    snapshot = Progress((evaluation(model="a"), evaluation(model="b")), 1.0)
    assert [line.label for line in lines_after(snapshot)] == ["a · t · greedy", "b · t · greedy"]


def test_each_end_is_said_once() -> None:
    screen = Remembered()
    report = ProgressReport(screen)
    for seconds, done in enumerate([0, 10, 10, 10]):
        report.progress(
            Progress((evaluation(done=done, output_tokens=done), evaluation("harp")), float(seconds))
        )
    assert screen.said == ["done: t · greedy: 10/10, 10.0 tokens/s"]
    assert [line.label for line in screen.shown] == ["t · harp"]


def test_the_start_says_what_is_left() -> None:
    screen = Remembered()
    now = datetime.now(UTC)
    ProgressReport(screen).started(
        RunSummary("abc", "demo", RunStatus.RUNNING, now, None, 4, 100, 40, 0, None)
    )
    assert screen.said == ["run demo (abc): 4 evaluations, 60 of 100 answers to go"]


def test_plain_lines_come_every_ten_seconds_and_only_of_what_moves() -> None:
    clock, stream = FakeClock(), io.StringIO()
    waiting = Line("t · harp", 0, 10, 0, None, None, None, None)
    moving = Line("t · greedy", 1, 10, 0, None, 5.0, None, 9.0)
    with PlainLines(stream, clock) as screen:
        for clock.now in [0.0, 4.0, 9.9, 10.0, 10.1, 19.0, 20.5]:
            screen.show([moving, waiting])
    assert stream.getvalue().splitlines() == ["t · greedy: 1/10, 9 s left, 5.0 tokens/s"] * 2


def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_bars_show_count_and_facts() -> None:
    terminal = console()
    terminal.print(bars([Line("t · greedy", 3, 12, 2, 0.5, 73.25, None, 125.0)]))
    shown = terminal.file.getvalue()
    for text in ("t · greedy", "3/12", "50.0% right", "73.2 tokens/s", "2 errors", "2 min 05 s left"):
        assert text in shown


def test_live_bars_keep_lasting_lines_and_say_how_many_more_there_are() -> None:
    terminal = console()
    with LiveBars(terminal) as screen:
        screen.say("a lasting [line]")
        screen.phase("decoding with m")
        screen.show([Line(f"t{n}", 0, 10, 0, None, None, None, None) for n in range(11)])
    shown = terminal.file.getvalue()
    assert "a lasting [line]" in shown
    assert "and 3 more evaluations" in shown
    assert "decoding with m" in shown
