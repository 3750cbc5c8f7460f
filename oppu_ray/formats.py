"""The arrow raw files -> raw users: one reader per source format, each giving users in the shape of our own JSONL.

In goes a `DataConfig`, out come `RawUser` records (not yet checked: `history` does that once for all formats) and
`Rejected` lines. A reader might question the hand-made loops: a record is read into memory only up to
`MAX_RECORD_BYTES`, so that one broken 100 MB line costs 16 MiB and one line of `rejected.jsonl`.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
import re
import reprlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.files import fetch_wheel, oppu_home
from oppu_ray.hub import split_revision
from oppu_ray.tasks import Task

MAX_RECORD_BYTES = 16 * 2**20
MAX_VALUE_CHARS = 80
MAX_ID_CHARS = 1024  # more than any user id that the vault takes, before it is normalised
CHUNK = 2**20
CHITCHAT = "chitchat-dataset==0.9.0"
CHITCHAT_TURNS = 3
ITEM_FIELDS = ("id", "time", "text", "label", "title", "abstract", "keywords", "context", "options")
TABLE_FIELDS = ("user_id", "role", *ITEM_FIELDS)

PROFILE_FIELDS = {
    "citation": {"text": "title", "abstract": "abstract", "title": "citation"},
    "news_categorize": {"text": "text", "title": "title", "label": "category"},
    "movie_tagging": {"text": "description", "label": "tag"},
    "product_rating": {"text": "text", "label": "score"},
    "news_headline": {"text": "text", "title": "title"},
    "scholarly_title": {"text": "abstract", "title": "title"},
    "email_subject": {"text": "text", "title": "title"},
    "tweet_paraphrase": {"text": "text"},
}
"""LaMP's name of each of our item fields, by task. `citation` is in the OPPU archive only."""

QUESTIONS = {
    "citation": r'title "(?P<text>.*)", which reference is related\?.*?\[1\]: "(?P<first>.*)" \[2\]: "(?P<second>.*)"$',
    "news_categorize": r"categories: \[.*?\]\s*article: (?P<text>.*)$",
    "movie_tagging": r"tags: \[.*?\]\s*description: (?P<text>.*)$",
    "product_rating": r"without further explanation\. review: (?P<text>.*)$",
    "news_headline": r"headline for the following article: (?P<text>.*)$",
    "scholarly_title": r"title for the following abstract of a paper: (?P<text>.*)$",
    "email_subject": r"subject for the following email: (?P<text>.*)$",
    "tweet_paraphrase": r"following tweet without any explanation before or after it: (?P<keywords>.*)$",
}
"""How a LaMP question holds the query's fields, by task."""

ODD_TASK_IDS = {"movie_tagging": ("LaMP_2", "LaMP_8"), "news_categorize": ("LaMP_2",)}
"""Task ids of published label files that are not the task's own: LaMP's re-used LaMP_2, and the OPPU archive's."""


@dataclass(frozen=True)
class RawUser:
    """One user's record as read, unchecked: keys of our JSONL, or `queries` as a list in place of `query_start`."""

    path: str
    line: int | None
    record: dict[str, Any]


def read_users(data: DataConfig, task: Task) -> Iterator[RawUser | Rejected]:
    """Every user of the source in its order; what cannot be read at all comes as `Rejected`.

    Args:
        data: `format` is one of

            - jsonl: `path` is a file of one record a line, gzipped if it ends in .gz: {"user_id", "history": [item]}
              and optionally "task", "role" ("target" or "base") and "query_start" (index of the first query). An item
              is an object with the fields of `ITEM_FIELDS` that its task needs; other keys are ignored.
            - lamp: LaMP's official files. User split: `path` is the folder with `train_questions.json`,
              `train_outputs.json`, `dev_questions.json` and `dev_outputs.json`; train users are base, dev users are
              targets. Time split (the same users in all files): `path` is one questions file and `outputs_path` its
              golds; no roles, so the most active users become targets.
            - oppu: `path` is the archive's folder of the task; users' roles follow from the file.
            - hf: `hf_name` is a dataset of the hub or a local folder, "name:config" where it has configurations,
              and "name@revision" for a revision of its own.
            - table: `path` is a .csv or .parquet file. Rows are items; `columns` maps our field names to the file's.
            - chitchat: `path` is the chitchat-dataset wheel, fetched from PyPI where empty.
        task: Says how to read LaMP's questions.

    Raises:
        ValueError: Unknown format, missing file, or a file whose top level is not what the format says.
    """
    if data.format == "hf":
        return _read_hf(data)
    if data.format == "chitchat":
        return _read_chitchat(Path(data.path) if data.path else fetch_wheel(CHITCHAT, oppu_home() / "wheels"))
    readers = {"jsonl": _read_jsonl, "table": _read_table, "lamp": _read_lamp, "oppu": _read_oppu}
    if not data.path or not Path(data.path).exists():
        raise ValueError(f"data.path: {data.path!r} does not exist; format {data.format!r} needs it")
    return readers[data.format](data, task)


