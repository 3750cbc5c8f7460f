"""PostgreSQL killed in the middle of a write, and failing over: old or new, nothing lost, and the pool heals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from vault_tools import (
    BASE,
    PostgresServer,
    empty_postgres,
    make_adapter,
    make_items,
    make_manifest,
    memory_folder,
    same,
    server_folder,
)

from oppu_ray.forget import forget_user, verify_receipt
from oppu_ray.registry import Refused, RegistryError
from oppu_ray.vault import DiskError, Vault


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with server_folder() as folder:
        one = PostgresServer(folder)
        one.create()
        one.start()
        yield one
        one.stop()


class Kill:
    """Calls `kill` before the n-th statement or commit of a vault's registry; from then on it only counts."""

    def __init__(self, vault: Vault, at: int, kill: Callable[[], None]) -> None:
        self.at, self.kill, self.count = at, kill, 0
        engine = vault.registry._engine
        sa.event.listen(engine, "before_cursor_execute", self._step)
        sa.event.listen(engine, "commit", self._step)

    def _step(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.at:
            self.kill()


def fill(root: Path, url: str) -> Vault:
    vault = Vault(root, url)
    vault.commit("alice", make_adapter(1), make_manifest())
    vault.append_history("alice", make_items("1"))
    return vault


def commit(vault: Vault) -> None:
    vault.commit("alice", make_adapter(2), make_manifest(run_id="run"))


def append(vault: Vault) -> None:
    vault.append_history("alice", make_items("2"), skip_known=True)


def forget(vault: Vault) -> None:
    assert verify_receipt(vault, forget_user(vault, "alice")) == []


def state(vault: Vault) -> tuple[int, int]:
    """(which adapter answers, number of items); 0 and 0 of a forgotten user."""
    if not vault.registry.has_user(vault.user_hash("alice")):
        return 0, 0
    adapter = vault.load("alice", base_fingerprint=BASE)[0]
    (number,) = (seed for seed in (1, 2) if same(adapter, make_adapter(seed)))
    return number, len(vault.read_history("alice"))


WRITES: dict[Callable[[Vault], None], set[tuple[int, int]]] = {
    commit: {(1, 1), (2, 1)},
    append: {(1, 1), (1, 2)},
    forget: {(1, 1), (0, 0)},
}


def num_steps(tmp_path: Path, server: PostgresServer, write: Callable[[Vault], None]) -> int:
    empty_postgres(server.url)
    vault = fill(tmp_path / "count", server.url)
    counted = Kill(vault, 0, server.kill)
    write(vault)
    vault.close()
    assert counted.count > 5
    return counted.count


@pytest.mark.parametrize("write", WRITES)
def test_postgresql_killed_at_every_statement_of_a_write_leaves_old_or_new(
    server: PostgresServer, write: Callable[[Vault], None], tmp_path: Path
) -> None:
    outcomes = set()
    for at in range(1, num_steps(tmp_path, server, write) + 1):
        empty_postgres(server.url)
        vault = fill(tmp_path / f"vault-{at}", server.url)
        killed = Kill(vault, at, server.kill)
        with pytest.raises((RegistryError, DiskError)):
            write(vault)
        server.start()
        if write is not forget or vault.registry.has_user(vault.user_hash("alice")):
            outcomes.add(state(vault))  # with the same pool of connections
        else:
            outcomes.add((0, 0))
        assert killed.count > at and vault.registry.verify_audit() is None
        if write is not forget:
            assert all("left over" in problem for problem in vault.verify())
        write(vault)  # again, with no cleaning by hand
        assert state(vault) == (WRITES[write] - {(1, 1)}).pop()
        vault.gc(min_age_s=-1)
        assert vault.verify() == []
        vault.close()
        shutil.rmtree(vault.root)
    assert outcomes == WRITES[write]


@pytest.mark.parametrize("write", [commit, append])
def test_a_commit_whose_answer_was_lost_is_done_once(
    server: PostgresServer, write: Callable[[Vault], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed after it has committed, before it says so."""
    empty_postgres(server.url)
    vault = fill(tmp_path / "vault", server.url)
    revision, dialect = vault.registry.revision(), vault.registry._engine.dialect
    really_commit = dialect.do_commit

    def lose_answer(connection: Any) -> None:
        found = connection.execute("SELECT value FROM facts WHERE name = 'revision'").fetchone()
        really_commit(connection)
        if int(found[0]) > revision:
            server.kill()
            connection.execute("SELECT 1")

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "do_commit", lose_answer)
        with pytest.raises((RegistryError, DiskError)):
            write(vault)
    server.start()
    new = (WRITES[write] - {(1, 1)}).pop()
    assert state(vault) == new
    write(vault)
    vault.gc(min_age_s=-1)
    assert state(vault) == new and len(vault.registry.versions()) == new[0] and vault.verify() == []
    vault.close()


@pytest.fixture
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A primary and its standby."""
    with server_folder() as one, server_folder() as two:
        primary, standby = PostgresServer(one), PostgresServer(two)
        primary.create()
        primary.start()
        standby.follow(primary)
        standby.start()
        yield primary, standby
        standby.stop()


def both(primary: PostgresServer, standby: PostgresServer) -> str:
    hosts = f"host={primary.folder},{standby.folder}"
    return f"postgresql://oppu@/postgres?{hosts}&target_session_attrs=read-write"


def test_a_failover_to_a_synchronous_standby_loses_nothing(
    pair: tuple[PostgresServer, PostgresServer], tmp_path: Path
) -> None:
    primary, standby = pair
    primary.stop()
    primary.start("synchronous_standby_names=*")
    vault = fill(tmp_path / "vault", both(*pair))
    killed = Kill(vault, 12, primary.kill)
    with pytest.raises((RegistryError, DiskError)):
        commit(vault)
    with pytest.raises(RegistryError):
        vault.registry.users()
    standby.promote()
    assert killed.count >= 12 and state(vault) in WRITES[commit]
    commit(vault)
    append(vault)
    assert state(vault) == (2, 2)
    vault.gc(min_age_s=-1)
    assert vault.verify() == []
    vault.close()


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "reopened"])
def test_a_failover_that_lost_commits_removes_nothing(
    pair: tuple[PostgresServer, PostgresServer], tmp_path: Path, is_open: bool
) -> None:
    primary, standby = pair
    vault = fill(tmp_path / "vault", both(*pair))
    standby.stop()
    commit(vault)
    append(vault)
    primary.kill()
    standby.start()
    standby.promote()
    if not is_open:
        vault.close()
        vault = Vault(tmp_path / "vault", both(*pair))
    assert vault.load("alice", base_fingerprint=BASE)[1].version
    if is_open:
        for number in range(30):
            vault.commit("bob", make_adapter(number), make_manifest())
    with pytest.raises(Refused, match="registry is older than the files"):
        vault.gc(min_age_s=-1)
    assert "registry is older than the files" in vault.verify()[0]
    vault.close()
