"""The vault's promise: whoever dies, wherever, a reader finds a whole version, the old one or the new one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vault_tools import (
    BASE,
    Clock,
    empty_postgres,
    in_child,
    make_adapter,
    make_items,
    make_manifest,
    memory_folder,
    same,
    segment_files,
    tree,
)

from oppu_ray import vault as vault_module
from oppu_ray.adapter_files import load_adapter
from oppu_ray.core import AdapterState, Item
from oppu_ray.registry import Refused, RegistryError, UserHash
from oppu_ray.vault import CorruptError, DiskError, Vault

KILL_ROUNDS = int(os.environ.get("OPPU_KILL_ROUNDS", "12"))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=["plain", "sealed", "postgresql"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        empty_postgres(url)
    made = Vault(tmp_path / "vault", url, encrypt=request.param == "sealed", clock=Clock())
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    made = Vault(tmp_path / "vault", encrypt=request.param, clock=Clock())
    yield made
    made.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Vault]:
    made = Vault(tmp_path / "vault", clock=Clock())
    yield made
    made.close()


def load(vault: Vault, user: str = "alice", version: str | None = None) -> AdapterState:
    return vault.load(user, version, base_fingerprint=BASE)[0]


def folder_of(vault: Vault, user: str, version: str) -> Path:
    return vault.user_folder(vault.user_hash(user)) / "adapters" / version


# ---- commit and load


def test_what_is_committed_is_loaded_with_its_lineage(vault: Vault) -> None:
    adapter, manifest = make_adapter(1), make_manifest(run_id="r1")
    version = vault.commit("alice", adapter, manifest)
    loaded, lineage = vault.load("alice", base_fingerprint=BASE)
    assert same(loaded, adapter)
    assert replace(lineage, user_hash="", version="", peft_config={}, shapes={}, checksums={}) == manifest
    assert (lineage.user_hash, lineage.version, lineage.parent) == (vault.user_hash("alice"), version, None)
    assert lineage.peft_config == adapter.peft_config
    assert set(lineage.checksums) == {"adapter_config.json", "adapter_model.safetensors"}
    assert vault.verify() == []


def test_a_plain_version_folder_is_a_peft_folder(plain: Vault) -> None:
    version = plain.commit("alice", make_adapter(1), make_manifest())
    assert same(load_adapter(folder_of(plain, "alice", version)), make_adapter(1))


def test_users_do_not_touch_each_other(vault: Vault) -> None:
    vault.commit("alice", make_adapter(1), make_manifest())
    before = tree(vault.user_folder(vault.user_hash("alice")))
    vault.commit("bob", make_adapter(2), make_manifest())
    vault.append_history("bob", make_items("1"))
    assert tree(vault.user_folder(vault.user_hash("alice"))) == before
    assert same(load(vault), make_adapter(1)) and same(load(vault, "bob"), make_adapter(2))


def test_versions_use_rollback_and_diff(vault: Vault) -> None:
    versions = [vault.commit("alice", make_adapter(seed), make_manifest((str(seed),))) for seed in (1, 2, 3)]
    assert [row.version for row in vault.registry.versions(vault.user_hash("alice"))] == versions
    assert vault.load("alice", base_fingerprint=BASE)[1].parent == versions[1]
    assert vault.rollback("alice") == versions[1] and same(load(vault), make_adapter(2))
    vault.use("alice", versions[2])
    assert same(load(vault), make_adapter(3)) and same(load(vault, version=versions[0]), make_adapter(1))
    vault.use("alice", versions[0])
    with pytest.raises(ValueError, match=f"no good version before {versions[0]}"):
        vault.rollback("alice")
    with pytest.raises(ValueError, match="no good version '../../key'"):
        vault.use("alice", "../../key")
    changes = vault.diff("alice", versions[0], versions[2])
    assert changes.fields["item_ids"] == (("1",), ("3",)) and "base_fingerprint" not in changes.fields
    old, new = make_adapter(1).tensors, make_adapter(3).tensors
    assert changes.tensors == {name: float(np.abs(new[name] - old[name]).max()) for name in old}
    fourth = vault.commit("alice", make_adapter(4, rank=4), make_manifest())
    assert set(vault.diff("alice", versions[0], fourth).tensors.values()) == {float("inf")}


def test_a_run_that_restarts_skips_who_is_done(vault: Vault) -> None:
    first = vault.commit("alice", make_adapter(1), make_manifest(run_id="r1"))
    assert vault.done("r1", ["alice", "bob"]) == {"alice"}
    assert vault.commit("alice", make_adapter(2), make_manifest(run_id="r1")) == first
    assert same(load(vault), make_adapter(1))
    assert vault.commit("alice", make_adapter(2), make_manifest(run_id="r2")) != first


def test_another_base_is_refused_by_name(vault: Vault) -> None:
    version = vault.commit("alice", make_adapter(1), make_manifest())
    with pytest.raises(ValueError, match=f"{version} was trained on base base-fingerprint, not on base-other"):
        vault.load("alice", base_fingerprint="base-other")
    assert vault.load("alice", base_fingerprint=None)[1].version == version
    assert vault.verify() == []


def test_an_unknown_user_and_one_without_an_adapter_are_told_apart(vault: Vault) -> None:
    vault.add_users(["alice"])
    with pytest.raises(ValueError, match="no good adapter version yet"):
        load(vault)
    with pytest.raises(ValueError, match="no such user"):
        load(vault, "bob")


def test_bad_adapters_and_manifests_are_not_committed(plain: Vault) -> None:
    spoilt = make_adapter(1)
    next(iter(spoilt.tensors.values()))[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        plain.commit("alice", spoilt, make_manifest())
    for bad in (replace(make_manifest(), metrics={"loss": np.nan}), replace(make_manifest(), recipe={"x": Path("x")})):
        with pytest.raises(ValueError, match="manifest is not plain JSON"):
            plain.commit("alice", make_adapter(1), bad)
    assert plain.registry.versions() == [] and plain.verify() == []


# ---- who may write


def test_a_leased_user_is_committed_by_the_holder_only(vault: Vault) -> None:
    lease = vault.lease("alice", "job-1", ttl_s=60)
    with pytest.raises(Refused, match="leased to job-1"):
        vault.commit("alice", make_adapter(2), make_manifest(run_id="job-2"))
    with pytest.raises(Refused, match="the lease is for user"):
        vault.commit("bob", make_adapter(2), make_manifest(), lease)
    vault.commit("alice", make_adapter(1), make_manifest(), lease)
    vault.registry.release_lease(lease)
    vault.commit("alice", make_adapter(2), make_manifest(run_id="job-2"))
    assert same(load(vault), make_adapter(2)) and vault.verify() == []


def test_a_job_that_lost_its_lease_leaves_nothing(plain: Vault) -> None:
    clock = plain._clock
    assert isinstance(clock, Clock)
    slow = plain.lease("alice", "slow", ttl_s=60)
    clock.now += 61
    plain.commit("alice", make_adapter(2), make_manifest(run_id="quick"))
    before = tree(plain.root / "users")
    with pytest.raises(Refused, match="lease of slow"):
        plain.commit("alice", make_adapter(1), make_manifest(), slow)
    assert tree(plain.root / "users") == before and plain.verify() == []


def test_an_operator_who_moves_current_during_a_commit_wins(plain: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plain.commit("alice", make_adapter(1), make_manifest())
    second = plain.commit("alice", make_adapter(2), make_manifest())
    stage_version = plain.stage_version

    def stage_and_roll_back(*args: Any) -> Any:
        plain.use("alice", first)
        return stage_version(*args)

    monkeypatch.setattr(plain, "stage_version", stage_and_roll_back)
    with pytest.raises(Refused, match=f"current version is {first}, expected {second}"):
        plain.commit("alice", make_adapter(3), make_manifest())
    assert same(load(plain), make_adapter(1)) and plain.verify() == []


def test_two_commits_at_once_and_a_reader_between_them(vault: Vault) -> None:
    vault.commit("alice", make_adapter(0), replace(make_manifest(), seed=0))
    stop, wrong = threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            adapter, manifest = vault.load("alice", base_fingerprint=BASE)
            if not same(adapter, make_adapter(manifest.seed)):
                wrong.append(manifest.version)

    def write(seeds: range) -> None:
        for seed in seeds:
            try:
                vault.commit("alice", make_adapter(seed), replace(make_manifest(), seed=seed))
            except Refused:
                continue

    writers = [threading.Thread(target=write, args=(range(start, start + 6),)) for start in (1, 11)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong and vault.verify() == []
    numbers = [row.number for row in vault.registry.versions()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 1


# ---- corruption


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


DAMAGE: list[Callable[[Path], None]] = [flip, cut]
"""Bytes that are read and are wrong."""
AWAY: list[Callable[[Path], None]] = [link, Path.unlink]
"""Bytes that cannot be reached."""


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_corrupt_version_is_quarantined_and_the_last_good_one_answers(
    either: Vault, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    good = either.commit("alice", make_adapter(1), make_manifest())
    bad = either.commit("alice", make_adapter(2), make_manifest())
    damage(folder_of(either, "alice", bad) / name)
    assert len(either.verify("alice")) == 1 and name in either.verify("alice")[0]
    with caplog.at_level(logging.ERROR):
        adapter, manifest = either.load("alice", base_fingerprint=BASE)
    assert same(adapter, make_adapter(1)) and manifest.version == good
    assert f"version {bad} is corrupt and quarantined" in caplog.text and name in caplog.text
    assert either.user_hash("alice")[:12] in caplog.text and "alice" not in caplog.text
    assert not folder_of(either, "alice", bad).exists() and either.verify() == []
    with pytest.raises(ValueError, match=f"no good version '{bad}'"):
        load(either, version=bad)
    third = either.commit("alice", make_adapter(3), make_manifest())
    assert same(load(either), make_adapter(3)) and third > bad


def test_a_corrupt_version_asked_for_by_name_is_an_error(plain: Vault) -> None:
    first = plain.commit("alice", make_adapter(1), make_manifest())
    plain.commit("alice", make_adapter(2), make_manifest())
    flip(folder_of(plain, "alice", first) / "adapter_model.safetensors")
    with pytest.raises(CorruptError, match="adapter_model.safetensors: SHA-256"):
        load(plain, version=first)
    assert same(load(plain), make_adapter(2))


@pytest.mark.parametrize("damage", AWAY)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json", ""])
def test_a_version_that_cannot_be_reached_stays_current_and_heals(
    either: Vault, name: str, damage: Callable[[Path], None]
) -> None:
    either.commit("alice", make_adapter(1), make_manifest())
    version = either.commit("alice", make_adapter(2), make_manifest())
    path = folder_of(either, "alice", version) / name
    kept = path.with_name("kept")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
    (shutil.rmtree if path.is_dir() and damage is Path.unlink else damage)(path)
    for wanted in (None, version):
        with pytest.raises(DiskError, match=f"could not read version {version} of user .*{name}"):
            load(either, version=wanted)
    assert version in either.verify("alice")[0]
    current = either.registry.current(either.user_hash("alice"))
    assert current is not None and current.version == version
    if damage is link:
        path.unlink()
    kept.rename(path)
    assert same(load(either), make_adapter(2)) and all(row.is_good for row in either.registry.versions())


def test_nothing_good_left_is_an_error(plain: Vault) -> None:
    flip(folder_of(plain, "alice", plain.commit("alice", make_adapter(1), make_manifest())) / "manifest.json")
    with pytest.raises(ValueError, match="no good adapter version yet"):
        load(plain)


def test_another_users_files_in_ones_place_are_refused(either: Vault) -> None:
    mine = either.commit("alice", make_adapter(1), make_manifest())
    theirs = either.commit("bob", make_adapter(2), make_manifest())
    for user in ("alice", "bob"):
        either.append_history(user, make_items("1", user))
        either.put_blob(user, "profile.txt", user.encode())
    shutil.copy(*(segment_files(either, user)[0] for user in ("bob", "alice")))
    shutil.copy(*(either.user_folder(either.user_hash(user)) / "blobs/profile.txt" for user in ("bob", "alice")))
    shutil.rmtree(folder_of(either, "alice", mine))
    shutil.copytree(folder_of(either, "bob", theirs), folder_of(either, "alice", mine))
    for read in (load, Vault.read_history):
        with pytest.raises(ValueError):
            read(either, "alice")
    with pytest.raises(CorruptError, match="profile.txt"):
        either.get_blob("alice", "profile.txt")


def test_a_vault_opened_twice_in_a_process_loses_nothing_to_another_process(tmp_path: Path) -> None:
    """Were SQLite's locks dropped, the other process would delete the log that this one writes to when it ends."""
    ours = Vault(tmp_path)
    ours.add_users(["ann"])
    Vault(tmp_path).close()
    others = ["from pathlib import Path; from oppu_ray.vault import Vault", f"vault = Vault(Path({str(tmp_path)!r}))"]
    run = partial(subprocess.run, check=True, stdout=subprocess.PIPE)
    run([sys.executable, "-c", "\n".join([*others, "vault.add_users(['bob'])", "vault.close()"])])
    ours.add_users(["cleo"])
    assert run([sys.executable, "-c", "\n".join([*others, "print(len(vault.registry.users()))"])]).stdout == b"3\n"


