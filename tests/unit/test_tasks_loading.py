"""From a task's name to its documents, and what is refused on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from lm_eval.tasks import TaskManager

from harp_batch.errors import TaskError
from harp_batch.tasks import load_task
from harp_batch.tasks.catalogue import LM_EVAL_FOLDER, scan
from harp_batch.tasks.data import needed_splits

GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 9)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARP_BATCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with both splits of gsm8k."""
    put(tmp_path / "gsm8k", "train", GSM8K[:6])
    put(tmp_path / "gsm8k", "test", GSM8K[6:])
    return tmp_path


def message(*arguments: Any, **named: Any) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["arabicmmlu", "gsm8k", "lambada", "mmlu_pro", "commonsense_qa", "glue"])
def test_names_are_those_that_lm_eval_finds(folder: str) -> None:
    manager = TaskManager(include_defaults=False, include_path=LM_EVAL_FOLDER / folder)
    found = scan(LM_EVAL_FOLDER / folder)
    assert sorted(found.tasks) == manager.all_subtasks
    assert sorted(found.groups) == manager.all_groups
    for name, path in found.tasks.items():
        assert (LM_EVAL_FOLDER / folder / path).samefile(manager.task_index[name].yaml_path)


def test_misspelt_name_gets_near_ones() -> None:
    assert "did you mean gsm8k or" in message("gsm8kk")


def test_our_own_tasks_are_suggested_too() -> None:
    assert "demo_arithmetic" in message("demo_arithmetics")


def test_unknown_name_says_how_to_list_them() -> None:
    assert message("zzzzqqqq").endswith("`lm-eval ls tasks` lists them all")


def test_group_names_some_members() -> None:
    assert message("mmlu_pro").endswith("for example mmlu_pro_biology, mmlu_pro_business, mmlu_pro_chemistry")


def test_names_are_remembered() -> None:
    message("gsm8kk")
    started = time.perf_counter()
    message("gsm8kk")
    assert time.perf_counter() - started < 1.0  # reading all the files takes longer, even when they are warm


# -- what is not supported -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("wikitext", "output_type is loglikelihood_rolling"),
        ("humaneval", "runs code that the model wrote"),
        ("squadv2", "is a Python class"),
        ("gsm8k_cot_self_consistency", "asks every document 64 times"),
        ("mmmu_val_art", "needs images or sound"),
    ],
)
def test_unsupported_task_is_refused_by_name(name: str, part: str) -> None:
    text = message(name)
    assert f"task {name!r} is not supported" in text
    assert part in text


def test_task_that_insists_on_zero_examples_says_so() -> None:
    assert "fixes num_fewshot to 0" in message("demo_arithmetic", num_fewshot=3)


# -- data ------------------------------------------------------------------------------------------------------


def test_data_folder_replaces_the_hub(data: Path, offline: None) -> None:
    task = load_task("gsm8k", data_dir=data)
    assert (task.name, task.version, task.num_fewshot, task.metrics) == ("gsm8k", "3.0", 5, ("exact_match",))
    assert [doc["question"] for doc in task.task.eval_docs] == [row["question"] for row in GSM8K[6:]]


def test_number_of_examples_can_be_chosen(data: Path) -> None:
    assert load_task("gsm8k", 2, data).num_fewshot == 2
    assert load_task("gsm8k", 0, str(data)).num_fewshot == 0


def test_config_can_be_stored(data: Path) -> None:
    config = load_task("mmlu_pro_biology", 0, mmlu_pro(data)).config
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert " at 0x" not in json.dumps(config), "an address would differ from run to run"


def test_zero_examples_need_no_training_split(data: Path) -> None:
    (data / "gsm8k" / "train.jsonl").unlink()
    assert load_task("gsm8k", 0, data).num_fewshot == 0
    assert message("gsm8k", data_dir=data) == f"task 'gsm8k' needs train.jsonl in {data / 'gsm8k'}"


def test_missing_splits_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    assert "needs test.jsonl and train.jsonl in" in message("gsm8k", data_dir=tmp_path)


def mmlu_pro(folder: Path) -> Path:
    row = {
        "question": "Which is alive?",
        "options": ["a stone", "a fern"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
    }
    put(folder / "mmlu_pro", "test", [{**row, "category": "biology"}, {**row, "category": "law"}])
    return folder


def test_subjects_share_their_folder(tmp_path: Path) -> None:
    task = load_task("mmlu_pro_biology", 0, mmlu_pro(tmp_path))
    assert [doc["category"] for doc in task.task.eval_docs] == ["biology"]
    assert "needs validation.jsonl" in message("mmlu_pro_biology", data_dir=tmp_path)


def test_our_own_tasks_need_no_data_folder(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_task("demo_arithmetic").task.eval_docs) >= 60
    assert len(load_task("demo_choice", data_dir=tmp_path).task.eval_docs) >= 60


def test_without_network_and_data_the_way_out_is_named(offline: None) -> None:
    started = time.perf_counter()
    text = message("gsm8k")
    assert time.perf_counter() - started < 5.0
    assert "openai/gsm8k is neither in the cache nor can it be fetched" in text
    assert text.endswith("give `--data-dir DIR` with test.jsonl, train.jsonl in DIR/gsm8k")


def test_switch_to_the_cache_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", _unreachable)
    message("gsm8k")
    assert (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError


def test_data_of_another_schema_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "gsm8k", "test", [{"prompt": "What is 1 + 1?"}])
    assert "cannot use its data" in message("gsm8k", 0, tmp_path)


def test_data_that_is_not_json_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "gsm8k", "test", [])
    (tmp_path / "gsm8k" / "test.jsonl").write_text("question,answer\n1,2\n")
    assert "cannot use its data" in message("gsm8k", 0, tmp_path)


def test_loading_is_quiet(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_task("gsm8k", data_dir=data)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("config", "shots", "expected"),
    [
        ({"test_split": "test", "training_split": "train"}, 0, ["test"]),
        ({"test_split": "test", "training_split": "train"}, 5, ["test", "train"]),
        ({"validation_split": "dev", "training_split": "train", "fewshot_split": "x"}, 1, ["dev", "x"]),
        (
            {"test_split": "test", "fewshot_config": {"split": "dev"}, "fewshot_split": "x"},
            1,
            ["test", "dev"],
        ),
        ({"test_split": "test", "fewshot_config": {"samples": [1]}, "training_split": "train"}, 1, ["test"]),
        ({"test_split": "test"}, 2, ["test"]),
    ],
)
def test_needed_splits(config: dict[str, Any], shots: int, expected: list[str]) -> None:
    assert needed_splits(config, shots) == expected
