"""What the tests of serving share: a backend without an engine, one with a tiny model, and clients that are signed in.

torch and the tiny model are imported where they are used: most tests of HTTP do without.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from oppu_ray.config import BaseConfig, Config, EvalConfig, PeftConfig, ServeConfig, TaskConfig, TrainConfig
from oppu_ray.core import AdapterState, InputError, Request, TokenEvent
from oppu_ray.vault import Vault
from serve.messages import Ask, Delta, Event, Failed, Finished, Refresh, Started, TokenLogprob
from serve.web import create_web

CONFIG = Config(
    task=TaskConfig(name="movie_tagging"),
    serve=ServeConfig(max_new_tokens=64, requests_per_user=2, deadline_s=5.0, max_items=20),
)

_TRAIN = TrainConfig(max_steps=1, items_per_step=2, max_length=160, peft=PeftConfig(rank=2, alpha=4))
REAL_CONFIG = replace(
    CONFIG,
    task=TaskConfig("movie_tagging", labels=("comedy", "sci-fi")),
    personal=_TRAIN,
    evaluate=EvalConfig(max_new_tokens=8),
    serve=replace(CONFIG.serve, num_slots=2, max_rows=4, max_length=240, max_new_tokens=16, deadline_s=30.0),
)
"""For `real_web_of`: an answer or a training takes some hundredths of a second."""


class FakeBackend:
    """Answers every question with the words of `text`, and keeps what it was asked."""

    def __init__(self, vault: Vault):
        self.vault = vault
        self.asked: list[Ask] = []
        self.closed: list[str] = []
        self.text = "a short answer"
        self.refreshes = [Refresh()]
        self.fail_with: Failed | None = None
        self.fail_after: int | None = None
        self.raise_with: Exception | None = None
        self.wait: asyncio.Event | None = None
        self.counted: list[tuple[str, int]] = []

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        self.asked.append(ask)
        try:
            if self.raise_with and self.fail_after is None:
                raise self.raise_with
            if self.fail_with and self.fail_after is None:
                yield self.fail_with
                return
            current = self.vault.registry.current(ask.user_hash) if ask.use_adapter else None
            yield Started(current.version if current else None, "", (("1", "a film"),) * ask.top_k, 7, 0.001, "r1")
            if self.wait:
                await self.wait.wait()
            for number, word in enumerate(self.text.split(" ")):
                if number == self.fail_after and self.raise_with:
                    raise self.raise_with
                if number == self.fail_after and self.fail_with:
                    yield self.fail_with
                    return
                logprobs = (TokenLogprob(word, -0.5, ((word, -0.5),)),) if ask.num_logprobs is not None else ()
                yield Delta(f" {word}", 1, logprobs)
            yield Finished("stop", 0.01, 0.02)
        finally:
            self.closed.append(ask.request_id)

    async def start_refresh(self, user_hash: str) -> Refresh:
        return Refresh("queued")

    async def refresh_status(self, user_hash: str) -> Refresh:
        return self.refreshes.pop(0) if len(self.refreshes) > 1 else self.refreshes[0]

    async def metrics(self) -> str:
        return "ray_oppu_requests_total 1\n"


class RealBackend:
    """A replica and a trainer on a tiny model, in this process.

    Args:
        base: Folder of the tiny base.
    """

    def __init__(self, vault: Vault, config: Config, base: Path):
        from oppu_ray.base_model import load_base
        from serve.replica import Replica, make_engine
        from serve.trainer import Trainer

        def load() -> Any:
            return load_base(BaseConfig(str(base), dtype="float32"))

        self.vault, loaded = vault, load()
        self.replica = Replica(config, loaded, vault, make_engine(config, loaded), "r1")
        self.trainer = Trainer(config, vault, load)

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        async with aclosing(self.replica.ask(ask)) as events:
            async for event in events:
                yield event

    async def start_refresh(self, user_hash: str) -> Refresh:
        return self.trainer.start(user_hash)

    async def refresh_status(self, user_hash: str) -> Refresh:
        return self.trainer.status(user_hash)

    async def metrics(self) -> str:
        return "ray_oppu_requests_total 1\n"

    def close(self) -> None:
        self.trainer.close()
        self.replica.close()


def web_of(folder: Path, config: Config = CONFIG) -> tuple[FakeBackend, Callable[[str | None], TestClient]]:
    """A backend on a new vault with users ann and bob, and a function from a token (or None) to a client."""
    vault = Vault(folder / "vault")
    vault.add_users(["ann", "bob"])
    backend = FakeBackend(vault)
    count = lambda route, status: backend.counted.append((route, status))  # noqa: E731
    return backend, _clients(create_web(backend, config, count))


def real_web_of(folder: Path, base: Path) -> tuple[RealBackend, Callable[[str | None], TestClient]]:
    """As `web_of`, on the real replica and trainer over the tiny base in `base`."""
    config = replace(REAL_CONFIG, run_dir=str(folder), base=BaseConfig(str(base), dtype="float32"))
    vault = Vault(folder / "vault")
    vault.add_users(["ann", "bob"])
    backend = RealBackend(vault, config, base)
    return backend, _clients(create_web(backend, config, lambda route, status: None))


def _clients(app: Any) -> Callable[[str | None], TestClient]:
    def client(token: str | None) -> TestClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return TestClient(app, headers=headers)

    return client


def token_of(vault: Vault, user_id: str | None, role: str = "user", ttl_s: float | None = None) -> str:
    return vault.registry.create_token(role, vault.user_hash(user_id) if user_id else None, ttl_s)


class FakeSlots(list[str]):
    """What metrics ask of the engine's slots."""

    num_evictions = 0


