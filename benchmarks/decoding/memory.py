"""Peak memory of HARP with both KV pools full, in a process of its own.

    python -m benchmarks.decoding.memory REF DTYPE SLOTS POSITIONS

is that process; it writes its findings to stdout as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.decoding.machine import ROOT
from benchmarks.decoding.options import Options
from benchmarks.decoding.report import Part, Ratio, quotient
from benchmarks.decoding.turns import Figure

_MIB = 2**20
_ALLOWANCE = 300 * _MIB
_NEW_TOKENS = 8
_ALWAYS = 0.0  # θ: whatever the entropy, the model hesitates, so that every position is in both pools


def measure(options: Options) -> Part:
    """The peak of a fresh process, beside what model and keys and values need."""
    sizes = options.sizes
    slots, positions = sizes.slots, sizes.memory_positions
    command = [sys.executable, "-m", "benchmarks.decoding.memory"]
    command += [options.model, options.dtype, str(slots), str(positions)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - ourselves
    workload = {
        "model": options.model,
        "dtype": options.dtype,
        "device": "CPU",
        "slots": slots,
        "positions": positions,
        "method": f"HARP sequence, θ {_ALWAYS:g}",
    }
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    missing = None if found else f"the process ended with code {done.returncode}"
    figures = tuple(_figures(found, missing))
    return Part("Memory", workload, figures, tuple(_ratios(found, f"{slots} slots, {positions} positions")))


def _figures(found: dict[str, int], missing: str | None) -> Iterator[Figure]:
    """What the process found, in MiB; where it died (of too little memory, say) that is the finding."""
    return (
        Figure(name, "MiB", work, (found[key] / _MIB,) if found else (), missing=missing)
        for key, name, work in (
            ("imported", "libraries imported", "peak so far"),
            ("loaded", "model loaded", "peak so far"),
            ("peak", "all slots full", "peak"),
            ("model", "model alone", "bytes of its parameters"),
            ("kv", "KV alone", "bytes of the keys and values of one pool"),
        )
    )


def _ratios(found: dict[str, int], size: str) -> Iterator[Ratio]:
    """The peak, and the peak without what the libraries had taken before, over what is allowed."""
    allowed = found["model"] + 2 * found["kv"] + _ALLOWANCE if found else None
    beyond = found["peak"] - found["imported"] if found else None
    rest = f"at {size} / (model + 2 x KV + 300 MiB)"
    yield Ratio(f"peak memory {rest}", quotient(found.get("peak"), allowed), 1.0, at_most=True)
    yield Ratio(f"peak memory beyond the imported libraries {rest}", quotient(beyond, allowed))


def peak_bytes() -> int:
    """The most memory that this process has had.

    On Linux from the process's own status: getrusage would count the parent, whose size a child starts with.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _fill(ref: str, dtype: str, slots: int, positions: int) -> dict[str, int]:
    """Fill every slot of an engine to its last position; bytes."""
    from benchmarks.decoding.limits import kv_bytes_per_position
    from benchmarks.decoding.subjects import SEED, without_stops
    from harp_batch.decode import Engine, Harp
    from harp_batch.decode.process import prepare_process
    from harp_batch.models import load_model, resolve

    prepare_process(os.cpu_count() or 1)
    imported = peak_bytes()
    model: Any = without_stops(load_model(resolve(ref), dtype=dtype))
    facts = {
        "imported": imported,
        "loaded": peak_bytes(),
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "kv": kv_bytes_per_position(model) * slots * positions,
    }
    engine = Engine(model, slots=slots, max_length=positions)
    prompt = [1 + i % 1000 for i in range(positions - _NEW_TOKENS)]
    method = Harp(theta=_ALWAYS, mask="sequence")
    completions = engine.generate([prompt] * slots, method=method, max_new_tokens=_NEW_TOKENS, seed=SEED)
    hesitations = sum(sum(c.trace.hesitated) for c in completions)
    assert hesitations == slots * _NEW_TOKENS, "a slot's reframed stream was not filled"
    return facts | {"peak": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(_fill(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
