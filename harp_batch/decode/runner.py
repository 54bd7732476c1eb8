"""Model and KV pools: one packed forward over any mixture of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harp_batch.decode import harp
from harp_batch.decode.attention import (
    IMPLEMENTATION,
    BranchedGroup,
    ChunkGroup,
    DecodeGroup,
    Group,
    Packing,
    Style,
)
from harp_batch.decode.kv import KVPool
from harp_batch.errors import ModelError

# Rows come in multiples of 8. A matrix product gives a row the same bits in any batch, unless a thread is left with
# fewer than 4 rows (batches of 5-7 and 9-11 on two threads), and an elementwise function computes the last
# few elements of a tensor in another way, which must then be padding.
_ROW_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Mask:
    """How a chunk's embeddings are reframed."""

    key: int  # see harp.mask_key
    delta: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive token positions of one stream, to go through the model in one step.

    It may end in several branches: alternative continuations of the same stem, which do not see each other.
    """

    token_ids: Sequence[int]  # the stem, then every branch
    start: int  # position of the first token
    outputs: Sequence[int] = ()  # offsets into token_ids whose logits are wanted, any order, repeats allowed
    slot: int | None = None  # where the stream's keys and values live; None: they are not kept
    mask: Mask | None = None  # None: the original stream; else the reframed one
    branches: Sequence[int] = ()  # length of each branch; a chunk with branches keeps nothing

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def stem(self) -> int:
        """Tokens before the first branch."""
        return len(self.token_ids) - sum(self.branches)

    def positions(self) -> list[int]:
        """The position of every token; each branch goes on where the stem ends."""
        end = self.start + self.stem
        branched = [p for length in self.branches for p in range(end, end + length)]
        return [*range(self.start, end), *branched]


class ModelRunner:
    """Runs packed forwards of a transformers causal language model.

    Raises:
        ModelError: the architecture's attention does not go through transformers' AttentionInterface.
    """

    def __init__(self, model: Any, slots: int, length: int) -> None:
        self.model = model
        self.device = model.device
        self.embed = model.get_input_embeddings()
        self.vocabulary = int(self.embed.weight.shape[0])
        self.original = KVPool(slots, length)
        self.reframed = KVPool(slots, length)  # allocates nothing until a method keeps a reframed stream
        self._implementation = model.config._attn_implementation
        model.eval()
        self.kv_bytes_per_position = self._probe()

    def close(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._implementation)

    def move(self, source: int, target: int, length: int) -> None:
        """Move a stream's keys and values to another slot."""
        self.original.move(source, target, length)
        self.reframed.move(source, target, length)

    def clear(self, slot: int) -> None:
        """Forget what a failed stream left: a hidden NaN would reach its successors, for 0 * NaN is NaN."""
        self.original.clear(slot)
        self.reframed.clear(slot)

    def resize(self, slots: int, length: int, live: int) -> None:
        """Change how many streams of which length the pools hold."""
        self.original.resize(slots, length, live)
        self.reframed.resize(slots, length, live)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of every wanted position, in the order of the chunks: float32 [R, V]."""
        order = sorted(range(len(chunks)), key=lambda i: _group_order(chunks[i]))
        packed = [chunks[i] for i in order]
        logits = self._packed_forward(packed)
        counts = [len(c.outputs) for c in packed]
        blocks = dict(zip(order, torch.split(logits, counts), strict=True))
        return torch.cat([blocks[i] for i in range(len(chunks))])

    def _packed_forward(self, chunks: Sequence[Chunk]) -> Tensor:
        starts = _row_starts(chunks)
        rows = _whole_blocks(starts[-1])
        tokens = self._padded([t for c in chunks for t in c.token_ids], rows)
        positions = self._padded([p for c in chunks for p in c.positions()], rows)
        wanted = [s + o for c, s in zip(chunks, starts, strict=False) for o in c.outputs]
        packing = Packing(self._groups(chunks, starts))
        return self._logits(self._embeddings(chunks, starts, tokens, positions), positions, wanted, packing)

    def _logits(
        self, embeddings: Tensor, positions: Tensor, wanted: Sequence[int], packing: Packing
    ) -> Tensor:
        distinct = list(dict.fromkeys(wanted))
        keep = self._padded(distinct, _whole_blocks(len(distinct)))
        out = self.model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            logits_to_keep=keep,
            use_cache=False,
            packing=packing,
        )
        logits: Tensor = out.logits[0, : len(distinct)].float()
        if len(distinct) == len(wanted):
            return logits
        places = {row: place for place, row in enumerate(distinct)}
        return logits[torch.tensor([places[row] for row in wanted], device=self.device)]

    def _padded(self, values: Sequence[int], size: int) -> Tensor:
        padding = [0] * (size - len(values))
        return torch.tensor([*values, *padding], dtype=torch.int64, device=self.device)

    def _embeddings(
        self, chunks: Sequence[Chunk], starts: Sequence[int], tokens: Tensor, positions: Tensor
    ) -> Tensor:
        """E(x), and E(x) ⊙ M for the rows of reframed chunks: [N, hidden]."""
        embeddings: Tensor = self.embed(tokens)
        reframed = [(c, s) for c, s in zip(chunks, starts, strict=False) if c.mask is not None]
        if not reframed:
            return embeddings
        rows = torch.cat([torch.arange(s, s + len(c)) for c, s in reframed]).to(self.device)
        keys = self._per_row([(len(c), c.mask.key) for c, _ in reframed if c.mask], torch.int64)
        deltas = self._per_row([(len(c), c.mask.delta) for c, _ in reframed if c.mask], torch.float64)
        keep = harp.keep_mask(keys, positions[rows], embeddings.shape[1], deltas)
        return embeddings.index_copy(0, rows, harp.reframe(embeddings[rows], keep))

    def _per_row(self, runs: Sequence[tuple[int, float]], dtype: torch.dtype) -> Tensor:
        lengths = torch.tensor([n for n, _ in runs])
        values = torch.tensor([value for _, value in runs], dtype=dtype)
        return values.repeat_interleave(lengths).to(self.device)

    def _groups(self, chunks: Sequence[Chunk], starts: Sequence[int]) -> list[Group]:
        groups: list[Group] = []
        for pool in (self.original, self.reframed):
            decoding = [i for i, c in enumerate(chunks) if _decodes(c) and self._pool(c) is pool]
            if decoding:
                groups.append(self._decode_group(pool, [chunks[i] for i in decoding], starts[decoding[0]]))
        groups.extend(
            self._chunk_group(c, s) for c, s in zip(chunks, starts, strict=False) if not _decodes(c)
        )
        return groups

    def _chunk_group(self, chunk: Chunk, first_row: int) -> Group:
        rows = slice(first_row, first_row + len(chunk))
        if chunk.branches:
            return BranchedGroup(rows, chunk.stem, tuple(chunk.branches))
        return ChunkGroup(rows, chunk.start, self._pool(chunk), chunk.slot or 0)

    def _decode_group(self, pool: KVPool, chunks: Sequence[Chunk], first_row: int) -> DecodeGroup:
        slots = [c.slot for c in chunks]
        positions = [c.start for c in chunks]
        return DecodeGroup(
            rows=slice(first_row, first_row + len(chunks)),
            pool=pool,
            slots=torch.tensor(slots, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            longest=max(positions) + 1,
            dense=slots == list(range(len(slots))),
        )

    def _pool(self, chunk: Chunk) -> KVPool | None:
        if chunk.slot is None:
            return None
        return self.original if chunk.mask is None else self.reframed

    def _probe(self) -> int:
        """Run one small forward, to refuse now what would answer wrongly later; bytes of K and V a position."""
        name = type(self.model).__name__
        counter = _Counter()
        try:
            self.model.set_attn_implementation(IMPLEMENTATION)
            positions = torch.arange(_ROW_BLOCK, device=self.device)
            with torch.inference_mode():
                self._logits(self.embed(positions), positions, [0], Packing([counter]))
        except ModelError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{name} cannot run packed batches in harp-batch: {reason}") from error
        self._require_known_attention(counter)
        return counter.bytes

    def _require_known_attention(self, counter: _Counter) -> None:
        """Patterns that transformers puts into a mask, which is never built here, would be ignored in silence."""
        name = type(self.model).__name__
        config = self.model.config.get_text_config()
        if counter.calls != config.num_hidden_layers:
            raise ModelError(
                f"{name} computes attention outside transformers' AttentionInterface, "
                "which harp-batch needs; take a model of another architecture, such as Llama, Mistral, Phi-3 or Qwen"
            )
        kinds = set(getattr(config, "layer_types", None) or [])
        strange = sorted(kinds - {"full_attention", "sliding_attention"})
        if strange:
            raise ModelError(
                f"{name} has layers of a kind that harp-batch does not support: {', '.join(strange)}"
            )
        if "sliding_attention" in kinds and not counter.windows:
            raise ModelError(f"{name} has a sliding window that it does not tell its attention function")


class _Counter:
    """A group that attends to nothing; it counts the layers that ask and what they would keep."""

    rows = slice(0, _ROW_BLOCK)

    def __init__(self) -> None:
        self.calls = 0
        self.windows = 0
        self.bytes = 0

    def attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `attention.Group.attend`."""
        self.calls += 1
        self.windows += style.window is not None
        self.bytes += k.element_size() * (k.shape[0] * k.shape[2] + v.shape[0] * v.shape[2])
        return v.new_zeros(q.shape[1], q.shape[0], v.shape[2])


def _whole_blocks(rows: int) -> int:
    return max(-(-rows // _ROW_BLOCK), 1) * _ROW_BLOCK


def _decodes(chunk: Chunk) -> bool:
    """One row whose stream is in a pool: it joins the batched decode."""
    return len(chunk) == 1 and chunk.slot is not None and chunk.start > 0


def _group_order(chunk: Chunk) -> tuple[bool, bool, int]:
    """Decode rows first, those of one pool side by side, by slot."""
    return (not _decodes(chunk), chunk.mask is not None, chunk.slot if _decodes(chunk) else 0)  # type: ignore[return-value]


def _row_starts(chunks: Sequence[Chunk]) -> list[int]:
    """The first row of each chunk, and the total at the end."""
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + len(chunk))
    return starts
