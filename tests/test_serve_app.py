"""Around the service: training on request, what Ray's failures become, the Serve config, and `oppu serve`."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from line_tools import oppu, tagging_user, write_config, write_users
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema
from serve_tools import CONFIG, token_of
from service import is_loopback, listening
from starlette.testclient import TestClient
from tiny import tiny_base

from oppu_ray.config import Config, load_config
from oppu_ray.configs import find_config
from oppu_ray.core import InputError, UserDone
from oppu_ray.forget import forget_user
from oppu_ray.registry import Refused
from oppu_ray.vault import CorruptError, DiskError, Vault, open_vault
from serve import trainer
from serve.app import RayBackend, ServeArgs, build_app
from serve.messages import Ask, Event, Failed, Started
from serve.trainer import Trainer
from serve.web import create_web

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a trained run of one user."""
    folder = tmp_path_factory.mktemp("app")
    base, users = tiny_base(folder / "base"), write_users(folder / "users.jsonl", [tagging_user(0, 4)])
    config = write_config(folder, base, users, serve={"cpus_per_replica": 0.2, "max_rows": 4, "max_length": 200})
    for stage in ("prepare", "adapt", "train"):
        oppu(stage, config)
    return config


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Lessons:
    """Stands in for `refresh_user`: each training waits until it may go on, and is kept."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.go_on = threading.Semaphore(0)
        self.fail_with: Exception | None = None

    def __call__(self, config: Config, vault: Vault, user: str, base: Any, progress: Callable[[int, int], None]) -> Any:
        self.users.append(user)
        progress(1, 4)
        assert self.go_on.acquire(timeout=30)
        if self.fail_with:
            raise self.fail_with
        return UserDone(user, f"version of {user}", None, 1.0, 0.5, 4, 10)


def test_users_are_trained_one_after_another_and_each_can_watch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lessons, opened = Lessons(), []
    monkeypatch.setattr(trainer, "refresh_user", lessons)
    monkeypatch.setattr(trainer, "MAX_QUEUED", 2)
    base: Any = object()
    one = Trainer(CONFIG, Vault(tmp_path / "vault"), lambda: opened.append(1) or base)  # type: ignore[func-returns-value]
    assert one.status("ann").state == "idle" and not opened
    one.start("ann")
    until(lambda: one.status("ann").num_steps_done == 1)
    assert (one.status("ann").state, one.status("ann").num_steps) == ("training", 4)
    assert one.start("bob").state == one.start("bob").state == "queued"
    assert one.start("eve").state == "refused" and one.start("ann").state == "training"
    lessons.go_on.release(2)
    until(lambda: one.status("bob").state == "done")
    assert lessons.users == ["ann", "bob"] and len(opened) == 1
    assert one.status("ann").version == "version of ann"
    for error, shown in (
        (InputError("no history"), "no history"),
        (MemoryError("film 1"), "it is logged"),
        (ValueError("/srv/film 1"), "it is logged"),
        (Refused("film 1"), "try again"),
        (DiskError("/srv/film 1"), "the disk"),
        (CorruptError("film 1"), "is damaged"),
    ):
        lessons.fail_with = error
        one.start("ann")
        lessons.go_on.release()
        until(lambda: one.status("ann").state == "failed")
        assert shown in one.status("ann").error and "film" not in one.status("ann").error
    lessons.fail_with = None
    monkeypatch.setattr(trainer, "MAX_KEPT", 1)
    for user in ("u1", "u2", "u3"):
        one.start(user)
        lessons.go_on.release()
        until(lambda user=user: one.status(user).state == "done")  # type: ignore[misc]
    assert one.status("ann").state == "idle", "old outcomes must not pile up"
    one.close()


def test_who_is_forgotten_is_no_longer_trained_and_no_longer_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[str] = []
    begun, never = threading.Event(), threading.Event()

    def train(_config: Config, _vault: Vault, user: str, _base: Any, progress: Callable[[int, int], None]) -> Any:
        trained.append(user)
        for step in range(30_000):
            progress(step, 30_000)
            begun.set()
            never.wait(0.001)  # a step

    monkeypatch.setattr(trainer, "refresh_user", train)
    vault = Vault(tmp_path / "vault")
    ann, bob = vault.user_hash("ann"), vault.user_hash("bob")
    vault.add_users(["ann", "bob"])
    base: Any = object()
    one = Trainer(CONFIG, vault, lambda: base)
    one.start(ann)
    one.start(bob)
    begun.wait()
    assert f"process {one.following.name}" in forget_user(vault, "bob").checked
    assert one.status(bob).state == "idle"
    assert f"process {one.following.name}" in forget_user(vault, "ann").checked
    assert one.status(ann).state == "idle" and trained == [ann]
    one.close()
    vault.close()


class Handle:
    """A deployment's handle whose replicas answer with `events`, then raise."""

    def __init__(self, events: list[Event], error: Exception):
        self.events, self.error, self.ask = events, error, self
        self.sessions: list[str] = []
        self.num_cancelled = 0

    def options(self, stream: bool, session_id: str) -> Handle:
        self.sessions.append(session_id)
        return self

    def remote(self, ask: Ask) -> Handle:
        return self

    def cancel(self) -> None:
        self.num_cancelled += 1
        raise self.error  # as Ray's does for an answer that has failed

    async def __aiter__(self) -> Any:
        for event in self.events:
            yield event
        raise self.error


