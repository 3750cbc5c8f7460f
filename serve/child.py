"""An object in a Python process of its own, whose methods are called from here (arrow `serve -> child process`).

In: a class, and the arguments to make it with. Out: futures of what its methods return. For work that holds Python's
lock for long: the engine's steps and other users' requests go on in this process meanwhile.

Design: not `multiprocessing`, whose children import the parent's main module. A child is a fresh interpreter at the
other end of a socket pair, so it ends with its parent, however that ends. What is sent crosses by
`multiprocessing.connection`, pickled; no other process can reach the pair. The child runs the calls in `FairThreads`:
one user's calls do not wait behind another's.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve.fair import Busy, FairThreads

NICE = 10
"""Where processors are short, the engine and the event loop come first."""

SWITCH_S = 0.0005
"""How long a short call of one user waits for Python's lock while another user's long one runs; Python's own: 5 ms."""


class ChildLost(Busy):
    """The process ended before it answered."""


class Child:
    """An object of class `made` in a process that the first call starts, and after its end the next call again.

    Args:
        made: A class at the top of its module, which is imported in the child; `args` are sent there.
        num_threads: How many calls run at a time, one of each key.
    """

    def __init__(self, made: type, *args: Any, num_threads: int = 1):
        self._start = (made.__module__, made.__qualname__, args, num_threads)
        self._lock = threading.Lock()
        self._link: _Link | None = None

    def submit(self, key: str, method: str, *args: Any) -> Future[Any]:
        """Call a method for `key`. The future raises what the method raised, `Busy` or `ChildLost`."""
        with self._lock:
            if self._link is None or self._link.is_lost:
                self._link = _Link(self._start)
                weakref.finalize(self, self._link.end)
            return self._link.call(key, method, args)

    @property
    def is_running(self) -> bool:
        """Whether there is a process: without one, nothing is held."""
        return self._link is not None and not self._link.is_lost

    def end(self) -> None:
        """End the process at once, and with it all that it holds."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.end()


class _Link:
    """One process, and the calls that it has not answered yet."""

    def __init__(self, start: tuple[Any, ...]):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._numbers = itertools.count()
        self._calls: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self.is_lost = False
        self._send(start)
        threading.Thread(target=self._read, name="child", daemon=True).start()

    def call(self, key: str, method: str, args: tuple[Any, ...]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what was sent cannot be called back
        with self._lock:
            if self.is_lost:
                future.set_exception(ChildLost())
            else:
                number = next(self._numbers)
                self._calls[number] = future
                self._send((number, key, method, args))
        return future

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # the process has ended; `_read` tells those who wait
            self._connection.send(message)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, is_good, value = self._connection.recv()
                future = self._calls.pop(number)
                future.set_result(value) if is_good else future.set_exception(_made(*value))
        with self._lock:
            self.is_lost = True
            lost, self._calls = self._calls, {}
        for future in lost.values():
            future.set_exception(ChildLost())
        self._connection.close()
        self._process.wait()


class ChildPool:
    """Several `Child`ren with equal objects, each running one call at a time, handed out to keys in rotation."""

    def __init__(self, num_children: int, made: type, *args: Any):
        self._made = (made, *args)
        self._own = threading.local()
        self._threads = FairThreads("child-pool", num_children)

    def submit(self, key: str, method: str, *args: Any) -> Future[Any]:
        """As `Child.submit`; at most one call of a key runs at a time. `Busy` if too many wait."""
        return self._threads.submit(key, self._call, method, args)

    def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        if not hasattr(self._own, "child"):
            self._own.child = Child(*self._made)
        return self._own.child.submit("", method, *args).result()


def main(descriptor: int) -> None:
    """The child: make the object when it is first wanted, and call its methods until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.nice(NICE)
    sys.setswitchinterval(SWITCH_S)
    connection = Connection(descriptor)
    sending, making = threading.Lock(), threading.Lock()
    made: list[Any] = []

    def answer(number: int, is_good: bool, value: Any) -> None:
        with sending:
            connection.send((number, is_good, value))

    def run(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            with making:
                if not made:
                    made.append(getattr(importlib.import_module(module), name)(*made_of))
            answer(number, True, getattr(made[0], method)(*args))
        except Exception as error:
            answer(number, False, _described(error))

    with suppress(EOFError, OSError):
        module, name, made_of, num_threads = connection.recv()
        threads = FairThreads("call", num_threads)
        while True:
            number, key, method, args = connection.recv()
            try:
                threads.submit(key, partial(run, number, method, args))
            except Busy as error:
                answer(number, False, _described(error))
    os._exit(0)  # what still runs has nobody left to tell


def places_of(error: BaseException) -> str:
    """The last files and lines that an error came through, in whatever process, for the log."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    here = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return getattr(error, "__notes__", [here])[0] or "unknown"


def _described(error: Exception) -> tuple[str, str, str, str]:
    return type(error).__module__, type(error).__qualname__, str(error), places_of(error)


def _made(module: str, name: str, text: str, places: str) -> Exception:
    """The error again, its place as a note; one that names its class, where that takes more than a text."""
    try:
        error: Exception = getattr(sys.modules[module], name)(text)
    except (KeyError, AttributeError, TypeError):
        error = RuntimeError(name)
    error.add_note(places)
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
