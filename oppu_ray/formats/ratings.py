"""Public data sets of ratings -> users: MovieLens, Goodreads, Amazon reviews, in the files that one downloads."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.core import Rejected
from oppu_ray.formats import exports, files, tables
from oppu_ray.formats.raw import RawUser, Users, user_name
from oppu_ray.tasks import Task, normal_label
from oppu_ray.values import as_text

# --- MovieLens


def read_movielens(data: DataConfig, task: Task) -> Users:
    """The folder or archive of a MovieLens data set: ml-100k (`u.data`), ml-1m, ml-10m (`.dat`), or newer (`.csv`).

    An item is a film, "title, genres", with the user's rating; for a task of tags, with the user's tag. Tags that are
    no label of the task are left out.

    Raises:
        ValueError: It is no such data set, or it has ratings that are no label of the task.
    """
    path = Path(data.path)
    found = exports.files_of(path)
    by_name = {name.rpartition("/")[2]: file for name, file in found.items()}
    is_tags = task.kind == "classification"
    names = ("tags.csv", "tags.dat") if is_tags else ("ratings.csv", "ratings.dat", "u.data")
    chosen = next((name for name in names if name in by_name), None)
    films_name = next((name for name in ("movies.csv", "movies.dat", "u.item") if name in by_name), None)
    if not chosen or not films_name:
        shown = ", ".join(list(found)[:8])
        raise ValueError(
            f"{path}: expected one of {', '.join(names)} and the films (movies.csv, ...); it holds {shown}"
        )
    films = {row[0]: _film(row) for row in _rows(by_name[films_name], films_name)}
    counts = Counter[str]()
    users: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(_rows(by_name[chosen], chosen), start=1):
        if len(row) < 4 or row[1] not in films:
            counts["rows that are cut short or name no known film are"] += 1
            continue
        user_id, film_id, value, time = row[0], row[1], normal_label(row[2], task.labels), row[3]
        value = value.lower() if is_tags else value
        if task.labels and value not in task.labels:
            if not is_tags:
                raise ValueError(
                    f"{path}: row {number} of {chosen} has the rating {value}; expected one of "
                    f"{', '.join(task.labels)}, or other task.labels, such as [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]"
                )
            counts["tags that are no label of the task are"] += 1
            continue
        item = {"id": f"{film_id}-{number}", "time": time, "text": films[film_id], "label": value}
        users.setdefault(user_id, []).append(item)
    for user_id, history in users.items():
        yield RawUser(str(path), None, {"user_id": user_id, "history": history})
    yield from exports.left_out(path, counts)


GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""Of ml-100k, in the order of the flags in `u.item`."""


def _film(row: list[str]) -> str:
    if len(row) == 24:  # u.item: id, title, release, video, link, and a flag for each genre
        genres = [name for name, flag in zip(GENRES, row[5:], strict=True) if flag == "1"]
    else:
        genres = [name for name in row[2].split("|") if name != "(no genres listed)"]
    return ", ".join([row[1], *genres])


def _rows(file: Any, name: str) -> Iterator[list[str]]:
    """The rows of one of MovieLens' files; the older ones are in Latin-1."""
    content = exports.read_bytes(file)
    if name.endswith(".csv"):
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True)
        next(rows, None)  # the header
        try:
            yield from (row for row in rows if row)
        except csv.Error as error:
            raise ValueError(f"{file}: line {rows.line_num}: not valid CSV: {error}") from error
        return
    mark = {"u.data": "\t", "u.item": "|"}.get(name, "::")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    yield from (line.split(mark) for line in text.splitlines() if line)


# --- Goodreads


def read_goodreads(data: DataConfig, task: Task) -> Users:
    """One's own library (`goodreads_library_export.csv`), or the reviews that UCSD collected (JSON lines).

    Books without a rating, or for the reviews without a text, are left out.

    Raises:
        ValueError: It is neither, or whose library it is is not said by `data.user_name`.
    """
    path = Path(data.path)
    if files.suffix_of(path) == ".csv":
        return _goodreads_library(data, path)
    return _reviews(data, path, ("user_id",), ("review_text",), ("rating",), ("date_added",), (), "review_id")


def _goodreads_library(data: DataConfig, path: Path) -> Users:
    if not data.user_name:
        raise ValueError(
            f"data.user_name: {path}: whose library this is stands nowhere in it; expected a name, e.g. me"
        )
    with files.open_binary(path) as binary:
        rows = csv.DictReader(io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline=""), strict=True)
        columns = ("Book Id", "Title", "Author", "My Rating", "Date Added")
        if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: expected a Goodreads library; it has no column {missing[0]!r}")
        counts = Counter[str]()
        history: list[dict[str, Any]] = []
        try:
            for row in rows:
                if row["My Rating"] in ("0", "", None):
                    counts["books without a rating are"] += 1
                    continue
                book = f"{row['Title']} by {row['Author']}."
                review = exports.plain(row.get("My Review") or "")
                item = {"id": row["Book Id"], "time": row["Date Added"], "label": row["My Rating"]}
                history.append({**item, "text": f"{book} {review}".strip(), "title": row["Title"]})
        except csv.Error as error:
            raise ValueError(f"{path}: line {rows.line_num}: not valid CSV: {error}") from error
    yield RawUser(str(path), None, {"user_id": data.user_name, "history": history})
    yield from exports.left_out(path, counts)


# --- Amazon


def read_amazon(data: DataConfig, task: Task) -> Users:
    """Amazon reviews as JSON lines, of 2014 and 2018 (`reviewerID`, ...) or of 2023 (`user_id`, ...)."""
    return _reviews(
        data,
        Path(data.path),
        ("user_id", "reviewerID"),
        ("text", "reviewText"),
        ("rating", "overall"),
        ("timestamp", "unixReviewTime"),
        ("title", "summary"),
        "",
    )


def _reviews(
    data: DataConfig,
    path: Path,
    user_keys: tuple[str, ...],
    text_keys: tuple[str, ...],
    label_keys: tuple[str, ...],
    time_keys: tuple[str, ...],
    title_keys: tuple[str, ...],
    id_key: str,
) -> Users:
    """Users of review records; of each tuple of keys, the first that a record has."""

    def first(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
        return next((record[key] for key in keys if record.get(key) is not None), None)

    counts = Counter[str]()
    users: dict[str, list[dict[str, Any]]] = {}
    for place, line, record in tables.records(path):
        if isinstance(record, Rejected):
            yield record
            continue
        user_id, label = user_name(first(record, user_keys)), as_text(first(record, label_keys))
        text = exports.plain(as_text(first(record, text_keys)) or "")
        if not user_id:
            yield Rejected(place, line, None, "", tables.NO_USER)
        elif not text or label in (None, "0"):
            counts["reviews without a text or a rating are"] += 1
        else:
            item = {
                "id": as_text(record.get(id_key)) or f"row-{line}",
                "time": first(record, time_keys),
                "label": label,
            }
            title = exports.plain(as_text(first(record, title_keys)) or "")
            users.setdefault(user_id, []).append({**item, "text": text, "title": title or None})
    for user_id, history in users.items():
        yield RawUser(str(path), None, {"user_id": user_id, "history": history})
    yield from exports.left_out(path, counts)
