"""Forget a user, or some of a user's items, and say so in a receipt that can be checked (arrow `vault -> nothing`).

In: a user id, maybe item ids, and folders outside the vault (runs, caches) that may speak of them. Out: a signed
`Receipt`, and the proof by scan. No other user's adapter changes or need be trained again: an adapter is a function of
the base, the task adapter, its user's own items and a seed (design decision D3), and its manifest lists those items.
Only a base user is in what others stand on: with one of them a run loses its task base, and must `adapt` again.

The audit log says what is to go before anything goes, so after a crash the same call goes on. `prepare` obeys it, and
leaves out again what the source still has. A reader might question that items stand there, and in a receipt, by keyed
hashes: they must not keep what was forgotten.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import mmap
import os
import secrets
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from oppu_ray.core import InputError, UserHistory, check_unicode
from oppu_ray.following import wait_for_followers
from oppu_ray.prepared import INDEX_NAME, USERS_NAME, Keep, forget_prepared, read_index, read_users
from oppu_ray.registry import Forgotten, HistoryChanged, UserHash, Version
from oppu_ray.vault import (
    CorruptError,
    Vault,
    disk_errors,
    remove,
    step,
    sync_folder,
    write_file,
)

Gone = Callable[[str], bool]
"""Whether an item is forgotten, by its id."""


BEYOND = ("backups and copies elsewhere", "memory and temporary files of other programs", "other machines' disks")
"""What no receipt proves."""


@dataclass(frozen=True)
class Receipt:
    """What was removed, when, where it was looked for, and how what is left hashes.

    Digests are keyed by the vault: a digest of a short text that anybody can compute tells the text.

    Args:
        items: Keyed hashes of the forgotten items; empty when the whole user was forgotten.
        removed: (path, digest before) of each removed or rewritten file, sorted. Paths in the vault are relative to the
            user's folder, all others to the folder in which the run's folder lies.
        before: Digest over all (path, digest) of the user before; `after`: of what is left of them.
        time: Unix seconds.
        needs_training: Adapter versions that had seen the items are gone; train the user again without them.
        public_key: Ed25519, hex, as is the `signature` over all other fields as sorted JSON.
        line: Of the audit log.
        checked: Where everything was removed: the vault, folders, processes that have dropped the user.
        silent: Processes that may hold copies, and did not say that they dropped them.
        not_checked: Where else something may be left.
    """

    receipt_id: str
    user_hash: str
    items: tuple[str, ...]
    removed: tuple[tuple[str, str], ...]
    before: str
    after: str
    time: float
    needs_training: bool
    public_key: str
    signature: str = ""
    line: int = 0
    checked: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()


def forget_user(vault: Vault, user: str, folders: Sequence[Path] = ()) -> Receipt:
    """Remove all of a user: registry rows first (no one can load them any more), then the key, then the files.

    In `folders` go: what is named by the user's hash, checkpoints they are in, their part of prepared histories, and
    every line of a `.jsonl[.gz]` file with their `user_id`, or with an answer of their adapter to another's query.
    Then it waits until every process that caches users' data has dropped the user (`following`), or for
    `following.WAIT_S`. After a crash in the middle, call it again.

    Raises:
        ValueError: No such user, or a file could not be removed.
    """
    user_hash = vault.user_hash(user)
    with disk_errors(user_hash, "forget"):
        is_spoken_of = _speaking(vault, user_hash, folders, None)  # asked of all, as it also fails before anything goes
        is_known = _has_anything(vault, user_hash) or user_hash in _forgotten(vault, user_hash)[0]
        if not (is_known or is_spoken_of):
            raise InputError(f"user {user_hash[:12]}: no such user")
        with vault.only_writer(user_hash) as is_alone:
            before = _inventory(vault, user_hash)
            line = step(vault.registry.delete_user, user_hash)
            vault.remove_files(user_hash)
        outside = [change for top in folders for change in _forget_outside(vault, user_hash, top, None, is_known)]
        places = _places(vault, line, folders, is_alone)
        return _receipt(vault, user_hash, line, (), before, before + outside, False, places)


def forget_items(vault: Vault, user: str, item_ids: Iterable[str], folders: Sequence[Path] = ()) -> Receipt:
    """Remove items from a user's history, and everything that was made from them.

    Adapter versions trained on them go (a version not trained on them takes over, if there is one), and so do running
    leases, profile and index, what is quarantined, and in `folders` what `forget_user` names, but for other items. It
    waits as `forget_user` does.

    Raises:
        ValueError: No such user or item, the history is corrupt, or a file could not be removed.
    """
    user_hash, items = vault.user_hash(user), frozenset(item_ids)
    check_unicode(f"user {user_hash[:12]}: item ids", items)
    hashes = {item: vault.item_hash(user_hash, item) for item in sorted(items)}
    folder = vault.user_folder(user_hash)
    with disk_errors(user_hash, "forget items of"):
        if unknown := _unknown_items(vault, user_hash, hashes, folders):
            raise InputError(f"user {user_hash[:12]}: has no item {min(unknown)!r}")
        begun = _begun(vault, user_hash)
        vault.read_history(UserHash(user_hash))  # raises for what cannot be read, as does the next: nothing is gone yet
        _speaking(vault, user_hash, folders, items.__contains__)
        with vault.only_writer(user_hash) as is_alone:
            seen = {row.version: _items_of(vault, row) for row in vault.registry.versions(user_hash)}
            gone = {version for version, ids in seen.items() if ids is None or ids & items}
            before = _inventory(vault, user_hash)
            line = step(vault.registry.delete_versions, user_hash, gone, list(hashes.values()))
            kept = seen.keys() - gone
            made_from_them = [path for path in folder.glob("adapters/*") if path.name not in kept]
            made_from_them += [*folder.glob("quarantine/*"), *folder.glob("blobs/*")]
            for path in made_from_them:
                remove(path)
            vault.remove_staged(user_hash)
            while vault.registry.has_user(user_hash):
                history = vault.history(UserHash(user_hash))
                for path in vault.unlisted_segments(folder):  # left by appends that were cut short
                    remove(path)
                with suppress(HistoryChanged):
                    vault.replace_history(user_hash, history, lambda item: item.item_id in items)
                    break
        outside = [change for top in folders for change in _forget_outside(vault, user_hash, top, items.__contains__)]
        after = set(_inventory(vault, user_hash))
        removed = [pair for pair in before if pair not in after] + outside
        # In a call that was cut short versions went, too.
        needs_training = bool(gone or begun.intersection(hashes.values()))
        items_hashed, places = tuple(sorted(hashes.values())), _places(vault, line, folders, is_alone)
        return _receipt(vault, user_hash, line, items_hashed, before, removed, needs_training, places)


def _unknown_items(vault: Vault, user_hash: str, hashes: dict[str, str], folders: Sequence[Path]) -> set[str]:
    """Which items are nowhere. The cheap places come first: a known item is found there.

    Args:
        hashes: Item id to its keyed hash.
    """
    left = set(hashes)
    with suppress(Forgotten):  # no such user in the vault
        held = vault.item_keys(vault.history(UserHash(user_hash)))
        left = {item for item in left if vault.item_key(user_hash, item) not in held}
    for row in vault.registry.versions(user_hash) if left else ():
        left -= _items_of(vault, row) or set()
    if left:
        begun = _begun(vault, user_hash)
        left = {item for item in left if hashes[item] not in begun}
    for top in folders if left else ():
        for _, user in _prepared(vault, user_hash, top):
            left -= {item.item_id for item in (*user.items, *user.queries)}
    return left


def _begun(vault: Vault, user_hash: str) -> set[str]:
    """Keyed hashes of the items whose forgetting was begun, and has no receipt: a crash came between."""
    done = {item for body in vault.registry.receipts(user_hash) for item in read_receipt(body).items}
    return _forgotten(vault, user_hash)[1].get(user_hash, set()) - done


def without_forgotten(vault: Vault) -> Keep:
    """For `prepare`: leaves out forgotten users, unless they were added to the vault again, and forgotten items."""
    users, items = _forgotten(vault)

    def keep(user: UserHistory) -> UserHistory | None:
        user_hash = _hash_of(vault, user.user_id)
        if user_hash in users and not vault.registry.has_user(user_hash):
            return None
        if theirs := items.get(user_hash):
            return _keep(vault, user_hash, user, lambda item_id: vault.item_hash(user_hash, item_id) in theirs)
        return user

    return keep


def _forgotten(vault: Vault, user_hash: str | None = None) -> tuple[set[str], dict[str, set[str]]]:
    """Whom the audit log says to forget, or to have forgotten: users, and by user the hashes of items."""
    users, items = set[str](), defaultdict[str, set[str]](set)
    for whose, hashes in vault.registry.forgettings(user_hash):
        if hashes is None:
            users.add(whose)
        else:
            items[whose].update(hashes)
    return users, items


def verify_receipt(
    vault: Vault, receipt: Receipt, folders: Sequence[Path] = (), canaries: Sequence[str] = ()
) -> list[str]:
    """Check a receipt's signature and scan for what it says is gone. Returns what is wrong.

    Empty means proven for the vault, its registry, the folders and the processes that follow the audit log, and for
    nothing else.

    Args:
        folders: Scanned beside the vault (runs, caches, logs).
        canaries: Texts that must be nowhere, such as the user id or lines of the forgotten history.
    """
    problems = [] if _is_signed(vault, receipt) else ["the signature is not this vault's, or the receipt was changed"]
    user_hash = receipt.user_hash
    hashes = set(receipt.items)
    is_gone = (lambda item: vault.item_hash(user_hash, item) in hashes) if hashes else None
    found = _speaking(vault, user_hash, folders, is_gone)
    problems += [f"{path}: speaks of the user" + " and of a forgotten item" * bool(hashes) for path in found]
    late = [one.name for one in vault.registry.followers() if one.seen < receipt.line]
    problems += [f"{name}: this process has not dropped the user" for name in late]
    half_written = [path for top in folders for path in _half_written(vault, top)]
    problems += [f"{path}: is half-written, and may speak of the user" for path in half_written]
    if receipt.items:
        held = {item.item_id for item in vault.read_history(UserHash(user_hash))}
        for row in vault.registry.versions(user_hash):
            held |= _items_of(vault, row) or set()
        if {vault.item_hash(user_hash, item) for item in held} & hashes:
            problems.append("a forgotten item is in the history or in the manifest of an adapter version")
    else:
        if num_rows := vault.registry.num_rows(user_hash):
            problems.append(f"the registry has {num_rows} rows of the user")
        named = [path for path in vault.root.rglob("*") if user_hash in path.name]
        problems += [f"{path}: is named by the user's hash" for path in named]
    vault.close()  # see `Vault._registry_file`: the scan opens every file
    paths = [*vault.root.rglob("*"), *(path for top in folders for path in _outside(vault, top))]
    problems += [f"{path}: holds a forgotten text" for path in _files_with(paths, needles_of(canaries))]
    return list(dict.fromkeys(problems))  # one folder may lie in another


def needles_of(texts: Iterable[str]) -> set[bytes]:
    """The bytes that texts are in files, our JSON's ways to write them included."""
    written = ((text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts)
    return {text.encode() for ways in written for text in ways}


def _has_anything(vault: Vault, user_hash: str) -> bool:
    """Whether the vault has a row or a file of the user."""
    paths = vault.user_folder(user_hash), vault.user_folder(user_hash, "keys"), *vault.root.glob(f"tmp/{user_hash}-*")
    return vault.registry.num_rows(user_hash) > 0 or any(map(os.path.lexists, paths))


@dataclass(frozen=True)
class _Places:
    """See `Receipt`."""

    checked: tuple[str, ...]
    silent: tuple[str, ...]
    not_checked: tuple[str, ...]


def _places(vault: Vault, line: int, folders: Sequence[Path], is_alone: bool) -> _Places:
    """Where everything is gone, once all processes have dropped the user or `following.WAIT_S` is over."""
    dropped, silent = wait_for_followers(vault.registry, line)
    checked = ["the vault", *(f"folder {top.name}" for top in folders), *(f"process {name}" for name in dropped)]
    not_checked = []
    if not is_alone:
        not_checked.append("files that a process has open which wrote to the vault and did not end")
    if not vault.registry.drop_old_pages():
        not_checked.append("old pages of the registry, which its database overwrites later")
    return _Places(tuple(checked), tuple(silent), (*not_checked, *BEYOND))


def _receipt(
    vault: Vault,
    user_hash: str,
    line: int,
    items: tuple[str, ...],
    before: list[tuple[str, str]],
    removed: list[tuple[str, str]],
    needs_training: bool,
    places: _Places,
) -> Receipt:
    signer = Ed25519PrivateKey.from_private_bytes(vault.derive_key("receipt"))
    after = _inventory(vault, user_hash)
    receipt = Receipt(
        receipt_id=secrets.token_hex(16),
        user_hash=user_hash,
        items=items,
        removed=tuple(sorted(removed)),
        before=_digest(vault, json.dumps(before).encode()),
        after=_digest(vault, json.dumps(after).encode()),
        time=time.time(),
        needs_training=needs_training,
        public_key=signer.public_key().public_bytes_raw().hex(),
        line=line,
        checked=places.checked,
        silent=places.silent,
        not_checked=places.not_checked,
    )
    receipt = replace(receipt, signature=signer.sign(_signed_part(receipt)).hex())
    step(vault.registry.add_receipt, receipt.receipt_id, user_hash, json.dumps(asdict(receipt), sort_keys=True))
    return receipt


def read_receipt(text: str) -> Receipt:
    """A receipt from its JSON, as kept in the registry or given to the user."""
    try:
        fields = json.loads(text)
        pairs = tuple((path, digest) for path, digest in fields["removed"])
        texts = {name: tuple(fields.get(name, ())) for name in ("items", "checked", "silent", "not_checked")}
        return Receipt(**{**fields, **texts, "removed": pairs})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"receipt {text[:40]!r}: not a receipt ({error!r})") from error


