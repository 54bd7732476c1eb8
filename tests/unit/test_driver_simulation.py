"""Thousands of runs in a simulated world where everything breaks: nothing is lost, nothing is doubled, all end.

The loop, the dispatcher and the buffer are the real ones. The world around them is made of a fake clock, fake actors
that crash, hang, dawdle and repeat themselves, and a fake store that goes away, drops connections at COMMIT and fences
drivers off. Every history follows from one number; a failure prints it, and ``SIMULATION_SEED=NUMBER`` replays it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from harp_batch.cluster import buffer
from harp_batch.cluster.actor import Reply
from harp_batch.cluster.dispatcher import ALONE, IN_COMPANY, Dispatcher, Lease, cut
from harp_batch.cluster.loop import START_SECONDS, Hand, Loop, Lost, View
from harp_batch.errors import RunFailed
from harp_batch.records import Answer, FinishReason, Request, RequestKind, TokenTrace

HISTORIES = 10_000
HANG = 20.0
Key = tuple[str, int]  # evaluation, document


class LeaseIsLost(Exception):
    """The fake store's answer to a driver that was replaced."""


class Away(Exception):
    """The fake store does not answer."""


@dataclass
class World:
    """What the seed decides, and what happened."""

    random: Random
    requests: dict[str, list[Request]]
    poison: set[Key]
    now: float = 0.0
    trouble_until: float = 0.0  # no trouble begins after this moment
    epoch: int = 0
    cancelled: bool = False
    away_until: float = 0.0
    committed: dict[Key, Answer] = field(default_factory=dict)
    commits_after_cancel: int = 0
    deaths: Counter[Key] = field(default_factory=Counter)  # actors that a poisonous request killed
    bad_luck: Counter[Key] = field(default_factory=Counter)  # actors lost by chance with this request alone
    restarts: int = 0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def trouble(self, share: float) -> bool:
        return self.now < self.trouble_until and self.chance(share)

    # The store

    def commit(self, epoch: int, answers: Sequence[Answer]) -> None:
        """Insert or ignore, in one transaction; the connection may break before or after it."""
        self.answer_at_all()
        if epoch != self.epoch or self.cancelled:
            raise LeaseIsLost
        if self.trouble(0.02):
            raise Away
        for answer in answers:
            self.committed.setdefault((answer.evaluation_id, answer.doc_id), answer)
        self.commits_after_cancel += self.cancelled
        if self.trouble(0.03):
            raise Away  # it was committed; only the word of it is lost

    def answer_at_all(self) -> None:
        if self.trouble(0.01):
            self.away_until = self.now + self.random.uniform(1, 90)
        if self.now < self.away_until:
            raise Away


@dataclass
class FakeActor:
    """Decodes a few requests at a time; may die, stop or repeat itself."""

    world: World
    poll_slowness: float
    ready_at: float
    work: list[tuple[Lease, Request]] = field(default_factory=list)
    finished: list[tuple[tuple[int, int], Answer]] = field(default_factory=list)
    said: list[tuple[tuple[int, int], Answer]] = field(default_factory=list)
    steps: int = 0
    dead: str = ""
    stopped: bool = False
    unstartable: bool = False
    unlucky: bool = False  # lost by chance, not by a request

    def live(self) -> None:
        """Let one round pass."""
        world = self.world
        if self.dead or self.stopped or world.now < self.ready_at:
            return
        if world.trouble(0.03):
            self.dead = "node" if world.chance(0.3) else "process"
            self.unlucky = self.dead == "process"
        elif world.trouble(0.015):
            self.stopped = True
            self.unlucky = True
        elif not world.chance(self.poll_slowness):
            self.step()

    def step(self) -> None:
        self.steps += 1
        now_decoding = self.work[: self.world.random.randint(1, 4)]
        for lease, request in now_decoding:
            key = lease.evaluation_id, request.doc_id
            if key not in self.world.poison:
                self.work.remove((lease, request))
                self.finished.append((lease.id, answer_to(lease.evaluation_id, request)))
            elif self.world.chance(0.8):
                self.world.deaths[key] += 1
                self.dead = "process"
                return

    def reply(self) -> Reply | Lost | None:
        world = self.world
        if self.unstartable:
            return Lost("no such module", blameless=True, never_started=True)
        if self.dead == "node":
            return Lost("its node is gone", blameless=True)
        if self.dead:
            return Lost("its process died")
        if self.stopped or world.chance(self.poll_slowness):
            return None
        answers, self.finished = self.finished, []
        if self.said and world.trouble(0.1):
            answers = [*answers, world.random.choice(self.said)]
        self.said += answers
        ready = world.now >= self.ready_at
        return Reply(tuple(answers), ready, self.steps, 0, 0, "here", 1)


