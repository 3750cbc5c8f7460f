"""The arrows raw files -> `load_histories` -> `split_history`: checked users, and each user's past and later items.

In goes a `DataConfig`, out come `UserHistory` and `Rejected`. The one place where values are checked, whatever the
format. A reader might question that one bad item rejects its whole user: a history with a hole would train a different
adapter without anyone noticing, while a rejected user stands in `rejected.jsonl` with the value to correct.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig, TaskConfig
from oppu_ray.core import Item, Rejected, UserHistory
from oppu_ray.formats import RawUser, bounded_lines, read_users, short, user_name
from oppu_ray.tasks import Task, get_task, missing_fields, needed_field, task_name

ROLES = ("target", "base")
DEFAULT_TARGETS = 100
"""Targets of a source without roles where `data.num_targets` is 0: the paper's number, at most half of the users."""


class _Bad(ValueError):
    """A value that makes its user unusable, and why."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(reason)
        self.value = value


@dataclass(frozen=True)
class _User:
    """A checked user before roles are given out. `later` is empty where the source does not split."""

    raw: RawUser
    user_id: str
    role: str | None
    past: tuple[Item, ...]
    later: tuple[Item, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        return self.past + self.later


def load_histories(data: DataConfig, task: TaskConfig, seed: int) -> tuple[list[UserHistory], list[Rejected]]:
    """All usable users, targets first, and all that was left out.

    Targets are the users with that role in the source, or where it has no roles the `data.num_targets` most active;
    everybody else is a base user. `num_targets` and `num_base` limit how many are kept (0: all): the most active
    targets (or as `target_order` says), and base users drawn by `seed`. A target's queries are those
    the source names, or by time the last `query_share` of the items; a base user's items are past and later together.

    Raises:
        ValueError: The source cannot be read, or no good user remains.
    """
    row = get_task(task)
    users: dict[str, _User] = {}
    rejected: list[Rejected] = []
    for raw in read_users(data, row):
        if isinstance(raw, Rejected):
            rejected.append(raw)
            continue
        try:
            user = _check_user(raw, row, data)
            first = users.get(user.user_id)
            if first and first.role == user.role:
                where = f"line {first.raw.line}" if first.raw.line else first.raw.path
                raise _Bad(user.user_id, f"user_id is there twice, first in {where}; this record is left out")
            users[user.user_id] = replace(user, role="both") if first else user
        except _Bad as bad:
            rejected.append(_reject(raw, bad))
    good, others = _with_roles(list(users.values()), data)
    rejected.extend(others)
    histories = []
    for user in _choose(good, data, seed):
        try:
            histories.append(_history(user, row, data))
        except _Bad as bad:
            rejected.append(_reject(user.raw, bad))
    if not histories:
        reasons = f"; the first of {len(rejected)} rejected: {rejected[0]}" if rejected else "; it holds no users"
        raise ValueError(f"{data.path or data.hf_name or data.format}: no good user for {row.name} remains{reasons}")
    return histories, rejected


def split_history(
    items: Sequence[Item], query_share: float, max_queries: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Past and later items: later is the last `query_share`, rounded, at most `max_queries` (0: any); both have items.

    Args:
        items: Oldest first.

    Raises:
        ValueError: Fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"cannot split a history of {len(items)}; expected at least 2 items")
    num_later = min(max(1, round(len(items) * query_share)), len(items) - 1, max_queries or len(items))
    return tuple(items[:-num_later]), tuple(items[-num_later:])


def read_items(path: Path, task: Task) -> list[Item]:
    """Items to add to a history, oldest first: JSON lines of items as in our JSONL format, gzipped if it ends in .gz.

    Raises:
        ValueError: The file, line and value of the first thing that is wrong.
    """
    items = []
    for number, line in bounded_lines(path):
        try:
            if isinstance(line, Rejected):
                raise _Bad(line.value, line.reason)
            if line.strip():
                items.append(_item(json.loads(line), number, task))
        except _Bad as bad:
            raise ValueError(f"{path}: line {number}: {bad}; found {short(bad.value)}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: not valid JSON: {error}") from None
    try:
        return _in_time_order(items)
    except _Bad as bad:
        raise ValueError(f"{path}: {bad}; the first without is {short(bad.value)}") from None


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Writes `rejected.jsonl`: one JSON object a line with path, line, user_id, value and reason.

    The value only where its user is known: no one else's could be forgotten.
    """
    shown = (entry if entry.user_id else replace(entry, value="") for entry in rejected)
    path.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in shown), encoding="utf-8")


