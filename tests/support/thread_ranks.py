"""Ranks as threads of one process, for passes that exchange numbers and no tensors of a model."""

import threading
from concurrent.futures import ThreadPoolExecutor


class ThreadRanks:
    """One of several; like dpofast.common.ranks.Ranks without a process group."""

    is_first_of_group = True

    def __init__(self, rank, size, barrier, values):
        self.rank = self.process = rank
        self.size = self.processes = size
        self.everyone = self
        self._barrier, self._values = barrier, values

    def all_gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(60)
        values = list(self._values)
        self._barrier.wait(60)
        return values

    def all_reduce_max(self, value):
        return max(self.all_gather(value))


def in_threads(function, size=2):
    """Run function(ranks) as each of so many ranks at once; returns the results, or raises the first error."""
    barrier, values = threading.Barrier(size), [None] * size

    def run(rank):
        try:
            return function(ThreadRanks(rank, size, barrier, values))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for error in (each.exception() for each in results) if error is not None]
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (broken or errors)[0]
    return [each.result() for each in results]
