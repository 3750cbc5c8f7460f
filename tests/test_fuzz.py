"""A few inputs for every door on every run, and what more of them have broken once (see `jobs/fuzz.py`)."""

from __future__ import annotations

import asyncio
import json
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_tools import token_of, web_of
from vault_tools import make_adapter, make_manifest

from jobs import fuzz
from oppu_ray.adapter_files import CONFIG_NAME, load_adapter, save_adapter
from oppu_ray.config import BaseConfig, DataConfig, TaskConfig, load_config
from oppu_ray.history import load_histories
from oppu_ray.inference import Engine
from oppu_ray.prepared import INDEX_NAME, read_index
from oppu_ray.sharding import read_settings
from oppu_ray.vault import CorruptError, decode_items, decode_manifest, encode_manifest
from serve.messages import Ask
from serve.replica import Replica

DEEP = b"[" * 100_000


def test_no_door_breaks(tmp_path: Path) -> None:
    for name, door in fuzz.doors(tmp_path).items():
        num_taken, crashes = fuzz.try_inputs(name, door, seed=1, first=0, count=40)
        assert not crashes and num_taken < 40, name


def test_a_crash_is_seen_and_said_by_number(tmp_path: Path) -> None:
    def door(draw: object) -> None:
        raise KeyError("oops")

    _, crashes = fuzz.try_inputs("door", door, seed=0, first=7, count=2)
    assert [(one.number, one.error, one.place.partition(":")[0]) for one in crashes] == [
        (7, "KeyError: 'oops'", "test_fuzz.py"),
        (8, "KeyError: 'oops'", "test_fuzz.py"),
    ]


def test_a_hanging_door_is_a_crash(tmp_path: Path) -> None:
    def door(draw: object) -> None:
        with fuzz.limited(1):
            while True:
                pass

    (_, (crash,)) = fuzz.try_inputs("door", door, seed=0, first=0, count=1)
    assert crash.error.startswith("Hung")


def test_the_http_door_reaches_the_replica_and_sees_what_breaks_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, asked = fuzz.http_door(tmp_path), list[str]()

    def broken(replica: Replica, ask: Ask, *_: Any) -> None:
        asked.append(ask.request_id)
        raise TypeError("the canary")

    monkeypatch.setattr(Replica, "_prepare", broken)
    _, crashes = fuzz.try_inputs("http", door, seed=1, first=0, count=80)
    assert 0 < len(asked) == len(crashes) and all("internal_error" in one.error for one in crashes)


def test_a_dead_engine_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door = fuzz.ask_door(tmp_path)

    def broken(engine: Engine) -> None:
        raise TypeError("the canary")

    monkeypatch.setattr(Engine, "step", broken)
    _, crashes = fuzz.try_inputs("ask", door, seed=1, first=0, count=20)
    assert crashes and all("the engine died" in one.error for one in crashes)


def test_a_stream_that_is_cut_off_or_ends_in_an_error_and_a_path_in_an_answer_are_crashes(tmp_path: Path) -> None:
    served: Any = SimpleNamespace(folder=tmp_path, users=["0" * 64])
    good = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
    fuzz.check_answer(served, "GET /", 200, good)
    bad = [(200, good[:-16]), (200, b'data: {"error": {}}\n\n' + good), (500, b"{}")]
    bad += [(400, json.dumps({"error": {"message": text}}).encode()) for text in (str(tmp_path / "vault"), "0" * 64)]
    for status, content in bad:
        with pytest.raises(AssertionError):
            fuzz.check_answer(served, "GET /", status, content)


def test_an_input_is_made_again_from_its_number(tmp_path: Path) -> None:
    (made, again) = (fuzz.spoiled(random.Random("0/items/5"), fuzz.users_sample()) for _ in range(2))
    assert made == again != fuzz.spoiled(random.Random("0/items/6"), fuzz.users_sample())


# ---- what broke once


@pytest.mark.parametrize("path", ["/v1/me/", "/v1/models/", "/static", "/docs/", "//"])
def test_a_path_with_a_slash_too_many_is_a_404_whatever_is_in_its_query(tmp_path: Path, path: str) -> None:
    backend, client = web_of(tmp_path)
    headers = [(b"authorization", f"Bearer {token_of(backend.vault, 'ann')}".encode()), (b"host", b"evil.example")]
    for query in (b"", b"?a=\xff", b"?\xed\xa0\x80"):
        status, content = asyncio.run(fuzz.respond(client(None).app, "GET", path.encode() + query, headers, b""))
        assert status == 404 and b"evil" not in content


def test_a_manifest_whose_checksums_are_no_table_is_corrupt() -> None:
    fields = json.loads(encode_manifest(make_manifest()))
    with pytest.raises(CorruptError, match="manifest"):
        decode_manifest(json.dumps({**fields, "checksums": 1.5}).encode())


def test_deepspeed_settings_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_bytes(DEEP)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_settings(BaseConfig(deepspeed=str(tmp_path / "zero.json")))


def test_an_alpha_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", make_adapter(1))
    path = tmp_path / "adapter" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 10**400}))
    with pytest.raises(ValueError, match="lora_alpha is .*; expected a number above 0 and below 1e9"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("decode", [decode_items, decode_manifest])
def test_json_nested_too_deeply_is_corrupt(decode: Any) -> None:
    with pytest.raises(CorruptError, match="recursion depth"):
        decode(DEEP)


def test_a_config_nested_too_deeply_or_that_says_billions_of_things_by_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"task: " + DEEP[:5000])
    with pytest.raises(ValueError, match="cannot read the config"):
        load_config(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="the value is not YAML"):
        load_config(path, ["seed=" + DEEP[:5000].decode()])
    levels = ["  - &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"  - &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    path.write_text("task:\n  labels:\n" + "\n".join(levels))
    with fuzz.limited(5), pytest.raises(ValueError, match="task.labels.0: found .*; expected a text"):
        load_config(path)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a?){50}b", "a*a*a*a*b", "a" * 2000])
def test_an_adapter_whose_target_is_an_expression_that_can_hang_is_refused(tmp_path: Path, pattern: str) -> None:
    adapter = make_adapter(1)
    save_adapter(tmp_path / "adapter", adapter)
    config = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps({**config, "target_modules": pattern}))
    with fuzz.limited(5), pytest.raises(ValueError, match="target_modules is '.*a simple regular expression"):
        load_adapter(tmp_path / "adapter")
    allowed = r"model\.layers\.\d+\.self_attn\.(q|v)_proj"
    (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps({**config, "target_modules": allowed}))
    assert load_adapter(tmp_path / "adapter").tensors.keys() == adapter.tensors.keys()


@pytest.mark.parametrize(
    "text",
    ['{"1": []}', '{"1": {"messages": [[{"sender": "ann"}]]}}', "[]", "[" * 100_000],
)
def test_chats_of_another_shape_are_refused(tmp_path: Path, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "chats.whl", "w") as wheel:
        wheel.writestr("chitchat_dataset/dataset.json", text)
    with pytest.raises(ValueError, match="chitchat"):
        load_histories(DataConfig("chitchat", str(tmp_path / "chats.whl")), TaskConfig("chat_reply"), 0)


def test_a_parquet_file_damaged_within_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": ["ann"] * 1000, "text": [f"film {number}" for number in range(1000)]}), path)
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged Parquet file"):
        load_histories(DataConfig("table", str(path)), TaskConfig("movie_tagging"), 0)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"entries": {"ann": {}}}', '{"entries": {"ann": 1}}', "[" * 100_000, "\0"]
)
def test_a_damaged_index_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match="not an index .* run `prepare` again"):
        read_index(tmp_path)