def test_symlinks_planted_above_are_neither_read_nor_written_through(plain: Vault, tmp_path: Path) -> None:
    plain.commit("alice", make_adapter(1), make_manifest())
    folder = plain.user_folder(plain.user_hash("alice"))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    before = tree(elsewhere)
    with pytest.raises(DiskError, match="link"):
        plain.append_history("alice", make_items("1"))
    with pytest.raises(DiskError, match="symlink"):
        load(plain)
    assert tree(elsewhere) == before
    folder.unlink()
    shutil.move(elsewhere, folder)
    assert same(load(plain), make_adapter(1))


# ---- ids


@pytest.mark.parametrize(
    "user",
    ["..", ".", "/etc/passwd", "a/../../b", "~root", "'; DROP TABLE users; --", "$(reboot)", "-rf", "a b", "x" * 256]
    + ["Ωμέγα", "用户", "CON", "%2e%2e", "*", "\\\\host\\share", "{0}", "key", "🙂"],
)
def test_hostile_ids_are_ordinary_users(plain: Vault, user: str, tmp_path: Path) -> None:
    plain.commit(user, make_adapter(1), make_manifest())
    assert same(load(plain, user), make_adapter(1))
    assert {path.name for path in tmp_path.iterdir()} == {"vault"}
    assert plain.user_folder(plain.user_hash(user)).parent.parent.parent == plain.root / "users"
    assert plain.verify() == []


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "1 to 256"),
        ("x" * 257, "1 to 256"),
        ("x" * 10_000, "1 to 256"),
        ("a\0b", "control character '\\\\x00' at 1"),
        ("a\nb", "control character"),
        ("a\u202eb", "invisible format"),
        ("a\u200b", "invisible format"),
        ("\ud800", "surrogate"),
        ("a\u2028", "line"),
        (7, "expected text"),
        (None, "expected text"),
        (b"alice", "expected text"),
    ],
)
def test_ids_that_cannot_be_told_apart_by_eye_are_refused(plain: Vault, user: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        plain.add_users([user])
    assert len(str(caught.value)) < 200 and plain.registry.users() == []


def test_look_alikes_are_different_users_and_normal_forms_are_one(plain: Vault) -> None:
    assert plain.user_hash("e\u0301") == plain.user_hash("\u00e9")
    assert len({plain.user_hash(user) for user in ("alice", "Alice", "аlice", "alice ", "ɑlice")}) == 5


def test_a_hash_is_taken_as_one_only_by_its_type(plain: Vault) -> None:
    plain.commit("alice", make_adapter(1), make_manifest())
    user_hash = plain.registry.users()[0].user_hash
    assert same(load(plain, user_hash), make_adapter(1))
    with pytest.raises(ValueError, match="no such user"):
        load(plain, str(user_hash))  # a user whose id looks like Alice's hash is not Alice
    with pytest.raises(ValueError, match="64 hex digits"):
        plain.get_blob(UserHash("../../../etc"), "profile.txt")


def test_another_vault_gives_another_hash(tmp_path: Path) -> None:
    hashes = {Vault(tmp_path / name).user_hash("alice") for name in ("one", "two", "one")}
    assert len(hashes) == 2


# ---- history and blobs


def test_history_grows_by_segments_and_keeps_order(vault: Vault) -> None:
    items = [Item("1", context=("a", "b"), options=("c", "d"), text="été\u2028\x85\n"), *make_items("2", "3")]
    assert vault.append_history("alice", items[:2]) == 2
    assert vault.append_history("alice", items[2:]) == 3
    assert vault.append_history("alice", []) == 3
    assert vault.read_history("alice") == tuple(items) and vault.read_history("bob") == ()
    with pytest.raises(ValueError, match="item '2': is there twice"):
        vault.append_history("alice", make_items("4", "2"))
    with pytest.raises(ValueError, match="item '5': is there twice"):
        vault.append_history("alice", make_items("5", "5"))
    for bad in (Item(""), Item("6", text=None), Item(6), Item("6", label=3), Item("6", text="\ud800")):  # type: ignore
        with pytest.raises(ValueError, match="expected a non-empty item_id|lone surrogate"):
            vault.append_history("alice", [bad])
    assert vault.read_history("alice") == tuple(items) and vault.verify() == []


def test_items_that_are_there_can_be_left_out_and_a_lost_lease_adds_none(vault: Vault) -> None:
    lease = vault.lease("alice", "job", 60)
    assert vault.append_history("alice", make_items("1", "2"), skip_known=True, lease=lease) == 2
    assert vault.append_history("alice", make_items("2", "3"), skip_known=True, lease=lease) == 3
    assert vault.append_history("alice", make_items("1", "2"), skip_known=True, lease=lease) == 3
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "2", "3"]
    (segment,) = segment_files(vault, "alice")  # small appends are merged
    assert list(segment.parent.iterdir()) == [segment]
    vault.registry.delete_user(vault.user_hash("alice"))
    with pytest.raises(Refused, match="the lease of job .* was lost"):
        vault.append_history("alice", make_items("4"), skip_known=True, lease=lease)
    assert not vault.registry.has_user(vault.user_hash("alice"))


