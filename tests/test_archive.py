"""An archive takes all of a user and no one else, opens as a PEFT folder, and cannot be used as a weapon."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vault_tools import BASE, make_adapter, make_items, make_manifest, memory_folder, same, tree

from oppu_ray import vault as vault_module
from oppu_ray.adapter_files import load_adapter
from oppu_ray.archive import export_user, import_user
from oppu_ray.forget import forget_user
from oppu_ray.registry import Refused
from oppu_ray.vault import Vault, sha256


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    made = Vault(tmp_path / "vault", encrypt=request.param)
    for user, seed in (("alice", 1), ("bob", 2)):
        made.append_history(user, make_items("1", f"item of {user}"))
        made.append_history(user, make_items("3"))
        made.put_blob(user, "profile.txt", f"profile of {user}".encode())
        made.commit(user, make_adapter(seed), make_manifest(run_id="run"))
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["to-plain", "to-sealed"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    made = Vault(tmp_path / "other", encrypt=request.param)
    yield made
    made.close()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An exported Alice, with one item and no blob."""
    made = Vault(tmp_path / "source")
    made.append_history("alice", make_items("1"))
    made.commit("alice", make_adapter(1), make_manifest())
    export_user(made, "alice", tmp_path / "alice.zip")
    made.close()
    return tmp_path / "alice.zip"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Vault]:
    made = Vault(tmp_path / "target")
    yield made
    assert made.registry.users() == [] and made.verify() == [] and tree(made.root / "users") == {}
    made.close()


def test_a_user_moves_to_another_vault_whole(vault: Vault, other: Vault, tmp_path: Path) -> None:
    export_user(vault, "alice", tmp_path / "alice.zip")
    version = import_user(other, "alice at home", tmp_path / "alice.zip", base_fingerprint=BASE)
    adapter, manifest = other.load("alice at home", base_fingerprint=BASE)
    assert same(adapter, make_adapter(1)) and manifest.version == version
    assert manifest.item_ids == ("1", "2") and manifest.recipe == {"epochs": 3} and manifest.run_id == ""
    assert other.read_history("alice at home") == vault.read_history("alice")
    assert other.get_blob("alice at home", "profile.txt") == b"profile of alice"
    assert other.verify() == [] and len(other.registry.users()) == 1
    other.append_history("alice at home", make_items("4"))
    assert other.commit("alice at home", make_adapter(3), make_manifest(run_id="run")) != version


def test_the_adapter_in_an_archive_is_a_peft_folder(vault: Vault, tmp_path: Path) -> None:
    export_user(vault, "alice", tmp_path / "alice.zip")
    with zipfile.ZipFile(tmp_path / "alice.zip") as archive:
        archive.extractall(tmp_path / "out")
    assert same(load_adapter(tmp_path / "out" / "adapter"), make_adapter(1))
    content = b"".join(tree(tmp_path / "out").values())
    assert b"item of alice" in content and b"bob" not in content
    checksums = json.loads((tmp_path / "out" / "archive.json").read_text())["checksums"]
    files = tree(tmp_path / "out")
    assert checksums == {name: sha256(data) for name, data in files.items() if name != "archive.json"}


def test_an_export_is_private_repeatable_and_overwrites_nothing(vault: Vault, tmp_path: Path) -> None:
    export_user(vault, "alice", tmp_path / "one.zip")
    export_user(vault, "alice", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert stat.S_IMODE((tmp_path / "one.zip").stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="one.zip: exists already"):
        export_user(vault, "alice", tmp_path / "one.zip")
    with pytest.raises(ValueError, match="could not export user"):
        export_user(vault, "alice", tmp_path / "nowhere" / "x.zip")
    with pytest.raises(ValueError, match="no such user"):
        export_user(vault, "carol", tmp_path / "carol.zip")
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "carol.zip").exists()
    actions = [entry.action for entry in vault.registry.audit_log(vault.user_hash("alice"))]
    assert actions.count("export") == 2


def test_a_user_without_an_adapter_moves_too(other: Vault, tmp_path: Path) -> None:
    source = Vault(tmp_path / "source")
    source.append_history("alice", make_items("1"))
    export_user(source, "alice", tmp_path / "alice.zip")
    assert import_user(other, "alice", tmp_path / "alice.zip", base_fingerprint=BASE) is None
    assert other.read_history("alice") == source.read_history("alice") and other.verify() == []


def test_an_archive_of_another_base_is_refused_by_name(archive: Path, target: Vault) -> None:
    with pytest.raises(ValueError, match=f"adapter is for base {BASE}, this is base base-2"):
        import_user(target, "alice", archive, base_fingerprint="base-2")


