"""The output of `prepare`: all users in one file, and an index of counts by which a worker reads only its own.

In: `UserHistory`s. Out: `users.jsonl` (one user a line), `index.json` (per user: role, place in the file, counts) and
the counts of labels among base users. The index is all that a driver ever sees: no text leaves a shard through it.

A reader might question that the fingerprint stays when a target is forgotten: no one else's adapter depends on them, so
the run goes on. It changes with a base user, from whom the task adapter under all others has learnt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oppu_ray.core import Item, UserHistory, UserSize
from oppu_ray.files import write_atomic
from oppu_ray.words import num_words

USERS_NAME, INDEX_NAME = "users.jsonl", "index.json"
Keep = Callable[[UserHistory], UserHistory | None]
"""What is to be kept of a user: the same, fewer items, or None."""


@dataclass(frozen=True)
class Entry:
    """One user's line in `users.jsonl`: bytes [offset, offset + length)."""

    role: str
    offset: int
    length: int
    size: UserSize


@dataclass(frozen=True)
class Index:
    """`fingerprint` is the SHA-256 of `users.jsonl` before any target was forgotten; `labels` are the base users'.

    `base_fingerprint` is of the base users' lines alone: what is made from them is named by nothing else.
    """

    entries: dict[str, Entry]
    labels: dict[str, int]
    fingerprint: str
    base_fingerprint: str

    def sizes(self, role: str) -> list[UserSize]:
        return [entry.size for entry in self.entries.values() if entry.role == role]


def write_prepared(folder: Path, users: Iterable[UserHistory], keep: Keep = lambda user: user) -> Index:
    """Write what `keep` leaves of `users` to `users.jsonl` and `index.json` in `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[bytes] = []
    entries: dict[str, Entry] = {}
    digest, base_digest = hashlib.sha256(), hashlib.sha256()
    labels: Counter[str] = Counter()
    offset = 0
    for user in users:
        kept = keep(user)
        line = b"" if kept is None else _line(kept)
        digest.update(_line(user) if user.role == "target" and kept != user else line)
        if user.role == "base":
            base_digest.update(line)
        if kept is not None:
            entries[user.user_id] = Entry(user.role, offset, len(line), _size(kept))
            labels.update(_labels(kept))
        lines.append(line)
        offset += len(line)
    index = Index(entries, dict(sorted(labels.items())), digest.hexdigest(), base_digest.hexdigest())
    write_atomic(folder / USERS_NAME, b"".join(lines))
    write_atomic(folder / INDEX_NAME, json.dumps(dataclasses.asdict(index)).encode())
    return index


def forget_prepared(folder: Path, keep: Keep) -> set[str]:
    """Leave only what `keep` says in a prepared folder; returns the roles of the users who changed.

    What goes is overwritten by blanks, so that no other line moves under a run that is reading. After a crash in the
    middle, call it again: the index, written last, still shows what is to be done.
    """
    index = read_index(folder)
    content = bytearray((folder / USERS_NAME).read_bytes())
    entries: dict[str, Entry] = {}
    changed = set[str]()
    labels: Counter[str] = Counter()
    for user_id, entry in index.entries.items():
        part = slice(entry.offset, entry.offset + entry.length)
        user = None if content[part].isspace() else _user(json.loads(content[part]))
        kept = keep(user) if user else None
        if kept != user:
            line = b"" if kept is None else _line(kept).rstrip()
            content[part] = line.ljust(entry.length - 1) + b"\n"
        if kept is None or _size(kept) != entry.size:
            changed.add(entry.role)
        if kept is not None:
            entries[user_id] = dataclasses.replace(entry, size=_size(kept))
            labels.update(_labels(kept))
    if changed:
        fingerprints = index.fingerprint, index.base_fingerprint
        if "base" in changed:
            parts = [content[e.offset : e.offset + e.length] for e in index.entries.values() if e.role == "base"]
            fingerprints = hashlib.sha256(content).hexdigest(), hashlib.sha256(b"".join(parts)).hexdigest()
        index = Index(entries, dict(sorted(labels.items())), *fingerprints)
        write_atomic(folder / USERS_NAME, bytes(content))
        write_atomic(folder / INDEX_NAME, json.dumps(dataclasses.asdict(index)).encode())
    return changed


def read_index(folder: Path) -> Index:
    """Read `index.json`.

    Raises:
        ValueError: Nothing was prepared in `folder`, or its index is damaged.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `prepare` with this config first")
    try:
        values = json.loads(path.read_text())
        entries = {
            user_id: Entry(entry["role"], entry["offset"], entry["length"], UserSize(**entry["size"]))
            for user_id, entry in values["entries"].items()
        }
        fingerprint = values["fingerprint"]
        return Index(entries, values["labels"], fingerprint, values.get("base_fingerprint", fingerprint))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index ({error!r}): run `prepare` again") from error


def read_users(folder: Path, index: Index, user_ids: Sequence[str]) -> list[UserHistory]:
    """Read just these users' lines, in this order; who is not there, forgotten before the index was read or since, is
    left out.

    Raises:
        ValueError: `users.jsonl` is not the file that the index was made for.
    """
    users = []
    with (folder / USERS_NAME).open("rb") as file:
        for user_id in user_ids:
            entry = index.entries.get(user_id)
            if entry is None:
                continue
            file.seek(entry.offset)
            line = file.read(entry.length)
            if line.isspace():
                continue
            try:
                values = json.loads(line)
                found = values["user_id"]
            except (ValueError, KeyError, TypeError):
                found = None
            if found != user_id:
                where = f"{folder / USERS_NAME}: byte {entry.offset}"
                raise ValueError(
                    f"{where}: expected the line of user {user_id!r}, found {found!r}; run `prepare` again"
                )
            users.append(_user(values))
    return users


def _line(user: UserHistory) -> bytes:
    return json.dumps(dataclasses.asdict(user), ensure_ascii=False).encode() + b"\n"


def _size(user: UserHistory) -> UserSize:
    return UserSize(user.user_id, len(user.items), sum(map(_num_words, user.items)), len(user.queries))


def _labels(user: UserHistory) -> Counter[str]:
    return Counter(item.label for item in user.items if user.role == "base" and item.label is not None)


def _user(values: dict[str, Any]) -> UserHistory:
    items, queries = (tuple(map(_item, values[part])) for part in ("items", "queries"))
    return UserHistory(values["user_id"], values["role"], items, queries)


def _item(values: dict[str, Any]) -> Item:
    return Item(**{**values, "context": tuple(values["context"]), "options": tuple(values["options"])})


def _num_words(item: Item) -> int:
    texts = (item.text, item.title, item.abstract, item.keywords, *item.context, *item.options)
    return sum(num_words(text) for text in texts if text)