def _is_signed(vault: Vault, receipt: Receipt) -> bool:
    signer = Ed25519PrivateKey.from_private_bytes(vault.derive_key("receipt"))
    try:
        signer.public_key().verify(bytes.fromhex(receipt.signature), _signed_part(receipt))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_part(receipt: Receipt) -> bytes:
    fields = {**asdict(receipt), "signature": ""}
    if not receipt.line:  # made before receipts said where was looked
        for name in ("line", "checked", "silent", "not_checked"):
            del fields[name]
    return json.dumps(fields, sort_keys=True).encode()


def _inventory(vault: Vault, user_hash: str) -> list[tuple[str, str]]:
    """(path in the user's folder, digest) of every file, sorted."""
    folder = vault.user_folder(user_hash)
    if folder.is_symlink():  # put there by someone; what it points to is not ours to read or remove
        return []
    return _digests(vault, folder, folder)


def _digest(vault: Vault, data: bytes) -> str:
    return hmac.new(vault.derive_key("digest"), data, hashlib.sha256).hexdigest()


def _items_of(vault: Vault, row: Version) -> set[str] | None:
    """The items a version was trained on, or None where its manifest is corrupt."""
    try:
        return set(vault.read_manifest(vault.user_folder(row.user_hash) / "adapters" / row.version, row).item_ids)
    except CorruptError:
        return None


