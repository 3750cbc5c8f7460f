"""One replica with a real engine on a tiny base, for long: floods, hang-ups, slow loads, thousands of requests."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import psutil
import pytest
from line_tools import TAGS
from reference import random_adapter
from tiny import tiny_base
from vault_tools import make_manifest

from oppu_ray.base_model import Base, load_base
from oppu_ray.config import BaseConfig, Config, PeftConfig, ServeConfig, TaskConfig, TrainConfig
from oppu_ray.core import Item
from oppu_ray.registry import Version
from oppu_ray.vault import Vault
from serve.messages import Ask, Event, Failed, Finished, Started
from serve.replica import Replica, make_engine

pytestmark = pytest.mark.chaos
PEFT = PeftConfig(rank=2, alpha=4)
CONFIG = Config(
    task=TaskConfig(name="movie_tagging", labels=tuple(TAGS)),
    personal=TrainConfig(peft=PEFT, max_length=200),
    serve=ServeConfig(num_slots=3, max_rows=4, max_length=300, max_new_tokens=40),
)
USERS = [f"user-{number}" for number in range(50)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(BaseConfig(str(tiny_base(tmp_path_factory.mktemp("base"))), dtype="float32"))


@pytest.fixture(scope="module")
def vault(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """Fifty users, each with an adapter and a history that holds a word of their own."""
    made = Vault(tmp_path_factory.mktemp("vault") / "vault")
    for number, user in enumerate(USERS):
        adapter = random_adapter(PEFT, number)
        named = replace(adapter, peft_config={**adapter.peft_config, "base_model_name_or_path": "tiny"})
        made.commit(user, named, make_manifest(base=base.fingerprint))
        items = [Item(str(i), text=f"film {i} canary{number}x", label=TAGS[number % 4]) for i in range(3)]
        made.append_history(user, items)
    yield made
    made.close()


@pytest.fixture
def replica(base: Base, vault: Vault) -> Iterator[Replica]:
    one = Replica(CONFIG, base, vault, make_engine(CONFIG, base), "r1")
    yield one
    one.close()


def ask_of(vault: Vault, user: str, number: int = 0, **more: Any) -> Ask:
    question = more.pop("question", f"film {number}")
    return Ask(f"{user}-{number}-{os.urandom(4).hex()}", str(vault.user_hash(user)), question, **more)


async def answer(replica: Replica, ask: Ask) -> list[Event]:
    return [event async for event in replica.ask(ask)]


def text(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished), events
    return "".join(getattr(event, "text", "") for event in events)


def resident(replica: Replica) -> set[str]:
    return {user_hash for user_hash, _ in replica.loop.engine.slots.keys()}


def test_a_thousand_unknown_users_cost_nobody_a_slot(replica: Replica, vault: Vault) -> None:
    async def flood() -> None:
        for user in USERS[:3]:
            await answer(replica, ask_of(vault, user))
        before = resident(replica)
        for number in range(1000):
            started, *_ = await answer(replica, ask_of(vault, f"nobody-{number}", max_tokens=1))
            assert isinstance(started, Started) and (started.version, started.fallback) == (None, "no_adapter")
        assert resident(replica) == before == {str(vault.user_hash(user)) for user in USERS[:3]}

    asyncio.run(flood())


def test_five_hundred_readers_hang_up(replica: Replica, vault: Vault) -> None:
    async def hang_up() -> None:
        for number in range(500):
            async with aclosing(replica.ask(ask_of(vault, USERS[number % 5], number, stream=True))) as events:
                async for event in events:
                    if not isinstance(event, Started) or number % 2:
                        break
        whole = text(await answer(replica, ask_of(vault, "user-7")))
        assert whole == text(await answer(replica, ask_of(vault, "user-7")))

    asyncio.run(hang_up())
    engine = replica.loop.engine
    assert not engine.has_work and not engine.num_waiting and not replica.loop._sinks
    assert not any(one.num_holders for one in engine.slots._residents.values())


def test_a_slow_store_delays_its_user_alone(replica: Replica, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    go, load = threading.Event(), vault.load_version
    slow = vault.user_hash("user-9")

    def loaded(row: Version, **kwargs: Any) -> Any:
        if row.user_hash == slow:
            go.wait(60)
        return load(row, **kwargs)

    monkeypatch.setattr(vault, "load_version", loaded)

    async def both() -> tuple[list[Event], list[Event]]:
        late = asyncio.create_task(answer(replica, ask_of(vault, "user-9", deadline_s=1.0)))
        other = await answer(replica, ask_of(vault, "user-8"))
        return await late, other

    late, other = asyncio.run(both())
    go.set()
    (failed,) = late
    assert isinstance(failed, Failed) and (failed.status, failed.code) == (504, "deadline_exceeded")
    assert isinstance(other[-1], Finished)


def test_two_thousand_requests_of_fifty_users_on_three_slots(replica: Replica, vault: Vault) -> None:
    """I2 and I5 of each answer, and memory and files stay where they were."""

    def either(user: str, with_items: bool) -> Ask:
        question = {"question": Item("", text="film 1"), "top_k": 2} if with_items else {"question": "film 1"}
        return ask_of(vault, user, **question)

    async def alone() -> dict[tuple[str, bool], str]:
        return {
            (user, kind): text(await answer(replica, either(user, kind))) for user in USERS for kind in (True, False)
        }

    async def crowd(expected: dict[tuple[str, bool], str], count: int) -> None:
        draw = random.Random(count)
        for _ in range(count // 8):
            keys = [(user, draw.random() < 0.5) for user in draw.sample(USERS, 8)]
            found = await asyncio.gather(*(answer(replica, either(*key)) for key in keys))
            for (user, with_items), events in zip(keys, found, strict=True):
                started = events[0]
                current = vault.registry.current(vault.user_hash(user))
                assert isinstance(started, Started) and current and started.version == current.version
                assert all(f"canary{USERS.index(user)}x" in line for _, line in started.items)
                assert bool(started.items) == with_items and text(events) == expected[user, with_items]

    async def all_of_it() -> tuple[tuple[int, int], tuple[int, int]]:
        expected = await alone()
        await crowd(expected, 1000)
        before = used()
        await crowd(expected, 1000)
        return before, used()

    before, after = asyncio.run(all_of_it())
    assert after[0] - before[0] < 8 * 2**20 and after[1] <= before[1] + 2


def used() -> tuple[int, int]:
    """Bytes of memory that are this process's own, and its open files."""
    gc.collect()
    process = psutil.Process()
    memory = process.memory_info()
    return memory.rss - memory.shared, process.num_fds()
