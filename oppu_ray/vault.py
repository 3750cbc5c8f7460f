"""One user, one folder: history, profile, index vectors, adapter versions (arrow `train_pack -> vault -> inference`).

In: a user id and an `AdapterState`, items or bytes. Out: the same, verified. The folder is `users/ab/cd/<keyed hash>`:
to export it is to pack it (`archive.py`), to forget it is to remove it (`forget.py`). A commit writes a temporary
folder, syncs it, reads it back, renames it, and then one registry transaction moves the user's `current`. A crash at
any point leaves the old version or the new one, and leftovers that no reader sees until `gc` sweeps them.

Design: PEFT files are made and parsed in memory, so the bytes that were checked are the bytes that are parsed, and an
encrypted vault never puts plain text on the disk.

Design: unreachable is not corrupt. What is irreversible (quarantine, a new key, a new registry, removal by gc) follows
only from bytes that were read and are wrong. The registry records which key file and which users' keys are the vault's
own, and whether it is sealed; `users/` and `keys/` hold a mark with the vault's id. A file, folder or disk that is away
is a `DiskError`: it changes nothing, nothing is made in its place, and it heals by itself.
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
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oppu_ray import adapter_files
from oppu_ray.config import Config
from oppu_ray.core import AdapterState, InputError, Item, check_unicode
from oppu_ray.files import write_once
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
TOPS = ("users", "keys")
"""The vault's folders by user. Each may be a symlink to another disk, or a mount point."""
MARK_NAME = "vault"
"""A file in `users/` and `keys/` with the vault's id: an empty mount point, or another vault's disk, has none."""
REVISION_NAME = "revision"
"""A file in `users/` with the newest revision of the registry that has listed what is there."""
RECORD_NAME = "vault.id"
"""A file in a run's folder with the id of the vault that the run began with."""
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
    """The disk under the vault failed, is full, or is away; nothing was changed, and it may heal by itself."""


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
        create: Make a new vault where there is none; otherwise that is an error.
        clock: Unix seconds.

    Raises:
        DiskError: It cannot be reached, or what is there is not this vault's own.
    """

    def __init__(
        self,
        root: Path,
        registry_url: str | None = None,
        *,
        encrypt: bool = False,
        create: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = Path(os.path.realpath(root))
        self._clock = clock
        self._tops = {top: self.root / top for top in TOPS}
        if registry_url is None:
            registry_url = f"sqlite:///{self.root / 'registry.sqlite'}"
        with self._unreachable("cannot be opened: "):
            is_new = not _is_there(self.root / "key")
            if is_new and not create:
                raise DiskError(f"vault {root}: no vault is there, it has no key file; is its disk mounted?")
            if is_new:
                self._create(Path(root), registry_url, encrypt)
            # Only these are looked up through links, once: below them every link is refused.
            self._tops = {top: Path(os.path.realpath(self.root / top)) for top in TOPS}
            self._key = self._read_bytes(Path(os.path.realpath(self.root / "key")))
            with suppress(FileExistsError):
                os.mkdir(self.root / "locks", 0o700)
            if len(self._key) != 32:
                raise ValueError(f"vault {root}: key file has {len(self._key)} bytes, expected 32")
            if (self.root / "registry.sqlite").is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self.root / "registry.sqlite"))
        self.registry = Registry(registry_url, self.derive_key("audit"), clock, create=is_new)
        with self._unreachable("cannot be opened: "):
            self.is_encrypted = self._establish()
            if encrypt and not self.is_encrypted:
                raise ValueError(f"vault {root}: was made without encryption; export its users into a new vault")
            if is_new and self.is_encrypted:
                self._expect_own("keys")
            self._compare_revisions()

    def close(self) -> None:
        """Close the registry's connections; the next use opens them again."""
        self.registry.close()

    @property
    def vault_id(self) -> str:
        """Names the vault: made from its key file, so that a copy has the same and no other vault has."""
        return self.derive_key("vault").hex()[:32]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of all files outside the vault that may speak of users. One holder, in whatever process."""
        with self._unreachable():
            os.stat(self.root / "key")  # else the lock would be made beneath the mount point
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
            step(os.rename, folder, self.stage_path(user_hash))
            sync_folder(folder.parent)
        self.remove_staged(user_hash)

    def remove_staged(self, user_hash: str) -> None:
        """Remove what writers who were killed have left, under `only_writer`."""
        for path in self.staged_paths(user_hash):
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
            DiskError: It cannot be reached; it stays current.
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
            CorruptError: It is quarantined now, or was forgotten meanwhile.
            DiskError: It cannot be reached; it stays as it is.
            ValueError: It was trained on another base, or is of another format.
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
        except DiskError as error:
            now = self.registry.version(user_hash, row.version)
            if now is not None and now.is_good:
                raise
            raise CorruptError(f"{error}; it was forgotten or quarantined meanwhile") from error

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
        """The list of a user's history: counts and segments, without reading them. `Refused` if no such user."""
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
            self.registry.check_generation(user_hash, generation)
            path = self.user_folder(user_hash) / "blobs" / name
            with self._staged(self.frame(user_hash, f"blobs/{name}", data), user_hash, "users") as staged:
                with self.registry.fenced(user_hash, generation):
                    self.make_folder(path.parent)
                    step(os.rename, staged, path)
            sync_folder(path.parent)

    def get_blob(self, user: str, name: str) -> bytes | None:
        """A stored file, or None. `CorruptError` if its checksum does not hold, `DiskError` if it cannot be read."""
        user_hash = self.user_hash(user)
        return self.read_framed(user_hash, f"blobs/{name}") if name in self.blob_names(user_hash) else None

    def blob_names(self, user_hash: str) -> list[str]:
        """Names of what `put_blob` stored."""
        with disk_errors(user_hash, "list the files of"):
            return sorted(self._names(user_hash, "blobs"))

    # ---- care

    def verify(self, user: str | None = None) -> list[str]:
        """Read all of a user, or of everyone, and compare folders with registry. Says what is wrong; mends nothing."""
        problems = []
        for top in self._own_tops():
            try:
                self._is_marked(top)
            except DiskError as error:
                problems.append(str(error))
        if problems:  # every user would say the same
            return problems
        problems += [lag] if (lag := self._lag()) else []
        for user_hash in self.registry.hashes() if user is None else [self.user_hash(user)]:
            problems += self._verify_user(user_hash)
        if user is None:
            with self._unreachable():
                problems += [f"{self._shown(path)}: left over, run gc" for path in self._leftovers()]
            problems += [broken] if (broken := self.registry.verify_audit()) else []
        return problems

    def gc(self, min_age_s: float = 3600.0) -> list[str]:
        """Sweep what crashes left: staged files, unregistered versions, folders and keys of no user.

        Only what is older than `min_age_s`, and whose user no job has leased. Returns the removed paths.

        Raises:
            DiskError: `users/` or `keys/` cannot be reached.
            Refused: The registry is older than the files: what it does not list may be a user's.
        """
        self.expect_newest_registry()
        self.expect_reachable()
        oldest, removed = self._clock() - min_age_s, list[str]()
        with self._unreachable():
            for owner, paths in groupby(self._leftovers(), self._owner):
                if old := [path for path in paths if _is_older(path, oldest)]:
                    removed += self._sweep(owner, old)
        return removed

    def _sweep(self, owner: str | None, paths: Sequence[Path]) -> list[str]:
        """Remove leftovers of one user, unless a job has leased the user; returns what was removed."""
        lease = None
        if owner is not None:
            try:
                lease = self.registry.acquire_lease(owner, f"gc-{secrets.token_hex(8)}", COMMIT_TTL_S)
            except Refused:
                return []
            left = {*self.staged_paths(owner), *self._unlisted(owner)}  # asked again: under the lease it stays true
            paths = [path for path in paths if path in left]
        removed = []
        for path in paths:
            with suppress(Refused):  # the removals so far may have taken longer than the lease
                if lease:
                    self.registry.check_lease(lease)
                remove(path)
                removed.append(self._shown(path))
        if lease:
            self.registry.release_lease(lease)
        return removed

    def drop_old_versions(self, user: str, keep: int) -> int:
        """Remove all but a user's newest `keep` versions, as `Registry.drop_old_versions`; returns how many went."""
        user_hash = self.user_hash(user)
        self.expect_reachable()
        dropped = self.registry.drop_old_versions(user_hash, keep)  # first: `gc` finds what a crash leaves
        with disk_errors(user_hash, "remove old versions of"):
            for version in dropped:
                for place in ("adapters", "quarantine"):
                    remove(self.user_folder(user_hash) / place / version)
        return len(dropped)

    def expect_reachable(self) -> None:
        """`DiskError` if `users/` or `keys/` is away, so that what is missing there would not be gone."""
        for top in self._own_tops():
            self._is_marked(top)

    def expect_newest_registry(self) -> None:
        """`Refused` if the registry is older than the files: what it does not list may be a user's all the same."""
        if lag := self._lag():
            raise Refused(lag)

    # ---- the folder, for archive.py and forget.py

    def user_folder(self, user_hash: str, top: str = "users") -> Path:
        """Where a user's things are; `top` "keys" gives the user's key file."""
        if not _HASH.fullmatch(user_hash):
            raise InputError(f"user hash {user_hash[:12]!r}: expected 64 hex digits")
        return self._tops[top] / user_hash[:2] / user_hash[2:4] / user_hash

    def stage_path(self, owner: str, top: str = "users") -> Path:
        """A new name, on the disk of `top`, for what is renamed into place once it is whole; gc sweeps the rest."""
        folder = self._tops[top] / "tmp"
        self.make_folder(folder)
        return folder / f"{owner}-{secrets.token_hex(8)}"

    def staged_paths(self, owner: str = "") -> list[Path]:
        """What was staged, for one user or for all, and was not renamed into place."""
        folders = [folder / "tmp" for folder in (self.root, *self._tops.values())]
        return sorted(path for folder in folders for path in _entries(folder) if path.name.startswith(owner))

    def all_paths(self) -> Iterator[Path]:
        """All files and folders of the vault, also where `users/` or `keys/` lies on another disk."""
        outside = [folder for folder in self._tops.values() if not folder.is_relative_to(self.root)]
        return (path for folder in (self.root, *outside) for path in folder.rglob("*"))

    def stage_version(
        self, stage: Path, lease: Lease, number: int, adapter: AdapterState, manifest: Manifest
    ) -> Version:
        """Write version `number` into the new folder `stage`, synced and read back; the row to publish."""
        user_hash, version = lease.user_hash, f"{number:06d}-{lease.fence}-{secrets.token_hex(4)}"
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
        """Read a version's folder and verify it against its registry row and its manifest, else `CorruptError`.

        Raises:
            CorruptError: What was read is wrong.
            DiskError: It cannot be read.
        """
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

    def list_import(self, lease: Lease, segments: Sequence[Segment], row: Version | None, rho: float) -> None:
        """Register a user whose folder is in place. `Refused` if the lease was lost, or the user exists."""
        key = self._read_key(lease.user_hash) if self.is_encrypted else None
        check = self._key_check(lease.user_hash, key) if key else None
        step(self.registry.import_user, lease, segments, row, rho, check)
        self._mark_revision()

    def read_framed(self, user_hash: str, name: str) -> bytes:
        """The content of one of the user's files, checked against the checksum on its first line."""
        with disk_errors(user_hash, f"read {name} of"):
            data = self._read_bytes(self.user_folder(user_hash) / name)
        data = self.unseal(user_hash, name, data)
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
        with self._staged(data, owner, self._top_of(path)) as staged:
            step(os.link, staged, path)
        sync_folder(path.parent)

    def seal(self, user_hash: str, name: str, data: bytes) -> bytes:
        """What to write for `data`: itself, or AES-256-GCM under the user's key, bound to user and place."""
        if not self.is_encrypted:
            return data
        key, nonce = self._key_for_writing(user_hash), secrets.token_bytes(12)
        return _SEAL + nonce + AESGCM(key).encrypt(nonce, data, f"{user_hash}/{name}".encode())

    def unseal(self, user_hash: str, name: str, data: bytes) -> bytes:
        """The reverse of `seal`.

        Raises:
            CorruptError: It is not what was sealed with the user's registered key.
            DiskError: The key file cannot be read, or is not the registered one.
        """
        if not self.is_encrypted:
            return data
        key = self._read_key(user_hash)
        if key is None:
            raise self._without_key(user_hash, "is missing")
        try:
            return _decrypt(key, f"{user_hash}/{name}", data)
        except (InvalidTag, ValueError):
            if not self._is_registered(user_hash, key):
                raise self._without_key(user_hash, "is not the registered one") from None
            raise CorruptError(f"user {user_hash[:12]}: {name} is not what was sealed here") from None

    # ---- is it there, and is it ours

    def _create(self, root: Path, registry_url: str, encrypt: bool) -> None:
        """Make a new vault, unless something shows that there is one whose disk is away. The key file comes last."""
        if root.is_symlink() and not root.exists():
            raise FileNotFoundError(errno.ENOENT, "the symlink leads nowhere; is its disk mounted?", str(root))
        key = self.root / "key"
        if any(_entries(self.root / top) for top in TOPS) and not _is_there(key):
            raise DiskError(f"vault {root}: has users but no key file; restore it, without it none is found")
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        with closing(Registry(registry_url, b"")) as registry:
            if not registry.is_empty() and not _is_there(key):  # else another process was quicker
                raise DiskError(f"vault {root}: the registry is in use, but the key file is missing; restore it")
        for name in ("users", "tmp", *(["keys"] if encrypt else [])):
            with suppress(FileExistsError):
                os.mkdir(self.root / name, 0o700)
        staged = self.root / "tmp" / f"new-{secrets.token_hex(8)}"
        write_file(staged, secrets.token_bytes(32))
        with suppress(FileExistsError):  # another process was quicker
            os.link(staged, key)
        os.unlink(staged)
        sync_folder(self.root)

    def _establish(self) -> bool:
        """Whether the vault is sealed: a fact of the registry. A new vault, or one of schema 1, gets it from proof.

        Raises:
            DiskError: Another vault's registry or key file is here, or nothing proves what this vault is.
        """
        facts = self.registry.facts()
        if "vault" not in facts:
            if not self.registry.is_chained():
                raise DiskError(f"vault {self.root}: the registry was not written with this key file; which is wrong?")
            sample = next(self._samples(), None)
            if sample is None and self.registry.has_files():
                raise DiskError(f"vault {self.root}: users/ has none of the registry's users; is its disk mounted?")
            is_sealed = sample[2].startswith(_SEAL) if sample else self._tops["keys"].is_dir()
            facts = self.registry.record_facts({"vault": self.vault_id, "is_encrypted": str(is_sealed)})
        if (known := facts["vault"]) != self.vault_id:
            raise DiskError(
                f"vault {self.root}: its key file is of vault {self.vault_id[:12]}, the registry of {known[:12]}: "
                "is another vault's disk mounted here?"
            )
        return facts["is_encrypted"] == "True"

    def _own_tops(self) -> tuple[str, ...]:
        return TOPS if self.is_encrypted else TOPS[:1]

    def _is_marked(self, top: str) -> bool:
        """Whether `users/` or `keys/` has the vault's mark; a new vault's gets it when the first file is written.

        Raises:
            DiskError: An empty mount point, or another vault's folder, is in its place.
        """
        path = self._tops[top] / MARK_NAME
        with self._unreachable():
            try:
                found = self._read_bytes(path).decode(errors="replace").strip()
            except FileNotFoundError:
                found = ""
            if found == self.vault_id:
                return True
            if found:
                raise DiskError(f"{top}/ is of another vault: {path} says {found[:32]!r}, expected {self.vault_id}")
            if self.registry.fact(top) or not self._is_proven(top):
                hint = f"if {path.parent} is the right folder, write {self.vault_id} to {path}"
                raise DiskError(f"{top}/ has no mark of this vault; is its disk mounted? ({hint})")
        return False

    def _is_proven(self, top: str) -> bool:
        """Whether a folder without a mark is the vault's: it holds what it should, or nothing was ever written."""
        samples = list(islice(self._samples(), 1 if top == "users" else 20))
        if top == "users" or not samples:
            return bool(samples) or not self.registry.has_files()
        return any(self._opens(user_hash, self._read_key(user_hash), name, data) for user_hash, name, data in samples)

    def _expect_own(self, top: str) -> None:
        """As `_is_marked`, and put the mark there if it is not yet."""
        if not self._is_marked(top):
            folder = self._tops[top]
            with suppress(FileExistsError):
                os.mkdir(folder / "tmp", 0o700)
            staged = folder / "tmp" / f"new-{secrets.token_hex(8)}"
            write_file(staged, self.vault_id.encode())
            os.rename(staged, folder / MARK_NAME)
            sync_folder(folder)
            self.registry.record_facts({top: "marked"})

    def _samples(self) -> Iterator[tuple[str, str, bytes]]:
        """(user hash, name, bytes) of one file of each registered user who has any."""
        for folder in self._folders("users", ""):
            if self.registry.has_user(folder.name):
                for name, path in islice(_files(folder), 1):
                    yield folder.name, name, self._read_bytes(path)

    def _names(self, user_hash: str, part: str) -> list[str]:
        """What is in a part of the user's folder; nothing where there is no such part."""
        folder = self.user_folder(user_hash)
        try:
            return os.listdir(folder / part)
        except FileNotFoundError:
            if not _is_there(folder) and self.registry.has_files(user_hash):
                raise
            return []

    def _read_key(self, user_hash: str) -> bytes | None:
        with disk_errors(user_hash, "read the key of"):
            try:
                return self._read_bytes(self.user_folder(user_hash, "keys"))
            except FileNotFoundError:
                return None

    def _without_key(self, user_hash: str, what: str) -> DiskError:
        path = self.user_folder(user_hash, "keys")
        return DiskError(f"user {user_hash[:12]}: the key file {path} {what}; mount its disk or restore it")

    def _key_for_writing(self, user_hash: str) -> bytes:
        """The user's registered key. A new one only for a user for whom none was registered and nothing written."""
        key = self._read_key(user_hash)
        if key is None:
            has_files = self.registry.has_files(user_hash) or any(_files(self.user_folder(user_hash)))
            if has_files or self.registry.key_check(user_hash) is not None:
                raise self._without_key(user_hash, "is missing")
            with suppress(FileExistsError):
                self.write_new(self.user_folder(user_hash, "keys"), AESGCM.generate_key(256), user_hash)
            key = self._read_key(user_hash)
        if key is None or not self._is_registered(user_hash, key):
            raise self._without_key(user_hash, "is not the registered one")
        return key

    def _is_registered(self, user_hash: str, key: bytes) -> bool:
        """Whether a key is the user's registered one. Where none is registered, one that is proven gets registered."""
        check = self._key_check(user_hash, key)
        known = self.registry.key_check(user_hash)
        if known is None:
            files = [(name, path) for name, path in _files(self.user_folder(user_hash))]
            is_proven = any(self._opens(user_hash, key, name, self._read_bytes(path)) for name, path in files)
            if not is_proven and (files or self.registry.has_files(user_hash)):
                return False
            try:
                known = step(self.registry.record_key_check, user_hash, check)
            except Refused:  # the user is not registered yet: an import seals first
                return True
        return hmac.compare_digest(known, check)

    def _key_check(self, user_hash: str, key: bytes) -> str:
        return hmac.new(self.derive_key("key check"), user_hash.encode() + key, hashlib.sha256).hexdigest()

    def _opens(self, user_hash: str, key: bytes | None, name: str, data: bytes) -> bool:
        try:
            return key is not None and bool(_decrypt(key, f"{user_hash}/{name}", data))
        except (InvalidTag, ValueError):
            return False

    def _seen_revision(self) -> int:
        """The newest revision of the registry that the files have seen; 0 if that is not known."""
        try:
            return int(self._read_bytes(self._tops["users"] / REVISION_NAME))
        except (OSError, ValueError):
            return 0

    def _mark_revision(self) -> None:
        """Tell the files which revision lists them, so that an older copy of the registry is noticed."""
        with suppress(OSError):  # it only makes gc more careful
            if self.registry.written_revision > self._seen_revision():
                path = self._tops["users"] / REVISION_NAME
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
                    file.write(b"%020d\n" % self.registry.written_revision)

    def _compare_revisions(self) -> None:
        seen = self._seen_revision()  # before the registry is asked: it may go on meanwhile
        if seen > self.registry.revision():
            self.registry.record_facts({"lags_behind": str(seen)})

    def _lag(self) -> str:
        """Why the registry is no proof of what is left over, or ""."""
        self._compare_revisions()
        if (seen := self.registry.fact("lags_behind")) is None:
            return ""
        return (
            f"vault {self.root}: the registry is older than the files, which have seen its revision {seen}: was a copy "
            "restored? What it does not list may be a user's, so gc removes nothing; restore the newest registry, or "
            "export the users into a new vault"
        )

    # ---- inside

    def _segment(self, user_hash: str, number: int, name: str, items: Sequence[Item]) -> Segment:
        ids = b"".join(self.item_key(user_hash, item.item_id) for item in items)
        return Segment(number, name, len(items), len(encode_items(items)), ids)

    def _read_segment(self, user_hash: str, history: History, segment: Segment) -> tuple[Item, ...]:
        """The items of a segment of `history`. `HistoryChanged` if an append has merged it meanwhile."""
        try:
            data = self.read_framed(user_hash, f"history/{segment.name}")
        except DiskError:
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
        self._mark_revision()
        return after

    def _numbered_segments(self, user_hash: str) -> list[str]:
        """File names of a history made with schema 1."""
        self._is_marked("users")  # an empty mount point would look like an empty history
        names = sorted(self._names(user_hash, "history"))
        if names != [f"{number:06d}.jsonl" for number in range(1, len(names) + 1)]:
            raise CorruptError(f"user {user_hash[:12]}: history has segments {names}, expected 000001.jsonl and on")
        return names

    def _commit(self, lease: Lease, adapter: AdapterState, manifest: Manifest, make_current: bool) -> str:
        user_hash = lease.user_hash
        self.registry.check_lease(lease)  # `publish` has the last word; here nothing of a forgotten user is written yet
        self.check_sources(user_hash, manifest.item_ids)
        self.registry.add_users([user_hash], lease)  # before there is a key of theirs
        current = self.registry.current(user_hash)
        parent = current.version if current else None
        number = 1 + max((row.number for row in self.registry.versions(user_hash)), default=0)
        stage = self.stage_path(user_hash)
        try:
            row = self.stage_version(stage, lease, number, adapter, replace(manifest, parent=parent))
            folder = self.user_folder(user_hash) / "adapters" / row.version
            self.make_folder(folder.parent)
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
        self._mark_revision()
        return row.version

    def _read_part(self, folder: Path, row: Version, name: str) -> bytes:
        with disk_errors(row.user_hash, f"read version {row.version} of"):
            data = self._read_bytes(folder / name)
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
        except (OSError, DiskError) as error:
            logger.error("user %s: %s stays where it is: %s", row.user_hash[:12], row.version, error)

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

    def _leftovers(self) -> Iterator[Path]:
        """Paths in the vault that the registry does not list, of one user after another."""
        yield from self.staged_paths()
        for first in range(256):
            yield from self._unlisted(f"{first:02x}")

    def _unlisted(self, digits: str) -> list[Path]:
        """Folders, keys, versions and segments of users whose hashes begin so that the registry does not list."""
        folders = {top: list(self._folders(top, digits)) for top in TOPS}
        parts = [
            (folder.name, part, path)
            for folder in folders["users"]
            for part in ("adapters", "history")
            for path in _entries(folder / part)
        ]
        listed = self.registry.listed(digits)  # read after the folders: what is published meanwhile is listed
        found = [path for top in TOPS for path in folders[top] if path.name not in listed.users]
        for user_hash, part, path in parts:
            is_schema_1 = part == "history" and user_hash in listed.unlisted
            if user_hash in listed.users and (user_hash, path.name) not in listed.files and not is_schema_1:
                found.append(path)
        return sorted(found, key=lambda path: self._owner(path) or "")  # a user's folder before the key to it

    def _folders(self, top: str, digits: str) -> Iterator[Path]:
        """What stands in `users/` or `keys/` for users whose hashes begin with these digits (none, two, or all)."""
        if len(digits) == 64:
            yield from (path for path in [self.user_folder(digits, top)] if _is_there(path))
            return
        for first in _entries(self._tops[top]):
            if len(first.name) == 2 and first.name.startswith(digits):
                for second in _entries(first):
                    yield from _entries(second)

    def _owner(self, path: Path) -> str | None:
        """The hash of the user whom a path of the vault belongs to, if it names one."""
        found = _HASH.search(self._shown(path))
        return found[0] if found else None

    def _shown(self, path: Path) -> str:
        """A path as seen from the vault's folder."""
        top = self._top_of(path)
        return str(top / path.relative_to(self._tops[top]) if top else path.relative_to(self.root))

    def _top_of(self, path: Path) -> str:
        """Which of `users/` and `keys/` a path lies in; "" for what lies beside them."""
        return next((top for top in TOPS if path.is_relative_to(self._tops[top])), "")

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
        """Make a folder in `users/` or `keys/` with mode 0700, and those above it; a symlink among them is refused.

        Raises:
            DiskError: `users/` or `keys/` itself is away: nothing is made beneath an empty mount point.
        """
        top = self._top_of(folder)
        if not top:
            raise ValueError(f"{folder}: expected a folder in {' or '.join(map(str, self._tops.values()))}")
        self._expect_own(top)
        path = self._tops[top]
        for name in folder.relative_to(path).parts:
            path = path / name
            try:
                step(os.mkdir, path, 0o700)
            except FileExistsError:
                if not stat.S_ISDIR(path.lstat().st_mode):
                    raise DiskError(f"{path}: expected a folder; a link or file was put there") from None
            else:
                sync_folder(path.parent)

    def _read_bytes(self, path: Path) -> bytes:
        """The bytes of a file of the vault, OSError if it cannot be reached, or only through a symlink."""
        if os.path.realpath(path.parent) != str(path.parent) or path.is_symlink():
            raise OSError(errno.ELOOP, "there is a symlink in the path", str(path))
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()

    @contextmanager
    def _staged(self, data: bytes, owner: str, top: str) -> Iterator[Path]:
        path = self.stage_path(owner, top)
        try:
            write_file(path, data)
            yield path
        finally:
            if path.exists():
                step(os.unlink, path)

    @contextmanager
    def _unreachable(self, what: str = "") -> Iterator[None]:
        """OSError -> DiskError that says of which vault."""
        try:
            yield
        except OSError as error:
            raise DiskError(f"vault {self.root}: {what}{_reason(error)}") from error


