"""One user's requests beside another's on the HTTP surface: what blocks one holds up no other, on any route."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_tools import CONFIG, token_of, web_of
from vault_tools import make_adapter, make_manifest, segment_files

from oppu_ray.core import Item
from serve import account, guard

NEW = {"items": [{"text": "a film", "label": "comedy"}]}
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("POST", "/v1/completions", {"prompt": "a"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/v1/personalize", {"input": "a"}),
    ("GET", "/v1/me", None),
    ("GET", "/v1/me/versions", None),
    ("POST", "/v1/me/rollback", None),
    ("GET", "/v1/me/history", None),
    ("POST", "/v1/me/history", NEW),
    ("POST", "/v1/me/refresh", None),
    ("GET", "/v1/me/refresh", None),
    ("GET", "/v1/me/export", None),
    ("POST", "/v1/me/history/forget", {"item_ids": ["1"]}),
    ("DELETE", "/v1/me", None),
]
"""Every route of a user; the last two may be called once."""


class Call:
    """One request straight into the ASGI app; `read` counts how much of the body the app has asked for."""

    def __init__(self, app: Any, token: str, method: str, path: str, content: Any):
        self.read = 0
        self.sent: list[Any] = []
        body = b"" if content is None else json.dumps(content).encode()
        headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": method, "path": path, "query_string": b""}
        self._app, self._body = app, body
        self._scope = {**scope, "raw_path": path.encode(), "headers": headers, "root_path": "", "client": ("host", 1)}

    async def __call__(self) -> int:
        await self._app(self._scope, self._receive, self._send)
        return int(self.sent[0]["status"])

    async def _receive(self) -> Any:
        self.read += 1
        if self.read > 1:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def code(self) -> str:
        return str(json.loads(self.sent[1]["body"])["error"]["code"])


class Service:
    """A backend with ann and bob, who have an adapter, a history and a token each."""

    def __init__(self, folder: Path, **options: Any):
        config = replace(CONFIG, serve=replace(CONFIG.serve, **options))
        self.backend, client = web_of(folder, config)
        self.vault, self.app = self.backend.vault, client(None).app
        self.tokens = {user: token_of(self.vault, user) for user in ("ann", "bob")}
        self.clients = {user: client(token) for user, token in self.tokens.items()}
        for user in self.tokens:
            self.vault.append_history(user, [Item(str(number), text="a", label="comedy") for number in range(3)])
            for seed in (1, 2):
                self.vault.commit(user, make_adapter(seed), make_manifest(("0",)))

    def call(self, user: str, route: tuple[str, str, Any]) -> Call:
        return Call(self.app, self.tokens[user], *route)

    async def every_route(self, user: str) -> dict[str, int]:
        """The status of each route, one after another."""
        return {f"{route[0]} {route[1]}": await self.call(user, route)() for route in ROUTES}


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path, requests_per_user=8)


class Gate:
    """Makes a function wait for ann, and only for her."""

    def __init__(self, function: Callable[..., Any], is_ann: Callable[..., bool]):
        self._function, self._is_ann = function, is_ann
        self.num_waiting = 0
        self.open = threading.Event()

    def __call__(self, *args: Any, **more: Any) -> Any:
        if self._is_ann(*args):
            self.num_waiting += 1
            assert self.open.wait(60)
        return self._function(*args, **more)


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.open.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def blocked_registry(service: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> Gate:
    """A call of the registry that answers everyone but ann."""
    mine = {service.tokens["ann"], str(service.vault.user_hash("ann"))}
    gate = Gate(getattr(service.vault.registry, name), lambda first, *_: first in mine)
    monkeypatch.setattr(service.vault.registry, name, gate)
    return gate


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("verify_token", ROUTES[0]),
        ("current", ("GET", "/v1/me", None)),
        ("versions", ("GET", "/v1/me/versions", None)),
        ("history", ("POST", "/v1/me/history", NEW)),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_blocks_one_users_requests_blocks_no_other_user_on_any_route(
    service: Service, monkeypatch: pytest.MonkeyPatch, gates: list[Gate], name: str, route: tuple[str, str, Any]
) -> None:
    monkeypatch.setattr(guard, "VERIFY_TIMEOUT_S", 300.0)

    async def run() -> None:
        await service.call("ann", ROUTES[0])()  # her token is known from now on
        gates.append(gate := blocked_registry(service, monkeypatch, name))
        flood = [asyncio.create_task(service.call("ann", route)()) for _ in range(48)]
        await until(lambda: gate.num_waiting > 0)
        statuses = await service.every_route("bob")
        assert set(statuses.values()) <= {200, 202}, statuses
        assert gate.num_waiting == 1, "one of ann's calls takes a thread, the others wait for it"
        gate.open.set()
        answered = await asyncio.gather(*flood)
        assert set(answered) == {200, 429} and answered.count(200) == 8

    asyncio.run(run())


def test_who_forgets_for_long_holds_nobody_up(tmp_path: Path) -> None:
    """Forgetting takes locks and reads the whole run: in a process of its own, one at a time of a user."""
    service = Service(tmp_path, requests_per_user=8)

    async def run() -> None:
        route = ("POST", "/v1/me/history/forget", {"item_ids": ["1"]})
        with service.vault.only_writer(str(service.vault.user_hash("ann"))):  # stands for what takes long
            flood = [asyncio.create_task(service.call("ann", route)()) for _ in range(8)]
            exports = [asyncio.create_task(service.call("bob", ("GET", "/v1/me/export", None))()) for _ in range(3)]
            assert await asyncio.gather(*exports) == [200] * 3
            statuses = [await service.call("bob", route)() for route in ROUTES[:11]]
            assert set(statuses) <= {200, 202}
            assert not any(task.done() for task in flood)
        answered = await asyncio.gather(*flood)
        assert answered.count(200) == 1 and set(answered) == {200, 400}

    asyncio.run(run())


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route[0]} {route[1]}")
def test_every_route_counts_and_is_refused_before_anything_is_done_for_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, route: tuple[str, str, Any]
) -> None:
    async def run() -> None:
        service.backend.wait = asyncio.Event()
        streams = ("POST", "/v1/completions", {"prompt": "a"})
        under_way = [asyncio.create_task(service.call("ann", streams)()) for _ in range(8)]
        await until(lambda: len(service.backend.asked) == 8)
        verified = []
        verify = service.vault.registry.verify_token
        monkeypatch.setattr(
            service.vault.registry, "verify_token", lambda token: verified.append(token) or verify(token)
        )
        refused = service.call("ann", route)
        assert await refused() == 429 and refused.code == "too_many_requests"
        assert (b"retry-after", b"1") in refused.sent[0]["headers"]
        assert refused.read == 0 and not verified and len(service.backend.asked) == 8
        monkeypatch.undo()
        service.backend.wait.set()
        assert set(await asyncio.gather(*under_way)) == {200}
        service.backend.wait = None
        assert await service.call("ann", route)() in (200, 202), "the places are free again"

    asyncio.run(run())


def test_refusals_are_held_back_by_user_and_no_more_than_some(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep
    monkeypatch.setattr(guard, "MAX_REFUSED", 10)
    service.app.state.bounds.refused.per_key = 10

    async def run() -> None:
        monkeypatch.setattr("serve.fair.asyncio.sleep", lambda seconds: (slept.append(seconds), sleep(0.2))[1])
        wrong = [Call(service.app, "oppu_" + "0" * 16 + "_" + "A" * 43, *ROUTES[0]) for _ in range(30)]
        assert set(await asyncio.gather(*(call() for call in wrong))) == {401}
        assert len(slept) <= 10 and max(slept) > 5 * guard.REFUSAL_S
        assert await service.call("ann", ROUTES[0])() == 200

    asyncio.run(run())


def test_a_registry_that_does_not_answer_is_a_503_and_frees_the_place(
    service: Service, monkeypatch: pytest.MonkeyPatch, gates: list[Gate]
) -> None:
    monkeypatch.setattr(guard, "VERIFY_TIMEOUT_S", 0.05)

    async def run() -> None:
        await service.call("ann", ROUTES[0])()
        gates.append(gate := blocked_registry(service, monkeypatch, "verify_token"))
        calls = [service.call("ann", ROUTES[0]) for _ in range(8)]
        assert set(await asyncio.gather(*(call() for call in calls))) == {503}
        assert {call.code for call in calls} == {"overloaded"} and gate.num_waiting == 1
        gate.open.set()
        await until(lambda: not service.app.state.bounds._verifying._queue._running)
        assert await service.call("ann", ROUTES[0])() == 200

    asyncio.run(run())


def test_a_revoked_token_is_refused_though_it_was_known(service: Service) -> None:
    ann = service.clients["ann"]
    assert ann.get("/v1/models").status_code == 200
    service.vault.registry.revoke_token(service.tokens["ann"].split("_")[1])
    for _ in range(2):
        assert ann.get("/v1/models").status_code == 401


def test_many_tokens_of_one_user_share_one_bound(service: Service) -> None:
    tokens = [token_of(service.vault, "ann") for _ in range(9)]

    async def run() -> None:
        service.backend.wait = asyncio.Event()
        body = {"prompt": "a"}
        calls = [Call(service.app, token, "POST", "/v1/completions", body) for token in tokens]
        tasks = [asyncio.create_task(call()) for call in calls[:8]]
        await until(lambda: len(service.backend.asked) == 8)
        assert await calls[8]() == 429
        service.backend.wait.set()
        assert set(await asyncio.gather(*tasks)) == {200}

    asyncio.run(run())


# ---- histories


def test_a_history_holds_at_most_so_many_bytes(tmp_path: Path) -> None:
    service = Service(tmp_path, max_history_bytes=3000, max_items=1000)
    ann = service.clients["ann"]
    item = {"text": "film " * 100, "label": "comedy"}
    statuses = [ann.post("/v1/me/history", json={"items": [item]}).status_code for _ in range(6)]
    assert statuses == [200] * 3 + [400] * 3
    refused = ann.post("/v1/me/history", json={"items": [item]}).json()["error"]
    assert refused["code"] == "history_full" and "3000 bytes" in refused["message"]
    assert service.vault.history("ann").num_bytes <= 3000 and ann.get("/v1/me").json()["num_items"] == 6
    assert service.clients["bob"].post("/v1/me/history", json={"items": [item]}).status_code == 200
    forgotten = ann.post("/v1/me/history/forget", json={"item_ids": ["0", "1", "2"]})
    assert forgotten.status_code == 200 and ann.post("/v1/me/history", json=NEW).status_code == 200


def test_counts_and_appends_and_the_newest_items_do_without_the_rest_of_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oppu_ray.vault.MERGE_ITEMS", 1)
    service = Service(tmp_path)
    ann = service.clients["ann"]
    service.vault.append_history("ann", [Item("new", text="the newest", label="comedy")])
    first, _ = segment_files(service.vault, "ann")
    first.unlink()
    assert ann.get("/v1/me").json()["num_items"] == 4
    shown = ann.get("/v1/me/history?limit=1").json()
    assert shown["num_items"] == 4 and [item["item_id"] for item in shown["items"]] == ["new"]
    assert ann.post("/v1/me/history", json=NEW).json()["num_items"] == 5
    assert ann.get("/v1/me/history?limit=9").status_code == 503, "the rest is needed, and cannot be read"


def test_large_bodies_are_read_in_another_process(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = service.clients["ann"]
    monkeypatch.setattr(account, "add_items", None)
    large = {"items": [{"text": "film " * 5000, "label": "comedy", "item_id": "large"}]}
    assert ann.post("/v1/me/history", json=large).json() == {"num_items": 4, "item_ids": ["large"]}
    refused = ann.post("/v1/me/history", json={"items": [{**large["items"][0], "label": "nonsense"}]})
    assert refused.status_code == 400 and "label: expected one of" in refused.json()["error"]["message"]
    surrogate = json.dumps({"items": [{"text": "x" * 20_000 + "\ud800", "label": "comedy"}]})
    refused = ann.post("/v1/me/history", content=surrogate, headers={"content-type": "application/json"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "items.0.text"


def test_a_long_history_is_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import history

    service = Service(tmp_path)
    monkeypatch.setattr(history, "MAX_SHOWN_BYTES", 700)
    long = [Item(f"long{number}", text="film " * 50, label="comedy") for number in range(5)]
    service.vault.append_history("ann", long)
    ann = service.vault.user_hash("ann")
    shown = json.loads(history.newest_items(service.vault, ann, 8))
    assert shown["num_items"] == 8 and [item["item_id"] for item in shown["items"]] == ["long4"]
    assert json.loads(history.newest_items(service.vault, ann, 0)) == {"num_items": 8, "items": []}
