"""What cannot be reached is not corrupt: it changes nothing, nothing is made in its place, and it heals by itself."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vault_tools import (
    BASE,
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

from oppu_ray.archive import export_user, import_user
from oppu_ray.config import Config, VaultConfig
from oppu_ray.forget import forget_items, forget_user, verify_receipt
from oppu_ray.registry import Refused, RegistryError
from oppu_ray.vault import TOPS, CorruptError, DiskError, Vault, open_vault

SECRET = "carls-secret"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def fill(vault: Vault) -> Vault:
    for user in ("alice", "bob"):
        vault.append_history(user, make_items("1"))
        vault.put_blob(user, "profile.txt", b"old")
        for seed in (1, 2):
            vault.commit(user, make_adapter(seed), make_manifest())
    return vault


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Vault]:
    made = fill(Vault(tmp_path / "vault", encrypt=True))
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    made = fill(Vault(tmp_path / "vault", encrypt=request.param))
    yield made
    made.close()


def load(vault: Vault, user: str = "alice") -> Any:
    return vault.load(user, base_fingerprint=BASE)[0]


def uses(vault: Vault, user: str) -> list[Callable[[], object]]:
    """All that reads or writes files of a user."""
    return [
        lambda: load(vault, user),
        lambda: vault.read_history(user),
        lambda: vault.append_history(user, make_items(SECRET)),
        lambda: vault.get_blob(user, "profile.txt"),
        lambda: vault.put_blob(user, "profile.txt", SECRET.encode()),
        lambda: vault.commit(user, make_adapter(3), make_manifest()),
        lambda: export_user(vault, user, vault.root.parent / "export.zip"),
        lambda: forget_items(vault, user, ["1"]),
    ]


def check_whole(vault: Vault) -> None:
    """All versions are good, everything is read, and writing goes on."""
    assert all(row.is_good for row in vault.registry.versions()) and vault.verify() == []
    for user in ("alice", "bob"):
        assert same(load(vault, user), make_adapter(2)) and len(vault.read_history(user)) == 1
        assert vault.get_blob(user, "profile.txt") == b"old"
    vault.append_history("carl", make_items("1"))
    vault.append_history("alice", make_items("2"))
    vault.commit("carl", make_adapter(4), make_manifest())
    assert same(load(vault, "carl"), make_adapter(4)) and vault.verify() == []


def other_disk(where: Path, top: str) -> None:
    """Another vault's folder in the place of ours."""
    other = fill(Vault(where.parent / "other", encrypt=True))
    other.close()
    shutil.copytree(other.root / top, where)


STAND_INS: dict[str, Callable[[Path, str], None]] = {
    "empty mount point": lambda where, top: where.mkdir(mode=0o700),
    "nothing": lambda where, top: None,
    "link that leads nowhere": lambda where, top: where.symlink_to(where.parent / "away"),
    "file": lambda where, top: where.touch(),
    "other disk": other_disk,
}


