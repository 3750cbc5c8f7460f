import csv
import datetime
import gzip
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from oppu_ray.config import DataConfig, TaskConfig
from oppu_ray.core import Rejected
from oppu_ray.formats import RawUser, files, read_users, short
from oppu_ray.history import load_histories
from oppu_ray.tasks import TASKS, get_task

TEXT = 'It is "odd": a [1]: case'
LAMP_QUESTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "citation": (
        f'For an author who has written the paper with the title "{TEXT}", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "Paper "A"" [2]: "Paper B"',
        "[2]",
        {"text": TEXT, "options": ['Paper "A"', "Paper B"], "label": "[2]"},
    ),
    "news_categorize": (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        f"without further explanation. categories: [travel, education] article: {TEXT}",
        "travel",
        {"text": TEXT, "label": "travel"},
    ),
    "movie_tagging": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        f"explanation. tags: [sci-fi, comedy] description: {TEXT}",
        "comedy",
        {"text": TEXT, "label": "comedy"},
    ),
    "product_rating": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        f"further explanation. review: {TEXT}",
        "4",
        {"text": TEXT, "label": "4"},
    ),
    "news_headline": (f"Generate a headline for the following article: {TEXT}", "H", {"text": TEXT, "title": "H"}),
    "scholarly_title": (
        f"Generate a title for the following abstract of a paper: {TEXT}", "T", {"text": TEXT, "title": "T"}
    ),
    "email_subject": (f"Generate a subject for the following email: {TEXT}", "S", {"text": TEXT, "title": "S"}),
    "tweet_paraphrase": (
        f"Paraphrase the following tweet without any explanation before or after it: {TEXT}",
        "so odd!",
        {"keywords": TEXT, "text": "so odd!"},
    ),
}  # fmt: skip
LAMP_ITEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "citation": ({"title": "P", "abstract": "A", "citation": "C"}, {"text": "P", "abstract": "A", "title": "C"}),
    "news_categorize": (
        {"text": "X", "title": "T", "category": "crime"},
        {"text": "X", "title": "T", "label": "crime"},
    ),
    "movie_tagging": ({"description": "X", "tag": "action"}, {"text": "X", "label": "action"}),
    "product_rating": ({"text": "X", "score": 5}, {"text": "X", "label": "5"}),
    "news_headline": ({"text": "X", "title": "T"}, {"text": "X", "title": "T"}),
    "scholarly_title": ({"title": "T", "abstract": "X"}, {"text": "X", "title": "T"}),
    "email_subject": ({"text": "X", "title": "T"}, {"text": "X", "title": "T"}),
    "tweet_paraphrase": ({"text": "X"}, {"text": "X"}),
}
MOVIES = TaskConfig(name="movie_tagging")
MOVIE_QUESTION = LAMP_QUESTIONS["movie_tagging"][0]


