"""One user, one folder: history, profile, index vectors, adapter versions (arrow `train_pack -> vault -> inference`).

In: a user id and an `AdapterState`, items or bytes. Out: the same, verified. The folder is `users/ab/cd/<keyed hash>`:
to export it is to pack it (`archive.py`), to forget it is to remove it (`forget.py`). A commit writes a temporary
folder, syncs it, reads it back, renames it, and then one registry transaction moves the user's `current`. A crash at
any point leaves the old version or the new one, and leftovers that no reader sees until `gc` sweeps them.

A reader might question that PEFT files are made and parsed in memory: so the bytes that were checked are the bytes that
are parsed, and an encrypted vault never puts plain text on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oppu_ray import adapter_files
from oppu_ray.config import Config
from oppu_ray.core import AdapterState, InputError, Item, check_unicode
from oppu_ray.registry import Forgotten, History, HistoryChanged, Lease, Refused, Registry, Segment, UserHash, Version

FORMAT = 1
COMMIT_TTL_S = 60.0
MANIFEST_NAME = "manifest.json"
ID_BYTES = 16
"""Of an item's keyed hash in the registry's list of segments."""
LOCK_WAIT_S = 10.0
"""A file takes milliseconds to write: who forgets waits no longer for a process that was stopped while it wrote."""
MERGE_ITEMS, MERGE_BYTES = 64, 64 * 1024
"""An append rewrites the newest segment if it is smaller than both, so that a history has few files."""
BLOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}(\.[a-z0-9]{1,12})?")
_BAD_CATEGORIES = {"Cc": "control", "Cf": "invisible format", "Cs": "surrogate", "Zl": "line", "Zp": "paragraph"}
_HASH = re.compile(r"[0-9a-f]{64}")
_SEAL = b"OPPUSEAL1"

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class CorruptError(ValueError):
    """Stored bytes are not what was committed."""


class DiskError(ValueError):
    """The disk under the vault failed, or is full."""


@dataclass(frozen=True)
class Manifest:
    """The lineage of one adapter version: enough to say what it is, and to train it again.

    Args:
        base_fingerprint: Of the frozen model under the adapter, task adapter merged in; any other base is refused.
        task_fingerprint: Names the task adapter in it: "base-" and a digest of all that it was trained from, or "".
        item_ids: The user's own items that were trained on: the only personal data an adapter depends on.
        recipe: The training settings, JSON-able.
        metrics: Losses; where it was trained under noise `privacy.account` instead, and nothing that has no noise.
        run_id: The run that trained it, or ""; a run commits each user once.
        user_hash: This and what follows is filled in by `Vault.commit`.
        shapes: Tensor name to shape.
        checksums: File name to SHA-256 of its plain bytes.
    """

    base_fingerprint: str
    task_fingerprint: str
    item_ids: tuple[str, ...]
    recipe: dict[str, Any]
    seed: int
    metrics: dict[str, float]
    run_id: str = ""
    user_hash: str = ""
    version: str = ""
    parent: str | None = None
    peft_config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT


@dataclass(frozen=True)
class VersionDiff:
    """What differs between two versions: manifest fields as (old, new), and the largest change per tensor.

    A tensor that only one version has, or with another shape, has the change infinity.
    """

    fields: dict[str, tuple[Any, Any]]
    tensors: dict[str, float]


class Vault:
    """See the module's docstring. One per process; opening it twice on one folder is safe.

    Args:
        root: Folder of the vault; made with mode 0700 if missing, with a new key file.
        registry_url: SQLAlchemy URL; None means SQLite inside `root`.
        encrypt: For a new vault: seal every file with a key per user. An existing vault stays as it was made.
        clock: Unix seconds.
    """

    def __init__(
        self,
        root: Path,
        registry_url: str | None = None,
        *,
        encrypt: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = Path(os.path.realpath(root))
        self._clock = clock
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            is_new = not (self.root / "key").exists()
            for name in ("users", "tmp", "locks", *(["keys"] if is_new and encrypt else [])):
                self.make_folder(self.root / name)
            if is_new:
                if any((self.root / "users").iterdir()) and not (self.root / "key").exists():
                    raise ValueError(f"vault {root}: has users but no key file; restore it, without it none is found")
                with suppress(FileExistsError):  # another process was quicker
                    self.write_new(self.root / "key", secrets.token_bytes(32), "new")
            self._key = self._read_bytes(self.root / "key")
            if len(self._key) != 32:
                raise ValueError(f"vault {root}: key file has {len(self._key)} bytes, expected 32")
            if registry_url is None:
                registry_url = f"sqlite:///{self._registry_file()}"
        except OSError as error:
            raise ValueError(f"vault {root}: cannot be opened: {_reason(error)}") from error
        self.is_encrypted = (self.root / "keys").is_dir()
        if encrypt and not self.is_encrypted:
            raise ValueError(f"vault {root}: was made without encryption; export its users into a new vault")
        self.registry = Registry(registry_url, self.derive_key("audit"), clock)

    def close(self) -> None:
        """Close the registry's connections; the next use opens them again."""
        self.registry.close()

    def _registry_file(self) -> Path:
        """The database's path; made here if it is not there, for SQLite would let everybody read it.

        Never opened otherwise: closing it drops all locks that this process has on it, SQLite's too, and another
        process would take the log away from under them.
        """
        path = self.root / "registry.sqlite"
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of all files outside the vault that may speak of users. One holder, in whatever process."""
        with _open_lock(self.root / "lock") as lock:
            _flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self, user_hash: str) -> Iterator[None]:
        """Hold off the forgetting of a user while files of theirs are written.

        The system frees the lock of a process that is killed, so who forgets finds all that was written before, and
        what comes after finds another generation: check it first thing inside.
        """
        with _open_lock(self._lock_of(user_hash)) as lock:
            _flock(lock, fcntl.LOCK_SH)
            yield

    @contextmanager
    def only_writer(self, user_hash: str) -> Iterator[bool]:
        """Wait until nobody writes files of a user, and hold off others. Yields False if somebody still writes.

        The lock is shared by the users whose hashes begin alike (one in 256), so that no file is named by one of them.
        """
        with _open_lock(self._lock_of(user_hash)) as lock:
            deadline = time.monotonic() + LOCK_WAIT_S
            while not (is_alone := _flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield is_alone

    def _lock_of(self, user_hash: str) -> Path:
        return self.root / "locks" / user_hash[:2]

    # ---- who

    def user_hash(self, user: str) -> UserHash:
        """The keyed hash that names a user's folder. Ids are NFC-normalised; 1 to 256 visible characters."""
        if isinstance(user, UserHash):
            return user
        name = unicodedata.normalize("NFC", user) if isinstance(user, str) and len(user) <= 1024 else user
        if not isinstance(name, str) or not 1 <= len(name) <= 256:
            raise InputError(f"user id {repr(user)[:40]}: expected text of 1 to 256 characters")
        for position, character in enumerate(name):
            if kind := _BAD_CATEGORIES.get(unicodedata.category(character)):
                raise InputError(f"user id {repr(user)[:40]}: {kind} character {character!r} at {position}")
        return UserHash(hmac.new(self.derive_key("user"), name.encode(), hashlib.sha256).hexdigest())

    def derive_key(self, purpose: str) -> bytes:
        """A key for one purpose, from the key file (32 bytes)."""
        return hmac.new(self._key, purpose.encode(), hashlib.sha256).digest()

    def add_users(self, users: Sequence[str], *, again: bool = True) -> int:
        """Register users in one transaction; returns how many were new.

        Args:
            again: Also those who were forgotten. What a crash while forgetting them has left is removed first.
        """
        hashes = {self.user_hash(user) for user in users}
        gone = self.registry.gone_users(hashes)
        for user_hash in gone if again else ():
            with self.only_writer(user_hash), disk_errors(user_hash, "add"):
                if not self.registry.has_user(user_hash):
                    self.remove_files(UserHash(user_hash))
        return self.registry.add_users(hashes if again else hashes - gone)

    def remove_files(self, user_hash: str) -> None:
        """Remove all files of a user, under `only_writer`: the key first, so that what is left cannot be read."""
        folder, key = self.user_folder(user_hash), self.user_folder(user_hash, "keys")
        if os.path.lexists(key):
            remove(key)
        if os.path.lexists(folder):  # one rename, so that a crash leaves no half folder under the user's name
            step(os.rename, folder, self.root / "tmp" / f"{user_hash}-{secrets.token_hex(8)}")
            sync_folder(folder.parent)
        self.remove_staged(user_hash)

    def remove_staged(self, user_hash: str) -> None:
        """Remove what writers who were killed have left, under `only_writer`."""
        for path in self.root.glob(f"tmp/{user_hash}-*"):
            remove(path)

    def check_sources(self, user_hash: str, item_ids: Iterable[str]) -> None:
        """`Forgotten` if the user was, or one of the items from which something of theirs was made.

        An item of the same id that was added after the forgetting is another one, and counts as there.
        """
        forgettings = [items for _, items in self.registry.forgettings(user_hash)]
        if not forgettings:
            return
        is_whole, gone = None in forgettings, {one for items in forgettings for one in items or ()}
        try:
            listed = self.item_keys(self.history(user_hash))
        except Forgotten:
            if is_whole:
                raise
            listed = set()
        for item_id in item_ids:
            item = self.item_hash(user_hash, item_id)
            if (is_whole or item in gone) and bytes.fromhex(item)[:ID_BYTES] not in listed:
                raise Forgotten(f"user {user_hash[:12]}: made from item {item[:12]}, which was forgotten")

    def done(self, run_id: str, users: Sequence[str]) -> set[str]:
        """Which of `users` this run has committed: a run that restarts skips them."""
        hashes = self.registry.done_users(run_id)
        return {user for user in users if self.user_hash(user) in hashes}

    def lease(self, user: str, holder: str, ttl_s: float) -> Lease:
        """The right to train a user; take it before reading the history, commit under it, release it in the end."""
        return self.registry.acquire_lease(self.user_hash(user), holder, ttl_s)

    # ---- adapter versions

    def commit(
        self,
        user: str,
        adapter: AdapterState,
        manifest: Manifest,
        lease: Lease | None = None,
        make_current: bool = True,
    ) -> str:
        """Store an adapter as the user's new current version, or beside the current one; returns the version.

        Without a lease it takes one for itself. If the manifest's run has committed this user, nothing is written and
        that version is returned.

        Raises:
            Refused: Another job holds the user, or the lease was lost, or `current` was moved meanwhile; or the user,
                or one of the manifest's items, was forgotten.
            ValueError: The adapter is not finite, or the disk or the registry failed; the old version still answers.
        """
        user_hash = self.user_hash(user)
        if manifest.run_id and (done := self.registry.unit_version(manifest.run_id, user_hash)):
            return done
        own = None
        if lease is None:
            holder = manifest.run_id or f"commit-{secrets.token_hex(8)}"
            lease = own = self.registry.acquire_lease(user_hash, holder, COMMIT_TTL_S)
        try:
            if lease.user_hash != user_hash:
                raise Refused(f"user {user_hash[:12]}: the lease is for user {lease.user_hash[:12]}")
            with disk_errors(user_hash, "commit"), self.writing(user_hash):
                return self._commit(lease, adapter, manifest, make_current)
        finally:
            if own is not None:
                step(self.registry.release_lease, own)

    def load(
        self, user: str, version: str | None = None, *, base_fingerprint: str | None
    ) -> tuple[AdapterState, Manifest]:
        """A verified adapter and its manifest: the current version, or the one asked for.

        A corrupt version is quarantined with an error in the log; then the newest good version of the same base
        answers instead, unless one was asked for by name. `base_fingerprint` None takes any base (for an export).

        Raises:
            ValueError: No such user or version, nothing good left, or trained on another base.
        """
        user_hash = self.user_hash(user)
        while True:
            row = self._find(user_hash, version)
            try:
                return self.load_version(row, base_fingerprint=base_fingerprint)
            except CorruptError:
                if version is not None:
                    raise

    def load_version(self, row: Version, *, base_fingerprint: str | None) -> tuple[AdapterState, Manifest]:
        """As `load`, for a version just looked up in the registry.

        Raises:
            CorruptError: It is quarantined now.
            ValueError: It cannot be read, or was trained on another base.
        """
        user_hash = row.user_hash
        if base_fingerprint is not None and row.base_fingerprint != base_fingerprint:
            trained, here = row.base_fingerprint[:16], base_fingerprint[:16]
            raise ValueError(f"user {user_hash[:12]}: {row.version} was trained on base {trained}, not on {here}")
        try:
            with disk_errors(user_hash, "load"):
                return self.read_version(self.user_folder(user_hash) / "adapters" / row.version, row)
        except CorruptError as error:
            self._quarantine(row, str(error))
            raise

    def use(self, user: str, version: str) -> None:
        """Make an older or newer version current, after verifying it."""
        user_hash = self.user_hash(user)
        before = self.registry.current(user_hash)
        self.load(user_hash, version, base_fingerprint=None)
        self.registry.use(user_hash, version, before.version if before else None)

    def rollback(self, user: str) -> str:
        """Make the newest good version before the current one, of the same base, current; returns it."""
        user_hash = self.user_hash(user)
        current = self._find(user_hash, None)
        older = [
            row
            for row in self.registry.versions(user_hash)
            if row.is_good and row.number < current.number and row.base_fingerprint == current.base_fingerprint
        ]
        if not older:
            raise InputError(f"user {user_hash[:12]}: no good version before {current.version}")
        self.use(user_hash, older[-1].version)
        return older[-1].version

    def diff(self, user: str, old: str, new: str) -> VersionDiff:
        """What changed from one version to another."""
        (a, before), (b, after) = (self.load(user, version, base_fingerprint=None) for version in (old, new))
        was, now = asdict(before), asdict(after)
        fields = {name: (was[name], now[name]) for name in was if was[name] != now[name]}
        names = sorted(a.tensors.keys() | b.tensors.keys())
        return VersionDiff(fields, {name: _change(a.tensors.get(name), b.tensors.get(name)) for name in names})

    # ---- history and other files of the user

    def append_history(
        self,
        user: str,
        items: Sequence[Item],
        *,
        skip_known: bool = False,
        lease: Lease | None = None,
        generation: int | None = None,
    ) -> int:
        """Add items, oldest first; returns how many items the history has now. Reads at most the newest segment.

        Args:
            skip_known: Leave out an item whose id is there already, instead of an error.
            lease: Under which the user is worked on, if one is held.
            generation: Of the user when this was asked for; None, without a lease, registers a user who is not there.

        Raises:
            Forgotten: The user was, or items of theirs, meanwhile.
            Refused: The lease was lost.
            ValueError: An item is malformed, or its id is there already.
        """
        user_hash = self.user_hash(user)
        if lease is not None:
            self.registry.add_users([user_hash], lease)
        elif generation is None:
            self.add_users([user_hash])
        with disk_errors(user_hash, "add to the history of"), self.writing(user_hash):
            while True:
                before = self.history(user_hash)
                if generation is not None and before.generation != generation:
                    raise Forgotten(f"user {user_hash[:12]}: the user, or items of theirs, were forgotten meanwhile")
                generation = before.generation
                known = self.item_keys(before)
                new = [item for item in items if not skip_known or self.item_key(user_hash, item.item_id) not in known]
                check_items(user_hash, new)
                if twice := [item for item in new if self.item_key(user_hash, item.item_id) in known]:
                    raise InputError(f"{_where(user_hash, twice[0])}: is there twice, expected ids unique in a history")
                if not new:
                    return before.num_items
                with suppress(HistoryChanged):
                    kept, last = before.segments, before.segments[-1:]
                    if last and last[0].num_items < MERGE_ITEMS and last[0].num_bytes < MERGE_BYTES:
                        kept, new = kept[:-1], [*self._read_segment(user_hash, before, last[0]), *new]
                    segments = (*kept, self.write_segment(user_hash, kept[-1].number + 1 if kept else 1, new))
                    return self._change_history(user_hash, before, segments, lease).num_items

    def history(self, user: str) -> History:
        """The list of a user's history: counts and segments, without reading them. `Forgotten` if no such user."""
        user_hash = self.user_hash(user)
        with disk_errors(user_hash, "list the history of"):
            while (found := self.registry.history(user_hash)).version is None:  # made with schema 1: list it once
                segments = []
                for number, name in enumerate(self._numbered_segments(user_hash), 1):
                    items = decode_items(self.read_framed(user_hash, f"history/{name}"))
                    segments.append(self._segment(user_hash, number, name, items))
                with suppress(HistoryChanged):
                    return self.registry.change_history(user_hash, found, segments)
        return found

    def read_history(self, user: str, newest: int | None = None) -> tuple[Item, ...]:
        """The items, oldest first; empty if there is no such user. With `newest`, only so many, the last ones.

        Raises:
            CorruptError: A segment was read and is not what was written.
            DiskError: A segment cannot be read.
        """
        user_hash = self.user_hash(user)
        while True:
            try:
                found = self.history(user_hash)
            except Forgotten:
                return ()
            segments = found.segments
            if newest is not None:
                while segments and sum(segment.num_items for segment in segments[1:]) >= newest:
                    segments = segments[1:]
            with suppress(HistoryChanged), disk_errors(user_hash, "read the history of"):
                items = [item for segment in segments for item in self._read_segment(user_hash, found, segment)]
                return tuple(items if newest is None else items[max(0, len(items) - newest) :])

    def replace_history(self, user_hash: str, before: History, is_gone: Callable[[Item], bool]) -> None:
        """Write the segments that hold items which are gone anew without them. `Refused` as `change_history`."""
        segments = []
        for segment in before.segments:
            items = self._read_segment(user_hash, before, segment)
            left = [item for item in items if not is_gone(item)]
            if len(left) == len(items):
                segments.append(segment)
            elif left:
                segments.append(self.write_segment(user_hash, segment.number, left))
        self._change_history(user_hash, before, segments)

    def item_hash(self, user_hash: str, item_id: str) -> str:
        """What stands for an item where its id must not be: keyed, hex."""
        return hmac.new(self.derive_key("item"), f"{user_hash}/{item_id}".encode(), hashlib.sha256).hexdigest()

    def item_key(self, user_hash: str, item_id: str) -> bytes:
        """The first bytes of `item_hash`, as the list of segments holds them."""
        return bytes.fromhex(self.item_hash(user_hash, item_id))[:ID_BYTES]

    def item_keys(self, history: History) -> set[bytes]:
        """The keys of all items of a history."""
        ids = b"".join(segment.ids for segment in history.segments)
        return {ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)}

    def put_blob(self, user: str, name: str, data: bytes, generation: int | None = None) -> None:
        """Store or replace a file made from the history, such as "profile.txt" or "index.safetensors".

        Args:
            generation: The user's, read before what the file was made from; None: as it is now.

        Raises:
            Forgotten: No such user, or the user was, or items of theirs, meanwhile.
        """
        user_hash = self.user_hash(user)
        if not BLOB_NAME.fullmatch(name):
            raise ValueError(f"user {user_hash[:12]}: file name {name!r}: expected {BLOB_NAME.pattern}")
        with disk_errors(user_hash, f"store {name} of"), self.writing(user_hash):
            if generation is None:
                generation = self.registry.generation(user_hash)
            else:
                self.registry.check_generation(user_hash, generation)
            path = self.user_folder(user_hash) / "blobs" / name
            with self._staged(self.frame(user_hash, f"blobs/{name}", data), user_hash) as staged:
                with self.registry.fenced(user_hash, generation):
                    self.make_folder(path.parent)
                    step(os.rename, staged, path)
            sync_folder(path.parent)

    def get_blob(self, user: str, name: str) -> bytes | None:
        """A stored file, or None. `CorruptError` if its checksum does not hold."""
        user_hash = self.user_hash(user)
        return self.read_framed(user_hash, f"blobs/{name}") if name in self.blob_names(user_hash) else None

    def blob_names(self, user_hash: str) -> list[str]:
        """Names of what `put_blob` stored."""
        folder = self.user_folder(user_hash) / "blobs"
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    # ---- care

    def verify(self, user: str | None = None) -> list[str]:
        """Read all of a user, or of everyone, and compare folders with registry. Says what is wrong; mends nothing."""
        hashes = [row.user_hash for row in self.registry.users()] if user is None else [self.user_hash(user)]
        problems = [problem for user_hash in hashes for problem in self._verify_user(user_hash)]
        if user is None:
            problems += [f"{path.relative_to(self.root)}: left over, run gc" for path in self._leftovers()]
            problems += [broken] if (broken := self.registry.verify_audit()) else []
        return problems

    def gc(self, min_age_s: float = 3600.0) -> list[str]:
        """Sweep what crashes left: staged files, unregistered versions, folders and keys of no user.

        Only what is older than `min_age_s`, and whose user no job has leased. Returns the removed paths.
        """
        oldest = self._clock() - min_age_s
        suspects = {}
        for path in self._leftovers():
            with suppress(FileNotFoundError):  # gone meanwhile: it was no leftover
                if path.lstat().st_mtime <= oldest:
                    suspects[path] = _HASH.search(str(path.relative_to(self.root)))
        leases: dict[str, Lease] = {}
        for owner in {match[0] for match in suspects.values() if match}:
            with suppress(Refused):
                leases[owner] = self.registry.acquire_lease(owner, f"gc-{secrets.token_hex(8)}", COMMIT_TTL_S)
        removed = []
        for path in self._leftovers():  # asked again: under the leases the answer stays true
            if path in suspects and ((match := suspects[path]) is None or match[0] in leases):
                with suppress(Refused):  # the removals so far may have taken longer than the lease
                    if match:
                        self.registry.check_lease(leases[match[0]])
                    remove(path)
                    removed.append(str(path.relative_to(self.root)))
        for lease in leases.values():
            self.registry.release_lease(lease)
        return removed

    def drop_old_versions(self, user: str, keep: int) -> int:
        """Remove all but a user's newest `keep` versions, as `Registry.drop_old_versions`; returns how many went."""
        user_hash = self.user_hash(user)
        dropped = self.registry.drop_old_versions(user_hash, keep)  # first: `gc` finds what a crash leaves
        with disk_errors(user_hash, "remove old versions of"):
            for version in dropped:
                for place in ("adapters", "quarantine"):
                    remove(self.user_folder(user_hash) / place / version)
        return len(dropped)

    # ---- the folder, for archive.py and forget.py

    def user_folder(self, user_hash: str, top: str = "users") -> Path:
        """Where a user's things are; `top` "keys" gives the user's key file."""
        if not _HASH.fullmatch(user_hash):
            raise InputError(f"user hash {user_hash[:12]!r}: expected 64 hex digits")
        return self.root / top / user_hash[:2] / user_hash[2:4] / user_hash

    def stage_version(
        self, stage: Path, lease: Lease, number: int, adapter: AdapterState, manifest: Manifest
    ) -> Version:
        """Write version `number` into the new folder `stage`, synced and read back; the row to publish."""
        user_hash, version = lease.user_hash, f"{number:06d}-{lease.fence}"
        files = adapter_files.encode_adapter(adapter, f"user {user_hash[:12]}")
        manifest = replace(
            manifest,
            user_hash=user_hash,
            version=version,
            peft_config=adapter.peft_config,
            shapes={name: tensor.shape for name, tensor in adapter.tensors.items()},
            checksums={name: sha256(data) for name, data in files.items()},
        )
        files[MANIFEST_NAME] = encode_manifest(manifest)
        self.make_folder(stage)
        for name, data in files.items():
            write_file(stage / name, self.seal(user_hash, f"adapters/{version}/{name}", data))
        sync_folder(stage)
        digest = sha256(files[MANIFEST_NAME])
        base, run_id = manifest.base_fingerprint, manifest.run_id
        row = Version(user_hash, version, number, base, digest, run_id, self._clock())
        self.read_version(stage, row)
        return row

    def read_version(self, folder: Path, row: Version) -> tuple[AdapterState, Manifest]:
        """Read a version's folder and verify it against its registry row and its manifest, else `CorruptError`."""
        manifest = self.read_manifest(folder, row)
        files = {name: self._read_part(folder, row, name) for name in manifest.checksums}
        return decode_adapter(files, manifest), manifest

    def read_manifest(self, folder: Path, row: Version) -> Manifest:
        """The manifest of a version's folder, verified against its registry row, else `CorruptError`."""
        text = self._read_part(folder, row, MANIFEST_NAME)
        if sha256(text) != row.manifest_sha256:
            raise CorruptError(f"{MANIFEST_NAME} is not the one that was registered")
        return decode_manifest(text)

    def write_segment(self, user_hash: str, number: int, items: Sequence[Item], stage: Path | None = None) -> Segment:
        """Write a segment under a new name, in the user's folder or in one to be renamed to it.

        Nobody reads it before the registry lists it.
        """
        name = f"{number:06d}-{secrets.token_hex(8)}.jsonl"
        if stage is not None:
            self.write_framed(stage, user_hash, f"history/{name}", encode_items(items))
        else:
            data = self.frame(user_hash, f"history/{name}", encode_items(items))
            self.write_new(self.user_folder(user_hash) / "history" / name, data, user_hash)
        return self._segment(user_hash, number, name, items)

    def read_framed(self, user_hash: str, name: str) -> bytes:
        """The content of one of the user's files, checked against the checksum on its first line."""
        data = self.unseal(user_hash, name, self._read_bytes(self.user_folder(user_hash) / name))
        line, newline, content = data.partition(b"\n")
        if line + newline != _digest_line(user_hash, name, content):
            raise CorruptError(f"user {user_hash[:12]}: {name}: content is not that of its SHA-256 {line[:16]!r}")
        return content

    def write_framed(self, stage: Path, user_hash: str, name: str, content: bytes) -> None:
        """Write a framed file into a folder that is still to be renamed to the user's."""
        self.make_folder((stage / name).parent)
        write_file(stage / name, self.frame(user_hash, name, content))
        sync_folder((stage / name).parent)

    def frame(self, user_hash: str, name: str, content: bytes) -> bytes:
        """Content under a line with its SHA-256, which covers whose and which file it is; sealed if the vault seals."""
        return self.seal(user_hash, name, _digest_line(user_hash, name, content) + content)

    def write_new(self, path: Path, data: bytes, owner: str) -> None:
        """Put a file in place that must not be there yet, else FileExistsError; one of two writers wins."""
        self.make_folder(path.parent)
        with self._staged(data, owner) as staged:
            step(os.link, staged, path)
        sync_folder(path.parent)

    def seal(self, user_hash: str, name: str, data: bytes) -> bytes:
        """What to write for `data`: itself, or AES-256-GCM under the user's key, bound to user and place."""
        if not self.is_encrypted:
            return data
        key_path = self.user_folder(user_hash, "keys")
        if not key_path.exists():
            with suppress(FileExistsError):
                self.write_new(key_path, AESGCM.generate_key(256), user_hash)
        nonce = secrets.token_bytes(12)
        place = f"{user_hash}/{name}".encode()
        return _SEAL + nonce + AESGCM(self._read_bytes(key_path)).encrypt(nonce, data, place)

    def unseal(self, user_hash: str, name: str, data: bytes) -> bytes:
        """The reverse of `seal`."""
        if not self.is_encrypted:
            return data
        body = data.removeprefix(_SEAL)
        try:
            cipher = AESGCM(self._read_bytes(self.user_folder(user_hash, "keys")))
            return cipher.decrypt(body[:12], body[12:], f"{user_hash}/{name}".encode())
        except FileNotFoundError:
            raise CorruptError(f"user {user_hash[:12]}: {name} is sealed and the key is gone") from None
        except (InvalidTag, ValueError):
            raise CorruptError(f"user {user_hash[:12]}: {name} is not what was sealed here") from None

    # ---- inside

    def _segment(self, user_hash: str, number: int, name: str, items: Sequence[Item]) -> Segment:
        ids = b"".join(self.item_key(user_hash, item.item_id) for item in items)
        return Segment(number, name, len(items), len(encode_items(items)), ids)

    def _read_segment(self, user_hash: str, history: History, segment: Segment) -> tuple[Item, ...]:
        """The items of a segment of `history`. `HistoryChanged` if an append has merged it meanwhile."""
        try:
            data = self.read_framed(user_hash, f"history/{segment.name}")
        except FileNotFoundError:
            if self.registry.history(user_hash).version != history.version:
                raise HistoryChanged(f"user {user_hash[:12]}: the history was changed meanwhile; try again") from None
            raise
        items = decode_items(data)
        if b"".join(self.item_key(user_hash, item.item_id) for item in items) != segment.ids:
            raise CorruptError(f"user {user_hash[:12]}: {segment.name} holds other items than the registry lists")
        return items

    def _change_history(
        self, user_hash: str, before: History, segments: Sequence[Segment], lease: Lease | None = None
    ) -> History:
        """List new segments, and remove the files of those that are listed no more (or, refused, of the new ones)."""
        folder = self.user_folder(user_hash) / "history"
        gone = {segment.name for segment in before.segments} - {segment.name for segment in segments}
        try:
            after = step(self.registry.change_history, user_hash, before, segments, lease)
        except Refused:
            gone = {segment.name for segment in segments} - {segment.name for segment in before.segments}
            raise
        except BaseException:  # the list may have been changed, or not: only gc may judge
            gone = set()
            raise
        finally:
            for name in gone:
                remove(folder / name)
        return after

    def _numbered_segments(self, user_hash: str) -> list[str]:
        """File names of a history made with schema 1."""
        folder = self.user_folder(user_hash) / "history"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        if names != [f"{number:06d}.jsonl" for number in range(1, len(names) + 1)]:
            raise CorruptError(f"user {user_hash[:12]}: history has segments {names}, expected 000001.jsonl and on")
        return names

    def _commit(self, lease: Lease, adapter: AdapterState, manifest: Manifest, make_current: bool) -> str:
        user_hash = lease.user_hash
        self.registry.check_lease(lease)  # `publish` has the last word; here nothing of a forgotten user is written yet
        self.check_sources(user_hash, manifest.item_ids)
        current = self.registry.current(user_hash)
        parent = current.version if current else None
        number = 1 + max((row.number for row in self.registry.versions(user_hash)), default=0)
        stage = self.root / "tmp" / f"{user_hash}-{secrets.token_hex(8)}"
        try:
            row = self.stage_version(stage, lease, number, adapter, replace(manifest, parent=parent))
            folder = self.user_folder(user_hash) / "adapters" / row.version
            self.make_folder(folder.parent)
            if folder.exists():  # left by a failed try under this lease: the name holds our fence
                remove(folder)
            step(os.rename, stage, folder)
        except BaseException:
            if stage.exists():
                remove(stage)
            raise
        sync_folder(folder.parent)
        try:
            rho = (metrics["rho_before"], metrics["rho"]) if "rho" in (metrics := manifest.metrics) else None
            step(self.registry.publish, lease, row, parent, make_current, rho)
        except Refused:  # after any other failure the row may be there: then only gc may judge
            remove(folder)
            raise
        return row.version

    def _read_part(self, folder: Path, row: Version, name: str) -> bytes:
        try:
            data = self._read_bytes(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptError(f"{name} is missing") from None
        return self.unseal(row.user_hash, f"adapters/{row.version}/{name}", data)

    def _find(self, user_hash: str, version: str | None) -> Version:
        registry = self.registry
        row = registry.current(user_hash) if version is None else registry.version(user_hash, version)
        if row is not None and row.is_good:
            return row
        if not self.registry.has_user(user_hash):
            raise InputError(f"user {user_hash[:12]}: no such user")
        what = "no good adapter version yet" if version is None else f"no good version {version!r}"
        raise InputError(f"user {user_hash[:12]}: {what}")

    def _quarantine(self, row: Version, reason: str) -> None:
        if not self.registry.quarantine(row.user_hash, row.version, reason):
            return  # the user was forgotten meanwhile, or another reader was quicker
        logger.error("user %s: version %s is corrupt and quarantined: %s", row.user_hash[:12], row.version, reason)
        folder = self.user_folder(row.user_hash)
        try:
            self.make_folder(folder / "quarantine")
            step(os.rename, folder / "adapters" / row.version, folder / "quarantine" / row.version)
        except OSError as error:
            logger.error("user %s: %s stays where it is: %s", row.user_hash[:12], row.version, _reason(error))

    def _verify_user(self, user_hash: str) -> Iterator[str]:
        folder = self.user_folder(user_hash)
        checks: list[tuple[str, Callable[[], object]]] = [
            (row.version, partial(self.read_version, folder / "adapters" / row.version, row))
            for row in self.registry.versions(user_hash)
            if row.is_good
        ]
        checks.append(("history", partial(self.read_history, UserHash(user_hash))))
        checks += [(name, partial(self.read_framed, user_hash, f"blobs/{name}")) for name in self.blob_names(user_hash)]
        for name, check in checks:
            try:
                check()
            except (ValueError, OSError) as error:
                yield f"user {user_hash[:12]}: {name}: {error}"

    def _leftovers(self) -> list[Path]:
        """Paths in the vault that the registry does not know."""
        found = list((self.root / "tmp").iterdir())
        users = {row.user_hash for row in self.registry.users()}
        versions = {(row.user_hash, row.version) for row in self.registry.versions()}
        for folder in self.root.glob("users/*/*/*"):
            mine = folder.glob("adapters/*") if folder.name in users else [folder]
            found += [path for path in mine if (folder.name, path.name) not in versions]
            if folder.name in users:
                found += self.unlisted_segments(folder)
        found += [path for path in self.root.glob("keys/*/*/*") if path.name not in users]
        return sorted(found)

    def unlisted_segments(self, folder: Path) -> list[Path]:
        """Files in a user's history folder that the registry does not list."""
        try:
            history = self.registry.history(folder.name)
        except Forgotten:
            return []
        if history.version is None:
            return []
        listed = {segment.name for segment in history.segments}
        return [path for path in folder.glob("history/*") if path.name not in listed]

    def make_folder(self, folder: Path) -> None:
        """Make a folder of the vault with mode 0700, and those above it; a symlink among them is refused."""
        below = folder.relative_to(self.root).parts
        for depth in range(1, len(below) + 1):
            path = self.root.joinpath(*below[:depth])
            try:
                step(os.mkdir, path, 0o700)
            except FileExistsError:
                if not stat.S_ISDIR(path.lstat().st_mode):
                    raise CorruptError(f"{path}: expected a folder; a link or file was put there") from None
            else:
                sync_folder(path.parent)

    def _read_bytes(self, path: Path) -> bytes:
        if os.path.realpath(path.parent) != str(path.parent) or path.is_symlink():
            raise CorruptError(f"{path.relative_to(self.root)}: there is a symlink in the path")
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()

    @contextmanager
    def _staged(self, data: bytes, owner: str) -> Iterator[Path]:
        path = self.root / "tmp" / f"{owner}-{secrets.token_hex(8)}"
        try:
            write_file(path, data)
            yield path
        finally:
            if path.exists():
                step(os.unlink, path)


def open_vault(config: Config) -> Vault:
    """The vault of a run; made if it is not there yet."""
    root = Path(config.vault.path or Path(config.run_dir) / "vault").expanduser()
    return Vault(root, config.vault.registry_url or None, encrypt=config.vault.encrypt)


def step(operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Every change to disk or registry passes here, so that a test can stop the vault at the n-th."""
    return operation(*args, **kwargs)


def _open_lock(path: Path) -> IO[str]:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))


def _flock(lock: IO[str], operation: int) -> bool:
    """Lock an open file; False if it is held by others. A disk without locks takes every lock for given."""
    try:
        fcntl.flock(lock, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a new file with mode 0600 and sync it; its name is safe only after `sync_folder`."""
    descriptor = step(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[step(os.write, descriptor, left) :]
        step(os.fsync, descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        step(os.fsync, descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, link or folder (never what a link points to), and sync the folder it was in.

    Another process may be removing it, too, as a refused commit does while its user's items are forgotten.
    """
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            step(shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink, path)
    with suppress(FileNotFoundError):
        sync_folder(path.parent)


def decode_adapter(files: dict[str, bytes], manifest: Manifest) -> AdapterState:
    """The adapter in PEFT files, `CorruptError` if they are not exactly those of the manifest, whole and finite."""
    for name, data in files.items():
        if sha256(data) != manifest.checksums.get(name):
            raise CorruptError(f"{name}: SHA-256 is not the manifest's")
    try:
        adapter = adapter_files.decode_adapter(files, f"version {manifest.version}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(str(error)) from error
    if {name: tensor.shape for name, tensor in adapter.tensors.items()} != manifest.shapes:
        raise CorruptError("tensor names or shapes are not the manifest's")
    return adapter


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest -> JSON."""
    try:
        return json.dumps(asdict(manifest), sort_keys=True, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"user {manifest.user_hash[:12]}: manifest is not plain JSON: {error}") from error


def decode_manifest(text: bytes) -> Manifest:
    """JSON -> Manifest, `CorruptError` if it is not one, or of another format."""
    try:
        fields = json.loads(text)
        if fields["format_version"] != FORMAT:
            raise CorruptError(f"manifest: format {fields['format_version']!r}, expected {FORMAT}")
        fields["item_ids"] = tuple(fields["item_ids"])
        fields["checksums"] = dict(fields["checksums"].items())
        fields["shapes"] = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        manifest = Manifest(**fields)
        texts = [manifest.base_fingerprint, manifest.task_fingerprint, manifest.run_id, manifest.user_hash]
        texts += [manifest.version, manifest.parent or "", *manifest.item_ids, *manifest.checksums.values()]
        numbers, settings = [manifest.seed, *manifest.metrics.values()], [manifest.recipe, manifest.peft_config]
        for kind, values in ((str, texts), (int | float, numbers), (dict, settings)):
            if wrong := [value for value in values if not isinstance(value, kind)]:
                raise TypeError(f"expected {kind}, found {str(wrong[0])[:40]!r}")
        return manifest
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(f"manifest: not a manifest ({error!r})") from error


def encode_items(items: Sequence[Item]) -> bytes:
    """Items -> JSON lines."""
    return b"".join(json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n" for item in items)


def decode_items(data: bytes) -> tuple[Item, ...]:
    """JSON lines -> items, `CorruptError` with the line number if a line is none."""
    items = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            fields = json.loads(line)
            item = Item(**{**fields, "context": tuple(fields["context"]), "options": tuple(fields["options"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CorruptError(f"history line {number}: not an item ({error!r})") from error
        items.append(item)
    return tuple(items)


def _where(user_hash: str, item: Item) -> str:
    return f"user {user_hash[:12]}: item {item.item_id!r}"


def check_items(user_hash: str, items: Sequence[Item]) -> None:
    """InputError if an item has no id, the id of another item, a field that is not text, or text that is no Unicode."""
    seen = set[str]()
    for item in items:
        where = _where(user_hash, item)
        optional = (item.time, item.label, item.title, item.abstract, item.keywords)
        texts = [item.item_id, item.text, *item.context, *item.options, *(one for one in optional if one is not None)]
        if not all(isinstance(text, str) for text in texts) or not item.item_id:
            raise InputError(f"{where}: expected a non-empty item_id, and text in every field")
        if item.item_id in seen:
            raise InputError(f"{where}: is there twice, expected ids unique within the user")
        seen.add(item.item_id)
        check_unicode(where, texts)


def _digest_line(user_hash: str, name: str, content: bytes) -> bytes:
    return sha256(f"{user_hash}/{name}\n".encode() + content).encode() + b"\n"


def _change(old: np.ndarray | None, new: np.ndarray | None) -> float:
    if old is None or new is None or old.shape != new.shape:
        return float("inf")
    return float(np.abs(new - old).max(initial=0.0))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


@contextmanager
def disk_errors(user_hash: str, verb: str) -> Iterator[None]:
    """OSError -> DiskError that says for whom, what and where."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"could not {verb} user {user_hash[:12]}: {_reason(error)}") from error
