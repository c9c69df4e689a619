"""An iterator that runs one item ahead in a background thread, while the item before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()


class Ahead(Iterator[T], Generic[T]):
    """Yields prepare(item) for every item, in order; the next one is fetched and prepared meanwhile.

    At most one item waits. An error of the items or of prepare is raised where its item would have come, so what was
    yielded before it is not lost. Leaving the `with` block, or close(), waits for the item in progress and drops it.

    Args:
        items: from now on read by the background thread alone; made by the caller, because a DataLoader's iterator
            draws from the global random generator when it is made.
        prepare: called in the background thread; it must draw no random numbers and take part in no collective.
    """

    def __init__(self, items: Iterator[Any], prepare: Callable[[Any], T]) -> None:
        """Begin with the first item."""
        self._items, self._prepare = items, prepare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dpofast-ahead")
        self._next: Future[Any] | None = self._thread.submit(self._fetch)

    def _fetch(self) -> Any:
        item = next(self._items, _END)
        return item if item is _END else self._prepare(item)

    def __next__(self) -> T:
        """The item that is ready, or waits for it."""
        if self._next is None:
            raise StopIteration
        ready, self._next = self._next, None  # after an error nothing follows
        item = ready.result()
        if item is _END:
            raise StopIteration
        self._next = self._thread.submit(self._fetch)
        return item

    def close(self) -> None:
        """End the thread; nothing more is yielded."""
        self._next = None
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Ahead[T]:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """close()."""
        self.close()
