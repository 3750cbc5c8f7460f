"""The load's own bookkeeping, over answers that are made up; the load itself wants a running service."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vault_tools import make_adapter, make_items, make_manifest

from jobs import load_serve
from oppu_ray.config import Config, TaskConfig
from oppu_ray.core import Item
from oppu_ray.vault import open_vault

USERS = [load_serve.Asked("token", [{"text": "a film"}])]


@pytest.mark.parametrize(
    ("asked", "left", "failures"),
    [
        (http.client.IncompleteRead(b"torn"), 200, {"IncompleteRead"}),
        (http.client.BadStatusLine("noise"), 200, {"BadStatusLine"}),
        (ConnectionRefusedError(), 200, {"ConnectionRefusedError"}),
        (503, 200, {"503"}),
        (200, 429, {"429"}),
        (200, 200, set()),
    ],
)
def test_a_client_goes_on_and_every_failure_is_counted(
    monkeypatch: pytest.MonkeyPatch, asked: Exception | int, left: int, failures: set[str]
) -> None:
    stop, num, latencies, found = threading.Event(), {"ask": 0, "hang_up": 0}, list[float](), list[str]()
    monkeypatch.setattr(stop, "wait", lambda _: None)

    def answer(name: str, what: Exception | int) -> Callable[..., int]:
        def call(*_: Any) -> int:
            num[name] += 1
            if sum(num.values()) == 40:
                stop.set()
            if isinstance(what, Exception):
                raise what
            return what

        return call

    monkeypatch.setattr(load_serve, "ask", answer("ask", asked))
    monkeypatch.setattr(load_serve, "hang_up", answer("hang_up", left))
    load_serve.ask_on(Config(), USERS, 0, stop, latencies, found)
    assert sum(num.values()) == 40 and min(num.values()) > 0 and set(found) == failures
    assert len(latencies) == (num["ask"] if asked == 200 else 0)
    assert len(found) == num["ask"] * (asked != 200) + num["hang_up"] * (left != 200)


def test_who_has_nothing_to_ask_is_left_out(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path), task=TaskConfig("product_rating"))
    vault = open_vault(config)
    for user_id, items in {"a": make_items("1", "2"), "b": [Item("3", label="5")]}.items():
        vault.append_history(user_id, items)
        lease = vault.lease(user_id, "run", 60)
        vault.commit(user_id, make_adapter(0), make_manifest(), lease)
    vault.close()
    assert [len(user.questions) for user in load_serve.ask_users(config, 60)] == [2]