def _speaking(vault: Vault, user_hash: str, folders: Sequence[Path], is_gone: Gone | None) -> list[Path]:
    """What in `folders` speaks of the user, or of an item of theirs that is gone; answers by their adapter aside."""
    found = []
    for top in folders:
        found += [path for path, _ in _changes(vault, user_hash, top, is_gone, with_answers=False)]
        users = _prepared(vault, user_hash, top)
        found += [folder for folder, user in users if _keep(vault, user_hash, user, is_gone) != user]
    return found


def _forget_outside(
    vault: Vault, user_hash: str, top: Path, is_gone: Gone | None, with_answers: bool = True
) -> Iterator[tuple[str, str]]:
    """Remove or rewrite what speaks of the user in a folder outside the vault; yields (path, digest before).

    Each file is read again and written under the vault's lock of such files. The lock is not held for the whole walk:
    another user's forgetting must not wait for it.
    """
    base = Path(os.path.realpath(top)).parent
    with vault.alone():  # `prepare` holds it, too, and what it writes after this obeys the audit log
        for path in _half_written(vault, top):
            yield from _digests(vault, path, base)
            remove(path)
        for folder, user in _prepared(vault, user_hash, top):
            if user.role == "base" and _keep(vault, user_hash, user, is_gone) != user:
                # The task base has learnt from them, and so has every answer of the run. They go before the line that
                # tells so goes.
                for path in [*folder.parent.glob("adapt*"), *folder.parent.glob("evaluate*")]:
                    yield from _digests(vault, path, base)
                    remove(path)
        for folder in _prepared_folders(vault, top):
            before = [*_digests(vault, folder / USERS_NAME, base), *_digests(vault, folder / INDEX_NAME, base)]
            if step(forget_prepared, folder, lambda user: _keep(vault, user_hash, user, is_gone)):
                yield from before
    for path, _ in _changes(vault, user_hash, top, is_gone, with_answers):
        with vault.alone():
            for content in _change(vault, user_hash, path, is_gone, with_answers):
                yield from _digests(vault, path, base)
                if content is None:
                    remove(path)
                else:
                    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
                    write_file(partial, content)
                    step(os.rename, partial, path)
                    sync_folder(path.parent)


