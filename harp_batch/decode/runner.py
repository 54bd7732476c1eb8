"""Model and KV pools: one packed forward over any mixture of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harp_batch.decode import harp, linear
from harp_batch.decode.adopt import adopt, adopted, give_back
from harp_batch.decode.attention import Backend, Layer, Packing, Style, varlen
from harp_batch.decode.attention.portable import Portable
from harp_batch.decode.attention.varlen import Varlen
from harp_batch.decode.chunk import Chunk
from harp_batch.decode.graphs import CudaCapture, Steps, directly
from harp_batch.decode.inputs import Inputs, inputs, on_device
from harp_batch.errors import ModelError, UserError

_PROBE_ROWS = 8


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
        probed = self._probe()
        self._row_block = linear.row_block(model)
        self.kv_bytes_per_position = probed.bytes
        self.backend: Backend = Portable(slots, length)
        self.steps: Steps | None = None
        if varlen.runs(self.device, probed.layers):
            self.backend = paged = Varlen(slots, length)
            capture = CudaCapture(self.device) if self.device.type == "cuda" else directly
            self.steps = Steps(self._compute, paged.original, self.device, capture)

    def close(self) -> None:
        """Give the model its own attention and linear layers back."""
        give_back(self.model)

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
        if self.steps is not None:
            self.steps.clear()
        for pool in self.backend.pools:
            pool.release()

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of every wanted position, in the order of the chunks: float32 [R, V]."""
        if not adopted(self.model):  # its own attention would ignore the packing
            raise UserError("the model was given back by close(): make a new Engine")
        if self.steps is not None and self.steps.takes(chunks):
            return self.steps.run(chunks)
        order = sorted(range(len(chunks)), key=lambda i: self.backend.order(chunks[i]))
        packed = [chunks[i] for i in order]
        starts = dict(zip(order, accumulate(map(len, packed), initial=0), strict=False))
        wanted = [starts[i] + offset for i, c in enumerate(chunks) for offset in c.outputs]
        distinct = list(dict.fromkeys(wanted))
        outputs = distinct + [0] * (self._whole_blocks(len(distinct)) - len(distinct))
        rows = inputs(packed, outputs, self._whole_blocks(sum(map(len, chunks))), self.device)
        logits = self._compute(rows, self.backend.pack(packed, self.device))[: len(distinct)]
        if len(distinct) == len(wanted):
            return logits
        places = {row: place for place, row in enumerate(distinct)}
        return logits[on_device([places[row] for row in wanted], torch.int64, self.device)]

    def _compute(self, inputs: Inputs, packing: Packing) -> Tensor:
        """Logits of the rows ``inputs.outputs``: float32 [R, V]."""
        out = self.model(
            inputs_embeds=self._embeddings(inputs)[None],
            position_ids=inputs.positions[None],
            logits_to_keep=inputs.outputs,
            use_cache=False,
            packing=packing,
        )
        logits: Tensor = out.logits[0].float()
        return logits

    def _whole_blocks(self, rows: int) -> int:
        return max(-(-rows // self._row_block), 1) * self._row_block

    def _embeddings(self, inputs: Inputs) -> Tensor:
        """E(x), and E(x) ⊙ M for the rows of reframed chunks: [N, hidden]."""
        embeddings: Tensor = self.embed(inputs.tokens)
        if not len(inputs.reframed):
            return embeddings
        positions = inputs.positions[inputs.reframed]
        keep = harp.keep_mask(inputs.keys, positions, embeddings.shape[1], inputs.deltas)
        masked = harp.reframe(embeddings[inputs.reframed], keep)
        return embeddings.index_copy(0, inputs.reframed, masked)

    def _probe(self) -> _Counter:
        """Adopt the model and run one small forward; what its layers asked for.

        Refuses now what would answer wrongly later, and leaves a refused model as it was.
        """
        name = type(self.model).__name__
        counter = _Counter()
        fresh = False
        try:
            fresh = adopt(self.model)
            with torch.inference_mode():
                chunk = Chunk(list(range(_PROBE_ROWS)), 0)
                self._compute(inputs([chunk], [0], _PROBE_ROWS, self.device), counter)
            self._require_known_attention(counter)
        except (ModelError, TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            if fresh:
                self.close()
            if isinstance(error, ModelError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{name} cannot run packed batches in harp-batch: {reason}") from error
        return counter

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
        self.bytes = 0  # of keys and values a position
        self.layers: set[Layer] = set()

    def attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `attention.Packing`."""
        self.calls += 1
        self.windows += style.window is not None
        self.layers.add(Layer(len(q), len(k), k.shape[2], v.shape[2], k.dtype, style))
        self.bytes += k.element_size() * (k.shape[0] * k.shape[2] + v.shape[0] * v.shape[2])
        return v.new_zeros(q.shape[1], q.shape[0], v.shape[2])
