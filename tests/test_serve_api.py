"""The HTTP surface on a backend without an engine: who may ask, what is refused and how, what OpenAI's client reads."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import threading
import zipfile
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import HTTPException
from serve_tools import CONFIG, FakeBackend, token_of, web_of
from starlette.testclient import TestClient
from vault_tools import make_adapter, make_manifest, segment_files

from oppu_ray.core import InputError, Item, UserHistory
from oppu_ray.forget import forget_user, without_forgotten
from oppu_ray.pairs import make_pairs
from oppu_ray.prepared import INDEX_NAME, write_prepared
from oppu_ray.registry import Refused, RegistryError
from oppu_ray.tasks import get_task
from oppu_ray.vault import CorruptError, DiskError
from serve.api import _collect
from serve.messages import Ask, Event, Failed, Finished, Started

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
Web = tuple[FakeBackend, Callable[[str | None], TestClient]]


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return web_of(tmp_path)


@pytest.fixture
def ann(web: Web) -> TestClient:
    return web[1](token_of(web[0].vault, "ann"))


def code(response: Any) -> tuple[int, str]:
    """Status and error code; every error must be JSON of one form."""
    body = response.json()["error"]
    assert body["message"] and set(body) == {"message", "type", "param", "code"}
    return response.status_code, body["code"]


def test_every_route_but_the_page_and_the_reference_wants_a_token(web: Web) -> None:
    backend, client = web
    openapi = client(None).get("/openapi.json").json()
    assert len(openapi["paths"]) > 10
    for path, methods in openapi["paths"].items():
        for method in methods:
            response = client(None).request(method, path.replace("{token_id}", "x"), json={})
            assert code(response) == (401, "invalid_token"), f"{method} {path}"
            assert response.headers["www-authenticate"] == "Bearer"
    assert client(None).get("/").status_code == client(None).get("/docs").status_code == 200
    assert not backend.asked


def test_a_bad_token_is_a_bad_token_whatever_is_wrong_with_it(web: Web) -> None:
    backend, client = web
    registry = backend.vault.registry
    revoked, expired = token_of(backend.vault, "ann"), token_of(backend.vault, "ann", ttl_s=1e-9)
    registry.revoke_token(revoked.split("_")[1])
    good = token_of(backend.vault, "ann")
    answers = {
        client(token).get("/v1/me").text
        for token in (revoked, expired, good[:-1], good + "a", "", "ann", "oppu_" + "0" * 16 + "_" + "A" * 43)
    }
    assert len(answers) == 1 and client(good).get("/v1/me").status_code == 200
    for header in (good, f"Basic {good}", f"Bearer {good} {good}", b"Bearer \xc3\xa4\xff"):
        assert client(None).get("/v1/me", headers={"Authorization": header}).status_code == 401


def test_a_role_opens_its_own_doors_only(web: Web, ann: TestClient) -> None:
    backend, client = web
    operator, reader = (client(token_of(backend.vault, None, role)) for role in ("operator", "reader"))
    assert code(ann.get("/v1/admin/users")) == code(ann.get("/metrics")) == (403, "forbidden")
    assert (
        code(operator.get("/v1/me"))
        == code(operator.post("/v1/completions", json={"prompt": "a"}))
        == (
            403,
            "forbidden",
        )
    )
    assert code(reader.get("/v1/admin/users"))[0] == 403
    assert "ray_oppu_requests_total" in reader.get("/metrics").text


def test_identity_comes_from_the_token_and_nothing_else(web: Web, ann: TestClient) -> None:
    backend, _ = web
    bob = str(backend.vault.user_hash("bob"))
    headers = {
        "serve_multiplexed_model_id": bob,
        "serve-multiplexed-model-id": bob,
        "x-session-id": bob,
        "x-user": "bob",
        "x-request-timeout-seconds": "0.000001",
        "cookie": f"user={bob}",
    }
    body = {"prompt": "a", "user": "bob", "model": "oppu"}
    assert ann.post(f"/v1/completions?user={bob}", json=body, headers=headers).status_code == 200
    assert backend.asked[-1].user_hash == backend.vault.user_hash("ann")
    assert backend.asked[-1].deadline_s == CONFIG.serve.deadline_s
    assert code(ann.post("/v1/completions", json={"prompt": "a", "model": bob})) == (404, "model_not_found")
    assert code(ann.post("/v1/personalize", json={"input": "a", "user_id": "bob"})) == (400, "bad_request")


def test_me_shows_and_changes_the_signed_in_user_alone(web: Web, ann: TestClient) -> None:
    backend, client = web
    vault, bob = backend.vault, client(token_of(backend.vault, "bob"))
    for seed in (1, 2):
        vault.commit("ann", make_adapter(seed), make_manifest())
    vault.append_history("bob", [Item("secret", text="the canary of bob", label="comedy")])
    new = {"items": [{"item_id": "m1", "text": "a film", "label": "comedy"}, {"text": "b", "label": "action"}]}
    assert ann.post("/v1/me/history", json=new).json()["num_items"] == 2
    mine = ann.get("/v1/me/history").json()
    assert [item["text"] for item in mine["items"]] == ["a film", "b"] and mine["items"][1]["time"] > "2020"
    versions = ann.get("/v1/me/versions").json()["versions"]
    assert [row["is_current"] for row in versions] == [False, True]
    assert ann.post("/v1/me/rollback").json() == {"adapter_version": versions[0]["version"]}
    status = ann.get("/v1/me").json()
    assert (status["adapter_version"], status["num_items"]) == (versions[0]["version"], 2)
    assert code(ann.post("/v1/me/rollback")) == (400, "bad_request")
    everything = "".join(ann.get(path).text for path in ("/v1/me", "/v1/me/history", "/v1/me/versions"))
    assert "canary" not in everything and bob.get("/v1/me").json()["num_items"] == 1
    archive = zipfile.ZipFile(io.BytesIO(ann.get("/v1/me/export").content))
    assert b"a film" in archive.read("history.jsonl") and "adapter/adapter_config.json" in archive.namelist()
    assert ann.post("/v1/me/refresh").json()["state"] == "queued" and ann.post("/v1/me/refresh").status_code == 202


def test_forgetting_ends_the_token(web: Web, ann: TestClient) -> None:
    backend, client = web
    vault, bob = backend.vault, client(token_of(backend.vault, "bob"))
    vault.commit("ann", make_adapter(1), make_manifest(("m1",)))
    vault.append_history("ann", [Item("m1", text="a", label="comedy"), Item("m2", text="b", label="comedy")])
    receipt = ann.post("/v1/me/history/forget", json={"item_ids": ["m1"]}).json()
    assert receipt["needs_training"] and ann.get("/v1/me").json()["adapter_version"] is None
    assert code(ann.post("/v1/me/history/forget", json={"item_ids": ["m1"]})) == (400, "bad_request")
    assert ann.delete("/v1/me").json()["signature"]
    assert ann.get("/v1/me").status_code == 401 and bob.get("/v1/me").status_code == 200


def test_an_append_that_was_let_in_before_its_user_was_forgotten_does_not_bring_them_back(
    web: Web, ann: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault, append = web[0].vault, web[0].vault.append_history
    vault.append_history("ann", [Item("1", text="old", label="comedy")])

    def late(*args: Any, **options: Any) -> int:
        forget_user(vault, "ann")
        return append(*args, **options)

    monkeypatch.setattr(vault, "append_history", late)
    new = {"items": [{"text": "my secret film", "label": "comedy"}]}
    assert code(ann.post("/v1/me/history", json=new)) == (409, "forgotten")
    assert not vault.registry.has_user(vault.user_hash("ann")) and vault.read_history("ann") == ()
    assert not any(b"secret" in path.read_bytes() for path in vault.root.rglob("*") if path.is_file())
    source = UserHistory("ann", "target", (Item("1", text="old"),))
    assert without_forgotten(vault)(source) is None
    assert ann.post("/v1/me/history", json=new).status_code == 401


def test_what_a_history_takes(web: Web, ann: TestClient) -> None:
    def append(*items: dict[str, Any]) -> Any:
        return ann.post("/v1/me/history", json={"items": list(items)})

    good = {"text": "a", "label": "comedy"}
    assert code(append({"text": "a"})) == (400, "bad_request")
    assert code(append({**good, "label": "nonsense"})) == (400, "bad_request")
    assert code(append({**good, "item_id": "1"}, {**good, "item_id": "1"})) == (400, "bad_request")
    assert code(append({**good, "user_id": "bob"})) == (400, "bad_request")
    assert code(append()) == (400, "bad_request")
    assert code(append(*[good] * (CONFIG.serve.max_items + 1))) == (400, "history_full")
    assert append(good).json()["num_items"] == 1


@pytest.mark.parametrize(
    ("task", "bad", "good"),
    [
        ("tweet_paraphrase", {}, {"text": "a tweet"}),
        ("citation", {"title": "a"}, {"text": "a"}),
        ("chat_reply", {"text": " \n", "context": ["hi"]}, {"text": "a", "context": ["hi"]}),
        ("chat_reply", {"text": "a", "context": [" "]}, {"text": "a", "context": [" ", " hi "]}),
        # White space to Python, which splits prompts by it, and not to Pydantic.
        ("chat_reply", {"text": "\x1c", "context": ["hi"]}, {"text": "a\x1c", "context": ["hi"]}),
        ("chat_reply", {"text": "a", "context": ["\x1f"]}, {"text": "a", "context": ["\x1f", "hi"]}),
        ("tweet_paraphrase", {"text": "\x1d"}, {"text": "a\x1d"}),
    ],
)
def test_an_item_that_cannot_be_learnt_is_refused_before_it_blocks_all_others(
    tmp_path: Path, task: str, bad: dict[str, Any], good: dict[str, Any]
) -> None:
    config = replace(CONFIG, task=replace(CONFIG.task, name=task))
    backend, client = web_of(tmp_path, config)
    ann = client(token_of(backend.vault, "ann"))
    assert code(ann.post("/v1/me/history", json={"items": [bad]})) == (400, "bad_request")
    assert ann.post("/v1/me/history", json={"items": [good]}).json()["num_items"] == 1
    assert len(make_pairs(get_task(config.task), backend.vault.read_history("ann"), config.task)) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 200_000, 400),
        (b'{"prompt":' * 50_000, 400),
        (b'{"prompt": "' + b"a" * 1_000_000 + b'"}', 413),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xc3\x28"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e400}', 400),
        (b'{"prompt": "a", "max_tokens": 1000000000}', 400),
        (b'{"prompt": "a", "max_tokens": 0}', 400),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "a", "top_p": 0}', 400),
        (b'{"prompt": "a", "n": 2}', 400),
        (b'{"prompt": "a", "stop": [""]}', 400),
        (b'{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', 400),
        (b'{"prompt": "a", "tools": []}', 400),
        (b'{"prompt": ["a"]}', 400),
        (b'{"prompt": ""}', 400),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)
def test_bad_bodies_get_a_4xx_and_never_reach_the_engine(
    web: Web, ann: TestClient, content: bytes, expected: int
) -> None:
    response = ann.post("/v1/completions", content=content, headers=JSON)
    assert code(response)[0] == expected and not web[0].asked
    assert ann.post("/v1/completions", json={"prompt": "a"}).status_code == 200


SURROGATE = r"a\ud800"
DOORS = {
    "/v1/chat/completions": [
        ('{"messages": [{"role": "user", "content": "SURROGATE"}]}', "messages.0.content"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "SURROGATE"}]}]}',
            "messages.0.content.0.text",
        ),
        ('{"messages": [{"role": "user", "content": "a", "name": "SURROGATE"}]}', "messages.0.name"),
        ('{"messages": [{"role": "SURROGATE", "content": "a"}]}', "messages.0.role"),
        ('{"messages": [{"role": "user", "content": "a", "SURROGATE": 1}]}', "messages.0"),
        ('{"messages": [{"role": "user", "content": "a"}], "stop": ["b", "SURROGATE"]}', "stop.1"),
        ('{"messages": [{"role": "user", "content": "a"}], "user": "SURROGATE"}', "user"),
    ],
    "/v1/completions": [
        ('{"prompt": "SURROGATE"}', "prompt"),
        ('{"prompt": "a", "stop": "SURROGATE"}', "stop"),
        ('{"prompt": "a", "model": "SURROGATE"}', "model"),
        ('{"prompt": "a", "SURROGATE": null}', None),
    ],
    "/v1/personalize": [
        ('{"input": "SURROGATE"}', "input"),
        ('{"input": {"text": "SURROGATE"}}', "input.TaskInput.text"),
        ('{"input": {"text": "a", "context": ["SURROGATE"]}}', "input.TaskInput.context.0"),
        ('{"input": {"text": "a", "keywords": "SURROGATE"}}', "input.TaskInput.keywords"),
        ('{"input": "a", "task": "SURROGATE"}', "task"),
        ('{"input": "a", "arm": "SURROGATE"}', "arm"),
    ],
    "/v1/me/history": [
        ('{"items": [{"text": "SURROGATE", "label": "comedy"}]}', "items.0.text"),
        ('{"items": [{"text": "a", "label": "SURROGATE"}]}', "items.0.label"),
        ('{"items": [{"text": "a", "label": "comedy", "item_id": "SURROGATE"}]}', "items.0.item_id"),
        ('{"items": [{"text": "a", "label": "comedy", "time": "SURROGATE"}]}', "items.0.time"),
        ('{"items": [{"text": "a", "label": "comedy", "options": ["SURROGATE"]}]}', "items.0.options.0"),
    ],
    "/v1/me/history/forget": [('{"item_ids": ["SURROGATE"]}', "item_ids.0")],
    "/v1/admin/users": [('{"user_id": "SURROGATE"}', "user_id")],
    "/v1/admin/tokens": [('{"user_id": "SURROGATE"}', "user_id")],
}


@pytest.mark.parametrize("raw", [SURROGATE.encode(), b"a\xed\xa0\x80"], ids=["escaped", "bytes"])
@pytest.mark.parametrize(("path", "body", "field"), [(path, *one) for path, bodies in DOORS.items() for one in bodies])
def test_a_text_that_utf8_cannot_hold_is_refused_by_the_name_of_its_field(
    web: Web, path: str, body: str, field: str | None, raw: bytes
) -> None:
    backend, client = web
    is_admin = path.startswith("/v1/admin")
    signed_in = client(token_of(backend.vault, None if is_admin else "ann", "operator" if is_admin else "user"))
    response = signed_in.post(path, content=body.encode().replace(b"SURROGATE", raw), headers=JSON)
    if field is None:  # an unknown key without a value is as if it were not there
        assert response.status_code == 200
    else:
        assert code(response) == (400, "bad_request") and response.json()["error"]["param"] == field
        assert not backend.asked and len(backend.vault.registry.users()) == 2
        assert backend.vault.read_history("ann") == ()


def test_bad_questions_of_the_task_are_refused_by_name(ann: TestClient) -> None:
    def ask(**body: Any) -> tuple[int, str]:
        return code(ann.post("/v1/personalize", json=body))

    assert ask(input="a", top_k=-1) == (400, "bad_request")
    assert ask(input="a", top_k=10**6) == (400, "bad_request")
    assert ask(input="a", arm="task", top_k=1) == ask(input="a", arm="rag", top_k=0) == (400, "bad_request")
    assert ask(input="a", arm="swapped") == (400, "bad_request")
    assert ask(input=" ") == ask(input={"text": ""}) == ask(input={}) == (400, "bad_request")
    assert ask(input="a", task="chat_reply") == (400, "unknown_task")
    assert ask(input="\x1c") == ask(input="a", task="no such task") == (400, "bad_request")
    assert ask(input="a", max_tokens=10**9) == (400, "bad_request")


def test_the_personal_answer_says_what_it_is_made_of(web: Web, ann: TestClient) -> None:
    backend, _ = web
    version = backend.vault.commit("ann", make_adapter(1), make_manifest())
    answer = ann.post("/v1/personalize", json={"input": "a {film} {{x}}", "top_k": 2, "task": "LaMP-2M"})
    body = answer.json()
    assert (body["answer"], body["arm"], body["adapter_version"]) == ("a short answer", "oppu_k2", version)
    assert body["items"] == [{"item_id": "1", "text": "a film"}] * 2
    assert set(body["timings"]) == {"load_s", "first_token_s", "total_s"}
    assert answer.headers["x-oppu-adapter-version"] == version
    question = backend.asked[-1].question
    assert isinstance(question, Item) and question.text == "a {film} {{x}}"
    assert ann.post("/v1/personalize", json={"input": "a", "arm": "rag"}).json()["arm"] == "rag_k4"
    assert not backend.asked[-1].use_adapter
    assert ann.post("/v1/personalize", json={"input": "a", "arm": "task"}).json()["adapter_version"] is None


def test_the_openai_client_works(web: Web, ann: TestClient) -> None:
    backend, _ = web
    version = backend.vault.commit("ann", make_adapter(1), make_manifest())
    key = ann.headers["authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url="http://testserver/v1", api_key=key, http_client=ann, max_retries=0)
    messages: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    raw = client.chat.completions.with_raw_response.create(
        model="oppu", messages=messages, max_completion_tokens=5, logprobs=True, top_logprobs=1, stop="x", seed=3
    )
    chat = raw.parse()
    assert raw.headers["x-oppu-adapter-version"] == version
    assert chat.choices[0].message.content == " a short answer" and chat.choices[0].finish_reason == "stop"
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert chat.usage and chat.usage.total_tokens == 10
    asked = backend.asked[-1]
    assert (asked.max_tokens, asked.stop, asked.seed, asked.num_logprobs) == (5, ("x",), 3, 1)
    pieces = list(
        client.chat.completions.create(
            model="oppu", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == " a short answer"
    assert pieces[-1].usage and pieces[-1].usage.completion_tokens == 3
    deltas = [piece.choices[0].delta.model_dump(exclude_unset=True) for piece in pieces if piece.choices]
    first, last = {"role": "assistant", "content": " a"}, {}
    assert deltas == [first, {"content": " short"}, {"content": " answer"}, last]
    with client.chat.completions.stream(model="oppu", messages=messages) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", " a short answer")
    text = client.completions.create(model="task", prompt="a", logprobs=1)
    assert text.choices[0].text == " a short answer" and not backend.asked[-1].use_adapter
    assert text.choices[0].logprobs and text.choices[0].logprobs.tokens == ["a", "short", "answer"]
    assert [model.id for model in client.models.list()] == ["oppu", "task"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a")
    backend.fail_with, backend.fail_after = Failed(503, "replica_lost", "gone"), 1
    with pytest.raises(openai.APIError, match="gone"):
        list(client.completions.create(model="oppu", prompt="a", stream=True))


def test_what_openais_clients_may_send_is_taken(web: Web, ann: TestClient) -> None:
    backend, _ = web
    reply = openai.types.chat.ChatCompletionMessage(role="assistant", content="hello")
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "hi", "name": "Ann"},
        reply.model_dump(),
        {"role": "user", "content": "bye"},
    ]
    names = ("temperature", "top_p", "seed", "n", "stream", "stop", "logprobs", "top_logprobs", "max_tokens", "tools")
    nulls = dict.fromkeys(names)
    assert ann.post("/v1/chat/completions", json={"messages": messages, **nulls}).status_code == 200
    turns = backend.asked[-1].question
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]  # type: ignore[union-attr]
    assert ann.post("/v1/completions", json={"prompt": "a", "seed": -1, "n": None}).status_code == 200
    assert backend.asked[-1].seed == -1
    options = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": True}}
    assert ann.post("/v1/completions", json={"prompt": "a", **options}).status_code == 200
    assert code(ann.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": None}]}))[0] == 400


@pytest.mark.parametrize("last", [Finished("stop", 0.1, 0.2), Failed(503, "engine_failed", "gone")])
def test_a_whole_answer_frees_its_place_before_it_is_sent(last: Event) -> None:
    closed = []

    async def answer() -> AsyncGenerator[Event, None]:
        try:
            yield Started(None, "", (), 1, 0.0)
            yield last
        finally:
            closed.append(True)

    async def run() -> None:
        events = answer()
        with suppress(HTTPException):
            await _collect(events)
        assert closed

    asyncio.run(run())


def test_half_a_character_has_no_bytes(web: Web, ann: TestClient) -> None:
    web[0].text = "é \ufffd"
    answer = ann.post("/v1/chat/completions", json={**CHAT, "logprobs": True}).json()
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in tokens] == [[0xC3, 0xA9], None]
    assert [token["top_logprobs"][0]["bytes"] for token in tokens] == [[0xC3, 0xA9], None]


def test_every_request_without_a_seed_has_one_of_its_own(web: Web, ann: TestClient) -> None:
    for _ in range(2):
        assert ann.post("/v1/completions", json={"prompt": "a", "temperature": 1.0}).status_code == 200
    first, second = web[0].asked
    assert first.seed != second.seed


def test_failures_of_the_engine_are_told_with_their_status(web: Web, ann: TestClient) -> None:
    backend, _ = web
    backend.fail_with = Failed(503, "overloaded", "too many requests wait")
    response = ann.post("/v1/completions", json={"prompt": "a"})
    assert code(response) == (503, "overloaded") and response.headers["retry-after"] == "1"
    backend.fail_with = Failed(400, "context_length_exceeded", "too long")
    assert code(ann.post("/v1/chat/completions", json={**CHAT, "stream": True})) == (400, "context_length_exceeded")
    backend.fail_with, backend.fail_after = Failed(503, "replica_lost", "gone"), 2
    assert code(ann.post("/v1/completions", json={"prompt": "a"})) == (503, "replica_lost")
    backend.fail_with = None
    assert len(backend.closed) == len(backend.asked) == 3


SECRET = "/srv/run/prepare/users.jsonl: byte 229: expected the line of user 'ann', found 'bob@mail.example'"


class FromRay(InputError):
    """As Ray raises an actor's error: of its class, and with the traceback as its text."""


