"""What a step's logits mean: observe the original rows, combine the reframed ones, settle tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from harp_batch.decode import harp
from harp_batch.decode.sequence import Scoring, Sequence, Work


class Row(NamedTuple):
    """One row of logits: whose it is, which step it decides, and the logits [V]."""

    owner: Sequence | Scoring
    step: int
    logits: Tensor


@torch.inference_mode()
def postprocess(work: Seq[Work], logits: Tensor) -> None:
    """Give every owner what its chunk brought; ``logits`` [R, V] are those of all outputs, in order."""
    for w in work:
        w.owner.ran(w.chunk)
    rows = [(w.owner, step, w.reframed) for w in work for step in w.steps]
    original = [i for i, (_, _, reframed) in enumerate(rows) if not reframed]
    reframed = [i for i, (_, _, reframed) in enumerate(rows) if reframed]
    settled = _observe([Row(*rows[i][:2], logits[i]) for i in original], _take(logits, original))
    settled += _combine([Row(*rows[i][:2], logits[i]) for i in reframed], _take(logits, reframed))
    if settled:
        _settle(settled, torch.stack([row.logits for row in settled]))


def _observe(rows: Seq[Row], logits: Tensor) -> list[Row]:
    """Note entropy and vanilla token of original rows [B, V]; return the rows that are thereby settled."""
    if not rows:
        return []
    entropies = harp.entropy_bits(logits).tolist()
    vanilla = _choose(rows, logits)
    return [
        row
        for row, entropy, token in zip(rows, entropies, vanilla, strict=True)
        if row.owner.observe(row.step, entropy, token, row.logits)
    ]


def _combine(rows: Seq[Row], logits: Tensor) -> list[Row]:
    """Mix reframed rows [B, V] with the original logits that were parked for them."""
    if not rows:
        return []
    original = torch.stack([row.owner.parked(row.step) for row in rows])
    beta = torch.tensor([row.owner.reframing.beta for row in rows], device=logits.device)
    mixed = harp.combine(original, logits, beta)
    finite = mixed.amax(dim=-1).isfinite().tolist()
    return [
        row._replace(logits=m)
        for row, m, sound in zip(rows, mixed, finite, strict=True)
        if row.owner.require_finite(sound)
    ]


def _settle(rows: Seq[Row], logits: Tensor) -> None:
    """Decide every row's token from its final logits [B, V]."""
    chosen = _choose(rows, logits)
    logprobs = _target_logprobs(rows, logits)
    for k, row in enumerate(rows):
        row.owner.settle(row.step, chosen[k], logprobs.get(k, 0.0))


def _choose(rows: Seq[Row], logits: Tensor) -> list[int]:
    """Each row's token by its owner's method: [B, V] -> B ids."""
    chosen = [0] * len(rows)
    for method in dict.fromkeys(row.owner.method for row in rows):
        index = [i for i, row in enumerate(rows) if row.owner.method == method]
        for i, token in zip(index, method.choose(_take(logits, index)).tolist(), strict=True):
            chosen[i] = token
    return chosen


def _target_logprobs(rows: Seq[Row], logits: Tensor) -> dict[int, float]:
    """log p(target) in nats, by index, of the rows that score one."""
    targets = {k: row.owner.targets[row.step] for k, row in enumerate(rows) if isinstance(row.owner, Scoring)}
    if not targets:
        return {}
    wanted = torch.tensor(list(targets.values()), device=logits.device)
    logp = torch.log_softmax(_take(logits, list(targets)), dim=-1).gather(1, wanted[:, None])[:, 0]
    return dict(zip(targets, logp.tolist(), strict=True))


def _take(logits: Tensor, index: Seq[int]) -> Tensor:
    """Rows of [R, V]; no copy where all are wanted."""
    if list(index) == list(range(len(logits))):
        return logits
    return logits[torch.tensor(index, dtype=torch.int64, device=logits.device)]
