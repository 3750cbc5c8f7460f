"""How much one user's flood slows another user: `python -m jobs.bench.fairness [--connections 48 --users 20000]`.

In: nothing; everything is made in a temporary folder. Out: a table, and `result.json` in `--out`. One user keeps
`--connections` connections busy on one route; another user asks on another route, one request after another. The web
application is the real one on the real vault, in a process of its own; the engine behind it answers at once, so what
is measured is waiting. Then a replica with a tiny base: eight `rag` requests over a long history beside plain answers.

Design: the victim pauses between requests, so its own share of the service is never used up, and is measured alone
before each flood, so that a busy machine shows in both figures.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from oppu_ray.core import Item, UserHistory
from oppu_ray.files import write_atomic
from oppu_ray.machine import hardware
from oppu_ray.prepared import write_prepared
from oppu_ray.vault import Vault
from tests.serve_tools import CONFIG, FakeBackend, token_of
from tests.vault_tools import make_adapter, make_manifest

PAUSE_S = 0.03
ROUNDS = 3
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
NEW = {"items": [{"text": "a film", "label": "sci-fi"}]}
Call = tuple[str, str, Any]
"""Method, path and JSON of a request; a text body is sent as it is."""

FLOODS: dict[str, Call] = {
    "GET models": ("GET", "/v1/models", None),
    "POST chat": ("POST", "/v1/chat/completions", CHAT),
    "POST chat, stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    "POST chat, 500 kB of [": ("POST", "/v1/chat/completions", "[" * 500_000),
    "POST personalize": ("POST", "/v1/personalize", {"input": "a film"}),
    "GET me": ("GET", "/v1/me", None),
    "GET versions": ("GET", "/v1/me/versions", None),
    "POST rollback": ("POST", "/v1/me/rollback", None),
    "GET history, 1,000 items": ("GET", "/v1/me/history?limit=1000", None),
    "POST history, one item": ("POST", "/v1/me/history", NEW),
    "POST history, 1,000 items": ("POST", "/v1/me/history", {"items": NEW["items"] * 1000}),
    "POST history, 500 kB": ("POST", "/v1/me/history", {"items": [{"text": "film " * 100_000, "label": "sci-fi"}]}),
    "POST forget, unknown item": ("POST", "/v1/me/history/forget", {"item_ids": ["nope"]}),
    "POST forget, own item": ("POST", "/v1/me/history/forget", {"item_ids": ["NUMBER"]}),
    "GET refresh": ("GET", "/v1/me/refresh", None),
    "GET export": ("GET", "/v1/me/export", None),
    "GET admin/users": ("GET", "/v1/admin/users", None),
    "GET admin/audit": ("GET", "/v1/admin/audit", None),
    "GET me, wrong token": ("GET", "/v1/me", None),
    "GET page": ("GET", "/", None),
    "GET docs": ("GET", "/docs", None),
    "GET openapi.json": ("GET", "/openapi.json", None),
    "GET static file": ("GET", "/static/page.css", None),
}
VICTIMS: dict[str, Call] = {
    "chat": FLOODS["POST chat"],
    "models": FLOODS["GET models"],
    "me": FLOODS["GET me"],
    "history": ("GET", "/v1/me/history?limit=10", None),
    "append": FLOODS["POST history, one item"],
    "export": FLOODS["GET export"],
    "forget": FLOODS["POST forget, own item"],
    "page": FLOODS["GET page"],
}


def build(folder: Path, num_users: int) -> dict[str, str]:
    """A vault and a prepared run with `num_users` users; returns tokens by name."""
    vault = Vault(folder / "vault")
    items = [Item(f"i{number}", "2024-01-01", "a film about nothing " * 20, "sci-fi") for number in range(8000)]
    for user in ("ann", "bob"):
        vault.append_history(user, items if user == "ann" else items[:1000])
        for seed in range(8):
            vault.commit(user, make_adapter(seed), make_manifest())
    own = Item("1", "2024-01-01", "some film text about nothing in particular " * 3, "sci-fi")
    users = (
        UserHistory(f"u{number}", "target", tuple(replace(own, item_id=str(item)) for item in range(10)), ())
        for number in range(num_users)
    )
    write_prepared(folder / "run" / "prepare", users)
    tokens = {user: token_of(vault, user) for user in ("ann", "bob")} | {"admin": token_of(vault, None, "operator")}
    vault.close()
    return tokens


def serve(folder: Path, port: int) -> None:
    """The web application until the process is killed."""
    import uvicorn

    from serve.web import create_web

    options = replace(CONFIG.serve, max_items=10_000, requests_per_user=8, deadline_s=60.0)
    config = replace(CONFIG, run_dir=str(folder / "run"), serve=options)
    app = create_web(FakeBackend(Vault(folder / "vault")), config, lambda route, status: None)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def request_of(call: Call, token: str, number: int) -> bytes:
    """A request as it goes over the wire; `number` is different for each."""
    method, path, content = call
    body = b"" if content is None else content.encode() if isinstance(content, str) else json.dumps(content).encode()
    body = body.replace(b"NUMBER", f"i{number}".encode())
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def flood(port: int, call: Call, token: str, num_connections: int) -> Counter[str]:
    """Keep the connections busy until standard input ends; returns how often each status came."""
    counts: Counter[str] = Counter()

    async def one(start: int) -> None:
        number = start
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                while True:
                    number += num_connections
                    writer.write(request_of(call, token, number % 8000))
                    await writer.drain()
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    counts[head.split(" ")[1]] += 1
                    if "transfer-encoding: chunked" in head:
                        await reader.readuntil(b"0\r\n\r\n")
                    elif "content-length: " in head:
                        await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                counts["lost"] += 1

    tasks = [asyncio.create_task(one(start)) for start in range(num_connections)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    return counts


def ask(connection: http.client.HTTPConnection, call: Call, token: str, number: int) -> float:
    """Seconds for one good answer."""
    method, path, content = call
    body = None if content is None else json.dumps(content).replace("NUMBER", f"i{number}")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    began = time.perf_counter()
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {text[:200]!r}")
    return time.perf_counter() - began


def p95_ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.quantiles(seconds, n=20, method="inclusive")[-1], 2)


class Victim:
    """The user who is slowed: asks on every route in turn, over one connection each."""

    def __init__(self, port: int, token: str):
        self._port, self._token = port, token
        self._numbers = iter(range(1000))  # items to forget

    def times(self, num_requests: int) -> dict[str, list[float]]:
        """Seconds of each answer by route. A tenth as many on the routes that take long."""
        found: dict[str, list[float]] = {}
        for name, call in VICTIMS.items():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            for _ in range(num_requests if name not in ("export", "forget") else max(2, num_requests // 10)):
                number = next(self._numbers) if name == "forget" else 0
                found.setdefault(name, []).append(ask(connection, call, self._token, number))
                time.sleep(PAUSE_S)
            connection.close()
        return found


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """This module in a process of its own, until the block ends."""
    line = [sys.executable, "-m", "jobs.bench.fairness", *arguments]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows by flood: the victim's p95 alone and meanwhile, by route, and what the flood was answered."""
    tokens = build(folder, options.users)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rows = {}
    with command("--serve", str(folder), "--port", str(port)):
        victim = Victim(port, tokens["bob"])
        while True:
            try:
                victim.times(2)  # warms up
                break
            except ConnectionRefusedError:
                time.sleep(0.2)
        for name in options.floods or FLOODS:
            token = tokens["admin" if "admin" in name else "ann"]
            token = token[:-1] + "_" if "wrong" in name else token
            arguments = ("--flood", name, "--port", str(port), "--connections", str(options.connections))
            times: dict[bool, list[dict[str, list[float]]]] = {False: [], True: []}
            with command(*arguments, "--token", token) as flooding:
                time.sleep(3)
                for is_flooded in (True, False) * ROUNDS:  # in turn: what else the machine does is then in both
                    flooding.send_signal(signal.SIGCONT if is_flooded else signal.SIGSTOP)
                    time.sleep(1)
                    times[is_flooded].append(victim.times(options.requests // ROUNDS))
                flooding.send_signal(signal.SIGCONT)
                counts = json.loads(flooding.communicate("")[0])
            alone, during = (
                {route: p95_ms([one for part in times[kind] for one in part[route]]) for route in VICTIMS}
                for kind in (False, True)
            )
            ratios = {route: round(during[route] / alone[route], 2) for route in VICTIMS}
            rows[name] = {"alone_ms": alone, "during_ms": during, "ratios": ratios, "answers": counts}
            shown = "  ".join(f"{route} {alone[route]:.0f}>{during[route]:.0f}" for route in VICTIMS)
            print(f"{name:28}{shown}  {counts}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--connections", type=int, default=48)
    parser.add_argument("--users", type=int, default=2000, help="users of the prepared run, which forgetting reads")
    parser.add_argument("--requests", type=int, default=60, help="of the victim, for each figure")
    parser.add_argument("--floods", nargs="*", choices=FLOODS, help="by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_fairness"))
    for hidden in ("--serve", "--flood", "--token"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve), options.port)
    elif options.flood:
        counts = asyncio.run(flood(options.port, FLOODS[options.flood], options.token, options.connections))
        print(json.dumps(counts))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), options)
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"command": "bench fairness", "hardware": hardware(), "rows": rows}
        write_atomic(options.out / "result.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
