"""What one user of the service may try against another, over HTTP, on the disk, and by watching: all of it fails.

`SECURITY.md` says what is protected from whom. Traffic that is only malformed is in `test_serve_api.py` and fuzzed.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from serve_tools import FakeBackend, token_of, web_of
from starlette.testclient import TestClient
from vault_tools import BASE, make_adapter, make_items, make_manifest, segment_files

from oppu_ray import registry as registry_module
from oppu_ray.vault import CorruptError, Vault

ROOT = Path(__file__).resolve().parents[1]
Web = tuple[FakeBackend, Callable[[str | None], TestClient]]


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return web_of(tmp_path)


def seen_by(client: TestClient) -> str:
    paths = ("/v1/me", "/v1/me/history", "/v1/me/versions", "/v1/models")
    return "".join(client.get(path).text for path in paths)


# ---- tokens


def test_no_mixture_of_two_tokens_is_a_token(web: Web) -> None:
    backend, client = web
    ann, bob = (token_of(backend.vault, user).split("_", 2) for user in ("ann", "bob"))
    operator = token_of(backend.vault, None, "operator").split("_", 2)
    parts = list(zip(ann, bob, operator, strict=True))
    for mixed in itertools.product(*parts):
        token = "_".join(mixed)
        is_whole = mixed[1:] in (tuple(ann[1:]), tuple(bob[1:]), tuple(operator[1:]))
        assert (backend.vault.registry.verify_token(token) is not None) == is_whole, token
    spoiled = [
        "_".join(ann).upper(),
        "_".join(ann) + "\0",
        " ".join(ann),
        "_".join(ann)[::-1],
        "oppu__",
        "_".join(bob[:2]),
    ]
    for token in spoiled:
        assert backend.vault.registry.verify_token(token) is None
    two = [("Authorization", f"Bearer {'_'.join(ann)}"), ("Authorization", f"Bearer {'_'.join(bob)}")]
    answer = client(None).get("/v1/me", headers=two)  # type: ignore[arg-type]
    assert answer.status_code == 401 or answer.json()["user"] == backend.vault.user_hash("ann")[:12]


def test_a_token_of_a_forgotten_user_does_not_open_the_next_one_of_that_name(web: Web) -> None:
    backend, client = web
    old = token_of(backend.vault, "ann")
    client(old).delete("/v1/me")
    backend.vault.add_users(["ann"])
    assert client(old).get("/v1/me").status_code == 401


def test_a_wrong_secret_takes_the_same_steps_as_an_unknown_token(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no stopwatch tells whose tokens exist: the same queries, and one comparison in constant time."""
    registry = web[0].vault.registry
    good = token_of(web[0].vault, "ann")
    steps: list[str] = []
    compare = registry_module.hmac.compare_digest

    def compared(one: Any, other: Any) -> bool:
        steps.append(f"compared {len(one)} and {len(other)}")
        return compare(one, other)

    monkeypatch.setattr(registry_module.hmac, "compare_digest", compared)
    sa.event.listen(registry._engine, "before_cursor_execute", lambda *args: steps.append(args[2]))
    taken = []
    for token in (f"oppu_{'0' * 16}_{'A' * 43}", good[:-43] + "A" * 43):
        steps.clear()
        assert registry.verify_token(token) is None
        taken.append(list(steps))
    assert taken[0] == taken[1] and len(taken[0]) >= 2


def test_unknown_and_not_yours_are_told_in_the_same_words(web: Web) -> None:
    """A user's own routes take no id, so there is nothing to ask about others; model names and item ids are all."""
    backend, client = web
    backend.vault.append_history("bob", make_items("his"))
    ann = client(token_of(backend.vault, "ann"))
    hers = [ann.post("/v1/me/history/forget", json={"item_ids": [one]}).text for one in ("his", "nobodys")]
    assert hers[0].replace("his", "X") == hers[1].replace("nobodys", "X")
    bob = str(backend.vault.user_hash("bob"))
    answers = [ann.post("/v1/completions", json={"prompt": "a", "model": name}) for name in (bob, "0" * 64, f"{bob}/1")]
    assert {answer.status_code for answer in answers} == {404}
    doors = [
        f"/v1/me/{bob}",
        f"/v1/users/{bob}",
        "/v1/me/../admin/users",
        "/v1/me/%2e%2e/admin/users",
        "/static/../web.py",
    ]
    assert all(ann.get(path).status_code in (403, 404) for path in doors)


# ---- headers, ids, files


def test_headers_a_client_sends_come_back_in_no_header(web: Web) -> None:
    backend, client = web
    ann = client(token_of(backend.vault, "ann"))
    hostile = {"x-request-id": "a" * 4000, "x-forwarded-for": "1.2.3.4", "origin": "https://evil", "accept": "<script>"}
    answer = ann.post("/v1/completions", json={"prompt": "a"}, headers=hostile)
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    for value in hostile.values():
        assert value not in answer.headers.values() and value not in answer.text


