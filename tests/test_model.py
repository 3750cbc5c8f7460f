"""Vault, slots and engine against a dictionary: whatever users do in whatever order, each gets what is theirs.

The dictionary knows every version's seed, and from the seed what that adapter answers when it is alone in the world.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seed_of_run
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import random_adapter, same_bits
from tiny import tiny_base
from vault_tools import Clock, make_items, make_manifest, memory_folder

from oppu_ray import vault as vault_module
from oppu_ray.base_model import Base, load_base
from oppu_ray.config import BaseConfig, Config, PeftConfig, ServeConfig, TaskConfig
from oppu_ray.core import AdapterState
from oppu_ray.forget import forget_items, forget_user
from oppu_ray.inference import Engine
from oppu_ray.registry import Refused
from oppu_ray.vault import CorruptError, Vault
from serve.messages import Ask, Event, Finished, Started
from serve.replica import Replica, make_engine

PEFT = PeftConfig(rank=2, alpha=4)
CONFIG = Config(
    task=TaskConfig(name="movie_tagging"),
    serve=ServeConfig(num_slots=2, max_rows=3, max_length=100, max_new_tokens=5, prefix_bytes=2**18),
)
CONFIG = replace(CONFIG, personal=replace(CONFIG.personal, peft=PEFT))
USERS = ("ann", "bob", "cleo")
SHARED = -1

user = st.sampled_from(USERS)
seed = st.integers(0, 5)
made = st.tuples(seed, st.sampled_from((True, True, False)), st.sampled_from((True, True, False)))
"""A version to train: its seed, whether it stands on the service's base, whether it becomes the current one."""
flip = st.tuples(st.sampled_from((1, 1, 1, 0, 2)), st.integers(0, 10**6))
"""A byte to flip: in which of a version's three files (1 has the tensors), and how far from its end."""


@functools.cache
def base(number: int = 0) -> Base:
    """The same base every time; two engines at once need one each, since a bank wraps the model's layers."""
    with tempfile.TemporaryDirectory() as folder:
        return load_base(BaseConfig(str(tiny_base(Path(folder))), dtype="float32"))


@functools.cache
def adapter(number: int) -> AdapterState:
    made = random_adapter(PEFT, number)
    return replace(made, peft_config={**made.peft_config, "base_model_name_or_path": "tiny"})


class Crash(BaseException):
    """The process is dead at this point."""


@dataclass
class Made:
    """One version as the dictionary knows it."""

    name: str
    seed: int
    base: str
    items: frozenset[str]
    is_good: bool = True
    is_damaged: bool = False


@dataclass
class Person:
    """What a user should have: versions oldest first, the current one's name, ids of their items."""

    versions: list[Made] = field(default_factory=list)
    current: str | None = None
    items: list[str] = field(default_factory=list)

    def version(self, name: str | None) -> Made | None:
        return next((one for one in self.versions if one.name == name), None)

    def newest(self, *, of_base: str | None = None, below: Made | None = None) -> Made | None:
        found = self.versions[: self.versions.index(below)] if below else self.versions
        good = [one for one in found if one.is_good and of_base in (None, one.base)]
        return good[-1] if good else None

    def quarantine(self, bad: Made) -> None:
        bad.is_good = False
        if self.current == bad.name:
            next_one = self.newest(of_base=bad.base)
            self.current = next_one.name if next_one else None

    def answering(self) -> Made | None:
        """Whose turn it is to answer over the service's base."""
        current = self.version(self.current)
        if current is None or current.base == base().fingerprint:
            return current
        return self.newest(of_base=base().fingerprint)


