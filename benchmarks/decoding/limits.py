"""How far the engine's decode steps are from what the machine could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from benchmarks.decoding.drive import Steps, answer_all, to_continue
from benchmarks.decoding.machine import copy_bandwidth, synchronise
from benchmarks.decoding.options import Options
from benchmarks.decoding.report import Part, Ratio, quotient, value_of
from benchmarks.decoding.subjects import Prompts, Subject
from benchmarks.decoding.turns import Contender, Figure, Made, NotRun, take_turns
from harp_batch.decode import Engine, Greedy

_MANY_ROWS = 1024  # a step full of prompts
_SECONDS = 0.5  # that a turn of the linear layers takes at least
_EDGE = 2  # steps left out at both ends of the window, for engines whose outcomes come a step late
_LINEAR_GOAL = 0.7
_BANDWIDTH_GOAL = 0.6  # on a GPU


def measure(subject: Subject, options: Options) -> Part:
    """Decode steps of full slots beside the linear layers alone, and beside the bytes that they must read."""
    sizes = options.sizes
    untouched = subject.load()
    layers = {name: layer.in_features for name, layer in _linear_layers(untouched).items()}
    weights = sum(layer.weight.nbytes for layer in _linear_layers(untouched).values())
    kv_bytes = kv_bytes_per_position(untouched)
    model = subject.load()
    engine = Engine(model, slots=sizes.slots)
    prompts = list(islice(cycle(subject.prompts), sizes.slots))
    decode = _DecodeSteps(engine, prompts, sizes.new_tokens)
    contenders = [
        *(
            Contender(
                _linear_name(whose, rows),
                lambda found=found, rows=rows: _linear_alone(found, layers, rows),  # type: ignore[misc]
                sizes.rounds,
                f"{len(layers)} layers, {rows} rows",
                "rows/s",
            )
            for rows in (sizes.slots, _MANY_ROWS)
            for whose, found in (("torch's own", untouched), ("the engine's", model))
        ),
        Contender(
            f"harp-batch, greedy decode steps of {sizes.slots} rows",
            decode.turn,
            sizes.rounds,
            f"steps without prompt rows of {sizes.slots} x {sizes.new_tokens} tokens",
            "rows/s",
        ),
    ]
    figures = tuple(take_turns(contenders))
    bandwidth = copy_bandwidth(options.device)
    read = weights + decode.kv_positions * kv_bytes
    ratios = _ratios(figures, sizes.slots, read / bandwidth, random=bool(options.random))
    workload = {
        "model": subject.name,
        "dtype": options.dtype,
        "slots": sizes.slots,
        "weights of the linear layers": f"{weights / 2**20:.0f} MiB",
        "keys and values read in a step": f"{decode.kv_positions * kv_bytes / 2**20:.0f} MiB",
        "copy bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
    }
    return Part("Limits", workload, figures, tuple(ratios))


def kv_bytes_per_position(model: Any) -> int:
    """Bytes of keys and values that one position takes in all layers."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _linear_name(whose: str, rows: int) -> str:
    return f"linear layers alone, {whose}, {rows} rows"


@torch.inference_mode()
def _linear_alone(model: Any, layers: Mapping[str, int], rows: int) -> Made:
    """Rows a second through what now stands at the places of the untouched model's linear layers."""
    inputs = {
        width: torch.ones(rows, width, dtype=model.dtype, device=model.device)
        for width in set(layers.values())
    }
    work = [(model.get_submodule(name), inputs[width]) for name, width in layers.items()]
    _push(work, model.device)  # what is made at the first use is not timed
    started = time.perf_counter()
    passes = 0
    while time.perf_counter() - started < _SECONDS:
        _push(work, model.device)
        passes += 1
    return Made(rows * passes, seconds=time.perf_counter() - started)


def _push(work: list[tuple[Any, torch.Tensor]], device: torch.device) -> None:
    for layer, rows in work:
        layer(rows)
    synchronise(device)


class _DecodeSteps:
    """Full decode steps of one engine."""

    def __init__(self, engine: Engine, prompts: Prompts, new_tokens: int) -> None:
        self.kv_positions = 0.0  # read by such a step, of all rows together
        self._engine = engine
        self._prompts = prompts
        self._new_tokens = new_tokens

    def turn(self) -> Made:
        """Rows a second, from the median of the steps that hold one decode row for every prompt and nothing else."""
        _, steps = answer_all(self._engine, to_continue(self._prompts, self._new_tokens), Greedy())
        window = full_decode_steps(steps, self._new_tokens)
        middle = (window.start + window.stop - 1) / 2
        generated = self._new_tokens - (steps.mean_finish - middle)
        self.kv_positions = sum(map(len, self._prompts)) + len(self._prompts) * generated
        return Made(len(self._prompts), seconds=statistics.median(map(steps.seconds, window)))


def full_decode_steps(steps: Steps, new_tokens: int) -> range:
    """Numbers of the steps in which every sequence decoded one token and none was still reading its prompt.

    Every sequence makes one token a step. The one that finished last has made its first token new_tokens - 1 steps
    earlier: there the last prompt ended; and until the first sequence finished, none was missing. Raises NotRun
    where no step is left.
    """
    last_prompt = len(steps.finished) - new_tokens + 1
    window = range(last_prompt + 1 + _EDGE, steps.first_finish + 1 - _EDGE)
    if not window:
        raise NotRun("no step held one decode row of every prompt: generate more tokens (--new-tokens)")
    return window


def _ratios(figures: tuple[Figure, ...], slots: int, least_seconds: float, *, random: bool) -> list[Ratio]:
    decode = value_of(figures, f"harp-batch, greedy decode steps of {slots} rows")
    step = quotient(slots, decode)
    return [
        *(
            Ratio(
                f"decode throughput / linear layers alone ({whose}) at {slots} rows",
                quotient(decode, value_of(figures, _linear_name(whose, slots))),
                None if random else _LINEAR_GOAL,
            )
            for whose in ("torch's own", "the engine's")
        ),
        Ratio(
            "weights and KV bytes at copy bandwidth / seconds of a decode step",
            quotient(least_seconds, step),
            _BANDWIDTH_GOAL if random else None,
        ),
    ]
