"""Hostile input for every door, counted: `python -m jobs.fuzz --inputs 100000 --seed 0`.

In: small valid samples of what each door takes. Out: `runs/fuzz/result.json`, with every input that crashed one; ends
with 1 if there was any. A door may refuse an input by a `ValueError` (over HTTP by a 4xx in JSON), nothing else: any
other exception, an answer of 500 or above, a stream that is cut off, a dead engine, or more than `LIMIT_S` for one
input is a crash. Input n of a door is made from the seed, the door's name and n alone: `--only DOOR --first N --inputs
1` is that one again; what the inputs before it left in a vault is not.

A reader might question mutations of samples instead of a fuzzer that is guided by coverage: it needs no instrumented
build, so it runs where the tests run, and a crash is replayed by a number.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from oppu_ray import archive, vault
from oppu_ray.adapter_files import CONFIG_NAME, TENSORS_NAME, encode_adapter, load_adapter
from oppu_ray.config import BaseConfig, DataConfig, TaskConfig, load_config
from oppu_ray.configs import find_config
from oppu_ray.core import Item
from oppu_ray.files import write_atomic
from oppu_ray.forget import Receipt, read_receipt
from oppu_ray.history import load_histories, read_items
from oppu_ray.machine import hardware
from oppu_ray.prepared import INDEX_NAME, read_index
from oppu_ray.profiles import profile_from_json
from oppu_ray.retrieval import vectors_from_bytes, vectors_to_bytes
from oppu_ray.sharding import read_settings
from oppu_ray.tasks import get_task
from oppu_ray.vault import Vault
from serve.messages import INTERNAL_ERROR, Ask, Event, Failed, Finished, Turn
from serve.replica import Replica
from tests.serve_tools import real_web_of, token_of
from tests.tiny import tiny_base
from tests.vault_tools import make_adapter, make_items, make_manifest

LIMIT_S = 10
SHARES = {"http": 0.5, "ask": 0.1}
"""Of all inputs; the other doors share the rest equally."""
Door = Callable[[random.Random], object]


class Hung(Exception):
    """One input took more than `LIMIT_S` of a processor's time."""


@dataclass
class Crash:
    """An input that broke a door. `number` and the seed make it again."""

    door: str
    number: int
    error: str
    place: str


# --- making inputs

NASTY: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\u202e",
    "\x1c", "\u2028", "\ufeff", "\ufdd0\U0010ffff", "e\u0301" * 40, "\udbff\udbff", "<|im_start|>", "<|endoftext|>",
    "a" * 5000, "../../etc/passwd", "/dev/zero", "{0.__class__}", "%s%n", "<|im_end|>", "' OR 1=1 --", "(a+)+$",
    [], {}, [[]], {"": {}},
]  # fmt: skip
PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 5000, b'{"a":' * 3000, b"1e999", b"9" * 5000, b"\r\n",
    b"\n\n", b"&a [*a]", b"*a", b"!!python/object/apply:os.system ['id']", b"<<: ", b"? ", b'"', b"\\ud800", b"NaN",
    b"null", b"-", b"PK\x03\x04", b"PAR1", b"\x80\x04\x95", b"\x1f\x8b", b"../", b"%00",
]  # fmt: skip


def mutate(draw: random.Random, sample: bytes, other: bytes) -> bytes:
    """One to four small changes of a sample's bytes."""
    data = bytearray(sample)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(data))
        end = min(len(data), at + draw.choice([1, 1, 2, 8, 64, 4096]))
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * draw.choice([1, 2, 50])
        elif kind == 4:
            data[at:at] = draw.choice(PIECES)
        elif kind == 5:
            data[at:end] = other[draw.randint(0, len(other)) :][: draw.choice([4, 64, 512])]
        else:
            del data[at:]
    return bytes(data)