@pytest.mark.parametrize("has_lease", [True, False])
def test_what_is_written_while_its_user_is_forgotten_does_not_stay(
    either: Vault, monkeypatch: pytest.MonkeyPatch, has_lease: bool
) -> None:
    """The forgetting comes after the writer has begun, and before its file is in place."""
    alice = either.user_hash("alice")
    either.append_history("alice", make_items("1"))
    folder = either.user_folder(alice)
    before, generation, write = tree(folder), either.registry.generation(alice), vault_module.write_file

    def forget_first(path: Path, data: bytes) -> None:
        either.registry.delete_user(alice)
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(vault_module, "write_file", forget_first)
        with pytest.raises(Refused, match="forgotten meanwhile"):
            either.put_blob("alice", "profile.txt", b"canary")
    assert tree(folder) == before and not either.registry.has_user(alice)
    either.add_users(["alice"])
    assert tree(folder) == {}  # what a crash while forgetting them had left is none of theirs
    with pytest.raises(Refused, match="forgotten meanwhile"):  # the user is there, but is not who was there before
        either.put_blob("alice", "profile.txt", b"canary", generation)
    with pytest.raises(Refused, match="forgotten meanwhile"):
        either.append_history("alice", make_items("2"), generation=generation)
    lease = either.lease("alice", "job", 60) if has_lease else None
    monkeypatch.setattr(vault_module, "write_file", forget_first)
    with pytest.raises(Refused, match="forgotten meanwhile|was lost"):
        either.append_history("alice", make_items("2"), lease=lease)
    assert tree(folder) == {} and not either.registry.has_user(alice)