class FakeEngine:
    """An engine without a model: says the name of the adapter and the last words of the prompt, a token a step."""

    def __init__(self, tokenizer: Any, num_slots: int = 2):
        self.tokenizer, self.num_slots = tokenizer, num_slots
        self.resident: list[str] = []
        self.active: dict[str, tuple[Request, list[int]]] = {}
        self.cancelled: list[str] = []
        self.ended: list[TokenEvent] = []
        self.hold = threading.Event()
        self.hold.set()
        self.one_by_one = False
        self.fail_with: Exception | None = None

    def fit(self, adapter: AdapterState) -> Any:
        if adapter.peft_config["r"] > 4:
            raise ValueError("rank 8: expected at most 4")
        return adapter

    def is_loaded(self, request: Request) -> bool:
        return request.adapter_id is None or request.adapter_id in self.resident

    def submit(self, request: Request, adapter: Any = None) -> None:
        if len(request.prompt_ids) > 400:
            raise InputError("too long for this engine")
        if request.adapter_id is not None and adapter is not None:
            self.resident = [*self.resident[1 - self.num_slots :], request.adapter_id]
        said = f"{(request.adapter_id or 'shared').split('/')[-1]}: {self.tokenizer.decode(request.prompt_ids[-8:])}"
        ids = self.tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.active[request.request_id] = (request, ids[: request.max_new_tokens])

    @property
    def num_rows(self) -> int:
        return len(self.active)

    num_waiting = 0

    @property
    def slots(self) -> FakeSlots:
        return FakeSlots(self.resident)

    @property
    def has_work(self) -> bool:
        return bool(self.active or self.ended)

    def step(self) -> list[TokenEvent]:
        self.hold.wait()
        if self.one_by_one:
            self.hold.clear()
        if self.fail_with:
            raise self.fail_with
        events, self.ended = self.ended, []
        for request_id, (request, left) in list(self.active.items()):
            token = left.pop(0)
            if not left:
                del self.active[request_id]
            event = TokenEvent(
                request_id, (token,), self.tokenizer.decode([token]), finish_reason=None if left else "length"
            )
            if request.num_logprobs is not None:
                event = replace(event, logprobs=(-1.0,), top_logprobs=(((token, -1.0),),))
            events.append(event)
        return events

    def cancel(self, request_id: str) -> bool:
        if self.active.pop(request_id, None) is None:
            return False
        self.cancelled.append(request_id)
        self.ended.append(TokenEvent(request_id, finish_reason="cancelled"))
        return True

    def forget(self, user_id: str) -> None:
        for request_id in [key for key, (request, _) in self.active.items() if request.user_id == user_id]:
            self.cancel(request_id)
        self.resident = [adapter_id for adapter_id in self.resident if not adapter_id.startswith(user_id)]

    def forget_everyone(self) -> None:
        for user_id in {request.user_id for request, _ in self.active.values()}:
            self.forget(user_id)
        self.resident = []

    def close(self) -> None:
        pass