def mutate_json(draw: random.Random, value: Any) -> Any:
    """The same value with one of its parts removed, doubled or replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: part for name, part in value.items() if name != key}
        if kind == 1:
            return {**value, str(draw.choice(NASTY)): value[key]}
        return {**value, key: mutate_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.randrange(8) == 0:
            return value * draw.choice([0, 2, 300])
        return [*value[:at], mutate_json(draw, value[at]), *value[at + 1 :]]
    return draw.choice(NASTY)


def reworded(draw: random.Random, value: Any) -> Any:
    """The same value with some of its texts replaced: of the right type, so that it comes further than the door."""
    if isinstance(value, dict):
        return {key: reworded(draw, part) for key, part in value.items()}
    if isinstance(value, list):
        return [reworded(draw, part) for part in value]
    return hostile_text(draw) if isinstance(value, str) and draw.random() < 0.2 else value


def hostile_text(draw: random.Random) -> str:
    texts = [one for one in NASTY if isinstance(one, str)]
    return "".join(draw.choice([*texts, "a film", "comedy "]) for _ in range(draw.randint(1, 3)))


def spoiled(draw: random.Random, sample: Any) -> bytes:
    """A JSON value as bytes, changed as JSON or as bytes."""
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 3)):
            sample = mutate_json(draw, sample)
        return json.dumps(sample).encode()
    return mutate(draw, json.dumps(sample).encode(), b"")


# --- the doors


def doors(folder: Path) -> dict[str, Door]:
    """Each door as a function that makes one input of the draw and hands it in."""
    made = [
        config_door, jsonl_door, lamp_door, table_door, chitchat_door, items_door, adapter_door, archive_door,
        manifest_door, stored_items_door, profile_door, vectors_door, settings_door, index_door, receipt_door,
        http_door, ask_door,
    ]  # fmt: skip
    found = {}
    for make in made:
        name = make.__name__.removesuffix("_door")
        (folder / name).mkdir()
        found[name] = make(folder / name)
    return found


def config_door(folder: Path) -> Door:
    samples = [path.read_bytes() for path in sorted(find_config("demo").parent.glob("*.yaml"))]
    samples.append(
        b"a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\ntask: {labels: *b}\n"
    )
    overrides = [
        "personal.learning_rate=1e-4",
        "task.labels=[a, b]",
        "data.columns={text: t}",
        "seed=7",
        "preset=paper",
    ]

    def door(draw: random.Random) -> object:
        path = folder / "config.yaml"
        path.write_bytes(mutate(draw, draw.choice(samples), draw.choice(samples)))
        override = mutate(draw, draw.choice(overrides).encode(), b"").decode("utf-8", "surrogateescape")
        return load_config(path, [override] if draw.random() < 0.3 else [])

    return door


def users_sample() -> list[dict[str, Any]]:
    items = [
        {"id": str(number), "time": f"2020-01-0{number + 1}", "text": f"film {number}", "label": "comedy", "title": "t"}
        for number in range(4)
    ]
    return [{"user_id": user, "history": items, "role": role} for user, role in (("ann", "target"), ("bob", "base"))]


def jsonl_door(folder: Path) -> Door:
    def door(draw: random.Random) -> object:
        path = folder / "users.jsonl"
        lines = [spoiled(draw, user) if draw.random() < 0.7 else json.dumps(user).encode() for user in users_sample()]
        path.write_bytes(b"\n".join(lines))
        return load_histories(DataConfig(path=str(path)), TaskConfig("movie_tagging"), 0)

    return door


def lamp_door(folder: Path) -> Door:
    profile = [
        {"id": str(number), "description": f"film {number}", "tag": "comedy", "date": "2020"} for number in range(3)
    ]
    question = {
        "id": "21",
        "input": "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
        "further explanation. tags: [sci-fi, comedy] description: a film",
        "profile": profile,
        "user_id": "ann",
    }
    golds = {"task": "LaMP_2", "golds": [{"id": "21", "output": "comedy"}]}

    def door(draw: random.Random) -> object:
        paths = folder / "questions.json", folder / "outputs.json"
        for path, sample in zip(paths, ([question], golds), strict=True):
            path.write_bytes(spoiled(draw, sample) if draw.random() < 0.7 else json.dumps(sample).encode())
        data = DataConfig("lamp", str(paths[0]), str(paths[1]))
        return load_histories(data, TaskConfig("movie_tagging"), 0)

    return door


def table_door(folder: Path) -> Door:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"user_id": user["user_id"], **{key: item[key] for key in ("id", "time", "text", "label")}}
        for user in users_sample()
        for item in user["history"]
    ]
    csv = "user_id,id,time,text,label\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)

    def door(draw: random.Random) -> object:
        suffix, sample = draw.choice([(".csv", csv.encode()), (".parquet", buffer.getvalue())])
        path = folder / f"table{suffix}"
        path.write_bytes(mutate(draw, sample, csv.encode()))
        return load_histories(DataConfig("table", str(path)), TaskConfig("movie_tagging"), 0)

    return door


def chitchat_door(folder: Path) -> Door:
    turns = [[{"sender": user, "text": "hi", "timestamp": "2020-01-01"}] for user in ("ann", "bob")]
    chats = {"1": {"messages": turns * 4}}

    def door(draw: random.Random) -> object:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
            content = spoiled(draw, chats) if draw.random() < 0.7 else json.dumps(chats).encode()
            wheel.writestr("chitchat_dataset/dataset.json", content)
        path = folder / "chitchat.whl"
        path.write_bytes(mutate(draw, buffer.getvalue(), b"") if draw.random() < 0.5 else buffer.getvalue())
        return load_histories(DataConfig("chitchat", str(path)), TaskConfig("chat_reply"), 0)

    return door


def items_door(folder: Path) -> Door:
    task = get_task(TaskConfig("movie_tagging"))

    def door(draw: random.Random) -> object:
        path = folder / "items.jsonl"
        items = users_sample()[0]["history"][:2]
        path.write_bytes(
            b"\n".join(spoiled(draw, one) if draw.random() < 0.6 else json.dumps(one).encode() for one in items)
        )
        return read_items(path, task)

    return door


def adapter_door(folder: Path) -> Door:
    files = encode_adapter(make_adapter(1), "sample")
    config = json.loads(files[CONFIG_NAME])

    def door(draw: random.Random) -> object:
        damaged = dict(files)
        if draw.random() < 0.5:
            damaged[CONFIG_NAME] = spoiled(draw, config)
        else:
            damaged[TENSORS_NAME] = mutate(draw, files[TENSORS_NAME], files[CONFIG_NAME])
        for name, data in damaged.items():
            (folder / name).write_bytes(data)
        return load_adapter(folder)

    return door


def archive_door(folder: Path) -> Door:
    own = Vault(folder / "vault")
    own.append_history("ann", make_items("1", "2"))
    own.put_blob("ann", "profile.txt", b"likes films")
    own.commit("ann", make_adapter(1), make_manifest())
    archive.export_user(own, "ann", folder / "ann.zip")
    whole = (folder / "ann.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        entries = {info.filename: opened.read(info) for info in opened.infolist()}

    def door(draw: random.Random) -> object:
        path = folder / "hostile.zip"
        if draw.random() < 0.4:
            path.write_bytes(mutate(draw, whole, whole))
        else:  # an attacker who knows the format: right checksums over wrong content
            changed = dict(entries)
            name = draw.choice(sorted(changed))
            new_name = name if draw.random() < 0.9 else mutate(draw, name.encode(), b"../").decode("latin-1")
            changed[new_name or "x"] = spoiled_file(draw, name, changed.pop(name))
            manifest = json.loads(entries[vault.MANIFEST_NAME])
            for file in archive.ADAPTER_FILES:
                if archive.ADAPTER + file in changed:
                    manifest["checksums"][file] = vault.sha256(changed[archive.ADAPTER + file])
            if name != vault.MANIFEST_NAME:
                changed[vault.MANIFEST_NAME] = json.dumps(manifest).encode()
            if name != archive.INDEX_NAME:
                index = {part: vault.sha256(data) for part, data in changed.items() if part != archive.INDEX_NAME}
                changed[archive.INDEX_NAME] = json.dumps({"format": 1, "checksums": index}).encode()
            with zipfile.ZipFile(path, "w") as packed:
                for part, data in changed.items():
                    packed.writestr(zipfile.ZipInfo(part), data)
        user = f"user-{draw.getrandbits(64)}"
        before = len(own.registry.users())
        try:
            return archive.import_user(own, user, path, base_fingerprint=None)
        except ValueError:
            assert len(own.registry.users()) == before, "a refused archive left a user"
            raise

    return door


def spoiled_file(draw: random.Random, name: str, data: bytes) -> bytes:
    """A file's content, changed as JSON where it is JSON."""
    lines = data.splitlines(keepends=True) if name.endswith(".jsonl") else [data]
    lines[0] = spoiled(draw, json.loads(lines[0])) if ".json" in name else mutate(draw, lines[0], b"")
    return b"".join(lines)