def test_an_operator_cannot_be_talked_into_a_path(web: Web) -> None:
    backend, client = web
    operator, root = client(token_of(backend.vault, None, "operator")), backend.vault.root
    ids = [
        "../../etc",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "C:\\x",
        "bob\u200b",
        "ＢＯＢ",
        "%2e%2e",
        "~root",
        "-rf",
        "key",
    ]
    before = {path.name for path in root.parent.iterdir()}
    made = [operator.post("/v1/admin/users", json={"user_id": one}) for one in ids]
    assert {answer.status_code for answer in made} == {201, 400}
    hashes = [answer.json()["user_hash"] for answer in made if answer.status_code == 201]
    assert len(set(hashes)) == len(hashes) and backend.vault.user_hash("bob") not in hashes
    assert {path.name for path in root.parent.iterdir()} == before
    for one in ("x/../y", "..%2f", "0" * 5000):
        assert operator.delete(f"/v1/admin/tokens/{one}").status_code in (400, 404)


def test_adapters_and_histories_swapped_on_the_disk_are_not_served(tmp_path: Path) -> None:
    """By whoever can write the files but holds neither the registry nor the key."""
    vault = Vault(tmp_path / "vault", encrypt=True)
    folders = {}
    for number, user in enumerate(("ann", "bob")):
        version = vault.commit(user, make_adapter(number), make_manifest())
        vault.append_history(user, make_items(user))
        folders[user] = vault.user_folder(vault.user_hash(user)), version
    (hers, mine), (his, _) = folders["ann"], folders["bob"]
    for part in ("adapters", "history"):
        os.rename(hers / part, tmp_path / part)
        shutil.copytree(his / part, hers / part)
    with pytest.raises(ValueError, match="no good adapter"):
        vault.load("ann", base_fingerprint=BASE)
    with pytest.raises(ValueError, match="history"):  # the registry lists another file
        vault.read_history("ann")
    assert vault.load("bob", base_fingerprint=BASE)[1].user_hash == vault.user_hash("bob")
    os.symlink(segment_files(vault, "bob")[0], segment_files(vault, "ann")[0])
    with pytest.raises(CorruptError, match="symlink"):
        vault.read_history("ann")
    assert mine


# ---- canaries


def test_nothing_of_bob_reaches_ann_or_a_log(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    backend, client = web
    caplog.set_level(logging.DEBUG)
    secrets = {user: f"canary-of-{user}-7f3a" for user in ("ann", "bob")}
    clients = {user: client(token_of(backend.vault, user)) for user in secrets}
    for user, one in clients.items():
        item = {"item_id": f"id-{secrets[user]}", "text": secrets[user], "label": "comedy"}
        assert one.post("/v1/me/history", json={"items": [item]}).status_code == 200
        one.post("/v1/me/history", json={"items": [{**item, "label": "no label"}]})  # refused, and not quoted
        one.post("/v1/completions", json={"prompt": secrets[user]})
        one.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": secrets[user]}], "n": 2})
        one.get(f"/v1/{secrets[user]}")
    for user, other in (("ann", "bob"), ("bob", "ann")):
        assert secrets[user] in seen_by(clients[user]) and secrets[other] not in seen_by(clients[user])
        assert secrets[other].encode() not in clients[user].get("/v1/me/export").content
    operator = client(token_of(backend.vault, None, "operator"))
    listed = "".join(operator.get(f"/v1/admin/{what}").text for what in ("users", "tokens", "audit?limit=1000"))
    tokens = [one.headers["authorization"].split()[1] for one in clients.values()]
    ours = [one for one in caplog.records if not one.name.startswith(("httpx", "asyncio"))]  # not the client's own
    logged = "\n".join(one.getMessage() for one in ours)
    for needle in (*secrets.values(), *tokens, '"ann"', '"bob"'):
        assert needle not in logged and needle not in listed
    assert not any("canary" in route for route, _ in backend.counted)


# ---- what the code itself never does

SOURCES = sorted([*ROOT.glob("oppu_ray/*.py"), *ROOT.glob("serve/*.py")])
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {"eval", "exec", "os.system", "torch.load", "yaml.load", "faiss.read_index"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_pickle_no_remote_code_no_unsafe_yaml_no_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLES, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLES, where
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) == "yaml.load":  # safe with a loader that adds to SafeLoader, which is looked up
                module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
                assert issubclass(getattr(module, ast.unparse(node.args[1])), yaml.SafeLoader), where
            else:
                assert ast.unparse(node.func) not in UNSAFE, where
            for keyword in node.keywords:
                is_bad = keyword.arg in ("trust_remote_code", "shell", "allow_pickle")
                assert not is_bad or ast.unparse(keyword.value) == "False", where
