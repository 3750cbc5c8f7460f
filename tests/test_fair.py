"""Bounds per key: one key's calls never take what another key waits for, whatever blocks."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from vault_tools import Clock

from oppu_ray.core import InputError
from serve import fair
from serve.child import Child, ChildLost, ChildPool
from serve.fair import Busy, FairThreads, Places, Turns
from serve.messages import failure_of


class Gate:
    """A call that blocks until it is opened, and counts who has come."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.came: list[str] = []

    def __call__(self, name: str) -> str:
        self.came.append(name)
        assert self.open.wait(30)
        return name


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads_named(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


# ---- threads


def test_a_key_that_blocks_has_its_own_threads_and_no_more(gate: Gate) -> None:
    threads = FairThreads("t1", 4, per_key=2)
    waiting = [threads.submit("ann", gate, "ann") for _ in range(20)]
    until(lambda: len(gate.came) == 2)
    assert [threads.submit(key, str.upper, key).result(30) for key in ("bob", "eve", "bob")] == ["BOB", "EVE", "BOB"]
    assert len(gate.came) == 2, "more of one key than it may have"
    gate.open.set()
    assert {future.result(30) for future in waiting} == {"ann"}
    threads.close()
    assert not threads_named("t1-")


def test_keys_have_their_turns_in_rotation(gate: Gate) -> None:
    threads, order = FairThreads("t2", 1), list[str]()
    first = threads.submit("zoe", gate, "zoe")
    until(lambda: bool(gate.came))
    calls = [threads.submit(key, order.append, key) for key in ("ann", "ann", "ann", "bob", "eve", "bob")]
    gate.open.set()
    for future in (first, *calls):
        future.result(30)
    assert order == ["ann", "bob", "eve", "ann", "bob", "ann"]
    threads.close()


def test_what_waits_is_bounded_and_closing_cancels_it(gate: Gate) -> None:
    threads = FairThreads("t3", 1, max_waiting=2)
    running = threads.submit("ann", gate, "ann")
    until(lambda: bool(gate.came))
    waiting = [threads.submit("ann", gate, "late") for _ in range(2)]
    with pytest.raises(Busy):
        threads.submit("bob", str.upper, "bob")
    closing = threading.Thread(target=threads.close)
    closing.start()
    until(lambda: all(future.cancelled() for future in waiting))
    gate.open.set()
    closing.join(30)
    assert running.result(0) == "ann" and gate.came == ["ann"] and not closing.is_alive()
    with pytest.raises(Busy):
        threads.submit("bob", str.upper, "bob")


def test_threads_end_with_their_owner_and_hold_nothing_of_a_call() -> None:
    class Held:
        pass

    threads, held = FairThreads("t4", 2), Held()
    threads.submit("ann", id, held).result(30)
    del held
    until(lambda: gc.collect() >= 0 and not [one for one in gc.get_objects() if isinstance(one, Held)])
    assert threads_named("t4-")
    del threads
    until(lambda: gc.collect() >= 0 and not threads_named("t4-"))


# ---- places and turns


def test_places_are_counted_by_key_and_given_back() -> None:
    places = Places(2)
    with places.take("ann"), places.take("ann"), places.take("bob"):
        assert places.is_full("ann") and not places.is_full("bob")
        with pytest.raises(Busy), places.take("ann"):
            pass
    assert not places.is_full("ann") and not places._taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only while someone sleeps."""
    made = Clock()

    async def sleep(seconds: float) -> None:
        made.now += seconds

    monkeypatch.setattr(fair.time, "monotonic", made)
    monkeypatch.setattr(fair.asyncio, "sleep", sleep)
    return made


def test_a_key_waits_for_its_own_turns_only(clock: Clock) -> None:
    turns, began = Turns(spacing_s=1.0, burst_s=3.0, max_wait_s=10.0), clock.now

    async def run() -> None:
        for _ in range(4):  # what it did not use while it was idle, and one more
            await turns.wait("ann")
        assert clock.now == began
        await turns.wait("ann")
        assert clock.now == began + 1
        await turns.wait("bob")
        assert clock.now == began + 1, "bob waited for ann"
        turns.charge("ann", 5.0)
        await turns.wait("ann")
        assert clock.now == began + 7
        turns.charge("ann", 1000.0)
        await turns.wait("ann")
        assert clock.now == began + 17, "longer than max_wait_s"

    asyncio.run(run())


def test_keys_whose_turn_has_passed_are_not_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "MAX_KEYS", 10)
    turns = Turns(spacing_s=1.0, burst_s=3.0, max_wait_s=10.0)
    for number in range(100):
        clock.now += 10
        turns.charge(str(number), 1.0)
    assert len(turns._used) <= 11


# ---- child processes


class Own:
    """What lives in the child in these tests."""

    def __init__(self, start: int):
        self.calls = Counter({"start": start})

    def count(self, name: str) -> int:
        self.calls[name] += 1
        return self.calls[name]

    def pid(self) -> int:
        return os.getpid()

    def fail(self, kind: str) -> None:
        if kind == "input":
            raise InputError("film: expected text")
        if kind == "unicode":
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "canary")
        raise type("Local", (Exception,), {})("canary")

    def read(self, path: str) -> str:
        with open(path) as file:  # a pipe: blocks until somebody writes
            return file.read()


def test_an_object_lives_in_its_own_process_from_call_to_call() -> None:
    child = Child(Own, 5)
    assert [child.submit("ann", "count", "start").result(60) for _ in range(2)] == [6, 7]
    pid = child.submit("ann", "pid").result(60)
    assert pid != os.getpid()
    child.end()
    assert not psutil.pid_exists(pid)
    assert child.submit("ann", "count", "start").result(60) == 6, "a new process, a new object"
    child.end()


def test_errors_come_back_with_their_class_and_place_and_nothing_else() -> None:
    child = Child(Own, 0)
    failed = failure_of(child.submit("ann", "fail", "input").exception(60), "here")  # type: ignore[arg-type]
    assert (failed.status, failed.message) == (400, "film: expected text")
    for kind, shown in (("unicode", "UnicodeDecodeError"), ("other", "Local")):
        other = child.submit("ann", "fail", kind).exception(60)
        assert type(other) is RuntimeError and str(other) == shown and "test_fair.py:" in other.__notes__[0]
    assert child.submit("ann", "count", "start").result(60) == 1, "and the child lives on"
    child.end()


def test_a_child_that_dies_fails_its_calls_and_the_next_call_starts_another(tmp_path: Path) -> None:
    child = Child(Own, 0, num_threads=2)
    pid = child.submit("bob", "pid").result(60)
    os.mkfifo(tmp_path / "pipe")
    blocked = child.submit("ann", "read", str(tmp_path / "pipe"))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildLost):
        blocked.result(60)
    assert child.submit("bob", "pid").result(60) != pid
    child.end()


def test_one_keys_call_in_a_child_does_not_hold_another_key_up(tmp_path: Path) -> None:
    child, pool = Child(Own, 0, num_threads=2), ChildPool(2, Own, 0)
    os.mkfifo(tmp_path / "pipe")
    for one in (child, pool):
        blocked = [one.submit("ann", "read", str(tmp_path / "pipe")) for _ in range(5)]
        assert one.submit("bob", "count", "start").result(60) >= 1
        for future in blocked:
            with open(tmp_path / "pipe", "w") as file:
                file.write("done")
            until(lambda future=future: future.done())  # type: ignore[misc]
        assert {future.result(0) for future in blocked} == {"done"}
    child.end()


def test_children_end_with_their_owner_and_with_their_parent() -> None:
    child = Child(Own, 0)
    pid = child.submit("ann", "pid").result(60)
    del child
    until(lambda: gc.collect() >= 0 and not psutil.pid_exists(pid))
    code = (
        "import time; from serve.child import Child; from test_fair import Own;"
        "child = Child(Own, 0); print(child.submit('a', 'pid').result(), flush=True); time.sleep(600)"
    )
    here = Path(__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