def dump(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(data: DataConfig, task: str = "movie_tagging") -> list[RawUser | Rejected]:
    return list(read_users(data, get_task(TaskConfig(name=task))))


def records(data: DataConfig, task: str = "movie_tagging") -> list[dict[str, Any]]:
    return [raw.record for raw in read(data, task) if isinstance(raw, RawUser)]


def profile(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": str(n), "description": f"film {n}", "tag": "action", "date": f"2020-01-0{n}"} for n in numbers]


def questions(*users: tuple[str, int]) -> list[dict[str, Any]]:
    return [
        {"id": f"q{n}", "user_id": user_id, "input": MOVIE_QUESTION, "profile": profile(1, 2, 3)}
        for user_id, n in users
    ]


def golds(*numbers: int, task: str = "LaMP_2M") -> dict[str, Any]:
    return {"task": task, "golds": [{"id": f"q{n}", "output": "comedy"} for n in numbers]}


# --- LaMP's official files


@pytest.mark.parametrize("name", LAMP_QUESTIONS)
def test_every_lamp_task_is_read_into_our_fields(tmp_path: Path, name: str) -> None:
    question, gold, query = LAMP_QUESTIONS[name]
    theirs, ours = LAMP_ITEMS[name]
    asked = {"id": "210", "user_id": 21, "input": question, "profile": [{"id": "210", "date": 2014, **theirs}]}
    data = DataConfig(
        format="lamp",
        path=str(dump(tmp_path / "dev_questions.json", [asked])),
        outputs_path=str(dump(tmp_path / "dev_outputs.json", {"task": "", "golds": [{"id": "210", "output": gold}]})),
    )
    (record,) = records(data, name)
    assert record["queries"] == [{"id": "210", **query}]
    (item,) = record["history"]
    assert {field: value for field, value in item.items() if value} == {"id": "profile-210", "time": "2014", **ours}
    users, rejected = load_histories(data, TaskConfig(name=name), 0)
    assert rejected == [] and len(users[0].items) == len(users[0].queries) == 1


def test_all_lamp_tasks_of_the_table_can_be_read() -> None:
    assert set(LAMP_QUESTIONS) == set(LAMP_ITEMS) == {task.name for task in TASKS if task.lamp}


def test_lamp_user_split_takes_the_role_from_the_file(tmp_path: Path) -> None:
    for part, names in (("train", [("a", 1), ("b", 2), ("a", 3)]), ("dev", [("c", 4)])):
        dump(tmp_path / f"{part}_questions.json", questions(*names))
        dump(tmp_path / f"{part}_outputs.json", golds(1, 2, 3, 4))
    users, rejected = load_histories(DataConfig(format="lamp", path=str(tmp_path)), MOVIES, 0)
    assert rejected == []
    assert {(u.user_id, u.role, len(u.items), len(u.queries)) for u in users} == {
        ("a", "base", 3 + 2, 0),  # two questions, one profile
        ("b", "base", 3 + 1, 0),
        ("c", "target", 3, 1),
    }


def test_lamp_time_split_has_no_roles_and_keeps_the_files_queries(tmp_path: Path) -> None:
    path = dump(tmp_path / "q.json", questions(("a", 1), ("a", 2), ("b", 3)))
    outputs = dump(tmp_path / "o.json", golds(1, 2, 3))
    data = DataConfig(format="lamp", path=str(path), outputs_path=str(outputs), num_targets=1)
    users, _ = load_histories(data, MOVIES, 0)
    assert [(u.user_id, u.role) for u in users] == [("a", "target"), ("b", "base")]
    assert [(len(u.items), len(u.queries)) for u in users] == [(3, 2), (4, 0)]


def test_files_without_user_ids_have_one_user_per_question(tmp_path: Path) -> None:
    asked = [{key: value for key, value in q.items() if key != "user_id"} for q in questions(("", 1), ("", 2))]
    path, outputs = dump(tmp_path / "q.json", asked), dump(tmp_path / "o.json", golds(1, 2))
    found = records(DataConfig(format="lamp", path=str(path), outputs_path=str(outputs)))
    assert [record["user_id"] for record in found] == ["q1", "q2"]


def test_a_bad_question_is_rejected_by_user_and_the_rest_goes_on(tmp_path: Path) -> None:
    asked = questions(("a", 1), ("b", 2), ("c", 3), ("d", 4))
    asked[1]["input"] = "What is the capital of France?"
    asked[2]["profile"] = "none"
    path, outputs = dump(tmp_path / "q.json", [*asked, 7]), dump(tmp_path / "o.json", golds(1, 2, 3))
    found = read(DataConfig(format="lamp", path=str(path), outputs_path=str(outputs)))
    assert [raw.record["user_id"] for raw in found if isinstance(raw, RawUser)] == ["a"]
    reasons = {raw.user_id: raw.reason for raw in found if isinstance(raw, Rejected)}
    assert reasons["b"].startswith("Question q2 is not one of LaMP-2M")
    assert reasons["c"] == "The record's profile is a text; expected a list."
    assert reasons["d"] == "Question q4 has no gold; expected its id in the outputs file."
    assert reasons[None] == "Record 5 of the list is a number; expected an object."


@pytest.mark.parametrize("missing", [{"user_id": None}, {"id": None}, {"user_id": True}])
def test_a_question_of_nobody_is_rejected(tmp_path: Path, missing: dict[str, Any]) -> None:
    asked = [{**question, **missing} for question in questions(("a", 1), ("b", 2))]
    if "id" in missing:
        asked = [{key: value for key, value in question.items() if key != "user_id"} for question in asked]
    path, outputs = dump(tmp_path / "q.json", asked), dump(tmp_path / "o.json", golds(1, 2))
    found = read(DataConfig(format="lamp", path=str(path), outputs_path=str(outputs)))
    assert all(isinstance(raw, Rejected) and "user_id" in raw.reason for raw in found)
    assert len(found) == 2


def test_a_cell_may_be_as_long_as_any_record(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"user_id": "ann", "text": "x" * 200_000, "label": "action"}])
    (record,) = records(DataConfig(format="table", path=str(path)))
    assert len(record["history"][0]["text"]) == 200_000


