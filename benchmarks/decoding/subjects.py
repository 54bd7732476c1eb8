"""What is decoded: a model (real, or a shape with random weights) and prompts for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding.machine import ROOT
from benchmarks.decoding.options import Options
from harp_batch.errors import UserError

Prompts = list[list[int]]
SEED = 0
_SHIPPED = ROOT / "harp_batch/eval_tasks/demo_arithmetic/demo_arithmetic.jsonl"
_LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # so narrow a model needs large weights to be sure of anything
}
SHAPES = {"llama-8b": _LLAMA_8B, "tiny": _TINY}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its prompts; ``load`` returns a fresh copy of the model that knows no stop tokens."""

    name: str
    source: str  # of the prompts
    load: Callable[[], Any]
    prompts: Prompts


def subject(options: Options) -> Subject:
    """What ``options`` name. Raises UserError where the model or enough prompts cannot be had."""
    if options.random:
        return _random(options, options.random)
    from harp_batch.models import load_model, load_tokenizer, resolve

    local = resolve(options.model)
    source, prompts = _questions(options, load_tokenizer(local))
    return Subject(
        options.model,
        source,
        lambda: without_stops(load_model(local, dtype=options.dtype, device=options.device)),
        prompts,
    )


def without_stops(model: Any) -> Any:
    """The model with its stop tokens forgotten, so that everybody generates as many tokens."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    return model


def _random(options: Options, shape: str) -> Subject:
    vocabulary = SHAPES[shape]["vocab_size"]
    size = (options.sizes.prompts, options.sizes.prompt_tokens)
    drawn = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(SEED))
    return Subject(
        f"{shape} with random weights",
        "random tokens",
        lambda: without_stops(random_model(shape, options.dtype, options.device)),
        drawn.tolist(),
    )


def random_model(shape: str, dtype: str, device: str) -> Any:
    """The same weights at every call on one kind of device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        config = LlamaConfig(**SHAPES[shape], pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def _questions(options: Options, tokenizer: Any) -> tuple[str, Prompts]:
    """The first questions of GSM8K, or of the shipped task, in the model's chat format."""
    file = options.data_dir / "gsm8k" / "test.jsonl" if options.data_dir else _SHIPPED
    count = options.sizes.prompts
    questions = _first_questions(file, count)
    if len(questions) < count:
        raise UserError(
            f"{file} has {len(questions)} questions and --prompts asks for {count}: ask for fewer"
        )
    chats = [[{"role": "user", "content": f"Question: {q}\nAnswer:"}] for q in questions]
    prompts = [
        list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]
    return ("GSM8K" if options.data_dir else "demo_arithmetic"), prompts


def _first_questions(file: Path, count: int) -> list[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): --data-dir must hold gsm8k/test.jsonl"
        ) from error
