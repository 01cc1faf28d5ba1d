"""Runs a function over items in worker threads, ahead of the consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """`map(function, items)`, in order, with up to `ahead` items (default: `workers`) beyond the one in use.

    More of them than workers keep these busy beside an item that takes long. Threads suffice: video decoding and
    encoding release the GIL, and no thread outlives a killed process.
    """
    ahead = workers if ahead is None else ahead
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
