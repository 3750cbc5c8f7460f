"""Forget a user, or some of a user's items, and say so in a receipt that can be checked (arrow `vault -> nothing`).

In: a user id, maybe item ids, and folders outside the vault (runs, caches) that may speak of them. Out: a signed
`Receipt`, and the proof by scan. No other user's adapter changes or need be trained again: an adapter is a function of
the base, the task adapter, its user's own items and a seed (design decision D3), and its manifest lists those items.
A task adapter is shared: whose histories it was trained on must be asked of the run that made it.

A reader might question that a receipt names items by keyed hashes: it must not keep what was forgotten.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from oppu_ray.registry import UserHash, Version
from oppu_ray.vault import (
    CorruptError,
    Vault,
    disk_errors,
    encode_items,
    remove,
    sha256,
    step,
    sync_folder,
    write_file,
)


@dataclass(frozen=True)
class Receipt:
    """What was removed, when, and how what is left hashes.

    Args:
        items: Keyed hashes of the forgotten items; empty when the whole user was forgotten.
        removed: (path, SHA-256 before) of each removed or rewritten file, sorted.
        before: SHA-256 over all (path, SHA-256) of the user before; `after`: of what is left of them.
        time: Unix seconds.
        needs_training: Adapter versions that had seen the items are gone; train the user again without them.
        public_key: Ed25519, hex, as is the `signature` over all other fields as sorted JSON.
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


def forget_user(vault: Vault, user: str, folders: Sequence[Path] = ()) -> Receipt:
    """Remove all of a user: registry rows first (no one can load them any more), then the key, then the files.

    In `folders`, what is named by the user's hash goes, and every line of a `.jsonl[.gz]` file with their `user_id`.
    After a crash in the middle, call it again.

    Raises:
        ValueError: No such user, or a file could not be removed.
    """
    user_hash = vault.user_hash(user)
    folder, key = vault.user_folder(user_hash), vault.user_folder(user_hash, "keys")
    was_begun = any(entry.action == "forget" for entry in vault.registry.audit_log(user_hash))
    if not (vault.registry.has_user(user_hash) or folder.exists() or was_begun):
        raise ValueError(f"user {user_hash[:12]}: no such user")
    before = _inventory(vault, user_hash)
    with disk_errors(user_hash, "forget"):
        step(vault.registry.delete_user, user_hash)
        if key.exists():
            remove(key)
        if os.path.lexists(folder):  # one rename, so that a crash leaves no half folder under the user's name
            step(os.rename, folder, vault.root / "tmp" / f"{user_hash}-{secrets.token_hex(8)}")
            sync_folder(folder.parent)
        for path in vault.root.glob(f"tmp/{user_hash}-*"):
            remove(path)
        removed = before + [change for outside in folders for change in _forget_outside(vault, user_hash, outside)]
    return _receipt(vault, user_hash, (), before, removed, needs_training=False)


def forget_items(vault: Vault, user: str, item_ids: Iterable[str], folders: Sequence[Path] = ()) -> Receipt:
    """Remove items from a user's history, and everything that was made from them.

    Adapter versions trained on them go (a version not trained on them takes over, if there is one), and so do running
    leases, profile and index, what is quarantined, and in `folders` checkpoints and lines as in `forget_user`.

    Raises:
        ValueError: No such user or item, the history is corrupt, or a file could not be removed.
    """
    user_hash, items = vault.user_hash(user), frozenset(item_ids)
    folder = vault.user_folder(user_hash)
    rows = vault.registry.versions(user_hash)
    seen = {row.version: _items_of(vault, row) for row in rows}
    segments = vault.history_segments(user_hash)
    known = {item.item_id for segment in segments for item in segment}.union(*(ids for ids in seen.values() if ids))
    if unknown := sorted(items - known):
        raise ValueError(f"user {user_hash[:12]}: has no item {unknown[0]!r}")
    gone = {version for version, ids in seen.items() if ids is None or ids & items}
    before = _inventory(vault, user_hash)
    with disk_errors(user_hash, "forget items of"):
        step(vault.registry.delete_versions, user_hash, gone)
        kept = seen.keys() - gone
        made_from_them = [path for path in folder.glob("adapters/*") if path.name not in kept]
        made_from_them += [*folder.glob("quarantine/*"), *folder.glob("blobs/*")]
        for path in [*made_from_them, *vault.root.glob(f"tmp/{user_hash}-*")]:
            remove(path)
        outside = [change for top in folders for change in _forget_outside(vault, user_hash, top, items)]
        for number, segment in enumerate(segments, 1):  # last, so that after a crash the items are still found
            left = [item for item in segment if item.item_id not in items]
            if len(left) < len(segment):
                vault.replace_file(user_hash, f"history/{number:06d}.jsonl", encode_items(left))
    after = set(_inventory(vault, user_hash))
    removed = [pair for pair in before if pair not in after] + outside
    hashes = tuple(sorted(_item_hash(vault, user_hash, item) for item in items))
    return _receipt(vault, user_hash, hashes, before, removed, needs_training=bool(gone))