def test_invalid_utf8_in_a_list_costs_one_user(tmp_path: Path) -> None:
    path, outputs = dump(tmp_path / "q.json", questions(("a", 1), ("b", 2))), dump(tmp_path / "o.json", golds(1, 2))
    path.write_bytes(path.read_bytes().replace(b"film 3", b"film \xe9", 1))
    data = DataConfig(format="lamp", path=str(path), outputs_path=str(outputs))
    users, (rejected,) = load_histories(data, MOVIES, 0)
    assert [u.user_id for u in users] == ["b"]
    assert rejected.user_id == "a"
    assert rejected.reason.startswith("Item 'profile-3' has a text with the byte 0xe9, not UTF-8, at position 5.")


@pytest.mark.parametrize(("task_id", "name", "fits"), [
    ("LaMP_2", "movie_tagging", True), ("LaMP_8", "movie_tagging", True), ("LaMP_2M", "movie_tagging", True),
    ("LaMP_2", "news_categorize", True), ("LaMP_2N", "movie_tagging", False), ("LaMP_3", "movie_tagging", False),
])  # fmt: skip
def test_golds_of_another_task_are_an_error(tmp_path: Path, task_id: str, name: str, fits: bool) -> None:
    path, outputs = dump(tmp_path / "q.json", []), dump(tmp_path / "o.json", golds(1, task=task_id))
    data = DataConfig(format="lamp", path=str(path), outputs_path=str(outputs))
    if fits:
        assert read(data, name) == []
    else:
        with pytest.raises(ValueError, match=f"o.json: golds of task '{task_id}'; expected LaMP_2M for movie_tagging"):
            read(data, name)


def test_a_list_is_read_across_chunks_and_to_the_first_broken_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 7)
    asked = questions(*((f"u{n}", n) for n in range(1, 8)))
    path, outputs = dump(tmp_path / "q.json", asked), dump(tmp_path / "o.json", golds(*range(1, 8)))
    data = DataConfig(format="lamp", path=str(path), outputs_path=str(outputs))
    assert [record["user_id"] for record in records(data)] == [f"u{n}" for n in range(1, 8)]
    path.write_text(path.read_text()[:-30])
    (rejected,) = [raw for raw in read(data) if isinstance(raw, Rejected)]
    assert len(records(data)) == 6
    assert rejected.user_id == "u7" and "Record 7 of the list is broken, cut off" in rejected.reason


def test_a_list_record_over_the_limit_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 1000)
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 5000)
    asked = questions(("a", 1), ("b", 2))
    asked[1]["profile"][0]["description"] = "x" * 50_000
    path, outputs = dump(tmp_path / "q.json", asked), dump(tmp_path / "o.json", golds(1, 2))
    found = read(DataConfig(format="lamp", path=str(path), outputs_path=str(outputs)))
    assert [type(raw) for raw in found] == [Rejected, RawUser]
    assert isinstance(found[0], Rejected) and "over 5000 characters" in found[0].reason


