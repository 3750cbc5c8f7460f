"""What a reader yields: one user's record as read, or why a part of the source was left out."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oppu_ray.core import Rejected
from oppu_ray.values import as_text

MAX_VALUE_CHARS = 80
MAX_ID_CHARS = 1024  # more than any user id that the vault takes, before it is normalised
ITEM_FIELDS = ("id", "time", "text", "label", "title", "abstract", "keywords", "context", "options")


@dataclass(frozen=True)
class RawUser:
    """One user's record as read, unchecked: keys of our JSONL, or `queries` as a list in place of `query_start`."""

    path: str
    line: int | None
    record: dict[str, Any]


Users = Iterator[RawUser | Rejected]


def short(value: object, max_chars: int = MAX_VALUE_CHARS) -> str:
    """`value` as printable text of at most `max_chars` characters, safe to write as UTF-8."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text[: 2 * max_chars].replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def user_name(user_id: object) -> str | None:
    """A user's id for `Rejected`: whole, as forgetting looks for it; None where there is none."""
    try:
        name = as_text(user_id)
    except ValueError:
        name = short(user_id, MAX_ID_CHARS)
    return None if name is None else short(name, MAX_ID_CHARS).strip() or None


def same_user(user_id: str) -> str:
    """The id by which rows are put together: without white space around it, spelt as the vault does (NFC)."""
    return unicodedata.normalize("NFC", user_id.strip())