def open_vault(config: Config, create: bool = True) -> Vault:
    """The vault of a run, which the run records by its id: an empty mount point is not taken for a new vault.

    Args:
        create: Make it if it is not there yet, and the run has had none.

    Raises:
        DiskError: It is away, or another vault is in its place.
    """
    root = Path(config.vault.path or Path(config.run_dir) / "vault").expanduser()
    record = Path(config.run_dir) / RECORD_NAME
    known = record.read_text().strip() if record.exists() else ""
    hint = f"is its disk mounted? If the run is to begin with another vault, remove {record}"
    if known and not os.path.lexists(root / "key"):
        raise DiskError(f"vault {root}: no vault is there, expected {known}; {hint}")
    vault = Vault(root, config.vault.registry_url or None, encrypt=config.vault.encrypt, create=create)
    if known not in ("", vault.vault_id):
        vault.close()
        raise DiskError(f"vault {root}: is vault {vault.vault_id}, expected {known}; {hint}")
    if not known and record.parent.is_dir():
        with suppress(OSError):  # a machine that only serves may not write there
            write_once(record, vault.vault_id.encode())
    return vault


def _is_there(path: Path) -> bool:
    """Whether something is at a path; OSError where that cannot be told."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _is_older(path: Path, oldest: float) -> bool:
    try:
        return path.lstat().st_mtime <= oldest
    except FileNotFoundError:  # gone meanwhile: it was no leftover
        return False


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in order; nothing if there is no such folder, or a link in its place."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return []
        return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the folder, path) of all files in a user's folder, in order."""
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{name}", file) for name, file in _files(path))
        else:
            yield path.name, path


def _decrypt(key: bytes, place: str, data: bytes) -> bytes:
    body = data.removeprefix(_SEAL)
    return AESGCM(key).decrypt(body[:12], body[12:], place.encode())


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
    """JSON -> Manifest.

    Raises:
        CorruptError: It is not one.
        ValueError: It is of another format, as after a downgrade: it may be whole all the same.
    """
    try:
        fields = json.loads(text)
        if type(found := fields["format_version"]) is int and found != FORMAT:
            raise ValueError(f"manifest: format {found}, expected {FORMAT}: written by another version of oppu_ray")
        if found != FORMAT:
            raise CorruptError(f"manifest: format {found!r}, expected {FORMAT}")
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