class Service(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = self.stack.enter_context(memory_folder()) / "vault"
        self.clock, self.people = Clock(), dict[str, Person]()
        self.tokens: dict[str, tuple[str, float]] = {}
        self.number = 0
        self.loop = asyncio.new_event_loop()

    @initialize(encrypt=st.sampled_from((False, False, True)))
    def open(self, encrypt: bool) -> None:
        """Everybody has a version of another base between two of this one: what falls back must pass it by."""
        self.vault = Vault(self.root, encrypt=encrypt, clock=self.clock)
        self.replica = Replica(CONFIG, base(), self.vault, make_engine(CONFIG, base()))
        for number, name in enumerate(USERS):
            self.train_one(name, number)
            self.train_one(name, number + 1, is_ours=False, make_current=False)
            self.train_one(name, number + 2)

    @property
    def engine(self) -> Engine:
        return self.replica.loop.engine

    def teardown(self) -> None:
        if hasattr(self, "vault"):
            self.replica.close()
            self.vault.close()
        self.loop.close()
        self.stack.close()

    # ---- training and versions

    def commit(self, name: str, number: int, *, of_base: str, make_current: bool = True) -> str:
        person = self.people.get(name, Person())
        self.vault.add_users([name])  # a commit alone brings nobody back who was forgotten
        manifest = make_manifest(tuple(person.items), base=of_base)
        return self.vault.commit(name, adapter(number), manifest, make_current=make_current)

    def committed(self, name: str, version: str, number: int, of_base: str, make_current: bool = True) -> None:
        person = self.people.setdefault(name, Person())
        person.versions.append(Made(version, number, of_base, frozenset(person.items)))
        if make_current:
            person.current = version

    def train_one(self, name: str, number: int, is_ours: bool = True, make_current: bool = True) -> None:
        of_base = base().fingerprint if is_ours else "another base"
        version = self.commit(name, number, of_base=of_base, make_current=make_current)
        self.committed(name, version, number, of_base, make_current)

    @rule(name=user, versions=st.lists(made, min_size=1, max_size=3), asks=st.booleans(), rolls_back=st.booleans())
    def train(self, name: str, versions: list[tuple[int, bool, bool]], asks: bool, rolls_back: bool) -> None:
        for number, is_ours, make_current in versions:
            self.train_one(name, number, is_ours, make_current)
            if asks:
                self.ask_both(name)
        if rolls_back:
            self.roll_back(name)

    @rule(name=user, number=seed, at=st.integers(1, 45))
    def die_while_training(self, name: str, number: int, at: int) -> None:
        """The process dies at any step of a commit and starts again: the old version, or the new one."""
        count, before, whole = 0, self.people.get(name, Person()), vault_module.step

        def step(operation: Callable[..., Any], *args: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                raise Crash
            return operation(*args)

        vault_module.step = step  # type: ignore[assignment]
        version = None
        try:
            version = self.commit(name, number, of_base=base().fingerprint)
        except Crash:
            pass
        finally:
            vault_module.step = whole
        self.restart()
        self.clock.now += 100  # the dead process's lease
        current = self.vault.registry.current(self.vault.user_hash(name))
        if version or (current and current.version != before.current):
            assert current is not None
            self.committed(name, current.version, number, base().fingerprint)

    @rule(name=user, number=seed)
    def train_while_another_job_has_the_user(self, name: str, number: int) -> None:
        lease = self.vault.lease(name, "another job", 50)
        with pytest.raises(Refused):
            self.commit(name, number, of_base=base().fingerprint)
        self.vault.registry.release_lease(lease)

    @rule(name=user)
    def roll_back(self, name: str) -> None:
        person = self.people.get(name, Person())
        current = person.version(person.current)
        older = person.newest(of_base=current.base, below=current) if current else None
        if older is None:
            with pytest.raises(ValueError):
                self.vault.rollback(name)
        elif older.is_damaged:
            with pytest.raises(CorruptError):
                self.vault.rollback(name)
            person.quarantine(older)
        else:
            assert self.vault.rollback(name) == older.name
            person.current = older.name
            self.ask_both(name)

    @rule(name=user, pick=st.integers(0, 20))
    def use(self, name: str, pick: int) -> None:
        person = self.people.get(name, Person())
        good = [one for one in person.versions if one.is_good]
        if not good:
            return
        chosen = good[pick % len(good)]
        if chosen.is_damaged:
            with pytest.raises(CorruptError):
                self.vault.use(name, chosen.name)
            person.quarantine(chosen)
        else:
            self.vault.use(name, chosen.name)
            person.current = chosen.name
            self.ask_both(name)

    @rule(name=user, flip=st.none() | flip)
    def load(self, name: str, flip: tuple[int, int] | None) -> None:
        if flip is not None:
            self.damage(name, *flip)
        person = self.people.get(name, Person())
        while (wanted := person.version(person.current)) and wanted.is_damaged:
            person.quarantine(wanted)
        if wanted is None:
            with pytest.raises(ValueError):
                self.vault.load(name, base_fingerprint=None)
            return
        found, manifest = self.vault.load(name, base_fingerprint=None)
        assert manifest.version == wanted.name and same_bits(found, adapter(wanted.seed))
        assert frozenset(manifest.item_ids) == wanted.items

    @rule(names=st.lists(user, min_size=1, max_size=3, unique=True), flip=flip, asks=st.booleans())
    def flip_bytes(self, names: list[str], flip: tuple[int, int], asks: bool) -> None:
        for name in names:
            self.damage(name, *flip)
            if asks:
                self.ask_both(name)

    def damage(self, name: str, file: int, byte: int) -> None:
        person = self.people.get(name, Person())
        current = person.version(person.current)
        if current is None or current.is_damaged:
            return
        folder = self.vault.user_folder(self.vault.user_hash(name)) / "adapters" / current.name
        path = sorted(folder.iterdir())[file]
        data = bytearray(path.read_bytes())
        data[-1 - byte % len(data)] ^= 1
        path.write_bytes(data)
        current.is_damaged = True

    # ---- histories and forgetting

    @rule(name=user, count=st.integers(1, 3))
    def add_items(self, name: str, count: int) -> None:
        ids = [f"{self.number + i}" for i in range(count)]
        self.number += count
        person = self.people.setdefault(name, Person())
        person.items += ids
        assert self.vault.append_history(name, make_items(*ids)) == len(person.items)

    @rule(name=user, pick=st.integers(0, 20))
    def forget_an_item(self, name: str, pick: int) -> None:
        person = self.people.get(name, Person())
        if not person.items or any(one.is_damaged and one.is_good for one in person.versions):
            return  # of a damaged version nobody can say what it was made from: it goes, which is tested elsewhere
        self.ask_both(name)
        gone = person.items.pop(pick % len(person.items))
        forget_items(self.vault, name, [gone])
        self.forget_in_replica(name)
        person.versions = [one for one in person.versions if gone not in one.items and one.is_good]
        if person.current and person.version(person.current) is None:
            newest = person.newest()
            person.current = newest.name if newest else None

    @rule(name=user, comes_back=st.none() | seed)
    def forget(self, name: str, comes_back: int | None) -> None:
        if name not in self.people:
            return
        self.ask_both(name)
        forget_user(self.vault, name)
        self.forget_in_replica(name)
        del self.people[name]
        self.tokens = {token: one for token, one in self.tokens.items() if one[0] != name}
        if comes_back is not None:
            self.train_one(name, comes_back)
        self.ask_both(name)

    def forget_in_replica(self, name: str) -> None:
        user_hash = str(self.vault.user_hash(name))
        self.replica.forget(user_hash)
        assert user_hash not in {owner for owner, _ in (*self.engine.slots.keys(), *self.engine.prefixes.keys())}

    # ---- asking

    @rule(who=st.lists(st.tuples(user, st.integers(0, 1)), min_size=1, max_size=5), meanwhile=st.none() | seed)
    def ask(self, who: list[tuple[str, int]], meanwhile: int | None) -> None:
        """Several ask at once, more than there are slots; the first of them may be trained anew meanwhile."""
        allowed = {name: self.may_answer(name) for name, _ in who}
        asks = [
            Ask(os.urandom(8).hex(), str(self.vault.user_hash(name)), question(name, number)) for name, number in who
        ]

        async def answer(ask: Ask) -> list[Event]:
            return [event async for event in self.replica.ask(ask)]

        async def all_at_once() -> list[list[Event]]:
            tasks = [asyncio.create_task(answer(ask)) for ask in asks]
            await asyncio.sleep(0)
            if meanwhile is not None:
                self.train_one(who[0][0], meanwhile)
                allowed[who[0][0]] |= self.may_answer(who[0][0])
            return await asyncio.gather(*tasks)

        for (name, number), (started, *deltas, finished) in zip(
            who, self.loop.run_until_complete(all_at_once()), strict=True
        ):
            assert isinstance(started, Started) and isinstance(finished, Finished), (started, finished)
            assert started.version in allowed[name]
            text = "".join(getattr(event, "text", "") for event in deltas)
            assert text == alone(allowed[name][started.version])[question(name, number)]
        self.see_what_was_quarantined()

    def ask_both(self, name: str) -> None:
        """Both questions, which begin alike, one after the other: what was kept of the first may serve the second."""
        self.ask([(name, 0)], None)
        self.ask([(name, 1)], None)

    def may_answer(self, name: str) -> dict[str | None, int]:
        """Version to seed: the one whose turn it is, and where that is damaged (it may still be in a slot) the next."""
        person = copy.deepcopy(self.people.get(name, Person()))
        found: dict[str | None, int] = {}
        while (one := person.answering()) is not None:
            found[one.name] = one.seed
            if not one.is_damaged:
                return found
            person.quarantine(one)
        return {**found, None: SHARED}

    def see_what_was_quarantined(self) -> None:
        for name, person in self.people.items():
            rows = self.vault.registry.versions(self.vault.user_hash(name))
            bad = {row.version for row in rows if not row.is_good}
            for one in [one for one in person.versions if one.name in bad and one.is_good]:
                assert one.is_damaged, "a whole version was quarantined"
                person.quarantine(one)

    # ---- tokens, time, care

    @rule(name=user, ttl_s=st.sampled_from((10.0, 1000.0)))
    def create_token(self, name: str, ttl_s: float) -> None:
        if name not in self.people:
            return
        token = self.vault.registry.create_token("user", self.vault.user_hash(name), ttl_s)
        self.tokens[token] = (name, self.clock.now + ttl_s)

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 20))
    def revoke_a_token(self, pick: int) -> None:
        # Oldest first: tokens are random, and what follows must not be.
        token = list(self.tokens)[pick % len(self.tokens)]
        self.vault.registry.revoke_token(token.split("_")[1])
        del self.tokens[token]

    @rule(seconds=st.sampled_from((5, 50, 500, -20)))
    def time_passes(self, seconds: int) -> None:
        """Clocks step back, too."""
        self.clock.now += seconds

    @precondition(lambda self: self.engine.slots)
    @rule(sweeps=st.booleans())
    def restart(self, sweeps: bool = False) -> None:
        self.replica.close()
        self.vault.close()
        self.vault = Vault(self.root, clock=self.clock)
        self.replica = Replica(CONFIG, base(), self.vault, make_engine(CONFIG, base()))
        if sweeps:
            self.vault.gc(min_age_s=-1e10)
            found = [problem for problem in self.vault.verify() if "left over" not in problem]  # some clocks went back
            damaged = [one.name for person in self.people.values() for one in person.versions if one.is_damaged]
            assert all(any(f" {name}: " in problem for name in damaged) for problem in found)

    # ---- what always holds

    @invariant()
    def all_is_as_the_dictionary_says(self) -> None:
        registry = self.vault.registry
        assert {one.user_hash for one in registry.users()} == {self.vault.user_hash(name) for name in self.people}
        for name, person in self.people.items():
            user_hash = self.vault.user_hash(name)
            current = registry.current(user_hash)
            assert (current.version if current else None) == person.current
            assert [item.item_id for item in self.vault.read_history(name)] == person.items
            good = [row.version for row in registry.versions(user_hash) if row.is_good]
            assert good == [one.name for one in person.versions if one.is_good]
        for token, (name, expires_at) in self.tokens.items():
            found = registry.verify_token(token)
            assert (found is not None) == (self.clock.now < expires_at)
            assert found is None or found.user_hash == self.vault.user_hash(name)
        assert registry.verify_audit() is None

    @invariant()
    def the_engine_keeps_what_users_have(self) -> None:
        """In slots and of prompts, each under its own name; what is quarantined may stay until it is evicted."""
        have = {(self.vault.user_hash(name), "") for name in USERS}  # prompts that the shared model answered
        for name, person in self.people.items():
            user_hash = self.vault.user_hash(name)
            have |= {(user_hash, f"{user_hash}/{one.name}") for one in person.versions}
        assert {*self.engine.slots.keys(), *self.engine.prefixes.keys()} <= have
        assert not self.engine.has_work


