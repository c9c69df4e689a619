"""An iterator that runs one item ahead in a background thread, while the item before it is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
_END = object()
# What close() waits for an item in progress. Packing takes less; what takes longer waits for a source.
_PATIENCE_S = 2.0


class _Outcome(NamedTuple):
    """What came of an item: prepared, _END after the last, or an error."""

    item: Any
    error: BaseException | None = None


class Ahead(Iterator[T], Generic[T]):
    """Yields prepare(item) for every item, in order; the next one is fetched and prepared meanwhile.

    At most one item waits. An error of the items or of prepare is raised where its item would have come, so what was
    yielded before it is not lost. Leaving the `with` block, or close(), drops the item in progress. It waits for that,
    but for two seconds at most: a stream that blocks keeps neither the caller nor, as the thread is a daemon, the
    process.

    Args:
        items: from now on read by the background thread alone; made by the caller, because a DataLoader's iterator
            draws from the global random generator when it is made.
        prepare: called in the background thread; it must draw no random numbers and take part in no collective.
    """

    def __init__(self, items: Iterator[Any], prepare: Callable[[Any], T]) -> None:
        """Begin with the first item."""
        self._items, self._prepare = items, prepare
        self._ready: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(1)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="dpofast-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._wanted.acquire() and not self._ended:
            outcome = self._fetch()
            self._ready.put(outcome)
            if outcome.item is _END or outcome.error is not None:
                return

    def _fetch(self) -> _Outcome:
        try:
            item = next(self._items, _END)
            return _Outcome(item if item is _END else self._prepare(item))
        except BaseException as error:  # raised where the item is waited for
            return _Outcome(None, error)

    def __next__(self) -> T:
        """The item that is ready, or waits for it."""
        if self._ended:
            raise StopIteration
        outcome = self._ready.get()
        if outcome.error is not None or outcome.item is _END:
            self._ended = True  # after an error nothing follows
            if outcome.error is not None:
                raise outcome.error
            raise StopIteration
        self._wanted.release()
        return outcome.item

    def close(self) -> None:
        """End the thread; nothing more is yielded."""
        self._ended = True
        self._wanted.release()
        self._thread.join(_PATIENCE_S)

    def __enter__(self) -> Ahead[T]:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """close()."""
        self.close()
