"""Who runs which unit, and what is done about each way to lose a worker: the pool over a Ray made of lists.

`test_faults.py` has the same on a real cluster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from oppu_ray import pool
from oppu_ray.config import Config
from oppu_ray.core import UserDone
from oppu_ray.progress import ClusterLost, Interrupted, Progress
from oppu_ray.workers import failed

A, B, C, D = (("a1", "a2"),), (("b1",),), (("c1", "c2", "c3"),), (("d1",),)
DIED, NO_MEMORY = exceptions.ActorDiedError(), exceptions.OutOfMemoryError("the node ran out of memory")
UNAVAILABLE = exceptions.ActorUnavailableError("lost on the way", None)


def raised(error: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("run", f"{type(error).__name__}: {error}", error, ip="127.0.0.1")


def done(*user_ids: str) -> list[UserDone]:
    return [UserDone(user_id, f"1-{user_id}", None, 1.0, 0.5, 2, 10) for user_id in user_ids]


class Event:
    """What is waited for: the start of an actor, or the results of a unit. An exception among them is raised."""

    def __init__(self, values: list[Any], is_ready: bool = True):
        self.values, self.is_ready = iter(values), is_ready

    def __next__(self) -> Any:
        return next(self.values)


class FakeRay:
    """Actors that do as they are told: `script[unit]` holds what each try comes to; without one, all are done."""

    def __init__(self) -> None:
        self.script: dict[Any, list[list[Any]]] = defaultdict(list)
        self.starts: dict[int, list[Event]] = defaultdict(list)
        self.runs: list[tuple[int, Any]] = []
        self.num_actors: dict[int, int] = defaultdict(int)
        self.cancelled: list[Any] = []

    def actor_class(self, *_: Any) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.actor(arguments[-1]))

    def actor(self, number: int) -> Any:
        self.num_actors[number] += 1

        def run(_: str, unit: Any) -> Event:
            self.runs.append((number, unit))
            return Event(self.script[unit].pop(0) if self.script[unit] else done(*unit[0]))

        def ready() -> Event:
            return self.starts[number].pop(0) if self.starts[number] else Event([None])

        return SimpleNamespace(run=SimpleNamespace(remote=run), ready=SimpleNamespace(remote=ready))

    def wait(self, events: list[Event], **_: Any) -> tuple[list[Event], list[Event]]:
        return [event for event in events if event.is_ready][:1], []

    def get(self, value: Any) -> Any:
        value = next(value) if isinstance(value, Event) else value
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor: Any) -> None:
        pass

    def cancel(self, stream: Any) -> None:
        self.cancelled.append(stream)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="127.0.0.1:1")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(pool, "ray", fake)
    monkeypatch.setattr(pool, "connect", lambda: None)
    monkeypatch.setattr(pool, "actor_class", fake.actor_class)
    return fake


Run = Callable[..., list[UserDone]]


@pytest.fixture
def run(ray: FakeRay) -> Run:
    def call(*shards: list[Any], progress: Progress | None = None, method: str = "train") -> list[UserDone]:
        results = pool.run_on_ray(Config(), Path("base"), "run", method, shards, progress or Progress(), lambda: False)
        return list(results)

    return call


def users(results: list[UserDone]) -> list[str]:
    return sorted(one.user_id for one in results)


def test_an_actor_runs_its_own_shard_in_order(ray: FakeRay, run: Run) -> None:
    progress = Progress()
    assert users(run([A, B], [C, D], progress=progress)) == ["a1", "a2", "b1", "c1", "c2", "c3", "d1"]
    assert [unit for number, unit in ray.runs if number == 0] == [A, B]
    assert [unit for number, unit in ray.runs if number == 1] == [C, D]
    assert (progress.num_packs_done, progress.num_recoveries, dict(ray.num_actors)) == (4, 0, {0: 1, 1: 1})


def test_a_new_actor_takes_over_the_shard_of_a_lost_one_and_nothing_is_said_twice(ray: FakeRay, run: Run) -> None:
    ray.script[A] = [[*done("a1"), DIED], done("a2", "a1")]
    progress = Progress()
    assert users(run([A, B], [D], progress=progress)) == ["a1", "a2", "b1", "d1"]
    assert [unit for number, unit in ray.runs if number == 0] == [A, A, B] and ray.num_actors[0] == 2
    assert progress.num_recoveries == len(progress.recovery_s) == 1


def test_a_failure_that_the_next_run_of_its_pack_makes_good_is_not_said(ray: FakeRay, run: Run) -> None:
    refused = [failed(user_id, "the registry is locked", is_retryable=True) for user_id in ("a1", "b1")]
    ray.script[A] = [[refused[0], DIED], done("a1", "a2")]
    ray.script[B] = [[refused[1]]]
    results = {one.user_id: one for one in run([A, B])}
    assert users(list(results.values())) == ["a1", "a2", "b1"]
    assert [user_id for user_id, one in results.items() if one.error] == ["b1"]


def test_a_pack_killed_for_memory_is_halved_until_it_fits(ray: FakeRay, run: Run) -> None:
    c1, rest, c2, c3 = (("c1",), 1), (("c2", "c3"), 1), (("c2",), 2), (("c3",), 2)
    ray.script[C], ray.script[rest] = [[NO_MEMORY]], [[NO_MEMORY]]
    assert users(run([C, D])) == ["c1", "c2", "c3", "d1"]
    assert [unit for _, unit in ray.runs] == [C, c1, rest, c2, c3, D]


def test_a_pack_that_costs_too_many_workers_is_given_up_and_the_rest_goes_on(ray: FakeRay, run: Run) -> None:
    ray.script[C] = [[DIED], [*done("c2"), DIED], [DIED]]
    ray.script[D] = [[NO_MEMORY]] * pool.MAX_DEATHS  # a user alone, who cannot be halved
    results = {one.user_id: one for one in run([C, D, A])}
    assert users(list(results.values())) == ["a1", "a2", "c1", "c2", "c3", "d1"]
    failed = [user_id for user_id, one in results.items() if one.error and one.is_retryable]
    assert sorted(failed) == ["c1", "c3", "d1"] and "cost 3 workers" in str(results["c1"].error)


def test_a_worker_that_was_told_to_end_is_no_fault_of_its_pack(ray: FakeRay, run: Run) -> None:
    ray.script[A] = [[raised(Interrupted())]] * (pool.MAX_DEATHS + 2)
    assert [one.error for one in run([A])] == [None, None]


def test_a_worker_whose_reply_was_lost_is_asked_again_and_not_replaced(ray: FakeRay, run: Run) -> None:
    ray.script[A] = [[*done("a1"), UNAVAILABLE], [UNAVAILABLE], done("a1", "a2")]
    ray.starts[0] = [Event([UNAVAILABLE])]
    progress = Progress()
    assert users(run([A], progress=progress)) == ["a1", "a2"]
    assert ray.num_actors[0] == 1 and progress.num_recoveries == 0


def test_who_is_done_takes_on_the_packs_of_an_actor_that_finds_no_room(
    ray: FakeRay, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ADOPT_AFTER_S", -1.0)
    ray.starts[1] = [Event([], is_ready=False)]
    assert users(run([A], [B, D])) == ["a1", "a2", "b1", "d1"]
    assert ray.runs == [(0, A), (0, B), (0, D)]


def test_workers_that_die_before_they_begin_are_the_clusters_failure(ray: FakeRay, run: Run) -> None:
    ray.starts[0] = [Event([DIED]) for _ in range(pool.MAX_DEATHS)]
    with pytest.raises(ClusterLost, match="worker 0 was lost 3 times before it began"):
        run([A])
    ray.script[A] = [[DIED]] * pool.MAX_DEATHS
    with pytest.raises(ClusterLost, match="while it answered"):
        run([A], method="answer")


def test_what_a_worker_raises_and_cannot_start_with_is_raised(ray: FakeRay, run: Run) -> None:
    ray.script[A] = [[raised(ValueError("target module 'x' is not a linear of this model"))]]
    with pytest.raises(ValueError, match="^target module 'x' is not a linear"):
        run([A])
    ray.starts[0] = [Event([exceptions.ActorDiedError(raised(ValueError("index.json does not exist")))])]
    with pytest.raises(ValueError, match="a worker cannot start: .*index.json does not exist"):
        run([A])


def test_a_stop_cancels_what_runs(ray: FakeRay) -> None:
    asked = iter([False, False, False, True])
    results: Iterator[Any] = pool.run_on_ray(
        Config(), Path("base"), "run", "train", [[A]], Progress(), lambda: next(asked)
    )
    with pytest.raises(Interrupted):
        list(results)
    assert len(ray.cancelled) == 1


def test_a_head_that_does_not_answer_is_noticed(ray: FakeRay, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "HEAD_LOST_AFTER_S", 0.0)
    with pytest.raises(ClusterLost, match="head at 127.0.0.1:1 does not answer"):
        run([A])