def _outside(vault: Vault, top: Path) -> Iterator[Path]:
    """All files and folders below `top`, each folder before what is in it, without links and without the vault.

    Where `top` is a run of a suite that links to the `prepare` of another run, that run's too.
    """
    for run in dict.fromkeys(map(os.path.realpath, (top, top / "prepare" / ".."))):
        for parent, folders, files in os.walk(run):
            folders[:] = sorted(name for name in folders if Path(parent, name) != vault.root)
            yield from (path for name in [*folders, *sorted(files)] if not (path := Path(parent, name)).is_symlink())


def _half_written(vault: Vault, top: Path) -> list[Path]:
    """Files with people's texts or names that a killed process left; whom they speak of cannot be told."""
    kinds = (".jsonl", ".index.json", ".result.json")
    partial = [path for path in _outside(vault, top) if path.name.startswith(".") and path.suffix == ".partial"]
    return [path for path in partial if any(kind in path.name for kind in kinds) and path.is_file()]


def _prepared_folders(vault: Vault, top: Path) -> list[Path]:
    found = [path.parent for path in _outside(vault, top) if path.name == INDEX_NAME]
    return [folder for folder in found if (folder / USERS_NAME).is_file()]


def _prepared(vault: Vault, user_hash: str, top: Path) -> Iterator[tuple[Path, UserHistory]]:
    """The user's histories in the runs below `top`, each with its folder."""
    for folder in _prepared_folders(vault, top):
        index = read_index(folder)
        theirs = [one for one in index.entries if _hash_of(vault, one) == user_hash]
        yield from ((folder, user) for user in read_users(folder, index, theirs))


