"""From a forward's logits to every owner's next state.

`decide` runs on the device and asks the host nothing; what it finds comes over in one small table, which `apply` hands
to the owners.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import groupby

import torch
from torch import Tensor

from harp_batch.decode import harp
from harp_batch.decode.inputs import on_device, together
from harp_batch.decode.sequence import Scoring, Work


def original_first(work: Seq[Work]) -> list[Work]:
    """The order in which `decide` expects the work whose logits it gets: chunks of reframed streams last."""
    return sorted(work, key=lambda w: w.reframed)


@torch.inference_mode()
def decide(work: Seq[Work], logits: Tensor) -> Tensor:
    """What the owners must know of all outputs of ``work``, in order; ``logits`` [R, V] are changed in place.

    Returns float64 [3, R]: the original logits' entropy in bits (for a reframed row its largest combined logit: it is
    finite if and only if the row is sound), the chosen token, and log p of a scored row's target.
    """
    rows = [(w, step) for w in work for step in w.steps]
    if not rows:  # prompts that are still on their way
        return logits.new_zeros(3, 0, dtype=torch.float64)
    sound = harp.entropy_bits(logits[: _originals(work)])
    if len(sound) < len(rows):
        mixed = _combined(rows, logits, len(sound))
        logits[len(sound) :] = mixed
        sound = torch.cat([sound, mixed.amax(dim=-1)])
    return torch.stack([sound.double(), _chosen(work, logits).double(), _target_logprobs(rows, logits)])


def apply(work: Seq[Work], logits: Tensor, table: list[list[float]]) -> None:
    """Give every owner what its chunk brought: ``table`` is `decide`'s, read back."""
    for w in work:
        w.owner.ran(w.chunk)
    rows = ((w, step) for w in work for step in w.steps)
    for (w, step), row, sound, chosen, logprob in zip(rows, logits, *table, strict=True):
        owner, token = w.owner, int(chosen)
        if w.reframed:  # what went along for a step that did not hesitate after all is not awaited
            settled = owner.awaits(step) and owner.require_finite(sound)
        else:
            settled = owner.observe(step, sound, token, row)
        if settled:
            owner.settle(step, token, logprob)


def _originals(work: Seq[Work]) -> int:
    """How many outputs are of original streams."""
    return sum(len(w.steps) for w in work if not w.reframed)


def _combined(rows: Seq[tuple[Work, int]], logits: Tensor, originals: int) -> Tensor:
    """Reframed logits, those behind the first ``originals``, mixed with their steps' original ones: [B, V].

    The original ones were parked, or are in the same forward.
    """
    places = {(id(w.owner), step): i for i, (w, step) in enumerate(rows[:originals])}
    reframed = rows[originals:]
    original = torch.stack(
        [
            w.owner.parked(step) if w.owner.awaits(step) else logits[places[id(w.owner), step]]
            for w, step in reframed
        ]
    )
    beta = on_device([w.owner.reframing.beta for w, _ in reframed], torch.float32, logits.device)
    return harp.combine(original, logits[originals:], beta)


def _chosen(work: Seq[Work], logits: Tensor) -> Tensor:
    """Every row's token by its owner's method: [R, V] -> int64 [R]."""
    methods = [w.owner.method for w in work for _ in w.steps]
    runs = [(method, len(list(run))) for method, run in groupby(methods)]
    parts = torch.split(logits, [length for _, length in runs])
    return torch.cat([method.choose(part) for (method, _), part in zip(runs, parts, strict=True)])


def _target_logprobs(rows: Seq[tuple[Work, int]], logits: Tensor) -> Tensor:
    """log p(target) in nats of the rows that score one, 0 for others: float64 [R]."""
    targets = {k: w.owner.targets[step] for k, (w, step) in enumerate(rows) if isinstance(w.owner, Scoring)}
    logprobs = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
    if not targets:
        return logprobs
    index, wanted = together([list(targets), list(targets.values())], logits.device)
    scored = logits if len(targets) == len(rows) else logits[index]
    found = torch.log_softmax(scored, dim=-1).gather(1, wanted[:, None])[:, 0]
    return logprobs.index_copy(0, index, found.double())
