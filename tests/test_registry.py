"""The registry on SQLite and on a real PostgreSQL: one answer, whoever asks at once, and a log that cannot be bent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from vault_tools import Clock, empty_postgres, memory_folder

from oppu_ray import registry as registry_module
from oppu_ray.core import InputError
from oppu_ray.registry import Refused, Registry, RegistryError, Version

ALICE, BOB = "a" * 64, "b" * 64
KEY = b"k" * 32


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.sqlite"
    found: str = request.getfixturevalue("postgres_url")
    empty_postgres(found)
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(url: str, clock: Clock) -> Iterator[Registry]:
    made = Registry(url, KEY, clock)
    yield made
    made.close()


def version(user_hash: str, number: int, run_id: str = "", base: str = "base") -> Version:
    return Version(user_hash, f"{number:06d}", number, base, "0" * 64, run_id, 0.0)


def publish(registry: Registry, row: Version) -> None:
    lease = registry.acquire_lease(row.user_hash, "test", 60)
    before = registry.current(row.user_hash)
    registry.publish(lease, row, before.version if before else None)
    registry.release_lease(lease)


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_a_published_version_is_current_and_the_run_knows_who_is_done(registry: Registry) -> None:
    assert registry.current(ALICE) is None
    publish(registry, version(ALICE, 1, run_id="r1"))
    publish(registry, version(BOB, 1))
    publish(registry, version(ALICE, 2))
    assert registry.current(ALICE) == version(ALICE, 2)
    assert registry.current(BOB) == version(BOB, 1)
    assert [row.number for row in registry.versions(ALICE)] == [1, 2]
    assert {row.user_hash for row in registry.users()} == {ALICE, BOB}
    assert registry.done_users("r1") == {ALICE}
    assert registry.unit_version("r1", ALICE) == "000001" and registry.unit_version("r1", BOB) is None


def test_a_run_commits_a_user_once(registry: Registry) -> None:
    publish(registry, version(ALICE, 1, run_id="r1"))
    with pytest.raises(Refused, match="run r1 has committed"):
        publish(registry, version(ALICE, 2, run_id="r1"))
    assert registry.current(ALICE) == version(ALICE, 1, run_id="r1")
    assert len(registry.versions(ALICE)) == 1


def test_publish_needs_the_expected_current_and_the_lease(registry: Registry, clock: Clock) -> None:
    lease = registry.acquire_lease(ALICE, "one", 60)
    with pytest.raises(Refused, match="current version is None, expected 000009"):
        registry.publish(lease, version(ALICE, 1), "000009")
    registry.release_lease(lease)
    with pytest.raises(Refused, match="was lost"):
        registry.publish(lease, version(ALICE, 1), None)
    assert registry.versions() == [] and not registry.has_user(ALICE)


def test_leases_exclude_expire_and_fence(registry: Registry, clock: Clock) -> None:
    slow = registry.acquire_lease(ALICE, "slow", 60)
    with pytest.raises(Refused, match="leased to slow for 60 s more; wanted by quick"):
        registry.acquire_lease(ALICE, "quick", 60)
    registry.acquire_lease(BOB, "quick", 60)
    clock.now += 61
    quick = registry.acquire_lease(ALICE, "quick", 60)
    assert quick.fence > slow.fence
    with pytest.raises(Refused, match="lease of slow"):  # it wakes up late
        registry.publish(slow, version(ALICE, 1), None)
    registry.release_lease(slow)  # does not give back what is not its own
    registry.publish(quick, version(ALICE, 1), None)
    again = registry.acquire_lease(ALICE, "quick", 60)  # the same run, restarted
    assert again.fence > quick.fence


def test_an_expired_lease_that_no_one_took_may_still_publish(registry: Registry, clock: Clock) -> None:
    lease = registry.acquire_lease(ALICE, "one", 60)
    clock.now += 1000
    registry.publish(lease, version(ALICE, 1), None)
    assert registry.current(ALICE) is not None


def test_a_job_cannot_bring_back_a_forgotten_user(registry: Registry) -> None:
    publish(registry, version(ALICE, 1))
    token = registry.create_token("user", ALICE)
    lease = registry.acquire_lease(ALICE, "job", 60)
    registry.delete_user(ALICE)
    assert registry.num_rows(ALICE) == 0 and registry.verify_token(token) is None
    with pytest.raises(Refused, match="was lost"):
        registry.publish(lease, version(ALICE, 2), "000001")
    registry.add_users([ALICE])
    fence = registry.acquire_lease(ALICE, "new job", 60).fence
    assert fence > lease.fence
    with pytest.raises(Refused, match="was lost"):
        registry.publish(lease, version(ALICE, 2), None)


def test_one_of_many_writers_wins(url: str, registry: Registry) -> None:
    barrier, outcomes = threading.Barrier(4), []

    def compete(holder: str) -> None:
        mine = Registry(url, KEY)
        barrier.wait()
        try:
            outcomes.append(mine.acquire_lease(ALICE, holder, 60).holder)
        except Refused:
            outcomes.append("")
        mine.record("try", None, {"holder": holder})
        mine.close()

    threads = [threading.Thread(target=compete, args=(f"h{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[:3] == ["", "", ""] and sorted(outcomes)[3]
    assert registry.verify_audit() is None and len(registry.audit_log()) == 4


def test_add_users_counts_new_ones_in_one_transaction(registry: Registry) -> None:
    hashes = [f"{number:064x}" for number in range(1200)]
    assert registry.add_users(hashes[:700]) == 700
    assert registry.add_users(hashes) == 500
    assert registry.add_users(hashes) == 0
    assert len(registry.users()) == 1200 and len(registry.audit_log()) == 2


def test_a_new_user_under_a_foreign_lease_is_refused(registry: Registry) -> None:
    registry.acquire_lease(ALICE, "gc", 60)
    with pytest.raises(Refused, match="another process"):
        registry.add_users([ALICE])


def test_a_new_user_is_added_under_ones_own_lease_as_long_as_it_holds(registry: Registry) -> None:
    lease = registry.acquire_lease("a" * 64, "job", 60)
    assert registry.add_users(["a" * 64], lease) == 1 and registry.add_users(["a" * 64], lease) == 0
    registry.delete_user("a" * 64)
    for call in (lambda: registry.add_users(["a" * 64], lease), lambda: registry.check_lease(lease)):
        with pytest.raises(Refused, match="the lease of job .* was lost"):
            call()
    assert registry.users() == []


def test_quarantine_falls_back_to_the_newest_good_version_of_the_same_base(registry: Registry) -> None:
    for number, base in ((1, "base"), (2, "other"), (3, "base"), (4, "base")):
        publish(registry, version(ALICE, number, base=base))
    registry.quarantine(ALICE, "000003", "flipped")
    assert registry.current(ALICE) == version(ALICE, 4)
    registry.quarantine(ALICE, "000004", "flipped")
    assert registry.current(ALICE) == version(ALICE, 1)
    registry.quarantine(ALICE, "000001", "flipped")
    assert registry.current(ALICE) is None
    registry.quarantine(ALICE, "000001", "again")
    assert sum(entry.action == "quarantine" for entry in registry.audit_log(ALICE)) == 3


def test_use_takes_good_versions_only(registry: Registry) -> None:
    for number in (1, 2, 3):
        publish(registry, version(ALICE, number))
    registry.use(ALICE, "000001", "000003")
    assert registry.current(ALICE) == version(ALICE, 1)
    with pytest.raises(Refused, match="current version is 000001, expected 000003"):
        registry.use(ALICE, "000002", "000003")
    registry.quarantine(ALICE, "000002", "flipped")
    for wrong in ("000002", "000009", "'; DROP TABLE users; --"):
        with pytest.raises(ValueError, match="unknown or quarantined"):
            registry.use(ALICE, wrong, "000001")


def test_delete_versions_frees_the_run_and_ends_the_lease(registry: Registry) -> None:
    publish(registry, version(ALICE, 1, run_id="r1"))
    publish(registry, version(ALICE, 2, run_id="r2"))
    lease = registry.acquire_lease(ALICE, "job", 60)
    registry.delete_versions(ALICE, {"000002"}, [])
    assert registry.current(ALICE) == version(ALICE, 1, run_id="r1")
    assert registry.done_users("r2") == set() and registry.done_users("r1") == {ALICE}
    with pytest.raises(Refused, match="was lost"):
        registry.publish(lease, version(ALICE, 3), "000001")


def test_tokens_verify_expire_and_are_revoked(registry: Registry, clock: Clock) -> None:
    registry.add_users([ALICE])
    token = registry.create_token("user", ALICE, ttl_s=60)
    operator = registry.create_token("operator")
    found = registry.verify_token(token)
    assert found is not None and (found.role, found.user_hash) == ("user", ALICE)
    assert [row.role for row in registry.tokens()] == ["user", "operator"]
    other = operator.split("_", 2)
    mixed = f"oppu_{other[1]}_{token.split('_', 2)[2]}"
    for wrong in ("", "oppu", "oppu__", token[:-1], token + "x", token.upper(), f"x{token}", mixed, "oppu_\0_\ud800"):
        assert registry.verify_token(wrong) is None
    clock.now += 60
    assert registry.verify_token(token) is None and registry.verify_token(operator) is not None
    registry.revoke_token(other[1])
    assert registry.verify_token(operator) is None


def test_a_token_for_the_wrong_role_or_user_is_refused(registry: Registry) -> None:
    with pytest.raises(ValueError, match="role 'admin': expected one of user, operator, reader"):
        registry.create_token("admin")
    for role, user_hash in (("user", None), ("operator", ALICE)):
        with pytest.raises(ValueError, match="any other must have none"):
            registry.create_token(role, user_hash)
    with pytest.raises(ValueError, match="no such user"):
        registry.create_token("user", ALICE)
    for token_id in ("nothing", "0" * 16, "a\0b", "\ud800" * 16, "0" * 10_000):
        with pytest.raises(InputError, match="no such token"):
            registry.revoke_token(token_id)


def test_the_database_never_holds_a_secret(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/r.sqlite", KEY)
    secret = registry.create_token("reader").split("_", 2)[2]
    registry.close()
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bend", "broken"),
    [
        ("UPDATE audit SET detail = '{}' WHERE number = 2", "audit line 2 (note) was changed"),
        ("UPDATE audit SET action = 'x' WHERE number = 3", "audit line 3 (x) was changed"),
        ("DELETE FROM audit WHERE number = 2", "audit line 2 is missing"),
        (
            "UPDATE audit SET chain = (SELECT chain FROM audit WHERE number = 1) WHERE number = 3",
            "audit line 3 (note) was changed",
        ),
    ],
)
def test_the_audit_chain_shows_what_was_bent(registry: Registry, url: str, bend: str, broken: str) -> None:
    for number in range(4):
        registry.record("note", ALICE if number % 2 else None, {"number": number})
    assert registry.verify_audit() is None
    assert [entry.number for entry in registry.audit_log(ALICE)] == [2, 4]
    execute(url, bend)
    assert registry.verify_audit() == broken


def test_who_has_no_key_cannot_write_the_chain(url: str, registry: Registry) -> None:
    forger = Registry(url, b"another key")
    forger.record("forged", None, {})
    forger.close()
    assert registry.verify_audit() == "audit line 1 (forged) was changed"


def test_receipts_are_kept(registry: Registry) -> None:
    registry.add_receipt("r1", ALICE, "{}")
    registry.delete_user(ALICE)
    assert registry.receipts(ALICE) == ["{}"] and registry.receipts(BOB) == []


def test_reopening_keeps_everything_and_a_newer_schema_is_refused(url: str, registry: Registry) -> None:
    publish(registry, version(ALICE, 1))
    again = Registry(url, KEY)
    assert again.current(ALICE) == version(ALICE, 1)
    again.close()
    execute(url, "UPDATE schema SET version = 99")
    with pytest.raises(RegistryError, match="schema 99 is newer"):
        Registry(url, KEY)


def test_what_versions_cost_adds_up_and_outlives_them_but_not_their_user(registry: Registry) -> None:
    def release(number: int, rho: tuple[float, float] | None) -> None:
        lease = registry.acquire_lease(ALICE, "test", 60)
        before = registry.current(ALICE)
        registry.publish(lease, version(ALICE, number), before.version if before else None, True, rho)

    assert registry.rho(ALICE) == 0.0
    release(1, (0.0, 0.1))
    release(2, (0.1, 0.1 + 0.2))
    release(3, None)  # without noise
    assert registry.rho(ALICE) == 0.1 + 0.2
    with pytest.raises(Refused, match="another version was released meanwhile"):
        release(4, (0.1, 0.2))
    assert registry.rho(ALICE) == 0.1 + 0.2 and registry.current(ALICE) == version(ALICE, 3)
    registry.delete_versions(ALICE, {"000001", "000002", "000003"}, [])
    assert registry.rho(ALICE) == 0.1 + 0.2 and registry.rho(BOB) == 0.0
    registry.delete_user(ALICE)
    assert registry.rho(ALICE) == 0.0


def test_migrations_run_once_in_order(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, version(ALICE, 1))
    steps = (
        *registry_module.MIGRATIONS,
        ("CREATE TABLE extra (a INTEGER)",),
        ("ALTER TABLE extra ADD COLUMN b INTEGER",),
    )
    monkeypatch.setattr(registry_module, "MIGRATIONS", steps)
    for _ in range(2):
        again = Registry(url, KEY)
        assert again.current(ALICE) == version(ALICE, 1)
        again.close()
    execute(url, "INSERT INTO extra (a, b) VALUES (1, 2)")


def test_a_locked_database_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "BUSY_S", 0)
    url = f"sqlite:///{tmp_path}/r.sqlite"
    registry = Registry(url, KEY)
    publish(registry, version(ALICE, 1))
    engine = sa.create_engine(url)
    with engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match="registry sqlite:///.*database is locked"):
            registry.add_users([BOB])
        assert registry.current(ALICE) == version(ALICE, 1)  # readers go on
    registry.close()


def test_an_unknown_or_unreachable_database_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected sqlite:///... or postgresql://..."):
        Registry("mysql://u:secret@h/d", KEY)
    with pytest.raises(RegistryError) as caught:
        Registry(f"postgresql://u:secret@/d?host={tmp_path}", KEY)
    assert "secret" not in str(caught.value) and "u:***" in str(caught.value)
