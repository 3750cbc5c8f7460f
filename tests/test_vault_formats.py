"""Vaults that other versions of oppu_ray wrote: an older one goes on, a newer one is refused before it changes."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from vault_tools import BASE, empty_postgres, make_adapter, make_items, make_manifest, memory_folder, same, tree

from oppu_ray.adapter_files import encode_adapter
from oppu_ray.forget import forget_items, forget_user, verify_receipt
from oppu_ray.registry import RegistryError
from oppu_ray.vault import CorruptError, DiskError, Vault

KEY = bytes(range(32))
# The tables as schema 1 had them, and the sequence of fences at 5.
SCHEMA_1 = """
CREATE TABLE audit (number INTEGER NOT NULL, time {double} NOT NULL, action VARCHAR(32) NOT NULL,
    user_hash VARCHAR(64), detail TEXT NOT NULL, chain VARCHAR(64) NOT NULL, PRIMARY KEY (number));
CREATE INDEX ix_audit_user_hash ON audit (user_hash);
CREATE TABLE leases (fence {serial}, user_hash VARCHAR(64) NOT NULL, holder TEXT NOT NULL,
    expires_at {double} NOT NULL, UNIQUE (user_hash));
CREATE TABLE receipts (receipt_id VARCHAR(32) NOT NULL, user_hash VARCHAR(64) NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (receipt_id));
CREATE INDEX ix_receipts_user_hash ON receipts (user_hash);
CREATE TABLE schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE tokens (token_id VARCHAR(16) NOT NULL, role VARCHAR(16) NOT NULL, user_hash VARCHAR(64),
    digest VARCHAR(64) NOT NULL, created_at {double} NOT NULL, expires_at {double}, revoked_at {double},
    PRIMARY KEY (token_id));
CREATE INDEX ix_tokens_user_hash ON tokens (user_hash);
CREATE TABLE units (run_id TEXT NOT NULL, user_hash VARCHAR(64) NOT NULL, version VARCHAR(64) NOT NULL,
    PRIMARY KEY (run_id, user_hash));
CREATE INDEX ix_units_user_hash ON units (user_hash);
CREATE TABLE users (user_hash VARCHAR(64) NOT NULL, current VARCHAR(64), created_at {double} NOT NULL,
    PRIMARY KEY (user_hash));
CREATE TABLE versions (user_hash VARCHAR(64) NOT NULL, version VARCHAR(64) NOT NULL, number INTEGER NOT NULL,
    base_fingerprint TEXT NOT NULL, manifest_sha256 VARCHAR(64) NOT NULL, run_id TEXT NOT NULL,
    created_at {double} NOT NULL, is_good BOOLEAN NOT NULL, PRIMARY KEY (user_hash, version));
INSERT INTO schema VALUES (1);
INSERT INTO leases (user_hash, holder, expires_at)
    VALUES ('a', 'x', 0), ('b', 'x', 0), ('c', 'x', 0), ('d', 'x', 0), ('e', 'x', 0);