def test_what_is_written_after_an_item_was_forgotten_does_not_stay(
    plain: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.append_history("alice", make_items("1"))
    lease, write_new = plain.lease("alice", "job", 60), plain.write_new

    def forget_first(*args: Any) -> None:
        plain.registry.delete_versions(plain.user_hash("alice"), set(), ["hash of 2"])
        write_new(*args)

    monkeypatch.setattr(plain, "write_new", forget_first)
    with pytest.raises(Refused, match="the lease of job .* was lost"):
        plain.append_history("alice", make_items("2"), lease=lease)
    assert plain.read_history("alice") == tuple(make_items("1"))


def test_a_reader_that_comes_too_late_makes_no_folder_of_a_forgotten_user(plain: Vault) -> None:
    plain.commit("alice", make_adapter(1), make_manifest())
    row = plain.registry.current(plain.user_hash("alice"))
    assert row is not None
    plain.registry.delete_user(row.user_hash)
    shutil.rmtree(plain.user_folder(row.user_hash))
    with pytest.raises(CorruptError, match="forgotten or quarantined meanwhile"):
        plain.load_version(row, base_fingerprint=BASE)
    assert not plain.user_folder(row.user_hash).exists() and plain.verify() == []


def test_appends_at_once_lose_and_double_nothing(plain: Vault) -> None:
    def append(name: str) -> None:
        for number in range(5):
            plain.append_history("alice", make_items(f"{name}{number}"))

    threads = [threading.Thread(target=append, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [item.item_id for item in plain.read_history("alice")]
    assert sorted(ids) == sorted(f"{name}{number}" for name in "abc" for number in range(5))
    assert [one for one in ids if one[0] == "a"] == [f"a{number}" for number in range(5)]


@pytest.mark.parametrize("damage", [*DAMAGE, *AWAY])
def test_a_damaged_segment_or_blob_is_an_error_and_never_part_of_an_answer(
    either: Vault, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "MERGE_ITEMS", 1)
    for number in range(3):
        either.append_history("alice", make_items(str(number)))
    either.put_blob("alice", "index.safetensors", b"0123456789")
    folder = either.user_folder(either.user_hash("alice"))
    damage(segment_files(either, "alice")[1])
    with pytest.raises(DiskError if damage in AWAY else CorruptError, match="history"):
        either.read_history("alice")
    assert [item.item_id for item in either.read_history("alice", newest=1)] == ["2"]  # reads no more than it must
    if damage is not Path.unlink:  # an index that is gone is built anew
        damage(folder / "blobs" / "index.safetensors")
        with pytest.raises(DiskError if damage in AWAY else CorruptError, match="index.safetensors"):
            either.get_blob("alice", "index.safetensors")


def test_segments_cannot_change_places(either: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_module, "MERGE_ITEMS", 1)
    for number in range(2):
        either.append_history("alice", make_items(str(number)))
    first, second = segment_files(either, "alice")
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CorruptError):
        either.read_history("alice")


def test_blobs_are_replaced_whole(either: Vault) -> None:
    either.add_users(["alice"])
    assert either.get_blob("alice", "profile.txt") is None
    for data in (b"one\ntwo", b"", bytes(range(256))):
        either.put_blob("alice", "profile.txt", data)
        assert either.get_blob("alice", "profile.txt") == data
    for name in ("../key", "", "a/b", ".x", "A", "a\n", "profile.txt/../../x"):
        with pytest.raises(ValueError, match="expected"):
            either.put_blob("alice", name, b"")
        assert either.get_blob("alice", name) is None


# ---- on the disk


def test_no_one_else_may_read_and_a_sealed_vault_shows_nothing(either: Vault) -> None:
    either.append_history("alice", [Item("canary-item", text="canary-text")])
    either.put_blob("alice", "profile.txt", b"canary-profile")
    either.commit("alice", make_adapter(1), make_manifest(("canary-item",)))
    for path in either.root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
        assert b"alice" not in path.name.encode()
    content = b"".join(tree(either.root).values())
    assert b"alice" not in content
    assert (b"canary" in content) != either.is_encrypted and (b"q_proj" in content) != either.is_encrypted


def test_a_vault_stays_as_it_was_made(tmp_path: Path) -> None:
    Vault(tmp_path / "sealed", encrypt=True).commit("alice", make_adapter(1), make_manifest())
    reopened = Vault(tmp_path / "sealed")
    assert reopened.is_encrypted and same(load(reopened), make_adapter(1))
    Vault(tmp_path / "plain")
    with pytest.raises(ValueError, match="made without encryption"):
        Vault(tmp_path / "plain", encrypt=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="vault .*file: cannot be opened"):
        Vault(tmp_path / "file")


def test_a_vault_that_lost_its_key_is_not_given_another(plain: Vault) -> None:
    plain.append_history("alice", make_items("1"))
    key = (plain.root / "key").read_bytes()
    (plain.root / "key").unlink()
    with pytest.raises(ValueError, match="has users but no key file"):
        Vault(plain.root)
    (plain.root / "key").write_bytes(key[:31])
    with pytest.raises(ValueError, match="31 bytes, expected 32"):
        Vault(plain.root)
    (plain.root / "key").write_bytes(key)
    assert len(Vault(plain.root).read_history("alice")) == 1


# ---- crashes


class Crash(BaseException):
    """The process is dead: nothing after it happens, not even cleaning up."""


class Faults:
    """Stands in for `vault.step`. From call `at` on, `kill` dies; an OSError with `code` happens `times` times.

    A write that dies or fails has written half.
    """

    def __init__(self, at: int, kill: Callable[[], None] | None = None, code: int = 0, times: int = 1) -> None:
        self.at, self.kill, self.code, self.times, self.count = at, kill, code, times, 0
        self.names: list[str] = []

    def __call__(self, operation: Callable[..., Any], *args: Any) -> Any:
        self.count += 1
        self.names.append(operation.__name__)
        if self.count < self.at or (not self.kill and self.count >= self.at + self.times):
            return operation(*args)
        if operation is os.write and self.count == self.at:
            os.write(args[0], args[1][: len(args[1]) // 2])
        if self.kill:
            self.kill()
        if operation.__name__ in ("publish", "release_lease"):
            raise RegistryError("the registry failed")
        raise OSError(self.code, os.strerror(self.code), "somewhere")


def die() -> None:
    raise Crash


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def template(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A closed vault where Alice has version 1 and a history, to be copied for each crash."""
    made = Vault(tmp_path / "template", encrypt=request.param)
    made.commit("alice", make_adapter(1), make_manifest())
    made.append_history("alice", make_items("1"))
    made.put_blob("alice", "profile.txt", b"old")
    made.close()
    return tmp_path / "template"


def commit_second(vault: Vault) -> str:
    return vault.commit("alice", make_adapter(2), make_manifest(run_id="run"))


def num_steps(template: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[Vault], object]) -> int:
    copy = template.with_name("count")
    shutil.copytree(template, copy)
    with monkeypatch.context() as patch:
        vault = Vault(copy)
        patch.setattr(vault_module, "step", faults := Faults(at=10**9))
        action(vault)
        vault.close()
    assert faults.count > 5
    return faults.count


def test_a_crash_at_every_step_of_a_commit_leaves_old_or_new(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for at in range(1, num_steps(template, monkeypatch, commit_second) + 1):
        copy = template.with_name(f"crash-{at}")
        shutil.copytree(template, copy)
        vault = Vault(copy)
        with monkeypatch.context() as patch:
            patch.setattr(vault_module, "step", Faults(at, kill=die))
            with pytest.raises(Crash):
                commit_second(vault)
        vault.close()

        vault = Vault(copy)  # a restart
        is_new = same(load(vault), make_adapter(2))
        assert is_new or same(load(vault), make_adapter(1))
        assert vault.done("run", ["alice"]) == ({"alice"} if is_new else set())
        assert all("left over" in problem for problem in vault.verify())
        commit_second(vault)  # with no cleaning by hand, no waiting for the lease
        assert same(load(vault), make_adapter(2)) and len(vault.registry.versions()) == 2
        vault.gc(min_age_s=-1)
        assert vault.verify() == []
        vault.close()
        outcomes.append(is_new)
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_failing_disk_at_every_step_is_a_clear_error(
    template: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    vault = Vault(template)
    steps = num_steps(template, monkeypatch, commit_second)
    for at in range(1, steps + 1):
        with monkeypatch.context() as patch:
            patch.setattr(vault_module, "step", faults := Faults(at, code=code))
            try:
                vault.commit("alice", make_adapter(2), make_manifest())
            except ValueError as error:
                failed_in = faults.names[at - 1]
                assert os.strerror(code) in str(error) or failed_in in ("publish", "release_lease")
                assert "alice" not in str(error)
        current = vault.registry.current(vault.user_hash("alice"))
        assert current is not None
        assert same(load(vault), make_adapter(1 if current.number == 1 else 2))
    assert [problem for problem in vault.verify() if "left over" not in problem] == []


FULL_DISK = """
import os, sys
from pathlib import Path
from vault_tools import BASE, make_adapter, make_items, make_manifest, same
from oppu_ray.vault import Vault

disk = Path(sys.argv[1])
vault = Vault(disk / "vault")
first = vault.commit("alice", make_adapter(1), make_manifest())
num_refused = 0
with open(disk / "filler", "wb", buffering=0) as filler:
    for size in (2**15, 2**12, 2**9, 1):  # ever finer, so that commits fail at ever later steps
        try:
            while True:
                filler.write(bytes(size))
        except OSError:
            pass
        for write in (
            lambda: vault.commit("alice", make_adapter(2, width=64), make_manifest()),
            lambda: vault.append_history("alice", make_items(*map(str, range(500)))),
        ):
            try:
                write()
            except ValueError as error:
                assert "No space left on device" in str(error) or "full" in str(error), error
                num_refused += 1
        assert same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(1))
        os.truncate(filler.fileno(), max(0, filler.tell() - 5 * 2**12))
        filler.seek(0, os.SEEK_END)
assert num_refused >= 4, num_refused
os.unlink(disk / "filler")
assert vault.commit("alice", make_adapter(2), make_manifest()) != first
vault.close()
vault = Vault(disk / "vault")
vault.gc(min_age_s=-1)
assert vault.verify() == [], vault.verify()
print("held")
"""


@pytest.mark.chaos
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 1 MiB in a mount namespace of its own: old versions answer, and with room again all goes on."""
    command = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a disk of its own needs root and mount namespaces")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command, FULL_DISK], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "held\n", done.stderr


def test_a_read_only_disk_serves_and_refuses_to_write(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault(template)
    monkeypatch.setattr(vault_module, "step", Faults(1, code=errno.EROFS, times=10**9))
    for write in (
        lambda: vault.commit("alice", make_adapter(2), make_manifest()),
        lambda: vault.append_history("alice", make_items("9")),
        lambda: vault.put_blob("alice", "profile.txt", b"new"),
    ):
        with pytest.raises(ValueError, match="Read-only file system|the registry failed"):
            write()
    assert same(load(vault), make_adapter(1)) and vault.get_blob("alice", "profile.txt") == b"old"


@pytest.mark.parametrize("code", [None, errno.ENOSPC])
def test_a_crash_while_adding_history_or_a_blob_leaves_old_or_new(
    template: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def act(vault: Vault) -> None:
        vault.append_history("alice", make_items("2", "3"))
        vault.put_blob("alice", "profile.txt", b"new")

    seen = set()
    for at in range(1, num_steps(template, monkeypatch, act) + 1):
        copy = template.with_name(f"crash-{at}-{code}")
        shutil.copytree(template, copy)
        vault = Vault(copy)
        with monkeypatch.context() as patch:
            patch.setattr(vault_module, "step", Faults(at, kill=None if code else die, code=code or 0))
            with pytest.raises((Crash, ValueError)):
                act(vault)
        ids = tuple(item.item_id for item in vault.read_history("alice"))
        assert ids in (("1",), ("1", "2", "3"))
        seen.add((len(ids), vault.get_blob("alice", "profile.txt")))
        vault.gc(min_age_s=-1)
        assert vault.verify() == []
        vault.close()
    assert (1, b"old") in seen and (3, b"old") in seen and (3, b"new") in seen


def test_everything_is_on_the_disk_before_current_moves(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault(template)
    dirty: dict[int, str] = {}
    checked = []

    def watch(operation: Callable[..., Any], *args: Any) -> Any:
        if operation.__name__ == "publish":
            checked.append([path for path in dirty.values() if not path.endswith("/tmp")])
        result = operation(*args)
        if operation is os.fsync:
            dirty.pop(os.fstat(args[0]).st_ino, None)
        elif operation is os.write:
            dirty[os.fstat(args[0]).st_ino] = os.readlink(f"/proc/self/fd/{args[0]}")
        elif operation in (os.open, os.mkdir, os.rename, os.link):
            parent = Path(args[1] if operation in (os.rename, os.link) else args[0]).parent
            dirty[parent.stat().st_ino] = str(parent)
        return result

    monkeypatch.setattr(vault_module, "step", watch)
    vault.commit("alice", make_adapter(2), make_manifest())
    vault.commit("bob", make_adapter(2), make_manifest())
    assert checked == [[], []]
    assert all(path.endswith("/tmp") for path in dirty.values())


def test_sigkill_again_and_again(tmp_path: Path) -> None:
    """Every other round is killed at a step, the others by a reader that has just seen a new version."""
    root = tmp_path / "vault"
    vault = Vault(root)
    vault.commit("alice", make_adapter(0), replace(make_manifest(), seed=0))
    vault.close()
    last = 0

    def commit_until_killed(first: int, at: int) -> None:
        mine = Vault(root)
        if at:
            vault_module.step = Faults(at, kill=lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[assignment]
        for seed in range(first, first + 1000):
            manifest = replace(make_manifest(run_id="run"), seed=seed, run_id=f"run-{seed}")
            lease = mine.lease("alice", "the trainer", 60)
            mine.commit("alice", make_adapter(seed), manifest, lease)

    for number in range(KILL_ROUNDS):
        at = 1 + number * 7 % 40 if number % 2 else 0
        child = in_child(partial(commit_until_killed, last + 1, at))
        vault = Vault(root)
        while not at and load_seed(vault) < last + 1 + number % 3:
            pass
        if not at:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        seed = load_seed(vault)
        assert seed in (last, last + 1) if at else seed > last
        assert all("left over" in problem for problem in vault.verify())
        assert vault.done(f"run-{seed}", ["alice"]) == ({"alice"} if seed else set())
        assert vault.done(f"run-{seed + 1}", ["alice"]) == set()
        last = seed
        vault.close()
    vault = Vault(root, clock=lambda: time.time() + 61)
    vault.gc(min_age_s=-1)
    assert vault.verify() == []


def load_seed(vault: Vault) -> int:
    adapter, manifest = vault.load("alice", base_fingerprint=BASE)
    assert same(adapter, make_adapter(manifest.seed))
    return manifest.seed


# ---- gc


def test_gc_passes_over_what_a_commit_has_just_put_in_its_place(plain: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_leftovers", lambda: [plain.root / "tmp" / "was-here"])
    assert plain.gc(min_age_s=-1) == []


def test_gc_leaves_what_is_young_leased_or_registered(plain: Vault) -> None:
    clock = plain._clock
    assert isinstance(clock, Clock)
    clock.now = time.time()
    version = plain.commit("alice", make_adapter(1), make_manifest())
    alice, nobody = plain.user_hash("alice"), plain.user_hash("nobody")
    leftovers = [
        plain.root / "tmp" / f"{alice}-0123",
        plain.root / "tmp" / "new-0123",
        folder_of(plain, "alice", "000002-99"),
        folder_of(plain, "nobody", "000001-98"),
    ]
    for path in leftovers:
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x")
    assert plain.gc() == []  # an hour young
    clock.now += 7200
    lease = plain.lease("alice", "job", 60)
    assert set(plain.gc()) == {str(path.relative_to(plain.root)) for path in (leftovers[1], plain.user_folder(nobody))}
    plain.registry.release_lease(lease)
    assert set(plain.gc()) == {str(path.relative_to(plain.root)) for path in (leftovers[0], leftovers[2])}
    assert plain.verify() == [] and same(load(plain), make_adapter(1)) and folder_of(plain, "alice", version).exists()


def test_gc_finds_whose_a_leftover_is_wherever_the_vault_lies(tmp_path: Path) -> None:
    vault = Vault(tmp_path / ("0" * 64) / "vault")
    leftover = vault.root / "tmp" / f"{vault.user_hash('alice')}-0123"
    leftover.touch()
    lease = vault.lease("alice", "job", 60)
    assert vault.gc(min_age_s=-1) == []
    vault.registry.release_lease(lease)
    assert vault.gc(min_age_s=-1) == [f"tmp/{leftover.name}"]


def test_gc_stops_where_its_lease_was_lost(plain: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = plain._clock
    assert isinstance(clock, Clock)
    clock.now = time.time()
    first, second = (plain.root / "tmp" / f"{plain.user_hash('alice')}-{number}" for number in (1, 2))
    for path in (first, second):
        path.touch()

    def remove_slowly(path: Path) -> None:
        path.unlink()
        clock.now += 61
        plain.lease("alice", "job", 60)

    monkeypatch.setattr(vault_module, "remove", remove_slowly)
    assert plain.gc(min_age_s=-1) == [f"tmp/{first.name}"] and second.exists()


def test_gc_never_takes_a_user_who_comes_at_the_same_moment(plain: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = plain._clock
    assert isinstance(clock, Clock)
    clock.now = time.time()
    (plain.user_folder(plain.user_hash("alice")) / "history").mkdir(parents=True)
    acquire = plain.registry.acquire_lease

    def acquire_after_alice_came(*args: Any) -> Any:
        plain.append_history("alice", make_items("1"))
        return acquire(*args)

    monkeypatch.setattr(plain.registry, "acquire_lease", acquire_after_alice_came)
    assert plain.gc(min_age_s=-1) == []
    assert [item.item_id for item in plain.read_history("alice")] == ["1"]


def test_old_versions_go_but_the_current_one_and_those_of_runs(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault")
    made = [
        vault.commit("ann", make_adapter(seed), make_manifest(run_id="run" if seed == 1 else "")) for seed in range(8)
    ]
    other = vault.commit("bob", make_adapter(1), make_manifest())
    vault.use("ann", made[2])
    assert vault.drop_old_versions("ann", 3) == 3
    kept = [made[1], made[2], *made[5:]]
    ann = vault.user_hash("ann")
    assert [row.version for row in vault.registry.versions(ann)] == kept
    assert sorted(path.name for path in (vault.user_folder(ann) / "adapters").iterdir()) == sorted(kept)
    assert vault.registry.current(ann).version == made[2]  # type: ignore[union-attr]
    assert vault.drop_old_versions("ann", 3) == 0 and vault.drop_old_versions("bob", 3) == 0
    assert vault.load("bob", base_fingerprint=BASE)[1].version == other and vault.verify() == []