def parse_time(time: str) -> datetime.datetime:
    """The moment of a year, a month, a day, an ISO 8601 time or Unix seconds, in UTC where no zone is given.

    Raises:
        ValueError: It is none of these.
    """
    if parts := re.fullmatch(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?", time):
        year, month, day = (int(part or 1) for part in parts.groups())
        return datetime.datetime(year, month, day, tzinfo=datetime.UTC)
    if re.fullmatch(r"\d{9,10}", time):
        return datetime.datetime.fromtimestamp(int(time), tz=datetime.UTC)
    if re.fullmatch(r"\d{11,}", time):  # milliseconds, of which the next line makes a year long ago
        raise ValueError(f"{time}: expected Unix seconds")
    moment = datetime.datetime.fromisoformat(time)
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _reject(raw: RawUser, bad: _Bad) -> Rejected:
    return Rejected(raw.path, raw.line, user_name(raw.record.get("user_id")), short(bad.value), str(bad))


# --- checking one user


def _check_user(raw: RawUser, task: Task, data: DataConfig) -> _User:
    """The user of a record, items in time order; raises `_Bad` for whatever is wrong with it."""
    record = raw.record
    user_id = _text(record, "user_id", "")
    if not user_id:
        raise _Bad(user_id, "user_id is missing; expected a string")
    user_id = unicodedata.normalize("NFC", user_id)  # as the vault does: two forms of one id are one user
    role = record.get("role")
    if role is not None and role not in ROLES:
        raise _Bad(role, "role: expected 'target', 'base' or none")
    _check_task(record.get("task"), task)
    history = [_item(item, number, task) for number, item in enumerate(_list(record, "history"), start=1)]
    if "queries" in record:
        queries = _list(record, "queries")
        later = [_item(item, number, task) for number, item in enumerate(queries, start=len(history) + 1)]
        past = history
    else:
        start = _query_start(record.get("query_start"), len(history))
        past, later = history[:start], history[start:]
    if not past and not later:
        raise _Bad([], "the history is empty")
    if len(past) + len(later) < data.min_items:
        raise _Bad(len(past) + len(later), f"too few items; expected at least data.min_items = {data.min_items}")
    seen: set[str] = set()
    for item in (*past, *later):
        if item.item_id in seen:
            raise _Bad(item.item_id, "item id is there twice in the history")
        seen.add(item.item_id)
    past, later = _in_time_order(past), _in_time_order(later)
    if past and later and past[-1].time and later[0].time and parse_time(past[-1].time) > parse_time(later[0].time):
        reason = f"item {short(past[-1].item_id)} of the past is later than the query {short(later[0].item_id)}"
        raise _Bad(past[-1].time, f"{reason} of {later[0].time}")
    bare = replace(raw, record={"user_id": user_id})  # the raw history need not stay in memory
    return _User(bare, user_id, role, tuple(past), tuple(later))


def _check_task(name: object, task: Task) -> None:
    if name is None:
        return
    try:
        found = task_name(name) if isinstance(name, str) else None
    except ValueError:
        found = None
    if found != task.name:
        raise _Bad(name, f"the record's task is not the configured {task.name}")


def _query_start(start: object, num_items: int) -> int:
    if start is None:
        return num_items
    if not isinstance(start, int) or isinstance(start, bool) or not 1 <= start <= num_items:
        raise _Bad(start, f"query_start: expected a whole number from 1 to the number of items, {num_items}")
    return start


def _item(raw: object, number: int, task: Task) -> Item:
    where = f"item {number}"
    if not isinstance(raw, dict):
        raise _Bad(raw, f"{where}: expected an object")
    item_id = _text(raw, "id", where)
    if not item_id:
        raise _Bad(raw.get("id"), f"{where}: id is missing; expected a string")
    where = f"item {short(item_id)}"
    item = Item(
        item_id=item_id,
        time=_time(raw, where),
        text=_text(raw, "text", where) or "",
        label=_text(raw, "label", where),
        title=_text(raw, "title", where),
        abstract=_text(raw, "abstract", where),
        keywords=_text(raw, "keywords", where),
        context=_texts(raw, "context", where),
        options=_texts(raw, "options", where),
    )
    if field := needed_field(task, item):
        raise _Bad(raw.get(field), f"{where}: {field} is missing or empty; {task.name} needs it in every item")
    if task.labels and item.label is not None and item.label not in task.labels:
        raise _Bad(item.label, f"{where}: label is outside the set; expected one of {', '.join(task.labels)}")
    if item.options and len(item.options) != 2:
        raise _Bad(raw["options"], f"{where}: options: expected two references")
    return item


def _time(raw: dict[str, Any], where: str) -> str | None:
    value = raw.get("time")
    time = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(raw, "time", where)
    try:
        return time if not time or parse_time(time) else None
    except (ValueError, OverflowError):
        raise _Bad(value, f"{where}: time: expected a year, an ISO 8601 time or Unix seconds") from None


def _text(raw: dict[str, Any], field: str, where: str) -> str | None:
    """The field as clean text, None where it is absent, null or blank."""
    value = raw.get(field)
    if value is None:
        return None
    return _clean(value, f"{where}: {field}" if where else field) or None


def _texts(raw: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = raw.get(field)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _Bad(value, f"{where}: {field}: expected a list of strings")
    return tuple(text for part in value if (text := _clean(part, f"{where}: {field}")))


def _clean(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Bad(value, f"{where}: expected a string")
    if "\0" in value:
        raise _Bad(value, f"{where}: a NUL character at position {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # The readers turn invalid bytes 0x80..0xff into U+DC80..U+DCFF; other surrogates stand escaped in the source.
        is_byte = 0xDC80 <= code <= 0xDCFF
        what = f"invalid UTF-8 byte 0x{code - 0xDC00:02x}" if is_byte else f"lone surrogate U+{code:04X}"
        raise _Bad(value[error.start :], f"{where}: {what} at position {error.start}") from None
    return value.strip()


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record.get(field)
    if not isinstance(value, list):
        raise _Bad(value, f"{field}: {'missing' if value is None else 'wrong type'}; expected a list of items")
    return value


def _in_time_order(items: list[Item]) -> list[Item]:
    """Oldest first; items of one moment, or all where none has a time, stay in the source's order."""
    timeless = [item.item_id for item in items if not item.time]
    if timeless and len(timeless) < len(items):
        raise _Bad(timeless[0], f"{len(timeless)} of {len(items)} items have no time; expected one in all or in none")
    return items if timeless else sorted(items, key=lambda item: parse_time(item.time or ""))


# --- giving out roles, choosing users


def _with_roles(users: list[_User], data: DataConfig) -> tuple[list[_User], list[Rejected]]:
    """Users with a role each, and those whose role is unclear."""
    if data.base_only:
        users = [replace(user, role=None) for user in users if user.role in ("base", None)]
    if any(user.role for user in users):
        reasons = {"both": "the user is target and base; expected one role", None: "role is missing, others have one"}
        unclear = [user for user in users if user.role not in ROLES]
        rejected = [_reject(user.raw, _Bad(user.user_id, reasons[user.role])) for user in unclear]
        return [user for user in users if user.role in ROLES], rejected
    num_targets = data.num_targets or max(1, min(DEFAULT_TARGETS, len(users) // 2))
    targets = {user.user_id for user in _most_active(users)[:num_targets]}
    return [replace(user, role="target" if user.user_id in targets else "base") for user in users], []


def _most_active(users: list[_User]) -> list[_User]:
    return sorted(users, key=lambda user: (-len(user.items), user.user_id))


def _choose(users: list[_User], data: DataConfig, seed: int) -> list[_User]:
    targets = [user for user in users if user.role == "target"]
    base = sorted((user for user in users if user.role == "base"), key=lambda user: user.user_id)
    if data.target_order == "active":
        targets = _most_active(targets)
    elif data.target_order == "hash":
        targets = sorted(targets, key=lambda user: hashlib.sha256(user.user_id.encode()).hexdigest())
    random.Random(seed).shuffle(base)
    return targets[: data.num_targets or None] + base[: data.num_base or None]


def _history(user: _User, task: Task, data: DataConfig) -> UserHistory:
    """The user's history in its role, cut to the latest `max_items_per_user` items of the past."""
    past, later = user.items, user.later
    if user.role == "base":
        later = ()
    elif not user.past or len(user.items) < 2:
        raise _Bad(len(user.items), "too few items for a target; expected at least one past item and one query")
    elif later:
        past = user.past
    else:
        past, later = split_history(user.items, data.query_share, data.max_queries_per_user)
    later = later[: data.first_queries or None]
    for query in later:
        if missing := missing_fields(task, query):
            raise _Bad(query.item_id, f"the query lacks {', '.join(missing)}, which {task.name} needs in a query")
    return UserHistory(user.user_id, user.role or "", past[-data.max_items_per_user :], later)
