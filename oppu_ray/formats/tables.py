"""Rows of CSV, Parquet, JSON lines and JSON lists -> users: rows are items, or a record with `history` is a whole user.

Design: CSV is read by RFC 4180 and nothing else. Where a record breaks it, no later row can be trusted to be a row, so
everybody whose id stands in the lines of that record is left out by name; a hole in a history would go unnoticed.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.formats import files
from oppu_ray.formats.raw import ITEM_FIELDS, RawUser, Users, same_user, short, user_name
from oppu_ray.tasks import Task
from oppu_ray.values import as_text, kind_of

TABLE_FIELDS = ("user_id", "role", *ITEM_FIELDS)
USER_FIELDS = ("user_id", "role", "task", "query_start")
TABLES = (".csv", ".tsv", ".parquet")
JSON_LINES = (".jsonl", ".ndjson")
ROLES = ("target", "base")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
NO_USER = "The row has no user id, so whose item it is cannot be known."

Row = tuple[int, dict[str, Any] | Rejected]


def read_parts(data: DataConfig, task: Task, path: Path) -> Users:
    """Users of a file of rows or records, or of all such files in a folder, in the order of the files' names.

    Raises:
        ValueError: The folder has no such file or several kinds, a file cannot be read, or `data.columns` does not fit.
    """
    known = TABLES if data.format == "table" else (*JSON_LINES, ".json")
    suffixes = {part: files.suffix_of(part) for part in files.parts_of(path)}
    if data.format == "jsonl" and not path.is_dir() and suffixes[path] not in known:
        suffixes[path] = ".jsonl"
    kinds = {suffix for suffix in suffixes.values() if suffix in known}
    if len(kinds) != 1:
        found = ", ".join(sorted({*suffixes.values()})) or "no file"
        raise ValueError(f"data.path: {path} holds {found}; format {data.format!r} reads one of {', '.join(known)}")
    parts = [(part, str(part), suffix) for part, suffix in suffixes.items() if suffix in kinds]
    return read_files(data, task, parts)


def read_files(data: DataConfig, task: Task, parts: Sequence[tuple[Path, str, str]]) -> Users:
    """Users of several files together.

    Args:
        parts: For each file its path, the name that is shown for it, and the suffix that says how it is read.
    """
    rows = _Rows(data, task)
    for number, (path, name, suffix) in enumerate(parts, start=1):
        rows.part = number if len(parts) > 1 else 0
        yield from rows.add_all(name, _rows_of(data, rows, path, suffix))
    yield from rows.finish()


def read_rows(
    data: DataConfig, task: Task, name: str, columns: Sequence[str], source: Iterable[dict[str, Any]]
) -> Users:
    """Users of rows that another library has read."""
    rows = _Rows(data, task)
    rows.check_columns(name, columns)
    yield from rows.add_all(name, enumerate(source, start=1))
    yield from rows.finish()


def _rows_of(data: DataConfig, rows: _Rows, path: Path, suffix: str) -> Iterator[Row]:
    if suffix == ".parquet":
        return _parquet_rows(path, rows)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, rows, data.csv_delimiter or ("tab" if suffix == ".tsv" else "comma"), data.csv_escape)
    return _json_rows(path, suffix)


@dataclass
class _Rows:
    """Rows of items as they are put together by user, and the users of whom a row is lost."""

    data: DataConfig
    task: Task
    part: int = 0
    users: dict[str, RawUser] = field(default_factory=dict)
    refused: dict[str, list[Rejected]] = field(default_factory=dict)
    of_nobody: list[Rejected] = field(default_factory=list)
    unclear: list[list[Rejected]] = field(default_factory=list)
    suspects: list[tuple[set[str], list[Rejected]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = [one for one in self.data.columns if one not in (*TABLE_FIELDS, *USER_FIELDS, "history")]
        if unknown:
            near = difflib.get_close_matches(unknown[0], TABLE_FIELDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(TABLE_FIELDS)
            raise ValueError(f"data.columns: unknown field {unknown[0]!r}; expected one of {known}{hint}")

    def column(self, name: str) -> str | None:
        """The source's name of one of our fields; None where `data.columns` drops it."""
        return self.data.columns.get(name, name)

    def value(self, row: dict[str, Any], name: str) -> Any:
        """A row's value of one of our fields, or None."""
        column = self.column(name)
        return None if column is None else _at(row, column)

    @property
    def fields(self) -> list[str]:
        """The fields of an item that are read: no more than the task needs."""
        return [name for name in ITEM_FIELDS if name in ("id", "time", *self.task.fields)]

    def add_all(self, path: str, source: Iterable[Row]) -> Users:
        """Add the rows of one file; records that are whole users come out at once."""
        for line, row in source:
            if isinstance(row, Rejected):
                self.refuse(replace(row, path=path))
            elif not isinstance(row, dict):
                reason = f"The record is {kind_of(row)}; expected an object."
                self.refuse(Rejected(path, line, None, short(row), reason))
            elif self.column("history") in row or not any(self.column(name) in row for name in self.fields):
                yield self.whole_user(path, line, row)
            else:
                self.add(path, line, row)

    def check_columns(self, path: Path | str, names: Sequence[str]) -> None:
        """That a table has the columns that are asked for and those that the task needs, each once.

        Raises:
            ValueError: It has not.
        """
        absent = {
            one for one in self.data.columns.values() if one and one not in names and one.split(".")[0] not in names
        }
        if absent:
            near = difflib.get_close_matches(min(absent), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"data.columns: {path} has no column {min(absent)!r}; it has {', '.join(names)}{hint}")
        if self.column("history") in names:
            return
        wanted = [self.column(name) for name in ("user_id", "role", *self.fields)]
        if twice := [name for name in dict.fromkeys(names) if name in wanted and names.count(name) > 1]:
            raise ValueError(f"{path}: the column {twice[0]!r} is there {names.count(twice[0])} times; expected once")
        needed = ["user_id", *self.task.needed_fields]
        missing = [name for name in needed if (self.column(name) or "").split(".")[0] not in names]
        if missing:
            raise ValueError(
                f"data.columns: {path} needs a column for {missing[0]}; it has {', '.join(names)}: expected one so "
                f"named, or data.columns.{missing[0]}=<its name>; `oppu inspect {path}` proposes one"
            )

    def item(self, raw: object) -> Any:
        """Our fields of an item; whatever is no object comes back as it is, to be refused."""
        if not isinstance(raw, dict):
            return raw
        return {name: value for name in self.fields if (value := self.value(raw, name)) is not None}

    def whole_user(self, path: str, line: int | None, row: dict[str, Any]) -> RawUser:
        record = {name: value for name in (*USER_FIELDS, "queries") if (value := self.value(row, name)) is not None}
        items = self.value(row, "history")
        record["history"] = [self.item(item) for item in items] if isinstance(items, list | tuple) else items
        if isinstance(record.get("queries"), list):
            record["queries"] = [self.item(item) for item in record["queries"]]
        return RawUser(path, line, record)

    def add(self, path: str, line: int, row: dict[str, Any]) -> None:
        """Put a row's item to its user."""
        try:
            user_id = as_text(self.value(row, "user_id"))
        except ValueError as error:
            self.refuse(
                Rejected(path, line, None, short(row), f"The row's user_id is {error}; expected a text or a number.")
            )
            return
        if user_id is None or not same_user(user_id):
            self.refuse(Rejected(path, line, None, "", NO_USER))
            return
        role = self._role(row)
        record = {"user_id": user_id, "role": role, "history": []}
        user = self.users.setdefault(same_user(user_id), RawUser(path, line, record))
        if role != user.record["role"]:
            user.record["role"] = f"{user.record['role']} and {role}"  # no role: the check will say so
        place = f"{self.part}-{line}" if self.part else f"{line}"
        user.record["history"].append({"id": f"row-{place}", **self.item(row)})

    def _role(self, row: dict[str, Any]) -> Any:
        """The row's role. A column that happens to be called `role` is ours only where it holds our roles."""
        role = self.value(row, "role")
        return role if "role" in self.data.columns or role in ROLES else None

    def refuse(self, rejected: Rejected) -> None:
        """A row that is lost: its user is left out whole, or, where it cannot be known whose it is, the row alone."""
        if rejected.user_id:
            self.refused.setdefault(same_user(rejected.user_id), []).append(rejected)
        else:
            self.of_nobody.append(rejected)

    def one_of(self, rejected: list[Rejected]) -> None:
        """A lost row of one of several: all of them are left out who turn out to be users of this file."""
        self.unclear.append(rejected)

    def suspect(self, names: set[str], rejected: list[Rejected]) -> None:
        """Rows that a quoted cell seems to hold: refused once one of `names` turns out to be a user of this file."""
        self.suspects.append((names, rejected))

    def finish(self) -> Users:
        """Every user who is whole, in the order of their first rows, and all that was left out."""
        for names, rejected in self.suspects:
            if names & self.users.keys():
                for one in rejected:
                    self.refuse(one)
        for rejected in self.unclear:
            known = [one for one in rejected if one.user_id and same_user(one.user_id) in self.users]
            reason = f"{rejected[0].reason} Whose row it is cannot be known."
            for one in known or [replace(rejected[0], user_id=None, reason=reason)]:
                self.refuse(one)
        yield from self.of_nobody
        for lost in self.refused.values():
            yield from lost
        yield from (user for user_id, user in self.users.items() if user_id not in self.refused)


