"""A whole run under faults, drawn from a seed, and what is written down of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

from tests.faults.nodes import Nodes
from tests.faults.running import Ending, Run, TooShort
from tests.faults.striking import Fault, Kind, strike
from tests.faults.watching import Rows, tokens_of_longest
from tests.faults.work import Work

LAYOUTS = {"one actor": "1", "two actors": "2", "two nodes": "auto"}  # cluster.actors; auto follows the nodes
DATABASES = ("sqlite", "postgresql")
RESTARTS = 10  # of PostgreSQL in one run
_EVERYWHERE = {Kind.ACTOR_KILLED: 5, Kind.ACTOR_STOPPED: 2, Kind.DRIVER_KILLED: 2}  # odds
# On shared nodes a stopped driver's actors keep their cores, so that no other driver can go on meanwhile.
_ALONE = {Kind.DRIVER_STOPPED: 1}
_ON_NODES = {Kind.RAYLET_KILLED: 4}


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run is to go through."""

    seed: int
    layout: str
    database: str
    kinds: tuple[Kind, ...]

    @property
    def on_nodes(self) -> bool:
        """Whether the actors live on nodes of a cluster that was there before."""
        return self.layout == "two nodes"


def draw(seed: int, kills: int) -> Plan:
    """A plan with so many kills and one SIGINT; six seeds in a row make every pair of layout and database.

    Of twenty seeds in a row, one run's database is restarted ten times besides and another's is away for a minute.
    """
    layout, database = list(LAYOUTS)[seed % 3], DATABASES[seed % 2]
    odds = _EVERYWHERE | (_ON_NODES if layout == "two nodes" else _ALONE)
    rng = Random(seed)
    kinds = rng.choices(list(odds), weights=list(odds.values()), k=kills)
    kinds += [Kind.DRIVER_INTERRUPTED]
    kinds += [Kind.DATABASE_RESTARTED] * (RESTARTS if seed % 20 == 9 else 0)
    kinds += [Kind.DATABASE_LONG_AWAY] * (seed % 20 == 3)
    rng.shuffle(kinds)
    return Plan(seed, layout, database, tuple(kinds))


@dataclass(frozen=True, slots=True)
class Disturbed:
    """One run as it went; what a line of the record holds."""

    date: str  # UTC, to the second
    seed: int
    layout: str
    database: str
    faults: tuple[Fault, ...]
    skipped: int  # faults for which the run was too short
    answers: int  # rows there were at the end
    lost: int
    doubled: int
    tokens: int  # of all answers
    recomputed: int  # tokens, at most: see `recomputed`
    same: bool  # whether the canonical export has the SHA-256 of the undisturbed run's
    seconds: float  # from submit to the end


def disturb(work: Work, plan: Plan, sha256: str) -> Disturbed:
    """Go through ``plan``; ``sha256`` is of an undisturbed run of the same job. Ends all of the work's sessions."""
    date, began = datetime.now(UTC), time.monotonic()
    run = _begin(work, plan)
    faults = _strike_all(run, plan)
    ending = run.finish()
    work.sessions.end()
    return Disturbed(
        date=f"{date:%Y-%m-%d %H:%M:%S}",
        seed=plan.seed,
        layout=plan.layout,
        database=plan.database,
        faults=faults,
        skipped=len(plan.kinds) - len(faults),
        answers=ending.tally.answers,
        lost=ending.tally.lost,
        doubled=ending.tally.doubled,
        tokens=ending.tally.tokens,
        recomputed=recomputed(faults, run.seen, ending.answers),
        same=ending.sha256 == sha256,
        seconds=round(time.monotonic() - began, 1),
    )


def undisturbed(work: Work) -> Ending:
    """Run the job as it is, with two actors and SQLite."""
    run = Run(work, f"sqlite:///{work.folder / 'undisturbed.db'}", actors="2")
    return run.finish()


def _begin(work: Work, plan: Plan) -> Run:
    nodes = Nodes(work.sessions) if plan.on_nodes else None
    url = (
        f"sqlite:///{work.folder / f'{plan.seed}.db'}"
        if plan.database == "sqlite"
        else work.postgres.database()
    )
    return Run(work, url, LAYOUTS[plan.layout], nodes)


def _strike_all(run: Run, plan: Plan) -> tuple[Fault, ...]:
    rng, faults = Random(f"{plan.seed} moments and victims"), list[Fault]()
    for kind in plan.kinds:
        try:
            faults.append(strike(run, kind, rng))
        except TooShort:
            break
        print(f"  {faults[-1].seconds:6.2f} s  {kind}, at {faults[-1].answered} answers", flush=True)
    return tuple(faults)


def recomputed(faults: Sequence[Fault], seen: Sequence[Rows], final: Rows) -> int:
    """Tokens that had to be decoded again, at most.

    Nobody counts what a killed process had decoded. An actor decodes one answer a slot at a time, so that a fault
    costs no more than the longest answers which were not committed when it struck, one for every slot of the
    actors that were lost.
    """
    # A fault for which the run was too short has been looked out for as well: `seen` may be longer.
    return sum(
        tokens_of_longest({key: row for key, row in final.items() if key not in before}, fault.in_flight)
        for fault, before in zip(faults, seen, strict=False)
    )
