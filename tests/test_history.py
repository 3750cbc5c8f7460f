import dataclasses
import gzip
import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from oppu_ray.config import DataConfig, TaskConfig
from oppu_ray.core import Item, Rejected, UserHistory
from oppu_ray.history import load_histories, parse_time, split_history, write_rejected

MOVIES = TaskConfig(name="LaMP-2M")
Line = dict[str, Any] | str | bytes


def item(number: int, **changes: Any) -> dict[str, Any]:
    made = {"id": f"i{number}", "time": f"2020-01-{number:02d}", "text": f"film {number}", "label": "comedy", **changes}
    return {key: value for key, value in made.items() if value is not ...}


def user(user_id: str, num_items: int = 5, **changes: Any) -> dict[str, Any]:
    return {"user_id": user_id, "history": [item(number) for number in range(1, num_items + 1)], **changes}


def write(folder: Path, lines: Sequence[Line]) -> Path:
    path = folder / "users.jsonl"
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return path


def load(
    folder: Path,
    lines: Sequence[Line],
    task: TaskConfig = MOVIES,
    seed: int = 0,
    **options: Any,
) -> tuple[list[UserHistory], list[Rejected]]:
    return load_histories(DataConfig(path=str(write(folder, lines)), **options), task, seed)


def ids(items: Sequence[Item]) -> list[str]:
    return [item.item_id for item in items]


# --- the split


@pytest.mark.parametrize(
    ("num_items", "share", "most", "num_later"),
    [(2, 0.2, 20, 1), (5, 0.2, 20, 1), (8, 0.2, 20, 2), (10, 0.2, 20, 2), (500, 0.2, 20, 20), (500, 0.2, 0, 100),
     (3, 0.9, 20, 2), (2, 0.99, 20, 1), (10, 0.5, 3, 3)],
)  # fmt: skip
def test_split_takes_the_last_share_and_leaves_one_in_each(
    num_items: int, share: float, most: int, num_later: int
) -> None:
    items = [Item(str(number)) for number in range(num_items)]
    past, later = split_history(items, share, most)
    assert (*past, *later) == tuple(items)
    assert len(later) == num_later and past


def test_one_item_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="cannot split a history of 1; expected at least 2"):
        split_history([Item("a")], 0.2, 20)


def test_queries_are_later_than_the_past_whatever_the_files_order(tmp_path: Path) -> None:
    history = [item(number) for number in range(1, 21)]
    random.Random(0).shuffle(history)
    users, _ = load(tmp_path, [user("a", history=history), user("b", 2)], num_targets=1)
    assert ids(users[0].items) == [f"i{number}" for number in range(1, 17)]
    assert ids(users[0].queries) == ["i17", "i18", "i19", "i20"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("1999", "2000"),
        ("2000", "2000-02"),
        ("2008-05", "2008-05-02"),
        ("2009-12-31", "2010-1-2"),
        ("2018-05-02T23:00:00Z", "2018-05-02T22:00:00-02:00"),
        ("2018-05-02T10:00:00Z", "2018-05-02T10:00:00.5Z"),
        ("20140512", "2014-05-13 00:00:00"),
        ("946684799", "2000"),
    ],
)
def test_times_of_different_precision_and_zone_are_compared_as_moments(earlier: str, later: str) -> None:
    assert parse_time(earlier) < parse_time(later)


def test_integer_years_are_times_and_equal_times_keep_the_files_order(tmp_path: Path) -> None:
    history = [item(1, time=2012), item(2, time=2010), item(3, time=2012), item(4, time="2011")]
    users, _ = load(tmp_path, [user("a", history=history, role="target")])
    assert ids(users[0].items + users[0].queries) == ["i2", "i4", "i1", "i3"]
    assert users[0].items[0].time == "2010"


def test_without_times_list_order_is_time_order(tmp_path: Path) -> None:
    history = [item(number, time=...) for number in (3, 1, 2)]
    users, _ = load(tmp_path, [user("a", history=history, role="target")])
    assert ids(users[0].items) == ["i3", "i1"] and ids(users[0].queries) == ["i2"]


def test_the_files_own_split_is_kept_and_never_capped(tmp_path: Path) -> None:
    record = user("a", 30, role="target", query_start=2)
    users, _ = load(tmp_path, [{**record, "history": [item(n, time=f"20{n:02d}") for n in range(1, 31)]}])
    assert len(users[0].items) == 2 and len(users[0].queries) == 28