def short(value: object, max_chars: int = MAX_VALUE_CHARS) -> str:
    """`value` as printable text of at most `max_chars` characters, safe to write as UTF-8."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text[: 2 * max_chars].replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def user_name(user_id: object) -> str | None:
    """A user's id for `Rejected`: whole, as forgetting looks for it; None where there is none."""
    return None if user_id is None else short(user_id, MAX_ID_CHARS).strip()


# --- JSONL


def _read_jsonl(data: DataConfig, task: Task) -> Iterator[RawUser | Rejected]:
    for line_number, line in bounded_lines(Path(data.path)):
        if isinstance(line, Rejected):
            yield line
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            reason = "NUL byte in the line" if "\0" in line else f"not valid JSON: {_json_fault(error)}"
            yield Rejected(data.path, line_number, _guess_user(line), short(line), reason)
            continue
        yield _raw_user(data.path, line_number, record)


def _raw_user(path: str, line: int | None, record: object) -> RawUser | Rejected:
    if isinstance(record, dict):
        return RawUser(path, line, record)
    return Rejected(path, line, None, short(record), f"expected an object, got {_type(record)}")


def bounded_lines(path: Path) -> Iterator[tuple[int, str | Rejected]]:
    """(line number from 1, line) of a text file, plain or gzipped; a line over the limit is skipped, not held.

    Invalid UTF-8 bytes arrive as lone surrogates, so that the check of the text can name the user they belong to.
    """
    number = 0
    with _open(path) as stream:
        while True:
            number += 1
            try:
                line = stream.readline(MAX_RECORD_BYTES + 1)
                if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    size = len(line)
                    while (more := stream.readline(2**20)) and not more.endswith(b"\n"):
                        size += len(more)
                    head = line[:4096].decode("utf-8", "surrogateescape")
                    reason = f"line of {size + len(more)} bytes; expected at most {MAX_RECORD_BYTES}"
                    yield number, Rejected(str(path), number, _guess_user(head), short(head), reason)
                    continue
            except (EOFError, OSError, zlib.error) as error:
                yield number, Rejected(str(path), number, None, "", f"unreadable from here on: {error}")
                return
            if not line:
                return
            yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8", "surrogateescape")


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _guess_user(text: str) -> str | None:
    """The user id in the first characters of a record that cannot be parsed, to name it in the error."""
    found = re.search(r'"user_id"\s*:\s*(?:"([^"\\]{1,1024})"|(\d{1,20}))', text[:4096])
    return user_name(found[1] or found[2]) if found else None


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# --- LaMP's official files


def _read_lamp(data: DataConfig, task: Task) -> Iterator[RawUser | Rejected]:
    _check_lamp_task(task, data.format)
    path = Path(data.path)
    if path.is_dir():
        for part, role in (("train", "base"), ("dev", "target")):
            yield from _read_questions(path / f"{part}_questions.json", path / f"{part}_outputs.json", role, task)
    else:
        yield from _read_questions(path, Path(data.outputs_path), None, task)