DELETE FROM leases;
"""
SECRET = "A" * 43
TOKEN = f"oppu_{'0' * 16}_{SECRET}"


def derive(purpose: str) -> bytes:
    return hmac.new(KEY, purpose.encode(), hashlib.sha256).digest()


def hash_of(user: str) -> str:
    return hmac.new(derive("user"), user.encode(), hashlib.sha256).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Old:
    """A vault as schema 1 wrote it, without any code of today's vault and registry.

    Alice has two versions, a history of two segments and a profile; Bob a history; Carl is registered and no more.
    """

    def __init__(self, root: Path, url: str, is_sealed: bool) -> None:
        self.root, self.url, self.is_sealed = root, url, is_sealed
        for name in ("", "users", "tmp", *(["keys"] if is_sealed else [])):
            (root / name).mkdir(mode=0o700)
        (root / "key").write_bytes(KEY)
        rows: list[tuple[str, dict[str, Any]]] = []
        for user in ("alice", "bob", "carl"):
            current = "000002-5" if user == "alice" else None
            rows.append(("users", {"user_hash": hash_of(user), "current": current, "created_at": 1.0}))
        for number, fence in ((1, 3), (2, 5)):
            rows.append(("versions", self.version("alice", number, fence)))
        rows.append(("units", {"run_id": "r2", "user_hash": hash_of("alice"), "version": "000002-5"}))
        for user, segments in (("alice", (["1", "2"], ["3"])), ("bob", (["1"],))):
            for number, ids in enumerate(segments, 1):
                lines = b"".join(self.item(item_id) for item_id in ids)
                self.framed(user, f"history/{number:06d}.jsonl", lines)
        self.framed("alice", "blobs/profile.txt", b"old")
        token = {"token_id": "0" * 16, "role": "user", "user_hash": hash_of("alice"), "digest": sha256(SECRET.encode())}
        rows.append(("tokens", {**token, "created_at": 1.0}))
        chain = ""
        for number, action in enumerate(("add", "publish", "publish"), 1):
            entry = [chain, number, 1.0, action, hash_of("alice"), "{}"]
            chain = hmac.new(derive("audit"), json.dumps(entry).encode(), hashlib.sha256).hexdigest()
            values = dict(zip(("number", "time", "action", "user_hash", "detail"), entry[1:], strict=True))
            rows.append(("audit", {**values, "chain": chain}))
        is_sqlite = url.startswith("sqlite")
        serial = "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT" if is_sqlite else "SERIAL PRIMARY KEY"
        ddl = SCHEMA_1.format(double="DOUBLE" if is_sqlite else "DOUBLE PRECISION", serial=serial)
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            for statement in filter(str.strip, ddl.split(";")):
                connection.exec_driver_sql(statement)
            for table, values in rows:
                names = ", ".join(values)
                marks = ", ".join(f":{name}" for name in values)
                connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), values)
        engine.dispose()

    def item(self, item_id: str) -> bytes:
        fields: dict[str, Any] = dict.fromkeys(("label", "title", "abstract", "keywords"))
        fields |= {"item_id": item_id, "time": "2024-01-01", "text": f"text of {item_id}", "context": [], "options": []}
        return json.dumps({**fields, "label": "a"}).encode() + b"\n"

    def version(self, user: str, number: int, fence: int) -> dict[str, Any]:
        name, adapter = f"{number:06d}-{fence}", make_adapter(number)
        files = encode_adapter(adapter, user)
        manifest = {
            "base_fingerprint": BASE,
            "task_fingerprint": "task-1",
            "item_ids": ["1", "2"],
            "recipe": {"epochs": 3},
            "seed": 7,
            "metrics": {"loss": 0.5},
            "run_id": f"r{number}",
            "user_hash": hash_of(user),
            "version": name,
            "parent": None,
            "peft_config": adapter.peft_config,
            "shapes": {name: list(tensor.shape) for name, tensor in adapter.tensors.items()},
            "checksums": {name: sha256(data) for name, data in files.items()},
            "format_version": 1,
        }
        files["manifest.json"] = json.dumps(manifest, sort_keys=True, indent=1).encode()
        for file, data in files.items():
            self.write(user, f"adapters/{name}/{file}", data)
        row = {"user_hash": hash_of(user), "version": name, "number": number, "base_fingerprint": BASE}
        digest = sha256(files["manifest.json"])
        return {**row, "manifest_sha256": digest, "run_id": f"r{number}", "created_at": 1.0, "is_good": True}

    def framed(self, user: str, name: str, content: bytes) -> None:
        line = sha256(f"{hash_of(user)}/{name}\n".encode() + content).encode() + b"\n"
        self.write(user, name, line + content)

    def write(self, user: str, name: str, data: bytes) -> None:
        user_hash = hash_of(user)
        below = Path(user_hash[:2], user_hash[2:4], user_hash)
        if self.is_sealed:
            key, nonce = self.root / "keys" / below, os.urandom(12)
            if not key.exists():
                key.parent.mkdir(parents=True, exist_ok=True)
                key.write_bytes(os.urandom(32))
            cipher = AESGCM(key.read_bytes())
            data = b"OPPUSEAL1" + nonce + cipher.encrypt(nonce, data, f"{user_hash}/{name}".encode())
        path = self.root / "users" / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def open(self) -> Vault:
        return Vault(self.root, self.url)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=["plain", "sealed", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Old:
    url = f"sqlite:///{tmp_path}/vault/registry.sqlite"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        empty_postgres(url)
    return Old(tmp_path / "vault", url, request.param == "sealed")


@pytest.fixture
def old_sealed(tmp_path: Path) -> Old:
    return Old(tmp_path / "vault", f"sqlite:///{tmp_path}/vault/registry.sqlite", True)


def test_a_vault_of_schema_1_goes_on(old: Old) -> None:
    keys = tree(old.root / "keys") if old.is_sealed else {}
    vault = old.open()
    assert vault.is_encrypted == old.is_sealed and vault.registry.facts()["vault"] == vault.vault_id
    assert vault.registry.verify_audit() is None
    assert [row.version for row in vault.registry.versions()] == ["000001-3", "000002-5"]
    assert same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(2))
    assert same(vault.load("alice", "000001-3", base_fingerprint=BASE)[0], make_adapter(1))
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "2", "3"]
    assert vault.read_history("bob") == tuple(make_items("1")) and vault.read_history("carl") == ()
    assert vault.get_blob("alice", "profile.txt") == b"old" and vault.done("r2", ["alice", "bob"]) == {"alice"}
    token = vault.registry.verify_token(TOKEN)
    assert token is not None and token.user_hash == hash_of("alice")
    assert vault.verify() == [] and vault.gc(min_age_s=-1) == []

    for user, num_items in (("alice", 4), ("bob", 2), ("carl", 1)):
        assert vault.append_history(user, make_items("9")) == num_items
        assert (vault.registry.key_check(hash_of(user)) is not None) == old.is_sealed
    vault.put_blob("alice", "profile.txt", b"new")
    vault.commit("alice", make_adapter(3), make_manifest(("9",)))
    current = vault.registry.current(hash_of("alice"))
    assert current is not None and int(current.version.split("-")[1]) > 5
    assert keys.items() <= (tree(old.root / "keys") if old.is_sealed else {}).items()
    vault.close()

    vault = old.open()
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "2", "3", "9"]
    assert same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(3)) and vault.verify() == []
    assert forget_items(vault, "alice", ["3"]).needs_training is False
    forget_items(vault, "alice", ["2"])
    assert [row.number for row in vault.registry.versions()] == [3]
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "9"]
    receipt = forget_user(vault, "bob")
    assert verify_receipt(vault, receipt) == [] and vault.verify() == []
    vault.close()


def test_a_user_of_schema_1_may_be_forgotten_first_of_all(old: Old) -> None:
    vault = old.open()
    receipt = forget_user(vault, "alice")
    assert verify_receipt(vault, receipt) == []
    assert not [path for path in old.root.rglob("*") if hash_of("alice") in path.name]
    vault.close()


def test_damage_in_a_vault_of_schema_1_is_found_before_its_keys_are_registered(old: Old) -> None:
    vault = old.open()
    path = vault.user_folder(vault.user_hash("alice")) / "adapters" / "000002-5" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(1))
    assert [row.is_good for row in vault.registry.versions()] == [True, False]
    vault.close()


def test_the_disk_of_users_is_away_when_a_vault_of_schema_1_is_first_opened(old: Old, tmp_path: Path) -> None:
    os.rename(old.root / "users", tmp_path / "kept")
    (old.root / "users").mkdir()
    with pytest.raises(DiskError, match="users/ has none of the registry's users; is its disk mounted"):
        old.open()
    assert list((old.root / "users").iterdir()) == []
    (old.root / "users").rmdir()
    os.rename(tmp_path / "kept", old.root / "users")
    test_a_vault_of_schema_1_goes_on(old)


@pytest.mark.parametrize("is_folder", [False, True], ids=["nothing", "empty mount point"])
def test_the_disk_of_keys_is_away_when_a_vault_of_schema_1_is_first_opened(
    old_sealed: Old, tmp_path: Path, is_folder: bool
) -> None:
    os.rename(old_sealed.root / "keys", tmp_path / "kept")
    if is_folder:
        (old_sealed.root / "keys").mkdir()
    vault = old_sealed.open()
    assert vault.is_encrypted
    for use in (
        lambda: vault.load("alice", base_fingerprint=BASE),
        lambda: vault.read_history("alice"),
        lambda: vault.append_history("alice", make_items("secret")),
        lambda: vault.append_history("carl", make_items("secret")),
        lambda: vault.append_history("dora", make_items("secret")),
        lambda: vault.put_blob("bob", "profile.txt", b"secret"),
        lambda: vault.commit("carl", make_adapter(3), make_manifest()),
    ):
        with pytest.raises(DiskError):
            use()
    assert not is_folder or list((old_sealed.root / "keys").iterdir()) == []
    assert not any(b"text of secret" in data for data in tree(old_sealed.root / "users").values())
    vault.close()
    if is_folder:
        (old_sealed.root / "keys").rmdir()
    os.rename(tmp_path / "kept", old_sealed.root / "keys")
    test_a_vault_of_schema_1_goes_on(old_sealed)


def test_another_key_in_a_vault_of_schema_1_is_not_registered(old_sealed: Old) -> None:
    vault = old_sealed.open()
    path = vault.user_folder(vault.user_hash("alice"), "keys")
    kept = path.read_bytes()
    path.write_bytes(os.urandom(32))
    for use in (
        lambda: vault.load("alice", base_fingerprint=BASE),
        lambda: vault.read_history("alice"),
        lambda: vault.put_blob("alice", "profile.txt", b"new"),
    ):
        with pytest.raises(DiskError, match="not the registered one"):
            use()
    assert all(row.is_good for row in vault.registry.versions())
    path.write_bytes(kept)
    assert vault.verify() == []
    vault.close()


def test_a_key_file_of_another_vault_is_refused_by_a_vault_of_schema_1(old: Old) -> None:
    (old.root / "key").write_bytes(bytes(32))
    with pytest.raises(DiskError, match="the registry was not written with this key file"):
        old.open()


def test_a_newer_registry_is_refused_before_anything_changes(old: Old) -> None:
    old.open().close()
    engine = sa.create_engine(old.url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE schema SET version = 99"))
    engine.dispose()
    before = tree(old.root)
    with pytest.raises(RegistryError, match="schema 99 is newer than this oppu_ray's 2"):
        old.open()
    assert {name: data for name, data in tree(old.root).items() if name in before} == before
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version FROM schema")).scalar() == 99
        connection.execute(sa.text("UPDATE schema SET version = 2"))
    engine.dispose()
    test_a_vault_of_schema_1_goes_on(old)


@pytest.mark.parametrize("ours", [0, 2], ids=["newer", "older"])
def test_a_manifest_of_another_format_stays_where_it_is(old: Old, ours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a downgrade: the version may be whole, and is for the other oppu_ray to read."""
    vault = old.open()
    with monkeypatch.context() as patch:
        patch.setattr("oppu_ray.vault.FORMAT", ours)
        with pytest.raises(ValueError, match=f"manifest: format 1, expected {ours}") as caught:
            vault.load("alice", base_fingerprint=BASE)
    assert not isinstance(caught.value, CorruptError)
    assert same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(2))
    assert all(row.is_good for row in vault.registry.versions())
    vault.close()
