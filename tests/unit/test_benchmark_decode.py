"""The benchmark's arithmetic and tables, and all of it once over a tiny model with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode
from benchmarks.decoding import generation, limits, loops
from benchmarks.decoding.drive import Steps, answer_all, to_continue
from benchmarks.decoding.options import MODEL, RANDOM_SIZES, WHOLE, parse
from benchmarks.decoding.report import Part, Ratio, as_json, as_markdown, as_text, best, quotient, value_of
from benchmarks.decoding.subjects import random_model, without_stops
from benchmarks.decoding.turns import Contender, Figure, Made, NotRun, take_turns
from harp_batch.decode import Engine, Greedy, Harp

PROMPTS = [[7 * i + j for j in range(3 + i)] for i in range(4)]
FIGURE = Figure("ours", "tokens/s", "4 prompts", (30.0, 10.0, 20.0), 0.25)
REFUSED = Figure("theirs", "tokens/s", "4 prompts", (), missing="needs | a GPU")
PART = Part(
    "Generation",
    {"prompts": 4},
    (FIGURE, REFUSED),
    (Ratio("without goal", 2.0), Ratio("ours / plain", 41.234, 40.0), Ratio("ours / theirs", None, 2.0)),
    ("A note.",),
)


@pytest.fixture(scope="module")
def tiny() -> Callable[[], Any]:
    return lambda: without_stops(random_model("tiny", "float32", "cpu"))


# -- turns ------------------------------------------------------------------------------------------------


def contender(name: str, order: list[str], rounds: int, seconds: float) -> Contender:
    def run() -> Made:
        order.append(name)
        return Made(10, hesitations=4 if name == "harp" else None, seconds=seconds * len(order))

    return Contender(name, run, rounds, "work")


def test_contenders_alternate_and_slow_ones_drop_out() -> None:
    order: list[str] = []
    take_turns([contender("a", order, 3, 1.0), contender("b", order, 1, 1.0), contender("c", order, 2, 1.0)])
    assert order == ["a", "b", "c", "a", "c", "a"]


def test_a_figure_is_the_median_of_its_rounds() -> None:
    (figure,) = take_turns([contender("harp", [], 3, 0.5)])
    assert figure.rounds == (20.0, 10.0, pytest.approx(10 / 1.5))
    assert figure.value == 10.0
    assert figure.hesitation_rate == 0.4


def test_who_cannot_run_is_asked_once_and_says_why() -> None:
    asked = []

    def refuse() -> Made:
        asked.append(1)
        raise NotRun("no such device\nat line 3")

    (figure,) = take_turns([Contender("theirs", refuse, 3, "work")])
    assert (figure.value, figure.rounds, figure.missing) == (None, (), "no such device")
    assert len(asked) == 1


def test_failed_generate_batch_is_not_run_in_its_own_words() -> None:
    class Broken:
        device = torch.device("cpu")

        def generate_batch(self, *_: object, **__: object) -> None:
            raise RuntimeError("no paged attention here")

    with pytest.raises(NotRun, match="RuntimeError: no paged attention here"):
        loops.generate_batch(Broken(), PROMPTS, 2)


# -- ratios and tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "goal", "at_most", "verdict"),
    [
        (2.0, 2.0, False, "yes"),
        (1.99, 2.0, False, "no"),
        (2.0, 2.0, True, "yes"),
        (2.01, 2.0, True, "no"),
        (None, 2.0, False, "undefined"),
        (5.0, None, False, ""),
    ],
)
def test_verdict(value: float | None, goal: float | None, at_most: bool, verdict: str) -> None:
    assert Ratio("x", value, goal, at_most).verdict == verdict


def test_what_did_not_run_gives_no_ratio() -> None:
    assert quotient(6.0, 3.0) == 2.0
    assert quotient(None, 3.0) is None
    assert quotient(6.0, None) is None
    assert quotient(6.0, 0.0) is None
    assert best([FIGURE, REFUSED]) == 20.0
    assert best([REFUSED]) is None
    assert value_of([FIGURE], "nobody") is None


def test_markdown_has_goals_first_and_every_contender() -> None:
    assert as_markdown({"cores": 2}, [PART], "Beware.") == (
        "cores 2\n\nBeware.\n\n"
        "| ratio | measured | goal | reached |\n| --- | --- | --- | --- |\n"
        "| ours / plain | 41.23 | at least 40 | yes |\n"
        "| ours / theirs | not run | at least 2 | undefined |\n"
        "| without goal | 2.00 |  |  |\n\n"
        "### Generation\n\nprompts 4\n\n"
        "| contender | median | unit | of rounds | work | hesitation rate |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| ours | 20 | tokens/s | 30, 10, 20 | 4 prompts | 0.250 |\n"
        "| theirs |  | tokens/s |  | not run: needs \\| a GPU |  |\n\n"
        "A note.\n"
    )


def test_text_has_the_same_rows() -> None:
    lines = as_text({"cores": 2}, [PART], "Beware.").splitlines()
    assert "ours       20      tokens/s  30, 10, 20  4 prompts               0.250" in lines
    assert lines.index("Beware.") < lines.index("ours / plain   41.23     at least 40  yes")


def test_json_keeps_every_round() -> None:
    part = as_json({"cores": 2}, [PART], "")["parts"][0]
    assert part["figures"][0]["rounds"] == [30.0, 10.0, 20.0]
    assert part["figures"][1]["not_run"] == "needs | a GPU"
    assert part["ratios"][1] == {"name": "ours / plain", "value": 41.234, "at_least": 40.0, "reached": "yes"}


# -- the work itself --------------------------------------------------------------------------------------


def test_slow_contenders_get_prompts_of_median_length() -> None:
    assert generation.median_prompts([[1] * n for n in (9, 1, 5, 4, 7)], 1) == [2]
    assert generation.median_prompts([[1] * n for n in (9, 1, 5, 4, 7)], 3) == [3, 2, 4]
    assert sorted(generation.median_prompts(PROMPTS, 9)) == [0, 1, 2, 3]


def test_full_decode_steps_lie_between_the_last_prompt_and_the_first_answer() -> None:
    # 12 tokens each; the first prompts end in step 1 and their answers in step 12, the last ones two steps later.
    finished = (0,) * 11 + (2, 0, 1)
    steps = Steps(tuple(float(i * i) for i in range(15)), finished)
    assert limits.full_decode_steps(steps, 12) == range(6, 11)  # 4..12 without two at both ends
    assert steps.seconds(4) == 16 - 9
    assert steps.mean_finish == pytest.approx((12 + 12 + 14) / 3)
    with pytest.raises(NotRun, match="--new-tokens"):
        limits.full_decode_steps(Steps((0.0,) * 6, (0, 0, 1, 0, 1)), 3)


def test_full_decode_steps_hold_one_row_of_every_sequence(tiny: Callable[[], Any]) -> None:
    model = tiny()
    rows: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    engine = Engine(model, slots=8)
    rows.clear()
    prompts = [list(range(200)) for _ in range(8)]  # more than one step takes
    _, steps = answer_all(engine, to_continue(prompts, 16), Greedy())
    window = limits.full_decode_steps(steps, 16)
    last_prompt = max(number for number, count in enumerate(rows, 1) if count > 8)
    assert {rows[number - 1] for number in window} == {8}
    # Two steps are trimmed, and up to three more go where outcomes come late or take a step to themselves.
    assert last_prompt < window.start <= last_prompt + 5
    handed_over = sum(count > 0 for count in steps.finished)  # calls that may run no forward
    assert 0 <= len(steps.finished) - len(rows) <= handed_over


def test_kv_bytes_per_position_is_what_transformers_keeps(tiny: Callable[[], Any]) -> None:
    model = tiny()
    cache = model(torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert limits.kv_bytes_per_position(model) * 5 == kept


@pytest.mark.parametrize("method", [Greedy(), Harp(theta=6.0)], ids=["greedy", "harp"])
def test_plain_loop_does_what_the_engine_does(tiny: Callable[[], Any], method: Greedy | Harp) -> None:
    keys = [f"key-{i}" for i in range(len(PROMPTS))]
    harp = method if isinstance(method, Harp) else None
    completions = Engine(tiny()).generate(PROMPTS, method=method, max_new_tokens=8, request_keys=keys)
    model = tiny()
    done = [loops.plain(model, prompt, key, 8, harp) for prompt, key in zip(PROMPTS, keys, strict=True)]
    assert [tuple(tokens) for tokens, _ in done] == [c.token_ids for c in completions]
    assert [n for _, n in done] == [sum(c.trace.hesitated) for c in completions]
    hesitations = sum(n for _, n in done)
    assert 0 < hesitations < 32 if harp else hesitations == 0


def test_generate_continues_left_padded_prompts(tiny: Callable[[], Any]) -> None:
    assert loops.generate(tiny(), PROMPTS, 3, 5).units == 20
    ids, mask = loops._left_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# -- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--random tiny --only submit", "generation and limits only"),
        ("--random tiny --quick", "leave one of them out"),
        ("--prompts 0", "must be 1 or more"),
        ("--only nothing", "invalid choice"),
    ],
)
def test_senseless_options_are_refused(line: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("", line.split())
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_goals_are_for_the_whole_workload_alone(tmp_path: Path) -> None:
    whole = parse("", ["--data-dir", str(tmp_path)])
    assert (whole.sizes, whole.model, whole.caveat) == (WHOLE, MODEL, "")
    assert parse("", ["--random", "llama-8b"]).caveat == ""
    for line in ("--rounds 1", "--quick", "--dtype bfloat16", "--random tiny", "--batches 8,16"):
        assert parse("", ["--data-dir", str(tmp_path), *line.split()]).caveat, line
    assert parse("", ["--batches", "8,16"]).sizes.batches == (8, 16)
    assert parse("", ["--only", "limits", "--only", "generation"]).parts == ("generation", "limits")


def test_prompts_that_are_not_there_end_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        decode.main(["--only", "generation", "--model", str(tmp_path), "--device", "cpu"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_whole_benchmark_over_a_tiny_random_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"json": tmp_path / "found.json", "markdown": tmp_path / "found.md"}
    decode.main(
        ["--random", "tiny", "--device", "cpu", *(f"--{kind}={file}" for kind, file in files.items())]
    )
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    figures = {f["name"]: f for part in found["parts"] for f in part["figures"]}
    assert [part["title"] for part in found["parts"]] == ["Generation", "Limits"]
    assert all(f["median"] > 0 for f in figures.values()), figures
    assert {"transformers generate_batch", "harp-batch, HARP step"} <= set(figures)
    steps = RANDOM_SIZES["tiny"].prompts * RANDOM_SIZES["tiny"].new_tokens
    rate = figures["harp-batch, HARP sequence"]["hesitation_rate"]
    assert rate * steps == pytest.approx(round(rate * steps))
    assert 0.1 <= rate <= 0.3  # θ was set for 0.2
    assert all(ratio["value"] > 0 for part in found["parts"] for ratio in part["ratios"])
    assert "at most 1.35" in files["markdown"].read_text(encoding="utf-8")
    assert "The goals are for the whole workload" in capsys.readouterr().out
