"""The worker without Ray: what it commits, what it yields, what it does a second time, and whose adapter answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from line_tools import chat_user, oppu, tagging_user, write_config, write_users
from reference import difference
from tiny import tiny_base
from vault_tools import same

from oppu_ray import training, workers
from oppu_ray.base_model import Base, fingerprint_model
from oppu_ray.config import Config, WorkersConfig, load_config, to_dict
from oppu_ray.core import AdapterState, Example, Prediction, UserHistory
from oppu_ray.forget import forget_user
from oppu_ray.pool import RayWorker
from oppu_ray.progress import Interrupted, Progress
from oppu_ray.randomness import user_seed
from oppu_ray.registry import RegistryError
from oppu_ray.training import Ranks
from oppu_ray.vault import Manifest
from oppu_ray.workers import Worker, run_units

USERS = ("user-0", "user-1", "user-2")


@pytest.fixture(scope="module")
def tagging(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A prepared run of three users without a task adapter: its config and its base's folder."""
    folder = tmp_path_factory.mktemp("workers")
    base = tiny_base(folder / "base")
    path = write_config(folder, base, write_users(folder / "users.jsonl", [tagging_user(i) for i in range(3)]))
    oppu("prepare", path)
    return load_config(path), base


@pytest.fixture
def worker_of(tagging: tuple[Config, Path], tmp_path: Path) -> Callable[[str], Worker]:
    """Makes workers of one run each, with a vault per test."""
    config, base = tagging
    (tmp_path / "prepare").symlink_to(Path(config.run_dir) / "prepare")
    return lambda run_id: Worker(replace(config, run_dir=str(tmp_path)), base, run_id)


def adapter(worker: Worker, user_id: str) -> tuple[AdapterState, Manifest]:
    version = worker.vault.registry.unit_version(worker.run_id, worker.vault.user_hash(user_id))
    return worker.vault.load(user_id, version, base_fingerprint=None)


def test_a_seed_is_of_the_run_and_the_user_and_the_same_everywhere() -> None:
    assert user_seed(0, "ann") == 89092956587989
    assert len({user_seed(seed, user_id) for seed in (0, 1) for user_id in ("ann", "bob", "1\nann")}) == 6


def test_training_commits_each_user_with_their_lineage(worker_of: Callable[[str], Worker]) -> None:
    worker = worker_of("run-1")
    before = fingerprint_model(worker._base(worker.task_base_path).model)
    done = {one.user_id: one for one in worker.train(USERS)}
    assert set(done) == set(USERS)
    for user_id, one in done.items():
        state, manifest = adapter(worker, user_id)
        assert (one.version, one.error, one.num_steps) == (manifest.version, None, 2)
        assert one.num_tokens > 0 and one.first_loss > 0
        assert manifest.item_ids == tuple(f"u{user_id[-1]}-{i}" for i in range(3))  # the past, not the two queries
        assert (manifest.run_id, manifest.seed) == ("run-1", user_seed(0, user_id))
        assert manifest.base_fingerprint == before and manifest.recipe == json.loads(
            json.dumps(to_dict(worker.config.personal))
        )
        assert manifest.metrics == {"first_loss": one.first_loss, "last_loss": one.last_loss}
        assert state.peft_config["base_model_name_or_path"] == str(worker.task_base_path)
    assert fingerprint_model(worker._base(worker.task_base_path).model) == before


def test_a_user_after_others_is_the_user_alone(worker_of: Callable[[str], Worker]) -> None:
    busy, fresh = worker_of("busy"), worker_of("fresh")
    for unit in (("user-0",), ("user-2",), ("user-1",)):
        list(busy.train(unit))
    list(fresh.train(("user-1",)))
    assert same(adapter(busy, "user-1")[0], adapter(fresh, "user-1")[0])
    assert not same(adapter(busy, "user-1")[0], adapter(busy, "user-0")[0])


