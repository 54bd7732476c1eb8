"""Stop strings, answer texts and context lengths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, LlamaConfig, Phi3Config

from harp_batch.decode.limits import context_length, kv_positions
from harp_batch.decode.text import Stop, StopStrings, answer_text
from harp_batch.errors import ModelError


class Bytes:
    """A tokenizer with one token a byte, so that characters and stop strings span tokens; 256 is special."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = bytes(t for t in token_ids if t < 256).decode(errors="replace")
        return text if skip_special_tokens or 256 not in token_ids else text + "<end>"


def tokens(text: str) -> list[int]:
    return list(text.encode())


def first_stop(stop: StopStrings, generated: list[int]) -> int | None:
    """How many tokens are there when the stop is noticed, asked at every token as the engine does."""
    return next((n for n in range(1, len(generated) + 1) if stop(generated[:n])), None)


@given(
    st.text(max_size=30),
    st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3),
    st.text(max_size=10),
)
def test_a_stop_string_is_noticed_with_the_token_that_completes_it(
    before: str, stops: list[str], after: str
) -> None:
    text = before + stops[0] + after
    noticed = first_stop(StopStrings(Bytes(), stops), tokens(text))
    ends = [len(text[: text.find(s) + len(s)].encode()) for s in stops if s in text]
    assert noticed == min(ends)


@given(st.text(max_size=40), st.lists(st.text(max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    answer = answer_text(Bytes(), [*tokens(text), 256], stops)
    assert text.startswith(answer)
    assert not any(s in answer for s in stops if s)
    assert answer == text or any(text[len(answer) :].startswith(s) for s in stops if s)


def test_a_stop_token_or_a_stop_string_ends_an_answer() -> None:
    stop = Stop(frozenset({256}), StopStrings(Bytes(), ["\n\n"]))
    assert stop([*tokens("a"), 256])
    assert stop(tokens("a\n\n"))
    assert not stop(tokens("a\n"))
    assert not Stop(frozenset(), None)(tokens("a"))


def test_the_context_is_the_configurations() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77


def test_embeddings_that_change_with_length_keep_to_the_original_context() -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=rope,
        pad_token_id=0,
    )
    assert context_length(config) == 64


def test_a_configuration_without_a_context_is_refused() -> None:
    with pytest.raises(ModelError, match="the bloom configuration names no max_position_embeddings"):
        context_length(BloomConfig())


def test_the_kv_budget_is_a_share_of_the_free_memory() -> None:
    few, many = kv_positions(1 << 20, torch.device("cpu")), kv_positions(1 << 10, torch.device("cpu"))
    assert 0 < few < many
