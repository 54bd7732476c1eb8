"""The thread that writes: answers and heartbeats go into the store while the driver's own thread decodes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition, Thread
from typing import Any

from harp_batch.cluster.buffer import Buffer
from harp_batch.errors import StoreUnavailable
from harp_batch.records import Answer
from harp_batch.store import HEARTBEAT, Attempt, Store

LAST_SECONDS = 2.0  # for the thread to end
OUTAGE = 3600.0  # seconds that a database may be away before the run gives up

Snapshot = Callable[[], tuple[dict[str, Any], float]]  # what a heartbeat tells: state, seconds of decoding
Committed = Callable[[list[Answer]], None]  # told in this thread
Mend = Callable[[Answer, ValueError], Answer]


class Writer:
    """Commits answers in order, each once, whatever the database does meanwhile.

    An outage is waited out: answers are kept, and `has_room` says when decoding should pause. What ends the run
    (another driver took it over, the disk is full, the database stayed away for an hour) is raised by `check`.
    """

    def __init__(
        self, store: Store, attempt: Attempt, snapshot: Snapshot, committed: Committed, mend: Mend
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._snapshot = snapshot
        self._committed = committed
        self._mend = mend
        self._buffer = Buffer()
        self._changed = Condition()
        self._beat_at = 0.0
        self._away = False
        self._closing = False
        self._broken: Exception | None = None
        self.cancelled = False
        self._thread = Thread(target=self._work, name="writer", daemon=True)

    def start(self) -> None:
        """Begin to write and to beat."""
        self._thread.start()

    def put(self, answers: Sequence[Answer]) -> None:
        """Commit ``answers`` soon."""
        with self._changed:
            self._buffer.add(answers)
            self._changed.notify_all()

    @property
    def has_room(self) -> bool:
        """Whether more answers may come."""
        return not self._buffer.full

    @property
    def waiting(self) -> int:
        """How many answers are not committed yet."""
        return len(self._buffer)

    @property
    def away(self) -> bool:
        """Whether the database does not answer at present."""
        return self._away

    def check(self) -> None:
        """Raise what broke the writer, if anything did."""
        if self._broken is not None:
            raise self._broken

    def drain(self, give_up: Callable[[], bool]) -> None:
        """Wait until everything is committed, or ``give_up`` says so; raises like `check`."""
        while self.waiting and not give_up():
            self.check()
            with self._changed:
                self._changed.wait(0.1)
        self.check()

    def close(self) -> None:
        """End the thread after what it is doing now; one that waits for the database is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(LAST_SECONDS)

    def _work(self) -> None:
        try:
            while not self._closing:
                self._write()
                with self._changed:
                    if not self._closing and not (len(self._buffer) and not self._away):
                        self._changed.wait(0.1 if self._away else HEARTBEAT / 4)
            self._last_beat()
        except Exception as exc:  # noqa: BLE001 - the driver's thread raises it
            self._broken = exc

    def _write(self) -> None:
        now = time.monotonic()
        if not self._buffer.may_try(now):
            return
        try:
            self._beat(now)
            self._commit()
        except StoreUnavailable:
            self._away = True
            if self._buffer.failed(time.monotonic()) > OUTAGE:
                raise
            return
        self._away = False

    def _beat(self, now: float) -> None:
        if now - self._beat_at >= HEARTBEAT:
            state, seconds = self._snapshot()
            self.cancelled = self._store.heartbeat(self._attempt, state, seconds) or self.cancelled
            self._beat_at = now

    def _last_beat(self) -> None:
        """Leave behind how the attempt stood at its end."""
        if not self._away:
            self._beat_at = -math.inf
            with suppress(StoreUnavailable):
                self._beat(time.monotonic())

    def _commit(self) -> None:
        with self._changed:
            batch = self._buffer.batch()
        if batch:
            self._committed(self._commit_all(batch))
        with self._changed:
            self._buffer.landed(len(batch))
            self._changed.notify_all()

    def _commit_all(self, answers: list[Answer]) -> list[Answer]:
        """Commit ``answers``; one with values that no database can hold becomes that sample's error."""
        try:
            self._store.commit(answers, self._attempt)
        except ValueError as exc:
            if len(answers) > 1:
                return [done for answer in answers for done in self._commit_all([answer])]
            answers = [self._mend(answers[0], exc)]
            self._store.commit(answers, self._attempt)
        return answers