def question(name: str, number: int) -> str:
    """All begin alike, with more tokens than a prefix must have to be kept."""
    return f"which tag do you give film {number} of {name}"


@functools.cache
def alone(number: int) -> dict[str, str]:
    """What an adapter answers to each question when there is nothing else, and nothing is kept of earlier prompts."""
    config = replace(CONFIG, serve=replace(CONFIG.serve, prefix_bytes=0))
    with memory_folder() as folder:
        vault = Vault(folder / "vault")
        vault.add_users(["one"])
        if number != SHARED:
            vault.commit("one", adapter(number), make_manifest(base=base().fingerprint))
        replica = Replica(config, base(1), vault, make_engine(config, base(1)))

        async def answer(text: str) -> str:
            events = [event async for event in replica.ask(Ask("1", str(vault.user_hash("one")), text))]
            return "".join(getattr(event, "text", "") for event in events)

        async def answers() -> dict[str, str]:
            return {text: await answer(text) for name in USERS for text in (question(name, 0), question(name, 1))}

        try:
            return asyncio.run(answers())
        finally:
            replica.close()
            vault.close()


SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


def test_service_and_dictionary_agree() -> None:
    run_state_machine_as_test(Service, settings=settings(SETTINGS, max_examples=6, stateful_step_count=25))


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_service_and_dictionary_agree_for_long(request: pytest.FixtureRequest) -> None:
    chosen = settings(SETTINGS, derandomize=False, max_examples=150, stateful_step_count=50, print_blob=True)
    run_state_machine_as_test(seed_of_run(request.config.getoption("--chaos-seed"))(Service), settings=chosen)
