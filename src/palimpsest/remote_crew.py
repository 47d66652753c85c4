"""Threads that work off numbered items, and the pace at which they may ask."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from palimpsest.errors import PalimpsestError

R = TypeVar("R")


class Pace:
    """Spaces requests evenly, over all threads, and holds them back when the server says so."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        """Allow `per_minute` requests (None = any number) by `clock`'s seconds."""
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._next = self._held = clock()

    def wait_turn(self, sleep: Callable[[float], object], stop: threading.Event) -> None:
        """Return when this thread may send one request, or when `stop` is set."""
        while not stop.is_set() and (wait_s := self._reserve()) > 0:
            sleep(wait_s)

    def hold(self, seconds: float) -> None:
        """Let nobody begin a request for so long."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)

    def _reserve(self) -> float:
        """Take the turn and return 0, or return the seconds after which to try again."""
        with self._lock:
            now = self._clock()
            wait_s = max(self._next, self._held) - now
            if wait_s > 0:
                return wait_s
            self._next = now + self._interval_s
            return 0.0


class Crew(Generic[R]):
    """A `with` block in which daemon threads call `work(index, stop)` for every index.

    Results come to the one thread that calls `wait`, so that it alone touches files. Leaving the
    block stops the threads: none begins another item, and what is still under way is dropped.
    """

    def __init__(
        self,
        work: Callable[[int, threading.Event], R | None],
        total: int,
        size: int,
        gate: threading.Event,
    ) -> None:
        """Prepare; only the first thread works until `gate` is set: it finds out what is wrong."""
        self._work, self._gate = work, gate
        self._todo = deque(range(total))
        self._done: queue.SimpleQueue[tuple[int, R] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(number,), name="palimpsest-remote", daemon=True
            )
            for number in range(min(size, total))
        ]

    def __enter__(self) -> Crew[R]:
        """Start the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the threads; those that wait for a server end with their request."""
        self._stop.set()

    def wait(self) -> tuple[int, R]:
        """Return the next result, or raise what a thread raised."""
        got = self._done.get()
        if isinstance(got, BaseException):
            raise got
        return got

    def rest(self, grace_s: float) -> Iterator[tuple[int, R]]:
        """Let the threads end, within `grace_s` seconds, and yield the results not yet taken."""
        self._stop.set()
        end = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        while True:
            try:
                got = self._done.get_nowait()
            except queue.Empty:
                return
            if not isinstance(got, BaseException):
                yield got

    def _run(self, number: int) -> None:
        while number > 0 and not self._gate.wait(0.02):
            if self._stop.is_set():
                return
        while not self._stop.is_set():
            try:
                index = self._todo.popleft()
            except IndexError:
                return
            try:
                result = self._work(index, self._stop)
            except PalimpsestError as error:
                self._done.put(error)
                return
            except BaseException:
                self._done.put(AssertionError(f"item {index} broke its thread: see above"))
                raise
            if result is not None:
                self._done.put((index, result))
