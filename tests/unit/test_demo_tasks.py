"""The data that harp-batch ships: right, varied and balanced."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import harp_batch

FOLDER = Path(harp_batch.__file__).parent / "eval_tasks"
NUMBER_WORDS = {"friend": 2, "Twelve": 12, "half": 2, "Two": 2, "third": 3}


def definition(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name / f"{name}.yaml").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, Any]]:
    data_file = definition(name)["dataset_kwargs"]["data_files"]["test"]
    lines = (FOLDER / name / data_file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ARITHMETIC, CHOICE = rows("demo_arithmetic"), rows("demo_choice")


@pytest.mark.parametrize("name", ["demo_arithmetic", "demo_choice"])
def test_the_definition_names_its_task_and_a_file_beside_it(name: str):
    task = definition(name)
    assert (task["task"], task["dataset_path"], task["test_split"]) == (name, "json", "test")
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).name == f"{name}.jsonl"


@pytest.mark.parametrize("data", [ARITHMETIC, CHOICE], ids=["demo_arithmetic", "demo_choice"])
def test_there_are_enough_different_questions(data: list[dict[str, Any]]):
    questions = [row["question"] for row in data]
    assert len(questions) >= 60
    assert len(set(questions)) == len(questions)
    assert all(question.endswith("?") for question in questions)


@pytest.mark.parametrize("row", ARITHMETIC, ids=lambda row: row["expression"])
def test_the_answer_is_what_the_expression_gives(row: dict[str, Any]):
    assert re.fullmatch(r"[0-9 +*/()-]+", row["expression"])
    assert eval(row["expression"]) == row["answer"]  # noqa: S307 - digits and operators only, checked above
    assert isinstance(row["answer"], int)
    assert row["answer"] > 0


@pytest.mark.parametrize("row", ARITHMETIC, ids=lambda row: row["expression"])
def test_the_expression_uses_the_questions_numbers(row: dict[str, Any]):
    """Every number of the expression is told in the question, as digits or in a word."""
    told = {int(number) for number in re.findall(r"[0-9]+", row["question"])}
    told |= {number for word, number in NUMBER_WORDS.items() if word in row["question"]}
    assert {int(number) for number in re.findall(r"[0-9]+", row["expression"])} <= told


def test_the_filter_takes_the_last_number():
    filters = {step["function"]: step for step in definition("demo_arithmetic")["filter_list"][0]["filter"]}
    pattern, last = filters["regex"]["regex_pattern"], filters["regex"]["group_select"]
    assert re.findall(pattern, "3 apples and 4 more: 3 + 4 = 1,007.")[last] == "1,007"
    assert re.findall(pattern, "It fell to -5 degrees")[last] == "-5"


@pytest.mark.parametrize("row", CHOICE, ids=lambda row: row["question"])
def test_four_different_options_one_of_them_right(row: dict[str, Any]):
    assert len(set(row["options"])) == 4
    assert 0 <= row["answer"] < 4
    assert all(option and option == option.strip() for option in row["options"])


def test_right_options_are_spread_evenly():
    assert set(Counter(row["answer"] for row in CHOICE).values()) == {len(CHOICE) // 4}
    # a model that always takes the longest option must not look clever
    longest = sum(max(row["options"], key=len) == row["options"][row["answer"]] for row in CHOICE)
    assert longest < len(CHOICE) / 2