# --- the OPPU archive


def archive(folder: Path, targets: str, labels: str, task_id: str) -> DataConfig:
    history = [{**item, "date": 2015 - number} for number, item in enumerate(profile(1, 2, 3))]
    base = {"user_id": "1", "profile": history, "query": [{"id": "q1", "input": MOVIE_QUESTION, "gold": "action"}]}
    target = {"user_id": 2, "profile": history, "query": [{"id": "q2", "input": MOVIE_QUESTION}]}
    dump(folder / "user_others.json", [base])
    dump(folder / targets, [target, {"user_id": "3", "profile": history, "query": [7]}])
    dump(folder / labels, golds(2, task=task_id))
    dump(folder / "profile_user_100.json", [{"id": "2", "output": "likes films"}])
    return DataConfig(format="oppu", path=str(folder))


@pytest.mark.parametrize(
    ("targets", "labels", "task_id"),
    [
        ("user_top_100_history.json", "user_top_100_history_label.json", "LaMP_8"),
        ("user_more_100_history.json", "user_top_100_history_label.json", "LaMP_2M"),
        ("user_more_100_history.json", "user_more_100_history_label.json", "LaMP_2M"),
    ],
)
def test_the_archive_with_its_odd_names_ids_and_dates(tmp_path: Path, targets: str, labels: str, task_id: str) -> None:
    users, (rejected,) = load_histories(archive(tmp_path, targets, labels, task_id), MOVIES, 0)
    assert [(u.user_id, u.role) for u in users] == [("2", "target"), ("1", "base")]
    assert [(item.item_id, item.time) for item in users[0].items] == [
        ("profile-3", "2013"), ("profile-2", "2014"), ("profile-1", "2015"),
    ]  # fmt: skip
    assert users[0].queries[0].label == "comedy" and users[0].queries[0].item_id == "q2"
    assert [item.label for item in users[1].items] == ["action"] * 4 and users[1].queries == ()
    assert (rejected.user_id, rejected.reason) == ("3", "The query 7 is a number; expected an object.")


def test_missing_files_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="user_others.json does not exist; expected a JSON list"):
        read(DataConfig(format="oppu", path=str(tmp_path)))
    with pytest.raises(ValueError, match="data.outputs_path: .*train_outputs.json: .*cannot be read: No such file"):
        read(DataConfig(format="lamp", path=str(tmp_path)))
    with pytest.raises(ValueError, match="o.json: expected a JSON list, it starts with"):
        path = dump(tmp_path / "o.json", golds(1))
        read(DataConfig(format="lamp", path=str(path), outputs_path=str(path)))
    (tmp_path / "t" / "train_questions.json").mkdir(parents=True)
    dump(tmp_path / "t" / "train_outputs.json", golds(1))
    with pytest.raises(ValueError, match="/t.*: cannot be read: Is a directory"):
        read(DataConfig(format="lamp", path=str(tmp_path / "t")))
    with pytest.raises(ValueError, match="data.path: '' does not exist; expected a file or a folder of parts"):
        read(DataConfig())
    with pytest.raises(ValueError, match="data.format 'oppu' holds LaMP's tasks only; .* got 'chat_reply'"):
        read(DataConfig(format="oppu", path=str(tmp_path)), "chat_reply")


# --- tables and HF datasets

