"""A downloaded export -> its files: the archive as downloaded, the folder it was unpacked to, or one file of it."""

from __future__ import annotations

import difflib
import html
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.formats.chats import Turn, joined, reply_items
from oppu_ray.formats.files import json_fault
from oppu_ray.formats.raw import RawUser, Users

EVERYONE = "*"
MAX_NAMES_SHOWN = 20


def files_of(path: Path) -> dict[str, Path | zipfile.Path]:
    """The files of an export by their names within it, in the order of the names.

    Raises:
        ValueError: It is a damaged zip archive.
    """
    if path.is_dir():
        return {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    if not zipfile.is_zipfile(path):
        return {path.name: path}
    try:
        archive = zipfile.ZipFile(path)
        return {name: zipfile.Path(archive, name) for name in sorted(archive.namelist()) if not name.endswith("/")}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a zip archive: {error}") from error


def find(path: Path, pattern: str, what: str) -> dict[str, Path | zipfile.Path]:
    """The export's files whose whole name, or its end behind a slash, matches; what is given as one file is taken.

    Raises:
        ValueError: There is none.
    """
    files = files_of(path)
    found = {name: file for name, file in files.items() if re.fullmatch(rf"(?:.*/)?(?:{pattern})", name)}
    if not found and list(files) == [path.name]:
        return files
    if not found:
        shown = ", ".join(list(files)[:8]) or "nothing"
        raise ValueError(f"{path}: expected {what}; it holds {shown}")
    return found


def read_bytes(file: Path | zipfile.Path) -> bytes:
    """The bytes of one file of an export.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return file.read_bytes()
    except (OSError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def read_json(file: Path | zipfile.Path, prefix: str = "") -> Any:
    """The JSON value of a file, behind what matches `prefix`.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        text = read_bytes(file).decode("utf-8-sig", "surrogateescape")
        return json.loads(re.sub(rf"\A\s*{prefix}", "", text, count=1) if prefix else text)
    except (RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON: {json_fault(error)}") from error


def plain(text: str) -> str:
    """Text without HTML: tags are white space, entities are characters."""
    return html.unescape(re.sub(r"<[a-zA-Z/][^<>]*>", " ", text)).strip()


def left_out(path: Path | str, counts: Mapping[str, int]) -> Iterator[Rejected]:
    """One entry for each kind of thing that nothing can be learnt from, with how many there are."""
    for what, num in counts.items():
        if num:
            yield Rejected(str(path), None, None, "", f"{num} {what} left out.")


def chat_users(
    path: Path, data: DataConfig, conversations: Iterable[list[Turn]], names: Mapping[str, str] | None = None
) -> Users:
    """The users of chats: whom `data.user_name` names, or everyone.

    Args:
        path: Shown in errors.
        conversations: Turns in time order, of one chat after another. `speaker` is what tells two people apart.
        names: Speaker -> the name that people see, where that is another.

    Raises:
        ValueError: `data.user_name` names nobody or two people; the message lists who there is.
    """
    names = names or {}
    histories: dict[str, list[dict[str, Any]]] = {}
    num_turns: Counter[str] = Counter()
    for turns in conversations:
        num_turns.update(turn.speaker for turn in turns if turn.text.strip())
        for speaker, item in reply_items(joined(turns)):
            histories.setdefault(speaker, []).append(item)
    if data.user_name == EVERYONE:
        for speaker, history in histories.items():
            yield RawUser(str(path), None, {"user_id": speaker, "history": history})
        return
    chosen = [one for one in num_turns if data.user_name and data.user_name in (one, names.get(one, one))]
    if len(chosen) != 1:
        raise ValueError(f"data.user_name: {path}: {_who_there_is(data.user_name, num_turns, names, len(chosen))}")
    yield RawUser(str(path), None, {"user_id": data.user_name, "history": histories.get(chosen[0], [])})


def _who_there_is(asked: str, num_turns: Counter[str], names: Mapping[str, str], num_found: int) -> str:
    shown = []
    for speaker, num in num_turns.most_common(MAX_NAMES_SHOWN):
        name = names.get(speaker, speaker)
        shown.append(f"{name} ({num} messages)" if name == speaker else f"{name} ({speaker}, {num} messages)")
    near = difflib.get_close_matches(asked, [*map(lambda one: names.get(one, one), num_turns)], 1) if asked else []
    hint = f"; did you mean {near[0]!r}?" if near and not num_found else ""
    if num_found:
        found = f"found {num_found} people called {asked!r}"
    else:
        found = f"found nobody called {asked!r}" if asked else "whose messages are to be learnt is not said"
    return f"{found}; expected one of {', '.join(shown) or 'nobody: no messages'}, or {EVERYONE} for everyone{hint}"
