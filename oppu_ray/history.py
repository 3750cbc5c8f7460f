"""The arrows raw files -> `load_histories` -> `split_history`: checked users, and each user's past and later items.

In goes a `DataConfig`, out come `UserHistory` and `Rejected`. The one place where values are checked, whatever the
format. A reader might question that one bad item rejects its whole user: a history with a hole would train a different
adapter without anyone noticing, while a rejected user stands in `rejected.jsonl` with the value to correct.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig, TaskConfig
from oppu_ray.core import Item, Rejected, UserHistory
from oppu_ray.formats import RawUser, bounded_lines, read_users, short, user_name
from oppu_ray.tasks import Task, get_task, missing_fields, needed_field, normal_label, task_name
from oppu_ray.values import as_text, kind_of, parse_time

ROLES = ("target", "base")
TURN_TEXTS = ("value", "content", "text", "message", "body")
"""Where the text of a turn that is an object usually is."""
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
                raise _Bad(user.user_id, f"The user is there twice, first in {where}; this record is left out.")
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
    if not any(user.role == "target" for user in histories):
        raise ValueError(f"{data.path or data.hf_name or data.format}: {_why_no_targets(histories, rejected, row)}")
    return histories, rejected


def _why_no_targets(histories: Sequence[UserHistory], rejected: Sequence[Rejected], task: Task) -> str:
    if rejected:
        first = rejected[0]
        where = [f"line {first.line}"] * (first.line is not None) + [f"user {first.user_id!r}"] * bool(first.user_id)
        reasons = f"the first of {len(rejected)} rejected: {', '.join(where) or first.path}: {first.reason}"
    else:
        reasons = f"all {len(histories)} users have the role 'base'" if histories else "it holds no users"
    return f"no good {'target ' if histories else ''}user for {task.name} remains; {reasons}"


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
                items.append(_item(json.loads(line), number, task, ""))
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


def _reject(raw: RawUser, bad: _Bad) -> Rejected:
    return Rejected(raw.path, raw.line, user_name(raw.record.get("user_id")), short(bad.value), str(bad))


# --- checking one user


def _check_user(raw: RawUser, task: Task, data: DataConfig) -> _User:
    """The user of a record, items in time order; raises `_Bad` for whatever is wrong with it."""
    record = raw.record
    user_id = _text(record, "user_id", "The record")
    if not user_id:
        raise _Bad(user_id, "The record has no user_id; expected a text or a number.")
    user_id = unicodedata.normalize("NFC", user_id)  # as the vault does: two forms of one id are one user
    role = record.get("role")
    if role is not None and role not in ROLES:
        expected = "expected 'target', 'base' or none, or data.columns={role: null} where it is something else"
        raise _Bad(role, f"The role is {short(role)!r}; {expected}.")
    _check_task(record.get("task"), task)
    numbered = enumerate(_list(record, "history"), start=1)
    history = [_item(item, number, task, data.time_format) for number, item in numbered]
    if "queries" in record:
        queries = enumerate(_list(record, "queries"), start=len(history) + 1)
        later = [_item(item, number, task, data.time_format) for number, item in queries]
        past = history
    else:
        start = _query_start(record.get("query_start"), len(history))
        past, later = history[:start], history[start:]
    num_items = len(past) + len(later)
    if not num_items:
        raise _Bad([], "The history is empty.")
    if num_items < data.min_items:
        expected = f"expected at least {data.min_items} (data.min_items)"
        raise _Bad(num_items, f"The user has {num_items} item{'s' * (num_items > 1)}; {expected}.")
    seen: set[str] = set()
    for item in (*past, *later):
        if item.item_id in seen:
            raise _Bad(
                item.item_id, f"The item id {short(item.item_id)!r} is there twice; expected each once per user."
            )
        seen.add(item.item_id)
    past, later = _in_time_order(past), _in_time_order(later)
    if past and later and past[-1].time and later[0].time and parse_time(past[-1].time) > parse_time(later[0].time):
        reason = f"Item {short(past[-1].item_id)!r} of the past is later than the query {short(later[0].item_id)!r}"
        raise _Bad(past[-1].time, f"{reason} of {later[0].time}.")
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
        raise _Bad(name, f"The record's task is {short(name)!r}; expected {task.name!r}, the configured one.")


def _query_start(start: object, num_items: int) -> int:
    if start is None:
        return num_items
    if not isinstance(start, int) or isinstance(start, bool) or not 1 <= start <= num_items:
        raise _Bad(start, f"query_start is {short(start)}; expected a whole number from 1 to {num_items}, the items.")
    return start


def _item(raw: object, number: int, task: Task, time_format: str) -> Item:
    where = f"Item {number}"
    if not isinstance(raw, dict):
        raise _Bad(raw, f"{where} is {kind_of(raw)}; expected an object.")
    item_id = _text(raw, "id", where)
    if not item_id:
        raise _Bad(raw.get("id"), f"{where} has no id; expected a text or a number.")
    where = f"Item {short(item_id)!r}"
    label = _text(raw, "label", where)
    item = Item(
        item_id=item_id,
        time=_time(raw, where, time_format),
        text=_text(raw, "text", where) or "",
        label=normal_label(label, task.labels) if label else label,
        title=_text(raw, "title", where),
        abstract=_text(raw, "abstract", where),
        keywords=_text(raw, "keywords", where),
        context=_texts(raw, "context", where),
        options=_texts(raw, "options", where),
    )
    if field := needed_field(task, item):
        raise _Bad(raw.get(field), f"{where} has no {field}, which {task.name} needs in every item.")
    if task.labels and item.label is not None and item.label not in task.labels:
        near = difflib.get_close_matches(item.label, task.labels, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(task.labels)
        raise _Bad(item.label, f"{where} has the label {short(item.label)!r}; expected one of {known}.{hint}")
    if item.options and len(item.options) != 2:
        raise _Bad(raw["options"], f"{where} has {len(item.options)} options; expected two references.")
    return item


def _time(raw: dict[str, Any], where: str, time_format: str) -> str | None:
    """The time as it stands, or in ISO 8601 where `time_format` is needed to read it."""
    time = _text(raw, "time", where)
    if not time:
        return None
    try:
        moment = parse_time(time, time_format)
    except ValueError as error:
        raise _Bad(time, f"{where} has a time that cannot be read: {error}. data.time_format says how.") from None
    return moment.isoformat() if time_format else time


def _text(raw: dict[str, Any], field: str, where: str) -> str | None:
    """The field as clean text, None where it is absent, null or blank."""
    article = "an" if field in ("id", "abstract") else "a"
    return _clean(raw.get(field), f"{where} has {article} {field}") or None


def _texts(raw: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """The field's texts; one text is a list of one."""
    value = raw.get(field)
    parts = value if isinstance(value, list | tuple) else [value]
    for part in parts:
        if isinstance(part, dict) and part:
            texts = [key for key in TURN_TEXTS if key in part] or list(part)
            keys = f"data.columns.{field}={field}.{texts[0]}"
            raise _Bad(part, f"{where} has in {field} an object with {', '.join(part)}; expected texts: {keys}.")
    return tuple(text for part in parts if (text := _clean(part, f"{where} has in {field} a text")))


