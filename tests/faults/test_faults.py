"""The short fault suite: two real runs under everything that can happen, and not a byte of difference.

`make faults` is the long one: hundreds of kills, drawn from seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.disturbing import Plan, disturb, undisturbed
from tests.faults.striking import Kind
from tests.faults.work import Work, prepared

pytestmark = pytest.mark.ray

DOCUMENTS = 230
ALONE = Plan(
    seed=1,
    layout="one actor",
    database="sqlite",
    kinds=(
        Kind.ACTOR_KILLED,
        Kind.DRIVER_KILLED,
        Kind.ACTOR_STOPPED,
        Kind.DRIVER_STOPPED,
    ),
)
ON_NODES = Plan(
    seed=2,
    layout="two nodes",
    database="postgresql",
    kinds=(
        Kind.DATABASE_RESTARTED,
        Kind.RAYLET_KILLED,
        Kind.DATABASE_RESTARTED,
        Kind.DRIVER_INTERRUPTED,
        Kind.DATABASE_AWAY,
    ),
)


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with prepared(DOCUMENTS) as made:
        yield made


@pytest.fixture(scope="module")
def sha256(work: Work) -> str:
    """Of an undisturbed run's canonical export."""
    ending = undisturbed(work)
    assert (ending.tally.answers, ending.tally.lost, ending.tally.doubled) == (work.answers, 0, 0)
    return ending.sha256


@pytest.mark.parametrize("plan", [ALONE, ON_NODES], ids=["alone", "on nodes"])
def test_no_fault_costs_or_doubles_an_answer(work: Work, sha256: str, plan: Plan) -> None:
    print(f"seed {plan.seed}")
    went = disturb(work, plan, sha256)
    assert went.skipped == 0, "the run was too short for all faults"
    assert (went.answers, went.lost, went.doubled) == (work.answers, 0, 0)
    assert went.same