def _changes(
    vault: Vault, user_hash: str, top: Path, is_gone: Gone | None, with_answers: bool
) -> Iterator[tuple[Path, bytes | None]]:
    """What speaks of the user below `top`, prepared histories aside: (path, new content, or None to remove it).

    `with_answers`: also what the user's adapters have answered, to whosever query, and what else was made from an item.
    """
    prepared = {folder / USERS_NAME for folder in _prepared_folders(vault, top)}
    for path in _outside(vault, top):
        if path not in prepared:
            yield from ((path, content) for content in _change(vault, user_hash, path, is_gone, with_answers))


def _change(
    vault: Vault, user_hash: str, path: Path, is_gone: Gone | None, with_answers: bool
) -> Iterator[bytes | None]:
    """What `_changes` yields of one path: nothing where it stays as it is."""
    is_all = is_gone is None or with_answers
    if is_all and (user_hash in path.name or _is_checkpoint_of(path, user_hash)):
        yield None
    elif not path.is_file():  # a folder, or gone with its folder
        return
    elif path.name == "result.json" and is_all:
        try:
            result = json.loads(_read(path))
        except (ValueError, RecursionError):
            return
        if (kept := _without_user(vault, user_hash, result)) != result:
            yield json.dumps(kept, indent=1).encode()
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        lines = _unpacked(path, _read(path)).splitlines(keepends=True)
        left = b"".join(_without(vault, user_hash, line, is_gone, with_answers) for line in lines)
        if left != b"".join(lines):
            yield gzip.compress(left, mtime=0) if path.suffix == ".gz" else left