@pytest.mark.parametrize("has_adapter", [True, False])
def test_the_same_archive_imported_twice_at_once_makes_one_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_adapter: bool
) -> None:
    """The second import comes when the first has seen that there is no such user."""
    source, other = Vault(tmp_path / "source"), Vault(tmp_path / "other")
    source.append_history("alice", make_items("1"))
    if has_adapter:
        source.commit("alice", make_adapter(1), make_manifest())
    export_user(source, "alice", tmp_path / "alice.zip")
    has_user = other.registry.has_user

    def come(user_hash: str) -> bool:
        monkeypatch.undo()
        answer = has_user(user_hash)
        import_user(other, "alice", tmp_path / "alice.zip", base_fingerprint=BASE)
        return answer

    monkeypatch.setattr(other.registry, "has_user", come)
    with pytest.raises(Refused, match="the lease of import-.* was lost"):
        import_user(other, "alice", tmp_path / "alice.zip", base_fingerprint=BASE)
    assert other.read_history("alice") == source.read_history("alice") and other.verify() == []


def test_an_import_replaces_no_one(vault: Vault, archive: Path) -> None:
    before = tree(vault.root / "users")
    with pytest.raises(ValueError, match="exists already"):
        import_user(vault, "alice", archive, base_fingerprint=BASE)
    vault.lease("carol", "job", 60)
    with pytest.raises(Refused, match="leased to job"):
        import_user(vault, "carol", archive, base_fingerprint=BASE)
    assert tree(vault.root / "users") == before and vault.verify() == []


# ---- hostile archives


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def pack(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED, sign: bool = True) -> None:
    """An archive of these entries; with `sign` its checksums are right."""
    if sign:
        index = json.loads(entries["archive.json"])
        index["checksums"] = {name: sha256(data) for name, data in entries.items() if name != "archive.json"}
        entries = {**entries, "archive.json": json.dumps(index).encode()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def refuse(target: Vault, path: Path, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        import_user(target, "alice", path, base_fingerprint=BASE)


@pytest.mark.parametrize(
    "name",
    ["../../key", "/etc/cron.d/x", "adapter/../../x", "adapter/pytorch_model.bin", "blobs/../x", "blobs/", "a\\..\\b"]
    + ["adapter/adapter_model.bin", "users/x", "archive.json/x", "x" * 5000],
)
def test_foreign_names_are_refused(archive: Path, target: Vault, tmp_path: Path, name: str) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    pack(archive, {**entries_of(archive), name: b"x"})
    refuse(target, archive, "not one of an archive's")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_zip_bomb_is_refused_before_it_is_opened(archive: Path, target: Vault) -> None:
    bomb = {**entries_of(archive), "blobs/bomb": b"\0" * 50_000_000}
    pack(archive, bomb, zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 10**6
    refuse(target, archive, "is compressed or encrypted, expected stored")


def test_entries_that_claim_to_be_larger_than_the_archive_are_refused(archive: Path, target: Vault) -> None:
    """Overlapping entries: each points at the same bytes."""
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        start = opened.start_dir
    record = data.index(b"PK\x01\x02", start)
    data[record + 24 : record + 28] = (10**9).to_bytes(4, "little")
    archive.write_bytes(data)
    refuse(target, archive, "larger than the archive")


def test_a_doubled_entry_is_refused(archive: Path, target: Vault) -> None:
    with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr("history.jsonl", b"")
    refuse(target, archive, "is doubled")


@pytest.mark.parametrize("position", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_a_cut_or_flipped_archive_is_refused(archive: Path, target: Vault, position: float) -> None:
    data = archive.read_bytes()
    at = int(len(data) * position)
    archive.write_bytes(data[:at])
    refuse(target, archive, "not a zip archive|expected stored|not one of")
    archive.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
    try:
        import_user(target, "alice", archive, base_fingerprint=BASE)
    except ValueError:
        return
    assert same(target.load("alice", base_fingerprint=BASE)[0], make_adapter(1))  # a bit that means nothing: a date
    forget_user(target, "alice")


def spoil_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def spoil(entries: dict[str, bytes]) -> None:
        manifest = json.loads(entries["manifest.json"])
        change(manifest)
        entries["manifest.json"] = json.dumps(manifest).encode()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda entries: entries.pop("history.jsonl"), "do not match the checksums"),
        (lambda entries: entries.pop("manifest.json"), "its manifest names others"),
        (lambda entries: entries.pop("adapter/adapter_config.json"), "its manifest names others"),
        (lambda entries: entries.update({"archive.json": b'{"format": 9, "checksums": {}}'}), "format 9, expected 1"),
        (lambda entries: entries.update({"history.jsonl": b'{"item_id": "1"}\n'}), "history line 1: not an item"),
        (lambda entries: entries.update({"history.jsonl": entries["history.jsonl"] * 2}), "item '1': is there twice"),
        (lambda entries: entries.update({"manifest.json": b"[]"}), "not a manifest"),
        (spoil_manifest(lambda m: m.update(extra=1)), "not a manifest"),
        (spoil_manifest(lambda m: m.update(format_version=2)), "format 2, expected 1"),
        (spoil_manifest(lambda m: m.update(item_ids=[["x"]])), "not a manifest .*found .*x"),
        (spoil_manifest(lambda m: m.update(metrics={"last_loss": "no"})), "not a manifest .*found 'no'"),
        (spoil_manifest(lambda m: m.update(metrics=[])), "not a manifest"),
        (spoil_manifest(lambda m: m.update(metrics={"rho": -1.0})), "metrics.rho is -1.0; expected a finite number"),
        (spoil_manifest(lambda m: m.update(metrics={"rho": float("nan")})), "metrics.rho is nan; expected a finite"),
        (spoil_manifest(lambda m: m.update(seed=None)), "not a manifest .*found 'None'"),
        (spoil_manifest(lambda m: m.update(recipe=[])), "not a manifest"),
        (spoil_manifest(lambda m: m.update(run_id=3)), "not a manifest"),
        (spoil_manifest(lambda m: m["shapes"].popitem()), "not the manifest's"),
        (spoil_manifest(lambda m: m["checksums"].update({"../x": "0"})), "its manifest names others"),
        (spoil_manifest(lambda m: m["checksums"].update({"adapter_config.json": "0"})), "SHA-256 is not"),
    ],
)
def test_an_archive_with_right_checksums_and_wrong_content_is_refused(
    archive: Path, target: Vault, spoil: Callable[[dict[str, bytes]], None], expected: str
) -> None:
    entries = entries_of(archive)
    spoil(entries)
    pack(archive, entries)
    refuse(target, archive, f"^{archive}: .*{expected}")


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b"\xff", b"nul"])
def test_a_malformed_index_is_refused(archive: Path, target: Vault, index: bytes) -> None:
    pack(archive, {**entries_of(archive), "archive.json": index}, sign=False)
    refuse(target, archive, "archive.json is missing or malformed")


