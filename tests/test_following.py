"""Processes that cache users' data obey the audit log, and forgetting waits for those that live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vault_tools import Clock, empty_postgres, make_items, memory_folder

from oppu_ray import following as following_module
from oppu_ray.following import TTL_S, Following, wait_for_followers
from oppu_ray.forget import forget_items, forget_user, verify_receipt
from oppu_ray.registry import RegistryError
from oppu_ray.vault import Vault


@pytest.fixture(params=["sqlite", "postgresql"])
def vault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    """Of another process than the follower's."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        empty_postgres(url)
    monkeypatch.setattr(
        "oppu_ray.forget.wait_for_followers", lambda registry, line: wait_for_followers(registry, line, 0)
    )
    with memory_folder() as folder:
        made = Vault(folder / "vault", url, clock=Clock())
        made.append_history("ann", make_items("1", "2"))
        made.append_history("bob", make_items("1"))
        yield made
        made.close()


class Process:
    """A follower that keeps what it is told, and fails on demand. Nothing happens before `look`."""

    def __init__(self, vault: Vault) -> None:
        self.told: list[str] = []
        self.num_lost, self.clock = 0, Clock()
        self.fail_with: Exception | None = None
        self.following = Following(vault.registry, "engine r1", self.forget, self.lose, self.clock)

    def forget(self, user_hash: str) -> None:
        if self.fail_with:
            raise self.fail_with
        self.told.append(user_hash)

    def lose(self) -> None:
        self.num_lost += 1


def test_a_process_obeys_what_is_forgotten_after_it_began_and_says_so(vault: Vault) -> None:
    ann, bob = vault.user_hash("ann"), vault.user_hash("bob")
    forget_items(vault, "ann", ["2"])  # nothing of it can be in a process that begins only now
    process = Process(vault)
    receipt = forget_items(vault, "ann", ["1"])
    vault.add_users(["eve"])
    later = forget_user(vault, "bob")
    name = process.following.name
    assert receipt.silent == later.silent == (name,) and name.startswith("engine r1 ")
    assert verify_receipt(vault, later) == [f"{name}: this process has not dropped the user"]
    process.following.look()
    assert process.told == [ann, bob] and verify_receipt(vault, receipt) == verify_receipt(vault, later) == []
    process.following.look()
    assert process.told == [ann, bob]
    vault.add_users(["bob"])
    assert wait_for_followers(vault.registry, later.line, 0) == ([name], [])
    process.following.close()
    assert wait_for_followers(vault.registry, later.line + 1, 0) == ([], [])


def test_who_forgets_waits_until_a_process_has_obeyed(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oppu_ray.forget.wait_for_followers", wait_for_followers)
    process = Process(vault)
    process.following.start()
    receipt = forget_user(vault, "ann")
    assert process.told == [vault.user_hash("ann")] and receipt.silent == ()
    assert f"process {process.following.name}" in receipt.checked
    process.following.close()


def test_a_process_that_fails_to_drop_a_user_has_not_obeyed_and_tries_again(vault: Vault) -> None:
    process = Process(vault)
    process.fail_with = RuntimeError("the engine died")
    line = forget_user(vault, "ann").line
    with pytest.raises(RuntimeError):
        process.following.look()
    assert wait_for_followers(vault.registry, line, 0)[1] == [process.following.name]
    process.fail_with = None
    process.following.look()
    assert wait_for_followers(vault.registry, line, 0)[1] == [] and len(process.told) == 1


def test_a_process_that_cannot_read_the_log_drops_everybody_and_is_waited_for_no_longer(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, theirs = Process(vault), vault.registry.forgotten_since

    def unreachable(seen: int) -> tuple[int, list[str]]:
        raise RegistryError("no route to host")

    monkeypatch.setattr(vault.registry, "forgotten_since", unreachable)
    process.clock.now += TTL_S - 1
    with pytest.raises(RegistryError):
        process.following.look()
    assert not process.following.is_lost and process.num_lost == 0
    process.clock.now += 1
    assert process.following.is_lost
    for _ in range(2):
        with pytest.raises(RegistryError):
            process.following.look()
    assert process.num_lost == 1
    vault._clock.now += TTL_S  # type: ignore[attr-defined]
    line = forget_user(vault, "ann").line
    assert wait_for_followers(vault.registry, line, 0) == ([], [])
    monkeypatch.setattr(vault.registry, "forgotten_since", theirs)
    process.following.look()  # the registry is back
    assert process.told == [vault.user_hash("ann")] and not process.following.is_lost
    assert wait_for_followers(vault.registry, line, 0) == ([process.following.name], [])


def test_a_process_that_lives_stays_in_the_registry_and_one_that_died_leaves_it(vault: Vault) -> None:
    alive, dead = Process(vault), Process(vault)
    for _ in range(10):
        for clock in (alive.clock, vault._clock):
            clock.now += TTL_S / 3  # type: ignore[attr-defined]
        alive.following.look()
    assert [one.name for one in vault.registry.followers()] == [alive.following.name]
    assert not alive.following.is_lost and alive.num_lost == 0
    vault._clock.now += 2 * 3600  # type: ignore[attr-defined]
    assert dead.following.name != Process(vault).following.name and len(vault.registry.followers()) == 1


def test_following_goes_on_after_an_error(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "POLL_S", 0.001)
    monkeypatch.setattr("oppu_ray.forget.wait_for_followers", wait_for_followers)
    process, failures = Process(vault), iter([RuntimeError("no"), RegistryError("no")])
    tell = process.forget

    def forget(user_hash: str) -> None:
        if failure := next(failures, None):
            raise failure
        tell(user_hash)

    process.following._forget = forget
    process.following.start()
    assert forget_user(vault, "ann").silent == () and len(process.told) == 1
    process.following.close()