@pytest.mark.parametrize("is_reopened", [False, True], ids=["open", "reopened"])
@pytest.mark.parametrize("stand_in", STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize("top", TOPS)
def test_a_disk_that_is_away_changes_nothing_and_heals(
    sealed: Vault, top: str, stand_in: Callable[[Path, str], None], is_reopened: bool, tmp_path: Path
) -> None:
    vault, place = sealed, sealed.root / top
    os.rename(place, tmp_path / "kept")
    stand_in(place, top)
    if is_reopened:
        vault.close()
        vault = Vault(tmp_path / "vault")
    before = {name: data for name, data in tree(vault.root).items() if not name.startswith("registry.sqlite")}
    rows = vault.registry.versions()
    assert vault.is_encrypted
    for use in uses(vault, "alice"):
        with pytest.raises(DiskError):
            use()
    with pytest.raises(DiskError):
        vault.append_history("carl", make_items(SECRET))
    for care in (vault.gc, lambda: forget_user(vault, "alice")):
        with pytest.raises(DiskError):
            care()
    assert len(vault.verify()) == 1 and top in vault.verify()[0]
    after = {name: data for name, data in tree(vault.root).items() if not name.startswith("registry.sqlite")}
    made = after.keys() - before.keys()
    assert not any(name.startswith(top) for name in made) and all(name.startswith(("lock", "keys")) for name in made)
    assert all(data == before[name] for name, data in after.items() if name in before)
    assert not any(SECRET.encode() in data for data in tree(tmp_path).values())
    assert vault.registry.versions() == rows

    if is_reopened and place.is_symlink():  # the disk that it leads to comes back
        place = place.parent / "away"
    elif place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    os.rename(tmp_path / "kept", place)
    check_whole(vault)


def test_a_plain_vault_without_its_users_folder(tmp_path: Path) -> None:
    vault = fill(Vault(tmp_path / "vault"))
    os.rename(vault.root / "users", tmp_path / "kept")
    (vault.root / "users").mkdir()
    for use in uses(vault, "alice"):
        with pytest.raises(DiskError):
            use()
    with pytest.raises(DiskError):
        vault.gc(min_age_s=-1)
    assert tree(vault.root / "users") == {}
    (vault.root / "users").rmdir()
    os.rename(tmp_path / "kept", vault.root / "users")
    check_whole(vault)


def test_nothing_is_proven_by_a_scan_of_a_vault_whose_disk_is_away(sealed: Vault, tmp_path: Path) -> None:
    receipt = forget_user(sealed, "alice")
    assert verify_receipt(sealed, receipt) == []
    os.rename(sealed.root / "users", tmp_path / "kept")
    with pytest.raises(DiskError, match="is its disk mounted"):
        verify_receipt(sealed, receipt)


# ---- on another disk on purpose


@pytest.mark.parametrize("moved", [("keys",), ("users",), ("key",), ("keys", "users", "key")], ids=" ".join)
def test_what_the_operator_moved_to_another_disk_by_symlink_is_found(
    sealed: Vault, moved: tuple[str, ...], tmp_path: Path
) -> None:
    sealed.close()
    for name in moved:
        os.rename(sealed.root / name, tmp_path / f"disk-{name}")
        (sealed.root / name).symlink_to(tmp_path / f"disk-{name}")
    vault = Vault(tmp_path / "vault")
    check_whole(vault)
    leftover = vault.user_folder(vault.user_hash("nobody")) / "adapters"
    leftover.mkdir(parents=True)
    assert len(vault.verify()) == 1
    assert vault.gc(min_age_s=-1) == [str(Path("users", *leftover.parent.parts[-3:]))] and vault.verify() == []
    receipt = forget_user(vault, "alice")
    assert verify_receipt(vault, receipt) == []
    stray = vault.user_folder(vault.user_hash("bob"), "users" if "users" in moved else "keys").parent / "stray"
    stray.write_bytes(b"canary")
    assert verify_receipt(vault, receipt, canaries=["canary"]) == [f"{stray}: holds a forgotten text"]


def test_the_whole_vault_behind_a_symlink(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()
    os.rename(sealed.root, tmp_path / "disk")
    (tmp_path / "vault").symlink_to(tmp_path / "disk")
    check_whole(Vault(tmp_path / "vault"))
    os.rename(tmp_path / "disk", tmp_path / "away")
    with pytest.raises(DiskError, match="leads nowhere"):
        Vault(tmp_path / "vault")
    assert not (tmp_path / "disk").exists()


OTHER_DISKS = """
import os, subprocess, sys
from pathlib import Path
from test_unreachable import check_whole, fill, load, uses
from vault_tools import make_adapter, make_items, same, tree
from oppu_ray.vault import DiskError, Vault

root = Path(sys.argv[1]) / "vault"
vault = Vault(root, encrypt=True)
vault.close()
for top in ("users", "keys"):
    disk = root.parent / ("disk-" + top)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    for path in (root / top).iterdir():
        subprocess.run(["mv", path, disk], check=True)
    subprocess.run(["mount", "--bind", disk, root / top], check=True)
vault = fill(Vault(root))
for top in ("keys", "users"):
    subprocess.run(["umount", "-l", root / top], check=True)
    beneath = tree(root / top)
    for use in [*uses(vault, "alice"), lambda: vault.append_history("carl", make_items("1"))]:
        try:
            use()
        except DiskError:
            continue
        raise AssertionError(use)
    assert tree(root / top) == beneath, "something was made beneath the mount point"
    subprocess.run(["mount", "--bind", root.parent / ("disk-" + top), root / top], check=True)
    assert same(load(vault), make_adapter(2))
check_whole(vault)
print("held")
"""


def test_disks_that_are_really_mounted_and_unmounted(tmp_path: Path) -> None:
    """Renames and hard links do not cross a mount point, and beneath it lies what was there before."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root and mount namespaces")
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    command = ["unshare", "-m", sys.executable, "-c", OTHER_DISKS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr


# ---- keys


def key_file(vault: Vault, user: str = "alice") -> Path:
    return vault.user_folder(vault.user_hash(user), "keys")


@pytest.mark.parametrize("data", [None, b"", b"k" * 31, b"k" * 32], ids=["missing", "empty", "cut", "another"])
def test_one_key_that_is_away_or_another_is_that_users_alone(sealed: Vault, data: bytes | None) -> None:
    path = key_file(sealed)
    kept = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    for use in uses(sealed, "alice"):
        with pytest.raises(DiskError, match="key file .* is (missing|not the registered one)"):
            use()
    assert (path.read_bytes() if path.exists() else None) == data
    assert same(load(sealed, "bob"), make_adapter(2)) and sealed.append_history("bob", make_items("2")) == 2
    assert any(path.name in problem for problem in sealed.verify("alice"))
    path.write_bytes(kept)
    assert same(load(sealed), make_adapter(2)) and sealed.verify() == []


def test_a_user_with_a_history_alone_gets_no_second_key(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "vault", encrypt=True)
    vault.append_history("alice", make_items("1"))
    kept = key_file(vault).read_bytes()
    key_file(vault).unlink()
    with pytest.raises(DiskError, match="key file .* is missing"):
        vault.put_blob("alice", "profile.txt", b"new")
    assert not key_file(vault).exists()
    key_file(vault).write_bytes(kept)
    assert len(vault.read_history("alice")) == 1


def test_a_damaged_file_under_the_registered_key_is_corrupt(sealed: Vault) -> None:
    path = segment_files(sealed, "alice")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="is not what was sealed here"):
        sealed.read_history("alice")


def test_imported_users_have_their_keys_registered(sealed: Vault, tmp_path: Path) -> None:
    export_user(sealed, "alice", tmp_path / "alice.zip")
    import_user(sealed, "dora", tmp_path / "alice.zip", base_fingerprint=BASE)
    assert sealed.registry.key_check(sealed.user_hash("dora")) is not None
    key_file(sealed, "dora").write_bytes(b"k" * 32)
    with pytest.raises(DiskError, match="not the registered one"):
        load(sealed, "dora")


# ---- errors of the system


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ELOOP, errno.ETIMEDOUT, errno.ENODEV])
@pytest.mark.parametrize("place", ["users", "keys"])
def test_whatever_the_system_answers_nothing_is_quarantined(
    sealed: Vault, place: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def fail(path: Any, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(sealed.root / place)):
            raise OSError(code, os.strerror(code), str(path))
        return really_open(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        for use in uses(sealed, "alice"):
            with pytest.raises(DiskError, match=os.strerror(code)):
                use()
        assert os.strerror(code) in sealed.verify()[0]
    check_whole(sealed)


def test_an_error_in_the_middle_of_a_read_is_one_of_the_disk(sealed: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has a folder open instead of a file: reading it fails after opening."""
    really_open, folder = os.open, sealed.root

    def open_folder(path: Any, *args: Any, **options: Any) -> int:
        return really_open(folder if str(path).endswith(".safetensors") else path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_folder)
        with pytest.raises(DiskError, match="Is a directory"):
            load(sealed)
    check_whole(sealed)


def as_nobody(work: Callable[[], None]) -> None:
    """Do it in a process that may not read everything."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("place", ["", "key", "keys", "users"])
def test_a_process_without_permission_changes_nothing(sealed: Vault, place: str, tmp_path: Path) -> None:
    sealed.close()
    os.chmod(tmp_path, 0o755)
    if os.geteuid() == 0:
        for path in (sealed.root, *sealed.root.rglob("*")):
            os.chown(path, 65534, 65534)
    os.chmod(sealed.root / place, 0)

    def work() -> None:
        if place in ("", "key"):
            with pytest.raises(DiskError, match="cannot be opened: Permission denied"):
                Vault(tmp_path / "vault")
            return
        vault = Vault(tmp_path / "vault")
        for use in [*uses(vault, "alice"), lambda: vault.append_history("carl", make_items(SECRET))]:
            with pytest.raises(DiskError, match="Permission denied"):
                use()
        vault.close()

    as_nobody(work)
    os.chmod(sealed.root / place, 0o600 if place == "key" else 0o700)
    check_whole(Vault(tmp_path / "vault"))


# ---- the key file, the registry, the whole folder


def test_a_missing_key_file_is_not_replaced(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()
    os.rename(sealed.root / "key", tmp_path / "kept")
    with pytest.raises(DiskError, match="has users but no key file"):
        Vault(sealed.root)
    for top in TOPS:
        os.rename(sealed.root / top, tmp_path / f"kept-{top}")
    with pytest.raises(DiskError, match="registry is in use, but the key file is missing"):
        Vault(sealed.root)
    assert not (sealed.root / "key").exists() and not (sealed.root / "keys").exists()
    for top in TOPS:
        os.rename(tmp_path / f"kept-{top}", sealed.root / top)
    os.rename(tmp_path / "kept", sealed.root / "key")
    check_whole(Vault(sealed.root))


def test_a_link_to_a_key_file_on_a_disk_that_is_away(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()
    os.rename(sealed.root / "key", tmp_path / "key")
    (sealed.root / "key").symlink_to(tmp_path / "away" / "key")
    with pytest.raises(DiskError, match="cannot be opened: No such file"):
        Vault(sealed.root)
    (tmp_path / "away").mkdir()
    os.rename(tmp_path / "key", tmp_path / "away" / "key")
    check_whole(Vault(sealed.root))


def test_another_vaults_key_file_registry_or_folders_are_refused_by_name(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()
    other = fill(Vault(tmp_path / "other", encrypt=True))
    other.close()
    for name, message in (("key", "its key file is of vault"), ("registry.sqlite", "its key file is of vault")):
        shutil.copy(sealed.root / name, tmp_path / "kept")
        shutil.copy(other.root / name, sealed.root / name)
        with pytest.raises(DiskError, match=message):
            Vault(sealed.root)
        shutil.copy(tmp_path / "kept", sealed.root / name)
    check_whole(Vault(sealed.root))


def test_a_missing_registry_is_not_replaced(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()
    path = sealed.root / "registry.sqlite"
    os.rename(path, tmp_path / "kept")
    with pytest.raises(RegistryError, match="No such file"):
        Vault(sealed.root)
    assert not path.exists()
    path.touch()
    with pytest.raises(RegistryError, match="is empty; expected the one of an existing vault"):
        Vault(sealed.root)
    assert path.read_bytes() == b""
    os.rename(tmp_path / "kept", path)
    check_whole(Vault(sealed.root))


def test_a_registry_that_goes_away_while_it_is_open_is_not_replaced(sealed: Vault, tmp_path: Path) -> None:
    sealed.close()  # its pool: the next use opens the file anew
    os.rename(sealed.root / "registry.sqlite", tmp_path / "kept")
    with pytest.raises(RegistryError, match="unable to open"):
        sealed.registry.users()
    assert not (sealed.root / "registry.sqlite").exists()
    os.rename(tmp_path / "kept", sealed.root / "registry.sqlite")
    check_whole(sealed)


def test_an_empty_mount_point_in_the_place_of_a_vault_whose_registry_is_in_postgresql(
    tmp_path: Path, postgres_url: str
) -> None:
    empty_postgres(postgres_url)
    vault = fill(Vault(tmp_path / "vault", postgres_url))
    vault.close()
    os.rename(tmp_path / "vault", tmp_path / "kept")
    (tmp_path / "vault").mkdir()
    with pytest.raises(DiskError, match="the registry is in use, but the key file is missing"):
        Vault(tmp_path / "vault", postgres_url)
    assert list((tmp_path / "vault").iterdir()) == []
    (tmp_path / "vault").rmdir()
    os.rename(tmp_path / "kept", tmp_path / "vault")
    empty_postgres(postgres_url)  # and another database behind the URL
    with pytest.raises(RegistryError, match="holds no registry"):
        Vault(tmp_path / "vault", postgres_url)
    with pytest.raises(DiskError, match="has users but no key file|registry is in use"):
        os.unlink(tmp_path / "vault" / "key")
        Vault(tmp_path / "vault", postgres_url)


def test_two_vaults_do_not_share_a_database(tmp_path: Path, postgres_url: str) -> None:
    empty_postgres(postgres_url)
    Vault(tmp_path / "one", postgres_url).close()
    with pytest.raises(DiskError, match="registry is in use"):
        Vault(tmp_path / "two", postgres_url)
    assert not (tmp_path / "two" / "key").exists()


def test_a_root_that_is_away_while_the_vault_is_open_gets_nothing(either: Vault, tmp_path: Path) -> None:
    os.rename(either.root, tmp_path / "kept")
    either.root.mkdir()
    for use in [*uses(either, "alice"), lambda: forget_user(either, "alice"), lambda: either.gc(min_age_s=-1)]:
        with pytest.raises((DiskError, RegistryError)):
            use()
    with pytest.raises(DiskError), either.alone():
        pass
    assert list(either.root.iterdir()) == []
    either.root.rmdir()
    os.rename(tmp_path / "kept", either.root)
    either.close()
    check_whole(either)


# ---- a run and its vault


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "run").mkdir()
    return Config(run_dir=str(tmp_path / "run"), vault=VaultConfig(path=str(tmp_path / "disk" / "vault")))


def test_a_run_does_not_take_an_empty_mount_point_for_a_new_vault(config: Config, tmp_path: Path) -> None:
    fill(open_vault(config)).close()
    os.rename(tmp_path / "disk", tmp_path / "kept")
    (tmp_path / "disk").mkdir()
    for create in (True, False):
        with pytest.raises(DiskError, match="no vault is there, expected .* remove .*vault.id"):
            open_vault(config, create)
    assert list((tmp_path / "disk").iterdir()) == []
    fill(Vault(tmp_path / "disk" / "vault")).close()
    with pytest.raises(DiskError, match="is vault .*, expected .*; is its disk mounted"):
        open_vault(config)
    shutil.rmtree(tmp_path / "disk")
    os.rename(tmp_path / "kept", tmp_path / "disk")
    check_whole(open_vault(config, create=False))


def test_a_run_begins_with_another_vault_when_it_is_told_to(config: Config, tmp_path: Path) -> None:
    open_vault(config).close()
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "run" / "vault.id").unlink()
    vault = open_vault(config)
    assert (tmp_path / "run" / "vault.id").read_text() == vault.vault_id


def test_only_who_may_make_a_vault_makes_one(config: Config, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="no vault is there, it has no key file; is its disk mounted?"):
        open_vault(config, create=False)
    assert not (tmp_path / "disk").exists() and not (tmp_path / "run" / "vault.id").exists()
    open_vault(config).close()
    (tmp_path / "run" / "vault.id").unlink()  # a run that began before there was such a record
    open_vault(config, create=False).close()
    assert (tmp_path / "run" / "vault.id").exists()


# ---- registry and files of different ages


def copy_registry(vault: Vault, target: Path) -> None:
    vault.close()
    shutil.copy(vault.root / "registry.sqlite", target)


def put_back(vault: Vault, source: Path) -> Vault:
    vault.close()
    for path in vault.root.glob("registry.sqlite*"):
        path.unlink()
    shutil.copy(source, vault.root / "registry.sqlite")
    return Vault(vault.root)


@pytest.mark.parametrize("lost", ["commit", "append", "import", "new user"])
def test_a_registry_older_than_the_files_is_no_proof_for_gc(either: Vault, lost: str, tmp_path: Path) -> None:
    export_user(either, "bob", tmp_path / "bob.zip")
    copy_registry(either, tmp_path / "old")
    writes: dict[str, Callable[[], object]] = {
        "commit": lambda: either.commit("alice", make_adapter(3), make_manifest()),
        "append": lambda: either.append_history("alice", make_items(*map(str, range(2, 90)))),
        "import": lambda: import_user(either, "dora", tmp_path / "bob.zip", base_fingerprint=BASE),
        "new user": lambda: either.append_history("dora", make_items("1")),
    }
    writes[lost]()
    vault = put_back(either, tmp_path / "old")
    files = tree(vault.root / "users")
    assert (
        "registry is older than the files" in vault.verify()[0] and "restore the newest registry" in vault.verify()[0]
    )
    for number in range(20):  # also when the registry has caught up, by number
        vault.commit("bob", make_adapter(number), make_manifest())
    vault = Vault(vault.root)
    with pytest.raises(Refused, match="registry is older than the files"):
        vault.gc(min_age_s=-1)
    now = tree(vault.root / "users")
    assert files.keys() <= now.keys() and same(load(vault), make_adapter(2))
    if lost == "import":
        with pytest.raises(Refused, match="registry is older"):
            import_user(vault, "dora", tmp_path / "bob.zip", base_fingerprint=BASE)
        assert tree(vault.root / "users").keys() >= files.keys()


def test_a_commit_over_an_older_registry_overwrites_nothing(either: Vault, tmp_path: Path) -> None:
    """Fence and number may be given a second time."""
    copy_registry(either, tmp_path / "old")
    lost = either.commit("alice", make_adapter(3), make_manifest())
    vault = put_back(either, tmp_path / "old")
    folder = vault.user_folder(vault.user_hash("alice")) / "adapters"
    before = tree(folder / lost)
    again = vault.commit("alice", make_adapter(4), make_manifest())
    assert again != lost and again.rsplit("-", 1)[0] == lost.rsplit("-", 1)[0]
    assert tree(folder / lost) == before and same(load(vault), make_adapter(4))


def test_a_registry_that_goes_back_under_an_open_vault_is_noticed(tmp_path: Path, postgres_url: str) -> None:
    """As after a failover to a standby that had not yet all commits."""
    empty_postgres(postgres_url)
    vault = fill(Vault(tmp_path / "vault", postgres_url))
    assert vault.gc(min_age_s=-1) == []
    with vault.registry._write() as connection:
        connection.exec_driver_sql("UPDATE facts SET value = '3' WHERE name = 'revision'")
    vault.commit("bob", make_adapter(5), make_manifest())
    (tmp_path / "vault" / "users" / "revision").unlink()
    with pytest.raises(Refused, match="registry is older than the files"):
        vault.gc(min_age_s=-1)
    vault.close()


def test_files_older_than_the_registry_are_missing_to_their_user_alone(either: Vault, tmp_path: Path) -> None:
    shutil.copytree(either.root / "users", tmp_path / "old")
    newest = either.commit("alice", make_adapter(3), make_manifest())
    either.append_history("alice", make_items("2"))
    either.close()
    os.rename(either.root / "users", tmp_path / "newest")
    os.rename(tmp_path / "old", either.root / "users")
    vault = Vault(either.root)
    for read in (lambda: load(vault), lambda: vault.read_history("alice")):
        with pytest.raises(DiskError, match="No such file"):
            read()
    problems = vault.verify()
    assert any(newest in problem for problem in problems) and any("history" in problem for problem in problems)
    assert not any(vault.user_hash("bob")[:12] in problem for problem in problems)
    with suppress(Refused):
        vault.gc(min_age_s=3600)
    assert same(load(vault, "bob"), make_adapter(2)) and len(vault.read_history("bob")) == 1
    vault.use("alice", vault.registry.versions(vault.user_hash("alice"))[1].version)  # what the operator may do
    assert same(load(vault), make_adapter(2)) and all(row.is_good for row in vault.registry.versions())
    shutil.rmtree(either.root / "users")
    os.rename(tmp_path / "newest", either.root / "users")
    vault.use("alice", newest)
    assert same(load(vault), make_adapter(3)) and vault.verify() == []


# ---- forgetting


def test_items_are_forgotten_where_a_version_is_quarantined_or_lost(either: Vault) -> None:
    folder = either.user_folder(either.user_hash("alice")) / "adapters"
    first, second = (row.version for row in either.registry.versions(either.user_hash("alice")))
    (folder / second / "manifest.json").write_bytes(b"x")
    load(either)
    shutil.rmtree(folder / first)
    receipt = forget_items(either, "alice", ["1"])
    assert receipt.needs_training and either.read_history("alice") == () and either.verify() == []


# ---- copies of a vault that is being written to

USERS = ("alice", "bob", "carl")


def write_until_killed(root: Path) -> None:
    """Adapters that say their seed, and histories of items 0, 1, 2, ..."""
    vault = Vault(root)
    for number in range(10_000):
        for user in USERS:
            vault.commit(user, make_adapter(number), replace(make_manifest(), seed=number))
            vault.append_history(user, make_items(str(number)))


def copy_files(vault: Vault, target: Path) -> None:
    for name in ("key", "keys", "users"):  # what vanishes meanwhile is left out, as by any tool that copies
        subprocess.run(["cp", "-a", vault.root / name, target], capture_output=True)


def copy_live_registry(vault: Vault, target: Path) -> None:
    with closing(sqlite3.connect(vault.root / "registry.sqlite")) as source:
        with closing(sqlite3.connect(target / "registry.sqlite")) as copy:
            source.backup(copy)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("steps", [(copy_live_registry, copy_files), (copy_files, copy_live_registry)])
def test_a_live_copy_restored_elsewhere_answers_old_or_new(
    tmp_path: Path, steps: tuple[Callable[[Vault, Path], None], ...], is_sealed: bool
) -> None:
    vault = Vault(tmp_path / "vault", encrypt=is_sealed)
    vault.add_users(USERS)
    child = in_child(lambda: write_until_killed(vault.root))
    try:
        for turn in range(3):
            while len(vault.registry.versions()) < 3 * (turn + 1) * len(USERS):
                time.sleep(0.01)
            (tmp_path / f"copy-{turn}").mkdir(mode=0o700)
            for step in steps:
                step(vault, tmp_path / f"copy-{turn}")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for turn in range(3):
        copy = Vault(tmp_path / f"copy-{turn}", create=False)
        assert copy.is_encrypted == is_sealed
        names = {row.version for row in copy.registry.versions()}
        files = {name for name in tree(copy.root / "users") if names.intersection(Path(name).parts)}
        for user in USERS:
            try:
                adapter, manifest = copy.load(user, base_fingerprint=BASE)
                assert same(adapter, make_adapter(manifest.seed))
            except DiskError:
                assert steps[0] is copy_files  # the registry lists what came after the files
            with suppress(DiskError):
                ids = [item.item_id for item in copy.read_history(user)]
                assert ids == [str(number) for number in range(len(ids))]
        known = ("older than the files", "left over", "could not read")
        assert all(any(words in problem for words in known) for problem in copy.verify())
        with suppress(Refused):
            copy.gc(min_age_s=-1)
        assert files <= tree(copy.root / "users").keys() and all(row.is_good for row in copy.registry.versions())
        copy.close()
    vault.close()
