"""An end to a query whose database may not see to it itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

_TRIES = 3  # a stop between two steps of a query may go unheard
_PAUSE_S = 0.2
T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T], stop: Callable[[], None]) -> T:
    """What ``ask`` returns or raises; TimeoutError when that takes too long, and then ``stop`` is called.

    ``ask`` runs in a thread that is left behind if it does not heed ``stop``: one step of SQLite can take
    minutes and nothing in this process can interrupt it. The thread does not keep the process from ending.
    """
    answer: Future[T] = Future()
    Thread(target=_fulfil, args=(answer, ask), daemon=True, name="harp-batch query").start()
    try:
        return answer.result(seconds)
    finally:  # late, or Ctrl-C
        for _ in range(_TRIES):
            if answer.done():
                break
            stop()
            wait([answer], _PAUSE_S)


def _fulfil(answer: Future[T], ask: Callable[[], T]) -> None:
    try:
        answer.set_result(ask())
    except BaseException as error:  # noqa: BLE001 -- the caller's thread raises it
        answer.set_exception(error)