@dataclass
class FakeCrew:
    """Actors of the world; see `loop.Crew`."""

    world: World
    wanted: int
    actors: dict[str, FakeActor] = field(default_factory=dict)
    hired: int = 0
    unstartable: bool = False  # new actors cannot be set up
    pending: bool = False  # new actors find no place
    late: list[tuple[tuple[int, int], Answer]] = field(default_factory=list)

    def hire(self) -> Hand | None:
        if len(self.actors) >= self.wanted:
            return None
        random = self.world.random
        self.hired += 1
        name = f"a{self.hired}"
        slowness = 0.9 if random.random() < 0.1 else 0.1
        actor = FakeActor(self.world, slowness, self.world.now + random.uniform(0, 3))
        actor.stopped, actor.unstartable = self.pending, self.unstartable
        self.actors[name] = actor
        return Hand(name, "cpu")

    def drop(self, name: str) -> None:
        actor = self.actors.pop(name)
        held = {(lease.evaluation_id, request.doc_id) for lease, request in actor.work}
        held |= {(answer.evaluation_id, answer.doc_id) for _, answer in actor.finished}
        if actor.unlucky and len(held) == 1:
            self.world.bad_luck.update(held)
        for lease, answer in actor.finished:  # a zombie's last words, recognisable
            self.late.append((lease, replace(answer, text="late")))

    def assign(self, name: str, lease: Lease) -> None:
        self.actors[name].work += [(lease, request) for request in lease.requests]

    def replies(self, patience: float, everyone: bool = False) -> Iterator[tuple[str, Reply | Lost]]:
        self.world.now += patience * self.world.random.uniform(0.1, 2)
        if self.world.trouble(0.002):  # the driver stands still, the actors do not
            for actor in self.actors.values():
                actor.live()
            self.world.now += 2 * HANG
        for name, actor in list(self.actors.items()):
            actor.live()
            reply = actor.reply()
            if isinstance(reply, Reply) and self.late and self.world.chance(0.1):
                reply = replace(reply, answers=(*reply.answers, self.late.pop()))
            if reply is not None:
                yield name, reply

    def has_room(self) -> bool:
        return True


class FakeClock:
    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.now += seconds


class Driver:
    """One session: what is missing in the store, through the real loop, over the real buffer, into the store."""

    def __init__(self, world: World, actors: int) -> None:
        self.world = world
        world.epoch += 1
        self.epoch = world.epoch
        self.buffer = buffer.Buffer(room=world.random.choice([5, 40, 100_000]))
        self.stop = False
        self.lost_lease = False
        self.handed_over: Counter[Key] = Counter()
        shards, number = [], 0
        for evaluation, requests in world.requests.items():
            left = [r for r in requests if (evaluation, r.doc_id) not in world.committed]
            pieces = list(cut(number, evaluation, left, world.random.randint(1, 5)))
            shards += pieces
            number += len(pieces)
        self.dispatcher = Dispatcher(shards)
        crew = FakeCrew(world, actors)
        slots = world.random.randint(1, 4)
        self.loop = Loop(self.dispatcher, crew, self, FakeClock(world), slots=slots, hang_timeout=HANG)

    @property
    def finished(self) -> bool:
        return self.dispatcher.done and not len(self.buffer)

    def turn(self) -> None:
        """One round of the loop and one of the writer."""
        if not self.dispatcher.done:
            self.loop.turn()
        else:
            self.world.now += 0.25
        self.write()

    def write(self) -> None:
        if not len(self.buffer) or not self.buffer.may_try(self.world.now):
            return
        batch = self.buffer.batch()
        try:
            self.world.commit(self.epoch, batch)
        except Away:
            self.buffer.failed(self.world.now)
        except LeaseIsLost:
            self.lost_lease = True
        else:
            self.buffer.landed(len(batch))

    # The loop's watcher

    def answers(self, answers: Sequence[Answer]) -> None:
        self.handed_over.update((a.evaluation_id, a.doc_id) for a in answers)
        self.buffer.add(answers)

    def has_room(self) -> bool:
        return not self.buffer.full

    def should_stop(self) -> bool:
        return self.stop

    def tick(self, view: View) -> None:
        shards = view.shards
        assert sum(shards.values()) == shards["done"] + self.dispatcher.remaining