def test_what_is_committed_is_not_trained_again(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {one.user_id: one.version for one in worker_of("run").train(USERS)}
    monkeypatch.setattr(workers, "train_steps", None)
    worker = worker_of("run")
    again = list(worker.train(USERS))
    assert [(one.user_id, one.version, one.error, one.num_tokens) for one in again] == [
        (u, None, None, 0) for u in USERS
    ]
    assert {user_id: adapter(worker, user_id)[1].version for user_id in USERS} == first


def test_a_pack_cut_short_is_trained_as_a_whole_to_the_same_bits(worker_of: Callable[[str], Worker]) -> None:
    whole, cut = worker_of("whole"), worker_of("cut")
    list(whole.train(USERS))
    started = cut.train(USERS)
    first = next(started)
    started.close()  # type: ignore[attr-defined]
    assert cut.vault.done("cut", USERS) == {first.user_id}
    resumed = worker_of("cut")
    assert {one.user_id: one.error for one in resumed.train(USERS)} == dict.fromkeys(USERS)
    assert adapter(resumed, first.user_id)[1].version == first.version
    for user_id in USERS:
        assert same(adapter(resumed, user_id)[0], adapter(whole, user_id)[0])


def test_a_bad_user_fails_alone_and_is_named(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_user = workers.encode_user

    def encode(config: Config, user: UserHistory, base: Base, *memory: Any) -> list[Example]:
        if user.user_id == "user-1":
            raise ValueError("item 'u1-0': the completion is empty")
        return encode_user(config, user, base, *memory)

    monkeypatch.setattr(workers, "encode_user", encode)
    worker = worker_of("run")
    done = {one.user_id: one for one in worker.train(USERS)}
    assert done["user-1"].error == "user 'user-1': item 'u1-0': the completion is empty"
    assert done["user-1"].version is None and done["user-0"].error is done["user-2"].error is None
    assert worker.vault.done("run", USERS) == {"user-0", "user-2"}
    assert [one.user_id for one in worker.train(("user-1",))] == ["user-1"]
    monkeypatch.setattr(workers, "train_steps", None)  # and the others are not trained again because of them
    assert {one.user_id: bool(one.error) for one in worker.train(USERS)} == {
        "user-0": False,
        "user-1": True,
        "user-2": False,
    }


def texts(predictions: list[Prediction]) -> list[tuple[str, str, str, float | None]]:
    return [(one.user_id, one.query_id, one.text, one.nll) for one in predictions]


def test_each_arm_answers_with_whose_adapter_it_says(worker_of: Callable[[str], Worker]) -> None:
    worker = worker_of("run")
    with pytest.raises(ValueError, match="user 'user-0': run run has committed no adapter; run `train` first"):
        list(worker.answer(USERS, "oppu"))
    list(worker.train(USERS))
    task, oppu_arm = list(worker.answer(USERS, "task")), list(worker.answer(USERS, "oppu"))
    assert [(one.user_id, one.query_id) for one in oppu_arm] == [(u, f"u{u[-1]}-{i}") for u in USERS for i in (3, 4)]
    assert {one.arm for one in oppu_arm} == {"oppu"} and [one.nll for one in task] != [one.nll for one in oppu_arm]
    assert texts(list(worker.answer(USERS, "swapped", USERS))) == texts(oppu_arm)
    swapped = list(worker.answer(USERS, "swapped", ("user-1", "user-2", "user-0")))
    assert all(a.nll != b.nll for a, b in zip(swapped, oppu_arm, strict=True))
    assert texts(list(worker.answer(USERS, "base"))) == texts(task)  # there is no task adapter in this run


def test_answers_go_on_without_who_is_forgotten_meanwhile(worker_of: Callable[[str], Worker]) -> None:
    worker = worker_of("run")
    list(worker.train(USERS))
    before = {arm: texts(list(worker.answer(USERS, arm, (*USERS[1:], USERS[0])))) for arm in ("oppu", "swapped")}
    forget_user(worker.vault, "user-1")
    for arm, without in (("oppu", "user-1"), ("swapped", "user-0")):  # user-0 would wear what user-1 had
        after = texts(list(worker.answer(USERS, arm, (*USERS[1:], USERS[0]))))
        assert after == [one for one in before[arm] if one[0] != without]
    assert list(worker.answer(("user-1",), "oppu")) == []


def test_a_run_answers_with_its_own_adapters_whatever_is_current(worker_of: Callable[[str], Worker]) -> None:
    first, second = worker_of("first"), worker_of("second")
    second.config = replace(second.config, seed=7)
    list(first.train(("user-0",)))
    before = texts(list(first.answer(("user-0",), "oppu")))
    list(second.train(("user-0",)))
    assert texts(list(first.answer(("user-0",), "oppu"))) == before
    assert texts(list(second.answer(("user-0",), "oppu"))) != before


def test_the_actor_is_the_worker_and_takes_what_ray_sends(tmp_path: Path, tagging: tuple[Config, Path]) -> None:
    config, base = tagging
    (tmp_path / "prepare").symlink_to(Path(config.run_dir) / "prepare")
    config = replace(config, run_dir=str(tmp_path))
    inline = {one.user_id: replace(one, version=None) for one in run_units(config, base, "a", "train", [[(USERS,)]])}
    actor = RayWorker(json.loads(json.dumps(to_dict(config))), str(base), "b", 0)
    stream = actor.run("train", (USERS,))
    *done, steps = [next(stream), stream.send("anything"), *stream]  # type: ignore[attr-defined]
    taken = {one.user_id: one.num_steps for one in done}
    assert (steps.num_tokens, Counter(steps.user_ids)) == (sum(one.num_tokens for one in done), Counter(taken))
    assert {one.user_id: replace(one, version=None) for one in done} == inline
    answers = actor.run("answer", (USERS, "task"))
    assert next(answers).query_id == "u0-3" and answers.send("anything").query_id == "u0-4"  # type: ignore[attr-defined]


def test_inline_units_run_in_order_and_report_progress(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    path = write_config(
        tmp_path, base, write_users(tmp_path / "u.jsonl", [chat_user(i) for i in range(3)]), "chat_reply"
    )
    oppu("prepare", path)
    config, progress = load_config(path), Progress()
    shards = [[(("user-2", "user-0"),)], [(("user-1",),)]]
    done = list(run_units(config, base, "run", "train", shards, progress))
    assert {one.user_id for one in done[:2]} == {"user-0", "user-2"} and done[2].user_id == "user-1"
    assert progress.num_tokens == sum(one.num_tokens for one in done) and progress.num_packs_done == 2


def rows(worker: Worker, user_id: str) -> list[str]:
    """Which runs have committed the user, oldest first."""
    return [row.run_id for row in worker.vault.registry.versions(worker.vault.user_hash(user_id))]


def test_a_committed_pack_opens_no_base_and_reads_no_history(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(worker_of("run").train(USERS))
    monkeypatch.setattr(workers, "open_base", None)
    monkeypatch.setattr(workers, "read_users", None)
    assert {one.user_id: one.error for one in worker_of("run").train(USERS)} == dict.fromkeys(USERS)


def test_two_workers_of_one_run_on_the_same_pack_commit_each_user_once(worker_of: Callable[[str], Worker]) -> None:
    alone, one, two = worker_of("alone"), worker_of("run"), worker_of("run")
    list(alone.train(USERS))
    first = one.train(USERS)
    done_by_one = [next(first)]  # the first user is committed, then somebody submits the run again
    second = two.train(USERS)
    done_by_two = [next(second)]
    done_by_one += list(first)  # whose leases the second has taken over
    done_by_two += list(second)
    assert {done.user_id: done.error for done in done_by_one} == dict.fromkeys(USERS)
    assert {done.user_id: done.version for done in done_by_one} == {done.user_id: done.version for done in done_by_two}
    for user_id in USERS:
        assert rows(one, user_id) == ["alone", "run"] and same(adapter(one, user_id)[0], adapter(alone, user_id)[0])


def test_another_run_keeps_its_users_to_itself_until_it_is_done(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LEASE_POLL_S", 0.01)
    busy, late = worker_of("busy"), worker_of("late")
    training = busy.train(USERS[:2])
    next(training)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "LEASE_TTL_S", 0.1)  # it waits for as long as a lease of a dead worker would live
        refused = {one.user_id: one for one in late.train(USERS)}
    assert [user_id for user_id in USERS if refused[user_id].is_retryable] == list(USERS[:2])
    assert "leased to busy" in str(refused["user-0"].error) and refused["user-2"].error is None
    list(training)
    assert {one.user_id: one.error for one in late.train(USERS)} == dict.fromkeys(USERS)
    assert [rows(late, user_id) for user_id in USERS] == [["busy", "late"], ["busy", "late"], ["late"]]


def test_a_base_is_opened_with_as_many_threads_as_the_config_says(tagging: tuple[Config, Path]) -> None:
    """In every stage and process: the last bits of an adapter depend on it."""
    before = torch.get_num_threads()
    try:
        for num in (3, 1):
            workers.open_base(replace(tagging[0], workers=WorkersConfig(threads=num)))
            assert torch.get_num_threads() == num
    finally:
        torch.set_num_threads(before)


def test_a_user_forgotten_while_in_training_does_not_come_back(worker_of: Callable[[str], Worker]) -> None:
    worker = worker_of("run")
    worker.vault.add_users(USERS)
    training = worker.train(USERS)
    done = [next(training)]
    forgotten = next(user_id for user_id in USERS if user_id != done[0].user_id)
    forget_user(worker.vault, forgotten)
    done += list(training)
    assert {one.user_id for one in done if one.error is None} == set(USERS) - {forgotten}
    assert "lost" in next(one.error or "" for one in done if one.user_id == forgotten)
    assert not worker.vault.registry.has_user(worker.vault.user_hash(forgotten))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (IndexError("the secret words"), "IndexError in training (test_workers.py"),
    ],
)
def test_a_pack_that_does_not_get_through_is_halved_until_the_user_at_fault_fails_alone(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    whole, worker, train_steps = worker_of("whole"), worker_of("run"), workers.train_steps
    list(whole.train(USERS))
    packs: list[tuple[str, ...]] = []

    def train(bank: Any, works: Any, *rest: Any) -> Iterator[Any]:
        packs.append(tuple(work.user_id for work in works))
        if "user-1" in packs[-1]:
            raise error
        yield from train_steps(bank, works, *rest)

    monkeypatch.setattr(workers, "train_steps", train)
    done = {one.user_id: one for one in worker.train(USERS)}
    assert packs == [USERS, ("user-0",), ("user-1", "user-2"), ("user-1",), ("user-2",)]
    assert str(done["user-1"].error).startswith(f"user 'user-1': {reason}") and "secret" not in str(done)
    assert done["user-1"].is_retryable
    assert [done[user_id].num_splits for user_id in ("user-0", "user-2")] == [1, 2]
    for user_id in ("user-0", "user-2"):
        assert difference(adapter(worker, user_id)[0], adapter(whole, user_id)[0]) < 1e-5  # other shapes, other bits
    assert worker.vault.registry.leaseholder(worker.vault.user_hash("user-1")) is None


def test_a_worker_told_to_stop_leaves_a_checkpoint_and_the_next_goes_on_from_it(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = worker_of("whole"), worker_of("run")
    list(whole.train(USERS))
    stopped.should_stop = lambda: True
    with pytest.raises(Interrupted):
        list(stopped.train(USERS))
    (steps,) = (stopped.run_dir / "checkpoints").glob("run-*/*")
    assert steps.name == "00000001" and not stopped.vault.done("run", USERS)
    begun: list[int] = []
    backward_step = training.backward_step
    monkeypatch.setattr(training, "backward_step", lambda *a: begun.append(a[3]) or backward_step(*a))
    resumed = worker_of("run")
    done = list(resumed.train(USERS))
    assert begun == [1] and {one.num_steps for one in done} == {2}
    assert not list((stopped.run_dir / "checkpoints").iterdir())
    for user_id in USERS:
        assert same(adapter(resumed, user_id)[0], adapter(whole, user_id)[0])


def test_a_commit_that_fails_is_the_failure_of_its_user_and_may_succeed_later(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of("run")
    with monkeypatch.context() as patch:
        patch.setattr(worker.vault, "commit", lambda *_: (_ for _ in ()).throw(ValueError("could not commit: full")))
        done = list(worker.train(USERS))
    assert {one.is_retryable for one in done} == {True} and {one.version for one in done} == {None}
    assert {one.error for one in worker.train(USERS)} == {None}


@pytest.mark.parametrize(("part", "method"), [("vault", "append_history"), ("memories", "open"), ("vault", "commit")])
def test_a_locked_registry_is_the_failure_of_a_user_but_of_the_whole_group_of_ranks(
    worker_of: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch, part: str, method: str
) -> None:
    worker = worker_of("run")

    def locked(*_: Any, **__: Any) -> None:
        raise RegistryError("registry: database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(worker, part), method, locked)
        done = list(worker.train(USERS))
        worker.ranks = Ranks()
        with pytest.raises(RegistryError, match="locked"):
            list(worker.train(USERS))
    assert [one.user_id for one in done if one.is_retryable] == list(USERS)
    assert {one.error for one in worker.train(USERS)} == {None}