class Broken:
    """A vault or registry whose methods raise, but for those given."""

    def __init__(self, error: Exception, **good: Any):
        vars(self).update(error=error, **good)

    def __getattr__(self, name: str) -> Any:
        def broken(*_: Any, **__: Any) -> None:
            raise self.error

        return broken


ERRORS: list[tuple[Exception, int, str]] = [
    (InputError("film: expected text"), 400, "bad_request"),
    (FromRay(SECRET), 500, "internal_error"),
    (ValueError(SECRET), 500, "internal_error"),
    (KeyError(SECRET), 500, "internal_error"),
    (RuntimeError(SECRET), 500, "internal_error"),
    (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), 500, "internal_error"),
    (CorruptError(SECRET), 500, "corrupt_data"),
    (DiskError(SECRET), 503, "disk_unavailable"),
    (OSError(errno.EIO, SECRET, SECRET), 503, "disk_unavailable"),
    (RegistryError(SECRET), 503, "registry_unavailable"),
    (Refused(SECRET), 503, "busy"),
]
ROUTES = [
    ("GET", "/v1/me", None),
    ("GET", "/v1/me/versions", None),
    ("GET", "/v1/me/history", None),
    ("POST", "/v1/me/history", {"items": [{"text": "a", "label": "comedy"}]}),
    ("POST", "/v1/me/history/forget", {"item_ids": ["1"]}),
    ("POST", "/v1/me/rollback", None),
    ("GET", "/v1/me/export", None),
    ("DELETE", "/v1/me", None),
]