def _read_questions(questions: Path, outputs: Path, role: str | None, task: Task) -> Iterator[RawUser | Rejected]:
    """One user per `user_id` (files without it: per question); questions and profiles of a user are put together."""
    golds = _read_golds(outputs, task)
    users: dict[str, dict[str, Any]] = {}
    profiles: dict[str, set[str]] = {}
    for question in _json_array(questions):
        if isinstance(question, Rejected):
            yield question
            continue
        user_id = _as_text(question.get("user_id", question.get("id")))
        try:
            if not isinstance(user_id, str):
                raise ValueError(f"user_id: expected a string, got {_type(user_id)}")
            query = _query(question, golds.get(str(question.get("id"))), task)
            items = [_profile_item(item, task) for item in _a_list(question, "profile")]
        except ValueError as error:
            yield Rejected(str(questions), None, user_name(user_id), short(question.get("input", "")), str(error))
            continue
        user = users.setdefault(user_id, {"user_id": user_id, "history": [], "queries": []})
        if role:
            user["role"] = role
        seen = profiles.setdefault(user_id, set())
        for item in items:
            # Each question of a user carries a copy of the profile, under ids of its own.
            content = json.dumps([item.get(field) for field in ITEM_FIELDS[1:]])
            if content not in seen:
                seen.add(content)
                user["history"].append(item)
        user["queries"].append(query)
    for user in users.values():
        yield RawUser(str(questions), None, user)


def _read_golds(path: Path, task: Task) -> dict[str, Any]:
    """Gold by question id from a file {"task", "golds": [{"id", "output"}]}."""
    try:
        with _open(path) as stream:
            content = json.load(stream)
        golds = {str(gold["id"]): gold["output"] for gold in content["golds"]}
        found = str(content.get("task", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zlib.error) as error:
        what = f'data.outputs_path: {path}: expected {{"task", "golds": [{{"id", "output"}}]}}'
        raise ValueError(f"{what}: {error!r}") from error
    if found and found not in ODD_TASK_IDS.get(task.name, ()) and found.replace("_", "-").lower() != task.lamp.lower():
        raise ValueError(f"{path}: golds of task {found!r}; expected {task.lamp.replace('-', '_')} for {task.name}")
    return golds


def _query(question: dict[str, Any], gold: object, task: Task) -> dict[str, Any]:
    """Our item of a LaMP question: its fields from the question's text, its target from the gold."""
    name, text = short(question.get("id")), question.get("input")
    found = re.search(QUESTIONS[task.name], text.strip(), re.DOTALL) if isinstance(text, str) else None
    if not found:
        raise ValueError(f"question {name} is not one of {task.lamp}; expected input like /{QUESTIONS[task.name]}/")
    if gold is None:
        raise ValueError(f"question {name} has no gold; expected its id in the outputs file")
    query: dict[str, Any] = {"id": _as_text(question.get("id")), **found.groupdict(), task.target: _as_text(gold)}
    if task.name == "citation":
        query["options"] = [query.pop("first"), query.pop("second")]
    return query


def _profile_item(item: object, task: Task) -> dict[str, Any]:
    """Our item of a LaMP profile item. Its id gets a prefix: a question of the same user may have the same one."""
    if not isinstance(item, dict):
        raise ValueError(f"profile item {short(item)}: expected an object, got {_type(item)}")
    fields = {ours: _as_text(item.get(theirs)) for ours, theirs in PROFILE_FIELDS[task.name].items()}
    return {"id": f"profile-{item.get('id')}", "time": _as_text(item.get("date")), **fields}


def _check_lamp_task(task: Task, source: str) -> None:
    if task.name not in PROFILE_FIELDS:
        known = ", ".join(PROFILE_FIELDS)
        raise ValueError(f"data.format {source!r} holds LaMP's tasks only; expected one of {known}, got {task.name!r}")


def _a_list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key}: expected a list, got {_type(value)}")
    return value


