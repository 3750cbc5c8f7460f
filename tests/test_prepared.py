"""What `prepare` leaves: each user on one line, and an index by which a worker reads only its own users."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from oppu_ray.core import Item, UserHistory, UserSize
from oppu_ray.prepared import read_index, read_users, write_prepared

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
    assert set(written) == {"entries", "labels", "fingerprint"}
    assert set(written["entries"]["bob"]) == {"role", "offset", "length", "size"}
    assert set(written["entries"]["bob"]["size"]) == {field.name for field in dataclasses.fields(UserSize)}


def test_the_fingerprint_is_that_of_the_file_and_of_nothing_else(tmp_path: Path) -> None:
    index = write_prepared(tmp_path / "a", [ANN, BOB])
    assert index.fingerprint == hashlib.sha256((tmp_path / "a" / "users.jsonl").read_bytes()).hexdigest()
    assert write_prepared(tmp_path / "b", [ANN, BOB]).fingerprint == index.fingerprint
    assert write_prepared(tmp_path / "b", [BOB, ANN]).fingerprint != index.fingerprint
    assert read_users(tmp_path / "b", read_index(tmp_path / "b"), ["bob"]) == [BOB]


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


def test_a_user_or_folder_that_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index.json does not exist: run `prepare`"):
        read_index(tmp_path)
    index = write_prepared(tmp_path, [BOB])
    with pytest.raises(ValueError, match=r"user 'eve' is not in .*index.json: run `prepare`"):
        read_users(tmp_path, index, ["bob", "eve"])