def test_what_ray_raises_becomes_a_503_and_the_rest_of_the_request_is_cancelled(tmp_path: Path) -> None:
    async def ask(events: list[Event], error: Exception) -> list[Event]:
        handle: Any = Handle(events, error)
        backend = RayBackend(replace(CONFIG, run_dir=str(tmp_path)), handle, handle)
        answer = [event async for event in backend.ask(Ask("1", "hash of ann", "hi"))]
        assert handle.sessions == ["hash of ann"] and handle.num_cancelled == 1
        backend.vault.close()
        return answer

    full = BackPressureError(num_queued_requests=9, max_queued_requests=9)
    (failed,) = asyncio.run(ask([], full))
    assert isinstance(failed, Failed) and (failed.status, failed.code) == (503, "overloaded")
    started, failed = asyncio.run(ask([Started(None, "", (), 1, 0.0)], ActorDiedError()))
    assert isinstance(failed, Failed) and (failed.status, failed.code) == (503, "replica_lost")
    for cause in (TypeError("film 1"), InputError("film 1")):  # the replica lives: nobody should ask it again
        raised = RayTaskError("ask", "Traceback: film 1", cause).as_instanceof_cause()
        (failed,) = asyncio.run(ask([], raised))
        assert isinstance(failed, Failed) and (failed.status, failed.code) == (500, "internal_error")
        assert "film" not in failed.message


class Lost:
    """A deployment without replicas: its handle raises `error` at every call, or when the answer is awaited."""

    def __init__(self, error: Exception, is_late: bool):
        self.error, self.is_late, self.start, self.status = error, is_late, self, self

    def remote(self, user_hash: str) -> Any:
        return self.results_async(0, True)

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "is_late"),
    [(DeploymentUnavailableError("Engine"), False), (TimeoutError(), True), (ActorDiedError(), True)],
    ids=["unavailable", "timeout", "died"],
)
def test_the_receipt_of_a_forgotten_user_goes_out_while_no_replica_runs(
    tmp_path: Path, error: Exception, is_late: bool
) -> None:
    lost: Any = Lost(error, is_late)
    backend = RayBackend(replace(CONFIG, run_dir=str(tmp_path)), lost, lost)
    backend.vault.add_users(["ann"])
    headers = {"Authorization": f"Bearer {token_of(backend.vault, 'ann')}"}
    client = TestClient(create_web(backend, CONFIG, lambda route, status: None), headers=headers)
    if not isinstance(error, TimeoutError):
        lost_trainer = client.post("/v1/me/refresh")
        assert lost_trainer.status_code == 503 and lost_trainer.headers["retry-after"] == "1"
    assert client.delete("/v1/me").json()["signature"]
    backend.vault.close()


def test_the_serve_config_is_one_and_keeps_to_this_machine() -> None:
    values = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(values)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "serve.app:build_app"
    assert find_config(ServeArgs.model_validate(application.args).config).is_file()
    # Serve passes what it reads from the annotation; were it a string, the builder would get a plain dict.
    assert inspect.signature(build_app).parameters["args"].annotation is ServeArgs


def test_a_run_that_is_not_trained_is_refused_by_name(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="nothing to serve yet; train it with `oppu run"):
        build_app(ServeArgs(config=str(config)))


def test_scaling_and_bounds_reach_the_deployments(run: Path) -> None:
    app: Any = build_app(ServeArgs(config=str(run), overrides=["serve.max_replicas=3", "serve.max_queued=7"]))
    engine = app._bound_deployment.init_args[1]._bound_deployment
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert engine.max_queued_requests == 7 and engine.max_ongoing_requests == 8
    values = app._bound_deployment.init_args[0]
    assert Path(values["run_dir"]).is_absolute()


def test_oppu_serve_answers_until_it_is_told_to_stop(run: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.listen()
        oppu_command = "import sys; from oppu_ray.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", oppu_command, "serve", str(run), f"serve.port={port}"]
        taken = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert taken.returncode == 2 and f"serve.port={port}" in taken.stderr
    log = tmp_path / "stderr"
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, cwd=ROOT)
    try:
        assert service.stdout is not None
        url = re.search(r"http://\S+", service.stdout.readline())
        assert url, f"the first line should name the URL; the log: {log.read_text()}"
        vault = open_vault(load_config(run))
        token = vault.registry.create_token("user", vault.user_hash("user-0"))
        body = b'{"input": "film 1"}'
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url[0]}/v1/personalize", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            places = listening(service.pid)
            assert sum(map(len, places.values())) > 10 and any("ServeReplica" in title for title in places)
            assert all(is_loopback(place) for some in places.values() for place in some), places
            assert answer.headers["X-OPPU-Adapter-Version"] == vault.registry.current(vault.user_hash("user-0")).version  # type: ignore[union-attr]
        vault.close()
        os.kill(service.pid, signal.SIGTERM)
        assert service.wait(timeout=120) == 0
    finally:
        service.kill()