ROWS: list[dict[str, Any]] = [
    {"who": 7, "when": "2020-01-02", "review": "fine", "stars": 4.0},
    {"who": 8, "when": "2020-01-01", "review": "bad", "stars": 1.0},
    {"who": 7, "when": "2020-01-01", "review": "so, so", "stars": 3.0},
    {"who": 8, "when": "2020-01-03", "review": "good\nfilm", "stars": 5.0},
]
COLUMNS = {"user_id": "who", "time": "when", "text": "review", "label": "stars"}
RATINGS = TaskConfig(name="product_rating")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    dated = [{**row, "when": datetime.date.fromisoformat(row["when"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dated), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet", "hf"])
def test_rows_are_grouped_into_users(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if suffix == "parquet":
        data = DataConfig(format="table", path=str(write_parquet(tmp_path / "t.parquet", ROWS)), columns=COLUMNS)
    elif suffix == "hf":
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        write_parquet(tmp_path / "set" / "train.parquet", ROWS)
        data = DataConfig(format="hf", hf_name=str(tmp_path / "set"), columns=COLUMNS)
    else:
        path = write_csv(tmp_path / "t.csv", [{**row, "stars": int(row["stars"])} for row in ROWS])
        if suffix == "csv.gz":
            (tmp_path / "t.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        data = DataConfig(format="table", path=str(tmp_path / f"t.{suffix}"), columns=COLUMNS)
    users, rejected = load_histories(data, RATINGS, 0)
    assert rejected == []
    items = {u.user_id: [(item.text, item.label) for item in u.items + u.queries] for u in users}
    assert items == {"7": [("so, so", "3"), ("fine", "4")], "8": [("bad", "1"), ("good\nfilm", "5")]}


def test_an_hf_dataset_of_whole_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    history = [{"id": str(n), "text": f"review {n}", "label": "3", "raw": n} for n in range(3)]
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"user_id": n, "role": role, "history": history}) for n, role in ((1, "target"), (2, "base"))]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    users, rejected = load_histories(DataConfig(format="hf", hf_name=str(tmp_path / "set")), RATINGS, 0)
    assert rejected == []
    assert [(u.user_id, u.role, len(u.items)) for u in users] == [("1", "target", 2), ("2", "base", 3)]
    with pytest.raises(ValueError, match="data.hf_name: cannot load split 'dev' of"):
        read(DataConfig(format="hf", hf_name=str(tmp_path / "set"), hf_split="dev"))


def test_a_bad_row_costs_its_user_by_name_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "t.csv"
    path.write_text("user_id,text\nu,one\nv\n,two\nw," + "x" * 2000 + "\nu,three\nv,four\nw,five\n")
    found = read(DataConfig(format="table", path=str(path)), "tweet_paraphrase")
    assert [(raw.line, raw.user_id, raw.reason) for raw in found if isinstance(raw, Rejected)] == [
        (4, None, "The row has no user id, so whose item it is cannot be known."),
        (3, "v", "The row in line 3 is not valid CSV: it has 1 cells, and the header 2."),
        (5, "w", "The row in line 5 is not valid CSV: The line has 2003 bytes; expected at most 1000."),
    ]
    (user,) = [raw for raw in found if isinstance(raw, RawUser)]
    assert [(item["id"], item["text"]) for item in user.record["history"]] == [("row-2", "one"), ("row-6", "three")]


def test_a_user_with_two_roles_in_a_table_has_none(tmp_path: Path) -> None:
    rows = [{"user_id": u, "role": role, "text": t, "label": 3} for u, role, t in
            [("a", "base", "x"), ("a", "target", "y"), ("b", "target", "x"), ("b", "target", "y")]]  # fmt: skip
    data = DataConfig(format="table", path=str(write_csv(tmp_path / "t.csv", rows)))
    users, (rejected,) = load_histories(data, RATINGS, 0)
    assert [u.user_id for u in users] == ["b"]
    assert (rejected.user_id, rejected.value, rejected.line) == ("a", "base and target", 2)


def test_wrong_column_mappings_are_errors_that_list_the_columns(tmp_path: Path) -> None:
    path = str(write_csv(tmp_path / "t.csv", ROWS))
    for columns, message in [
        ({"user": "who"}, "data.columns: unknown field 'user'; expected one of user_id, role, id, time"),
        ({"user_id": "name"}, "t.csv has no column 'name'; it has who, when, review, stars"),
        ({"text": "review"}, "t.csv needs a column for user_id; it has who, when, review, stars"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(DataConfig(format="table", path=path, columns=columns))
    (tmp_path / "t.parquet").write_text("who,when")
    with pytest.raises(ValueError, match="t.parquet: not a Parquet file"):
        read(DataConfig(format="table", path=str(tmp_path / "t.parquet")))
    (tmp_path / "old.csv").write_bytes(b"user_id,text\rann,film\r")
    with pytest.raises(ValueError, match="old.csv: expected a header line"):
        read(DataConfig(format="table", path=str(tmp_path / "old.csv")))
    with pytest.raises(ValueError, match="t.xlsx holds .xlsx; format 'table' reads one of .csv, .tsv, .parquet"):
        read(DataConfig(format="table", path=str(dump(tmp_path / "t.xlsx", 1))))


# --- the embedded chats


def turn(sender: str, *texts: str, minute: int) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text, "timestamp": f"2018-05-02T10:{minute:02d}:00Z"} for text in texts]


CHATS = {
    "c1": {"messages": [
        turn("ann", "hello", minute=1), turn("bob", "hi", "what's up", minute=2), turn("ann", " ", minute=3),
        turn("ann", "not much", minute=4), turn("bob", "same", minute=5), turn("ann", "ok", minute=6),
    ]},
    "c0": {"messages": [turn("bob", "earlier?", minute=0), turn("ann", "yes", minute=0)]},
    "alone": {"messages": [turn("cy", "anyone?", minute=7), turn("bob", "", minute=8), turn("cy", "hm", minute=9)]},
}  # fmt: skip


def write_wheel(folder: Path, chats: object = CHATS) -> Path:
    path = folder / "chitchat_dataset-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("chitchat_dataset/dataset.json", json.dumps(chats))
        info = "chitchat_dataset-0.9.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: chitchat-dataset\nVersion: 0.9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_chats_become_replies_with_their_context_in_time_order(tmp_path: Path) -> None:
    data = DataConfig(format="chitchat", path=str(write_wheel(tmp_path)), num_targets=1)
    users, rejected = load_histories(data, TaskConfig(), 0)
    assert rejected == [] and [(u.user_id, u.role) for u in users] == [("ann", "target"), ("bob", "base")]
    ann = users[0]
    assert [(item.item_id, item.context, item.text) for item in (*ann.items, *ann.queries)] == [
        ("c0.1", ("Partner: earlier?",), "yes"),
        ("c1.3", ("You: hello", "Partner: hi what's up"), "not much"),
        ("c1.5", ("Partner: hi what's up", "You: not much", "Partner: same"), "ok"),
    ]


def test_the_wheel_is_downloaded_once_and_read_without_installing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    write_wheel(shop)
    monkeypatch.setenv("OPPU_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    assert {record["user_id"] for record in records(DataConfig(format="chitchat"), "chat_reply")} == {"ann", "bob"}
    (wheel,) = (tmp_path / "home" / "wheels").iterdir()
    assert wheel.name == next(shop.iterdir()).name
    shutil.rmtree(shop)
    assert {record["user_id"] for record in records(DataConfig(format="chitchat"), "chat_reply")} == {"ann", "bob"}


def test_a_file_that_is_not_the_wheel_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    for content in (b"not a zip", write_wheel(tmp_path).read_bytes().replace(b"dataset.json", b"dataset.jsox")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.whl: expected the chitchat-dataset==0.9.0 wheel"):
            read(DataConfig(format="chitchat", path=str(path)), "chat_reply")


# --- values in errors


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\ud800" * 200, "\0" * 200, {"a": ["b" * 500] * 500}, list(range(10**5))]
)
def test_a_value_in_an_error_is_short_and_writable(value: object) -> None:
    assert 0 < len(short(value)) <= 80
    short(value).encode("utf-8")
    assert "\0" not in short(value)
