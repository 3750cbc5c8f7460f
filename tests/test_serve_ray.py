"""The service as users meet it: Ray Serve with two engine replicas on a tiny trained run, over HTTP."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from faults import until
from line_tools import TAGS
from serve_tools import token_of
from service import GUESTS, USERS, Load, Service, replica_pids, running, service_replicas


@pytest.fixture(scope="module")
def service(ray_session: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(ray_session, tmp_path_factory.mktemp("serve")) as one:
        yield one


def test_the_openai_client_talks_to_it(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=token_of(service.vault, "user-0"), max_retries=0)
    messages: Any = [{"role": "user", "content": "the movie <|im_end|> of the day"}]
    raw = client.chat.completions.with_raw_response.create(model="oppu", messages=messages, max_tokens=8)
    whole = raw.parse().choices[0].message.content
    assert raw.headers["x-oppu-adapter-version"] == service.current("user-0")
    stream = client.chat.completions.create(model="oppu", messages=messages, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == whole
    shared = client.completions.create(model="task", prompt="the movie", max_tokens=8, logprobs=2)
    assert shared.usage and shared.usage.completion_tokens <= 8
    assert shared.choices[0].logprobs and shared.choices[0].logprobs.token_logprobs
    with pytest.raises(openai.BadRequestError, match="prompt tokens"):
        client.completions.create(model="oppu", prompt="word " * 500)
    wrong = openai.OpenAI(base_url=f"{service.url}/v1", api_key="oppu_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_a_user_stays_with_a_replica_and_the_replicas_share_the_users(service: Service) -> None:
    def replicas(user: str, headers: dict[str, str]) -> set[str]:
        body = {"input": "film 1"}
        answers = [service.client(user).post("/v1/personalize", json=body, headers=headers) for _ in range(4)]
        return {answer.headers["x-oppu-replica"] for answer in answers}

    with ThreadPoolExecutor(4) as pool:
        homes = list(pool.map(lambda user: replicas(user, {}), GUESTS))
        forged = list(pool.map(lambda user: replicas(user, {"x-session-id": "same"}), GUESTS))
    assert all(len(home) == 1 for home in homes)
    assert len(set.union(*homes)) == 2, "16 users on one replica of two"
    assert forged == homes, "the client's own session header must not count"


def test_answers_under_load_are_those_given_alone(service: Service) -> None:
    def answer(user: str, arm: str) -> tuple[Any, ...]:
        response = service.ask(user, "film 2", arm=arm, top_k=0 if arm == "task" else 2)
        body = response.json()
        assert response.status_code == 200 and body["answer"] in TAGS, body
        return body["answer"], body["adapter_version"], [item["text"] for item in body["items"]]

    jobs = [(user, arm) for user in USERS for arm in ("oppu", "rag", "task")]
    alone = [answer(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: answer(*job), jobs * 3))
    assert together == alone * 3
    for (user, _), (_, _, items) in zip(jobs, alone, strict=True):
        others = [f"canary{number}" for number in range(4) if f"user-{number}" != user]
        assert not any(canary in text for text in items for canary in others)
    assert all(items for (_, arm), (_, _, items) in zip(jobs, alone, strict=True) if arm == "rag")


def test_bad_requests_harm_nobody_else(service: Service) -> None:
    before = service.ask("user-1").json()["answer"]
    client = service.client("user-0")
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"input": "' + b"a" * 1_000_000 + b'"}'):
        response = client.post("/v1/personalize", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 413) and response.json()["error"]["message"]
    headers = {"serve_multiplexed_model_id": "user-1", "x-request-disconnect-disabled": "true"}
    assert client.post("/v1/personalize", json={"input": "film 1"}, headers=headers).status_code == 200
    assert service.ask("user-0", "{task} {{x}} %s \x00 <|im_start|>").status_code == 200
    assert service.ask("user-1").json()["answer"] == before


def test_readers_who_hang_up_or_dawdle_leave_no_trace(service: Service) -> None:
    body = json.dumps({"prompt": "the movie", "stream": True, "max_tokens": 100}).encode()
    token = token_of(service.vault, "user-2")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = service.url.removeprefix("http://").split(":")
    for _ in range(20):  # more than one user may have under way: a place that is not given back would show
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            assert b"200 OK" in connection.recv(1024)
    with socket.create_connection((host, int(port))) as dawdler:
        dawdler.sendall(head.encode() + body[:10])
        until(lambda: service.ask("user-2").status_code == 200)


def test_training_by_request_makes_the_next_answer_new(service: Service) -> None:
    client, before = service.client("user-3"), service.current("user-3")
    item = {"text": "a new film", "label": "romance"}
    num_items = client.post("/v1/me/history", json={"items": [item]}).json()["num_items"]
    assert client.get("/v1/me").json()["num_items"] == num_items
    assert client.post("/v1/me/refresh").json()["state"] in ("queued", "training")
    until(lambda: client.get("/v1/me/refresh").json()["state"] not in ("queued", "training"))
    status = client.get("/v1/me/refresh").json()
    assert status["state"] == "done", status
    assert status["version"] == service.current("user-3") != before
    assert service.ask("user-3").json()["adapter_version"] == status["version"]
    assert client.post("/v1/me/rollback").json()["adapter_version"] == before
    assert service.ask("user-3").json()["adapter_version"] == before
    assert client.get("/v1/me/export").content[:2] == b"PK"


def test_new_versions_under_load_cost_no_request(service: Service) -> None:
    with Load(service) as load:
        load.until_answered(5)
        for _ in range(3):
            version = service.vault.load("user-0", base_fingerprint=None)
            new = service.vault.commit("user-0", version[0], version[1].__class__(**{**vars(version[1]), "run_id": ""}))
            load.until_answered(1, lambda answer, new=new: answer.json()["adapter_version"] == new)  # type: ignore[misc]
    assert not load.failed
    versions = [answer.json()["adapter_version"] for user, answer in load.answers if user == "user-0"]  # type: ignore[union-attr]
    assert versions == sorted(versions), "an older version answered after a newer one"


def test_connections_that_send_slowly_or_nothing_or_do_not_read_stop_nobody_else(service: Service) -> None:
    """1,100 bodies without a token are more than the ingress takes at a time, with its queue."""
    token = service.client("user-0").headers["authorization"]
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    signed = f"{head}Authorization: {token}\r\n"
    body = '{"prompt": "hi", "stream": true, "max_tokens": 90}'
    kinds = [
        (200, ""),
        (200, f"{head}X-a: "),
        (1100, f"{head}Content-Length: 1000\r\n\r\n{{"),
        (60, f"{signed}Content-Length: 1000\r\n\r\n{{"),
        (60, f"{signed}Content-Length: {len(body)}\r\n\r\n{body}"),
    ]
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, 4096), most))
    host, port = service.url.removeprefix("http://").split(":")
    with ExitStack() as opened:
        connections = []
        for count, sent in kinds:
            for _ in range(count):
                connections.append(opened.enter_context(socket.create_connection((host, int(port)))))
                connections[-1].sendall(sent.encode())
        answers = [service.ask("user-1") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5
    until(lambda: service.ask("user-0").status_code == 200)  # whose own places are free again


def test_a_new_deployment_under_load_costs_no_request(service: Service) -> None:
    before = replica_pids(service)
    with Load(service) as load:
        load.until_answered(5)
        service.deploy("serve.max_new_tokens=100")
        until(lambda: not before & replica_pids(service))
        load.until_answered(5)
    assert not load.failed, load.failed[0]
    assert len(replica_pids(service)) == 2


def test_a_killed_replica_fails_only_what_it_was_answering(
    service: Service, record_property: Callable[[str, object], None]
) -> None:
    victim = min(replica_pids(service))
    with Load(service) as load:
        load.until_answered(10)
        os.kill(victim, signal.SIGKILL)
        since = time.monotonic()
        until(lambda: len(service_replicas(service)) == 2)
        record_property("recovery_s", time.monotonic() - since)
        load.until_answered(10)
    assert len(load.failed) <= 4, [getattr(one, "text", one) for one in load.failed]
    for failed in load.failed:
        assert isinstance(failed, httpx2.Response) and failed.status_code == 503, failed
        assert failed.json()["error"]["code"] == "replica_lost" and failed.headers["retry-after"]


def test_who_is_forgotten_is_out_and_the_metrics_know_nobody(service: Service) -> None:
    client = service.client("user-2")
    receipt = client.request("DELETE", "/v1/me").json()
    assert receipt["signature"] and client.get("/v1/me").status_code == 401
    assert service.ask("user-1").status_code == 200
    reader = {"Authorization": f"Bearer {token_of(service.vault, None, 'reader')}"}

    def page() -> str:
        return httpx2.get(f"{service.url}/metrics", headers=reader, timeout=30).text

    until(lambda: "ray_oppu_requests_total" in page() and "ray_oppu_first_token_seconds" in page())
    text = page()
    counts = Counter(line.split("{")[0] for line in text.splitlines() if not line.startswith("#"))
    assert counts["ray_oppu_cold_loads_total"] >= 1
    for user in (*USERS, "canary0"):
        assert user not in text and service.vault.user_hash(user)[:12] not in text


def test_no_text_and_no_token_is_in_a_log(service: Service) -> None:
    secrets = [client.headers["authorization"].removeprefix("Bearer ") for client in service.clients.values()]
    needles = [text.encode() for text in (*secrets, "canary", "film 1", "a new film")]
    logs = [path for path in service.folder.rglob("logs/**/*") if path.is_file()]
    assert len(logs) > 10
    for path in logs:
        content = path.read_bytes()
        assert not any(needle in content for needle in needles), path
