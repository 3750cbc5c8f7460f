"""One user's folder <-> one file that they can take along (arrow `vault -> archive -> another vault`).

In: a user's current adapter version, history, profile and index. Out: a zip file whose `adapter/` is a plain PEFT
folder. A reader might question that entries are stored, not compressed, and that a compressed one is refused: so an
archive cannot be larger inside than outside; and as nothing is unpacked by name, a hostile path has nowhere to go.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import math
import os
import secrets
import zipfile
from dataclasses import replace
from pathlib import Path

from oppu_ray.adapter_files import CONFIG_NAME, TENSORS_NAME, encode_adapter
from oppu_ray.core import InputError
from oppu_ray.registry import Refused
from oppu_ray.vault import (
    BLOB_NAME,
    COMMIT_TTL_S,
    MANIFEST_NAME,
    CorruptError,
    Vault,
    check_items,
    decode_adapter,
    decode_items,
    decode_manifest,
    disk_errors,
    encode_items,
    encode_manifest,
    remove,
    sha256,
    step,
    sync_folder,
    write_file,
)

FORMAT = 1
MAX_BYTES = 2**32
INDEX_NAME, HISTORY_NAME, ADAPTER, BLOBS = "archive.json", "history.jsonl", "adapter/", "blobs/"
ADAPTER_FILES = (CONFIG_NAME, TENSORS_NAME)


def pack_user(vault: Vault, user: str) -> bytes:
    """Return everything of a user as an archive, made in memory. The same content gives the same bytes.

    Raises:
        ValueError: No such user, or something of theirs is corrupt.
    """
    user_hash = vault.user_hash(user)
    if not vault.registry.has_user(user_hash):
        raise InputError(f"user {user_hash[:12]}: no such user")
    entries = {HISTORY_NAME: encode_items(vault.read_history(user_hash))}
    for name in vault.blob_names(user_hash):
        entries[BLOBS + name] = vault.read_framed(user_hash, f"blobs/{name}")
    if vault.registry.current(user_hash) is not None:
        adapter, manifest = vault.load(user_hash, base_fingerprint=None)
        files = encode_adapter(adapter, f"user {user_hash[:12]}")
        manifest = replace(manifest, checksums={name: sha256(data) for name, data in files.items()})
        entries[MANIFEST_NAME] = encode_manifest(manifest)
        entries |= {ADAPTER + name: data for name, data in files.items()}
    index = {"format": FORMAT, "checksums": {name: sha256(data) for name, data in entries.items()}}
    entries[INDEX_NAME] = json.dumps(index, sort_keys=True, indent=1).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name), data)
    digest = hmac.new(vault.derive_key("digest"), packed.getvalue(), hashlib.sha256).hexdigest()
    vault.registry.record("export", user_hash, {"digest": digest})  # keyed: a short text could be guessed
    return packed.getvalue()


def export_user(vault: Vault, user: str, path: Path) -> None:
    """Write everything of a user into a new archive (mode 0600).

    Raises:
        ValueError: As `pack_user`, or `path` exists or cannot be written.
    """
    user_hash, packed = vault.user_hash(user), pack_user(vault, user)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with disk_errors(user_hash, "export"):
        try:
            write_file(partial, packed)
            step(os.link, partial, path)
        except FileExistsError:
            raise ValueError(f"{path}: exists already; an export makes a new file") from None
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def import_user(vault: Vault, user: str, path: Path, *, base_fingerprint: str | None) -> str | None:
    """Make a new user from an archive; returns the adapter's version here, or None if it holds no adapter.

    Who the archive is for is said by `user`, never by the archive. All of it is checked before anything is written, and
    it appears in the vault in one rename. `base_fingerprint` None takes any base (for a vault that has none yet).

    Raises:
        ValueError: The user exists, the archive is not one of ours, is damaged or hostile, or is for another base.
    """
    user_hash = vault.user_hash(user)
    entries = _read_entries(path)
    index = {name: sha256(data) for name, data in sorted(entries.items())}
    blobs = {name.removeprefix(BLOBS): data for name, data in entries.items() if name.startswith(BLOBS)}
    files = {name.removeprefix(ADAPTER): data for name, data in entries.items() if name.startswith(ADAPTER)}
    try:
        items = decode_items(entries[HISTORY_NAME])
        check_items(user_hash, items)
        manifest = decode_manifest(entries[MANIFEST_NAME]) if MANIFEST_NAME in entries else None
        if manifest is not None and base_fingerprint not in (None, manifest.base_fingerprint):
            raise ValueError(f"adapter is for base {manifest.base_fingerprint}, this is base {base_fingerprint}")
        if files.keys() != (set() if manifest is None else manifest.checksums.keys()):
            raise ValueError(f"has adapter files {sorted(files)}, its manifest names others")
        adapter = None if manifest is None else decode_adapter(files, manifest)
        rho = 0.0 if manifest is None else manifest.metrics.get("rho", 0.0)
        if not 0 <= rho < math.inf:
            raise ValueError(f"{MANIFEST_NAME}: metrics.rho is {rho}; expected a finite number from 0")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    holder = f"import-{sha256(json.dumps(index).encode())[:16]}"  # after a crash, the same import may go on at once
    lease = vault.registry.acquire_lease(user_hash, holder, COMMIT_TTL_S)
    stage = vault.root / "tmp" / f"{user_hash}-{secrets.token_hex(8)}"
    try:
        if vault.registry.has_user(user_hash):
            raise ValueError(f"user {user_hash[:12]}: exists already; an import makes a new user")
        with disk_errors(user_hash, "import"), vault.only_writer(user_hash) as is_alone:
            if not is_alone:
                raise Refused(f"user {user_hash[:12]}: another process writes files of the user; try again")
            vault.registry.check_lease(lease)  # the same archive may be imported twice at once
            vault.make_folder(stage)
            segments = [vault.write_segment(user_hash, 1, items, stage)] if items else []
            for name, data in blobs.items():
                vault.write_framed(stage, user_hash, f"blobs/{name}", data)
            row = None
            if adapter is not None and manifest is not None:
                # A run of the other vault means nothing here: it must not make a run of ours skip this user.
                lineage = replace(manifest, run_id="", parent=None)
                row = vault.stage_version(stage / "adapters" / "new", lease, 1, adapter, lineage)
                step(os.rename, stage / "adapters" / "new", stage / "adapters" / row.version)
                sync_folder(stage / "adapters")
            folder = vault.user_folder(user_hash)
            vault.make_folder(folder.parent)
            if folder.exists():  # left by a crash: no such user is registered, and we hold the lease
                remove(folder)
            step(os.rename, stage, folder)
            sync_folder(folder.parent)
            step(vault.registry.import_user, lease, segments, row, rho)
    finally:
        if stage.exists():
            remove(stage)
        vault.registry.release_lease(lease)
    return row.version if row else None


def _read_entries(path: Path) -> dict[str, bytes]:
    """The archive's entries by name, every name allowed and every checksum right."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CorruptError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        with zipfile.ZipFile(path) as archive:
            entries: dict[str, bytes] = {}
            for info in archive.infolist():
                if info.filename in entries or not _is_allowed(info.filename):
                    raise CorruptError(f"{path}: entry {info.filename[:80]!r} is doubled, or not one of an archive's")
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise CorruptError(f"{path}: entry {info.filename!r} is compressed or encrypted, expected stored")
                size -= info.file_size
                if size < 0:
                    raise CorruptError(f"{path}: entries are larger than the archive")
                entries[info.filename] = archive.read(info)
        index = json.loads(entries.pop(INDEX_NAME))
        if index["format"] != FORMAT:
            raise CorruptError(f"{path}: format {index['format']!r}, expected {FORMAT}")
        if index["checksums"] != {name: sha256(data) for name, data in entries.items()} or HISTORY_NAME not in entries:
            raise CorruptError(f"{path}: entries {sorted(entries)} do not match the checksums in {INDEX_NAME}")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise CorruptError(f"{path}: not a zip archive of a user: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: {INDEX_NAME} is missing or malformed ({error!r})") from error
    return entries


def _is_allowed(name: str) -> bool:
    if name.startswith(BLOBS):
        return BLOB_NAME.fullmatch(name.removeprefix(BLOBS)) is not None
    return name in (INDEX_NAME, HISTORY_NAME, MANIFEST_NAME, *(ADAPTER + file for file in ADAPTER_FILES))
