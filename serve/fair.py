"""Bounds per user: how much of the service one user gets at a time, and how the rest waits (design decision D12).

In: a key (a user's hash, a token's id or an address) and what it asks for. Out: a place, a turn or a thread, or `Busy`.
Nothing here knows HTTP, the vault or torch.

Design: what a user asks for waits behind that user's other requests, never behind another user's queue. `Places` bounds
the requests under way, `Turns` spaces their starts by what the earlier ones cost, and `FairThreads` hands threads out
to the users in rotation.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

MAX_KEYS = 10_000
"""Keys whose next turn is remembered, before those whose turn has passed are dropped."""


class Busy(Exception):
    """There is no room for this now; the same request may succeed later."""


class Places:
    """Counts what is under way by key, at most `per_key` of each. For one event loop."""

    def __init__(self, per_key: int):
        self.per_key = per_key
        self._taken: Counter[str] = Counter()

    def is_full(self, key: str) -> bool:
        """Whether `key` has no place left."""
        return self._taken[key] >= self.per_key

    @contextmanager
    def take(self, key: str) -> Iterator[None]:
        """Hold a place of `key` while the block runs. `Busy` if none is left."""
        if self.is_full(key):
            raise Busy
        self._taken[key] += 1
        try:
            yield
        finally:
            self._taken[key] -= 1
            if not self._taken[key]:
                del self._taken[key]


class Turns:
    """Spaces the starts of a key, on average by `spacing_s` and by what was charged. For one event loop.

    Args:
        spacing_s: Between two starts.
        burst_s: What a key that was idle may use at once.
        max_wait_s: Most time that one waits for its turn.
    """

    def __init__(self, spacing_s: float, burst_s: float, max_wait_s: float):
        self.spacing_s, self.burst_s, self.max_wait_s = spacing_s, burst_s, max_wait_s
        self._used: dict[str, float] = {}  # key -> time up to which it has used its share

    async def wait(self, key: str) -> None:
        """Return when it is the turn of `key`; the turns of other keys do not matter."""
        now = time.monotonic()
        turn = self._used_by(key, now)
        self._used[key] = turn + self.spacing_s
        if turn > now:
            await asyncio.sleep(turn - now)

    def charge(self, key: str, seconds: float) -> None:
        """Move the next turn of `key` back by `seconds`."""
        now = time.monotonic()
        self._used[key] = self._used_by(key, now) + seconds
        if len(self._used) > MAX_KEYS:
            self._used = {one: at for one, at in self._used.items() if at > now - self.burst_s}

    def _used_by(self, key: str, now: float) -> float:
        idle = now - self.burst_s
        return min(max(idle, self._used.get(key, idle)), now + self.max_wait_s)


class FairThreads:
    """Threads that run functions for keys in rotation, at most `per_key` of one key at a time.

    They start as they are needed, and end with this object.

    Args:
        name: The threads' names begin with it.
        max_waiting: Of all keys together; `submit` refuses the next.
        prepare: Called first in each thread.
    """

    def __init__(
        self,
        name: str,
        num_threads: int,
        per_key: int = 1,
        max_waiting: int = 256,
        prepare: Callable[[], object] = lambda: None,
    ):
        self._name, self._num_threads, self._prepare = name, num_threads, prepare
        self._queue = _Queue(per_key, max_waiting)
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, self._queue.close)

    def submit(self, key: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a function in one of the threads when it is the turn of `key`.

        Raises:
            Busy: Too many wait already.
        """
        call = _Call(key, function, args)
        needs_thread = self._queue.put(call)
        if needs_thread and len(self._threads) < self._num_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(self._queue, self._prepare), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return call.future

    def close(self) -> None:
        """Cancel what waits, and wait for what runs."""
        self._queue.close()
        for thread in self._threads:
            thread.join()


class _Call:
    """A function to run, and the future of its result."""

    def __init__(self, key: str, function: Callable[..., Any], args: tuple[Any, ...]):
        self.key, self.future = key, Future[Any]()
        self._function, self._args = function, args

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._function(*self._args))
            except BaseException as error:
                self.future.set_exception(error)


class _Queue:
    """The calls that wait, by key, and how many of each key run. The threads hold it, and nothing else."""

    def __init__(self, per_key: int, max_waiting: int):
        self._per_key, self._max_waiting = per_key, max_waiting
        self._waiting: OrderedDict[str, deque[_Call]] = OrderedDict()  # first the key that had no turn for longest
        self._running: Counter[str] = Counter()
        self._num_waiting = self._num_idle = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, call: _Call) -> bool:
        """Add a call; returns whether no thread is there to take it. `Busy` if too many wait already."""
        with self._changed:
            if self._num_waiting >= self._max_waiting or self._is_closed:
                raise Busy
            self._waiting.setdefault(call.key, deque()).append(call)
            self._num_waiting += 1
            self._changed.notify()
            return self._num_idle < self._num_waiting

    def take(self) -> _Call | None:
        """Wait for the next call; None when the queue is closed. `done` gives the key's place back."""
        with self._changed:
            self._num_idle += 1
            while (key := self._next()) is None and not self._is_closed:
                self._changed.wait()
            self._num_idle -= 1
            if key is None:
                return None
            call = self._waiting[key].popleft()
            self._num_waiting -= 1
            if self._waiting[key]:
                self._waiting.move_to_end(key)
            else:
                del self._waiting[key]
            self._running[key] += 1
            return call

    def done(self, key: str) -> None:
        with self._changed:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            for call in [call for calls in self._waiting.values() for call in calls]:
                call.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()

    def _next(self) -> str | None:
        return next((key for key in self._waiting if self._running[key] < self._per_key), None)


def _work(queue: _Queue, prepare: Callable[[], object]) -> None:
    prepare()
    while (call := queue.take()) is not None:
        key = call.key
        call.run()
        del call  # what it holds must not live on while nothing comes
        queue.done(key)
