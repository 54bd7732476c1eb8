"""Model and KV pools: one packed forward over any mixture of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harp_batch.decode import harp, linear
from harp_batch.decode.attention import IMPLEMENTATION, Packing, Style
from harp_batch.decode.attention.portable import Portable
from harp_batch.decode.chunk import Chunk
from harp_batch.errors import ModelError

# Rows come in multiples of 8. A matrix product gives a row the same bits in any batch, unless a thread is left with
# fewer than 4 rows (batches of 5-7 and 9-11 on two threads), and an elementwise function computes the last
# few elements of a tensor in another way, which must then be padding.
_ROW_BLOCK = 8


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
        self.backend = Portable(slots, length)
        self._implementation = model.config._attn_implementation
        model.eval()
        linear.pack(model)
        self.kv_bytes_per_position = self._probe()

    def close(self) -> None:
        """Give the model its own attention and linear layers back."""
        linear.unpack(self.model)
        self.model.set_attn_implementation(self._implementation)

    def move(self, source: int, target: int, length: int) -> None:
        """Move a stream's keys and values to another slot."""
        for pool in self.backend.pools:
            pool.move(source, target, length)

    def clear(self, slot: int) -> None:
        """Forget what a failed stream left: a hidden NaN would reach its successors, for 0 * NaN is NaN."""
        for pool in self.backend.pools:
            pool.clear(slot)

    def resize(self, slots: int, length: int, live: int) -> None:
        """Change how many streams of which length the pools hold."""
        for pool in self.backend.pools:
            pool.resize(slots, length, live)

    def release(self) -> None:
        """Give the pools' memory back; nothing may be live."""
        for pool in self.backend.pools:
            pool.release()

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of every wanted position, in the order of the chunks: float32 [R, V]."""
        order = sorted(range(len(chunks)), key=lambda i: self.backend.order(chunks[i]))
        packed = [chunks[i] for i in order]
        starts = dict(zip(order, accumulate(map(len, packed), initial=0), strict=False))
        rows = _whole_blocks(sum(map(len, chunks)))
        tokens = self._padded([t for c in packed for t in c.token_ids], rows)
        positions = self._padded([p for c in packed for p in c.positions()], rows)
        wanted = [starts[i] + offset for i, c in enumerate(chunks) for offset in c.outputs]
        embeddings = self._embeddings(packed, tokens, positions)
        return self._logits(embeddings, positions, wanted, self.backend.pack(packed, self.device))

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

    def _embeddings(self, chunks: Sequence[Chunk], tokens: Tensor, positions: Tensor) -> Tensor:
        """E(x), and E(x) ⊙ M for the rows of reframed chunks: [N, hidden]."""
        embeddings: Tensor = self.embed(tokens)
        starts = accumulate(map(len, chunks), initial=0)
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

    def _probe(self) -> int:
        """Run one small forward, to refuse now what would answer wrongly later; bytes of K and V a position."""
        name = type(self.model).__name__
        counter = _Counter()
        try:
            self.model.set_attn_implementation(IMPLEMENTATION)
            positions = torch.arange(_ROW_BLOCK, device=self.device)
            with torch.inference_mode():
                self._logits(self.embed(positions), positions, [0], counter)
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
    """A packing that attends to nothing; it counts the layers that ask and what they would keep."""

    def __init__(self) -> None:
        self.calls = 0
        self.windows = 0
        self.bytes = 0

    def attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `attention.Packing`."""
        self.calls += 1
        self.windows += style.window is not None
        self.bytes += k.element_size() * (k.shape[0] * k.shape[2] + v.shape[0] * v.shape[2])
        return v.new_zeros(q.shape[1], q.shape[0], v.shape[2])


def _whole_blocks(rows: int) -> int:
    return max(-(-rows // _ROW_BLOCK), 1) * _ROW_BLOCK