def test_what_is_no_archive_is_refused(target: Vault, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "folder").mkdir()
    refuse(target, tmp_path / "text", "not a zip archive")
    refuse(target, tmp_path / "folder", "cannot be read: Is a directory")
    refuse(target, tmp_path / "missing", "cannot be read: No such file")


# ---- crashes


@pytest.mark.parametrize("code", [None, errno.ENOSPC])
def test_a_crash_or_full_disk_at_every_step_of_an_import_leaves_all_or_nothing(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    export_user(vault, "alice", tmp_path / "alice.zip")

    class Crash(BaseException):
        pass

    Vault(tmp_path / "empty", encrypt=vault.is_encrypted).close()
    at, num_failed, is_done = 0, 0, False
    while not is_done:
        at += 1
        shutil.copytree(tmp_path / "empty", tmp_path / f"other-{at}")
        other = Vault(tmp_path / f"other-{at}")
        count = 0

        def fail(operation: Callable[..., Any], *args: Any, at: int = at) -> Any:
            nonlocal count
            count += 1
            if code is None and count >= at:
                raise Crash
            if code is not None and count == at:
                raise OSError(code, os.strerror(code))
            return operation(*args)

        with monkeypatch.context() as patch:
            patch.setattr(vault_module, "step", fail)
            patch.setattr("oppu_ray.archive.step", fail)
            try:
                import_user(other, "alice", tmp_path / "alice.zip", base_fingerprint=BASE)
                is_done = True
            except (Crash, ValueError, OSError):
                num_failed += 1
        if not is_done:
            assert other.registry.current(other.user_hash("alice")) is None and other.registry.users() == []
            assert all("left over" in problem for problem in other.verify())
            import_user(other, "alice", tmp_path / "alice.zip", base_fingerprint=BASE)
        assert same(other.load("alice", base_fingerprint=BASE)[0], make_adapter(1))
        assert len(other.read_history("alice")) == 3
        other.gc(min_age_s=-1)
        assert other.verify() == []
        other.close()
    assert num_failed > 20