def _as_text(value: object) -> Any:
    """Numbers and dates as text (4.0 as "4"), for sources that are not strict about types; all else as it is."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _json_array(path: Path) -> Iterator[dict[str, Any] | Rejected]:
    """The objects of a file that is one JSON list, one at a time; a broken one is `Rejected` and ends the file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a JSON list")
    with _open(path) as binary:
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape")
        text = _read_more(stream, CHUNK)
        if not text.lstrip().startswith("["):
            raise ValueError(f"{path}: expected a JSON list, it starts with {short(text[:MAX_VALUE_CHARS])!r}")
        decoder, start, number = json.JSONDecoder(), text.index("[") + 1, 1
        while True:
            while start < len(text) and text[start] in ", \t\r\n":
                start += 1
            if text.startswith("]", start):
                return
            try:
                value, start = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                text = text[start:]
                more = _read_more(stream, max(CHUNK, len(text))) if len(text) < MAX_RECORD_BYTES else ""
                if more:  # the record may only be cut by the end of what was read; try again with twice as much
                    text, start = text + more, 0
                    continue
                fault = f"broken, cut off or over {MAX_RECORD_BYTES} characters: {_json_fault(error)}"
                reason = f"record {number} of the list is {fault}; the rest is not read"
                yield Rejected(str(path), None, _guess_user(text), short(text), reason)
                return
            if isinstance(value, dict):
                yield value
            else:
                reason = f"record {number} of the list: expected an object, got {_type(value)}"
                yield Rejected(str(path), None, None, short(value), reason)
            number += 1


def _read_more(stream: io.TextIOWrapper, size: int) -> str:
    """Up to `size` characters; nothing where the file ends or cannot be read on (a cut .gz)."""
    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error):
        return ""


# --- the OPPU archive


def _read_oppu(data: DataConfig, task: Task) -> Iterator[RawUser | Rejected]:
    """`user_others.json` are the base users; the targets' file has another name for LaMP-7, and 49 to 101 users."""
    _check_lamp_task(task, data.format)
    folder = Path(data.path)
    names = ("user_top_100_history", "user_more_100_history")
    name = next((name for name in names if (folder / f"{name}.json").exists()), names[0])
    labels = [path for path in (folder / f"{other}_label.json" for other in (name, *names)) if path.exists()]
    golds = _read_golds(labels[0], task) if labels else {}
    for path, role in ((folder / "user_others.json", "base"), (folder / f"{name}.json", "target")):
        for user in _json_array(path):
            if isinstance(user, Rejected):
                yield user
                continue
            user_id = _as_text(user.get("user_id"))
            try:
                items = [_profile_item(item, task) for item in _a_list(user, "profile")]
                queries = [_archive_query(query, golds, task) for query in _a_list(user, "query")]
            except ValueError as error:
                yield Rejected(str(path), None, user_name(user_id), short(user), str(error))
                continue
            yield RawUser(str(path), None, {"user_id": user_id, "role": role, "history": items, "queries": queries})


def _archive_query(query: object, golds: dict[str, Any], task: Task) -> dict[str, Any]:
    """A query of the archive: the gold stands in it, or in the label file."""
    if not isinstance(query, dict):
        raise ValueError(f"query {short(query)}: expected an object, got {_type(query)}")
    return _query(query, query.get("gold", golds.get(str(query.get("id")))), task)


# --- tables and HF datasets


def _read_table(data: DataConfig, task: Task) -> Iterator[RawUser | Rejected]:
    path = Path(data.path)
    if path.suffix == ".parquet":
        return _group_rows(data, data.path, *_parquet_rows(path))
    if path.suffixes[-1:] == [".csv"] or path.suffixes[-2:] == [".csv", ".gz"]:
        return _group_rows(data, data.path, *_csv_rows(path))
    raise ValueError(f"data.path: format 'table' reads .csv, .csv.gz and .parquet, got {data.path!r}")


def _read_hf(data: DataConfig) -> Iterator[RawUser | Rejected]:
    """Rows are users where the data set has a column `history`, otherwise items."""
    from datasets import load_dataset  # slow to import, and only this format needs it

    full_name, _, configuration = data.hf_name.partition(":")
    name, revision = split_revision(full_name)
    try:
        rows = load_dataset(name, configuration or None, split=data.hf_split, revision=revision or None)
    except Exception as error:  # the library has no common base class for "not found", "no such split", "no network"
        raise ValueError(f"data.hf_name: cannot load split {data.hf_split!r} of {data.hf_name!r}: {error}") from error
    if "history" in rows.column_names:
        for number, row in enumerate(rows, start=1):
            yield RawUser(data.hf_name, number, {**row, "user_id": _as_text(row.get("user_id"))})
    else:
        yield from _group_rows(data, data.hf_name, rows.column_names, enumerate(rows, start=1))


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | Rejected]]]:
    import pyarrow.parquet  # slow to import, and only this format needs it

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: damaged Parquet file: {error}") from error

    return file.schema_arrow.names, enumerate(rows(), start=1)


