"""Threads in the place of processes, which take seconds to start."""

import threading
from concurrent.futures import ThreadPoolExecutor

PATIENCE = 10  # seconds: a thread that waits in vain is an error


class Group:
    """So many threads, each with a rank; one that is not of the group has rank 0."""

    def __init__(self, count=2):
        self.count = count
        self._barrier = threading.Barrier(count, timeout=PATIENCE)
        self._values = [None] * count
        self._own = threading.local()

    @property
    def rank(self):
        return getattr(self._own, "rank", 0)

    def gathered(self, value):
        """The values of all threads, by rank; each must call this."""
        self._values[self.rank] = value
        self._barrier.wait()
        values = [*self._values]
        self._barrier.wait()
        return values

    def run(self, function):
        """[What ``function()`` returns or raises in each thread]."""

        def attempt(rank):
            self._own.rank = rank
            try:
                return function()
            except (Exception, SystemExit) as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return [*pool.map(attempt, range(self.count))]