def manifest_door(folder: Path) -> Door:
    sample = json.loads(vault.encode_manifest(make_manifest()))
    return lambda draw: vault.decode_manifest(spoiled(draw, sample))


def stored_items_door(folder: Path) -> Door:
    sample = json.loads(vault.encode_items(make_items("1")))
    return lambda draw: vault.decode_items(spoiled(draw, sample) + b"\n" + json.dumps(sample).encode())


def profile_door(folder: Path) -> Door:
    sample = {"text": "likes films", "method": "template", "item_ids": ["1", "2"]}
    return lambda draw: profile_from_json(spoiled(draw, sample).decode())


def vectors_door(folder: Path) -> Door:
    import numpy as np

    sample = vectors_to_bytes(np.full((2, 4), 0.5, np.float32), "embedder", ["1 a", "2 b"])
    return lambda draw: vectors_from_bytes(mutate(draw, sample, sample) if draw.random() < 0.9 else sample, "embedder")


def settings_door(folder: Path) -> Door:
    sample = json.loads(Path("cluster/deepspeed/zero3.json").read_text())

    def door(draw: random.Random) -> object:
        path = folder / "zero.json"
        path.write_bytes(spoiled(draw, sample))
        return read_settings(BaseConfig(sharding="zero3", deepspeed=str(path)))

    return door


