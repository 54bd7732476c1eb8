"""Documents become requests: prompts, ids, stop strings, targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harp_batch.errors import TaskError
from harp_batch.records import RequestKind
from harp_batch.tasks import LoadedTask, load_task
from harp_batch.tasks.tokens import Tokens, generation_limits
from tests.support.model_files import tiny_tokenizer

GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 13)]
LAMBADA = [{"text": f"The cat saw the dog, and the dog saw number {n} of the cats"} for n in range(3)]
CSQA = {
    "question": "What barks?",
    "choices": {"label": list("ABCDE"), "text": ["a cat", "a dog", "a tree", "a car", "a fish"]},
    "answerKey": "B",
}
WINOGRANDE = [
    {"sentence": "The cat saw the dog, and the _ ran.", "option1": "cat", "option2": "dog", "answer": "2"}
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    splits = {
        "gsm8k/train": GSM8K[:8],
        "gsm8k/test": GSM8K[8:],
        "lambada_openai/test": LAMBADA,
        "winogrande/validation": WINOGRANDE,
        "commonsense_qa/train": [CSQA, {**CSQA, "question": "What swims?", "answerKey": "E"}],
        "commonsense_qa/validation": [{**CSQA, "question": "What drives?", "answerKey": "D"}] * 2,
    }
    for name, rows in splits.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def gsm8k(data: Path) -> LoadedTask:
    return load_task("gsm8k", 2, data)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


# -- generation ------------------------------------------------------------------------------------------------


def test_prompt_without_template_is_the_task_text(data: Path, tokenizer: Any) -> None:
    (first, *_) = load_task("gsm8k", 0, data).build_requests(tokenizer, chat_template=False)
    assert first.prompt == "Question: What is 9 + 9?\nAnswer:"
    assert first.prompt_ids == tuple(tokenizer.encode(first.prompt))
    assert (first.kind, first.doc_id, first.repeat, first.choices) == (RequestKind.GENERATE, 0, 0, ())
    assert first.target == GSM8K[8]["answer"]
    assert first.doc == GSM8K[8]


def test_examples_are_turns_of_the_conversation(gsm8k: LoadedTask, tokenizer: Any) -> None:
    (first, *_) = gsm8k.build_requests(tokenizer, chat_template=True)
    assert first.prompt.count("<|im_start|>user\nQuestion: ") == 3
    assert first.prompt.count("<|im_start|>assistant\n") == 3
    assert first.prompt.endswith("Question: What is 9 + 9?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(first.prompt_ids) == first.prompt, (
        "the template's own tokens, not added once more"
    )


def test_requests_are_the_same_every_time(gsm8k: LoadedTask, data: Path, tokenizer: Any) -> None:
    requests = gsm8k.build_requests(tokenizer, chat_template=True)
    assert gsm8k.build_requests(tokenizer, chat_template=True) == requests
    assert load_task("gsm8k", 2, data).build_requests(tokenizer, chat_template=True) == requests


def test_limit_takes_the_first_documents(gsm8k: LoadedTask, tokenizer: Any) -> None:
    requests = gsm8k.build_requests(tokenizer, chat_template=True)
    assert [request.doc_id for request in requests] == [0, 1, 2, 3]
    assert gsm8k.build_requests(tokenizer, chat_template=True, limit=2) == requests[:2]
    assert gsm8k.build_requests(tokenizer, chat_template=True, limit=99) == requests


def test_end_of_sequence_is_a_stop_string(gsm8k: LoadedTask, tokenizer: Any) -> None:
    (first, *_) = gsm8k.build_requests(tokenizer, chat_template=True)
    assert first.stop == ("Question:", "</s>", "<|im_end|>")


def test_job_replaces_the_limit_of_new_tokens(gsm8k: LoadedTask, tokenizer: Any) -> None:
    assert gsm8k.build_requests(tokenizer, chat_template=True)[0].max_new_tokens == 256
    assert gsm8k.build_requests(tokenizer, chat_template=True, max_new_tokens=7)[0].max_new_tokens == 7


def test_missing_chat_template_is_said(gsm8k: LoadedTask) -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(TaskError, match="the model has no chat template; set `chat_template: false`"):
        gsm8k.build_requests(bare, chat_template=True)


def test_template_without_system_role_loses_the_system_text(data: Path) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['content'] }}]{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    assert Tokens(strict).apply_chat_template(messages) == "[the cat]"


def test_too_few_examples_are_said_in_one_sentence(data: Path, tokenizer: Any) -> None:
    sentence = r"^task 'gsm8k' cannot make prompts with 99 examples \(ValueError: [^\n]*$"
    with pytest.raises(TaskError, match=sentence):
        load_task("gsm8k", 99, data).build_requests(tokenizer, chat_template=True)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ([], 256)),
        ({"until": "\n"}, (["\n"], 256)),
        ({"until": ["a", "b"], "max_gen_toks": 8}, (["a", "b"], 8)),
        ({"until": [], "max_new_tokens": 9, "do_sample": True, "temperature": 0.7}, ([], 9)),
    ],
)
def test_generation_limits(kwargs: dict[str, Any], expected: tuple[list[str], int]) -> None:
    assert generation_limits(kwargs) == expected


# -- log-likelihoods -------------------------------------------------------------------------------------------


def test_lambada_asks_for_the_last_word(data: Path, tokenizer: Any) -> None:
    requests = load_task("lambada_openai", None, data).build_requests(tokenizer, chat_template=False)
    assert len(requests) == len(LAMBADA)
    (choice,) = requests[0].choices
    assert (requests[0].kind, requests[0].prompt_ids, requests[0].stop) == (RequestKind.LOGLIKELIHOOD, (), ())
    assert requests[0].prompt == LAMBADA[0]["text"].removesuffix(" cats")
    assert (choice.continuation, requests[0].target) == (" cats", " cats")
    assert choice.context_ids == tuple(tokenizer.encode(requests[0].prompt))
    assert tokenizer.decode(choice.continuation_ids) == " cats"


def test_every_choice_is_scored(data: Path, tokenizer: Any) -> None:
    (first, _) = load_task("commonsense_qa", 1, data).build_requests(tokenizer, chat_template=False)
    assert [choice.continuation for choice in first.choices] == [" A", " B", " C", " D", " E"]
    assert {choice.context_ids for choice in first.choices} == {tuple(tokenizer.encode(first.prompt))}
    assert first.prompt.count("Question: ") == 2
    assert first.target == "D"


def test_choices_may_have_contexts_of_their_own(data: Path, tokenizer: Any) -> None:
    (first,) = load_task("winogrande", 0, data).build_requests(tokenizer, chat_template=False)
    contexts = [tokenizer.decode(choice.context_ids) for choice in first.choices]
    assert contexts == ["The cat saw the dog, and the cat", "The cat saw the dog, and the dog"]
    assert [choice.continuation for choice in first.choices] == [" ran.", " ran."]
    assert (first.prompt, first.target) == (contexts[0], contexts[1])


def test_index_as_target_becomes_the_choice(tokenizer: Any) -> None:
    task = load_task("demo_choice")
    for request in task.build_requests(tokenizer, chat_template=False, limit=5):
        assert request.target in [choice.continuation.strip() for choice in request.choices]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("the cat", " and", ("the cat", " and")),
        ("the cat ", "and", ("the cat", " and")),  # a blank belongs to the word after it
        ("the\n\n", "dog", ("the", "\n\ndog")),
        ("", "the dog", ("<|im_start|>", "the dog")),  # nothing to condition on
    ],
)
def test_blanks_and_empty_contexts(
    tokenizer: Any, context: str, continuation: str, expected: tuple[str, str]
) -> None:
    from lm_eval.api.instance import Instance

    instance = Instance("loglikelihood", {}, (context, continuation), 0)
    ((context_ids, continuation_ids),) = Tokens(tokenizer).pairs([instance])
    assert (tokenizer.decode(context_ids), tokenizer.decode(continuation_ids)) == expected


def test_requests_can_be_stored(data: Path, tokenizer: Any) -> None:
    for name in ("gsm8k", "lambada_openai", "commonsense_qa"):
        for request in load_task(name, 0, data).build_requests(tokenizer, chat_template=False):
            assert json.loads(json.dumps(request.doc, allow_nan=False)) == request.doc


def test_building_is_quiet(gsm8k: LoadedTask, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    gsm8k.build_requests(tokenizer, chat_template=True)
    assert capfd.readouterr() == ("", "")
