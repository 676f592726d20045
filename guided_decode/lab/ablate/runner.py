"""Works off what is to be done, one thing at a time or several, and keeps each as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


class Abandoned(KeyboardInterrupt):
    """The user interrupted again: threads that were at work still are, and nobody waits for them.

    Python itself waits for them as it exits.
    """


def work_off(
    things: Sequence[T],
    work: Callable[[T], Any],
    done: Callable[[T, Any], None],
    *,
    at_once: int = 1,
    waiting_for: Callable[[int], None] = lambda count: None,
) -> None:
    """Works on each thing, `at_once` of them at a time, and hands on what comes of it.

    Where one fails, or the user interrupts, no other is begun, those under way come to their end
    and are handed on, and then the failure is raised: of several the first. Where the user
    interrupts again, those under way are lost.

    Args:
        things: in the order in which they are begun.
        work: makes what is handed on; called in threads where several are worked on at once.
        done: gets each thing with what was made, in the thread of the caller.
        at_once: how many are under way.
        waiting_for: told of an interrupt with how many are under way, where they are waited for.

    Raises Abandoned: the second interrupt.
    """
    if at_once == 1:
        for thing in things:
            done(thing, work(thing))
        return
    waiting = iter(things)
    failure: BaseException | None = None
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="guided-decode-ablate")
    running: dict[Future[Any], T] = {}
    interrupted = False
    _begin(pool, work, waiting, running, at_once)
    while running:
        try:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done(running.pop(future), future.result())
        except KeyboardInterrupt as error:
            if interrupted:
                pool.shutdown(wait=False, cancel_futures=True)
                raise Abandoned from None
            interrupted, failure = True, failure or error
            if running:
                waiting_for(len(running))
        except BaseException as error:
            failure = failure or error
        if failure is None:
            _begin(pool, work, waiting, running, at_once)
    pool.shutdown()
    if failure is not None:
        raise failure


def _begin(
    pool: ThreadPoolExecutor, work: Callable[[T], Any], waiting: Iterator[T],
    running: dict[Future[Any], T], at_once: int,
) -> None:  # fmt: skip
    while len(running) < at_once and (thing := next(waiting, None)) is not None:
        running[pool.submit(work, thing)] = thing