def index_door(folder: Path) -> Door:
    size = {"user_id": "ann", "num_items": 3, "num_words": 9, "num_queries": 1}
    entry = {"role": "target", "offset": 0, "length": 9, "size": size}
    sample = {"entries": {"ann": entry}, "labels": {"a": 1}, "fingerprint": "0" * 64}

    def door(draw: random.Random) -> object:
        (folder / INDEX_NAME).write_bytes(spoiled(draw, sample))
        return read_index(folder)

    return door


def receipt_door(folder: Path) -> Door:
    sample = asdict(Receipt("1", "0" * 64, ("2",), (("path", "3"),), "4", "5", 6.0, True, "7", "8"))
    return lambda draw: read_receipt(spoiled(draw, sample).decode())


ANSWERS: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "oppu",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "stop": ["x"],
        "stream": True,
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/v1/completions": {
        "model": "task",
        "prompt": "hi",
        "max_tokens": 4,
        "logprobs": 2,
        "stream": True,
        "temperature": 0.5,
    },
    "/v1/personalize": {"input": {"text": "a film"}, "arm": "rag", "top_k": 2, "task": "movie_tagging"},
}
BODIES: dict[str, Any] = {
    "/v1/me/history": {"items": [{"item_id": "9", "text": "film", "label": "comedy", "time": "2020"}]},
    "/v1/me/history/forget": {"item_ids": ["9"]},
    "/v1/admin/users": {"user_id": "eve"},
    "/v1/admin/tokens": {"user_id": "ann", "ttl_s": 60},
}
READ = [
    "/v1/me", "/v1/me/versions", "/v1/me/history?limit=5", "/v1/me/refresh", "/v1/me/export", "/v1/models", "/metrics",
    "/v1/admin/users", "/v1/admin/tokens", "/v1/admin/audit?limit=3", "/", "/docs", "/openapi.json", "/static/page.js",
]  # fmt: skip
METHODS = ["GET", "POST", "POST", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "BREW"]


