"""Decode steps of fixed shapes, which a GPU replays from a captured graph.

A step of single decode rows and short reframed chunks is made of a few hundred small kernels; launching them one by one
takes the host longer than the GPU needs to run them. Here such a step is filled up to one of a few row counts, so that
its shapes, and all memory that it reads and writes, are the same every time: it is captured once and replayed. What
differs is one buffer of integers, copied over before each replay.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from harp_batch.decode.attention import Packing
from harp_batch.decode.attention.varlen import VarlenPacking, kept_lists, kept_rows
from harp_batch.decode.chunk import Chunk
from harp_batch.decode.inputs import Inputs, mask_lists, on_device, token_lists
from harp_batch.decode.kv import PagedPool
from harp_batch.decode.limits import is_out_of_memory
from harp_batch.decode.sequence import SHORT_CHUNK

_ROW_BLOCK = 8
_STEP = 32  # row counts beyond the smallest two are multiples of this; at most so many rows are padding
_ROWS_PER_SLOT = 4  # steps with more rows than this many a slot are not of fixed shape

_log = logging.getLogger(__name__)

Forward = Callable[[], Tensor]
Compute = Callable[[Inputs, Packing], Tensor]


def directly(forward: Forward) -> Forward:
    """No capture: the forward as it is. For the CPU, and for models that cannot be captured."""
    return forward


class CudaCapture:
    """Captures forwards on one device as CUDA graphs; those that live at the same time share their memory.

    Warm-ups and captures take the same stream, since cuBLAS keeps a workspace for each stream that it has met.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._latest: weakref.ref[torch.cuda.CUDAGraph] | None = None

    def __call__(self, forward: Forward) -> Forward:
        """A function that replays the forward and returns its output, the same tensor every time.

        Raises:
            RuntimeError: the forward asks the device for values, or does something else that a graph cannot hold;
                or memory ran out.
        """
        with torch.cuda.device(self._device), self._own_stream():
            forward()  # libraries set themselves up
            with _no_waiting():
                forward()
            graph, output = self._captured(forward)

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return output

        return replay

    def _captured(self, forward: Forward) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        other = (
            self._latest() if self._latest else None
        )  # memory whose graphs are all gone cannot be taken again
        with torch.cuda.graph(
            graph,
            pool=other.pool() if other else None,
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            output = forward()
        self._latest = weakref.ref(graph)
        return graph, output

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """What runs here comes after the current stream's work and before what follows, even if it fails half-way.

        It may have begun to fill new pools with zeros; and a capture that fails leaves its stream the current one.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Steps:
    """Runs the steps that have a fixed shape."""

    def __init__(
        self,
        compute: Compute,
        pool: PagedPool,
        device: torch.device,
        capture: Callable[[Forward], Forward],
    ) -> None:
        self._compute = compute
        self._pool = pool
        self._device = device
        self._capture = capture
        self._storage = pool.storage
        self._ready: dict[tuple[int, bool], tuple[_Shape, Forward]] = {}
        self._logits: Tensor | None = (
            None  # float32 [outputs of the largest shape, V]: of all that is captured
        )

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the chunks are a step of the kind that is run here."""
        return (
            any(c.outputs for c in chunks)
            and len(chunks) <= 2 * self._pool.capacity
            and sum(map(len, chunks)) <= max(_ROWS_PER_SLOT * self._pool.capacity, _ROW_BLOCK)
            and all(c.slot is not None and len(c) <= SHORT_CHUNK and len(c.outputs) <= 1 for c in chunks)
        )

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of every wanted position, in the order of the chunks: float32 [R, V]."""
        if self._storage != self._pool.storage:
            self.clear()
        key = bucket(sum(map(len, chunks))), any(c.mask is not None for c in chunks)
        shape = self._ready[key][0] if key in self._ready else _Shape(*key, self._pool, self._device)
        shape.load(chunks)
        if key not in self._ready:
            self._ready[key] = shape, self._captured(lambda: shape.forward(self._compute))
        logits = self._ready[key][1]()
        return logits[: sum(len(c.outputs) for c in chunks)].clone()  # the next replay overwrites them

    def clear(self) -> None:
        """Forget everything captured: the pool's memory is not what it was."""
        self._ready.clear()
        self._logits = None
        self._storage = self._pool.storage

    def _captured(self, forward: Forward) -> Forward:
        """What to run from now on in the place of ``forward``, which itself has to do where it cannot be captured."""
        try:
            return self._capture(lambda: self._shared(forward()))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if _for_want_of_memory(error):
                _log.info("no memory to capture a decode step, which is launched instead: %s", reason)
            else:
                _log.warning("launching decode steps one kernel at a time, more slowly: %s", reason)
                self._capture = directly
        return forward

    def _shared(self, logits: Tensor) -> Tensor:
        """The logits, copied to where those of every captured step go: each would keep its own otherwise."""
        if self._logits is None:
            self._logits = logits.new_empty(_most_outputs(self._pool), logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)


def _for_want_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed; ending the capture in which it did may fail for another reason on top."""
    while isinstance(error, Exception):
        if is_out_of_memory(error):
            return True
        error = error.__context__
    return False


def _most_outputs(pool: PagedPool) -> int:
    """One for each stream, in whole blocks."""
    return _whole(2 * pool.capacity, _ROW_BLOCK)


def bucket(rows: int) -> int:
    """The row count that a step is filled up to."""
    if rows <= 2 * _ROW_BLOCK:
        return _whole(rows, _ROW_BLOCK)
    return _whole(rows, _STEP)


def _whole(count: int, block: int) -> int:
    return -(-count // block) * block


class _Shape:
    """The inputs of a step with a given number of rows, at fixed places of one buffer on the device.

    What fills the step up is a chunk of a stream behind the pool's last slot, which is nobody's; and streams without
    rows.
    """

    def __init__(self, rows: int, masked: bool, pool: PagedPool, device: torch.device) -> None:
        self._rows = rows
        self._pool = pool
        self._streams = 2 * pool.capacity + 1
        self._outputs = min(rows, _most_outputs(pool))
        self._masked = rows if masked else 0
        packing = [rows, self._streams + 1, self._streams, self._streams]
        self._sizes = [rows, rows, self._outputs, *[self._masked] * 3, *packing]
        self._buffer = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)

    def load(self, chunks: Sequence[Chunk]) -> None:
        """Bring a step's numbers to the device."""
        values = [value for part in self._lists(chunks) for value in part]
        self._buffer.copy_(on_device(values, torch.int64, self._buffer.device))

    def forward(self, compute: Compute) -> Tensor:
        """What ``compute`` makes of the numbers that were loaded last."""
        parts = torch.split(self._buffer, self._sizes)
        tokens, positions, outputs, reframed, keys, deltas = parts[:6]
        inputs = Inputs(tokens, positions, outputs, reframed, keys, deltas.view(torch.float64))
        kept = kept_rows(self._pool, self._rows, _STEP, *parts[6:])
        return compute(inputs, VarlenPacking(kept, None))

    def _lists(self, chunks: Sequence[Chunk]) -> Iterator[list[int]]:
        """In the order of the buffer's parts, and as long."""
        used = sum(map(len, chunks))
        padding = Chunk([0] * (self._rows - used), 0, slot=self._pool.capacity)
        filled = [*chunks, padding] if len(padding) else chunks
        yield from token_lists(filled, self._rows)
        yield _outputs(chunks, self._outputs)
        yield from self._masks(chunks)
        write, starts, streams, ends = kept_lists(filled, self._pool)
        empty = self._streams - len(filled)
        yield write
        yield starts + [self._rows] * empty
        yield streams + [2 * self._pool.capacity] * empty
        yield ends + [0] * empty

    def _masks(self, chunks: Sequence[Chunk]) -> Iterator[list[int]]:
        """`mask_lists` of all rows; a row that is not reframed has delta 0, which drops nothing."""
        rows, keys, deltas = mask_lists(chunks)
        yield list(range(self._masked))
        for values in (keys, deltas):
            spread = [0] * self._masked
            for row, value in zip(rows, values, strict=True):
                spread[row] = value
            yield spread


def _outputs(chunks: Sequence[Chunk], size: int) -> list[int]:
    """The rows whose logits are wanted, filled up with row 0."""
    rows, first = [], 0
    for chunk in chunks:
        rows += [first + offset for offset in chunk.outputs]
        first += len(chunk)
    return rows + [0] * (size - len(rows))
