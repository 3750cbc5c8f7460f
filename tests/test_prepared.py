"""What `prepare` leaves: each user on one line, and an index by which a worker reads only its own users."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from oppu_ray.core import Item, UserHistory, UserSize
from oppu_ray.prepared import forget_prepared, read_index, read_users, write_prepared

ANN = UserHistory(
    "änn\u2028",  # a line separator for Unicode, not for us
    "target",
    (Item("1", text="eins zwei\ndrei", label="a"), Item("2", context=("Partner: hi", "You: oh"), text="vier")),
    (Item("3", text="fünf", label="b", time="2020"),),
)
BOB = UserHistory("bob", "base", (Item("1", text="x", label="b"), Item("2", title="a title", options=("p q", "r"))))
EVE = UserHistory("eve", "base", (Item("1", abstract="one two", keywords="three", label="b"), Item("2", label="a")))


def test_what_is_written_is_read_back_in_any_order(tmp_path: Path) -> None:
    index = write_prepared(tmp_path / "new", [ANN, BOB, EVE])
    assert read_index(tmp_path / "new") == index
    assert read_users(tmp_path / "new", index, ["eve", ANN.user_id, "bob"]) == [EVE, ANN, BOB]
    assert read_users(tmp_path / "new", index, []) == []


def test_the_index_holds_counts_and_no_text(tmp_path: Path) -> None:
    index = write_prepared(tmp_path, [ANN, BOB, EVE])
    assert index.sizes("target") == [UserSize(ANN.user_id, 2, 8, 1)]
    assert index.sizes("base") == [UserSize("bob", 2, 6, 0), UserSize("eve", 2, 3, 0)]
    assert index.labels == {"a": 1, "b": 2}  # of base users only
    written = json.loads((tmp_path / "index.json").read_text())
    assert set(written) == {"entries", "labels", "fingerprint", "base_fingerprint"}
    assert set(written["entries"]["bob"]) == {"role", "offset", "length", "size"}
    assert set(written["entries"]["bob"]["size"]) == {field.name for field in dataclasses.fields(UserSize)}


def test_the_fingerprint_is_that_of_the_file_and_of_nothing_else(tmp_path: Path) -> None:
    index = write_prepared(tmp_path / "a", [ANN, BOB])
    assert index.fingerprint == hashlib.sha256((tmp_path / "a" / "users.jsonl").read_bytes()).hexdigest()
    assert write_prepared(tmp_path / "b", [ANN, BOB]).fingerprint == index.fingerprint
    assert write_prepared(tmp_path / "b", [BOB, ANN]).fingerprint != index.fingerprint
    assert read_users(tmp_path / "b", read_index(tmp_path / "b"), ["bob"]) == [BOB]


def test_targets_are_not_in_the_fingerprint_of_the_base_users(tmp_path: Path) -> None:
    """It names the task base, and that name stands in every target's manifest."""
    first = write_prepared(tmp_path / "a", [ANN, BOB, EVE])
    other = dataclasses.replace(ANN, items=ANN.items[:1])
    assert write_prepared(tmp_path / "b", [other, BOB, EVE]).base_fingerprint == first.base_fingerprint
    assert write_prepared(tmp_path / "b", [ANN, BOB]).base_fingerprint != first.base_fingerprint
    assert forget_prepared(tmp_path / "a", without(ANN.user_id)) == {"target"}
    assert read_index(tmp_path / "a").base_fingerprint == first.base_fingerprint
    assert forget_prepared(tmp_path / "a", without("eve", "2")) == {"base"}
    assert read_index(tmp_path / "a").base_fingerprint != first.base_fingerprint


def test_only_the_asked_users_lines_are_read(tmp_path: Path) -> None:
    index = write_prepared(tmp_path, [ANN, BOB, EVE])
    content = (tmp_path / "users.jsonl").read_bytes()
    entry = index.entries["bob"]
    blank = bytearray(b"\xff" * len(content))
    blank[entry.offset : entry.offset + entry.length] = content[entry.offset : entry.offset + entry.length]
    (tmp_path / "users.jsonl").write_bytes(blank)
    assert read_users(tmp_path, index, ["bob"]) == [BOB]


