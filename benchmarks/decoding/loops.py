"""The rivals: the authors' uncached loop, and transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.subjects import SEED, Prompts
from benchmarks.decoding.turns import Made, NotRun
from harp_batch.decode import Harp
from harp_batch.decode.harp import combine, dropout_mask, entropy_bits, reframe

_PAGE = 256  # positions of a page of transformers' continuous batching: its default
_CPU_STEP = 1024  # tokens of one of its forwards on a CPU; the default's masks alone would fill the memory
_NO_STOP = -1  # no token has this id


@torch.inference_mode()
def plain(
    model: Any, prompt: list[int], key: str, new_tokens: int, harp: Harp | None
) -> tuple[list[int], int]:
    """The authors' way: for every token the whole prefix goes through the model again.

    Returns the new tokens and how often the model hesitated.
    """
    tokens = list(prompt)
    hesitations = 0
    for step in range(new_tokens):
        embedded = model.get_input_embeddings()(torch.tensor([tokens], device=model.device))[0]
        logits = _last_logits(model, embedded)
        if harp and entropy_bits(logits).item() > harp.theta:
            hesitations += 1
            keep = _keep(embedded, key, harp.reframing.mask_step(step), harp.delta)
            other = _last_logits(model, reframe(embedded, keep))
            logits = combine(logits, other, torch.tensor([harp.beta], device=model.device))
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], hesitations


def _last_logits(model: Any, embedded: Tensor) -> Tensor:
    """[T, hidden] -> [1, V], of the last position."""
    logits: Tensor = model(inputs_embeds=embedded[None], use_cache=False, logits_to_keep=1).logits
    return logits[0]


def _keep(embedded: Tensor, key: str, step: int, delta: float) -> Tensor:
    length, hidden = embedded.shape
    mask = dropout_mask(
        seed=SEED, request_key=key, step=step, start=0, length=length, hidden=hidden, delta=delta
    )
    return mask.to(embedded.device)


@torch.inference_mode()
def generate(model: Any, prompts: Prompts, size: int, new_tokens: int) -> Made:
    """transformers' greedy `generate` over left-padded batches of ``size``, in the prompts' order."""
    made = 0
    for start in range(0, len(prompts), size):
        ids, mask = _left_padded(prompts[start : start + size], model.device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        made += (out.shape[1] - ids.shape[1]) * len(out)
    return Made(made)


def _left_padded(batch: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, longest]."""
    longest = max(map(len, batch))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in batch]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate_batch(model: Any, prompts: Prompts, new_tokens: int) -> Made:
    """transformers' continuous batching.

    Its cache gets the room that the prompts need: by default it takes most of the memory, and on a CPU filling
    that with zeros takes longer than the generation. Raises NotRun with transformers' own words where it fails.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    cache = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=1 + sum(-(-(len(prompt) + new_tokens) // _PAGE) for prompt in prompts),
        max_batch_tokens=_CPU_STEP if model.device.type == "cpu" else None,
        allow_block_sharing=False,  # no two prompts begin alike for a page
    )
    generation = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=_NO_STOP, pad_token_id=0
    )
    outputs = _refused_as_not_run(
        lambda: model.generate_batch(prompts, generation, cache, progress_bar=False).values()
    )
    failed = next((output.error for output in outputs if output.error), None)
    if failed or len(outputs) < len(prompts):
        raise NotRun(failed or f"generate_batch answered {len(outputs)} of {len(prompts)} prompts")
    return Made(sum(len(output.generated_tokens) for output in outputs))


def _refused_as_not_run(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise NotRun(f"{type(error).__name__}: {error}") from error