def test_max_items_keeps_the_latest_of_the_past(tmp_path: Path) -> None:
    users, _ = load(tmp_path, [user("a", 10, role="target"), user("b", 10, role="base")], max_items_per_user=3)
    assert ids(users[0].items) == ["i6", "i7", "i8"] and ids(users[0].queries) == ["i9", "i10"]
    assert ids(users[1].items) == ["i8", "i9", "i10"] and users[1].queries == ()


# --- roles


def test_the_most_active_become_targets_and_the_rest_base(tmp_path: Path) -> None:
    lines = [user("a", 3), user("b", 9), user("c", 6), user("d", 9)]
    users, rejected = load(tmp_path, lines, num_targets=2)
    assert [(u.user_id, u.role) for u in users[:2]] == [("b", "target"), ("d", "target")]
    assert {(u.user_id, u.role, len(u.items)) for u in users[2:]} == {("a", "base", 3), ("c", "base", 6)}
    assert [len(u.queries) for u in users] == [2, 2, 0, 0]
    assert rejected == []


def test_without_roles_and_number_at_most_half_become_targets(tmp_path: Path) -> None:
    users, _ = load(tmp_path, [user(f"u{number}", 3) for number in range(5)])
    assert [u.role for u in users] == ["target"] * 2 + ["base"] * 3


def test_roles_of_the_file_hold_and_limits_choose_among_them(tmp_path: Path) -> None:
    lines = [user(f"t{number}", 3 + number, role="target") for number in range(4)]
    lines += [user(f"b{number}", 3, role="base") for number in range(20)]
    users, _ = load(tmp_path, lines, num_targets=2, num_base=5)
    assert [u.user_id for u in users if u.role == "target"] == ["t3", "t2"]
    users_in_file_order, _ = load(tmp_path, lines, num_targets=2, num_base=5, target_order="file")
    assert [u.user_id for u in users_in_file_order if u.role == "target"] == ["t0", "t1"]
    assert sum(u.role == "base" for u in users) == 5


def test_base_users_are_drawn_by_the_seed_alone(tmp_path: Path) -> None:
    lines = [user("t", 9, role="target"), *(user(f"b{number}", 3, role="base") for number in range(20))]

    def drawn(lines: list[dict[str, Any]], seed: int) -> list[str]:
        users, _ = load(tmp_path, lines, seed=seed, num_base=6)
        return [u.user_id for u in users if u.role == "base"]

    assert drawn(lines, 1) == drawn(lines[::-1], 1) != drawn(lines, 2)


def test_a_user_in_both_roles_is_rejected_and_a_repeated_record_left_out(tmp_path: Path) -> None:
    lines = [user("a", role="target"), user("b", role="base"), user("a", role="base"), user("b", 7, role="base")]
    lines.append(user("c", role="target"))
    users, rejected = load(tmp_path, lines)
    assert [(u.user_id, len(u.items)) for u in users] == [("c", 4), ("b", 5)]
    assert {(r.user_id, r.line): r.reason.split(";")[0] for r in rejected} == {
        ("b", 4): "The user is there twice, first in line 2",
        ("a", 3): "The user is target and base",
    }


def test_roles_for_some_users_only_are_an_error_for_the_others(tmp_path: Path) -> None:
    users, (rejected,) = load(tmp_path, [user("a", role="target"), user("b")])
    assert [u.user_id for u in users] == ["a"]
    assert (rejected.user_id, rejected.reason) == ("b", "The user has no role, others have.")


# --- bad input: the bad user is rejected by name, the good one stays