def test_a_file_of_other_users_is_never_taken_for_the_indexed_one(tmp_path: Path) -> None:
    """As when a machine stops between the two files of a second `prepare`."""
    same_length = dataclasses.replace(BOB, user_id="rob")
    index = write_prepared(tmp_path / "a", [BOB, EVE])
    write_prepared(tmp_path / "b", [same_length, EVE])
    os.replace(tmp_path / "b" / "users.jsonl", tmp_path / "a" / "users.jsonl")
    with pytest.raises(ValueError, match=r"a/users.jsonl: byte 0: expected the line of user 'bob', found 'rob'"):
        read_users(tmp_path / "a", index, ["bob"])
    (tmp_path / "a" / "users.jsonl").write_bytes(b'{"user_id": "bo')
    with pytest.raises(ValueError, match="expected the line of user 'bob', found None; run `prepare` again"):
        read_users(tmp_path / "a", index, ["bob"])


def test_a_folder_or_user_that_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index.json does not exist: run `prepare`"):
        read_index(tmp_path)
    index = write_prepared(tmp_path, [BOB])
    assert read_users(tmp_path, index, ["eve", "bob"]) == [BOB]


def without(user_id: str, *item_ids: str) -> Callable[[UserHistory], UserHistory | None]:
    """Forgets a user, or only some items of theirs."""

    def keep(user: UserHistory) -> UserHistory | None:
        if user.user_id != user_id:
            return user
        left = tuple(item for item in user.items if item.item_id not in item_ids)
        return dataclasses.replace(user, items=left) if item_ids else None

    return keep


def test_a_forgotten_target_leaves_everything_else_where_it_was(tmp_path: Path) -> None:
    before = write_prepared(tmp_path, [BOB, ANN, EVE])
    assert forget_prepared(tmp_path, without(ANN.user_id)) == {"target"}
    index = read_index(tmp_path)
    del before.entries[ANN.user_id]
    assert index == before  # places of lines, labels and the fingerprint that names the run
    assert read_users(tmp_path, index, ["bob", "eve"]) == [BOB, EVE]
    for word in ("änn", "eins", "vier", "fünf"):
        assert word.encode() not in (tmp_path / "users.jsonl").read_bytes()
    content = (tmp_path / "users.jsonl").read_bytes()
    assert forget_prepared(tmp_path, without(ANN.user_id)) == set()
    assert (tmp_path / "users.jsonl").read_bytes() == content


def test_a_run_that_holds_the_old_index_reads_everyone_else(tmp_path: Path) -> None:
    old = write_prepared(tmp_path, [ANN, BOB, EVE])
    forget_prepared(tmp_path, without("bob", "2"))
    forget_prepared(tmp_path, without(ANN.user_id))
    assert read_users(tmp_path, old, ["eve", "bob"]) == [EVE, dataclasses.replace(BOB, items=BOB.items[:1])]
    assert read_users(tmp_path, old, [ANN.user_id, "eve"]) == [EVE]


def test_a_forgotten_base_user_makes_other_histories(tmp_path: Path) -> None:
    before = write_prepared(tmp_path, [ANN, BOB, EVE])
    assert forget_prepared(tmp_path, without("eve", "2")) == {"base"}
    index = read_index(tmp_path)
    assert index.fingerprint != before.fingerprint and index.labels == {"b": 2}
    assert index.sizes("base")[1] == UserSize("eve", 1, 3, 0)
    assert forget_prepared(tmp_path, without("bob")) == {"base"}
    assert read_index(tmp_path).labels == {"b": 1}


def test_forgetting_goes_on_after_a_crash_between_the_two_files(tmp_path: Path) -> None:
    for name, keep in (("user", without("bob")), ("item", without("bob", "1"))):
        write_prepared(tmp_path / name, [ANN, BOB, EVE])
        stale = (tmp_path / name / "index.json").read_bytes()
        forget_prepared(tmp_path / name, keep)
        wanted = read_index(tmp_path / name)
        (tmp_path / name / "index.json").write_bytes(stale)
        assert forget_prepared(tmp_path / name, keep) == {"base"}
        assert read_index(tmp_path / name) == wanted


def test_preparing_again_without_a_forgotten_target_is_the_same_run(tmp_path: Path) -> None:
    before = write_prepared(tmp_path, [ANN, BOB])
    index = write_prepared(tmp_path, [ANN, BOB], keep=without(ANN.user_id))
    assert index.fingerprint == before.fingerprint and list(index.entries) == ["bob"]
    assert (
        read_users(tmp_path, index, ["bob"]) == [BOB] and "änn".encode() not in (tmp_path / "users.jsonl").read_bytes()
    )
    assert write_prepared(tmp_path, [ANN, BOB], keep=without("bob")).fingerprint != before.fingerprint
