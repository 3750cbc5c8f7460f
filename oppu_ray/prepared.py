"""The output of `prepare`: all users in one file, and an index of counts by which a worker reads only its own.

In: `UserHistory`s. Out: `users.jsonl` (one user a line), `index.json` (per user: role, place in the file, counts) and
the counts of labels among base users. The index is all that a driver ever sees: no text leaves a shard through it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oppu_ray.core import Item, UserHistory, UserSize
from oppu_ray.files import write_atomic


@dataclass(frozen=True)
class Entry:
    """One user's line in `users.jsonl`: bytes [offset, offset + length)."""

    role: str
    offset: int
    length: int
    size: UserSize


@dataclass(frozen=True)
class Index:
    """`fingerprint` is the SHA-256 of `users.jsonl`; `labels` counts the base users' labels."""

    entries: dict[str, Entry]
    labels: dict[str, int]
    fingerprint: str

    def sizes(self, role: str) -> list[UserSize]:
        return [entry.size for entry in self.entries.values() if entry.role == role]


def write_prepared(folder: Path, users: Iterable[UserHistory]) -> Index:
    """Write `users.jsonl` and `index.json` in `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[bytes] = []
    entries: dict[str, Entry] = {}
    labels: Counter[str] = Counter()
    offset = 0
    for user in users:
        line = json.dumps(dataclasses.asdict(user), ensure_ascii=False).encode() + b"\n"
        size = UserSize(user.user_id, len(user.items), sum(map(_num_words, user.items)), len(user.queries))
        entries[user.user_id] = Entry(user.role, offset, len(line), size)
        lines.append(line)
        offset += len(line)
        if user.role == "base":
            labels.update(item.label for item in user.items if item.label is not None)
    content = b"".join(lines)
    index = Index(entries, dict(sorted(labels.items())), hashlib.sha256(content).hexdigest())
    write_atomic(folder / "users.jsonl", content)
    write_atomic(folder / "index.json", json.dumps(dataclasses.asdict(index)).encode())
    return index


def read_index(folder: Path) -> Index:
    """Read `index.json`.

    Raises:
        ValueError: Nothing was prepared in `folder`.
    """
    path = folder / "index.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `prepare` with this config first")
    values = json.loads(path.read_text())
    entries = {
        user_id: Entry(entry["role"], entry["offset"], entry["length"], UserSize(**entry["size"]))
        for user_id, entry in values["entries"].items()
    }
    return Index(entries, values["labels"], values["fingerprint"])


def read_users(folder: Path, index: Index, user_ids: Sequence[str]) -> list[UserHistory]:
    """Read just these users' lines.

    Raises:
        ValueError: A user was not prepared, or `users.jsonl` is not the file that the index was made for.
    """
    if unknown := [user_id for user_id in user_ids if user_id not in index.entries]:
        raise ValueError(
            f"user {unknown[0]!r} is not in {folder / 'index.json'}: run `prepare` with their history first"
        )
    users = []
    with (folder / "users.jsonl").open("rb") as file:
        for user_id in user_ids:
            entry = index.entries[user_id]
            file.seek(entry.offset)
            try:
                values = json.loads(file.read(entry.length))
                found = values["user_id"]
            except (ValueError, KeyError, TypeError):
                found = None
            if found != user_id:
                where = f"{folder / 'users.jsonl'}: byte {entry.offset}"
                raise ValueError(
                    f"{where}: expected the line of user {user_id!r}, found {found!r}; run `prepare` again"
                )
            items, queries = (tuple(map(_item, values[part])) for part in ("items", "queries"))
            users.append(UserHistory(values["user_id"], values["role"], items, queries))
    return users


def _item(values: dict[str, Any]) -> Item:
    return Item(**{**values, "context": tuple(values["context"]), "options": tuple(values["options"])})


def _num_words(item: Item) -> int:
    texts = (item.text, item.title, item.abstract, item.keywords, *item.context, *item.options)
    return sum(len(text.split()) for text in texts if text)