class Served:
    """The whole application on a replica and a trainer with a tiny model; users ann, with an adapter, and bob."""

    def __init__(self, folder: Path):
        self.folder, self._base, self._number = folder, tiny_base(folder / "base"), 0
        torch.set_num_threads(1)
        self._open()

    def renew(self) -> None:
        """A new vault, engine and trainer: what was sent before must not slow down or explain what comes."""
        self.backend.close()
        self._open()

    def _open(self) -> None:
        self._number += 1
        self.backend, client = real_web_of(self.folder / str(self._number), self._base)
        self.app, self.left = client(None).app, 1000
        known = self.backend.vault
        self.users = [str(known.user_hash(user)) for user in ("ann", "bob")]
        self.tokens = [token_of(known, user) for user in ("ann", "bob")]
        self.tokens += [token_of(known, None, role) for role in ("operator", "reader")]
        for user in ("ann", "bob"):
            known.append_history(user, make_items(*(f"{user}-{number}" for number in range(4)), label="comedy"))
        self.backend.trainer.start(self.users[0])
        while self.backend.trainer.status(self.users[0]).state in ("queued", "training"):
            time.sleep(0.01)
        assert known.registry.current(self.users[0]) is not None

    def check(self) -> None:
        """AssertionError or RuntimeError if an input did lasting harm: to the engine, or to a training."""
        self.backend.replica.loop.check()
        for user in self.users:
            status = self.backend.trainer.status(user)
            assert INTERNAL_ERROR.message not in status.error, f"training: {status}"


def check_answer(served: Served, where: str, status: int, content: bytes) -> None:
    """AssertionError if an answer over HTTP blames us for the input, or shows what is not the client's to see."""
    assert status < 500, f"{where}: status {status}: {content[:200]!r}"
    if status >= 400:
        assert json.loads(content)["error"]["message"], f"{where}: no error in JSON"
        for hidden in (str(served.folder), *served.users, "Traceback"):
            assert hidden.encode() not in content, f"{where}: {hidden} in {content[:200]!r}"
    elif content.startswith(b"data: "):
        lines = content.decode().removesuffix("\n\n").split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert lines[-1] == "data: [DONE]" and events, f"{where}: the stream was cut off: {content[-200:]!r}"
        assert not any("error" in event for event in events), f"{where}: {events[-1]}"


def http_door(folder: Path) -> Door:
    """The application, called as a server would, without a socket."""
    served = Served(folder)

    def door(draw: random.Random) -> object:
        if not served.left:
            served.renew()
        served.left -= 1
        path = draw.choice([*BODIES, *ANSWERS, *ANSWERS, *READ])
        sample = {**BODIES, **ANSWERS}.get(path)
        if sample and draw.random() < 0.4:
            body = json.dumps(reworded(draw, sample)).encode()
        else:
            body = spoiled(draw, sample) if sample else b""
        method = ("POST" if body else "GET") if draw.random() < 0.8 else draw.choice(METHODS)
        raw = path.encode() if draw.random() < 0.8 else mutate(draw, path.encode(), b"../%2e%2e/\0")
        own = token = draw.choice(served.tokens[:2] if path in ANSWERS else served.tokens).encode()
        if draw.random() < 0.15:
            token = mutate(draw, token, draw.choice(served.tokens).encode())
        headers = [(b"authorization", b"Bearer " + token), (b"content-type", b"application/json"), (b"host", b"x")]
        if draw.random() < 0.2:
            headers.append(
                (draw.choice([b"x-request-id", b"serve_multiplexed_model_id", b"cookie"]), mutate(draw, b"bob", b""))
            )
        status, content = asyncio.run(respond(served.app, method, raw, headers, body))
        if status == 401 and token == own:
            served.left = 0  # an input before was DELETE /v1/me
        if method != "HEAD":
            check_answer(served, f"{method} {path}", status, content)
        served.check()
        if status >= 400:
            raise ValueError(f"status {status}")
        return status

    return door


