"""lm-eval's instances -> one request per document."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from harp_batch.errors import TaskError
from harp_batch.records import Choice, Request, RequestKind
from harp_batch.tasks.plain import plain
from harp_batch.tasks.problems import DATA_ERRORS, first_line
from harp_batch.tasks.quiet import quiet_lm_eval
from harp_batch.tasks.tokens import Tokenizer, Tokens, generation_limits

_FEWSHOT_SEED = 1234  # lm-eval's; without it the examples change from load to load


def build_requests(
    task: ConfigurableTask,
    name: str,
    tokenizer: Tokenizer,
    *,
    chat_template: bool,
    limit: int | None,
    max_new_tokens: int | None,
) -> tuple[Request, ...]:
    """Return the first `limit` documents (None: all) as requests, with lm-eval's own prompts, byte for byte.

    Raises TaskError where the tokenizer has no chat template but the job wants one, and where lm-eval cannot make
    a prompt of a document.
    """
    if chat_template and not tokenizer.chat_template:
        raise TaskError(f"task {name!r}: the model has no chat template; set `chat_template: false` for it")
    tokens = Tokens(tokenizer)
    try:
        instances = _instances(task, tokens, chat_template=chat_template, limit=limit)
        return tuple(
            _request(task, name, tokens, sorted(group, key=lambda instance: instance.idx), max_new_tokens)
            for _, group in groupby(instances, key=lambda instance: instance.doc_id)
        )
    except DATA_ERRORS as error:
        shots = task.config.num_fewshot
        raise TaskError(
            f"task {name!r} cannot make prompts with {shots} examples ({first_line(error)}); check its data"
        ) from error


def _instances(
    task: ConfigurableTask, tokens: Tokens, *, chat_template: bool, limit: int | None
) -> list[Instance]:
    # All documents draw their examples from one stream of random numbers: start it anew every time.
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with quiet_lm_eval():
        task.build_all_requests(
            limit=limit,
            rank=0,
            world_size=1,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,  # the default of lm-eval's command line
            chat_template=tokens.apply_chat_template if chat_template else None,
        )
    return list(task.instances)


def _request(
    task: ConfigurableTask, name: str, tokens: Tokens, instances: list[Instance], max_new_tokens: int | None
) -> Request:
    first = instances[0]
    prompt = first.args[0]
    common: dict[str, Any] = {
        "task": name,
        "doc_id": first.doc_id,
        "repeat": 0,
        "prompt": prompt,
        "target": _target_text(task, first.doc),
        "doc": plain(first.doc),
    }
    if task.OUTPUT_TYPE != "generate_until":
        choices = _choices(tokens, instances)
        return Request(kind=RequestKind.LOGLIKELIHOOD, prompt_ids=(), choices=choices, **common)
    until, own_limit = generation_limits(first.args[1])
    return Request(
        kind=RequestKind.GENERATE,
        prompt_ids=tokens.prompt_ids(prompt),
        stop=tokens.stop_strings(until),
        max_new_tokens=max_new_tokens or own_limit,
        **common,
    )


def _choices(tokens: Tokens, instances: list[Instance]) -> tuple[Choice, ...]:
    return tuple(
        Choice(context_ids=context, continuation=instance.args[1], continuation_ids=continuation)
        for instance, (context, continuation) in zip(instances, tokens.pairs(instances), strict=True)
    )


def _target_text(task: ConfigurableTask, doc: dict[str, Any]) -> str:
    """Return the right answer for people: a choice's text rather than its index."""
    # Where every choice has a context of its own, lm-eval keeps the index in doc_to_text.
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, list | tuple):
        return " | ".join(_choice_text(task, doc, item) for item in target)
    return _choice_text(task, doc, target)


def _choice_text(task: ConfigurableTask, doc: dict[str, Any], target: Any) -> str:
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(doc)
        return str(choices[target]) if 0 <= target < len(choices) else str(target)
    return str(target)