def _at(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or at a dotted path into it: `context.value` is the `value` of each turn."""
    if column in row or "." not in column:
        return row.get(column)
    head, _, rest = column.partition(".")
    inner = row.get(head)
    if isinstance(inner, list | tuple):
        return [_at(part, rest) if isinstance(part, dict) else part for part in inner]
    return _at(inner, rest) if isinstance(inner, dict) else None


def records(path: Path) -> Iterator[tuple[str, int, dict[str, Any] | Rejected]]:
    """(file, line or number, record) of JSON lines, JSON lists or Parquet, one file or a folder of parts.

    Raises:
        ValueError: There is no such file, or one cannot be read.
    """
    known = (*JSON_LINES, ".json", ".parquet")
    parts = [part for part in files.parts_of(path) if files.suffix_of(part) in known]
    if not parts:
        raise ValueError(f"data.path: {path}: expected a file, or a folder of files, of {', '.join(known)}")
    for part in parts:
        suffix = files.suffix_of(part)
        if suffix == ".parquet":
            source: Iterator[Row] = enumerate(_parquet_values(_open_parquet(part), part), start=1)
        else:
            source = _json_rows(part, suffix)
        for line, row in source:
            if isinstance(row, dict | Rejected):
                yield str(part), line, row
            else:
                reason = f"The record is {kind_of(row)}; expected an object."
                yield str(part), line, Rejected(str(part), line, None, short(row), reason)


def _json_rows(path: Path, suffix: str) -> Iterator[Row]:
    if suffix in JSON_LINES or not files.is_json_list(path):
        return files.json_lines(path)
    return enumerate(files.json_array(path), start=1)


# --- Parquet


def _parquet_rows(path: Path, rows: _Rows) -> Iterator[Row]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    rows.check_columns(path, names)
    wanted = {(rows.column(name) or "") for name in (*USER_FIELDS, "history", "queries", *rows.fields)}
    columns = [name for name in dict.fromkeys(names) if name in wanted | {one.split(".")[0] for one in wanted}]

    return enumerate(_parquet_values(file, path, columns), start=1)


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet  # slow to import, and only this format needs it

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def _parquet_values(file: Any, path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: damaged Parquet file: {error}") from error


# --- CSV


def _csv_rows(path: Path, rows: _Rows, delimiter: str, escape: str) -> Iterator[Row]:
    """(line, row) of a CSV file with a header; an empty cell is a missing value."""
    reader = _CsvReader(path, DELIMITERS[delimiter], escape)
    first = next(reader, None)
    names = [name.strip().strip("\ufeff") for name in first.cells] if first and not first.fault else []
    if not names:
        raise ValueError(f"{path}: expected a header line with the columns' names{f': {first.fault}' if first else ''}")
    if len(names) == 1 and (others := [name for name, mark in DELIMITERS.items() if mark in names[0]]):
        what = (
            "its header stands in quotes as a whole" if delimiter in others else f"set data.csv_delimiter={others[0]}"
        )
        raise ValueError(f"{path}: expected a header of several columns, found the one column {names[0]!r}: {what}")
    rows.check_columns(path, names)
    user_column = names.index(rows.column("user_id") or "")
    for record in reader:
        fault = record.fault
        if not fault and record.cells and len(record.cells) != len(names):
            fault = f"it has {len(record.cells)} cells, and the header {len(names)}"
        if fault:
            lost = list(reader.name_users(record, fault, len(names), user_column))
            if record.first == record.last and len(lost) > 1:
                rows.one_of(lost)
            else:
                yield from ((record.first, one) for one in lost)
        elif record.cells:
            if record.last > record.first:
                reader.check_long_cell(record, rows, len(names), user_column)
            yield record.last, {name: cell or None for name, cell in zip(names, record.cells, strict=True)}


@dataclass(frozen=True)
class _Record:
    """One record of a CSV file: its lines, from `first` to `last`, its cells, and what breaks the format."""

    first: int
    last: int
    lines: tuple[str, ...]
    cells: list[str]
    fault: str = ""


class _CsvReader:
    """The records of a CSV file. Python's reader splits the cells; what it lets pass against RFC 4180 is a fault."""

    def __init__(self, path: Path, delimiter: str, escape: str) -> None:
        self.path, self._number = path, 0
        self._lines: list[str] = []
        self._too_long: Rejected | None = None
        csv.field_size_limit(files.MAX_RECORD_BYTES)
        how: dict[str, Any] = {"escapechar": escape, "doublequote": False} if escape else {}
        self._options: dict[str, Any] = {"delimiter": delimiter, "strict": True, **how}
        self._reader = csv.reader(self._read_lines(), **self._options)
        cell = rf'(?:"[^"]*(?:""[^"]*)*"|[^"{re.escape(delimiter)}\r\n]*)'
        self._valid = None if escape else re.compile(rf"{cell}(?:{re.escape(delimiter)}{cell})*(?:\r\n|\n|\r)?")

    def __iter__(self) -> Iterator[_Record]:
        return self

    def __next__(self) -> _Record:
        self._lines.clear()
        self._too_long = None
        fault, cells = "", []
        try:
            cells = next(self._reader)
        except csv.Error as error:
            fault = str(error) if len(self._lines) < 2 else "a quote is opened in it that is not closed as it should be"
        text = "".join(self._lines)
        if self._too_long:
            fault = self._too_long.reason.rstrip(".")
        elif not fault and '"' in text and self._valid and not self._valid.fullmatch(text):
            fault = "a quote stands in a cell that is not in quotes (RFC 4180: quote the cell, and double the quote)"
        return _Record(self._number - len(self._lines) + 1, self._number, tuple(self._lines), cells, fault)

    def _read_lines(self) -> Iterator[str]:
        for number, line in files.bounded_lines(self.path):
            self._number = number
            self._too_long = line if isinstance(line, Rejected) else self._too_long
            self._lines.append(line.value if isinstance(line, Rejected) else line)
            yield "\n" if isinstance(line, Rejected) else line  # an empty line in its place keeps the line numbers

    def name_users(self, record: _Record, fault: str, num_columns: int, user_column: int) -> Iterator[Rejected]:
        """What is lost with a broken record: a `Rejected` for everybody whose id may stand in one of its lines."""
        where = f"line {record.first}" if record.first == record.last else f"lines {record.first} to {record.last}"
        users: dict[str, str] = {}
        unknown: list[int] = []
        for number, line in enumerate(record.lines, start=record.first):
            cells = self._cells_of(line)
            places = {user_column, len(cells) - num_columns + user_column}  # counted from the left and from the right
            is_row = len(cells) == num_columns or number == record.first
            found = [cells[place].strip('"') for place in sorted(places) if is_row and 0 <= place < len(cells)]
            found = [user_id for user_id in map(same_user, found) if user_id]
            for user_id in found:
                users.setdefault(user_id, line)
            unknown += [number] * (not found)
        is_long = record.last > record.first
        of_whom = f" It holds rows of {len(users)} users, who are all left out." * (is_long and len(users) > 1)
        lost = f" Whose row line {unknown[0]} is cannot be known." if unknown else ""
        reason = f"The row in {where} is not valid CSV: {fault}.{of_whom}{lost}"
        for user_id, line in (users or {"": record.lines[0]}).items():
            yield Rejected(str(self.path), record.first, user_name(user_id), short(line.strip()), reason)

    def check_long_cell(self, record: _Record, rows: _Rows, num_columns: int, user_column: int) -> None:
        """Suspect a valid record of swallowing rows where each of its lines, taken alone, is a row of the table.

        Two stray quotes, lines apart, make one valid quoted cell of all that stands between them.
        """
        lines = [self._cells_of(line) for line in record.lines]
        if all(len(cells) == num_columns and same_user(cells[user_column]) for cells in lines):
            names = {same_user(cells[user_column]) for cells in lines[1:]}
            fault = "two quotes make one cell of lines that are rows by themselves"
            rows.suspect(names, list(self.name_users(record, fault, num_columns, user_column)))

    def _cells_of(self, line: str) -> list[str]:
        """The cells of one line by itself; where it is no valid row, quotes are characters like others."""
        is_valid = self._valid is not None and self._valid.fullmatch(line)
        how = self._options if is_valid else {"delimiter": self._options["delimiter"], "quoting": csv.QUOTE_NONE}
        return next(csv.reader([line.rstrip("\r\n")], **how), [])