def ask_door(folder: Path) -> Door:
    """The replica, asked without HTTP before it."""
    served = Served(folder)

    def door(draw: random.Random) -> object:
        text = functools.partial(hostile_text, draw)

        def number(good: float) -> Any:
            numbers = [*(one for one in NASTY if isinstance(one, int | float)), 1.0, 1.5, True]
            return draw.choice(numbers) if draw.random() < 0.1 else good

        question: str | Item | tuple[Turn, ...] = draw.choice(["text", "item", "turns"])
        if question == "item":
            question = Item("", text=text(), keywords=text(), context=(text(),), options=(text(), text()))
        elif question == "turns":
            roles = ["user", "system", "assistant", text()]
            question = tuple(Turn(draw.choice(roles), text()) for _ in range(draw.randint(0, 3)))
        else:
            question = text()
        ask = Ask(
            f"{draw.getrandbits(64)}",
            draw.choice(served.users),
            question,
            use_adapter=draw.random() < 0.7,
            top_k=number(draw.choice([0, 0, 3])),
            max_tokens=number(4),
            temperature=number(draw.choice([0.0, 0.7])),
            top_p=number(0.9),
            seed=number(1),
            stop=tuple(text() for _ in range(draw.choice([0, 0, 2]))),
            num_logprobs=number(2) if draw.random() < 0.5 else None,
            stream=draw.random() < 0.5,
        )
        last = asyncio.run(last_event(served.backend.replica, ask))
        served.check()
        if isinstance(last, Failed):
            assert last.status < 500, str(last)
            raise ValueError(last.message)
        assert isinstance(last, Finished)
        return last

    return door


async def last_event(replica: Replica, ask: Ask) -> Event:
    """How an answer ends."""
    return [event async for event in replica.ask(ask)][-1]


async def respond(
    app: Any, method: str, path: bytes, headers: list[tuple[bytes, bytes]], body: bytes
) -> tuple[int, bytes]:
    """Status and body of one request to an ASGI application."""
    plain, _, query = path.partition(b"?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "root_path": "", "path": plain.decode("latin-1"), "raw_path": plain, "query_string": query,
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not incoming:
            await asyncio.Event().wait()  # the client listens until the end
        return incoming.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


# --- running them


def try_inputs(name: str, door: Door, seed: int, first: int, count: int) -> tuple[int, list[Crash]]:
    """Hand in `count` inputs; how many were taken (not refused), and the crashes."""
    num_taken, crashes = 0, []
    for number in range(first, first + count):
        try:
            with limited(LIMIT_S):
                door(random.Random(f"{seed}/{name}/{number}"))
            num_taken += 1
        except ValueError:
            continue
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:300]
            crashes.append(Crash(name, number, text, f"{Path(place.filename).name}:{place.lineno}"))
    return num_taken, crashes


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """`Hung` in this thread when the block takes so much of a processor's time."""

    def ring(*_: object) -> None:
        raise Hung(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one door")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args(arguments)
    began, table, crashes = time.monotonic(), {}, []
    with tempfile.TemporaryDirectory(
        prefix="oppu-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        found = doors(Path(folder))
        chosen = {name: door for name, door in found.items() if options.only in (None, name)}
        if not chosen:
            raise SystemExit(f"--only {options.only}: expected one of {', '.join(found)}")
        for name, door in chosen.items():
            rest = (1 - sum(SHARES.values())) / (len(found) - len(SHARES))
            count = options.inputs if options.only else round(options.inputs * SHARES.get(name, rest))
            since = time.monotonic()
            num_taken, broken = try_inputs(name, door, options.seed, options.first, count)
            crashes += broken
            table[name] = {"inputs": count, "taken": num_taken, "crashes": len(broken), "s": time.monotonic() - since}
            print(f"{name:14} {count:7} inputs, {num_taken:6} taken, {len(broken)} crashes", flush=True)
    places = sorted({(crash.door, crash.place, crash.error.partition(":")[0]) for crash in crashes})
    for door_name, place, kind in places:
        crash = next(one for one in crashes if (one.door, one.place) == (door_name, place))
        print(f"{door_name} {crash.number}: {kind} at {place}: {crash.error}")
    result = {
        "command": "fuzz", "seed": options.seed, "inputs": sum(row["inputs"] for row in table.values()), "doors": table,
        "crashes": [vars(crash) for crash in crashes], "elapsed_s": time.monotonic() - began, "hardware": hardware(),
    }  # fmt: skip
    folder_path = Path("runs/fuzz")
    folder_path.mkdir(parents=True, exist_ok=True)
    write_atomic(folder_path / "result.json", json.dumps(result, indent=1).encode())
    print(f"{result['inputs']} inputs, {len(crashes)} crashes at {len(places)} places, {result['elapsed_s']:.0f} s")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