def verify_receipt(
    vault: Vault, receipt: Receipt, folders: Sequence[Path] = (), canaries: Sequence[str] = ()
) -> list[str]:
    """Check a receipt's signature and scan for what it says is gone. Returns what is wrong; empty means proven.

    Args:
        folders: Scanned beside the vault (runs, caches, logs).
        canaries: Texts that must be nowhere, such as the user id or lines of the forgotten history.
    """
    problems = [] if _is_signed(vault, receipt) else ["the signature is not this vault's, or the receipt was changed"]
    user_hash, tops = receipt.user_hash, [vault.root, *folders]
    if receipt.items:
        held = {item.item_id for item in vault.read_history(UserHash(user_hash))}
        for row in vault.registry.versions(user_hash):
            held |= _items_of(vault, row) or set()
        if {_item_hash(vault, user_hash, item) for item in held} & set(receipt.items):
            problems.append("a forgotten item is in the history or in the manifest of an adapter version")
    else:
        if num_rows := vault.registry.num_rows(user_hash):
            problems.append(f"the registry has {num_rows} rows of the user")
        named = [path for top in tops for path in top.rglob("*") if user_hash in path.name]
        problems += [f"{path}: is named by the user's hash" for path in named]
    needles = {text.encode() for text in canaries} | {json.dumps(text)[1:-1].encode() for text in canaries}
    problems += [f"{path}: holds a forgotten text" for top in tops for path in _files_with(top, needles)]
    return problems


def _receipt(
    vault: Vault,
    user_hash: str,
    items: tuple[str, ...],
    before: list[tuple[str, str]],
    removed: list[tuple[str, str]],
    needs_training: bool,
) -> Receipt:
    signer = Ed25519PrivateKey.from_private_bytes(vault.derive_key("receipt"))
    receipt = Receipt(
        receipt_id=secrets.token_hex(16),
        user_hash=user_hash,
        items=items,
        removed=tuple(sorted(removed)),
        before=_digest(before),
        after=_digest(_inventory(vault, user_hash)),
        time=time.time(),
        needs_training=needs_training,
        public_key=signer.public_key().public_bytes_raw().hex(),
    )
    receipt = replace(receipt, signature=signer.sign(_signed_part(receipt)).hex())
    step(vault.registry.add_receipt, receipt.receipt_id, user_hash, json.dumps(asdict(receipt), sort_keys=True))
    return receipt


def read_receipt(text: str) -> Receipt:
    """A receipt from its JSON, as kept in the registry or given to the user."""
    try:
        fields = json.loads(text)
        pairs = tuple((path, digest) for path, digest in fields["removed"])
        return Receipt(**{**fields, "items": tuple(fields["items"]), "removed": pairs})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"receipt {text[:40]!r}: not a receipt ({error!r})") from error


def _is_signed(vault: Vault, receipt: Receipt) -> bool:
    signer = Ed25519PrivateKey.from_private_bytes(vault.derive_key("receipt"))
    try:
        signer.public_key().verify(bytes.fromhex(receipt.signature), _signed_part(receipt))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_part(receipt: Receipt) -> bytes:
    return json.dumps({**asdict(receipt), "signature": ""}, sort_keys=True).encode()


def _inventory(vault: Vault, user_hash: str) -> list[tuple[str, str]]:
    """(path in the user's folder, SHA-256) of every file, sorted."""
    folder = vault.user_folder(user_hash)
    if folder.is_symlink():  # put there by someone; what it points to is not ours to read or remove
        return []
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [(str(path.relative_to(folder)), sha256(path.read_bytes())) for path in files]


def _digest(inventory: list[tuple[str, str]]) -> str:
    return sha256(json.dumps(inventory).encode())


def _items_of(vault: Vault, row: Version) -> set[str] | None:
    """The items a version was trained on, or None where its manifest cannot be read."""
    try:
        return set(vault.read_manifest(vault.user_folder(row.user_hash) / "adapters" / row.version, row).item_ids)
    except (CorruptError, OSError):
        return None


def _item_hash(vault: Vault, user_hash: str, item_id: str) -> str:
    return hmac.new(vault.derive_key("item"), f"{user_hash}/{item_id}".encode(), hashlib.sha256).hexdigest()


def _forget_outside(
    vault: Vault, user_hash: str, top: Path, items: frozenset[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Remove or rewrite what speaks of the user in a folder outside the vault; yields (path, SHA-256 before)."""
    for path in sorted(top.rglob("*")):
        if path.is_symlink() or not path.exists():  # gone with its folder
            continue
        if user_hash in path.name:
            for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
                yield str(file), sha256(file.read_bytes())
            remove(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            data = path.read_bytes()
            is_packed = path.suffix == ".gz"
            lines = (gzip.decompress(data) if is_packed else data).splitlines(keepends=True)
            kept = b"".join(_without(vault, user_hash, line, items) for line in lines)
            if kept != b"".join(lines):
                partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
                write_file(partial, gzip.compress(kept, mtime=0) if is_packed else kept)
                os.chmod(partial, path.stat().st_mode)
                step(os.rename, partial, path)
                sync_folder(path.parent)
                yield str(path), sha256(data)


def _without(vault: Vault, user_hash: str, line: bytes, items: frozenset[str] | None) -> bytes:
    """The line as it is if of another user; else nothing, or, if only `items` are forgotten, the line without them."""
    try:
        record = json.loads(line)
        is_theirs = vault.user_hash(record["user_id"]) == user_hash
    except (ValueError, KeyError, TypeError):
        return line
    if not is_theirs:
        return line
    if items is None or record.get("item_id") in items or record.get("query_id") in items:
        return b""
    changed = dict(record)
    for name in ("items", "queries"):
        if name in record:
            changed[name] = [item for item in record[name] if item.get("item_id") not in items]
    return line if changed == record else json.dumps(changed, ensure_ascii=False).encode() + b"\n"


def _files_with(top: Path, needles: set[bytes]) -> Iterator[Path]:
    for path in sorted(top.rglob("*")):
        if not needles or path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            data = gzip.decompress(content[:]) if path.suffix == ".gz" else content
            if any(data.find(needle) >= 0 for needle in needles):
                yield path