def _clean(value: object, what: str) -> str:
    try:
        text = as_text(value)
    except ValueError as error:
        raise _Bad(value, f"{what} that is {error}; expected a text or a number.") from None
    if text is None:
        return ""
    if "\0" in text:
        raise _Bad(text, f"{what} with a NUL character at position {text.index(chr(0))}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # The readers turn invalid bytes 0x80..0xff into U+DC80..U+DCFF; other surrogates stand escaped in the source.
        is_byte = 0xDC80 <= code <= 0xDCFF
        found = f"the byte 0x{code - 0xDC00:02x}, not UTF-8," if is_byte else f"the lone surrogate U+{code:04X}"
        hint = " Is the file in another encoding, such as Latin-1?" if is_byte else ""
        raise _Bad(text[error.start :], f"{what} with {found} at position {error.start}.{hint}") from None
    return text.strip()


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record.get(field)
    if not isinstance(value, list):
        raise _Bad(value, f"The record's {field} is {kind_of(value)}; expected a list of items.")
    return value


def _in_time_order(items: list[Item]) -> list[Item]:
    """Oldest first; items of one moment, or all where none has a time, stay in the source's order."""
    timeless = [item.item_id for item in items if not item.time]
    if timeless and len(timeless) < len(items):
        found = f"{len(timeless)} of {len(items)} items have no time, the first of them {short(timeless[0])!r}"
        raise _Bad(timeless[0], f"{found}; expected one in all or in none (data.columns={{time: null}} reads none).")
    return items if timeless else sorted(items, key=lambda item: parse_time(item.time or ""))


# --- giving out roles, choosing users


def _with_roles(users: list[_User], data: DataConfig) -> tuple[list[_User], list[Rejected]]:
    """Users with a role each, and those whose role is unclear."""
    if data.base_only:
        users = [replace(user, role=None) for user in users if user.role in ("base", None)]
    if any(user.role for user in users):
        reasons = {
            "both": "The user is target and base; expected one role.",
            None: "The user has no role, others have.",
        }
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
    """The user's history in its role, cut to the latest `max_items_per_user` items of the past.

    Queries that the source names must be questions with an answer. Of later items that we split off, those are asked
    that are; a target without any is trained and not evaluated.
    """
    past, later = user.items, user.later
    if user.role == "base":
        later = ()
    elif not user.past or len(user.items) < 2:
        raise _Bad(len(user.items), "A target needs at least one past item and one query; the user has not both.")
    elif later:
        past = user.past
    else:
        past, later = split_history(user.items, data.query_share, data.max_queries_per_user)
        later = tuple(item for item in later if not missing_fields(task, item))
        past = past if later else user.items  # nothing to ask, but something to learn from
    later = later[: data.first_queries or None]
    for query in later:
        if missing := missing_fields(task, query):
            what = f"which {task.name} needs in a query"
            raise _Bad(query.item_id, f"The query {short(query.item_id)!r} has no {' and no '.join(missing)}, {what}.")
    return UserHistory(user.user_id, user.role or "", past[-data.max_items_per_user :], later)
