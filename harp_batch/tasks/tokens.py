"""Text -> token ids by the rules of lm-eval's `hf` model, without a model.

Where special tokens go, what stands for an empty context and to which side a blank belongs all change the
scores, so lm-eval's own code decides wherever it can be reached without loading weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs

Pair = tuple[tuple[int, ...], tuple[int, ...]]
_DEFAULT_MAX_GEN_TOKS = 256  # lm-eval's, for tasks that name none


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that making requests needs."""

    eos_token_id: int
    bos_token_id: int | None
    bos_token: str | None
    chat_template: Any

    def encode(self, text: str, **options: Any) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Token ids, or one, to text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Messages to text."""
        ...


class Tokens(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """The half of a language model that lm-eval needs to make requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Return the ids of a prompt to be continued."""
        has_bos = has_bos_prefix(prompt, self.tokenizer.bos_token)
        return tuple(self._encode(prompt, False if has_bos else None))

    def pairs(self, instances: Sequence[Instance]) -> list[Pair]:
        """Return (context ids, continuation ids) for each log-likelihood instance."""
        encoded: list[Pair] = self.loglikelihood(list(instances), disable_tqdm=True)
        return encoded

    def stop_strings(self, until: str | list[str] | None) -> tuple[str, ...]:
        """Return what ends a generation: the task's strings and the end-of-sequence token's text."""
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        strings = [until] if isinstance(until, str) else list(until or [])
        return tuple(stop for stop in handle_stop_sequences(strings, eos=eos) if stop)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError:  # many templates know no system role
            rest = [message for message in chat_history if message["role"] != "system"]
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Pair]:
        """lm-eval hands over what it encoded; a model would score it here."""
        return [(tuple(context), tuple(continuation)) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


def generation_limits(kwargs: dict[str, Any]) -> tuple[list[str], int]:
    """Return stop strings and the limit of new tokens, under any of its names, in `generation_kwargs`."""
    settled = normalize_gen_kwargs(kwargs, _DEFAULT_MAX_GEN_TOKS)
    return settled["until"], settled["max_gen_toks"]