def answer_to(evaluation: str, request: Request) -> Answer:
    trace = TokenTrace((request.doc_id,), (0.0,), (False,), (0,), (False,))
    return Answer(
        evaluation, request.doc_id, 0, FinishReason.STOP, text=f"{evaluation}{request.doc_id}", trace=trace
    )


def a_world(seed: int) -> World:
    random = Random(seed)
    requests = {
        name: [Request("t", doc, 0, RequestKind.GENERATE, "p", (1,)) for doc in range(random.randint(1, 20))]
        for name in ("greedy", "harp")[: random.randint(1, 2)]
    }
    every = [(name, r.doc_id) for name, asked in requests.items() for r in asked]
    poison = set(random.sample(every, k=1)) if random.random() < 0.2 else set()
    world = World(random, requests, poison)
    world.trouble_until = random.uniform(0, 60)
    return world


def play(seed: int) -> World:
    """One run from its submission to its end, through any number of drivers."""
    world = a_world(seed)
    actors = world.random.randint(1, 3)
    driver, zombies = Driver(world, actors), []
    for _ in range(20_000):
        if driver.finished:
            break
        if world.trouble(
            0.01
        ):  # the driver is killed, or stands still while another takes over, and then wakes up
            if world.chance(0.5):
                zombies.append(driver)
            driver = Driver(world, actors)
            world.restarts += 1
        if world.trouble(0.002):
            world.cancelled = True
        try:
            driver.turn()
        except RunFailed:  # so many losses in a row are possible here: someone resumes the run
            driver = Driver(world, actors)
            world.restarts += 1
        for zombie in zombies:
            if not zombie.lost_lease and world.chance(0.3):
                zombie.turn()
        assert max(driver.handed_over.values(), default=0) <= 1, "handed over twice"
        if driver.lost_lease:
            assert world.cancelled, "the only driver was fenced off"
            break
        if world.cancelled and not len(driver.buffer):
            break
    else:
        raise AssertionError("the run does not end")
    check(world, driver)
    return world


def check(world: World, driver: Driver) -> None:
    assert world.commits_after_cancel == 0
    every = {(name, r.doc_id) for name, asked in world.requests.items() for r in asked}
    assert world.committed.keys() <= every
    if world.cancelled:
        return
    assert world.committed.keys() == every, "lost"
    for (evaluation, doc_id), answer in world.committed.items():
        key = evaluation, doc_id
        if answer.error:
            assert key in world.poison or world.bad_luck[key] >= ALONE, "an innocent request was given up"
        else:
            assert answer.text == f"{evaluation}{doc_id}"
    assert driver.finished


def test_no_history_loses_doubles_or_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "BATCH", 3)
    replay = os.environ.get("SIMULATION_SEED")
    seeds = [int(replay)] if replay else range(HISTORIES)
    restarts = cancelled = poisoned = 0
    for seed in seeds:
        try:
            world = play(seed)
        except (AssertionError, RunFailed, KeyError) as error:
            pytest.fail(f"SIMULATION_SEED={seed}: {type(error).__name__}: {error}")
        restarts += world.restarts
        cancelled += world.cancelled
        poisoned += any(answer.error for answer in world.committed.values())
    if not replay:  # the world was as bad as it is meant to be
        assert min(restarts, poisoned) > HISTORIES / 20
        assert cancelled > HISTORIES / 200