def _csv_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | Rejected]]]:
    """Column names and (line, row) of a CSV file with a header; an empty cell is a missing value."""
    broken: list[Rejected] = []

    def lines() -> Iterator[str]:
        for _, line in bounded_lines(path):
            if isinstance(line, Rejected):
                broken.append(line)
            yield "\n" if isinstance(line, Rejected) else line  # an empty line in its place keeps the line numbers

    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.reader(lines())
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}: expected a header line with the columns' names: {error}") from error

    def rows() -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
        cells: list[str] | None = []
        while cells is not None:
            fault = ""
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells, fault = [], str(error)
            yield from ((line.line or 0, line) for line in broken)
            broken.clear()
            if cells and len(cells) != len(names):
                fault = f"expected {len(names)} columns as in the header, got {len(cells)}"
            if fault:
                yield reader.line_num, Rejected(str(path), reader.line_num, None, short(",".join(cells or [])), fault)
            elif cells:
                yield reader.line_num, {name: cell or None for name, cell in zip(names, cells, strict=True)}

    return names, rows()


def _group_rows(
    data: DataConfig, path: str, names: list[str], rows: Iterable[tuple[int, dict[str, Any] | Rejected]]
) -> Iterator[RawUser | Rejected]:
    """Users of a table of items, in the order of their first rows."""
    if unknown := set(data.columns) - set(TABLE_FIELDS):
        raise ValueError(f"data.columns: unknown field {min(unknown)!r}; expected one of {', '.join(TABLE_FIELDS)}")
    if absent := set(filter(None, data.columns.values())) - set(names):
        raise ValueError(f"data.columns: {path} has no column {min(absent)!r}; it has {', '.join(names)}")
    columns = {field: data.columns.get(field, field) for field in TABLE_FIELDS}
    if columns["user_id"] not in names:
        raise ValueError(f"data.columns: {path} needs a column for user_id; it has {', '.join(names)}")
    users: dict[str, RawUser] = {}
    for line, row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        fields = {field: _as_text(row[column]) for field, column in columns.items() if column in row}
        user_id, role = fields.pop("user_id"), fields.pop("role", None)
        if not isinstance(user_id, str) or not user_id:
            yield Rejected(path, line, None, short(user_id), "the row has no user id")
            continue
        user = users.setdefault(user_id, RawUser(path, line, {"user_id": user_id, "role": role, "history": []}))
        if role != user.record["role"]:
            user.record["role"] = f"{user.record['role']} and {role}"  # no role: the check will say so
        user.record["history"].append({"id": f"row-{line}", **fields})
    yield from users.values()


# --- the embedded chats


def _read_chitchat(path: Path) -> Iterator[RawUser | Rejected]:
    """A user's items are their turns that answer somebody, each with up to three turns before it.

    Source: BYU Chit-Chat Challenge 2018 (MIT licence); conversations are lists of turns, turns lists of messages.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    except (
        OSError,
        KeyError,
        ValueError,
        RecursionError,
        NotImplementedError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path}: expected the {CHITCHAT} wheel: {error}") from error
    try:
        histories = _replies(conversations)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: a conversation is not as in {CHITCHAT}: {error!r}") from error
    for user_id, history in histories.items():
        yield RawUser(str(path), None, {"user_id": user_id, "history": history})


def _replies(conversations: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The items of every user, each a turn that answers somebody."""
    histories: dict[str, list[dict[str, Any]]] = {}
    for conversation_id, conversation in conversations.items():
        spoken: list[tuple[str, str]] = []
        for number, messages in enumerate(conversation["messages"]):
            text = " ".join(message["text"].strip() for message in messages).strip()
            if not text:
                continue
            user_id = messages[0]["sender"]
            before = spoken[-CHITCHAT_TURNS:]
            if any(speaker != user_id for speaker, _ in before):
                context = [f"{'You' if speaker == user_id else 'Partner'}: {said}" for speaker, said in before]
                item = {"id": f"{conversation_id}.{number}", "time": messages[0]["timestamp"]}
                histories.setdefault(user_id, []).append({**item, "context": context, "text": text})
            spoken.append((user_id, text))
    return histories