def _is_checkpoint_of(path: Path, user_hash: str) -> bool:
    """Whether a folder holds the checkpoints of a pack with this user: without them it trains from its start again."""
    if path.parent.name != "checkpoints" or not path.is_dir():
        return False
    files = list(path.rglob("*"))
    return any(user_hash in file.name for file in files) or any(
        user_hash.encode() in _read(file) for file in files if file.suffix == ".json"
    )


def _read(path: Path) -> bytes:
    """A file's bytes; none if a run beside us has just removed it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _unpacked(path: Path, data: bytes) -> bytes:
    """A file's content, gzipped or not."""
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error}); mend or remove it, it may speak of anyone") from error


def _without_user(vault: Vault, user_hash: str, result: Any) -> Any:
    """A `result.json` without what its parts by user say of this one."""
    if not isinstance(result, dict):
        return result
    kept = {
        name: {user: value for user, value in part.items() if _hash_of(vault, user) != user_hash}
        for name, part in result.items()
        if name in ("failed", "history") and isinstance(part, dict)
    }
    return {**result, **kept}


def _without(vault: Vault, user_hash: str, line: bytes, is_gone: Gone | None, with_answers: bool) -> bytes:
    """The line as it is if of another user; else nothing, or, if only items are forgotten, the line without them."""
    try:
        record = json.loads(line)
        is_theirs = _hash_of(vault, record["user_id"]) == user_hash
    except (ValueError, KeyError, TypeError, RecursionError):
        return line
    if with_answers and "arm" in record and (is_theirs or record["arm"] == "swapped"):
        return b""
    if not is_theirs:
        return line
    if is_gone is None or any(is_gone(str(record[name])) for name in ("item_id", "query_id") if name in record):
        return b""
    changed = dict(record)
    for name in ("items", "queries"):
        if isinstance(items := record.get(name), list):
            changed[name] = [one for one in items if not (isinstance(one, dict) and is_gone(str(one.get("item_id"))))]
    return line if changed == record else json.dumps(changed, ensure_ascii=False).encode() + b"\n"


def _keep(vault: Vault, user_hash: str, user: UserHistory, is_gone: Gone | None) -> UserHistory | None:
    """What is left of a history when this user, or some items of theirs, are forgotten."""
    if _hash_of(vault, user.user_id) != user_hash:
        return user
    if is_gone is None:
        return None
    items, queries = (tuple(item for item in part if not is_gone(item.item_id)) for part in (user.items, user.queries))
    return replace(user, items=items, queries=queries) if items else None


def _hash_of(vault: Vault, user_id: str) -> str:
    """As the vault's, but "" for what can be no user's id."""
    try:
        return vault.user_hash(user_id)
    except ValueError:
        return ""


def _digests(vault: Vault, top: Path, base: Path) -> list[tuple[str, str]]:
    """(path relative to `base`, digest) of a file, or of all files in a folder, links aside."""
    paths = [top] if top.is_file() else [Path(parent, name) for parent, _, names in os.walk(top) for name in names]
    found = []
    for path in sorted(paths):
        with suppress(FileNotFoundError):  # a refused commit, or a run that is done with a pack, takes its files away
            if path.is_file() and not path.is_symlink():
                found.append((os.path.relpath(path, base), _digest(vault, path.read_bytes())))
    return found


def _files_with(paths: Iterable[Path], needles: set[bytes]) -> Iterator[Path]:
    for path in sorted(paths) if needles else ():
        if path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            data = _unpacked(path, content[:]) if path.suffix == ".gz" else content
            if any(data.find(needle) >= 0 for needle in needles):
                yield path
