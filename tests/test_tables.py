"""Rows of people's own files: never mixed, never guessed at, never lost without a word."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oppu_ray.config import DataConfig, TaskConfig
from oppu_ray.core import Rejected, UserHistory
from oppu_ray.history import load_histories

RATING = TaskConfig(name="product_rating")
HEADER = "user_id,text,label\n"


def load(path: Path, task: TaskConfig = RATING, **options: Any) -> tuple[dict[str, UserHistory], list[Rejected]]:
    users, rejected = load_histories(DataConfig(path=str(path), **options), task, 0)
    return {user.user_id: user for user in users}, rejected


def items(user: UserHistory) -> list[tuple[str, str | None]]:
    return [(item.text, item.label) for item in (*user.items, *user.queries)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def rows(*users: str, num: int = 3) -> str:
    return "".join(f"{user},film {number} of {user},{number}\n" for user in users for number in range(1, num + 1))


# --- broken CSV


def test_rows_that_an_open_quote_swallows_cost_their_users_by_name_and_line(tmp_path: Path) -> None:
    text = HEADER + rows("a") + 'b,"the 5 film,3\n' + rows("b", "c") + 'd,a 5" screen,4\n' + rows("d", "e")
    users, rejected = load(write(tmp_path / "t.csv", text))
    assert sorted(users) == ["a", "e"] and all(len(items(user)) == 3 for user in users.values())
    assert sorted(str(one.user_id) for one in rejected) == ["b", "c", "d"]
    for one in rejected:
        assert one.reason.startswith("The row in lines 5 to 12 is not valid CSV: a quote is opened in it")
        assert "It holds rows of 3 users" in one.reason and one.value.startswith(f"{one.user_id},")


def test_a_quote_that_is_never_closed_swallows_the_rest(tmp_path: Path) -> None:
    text = HEADER + rows("a") + 'b,"the 5 film,3\n' + rows("b", "c")
    users, rejected = load(write(tmp_path / "t.csv", text))
    assert sorted(users) == ["a"] and sorted(str(one.user_id) for one in rejected) == ["b", "c"]
    assert {one.reason.split(" is not")[0] for one in rejected} == {"The row in lines 5 to 11"}


def test_two_stray_quotes_that_make_one_valid_cell_are_found_too(tmp_path: Path) -> None:
    text = HEADER + rows("a", "b") + 'b,"the 5 film,3\n' + rows("c") + 'd,a 5",4\n' + rows("d", "e")
    users, rejected = load(write(tmp_path / "t.csv", text))
    assert sorted(users) == ["a", "e"] and sorted(str(one.user_id) for one in rejected) == ["b", "c", "d"]
    assert "two quotes make one cell of lines that are rows by themselves" in rejected[0].reason


def test_cells_of_many_lines_are_read(tmp_path: Path) -> None:
    poem = 'I said: "one, two"\nthree, four, five\n\nfilm, yes, no'
    stream = io.StringIO()
    csv.writer(stream).writerows([["user_id", "text", "label"], *(["ann", poem, number] for number in (1, 2, 3))])
    users, rejected = load(write(tmp_path / "t.csv", stream.getvalue()))
    assert items(users["ann"]) == [(poem, "1"), (poem, "2"), (poem, "3")] and rejected == []


@pytest.mark.parametrize(
    ("row", "names", "reason"),
    [
        ('b,a 5" screen,4', ["b"], "a quote stands in a cell that is not in quotes"),
        ("b,one, two,4", ["b"], "it has 4 cells, and the header 3"),
        ("b,one", ["b"], "it has 2 cells, and the header 3"),
        ('b,"one" two,4', ["b"], "',' expected after '\"'"),
    ],
)
def test_a_broken_row_costs_its_user(tmp_path: Path, row: str, names: list[str], reason: str) -> None:
    users, rejected = load(write(tmp_path / "t.csv", f"{HEADER}{rows('a', 'b')}{row}\n{rows('c')}"))
    assert sorted(users) == ["a", "c"]
    assert [one.user_id for one in rejected] == names
    assert reason in rejected[0].reason and rejected[0].line == 8


def test_whoever_may_have_lost_a_row_is_left_out_where_the_id_is_the_last_cell(tmp_path: Path) -> None:
    good = "".join(f"film,3,{user}\n" for user in ("a", "b", "c") for _ in range(3))
    users, rejected = load(write(tmp_path / "t.csv", f"text,label,user_id\n{good}one, two,4,b\n"))
    assert sorted(users) == ["a", "c"] and "b" in {one.user_id for one in rejected}


def test_a_row_of_nobody_is_told_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    users, (rejected,) = load(write(tmp_path / "t.csv", f"{HEADER}{rows('a', 'b')},whose?,3\n"))
    assert sorted(users) == ["a", "b"] and rejected.user_id is None and rejected.line == 8
    assert rejected.reason == "The row has no user id, so whose item it is cannot be known."


def test_a_dialect_with_backslashes_is_an_option(tmp_path: Path) -> None:
    text = HEADER + "".join(f'a,"a \\"film\\", {number}",{number}\n' for number in (1, 2, 3))
    users, _ = load(write(tmp_path / "t.csv", text), csv_escape="\\")
    assert items(users["a"])[0] == ('a "film", 1', "1")
    with pytest.raises(
        ValueError, match="no good user .* line 2: The row in line 2 is not valid CSV.*Whose row it is cannot be"
    ):
        load(tmp_path / "t.csv")


# --- headers, delimiters, encodings


def test_headers_are_trimmed_and_a_doubled_one_is_an_error(tmp_path: Path) -> None:
    users, _ = load(write(tmp_path / "t.csv", "\ufeff user_id , text,label\u00a0\n" + rows("a")))
    assert items(users["a"])[0] == ("film 1 of a", "1")
    with pytest.raises(ValueError, match="t.csv: the column 'text' is there 2 times; expected once"):
        load(write(tmp_path / "t.csv", "user_id,text,label,text\na,b,1,c\n"))
    doubled = "user_id,text,label,note,note\n" + "".join(f"a,film,{number},x,y\n" for number in (1, 2, 3))
    assert len(items(load(write(tmp_path / "t.csv", doubled))[0]["a"])) == 3  # a column that is not read


@pytest.mark.parametrize(("name", "mark"), [("semicolon", ";"), ("tab", "\t"), ("pipe", "|")])
def test_another_delimiter_is_named_and_can_be_set(tmp_path: Path, name: str, mark: str) -> None:
    path = write(tmp_path / "t.csv", (HEADER + rows("a")).replace(",", mark))
    with pytest.raises(ValueError, match=f"found the one column .*: set data.csv_delimiter={name}"):
        load(path)
    assert items(load(path, csv_delimiter=name)[0]["a"])[0] == ("film 1 of a", "1")
    if name == "tab":
        assert "a" in load(path.rename(tmp_path / "t.TSV"))[0]


def test_a_header_that_is_quoted_as_a_whole_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found the one column 'user_id,text,label': its header stands in quotes"):
        load(write(tmp_path / "t.csv", '"user_id,text,label"\n' + rows("a")))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16 text: iconv"),
        (lambda text: text.encode("utf-16-le"), "UTF-16 text: iconv"),
        (lambda text: text.encode("utf-32"), "UTF-32 text: iconv"),
        (lambda text: bz2.compress(text.encode()), "compressed by bzip2"),
        (lambda text: gzip.compress(bz2.compress(text.encode())), "compressed by bzip2"),
        (lambda text: b"PK\x03\x04" + text.encode(), "a zip archive"),
        (lambda text: b"PAR1" + text.encode(), "a Parquet file"),
    ],
)
def test_what_is_not_text_in_utf8_is_named(tmp_path: Path, suffix: str, make: Any, what: str) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(make(HEADER + rows("a")))
    with pytest.raises(ValueError, match=f"t{suffix}: expected text in UTF-8.*; this file is {what}"):
        load(path)


def test_a_byte_of_another_encoding_costs_its_user_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes((HEADER + rows("a", "b")).replace("film 2 of b", "caf\u00e9").encode("latin-1"))
    users, (rejected,) = load(path)
    assert sorted(users) == ["a"] and rejected.user_id == "b"
    assert "the byte 0xe9, not UTF-8, at position 3. Is the file in another encoding" in rejected.reason


# --- which file is read how


SUFFIXES = ["t.csv", "T.CSV", "t.csv.gz", "t.Csv.GZ", "t.tsv", "t.jsonl", "t.NDJSON", "t.jsonl.gz", "t.json"]


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_suffix_says_how_a_file_is_read(tmp_path: Path, name: str) -> None:
    records = [{"user_id": "a", "text": f"film {number} of a", "label": number} for number in (1, 2, 3)]
    kind = name.lower().removesuffix(".gz").rpartition(".")[2]
    text = HEADER + rows("a") if kind == "csv" else (HEADER + rows("a")).replace(",", "\t")
    if "json" in kind:
        text = json.dumps(records) if kind == "json" else "".join(json.dumps(one) + "\n" for one in records)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    users, rejected = load(tmp_path / name)
    assert items(users["a"]) == [(f"film {number} of a", f"{number}") for number in (1, 2, 3)] and rejected == []


def test_a_format_that_the_suffix_contradicts_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER + rows("a"))
    with pytest.raises(ValueError, match="data.format is 'jsonl', and .*t.csv holds .csv; expected"):
        load(path, format="jsonl")
    with pytest.raises(ValueError, match="data.format is 'auto', and .*t.bin holds .bin; .*`oppu inspect"):
        load(write(tmp_path / "t.bin", "x"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_folder_of_parts_is_read_as_one(tmp_path: Path, kind: str) -> None:
    table = [{"user_id": user, "text": f"film {part} of {user}", "label": part} for part in (1, 2, 3) for user in "ab"]
    folder = tmp_path / "parts"
    (folder / "more").mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    (folder / ".part.crc").write_text("x")
    for part in (1, 2, 3):
        chosen = [row for row in table if row["label"] == part]
        path = folder / ("more" if part == 3 else "") / f"part-{part if part < 3 else 1}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(chosen), path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        else:
            path.write_text(HEADER + "".join(",".join(map(str, row.values())) + "\n" for row in chosen))
    users, rejected = load(folder)
    assert rejected == [] and sorted(users) == ["a", "b"]
    assert sorted(items(users["b"])) == [(f"film {part} of b", f"{part}") for part in (1, 2, 3)]
    write(folder / "other.tsv" if kind != "csv" else folder / "other.parquet", "x")
    with pytest.raises(ValueError, match="holds .*; "):
        load(folder)


# --- values: alike in every format, and never guessed


VALUES: dict[str, tuple[list[Any], list[str]]] = {
    "text": (["007", "7", "NA"], ["007", "7", "NA"]),
    "dates as text": (["2024-05-01", "nan", "null"], ["2024-05-01", "nan", "null"]),
    "integers": ([7, 42, 10**15], ["7", "42", "1000000000000000"]),
    "floats": ([7.0, 42.0, 1.5], ["7", "42", "1.5"]),
    "decimals": ([Decimal("7.0"), Decimal("42.0"), Decimal("1.5")], ["7", "42", "1.5"]),
    "bytes": ([b"ann", "ren\u00e9".encode(), b"0042"], ["ann", "ren\u00e9", "0042"]),
    "times": ([datetime.datetime(2024, 5, day, 1) for day in (1, 2, 3)], [f"2024-05-0{d}T01:00:00" for d in (1, 2, 3)]),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("source", ["parquet", "hf parquet", "jsonl", "hf jsonl", "csv", "hf csv"])
def test_ids_and_texts_are_the_same_people_in_every_format(
    tmp_path: Path, kind: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, texts = VALUES[kind]
    table = [{"user_id": one, "text": one, "label": label} for one in values for label in (1, 2, 3)]
    folder = tmp_path / "set"
    folder.mkdir()
    if source.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(table), folder / "train.parquet")
    else:
        if kind in ("decimals", "bytes", "times"):
            spelt = [text for text in texts for _ in range(3)]
            table = [{**row, "user_id": text, "text": text} for row, text in zip(table, spelt, strict=True)]
        if source.endswith("jsonl"):
            write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in table))
        else:
            if kind == "floats":
                texts = ["7.0", "42.0", "1.5"]  # in CSV all is text as it stands
            with (folder / "train.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["user_id", "text", "label"])
                writer.writeheader()
                writer.writerows(table)
    if source.startswith("hf"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        users, rejected = load_histories(DataConfig(format="hf", hf_name=str(folder)), RATING, 0)
        found = {user.user_id: user for user in users}
    else:
        found, rejected = load(next(folder.iterdir()))
    assert rejected == [] and sorted(found) == sorted(texts)
    assert all(items(found[text]) == [(text, label) for label in "123"] for text in texts)


def test_uuids_and_nested_values_of_parquet_are_text(tmp_path: Path) -> None:
    people = [uuid.UUID(int=number) for number in (1, 2)]
    ids = pa.array([one.bytes for one in people for _ in range(3)], pa.binary(16))
    table = pa.table(
        {
            "user_id": pa.ExtensionArray.from_storage(pa.uuid(), ids),
            "text": [f"film {number}" for number in range(6)],
            "context": pa.array([[b"Partner: hi", b"You: ho"]] * 6),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    users, rejected = load(tmp_path / "t.parquet", TaskConfig())
    assert sorted(users) == sorted(map(str, people)) and rejected == []
    assert users[str(people[0])].items[0].context == ("Partner: hi", "You: ho")


def test_what_has_no_text_is_named_by_what_it_is(tmp_path: Path) -> None:
    table = [{"user_id": "a", "text": ["x"], "label": 1}, {"user_id": {"id": 1}, "text": "x", "label": 1}]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in table))
    with pytest.raises(ValueError) as raised:
        load(path, min_items=0)
    assert "The row's user_id is an object; expected a text or a number." in str(raised.value)
    columns = {"user_id": [b"\xff", b"b"], "text": ["x", "y"], "label": [2.0**60, 3.0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"The row's user_id is bytes that are not UTF-8 \(0xff\)"):
        load(tmp_path / "t.parquet")


@pytest.mark.parametrize("label", ["4", "4.0", "4.", " 4 ", "4.00"])
def test_a_number_and_its_decimals_are_one_label(tmp_path: Path, label: str) -> None:
    text = HEADER + "".join(f"a,film {number},{label}\n" for number in range(3))
    assert {label for _, label in items(load(write(tmp_path / "t.csv", text))[0]["a"])} == {"4"}


def test_white_space_and_composed_letters_make_no_other_label(tmp_path: Path) -> None:
    task = TaskConfig(name="movie_tagging", labels=("tr\u00e8s\u00a0bon", "bon", "a  b"))
    labels = ["tre\u0300s  bon", "a\u00a0b", " bon", "tr\u00e8s bon"]
    text = HEADER + "".join(f"a,film {number},{label}\n" for number, label in enumerate(labels))
    users, rejected = load(write(tmp_path / "t.csv", text), task)
    assert [label for _, label in items(users["a"])] == ["tr\u00e8s bon", "a b", "bon", "tr\u00e8s bon"]
    assert rejected == []


def test_a_label_close_to_one_gets_a_hint(tmp_path: Path) -> None:
    text = HEADER + "".join(f"a,film {number},comdy\n" for number in range(3))
    with pytest.raises(ValueError, match="the label 'comdy'; expected one of sci-fi.* Did you mean 'comedy'?"):
        load(write(tmp_path / "t.csv", text), TaskConfig(name="movie_tagging"))


# --- columns


def test_columns_map_drop_and_reach_into_objects(tmp_path: Path) -> None:
    table = [
        {"who": "a", "id": "same", "review": {"body": f"film {n}"}, "stars": n, "when": "no time"} for n in (1, 2, 3)
    ]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in table))
    columns = {"user_id": "who", "text": "review.body", "label": "stars", "id": None}
    users, rejected = load(path, columns=columns)
    assert items(users["a"]) == [("film 1", "1"), ("film 2", "2"), ("film 3", "3")] and rejected == []
    with pytest.raises(ValueError, match="The item id 'same' is there twice"):
        load(path, columns={**columns, "id": "id"})


def test_columns_map_the_fields_of_whole_users_too(tmp_path: Path) -> None:
    history = [{"id": str(n), "review": f"film {n}", "stars": n, "time": "never"} for n in (1, 2, 3)]
    path = write(tmp_path / "t.jsonl", json.dumps({"who": "a", "role": "author", "history": history}) + "\n")
    columns = {"user_id": "who", "text": "review", "label": "stars", "role": None, "time": None}
    users, rejected = load(path, columns=columns)
    assert items(users["a"]) == [("film 1", "1"), ("film 2", "2"), ("film 3", "3")] and rejected == []


def test_only_what_the_task_needs_is_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": ["a"] * 3,
            "text": [f"film {n}" for n in range(3)],
            "label": [1, 2, 3],
            "title": pa.array([{"x": 1}] * 3),  # of no use to a rating, and no text
            "context": pa.array([[1.5]] * 3),
            "role": ["prompter", "assistant", "prompter"],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    users, rejected = load(tmp_path / "t.parquet")
    assert rejected == [] and users["a"].items[0].title is None and users["a"].items[0].context == ()


def test_a_role_column_is_ours_where_it_holds_roles_or_is_asked_for(tmp_path: Path) -> None:
    text = "user_id,text,label,role\n" + "".join(f"{user},film,3,{role}\n" for user, role in
            [("a", "target"), ("b", "base")] for _ in range(3))  # fmt: skip
    users, _ = load(write(tmp_path / "t.csv", text))
    assert {name: user.role for name, user in users.items()} == {"a": "target", "b": "base"}
    other = write(tmp_path / "u.csv", text.replace("target", "prompter").replace("base", "assistant"))
    assert {user.role for user in load(other)[0].values()} == {"target", "base"}
    with pytest.raises(ValueError, match="The role is 'prompter'; expected .*data.columns={role: null}"):
        load(other, columns={"role": "role"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txet": "review"}, "unknown field 'txet'; expected one of user_id, .*; did you mean 'text'?"),
        ({"text": "reveiw"}, "has no column 'reveiw'; it has who, review, stars; did you mean 'review'?"),
        ({"user_id": "who", "text": "review"}, "needs a column for label; it has who, review, stars: .*`oppu inspect"),
        ({"user_id": "who", "text": None, "label": "stars"}, "needs a column for text; it has who, review, stars"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_wrong_columns_are_errors_with_a_hint(tmp_path: Path, kind: str, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        write(path, "who,review,stars\na,film,3\n")
    else:
        pq.write_table(pa.table({"who": ["a"], "review": ["film"], "stars": [3]}), path)
    with pytest.raises(ValueError, match=message):
        load(path, columns=columns)


@pytest.mark.parametrize("context", ["Partner: how are you?", ["Partner: how are you?"], [b"Partner: how are you?"]])
def test_a_context_is_one_text_or_a_list(tmp_path: Path, context: Any) -> None:
    table = [{"user_id": "a", "context": context, "text": f"fine {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet")
    users, rejected = load(tmp_path / "t.parquet", TaskConfig())
    assert rejected == [] and users["a"].items[0].context == ("Partner: how are you?",)


def test_turns_that_are_objects_are_named_with_the_key_that_reads_them(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    table = [{"user_id": "a", "context": turns, "text": f"fine {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet")
    with pytest.raises(
        ValueError, match="an object with from, value; expected texts: data.columns.context=context.value"
    ):
        load(tmp_path / "t.parquet", TaskConfig())
    users, _ = load(tmp_path / "t.parquet", TaskConfig(), columns={"context": "context.value"})
    assert users["a"].items[0].context == ("hi", "ho")


# --- times


def test_a_time_format_is_read_and_kept_as_iso(tmp_path: Path) -> None:
    text = "user_id,text,label,time\n" + "".join(f"a,film,{n},0{n}/06/2023\n" for n in (3, 1, 2))
    path = write(tmp_path / "t.csv", text)
    users, _ = load(path, time_format="%d/%m/%Y")
    assert [(item.label, item.time) for item in users["a"].items] == [
        ("1", "2023-06-01T00:00:00+00:00"), ("2", "2023-06-02T00:00:00+00:00"),
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match="'03/06/2023' may begin with the day or with the month. data.time_format says"
    ):
        load(path)
    with pytest.raises(ValueError, match="data.time_format: found 'dmy'; expected a strptime format"):
        DataConfig(time_format="dmy")
