"""HARP as the paper writes it: one prompt, no cache, every token from the whole prefix.

Written from arXiv 2412.07282 alone and sharing nothing with the engine but `dropout_mask`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from harp_batch.decode.harp import dropout_mask


class Setting(NamedTuple):
    """θ, δ, β and the kind of mask; ``theta`` is infinite for vanilla decoding."""

    theta: float = math.inf
    delta: float = 0.0
    beta: float = 1.0
    mask: str = "step"


class Token(NamedTuple):
    """One decided token."""

    token: int
    entropy: float
    hesitated: bool
    vanilla: int
    logits: torch.Tensor


def next_token(model: Any, prefix: list[int], setting: Setting, seed: int, key: str, step: int) -> Token:
    """Algorithm 1 for one position."""
    embedded = model.get_input_embeddings()(torch.tensor([prefix]))
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1].double()
    p = [x for x in torch.softmax(logits, 0).tolist() if x > 0]
    entropy = -sum(x * math.log2(x) for x in p)
    vanilla = int(logits.argmax())
    if not entropy > setting.theta:
        return Token(vanilla, entropy, False, vanilla, logits)
    kept = dropout_mask(
        seed=seed,
        request_key=key,
        step=step if setting.mask == "step" else 0,
        start=0,
        length=len(prefix),
        hidden=embedded.shape[-1],
        delta=setting.delta,
    )
    reframed = torch.where(kept, embedded[0], torch.zeros(()))
    other = model(inputs_embeds=reframed[None], use_cache=False).logits[0, -1].double()
    mixed = setting.beta * logits + (1 - setting.beta) * other
    return Token(int(mixed.argmax()), entropy, True, vanilla, mixed)


@torch.no_grad()
def decode(
    model: Any,
    prompt: list[int],
    setting: Setting,
    *,
    steps: int,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    key: str = "0",
) -> list[Token]:
    """Generate up to ``steps`` tokens; a stop token is the last one."""
    prefix, made = list(prompt), []
    for step in range(steps):
        made.append(next_token(model, prefix, setting, seed, key, step))
        prefix.append(made[-1].token)
        if made[-1].token in stop:
            break
    return made


@torch.no_grad()
def score(
    model: Any,
    context: list[int],
    continuation: list[int],
    setting: Setting,
    *,
    seed: int = 0,
    key: str = "0",
) -> tuple[float, bool, list[Token]]:
    """log p(continuation | context) in nats, whether it is greedy, and every target position."""
    prefix, total, made = list(context), 0.0, []
    for index, target in enumerate(continuation):
        made.append(next_token(model, prefix, setting, seed, key, index))
        total += float(torch.log_softmax(made[-1].logits, 0)[target])
        prefix.append(target)
    return total, all(t.token == c for t, c in zip(made, continuation, strict=True)), made
