"""What the tests on a running service share: the service on a tiny trained run, clients, load, its processes."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from faults import until
from line_tools import oppu, tagging_user, write_config, write_users
from ray import serve
from serve_tools import token_of
from tiny import tiny_base

from oppu_ray.config import load_config
from oppu_ray.vault import Vault, open_vault
from serve.app import ServeArgs, build_app

USERS = [f"user-{number}" for number in range(4)]
GUESTS = [f"guest-{number}" for number in range(16)]
SERVE = {
    "min_replicas": 2,
    "max_replicas": 2,
    "cpus_per_replica": 0.2,
    "num_slots": 3,
    "max_rows": 8,
    "max_length": 200,
    "max_new_tokens": 120,
}


@dataclass
class Service:
    """A running service, its vault, and a signed-in client per user."""

    url: str
    vault: Vault
    config: Path
    folder: Path
    clients: dict[str, httpx2.Client] = field(default_factory=dict)

    def client(self, user: str) -> httpx2.Client:
        if user not in self.clients:
            headers = {"Authorization": f"Bearer {token_of(self.vault, user)}"}
            self.clients[user] = httpx2.Client(base_url=self.url, headers=headers, timeout=60)
        return self.clients[user]

    def ask(self, user: str, text: str = "film 1", **more: Any) -> httpx2.Response:
        return self.client(user).post("/v1/personalize", json={"input": text, **more})

    def deploy(self, *overrides: str) -> None:
        serve.run(build_app(ServeArgs(config=str(self.config), overrides=list(overrides))), name="oppu")

    def current(self, user: str) -> str:
        version = self.vault.registry.current(self.vault.user_hash(user))
        assert version is not None
        return version.version


@contextmanager
def running(ray_folder: Path, folder: Path, **options: Any) -> Iterator[Service]:
    """The application on the Ray that this process is connected to, over a run in `folder`."""
    users = [tagging_user(number, 4, canary=f"canary{number}") for number in range(4)]
    config = write_config(
        folder, tiny_base(folder / "base"), write_users(folder / "users.jsonl", users), serve={**SERVE, **options}
    )
    for stage in ("prepare", "adapt", "train"):
        oppu(stage, config)
    vault = open_vault(load_config(config))
    vault.add_users(GUESTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    one = Service(f"http://127.0.0.1:{port}", vault, config, ray_folder)
    one.deploy()
    yield one
    serve.shutdown()
    vault.close()


class Load:
    """Clients that ask, one question after another, until the block ends; collects (user, response or error)."""

    def __init__(self, service: Service, num_clients: int = 4):
        self.answers: list[tuple[str, httpx2.Response | Exception]] = []
        self._service, self._stopped = service, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(USERS[n % 4],)) for n in range(num_clients)]

    def _run(self, user: str) -> None:
        while not self._stopped.wait(0.02):  # Ray needs some of these two cores too
            try:
                self.answers.append((user, self._service.ask(user)))
            except httpx2.HTTPError as error:
                self.answers.append((user, error))

    def __enter__(self) -> Load:
        for user in USERS:
            self._service.client(user)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def until_answered(self, count: int, accept: Callable[[httpx2.Response], bool] = lambda answer: True) -> None:
        """Wait for so many more good answers that `accept` takes."""
        before = len(self.answers)
        until(lambda: count <= sum(is_good(answer) and accept(answer) for _, answer in self.answers[before:]))  # type: ignore[arg-type]

    @property
    def failed(self) -> list[httpx2.Response | Exception]:
        return [answer for _, answer in self.answers if not is_good(answer)]


def is_good(answer: httpx2.Response | Exception) -> bool:
    return isinstance(answer, httpx2.Response) and answer.status_code == 200


def listening(pid: int) -> dict[str, list[str]]:
    """Addresses on which a process and its descendants listen, by the process's title."""
    found: dict[str, list[str]] = {}
    for process in (one := psutil.Process(pid), *one.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            places = [place.laddr.ip for place in process.net_connections("inet") if place.status == "LISTEN"]
            found.setdefault(" ".join(process.cmdline()[:3]), []).extend(places)
    return {title: places for title, places in found.items() if places}


def is_loopback(place: str) -> bool:
    address = ipaddress.ip_address(place)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def replica_pids(service: Service) -> set[int]:
    """Processes of the engine's replicas that descend from this session's Ray."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:oppu:Engine"):
            parents = [" ".join(parent.cmdline()) for parent in process.parents()]
            if any(str(service.folder) in line for line in parents):
                found.add(process.pid)
    return found


def service_replicas(service: Service) -> set[str]:
    """The replicas that answer the guests."""
    return {service.ask(user).headers.get("x-oppu-replica", "") for user in GUESTS} - {""}