def test_a_poisonous_request_is_given_up_after_a_known_number_of_deaths() -> None:
    for seed in range(200):
        world = a_world(seed)
        world.trouble_until = 0.0
        world.poison = {("greedy", 0)}
        driver = Driver(world, 2)
        while not driver.finished:
            driver.turn()
        assert world.committed["greedy", 0].error
        assert world.deaths["greedy", 0] <= IN_COMPANY + ALONE
        assert [key for key, answer in world.committed.items() if answer.error] == [("greedy", 0)]


def test_any_number_of_poisonous_requests_is_given_up_and_the_rest_is_answered() -> None:
    for seed in range(50):
        world = a_world(seed)
        world.trouble_until = 0.0
        world.requests = {
            "greedy": [Request("t", doc, 0, RequestKind.GENERATE, "p", (1,)) for doc in range(20)]
        }
        world.poison = {("greedy", doc) for doc in range(6)}
        driver = Driver(world, 1)
        while not driver.finished:
            driver.turn()
        assert {key for key, answer in world.committed.items() if answer.error} == world.poison
        assert len(world.committed) == 20


def test_a_driver_that_stood_still_blames_no_actor() -> None:
    for seed in range(50):
        world = a_world(seed)
        world.trouble_until, world.poison = 0.0, set()
        driver = Driver(world, 2)
        for _ in range(400):
            if world.chance(0.1):
                world.now += 3 * HANG
            driver.turn()
        assert driver.finished
        assert driver.loop._view().losses == 0


def test_an_actor_that_never_makes_its_first_step_is_replaced() -> None:
    """It answers every poll; only its engine stands still."""
    world = a_world(3)
    world.trouble_until, world.poison = 0.0, set()
    driver = Driver(world, 1)
    first = driver.loop._crew
    assert isinstance(first, FakeCrew)
    driver.turn()
    (actor,) = first.actors.values()
    actor.ready_at, actor.step = 0.0, lambda: None
    while not driver.finished:
        driver.turn()
    assert driver.loop._view().losses == 1


def test_an_actor_that_cannot_start_beside_others_is_tried_ever_more_seldom() -> None:
    world = a_world(3)
    world.trouble_until, world.poison = 0.0, set()
    driver = Driver(world, 2)
    crew = driver.loop._crew
    assert isinstance(crew, FakeCrew)
    while not any(actor.steps for actor in crew.actors.values()):
        driver.turn()
    for actor in crew.actors.values():
        actor.step = lambda: None  # type: ignore[method-assign]  # the work lasts
    crew.unstartable = True
    began, before = world.now, crew.hired
    next(iter(crew.actors.values())).dead = "process"
    while world.now < began + HANG - 2:
        driver.turn()
    assert 2 <= crew.hired - before <= 4  # after 2, 4 and 8 s


def test_nodes_that_do_not_come_back_end_the_run() -> None:
    world = a_world(3)
    world.trouble_until, world.poison = 0.0, set()
    driver = Driver(world, 1)
    crew = driver.loop._crew
    assert isinstance(crew, FakeCrew)
    for _ in range(20):
        driver.turn()
        if crew.actors and not world.committed:
            break
    for actor in crew.actors.values():
        actor.dead = "node"
    crew.has_room = lambda: False  # type: ignore[method-assign]
    crew.pending = True
    with pytest.raises(RunFailed, match="no place for an actor"):
        turn_for_ever(driver)


def test_a_cluster_without_any_place_fails_the_run_after_a_while() -> None:
    world = a_world(1)
    with pytest.raises(RunFailed, match="no place for an actor"):
        turn_for_ever(Driver(world, 0))
    assert START_SECONDS < world.now < 2 * START_SECONDS


def turn_for_ever(driver: Driver) -> None:
    while True:
        driver.turn()