DEEP = '{"user_id": "bad", "history": ' + "[" * 100_000
BAD: dict[str, tuple[Line, str]] = {
    "cut off": ('{"user_id": "bad", "history": [{"id": "1", "te', "not valid JSON: Unterminated string"),
    "not an object": ("[1, 2]", "The record is a list; expected an object."),
    "too deep": (DEEP, "not valid JSON: "),
    "number too long": ('{"user_id": "bad", "x": ' + "1" * 5000 + "}", "not valid JSON: "),
    "raw NUL": (b'{"user_id": "bad", "history": ["\0"]}', "it holds a NUL byte"),
    "no user id": ({"history": [item(1)]}, "The record has no user_id; expected a text or a number."),
    "user id of wrong type": ({"user_id": [7], "history": [item(1)]}, "The record has a user_id that is a list"),
    "no history": ({"user_id": "bad"}, "The record's history is nothing; expected a list of items."),
    "history of wrong type": (
        {"user_id": "bad", "history": {"a": 1}},
        "The record's history is an object; expected a list",
    ),
    "empty history": ({"user_id": "bad", "history": []}, "The history is empty."),
    "one item": (user("bad", 1), "The user has 1 item; expected at least 2 (data.min_items)."),
    "item of wrong type": (user("bad", history=[item(1), "film"]), "Item 2 is a text; expected an object."),
    "item without id": (
        user("bad", history=[item(1), item(2, id=...)]),
        "Item 2 has no id; expected a text or a number.",
    ),
    "item id of wrong type": (
        user("bad", history=[item(1, id=True), item(2)]),
        "Item 1 has an id that is true or false",
    ),
    "twice the same id": (user("bad", history=[item(1), item(2), item(1)]), "The item id 'i1' is there twice"),
    "no text": (user("bad", history=[item(1), item(2, text=...)]), "Item 'i2' has no text, which movie_tagging needs"),
    "blank text": (user("bad", history=[item(1), item(2, text=" \n")]), "Item 'i2' has no text"),
    "text of wrong type": (
        user("bad", history=[item(1), item(2, text=["a"])]),
        "Item 'i2' has a text that is a list; expected a text",
    ),
    "no label": (user("bad", history=[item(1), item(2, label=None)]), "Item 'i2' has no label"),
    "unknown label": (
        user("bad", history=[item(1), item(2, label="Comedy")]),
        "Item 'i2' has the label 'Comedy'; expected one of sci-fi, ",
    ),
    "label of wrong type": (
        user("bad", history=[item(1), item(2, label=True)]),
        "Item 'i2' has a label that is true or false",
    ),
    "time in some": (user("bad", history=[item(1), item(2, time=...)]), "1 of 2 items have no time"),
    "no such time": (
        user("bad", history=[item(1), item(2, time="yesterday")]),
        "'yesterday' is not a time that is known",
    ),
    "day or month": (
        user("bad", history=[item(1), item(2, time="05/06/2020")]),
        "may begin with the day or with the month",
    ),
    "no such day": (
        user("bad", history=[item(1), item(2, time="2020-02-30")]),
        "'2020-02-30': day is out of range for month",
    ),
    "time of wrong type": (user("bad", history=[item(1), item(2, time=[1])]), "Item 'i2' has a time that is a list"),
    "escaped NUL": (
        user("bad", history=[item(1), item(2, text="a\0b")]),
        "Item 'i2' has a text with a NUL character at position 1.",
    ),
    "surrogate": (
        user("bad", history=[item(1), item(2, text="a\ud800")]),
        "Item 'i2' has a text with the lone surrogate U+D800 at position 1.",
    ),
    "invalid UTF-8": (
        json.dumps(user("bad")).encode().replace(b"film 2", b"film \xff"),
        "Item 'i2' has a text with the byte 0xff, not UTF-8, at position 5. Is the file in another encoding",
    ),
    "unknown role": (user("bad", role="tester"), "The role is 'tester'; expected 'target', 'base' or none"),
    "role of wrong type": (user("bad", role=["target"]), "expected 'target', 'base' or none"),
    "another task": (user("bad", task="LaMP-3"), "The record's task is 'LaMP-3'; expected 'movie_tagging'"),
    "unknown task": (user("bad", task=3), "The record's task is '3'; expected 'movie_tagging'"),
    "query_start too high": (user("bad", query_start=6), "query_start is 6; expected a whole number from 1 to 5"),
    "query_start of wrong type": (user("bad", query_start="3"), "query_start is 3; expected a whole number"),
    "query_start true": (user("bad", query_start=True), "query_start is True; expected a whole number"),
    "query before the past": (
        user("bad", history=[item(1), item(3), item(2)], query_start=2),
        "Item 'i3' of the past is later than the query 'i2' of 2020-01-02.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_user_is_rejected_by_name_and_the_rest_goes_on(tmp_path: Path, case: str) -> None:
    line, reason = BAD[case]
    users, (rejected,) = load(tmp_path, [user("good"), line, user("fine")])
    assert {u.user_id for u in users} == {"good", "fine"}
    assert reason in rejected.reason
    assert (rejected.path, rejected.line) == (str(tmp_path / "users.jsonl"), 2)
    named = {"not an object": None, "no user id": None, "user id of wrong type": "[7]"}
    assert rejected.user_id == named.get(case, "bad")
    assert len(rejected.value) <= 80


def test_a_100_mb_line_is_rejected_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl.gz"
    good = json.dumps(user("good")).encode()
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"user_id": "big", "history": [{"id": "1", "text": "')
        for _ in range(100):
            stream.write(b"a" * 2**20)
        stream.write(b'"}]}\n' + good + b"\n")
    tracemalloc.start()
    users, (rejected,) = load_histories(DataConfig(path=str(path)), MOVIES, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [u.user_id for u in users] == ["good"]
    assert (rejected.line, rejected.user_id, len(rejected.value)) == (1, "big", 80)
    assert "expected at most 16777216" in rejected.reason
    assert peak < 60 * 2**20


def test_a_truncated_gzip_file_keeps_the_users_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl.gz"
    rng = random.Random(0)
    lines = [json.dumps(user(f"u{number}", x=rng.random())) + "\n" for number in range(2000)]
    path.write_bytes(gzip.compress("".join(lines).encode())[:-4000])
    users, rejected = load_histories(DataConfig(path=str(path)), MOVIES, 0)
    assert 100 < len(users) < 2000
    assert "unreadable from here on" in rejected[-1].reason and rejected[-1].line == len(users) + 1


def test_blank_lines_and_a_byte_order_mark_are_no_users(tmp_path: Path) -> None:
    lines: list[Line] = [b"\xef\xbb\xbf" + json.dumps(user("a")).encode(), "", json.dumps(user("b")) + "\r"]
    users, rejected = load(tmp_path, lines)
    assert {u.user_id for u in users} == {"a", "b"} and rejected == []


def test_items_may_lack_the_answer_where_only_queries_need_it(tmp_path: Path) -> None:
    papers = [{"id": str(n), "text": f"paper {n}"} for n in range(4)]
    asked = {"id": "q", "text": "paper", "options": ["a", "b"], "label": "[2]"}
    users, rejected = load(
        tmp_path,
        [
            user("a", history=[*papers, asked], role="target"),
            user("b", history=papers, role="target"),
            user("c", history=papers, role="base"),
            user("d", history=[*papers, {**asked, "options": ["a"]}], role="target"),
            user("e", history=papers, role="target", query_start=3),
        ],
        TaskConfig(name="LaMP-1"),
    )
    assert [(u.user_id, len(u.items), len(u.queries)) for u in users] == [("a", 4, 1), ("b", 4, 0), ("c", 4, 0)]
    reasons = {r.user_id: r.reason for r in rejected}
    assert reasons == {
        "d": "Item 'q' has 1 options; expected two references.",
        "e": "The query '3' has no options and no label, which citation needs in a query.",
    }


def test_labels_of_the_config_replace_the_tables(tmp_path: Path) -> None:
    history = [item(n, label=label) for n, label in enumerate(["space", "drama", "space"], start=1)]
    users, _ = load(tmp_path, [user("a", history=history)], TaskConfig(name="LaMP-2M", labels=("space", "drama")))
    assert [i.label for i in users[0].items] == ["space", "drama"]


def test_a_file_without_a_good_user_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no good user for movie_tagging remains; .*line 1, user 'bad': The history is empty."
    ):
        load(tmp_path, [{"user_id": "bad", "history": []}])
    with pytest.raises(ValueError, match="no good user for movie_tagging remains; it holds no users"):
        load(tmp_path, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_share": 0.0}, "query_share: found 0.0; expected greater than 0"),
        ({"target_order": "random"}, "target_order: found 'random'; expected 'active', 'file' or 'hash'"),
        ({"num_base": -1}, "num_base: found -1; expected at least 0"),
    ],
)
def test_options_out_of_range_are_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [user("a")], **options)


def test_rejected_jsonl_is_readable_whatever_was_rejected(tmp_path: Path) -> None:
    lines: list[Line] = [user("good"), *(line for line, _ in BAD.values() if line != BAD["twice the same id"][0])]
    _, rejected = load(tmp_path, lines)
    write_rejected(tmp_path / "rejected.jsonl", rejected)
    written = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [Rejected(**entry) for entry in written] == [
        one if one.user_id else dataclasses.replace(one, value="") for one in rejected
    ]
    assert len(written) == len(lines) - 1


def test_what_is_rejected_names_its_user_whole_or_tells_nothing(tmp_path: Path) -> None:
    """So that forgetting finds it."""
    long, path = "ann of " + 30 * "anywhere ", tmp_path / "users.csv"
    lines = [user("good"), user(f" {long} ", history=[]), f'{{"user_id": "{long}", "history": ["my secret'.encode()]
    _, rejected = load(tmp_path, lines)
    assert [one.user_id for one in rejected] == [long.strip(), long.strip()]
    good = "".join(f"bob,{number},comedy\n" for number in range(3))
    path.write_text(f"user_id,text,label\n{good} ann ,my secret\n,his secret,comedy\n")
    _, rejected = load_histories(DataConfig(format="table", path=str(path)), MOVIES, 0)
    write_rejected(tmp_path / "rejected.jsonl", rejected)
    of_nobody, of_ann = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(of_ann)["user_id"] == "ann" and "my secret" in of_ann
    assert "secret" not in of_nobody and "cannot be known" in of_nobody


def test_two_normal_forms_of_an_id_are_one_user(tmp_path: Path) -> None:
    users, (rejected,) = load(tmp_path, [user("ren\u00e9"), user("rene\u0301")])
    assert [one.user_id for one in users] == ["ren\u00e9"]
    assert rejected.reason == "The user is there twice, first in line 1; this record is left out."


def test_no_corruption_of_a_file_escapes_as_another_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    clean = "".join(json.dumps(user(f"u{number}", 3)) + "\n" for number in range(4)).encode()
    num_rejected = 0
    for _ in range(300):
        damaged = bytearray(clean)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'\0\xff"{}[],:\n9a\\')
        path = tmp_path / "users.jsonl"
        path.write_bytes(damaged)
        try:
            users, rejected = load_histories(DataConfig(path=str(path)), MOVIES, 0)
        except ValueError as error:
            assert "no good user for movie_tagging remains" in str(error)
            continue
        write_rejected(tmp_path / "rejected.jsonl", rejected)
        assert all(len(entry.value) <= 80 for entry in rejected)
        num_rejected += len(rejected)
    assert num_rejected > 300


def test_a_sample_by_hash_is_the_same_in_every_order_of_the_file(tmp_path: Path) -> None:
    lines = [user(f"u{number}", num_items=2 + number, role="target") for number in range(9)]
    sample = [one.user_id for one in load(tmp_path, lines, num_targets=3, target_order="hash")[0]]
    assert sample == [one.user_id for one in load(tmp_path, lines[::-1], num_targets=3, target_order="hash")[0]]
    assert sample == ["u3", "u5", "u2"]  # the smallest SHA-256 of all nine
    more = [one.user_id for one in load(tmp_path, lines, num_targets=5, target_order="hash")[0]]
    assert more[:3] == sample


def test_first_queries_cut_any_split(tmp_path: Path) -> None:
    lines = [user("ann", 8, role="target", query_start=3), user("bob", 8, role="base")]
    (ann, bob), _ = load(tmp_path, lines, first_queries=2)
    assert (ids(ann.items), ids(ann.queries)) == (["i1", "i2", "i3"], ["i4", "i5"]) and len(bob.items) == 8
    (ann, _), _ = load(tmp_path, lines)
    assert len(ann.queries) == 5


def test_settings_are_chosen_on_base_users_only(tmp_path: Path) -> None:
    lines = [user(f"t{number}", 9, role="target") for number in range(3)]
    lines += [user(f"b{number}", 4 + number, role="base", query_start=3) for number in range(4)]
    users, rejected = load(tmp_path, lines, base_only=True, num_targets=2)
    assert [(one.user_id, one.role) for one in users[:2]] == [("b3", "target"), ("b2", "target")]
    assert {one.user_id for one in users} == {"b0", "b1", "b2", "b3"} and rejected == []
    assert len(users[0].items) == 3 and len(users[0].queries) == 4