@pytest.mark.parametrize(("error", "status", "kind"), ERRORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=lambda one: str(one)[:30])
def test_only_errors_about_the_input_are_told_and_are_a_400(
    web: Web, ann: TestClient, method: str, path: str, body: Any, error: Exception, status: int, kind: str
) -> None:
    registry = Broken(error, verify_token=web[0].vault.registry.verify_token)
    web[0].vault = Broken(error, registry=registry)  # type: ignore[assignment]
    ann.app.state.bounds.chores = Broken(error)  # type: ignore[attr-defined]
    response = ann.request(method, path, json=body)
    assert code(response) == (status, kind)
    told = response.json()["error"]["message"]
    assert (told == str(error)) == (status == 400) and "bob" not in told and "/" not in told
    assert ("retry-after" in response.headers) == (status == 503) == ("try again" in told)


@pytest.mark.parametrize(("error", "status", "kind"), ERRORS, ids=lambda one: type(one).__name__)
def test_what_a_backend_raises_is_an_answer_also_in_the_middle_of_a_stream(
    web: Web, ann: TestClient, error: Exception, status: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend, _ = web
    backend.raise_with = error
    response = ann.post("/v1/completions", json={"prompt": "a"})
    assert code(response) == (status, kind) and ("retry-after" in response.headers) == (status == 503)
    assert code(ann.post("/v1/personalize", json={"input": "a"})) == (status, kind)
    backend.fail_after = 2
    stream = ann.post("/v1/completions", json={"prompt": "a", "stream": True})
    *pieces, last, done, _ = stream.text.split("\n\n")
    assert stream.status_code == 200 and len(pieces) == 2 and done == "data: [DONE]"
    failed = json.loads(last.removeprefix("data: "))["error"]
    assert failed["code"] == kind and "bob" not in stream.text + response.text
    if kind == "internal_error":
        assert "bob" not in caplog.text and type(error).__name__ in caplog.text


def test_damaged_files_beside_the_vault_are_told_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, client = web_of(tmp_path, replace(CONFIG, run_dir=str(tmp_path)))
    ann, item = client(token_of(backend.vault, "ann")), (Item("1", text="x", label="comedy"),)
    users = [UserHistory(user, "target", item) for user in ("ann", "bob@mail.example")]
    write_prepared(tmp_path / "prepare", users)
    path = tmp_path / "prepare" / INDEX_NAME
    whole, index = path.read_text(), json.loads(path.read_text())
    for name in ("offset", "length"):
        index["entries"]["ann"][name] = index["entries"]["bob@mail.example"][name]
    path.write_text(json.dumps(index))
    responses = [ann.delete("/v1/me"), ann.post("/v1/me/history/forget", json={"item_ids": ["1"]})]
    path.write_text(whole)
    (tmp_path / "old.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    responses.append(ann.delete("/v1/me"))
    for response in responses:
        assert code(response) == (500, "internal_error")
        assert "bob" not in response.text and tmp_path.name not in response.text
    assert "bob" not in caplog.text and "ValueError at forget.py:" in caplog.text
    assert ann.get("/v1/me").status_code == 200, "nobody is forgotten by half"


async def call(app: Any, token: str, body: dict[str, Any], disconnect: asyncio.Event | None = None) -> list[Any]:
    """One POST straight into the ASGI app; `disconnect` hangs up. Returns what the app sent."""
    sent: list[Any] = []
    pending = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await (disconnect or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")]
    path = "/v1/completions"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": path, "raw_path": path.encode()}
    await app({**scope, "query_string": b"", "headers": headers, "root_path": ""}, receive, send)
    return sent


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_one_user_cannot_take_all_the_room(web: Web, ann: TestClient) -> None:
    backend, client = web
    tokens = token_of(backend.vault, "ann"), token_of(backend.vault, "bob")

    async def run() -> None:
        backend.wait = asyncio.Event()
        app, body = ann.app, {"prompt": "a"}
        waiting = [asyncio.create_task(call(app, tokens[0], body)) for _ in range(CONFIG.serve.requests_per_user)]
        await until(lambda: len(backend.asked) == len(waiting))
        refused = (await call(app, tokens[0], body))[0]
        assert refused["status"] == 429 and (b"retry-after", b"1") in refused["headers"]
        others = asyncio.create_task(call(app, tokens[1], body))
        await until(lambda: len(backend.asked) == len(waiting) + 1)
        backend.wait.set()
        for task in (*waiting, others):
            assert (await task)[0]["status"] == 200
        assert (await call(app, tokens[0], body))[0]["status"] == 200

    asyncio.run(run())


def test_a_client_that_hangs_up_in_a_stream_frees_its_place(web: Web, ann: TestClient) -> None:
    backend, _ = web
    token = token_of(backend.vault, "ann")

    async def run() -> None:
        for _ in range(3 * CONFIG.serve.requests_per_user):
            backend.wait, disconnect = asyncio.Event(), asyncio.Event()
            before = len(backend.asked)
            task = asyncio.create_task(call(ann.app, token, {"prompt": "a", "stream": True}, disconnect))
            await until(lambda before=before: len(backend.asked) > before)  # type: ignore[misc]
            disconnect.set()
            await task
            await until(lambda: len(backend.closed) == len(backend.asked))

    asyncio.run(run())


def test_a_client_that_hangs_up_is_no_fault_though_its_answer_takes_a_moment_to_end(
    web: Web, ann: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, _ = web
    ask, token = backend.ask, token_of(backend.vault, "ann")
    ended = []

    async def slow(asked: Ask) -> AsyncGenerator[Event, None]:
        try:
            async for event in ask(asked):
                yield event
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            ended.append(True)

    async def run() -> None:
        backend.wait, disconnect = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(call(ann.app, token, {"prompt": "a", "stream": True}, disconnect))
        await until(lambda: len(backend.asked) == 1)
        disconnect.set()
        await task
        assert ended

    monkeypatch.setattr(backend, "ask", slow)
    asyncio.run(run())
    assert not caplog.text


def test_an_answer_that_takes_too_long_is_a_504_and_is_cancelled(web: Web, ann: TestClient) -> None:
    backend, _ = web
    ann.app.state.config = CONFIG.__class__(task=CONFIG.task, serve=CONFIG.serve.__class__(deadline_s=0.2))  # type: ignore[attr-defined]

    async def run() -> list[Any]:
        backend.wait = asyncio.Event()
        token = token_of(backend.vault, "ann")
        whole = await call(ann.app, token, {"prompt": "a"})
        stream = await call(ann.app, token, {"prompt": "a", "stream": True})
        assert len(backend.closed) == 2
        return [whole[0]["status"], b"".join(part.get("body", b"") for part in stream)]

    status, stream = asyncio.run(run())
    assert status == 504 and b"deadline_exceeded" in stream and stream.endswith(b"[DONE]\n\n")


def test_no_text_and_no_user_reaches_the_metrics_and_all_answers_carry_the_guards(web: Web, ann: TestClient) -> None:
    backend, _ = web
    for path in ("/", "/docs", "/static/page.css", "/v1/me", "/nothing", "/v1/me/versions"):
        headers = ann.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    counted = {route for route, _ in backend.counted}
    assert {"/v1/me", "/v1/me/versions"} <= counted and not any("nothing" in route for route in counted)


def test_a_fault_of_ours_is_counted_and_guarded_and_only_its_kind_is_logged(
    web: Web, ann: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, _ = web

    def broken(*_: Any) -> None:
        raise KeyError("the canary of ann")

    monkeypatch.setattr(backend.vault, "history", broken)
    response = ann.get("/v1/me")
    assert code(response) == (500, "internal_error") and "canary" not in response.text + caplog.text
    assert response.headers["cache-control"] == "no-store" and "KeyError" in caplog.text
    assert backend.counted == [("/v1/me", 500)]
    monkeypatch.setattr("serve.api._line", broken)
    caplog.clear()
    response = ann.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert response.status_code == 200 and not response.text, "what has begun can only be cut off"
    assert "KeyError" in caplog.text and "canary" not in caplog.text


def test_a_damaged_history_and_a_full_disk_are_faults_of_ours_and_show_no_path(
    web: Web, ann: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vault = web[0].vault
    vault.append_history("ann", [Item("1", text="a", label="comedy")])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(vault.root))

    with monkeypatch.context() as patch:
        patch.setattr("oppu_ray.vault.write_file", full)
        response = ann.post("/v1/me/history", json={"items": [{"text": "b", "label": "action"}]})
    assert code(response) == (503, "disk_unavailable") and response.headers["retry-after"]
    assert str(vault.root) not in response.text and str(vault.root) in caplog.text
    (segment,) = segment_files(vault, "ann")
    segment.write_bytes(segment.read_bytes()[:-3] + b"xx\n")
    for path in ("/v1/me/history", "/v1/me/export"):
        response = ann.get(path)
        assert code(response) == (500, "corrupt_data") and "jsonl" not in response.text


def test_operators_make_users_and_tokens(web: Web) -> None:
    backend, client = web
    operator = client(token_of(backend.vault, None, "operator"))
    assert code(operator.post("/v1/admin/tokens", json={"user_id": "eve"})) == (400, "bad_request")
    assert operator.post("/v1/admin/users", json={"user_id": "eve"}).status_code == 201
    token = operator.post("/v1/admin/tokens", json={"user_id": "eve", "ttl_s": 60}).json()["token"]
    eve = client(token)
    assert eve.get("/v1/me").json()["user"] == backend.vault.user_hash("eve")[:12]
    listed = operator.get("/v1/admin/tokens").json()["tokens"]
    assert "digest" not in listed[0] and token.split("_", 2)[2] not in json.dumps(listed)
    assert operator.delete(f"/v1/admin/tokens/{token.split('_')[1]}").status_code == 204
    assert eve.get("/v1/me").status_code == 401
    assert len(operator.get("/v1/admin/users").json()["users"]) == 3
    assert operator.get("/v1/admin/audit").json()["broken"] is None
    lengths = [len(operator.get(f"/v1/admin/audit?limit={limit}").json()["entries"]) for limit in (-1, 0, 1)]
    assert lengths == [0, 0, 1]
    for hostile in ("../../etc", "a\nb", "", "x" * 10_000, "a\x00"):
        status, _ = code(operator.post("/v1/admin/tokens", json={"user_id": hostile}))
        assert status == 400


def test_threads_do_not_mix_users(web: Web) -> None:
    backend, client = web
    tokens = {user: token_of(backend.vault, user) for user in ("ann", "bob")}
    found: dict[str, set[str]] = {user: set() for user in tokens}

    def ask(user: str) -> None:
        one = client(tokens[user])
        for _ in range(20):
            found[user].add(one.get("/v1/me").json()["user"])

    threads = [threading.Thread(target=ask, args=(user,)) for user in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {user: {backend.vault.user_hash(user)[:12]} for user in tokens}
