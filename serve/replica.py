"""One replica: a base model, an engine in a thread of its own, and the way from an `Ask` to its events (no Ray here).

In: `Ask`s on the event loop. Out: their events. Per request: read the user's current version (0.1 ms), load and verify
it if it is not resident (in a small pool of threads), retrieve, encode, hand it to the engine between two steps.
A reader might question a thread for the engine: a step is tens of milliseconds of torch, and on the event loop it would
stall health checks, admissions and every other answer's tokens.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from oppu_ray.adapters import FittedAdapter
from oppu_ray.base_model import Base
from oppu_ray.config import Config
from oppu_ray.core import Item, Request, TokenEvent
from oppu_ray.evaluation import stop_ids
from oppu_ray.following import Following
from oppu_ray.inference import Engine
from oppu_ray.kernels import return_freed_memory
from oppu_ray.memory import query_prompt
from oppu_ray.packing import Tokenize, encode_prompt, first_tokens, plain_tokenizer
from oppu_ray.refresh import open_task_base
from oppu_ray.registry import UserHash, Version
from oppu_ray.tasks import get_task
from oppu_ray.vault import CorruptError, Vault
from serve.child import Child, ChildLost
from serve.fair import Busy, FairThreads
from serve.messages import (
    Ask,
    Delta,
    Event,
    Failed,
    Finished,
    Started,
    TokenLogprob,
    Turn,
    check_ask,
    failure_of,
)
from serve.recall import Recall

STALL_S = 120.0
"""A step that takes longer has hung: the slowest sane one, 2,048 prompt tokens on one core, takes seconds."""

TRIM_S = 10.0
"""Memory that prompts of many lengths left in pieces is given back so often: it takes 20 ms."""

NUM_LOADERS, LOADERS_PER_USER = 4, 2
NUM_RETRIEVERS = 4
RETRIEVERS_END_S = 0.5
"""An index of a forgotten user that is not dropped so soon goes with its process."""


PASS_TOKENS = 512
"""Prompts are read in pieces of so many: every answer under way waits for a piece, half a second of one core."""

IDLE_PASS_TOKENS = 2048
"""The same while no answer is under way."""

ENGINE_FAILED = Failed(503, "engine_failed", "the engine failed; try again")

T = TypeVar("T")
Items = tuple[tuple[str, str], ...]
"""(Item id, line of the prompt) pairs."""

Sink = Callable[[TokenEvent], None]
Measure = Callable[[str, float, Mapping[str, str]], None]
logger = logging.getLogger(__name__)


def measure_nothing(name: str, value: float, tags: Mapping[str, str]) -> None:
    """For where nobody looks."""


class EngineDied(RuntimeError):
    """The engine's thread has ended or hangs; Serve replaces the replica."""


class EngineLoop:
    """The thread that owns an engine: runs what is asked of it between steps, then a step, and tells who waits.

    When a step fails, everything under way fails with it and the loop is dead: `error` says why.
    """

    def __init__(self, engine: Engine, measure: Measure = measure_nothing):
        self.engine, self._measure = engine, measure
        self.error: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._step_began: float | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self.call(torch.get_num_threads).result()  # a thread takes torch's number when it first asks, and keeps it

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function in the engine's thread, between two steps; EngineDied in the future if that has died."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.error is not None:
                    raise EngineDied("the engine died")
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        if self.error is not None:
            self._drain()  # the thread no longer does
        return future

    def submit(self, request: Request, adapter: FittedAdapter | None, sink: Sink) -> bool:
        """For `call`: queue a request; False if its adapter is neither given nor resident."""
        if adapter is None and not self.engine.is_loaded(request):
            return False
        self.engine.submit(request, adapter)
        self._sinks[request.request_id] = sink
        return True

    def check(self) -> None:
        """Raises EngineDied if the engine has died or hangs."""
        if self.error is not None:
            raise EngineDied(f"the engine died: {self.error!r}")
        if (began := self._step_began) is not None and time.monotonic() - began > STALL_S:
            raise EngineDied(f"the engine's step takes longer than {STALL_S:g} s")

    def close(self) -> None:
        """Stop the thread and leave the model as it was."""

        def stop() -> None:
            self._is_closed = True

        self.call(stop)
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        num_evictions, trimmed = 0, time.monotonic()
        try:
            while not self._is_closed:
                self._drain(wait=not self.engine.has_work)
                if self.engine.has_work:
                    self._step_began = time.monotonic()
                    events = self.engine.step()
                    self._step_began = None
                    self._measure("oppu_batch_rows", self.engine.num_rows, {})
                    self._measure("oppu_queue_length", self.engine.num_waiting, {})
                    self._measure("oppu_slots_used", len(self.engine.slots), {})
                    self._measure("oppu_evictions_total", self.engine.slots.num_evictions - num_evictions, {})
                    num_evictions = self.engine.slots.num_evictions
                    for event in events:
                        sink = self._sinks[event.request_id]
                        if event.finish_reason is not None:
                            del self._sinks[event.request_id]
                        sink(event)
                    if time.monotonic() - trimmed > TRIM_S:
                        return_freed_memory()
                        trimmed = time.monotonic()
        except BaseException as error:  # torch may raise anything; whoever waits must hear of it
            self.error = error
            logger.error("the engine died: %s", type(error).__name__)
            for request_id, sink in self._sinks.items():
                sink(TokenEvent(request_id, finish_reason="error", error="the engine died"))
            self._drain()

    def _drain(self, wait: bool = False) -> None:
        if wait:
            self._inbox.get()()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()


@dataclass(frozen=True)
class _Chosen:
    """Which adapter answers: its version (None: the shared model) and itself if it was loaded, and why not another."""

    version: Version | None = None
    fallback: str = ""
    adapter: FittedAdapter | None = None

    @property
    def adapter_id(self) -> str | None:
        return f"{self.version.user_hash}/{self.version.version}" if self.version else None


class _Refusal(Exception):
    """An `Ask` that cannot be answered, as the event that says so."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.event = Failed(status, code, message)


class Replica:
    """See the module's docstring.

    Args:
        base: The task base that the adapters stand on.
        engine: Over that base; the replica owns it from now on.
        name: Goes into every answer, to see which replica gave it.
        measure: Called with the name of a metric, a value and further tags.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        vault: Vault,
        engine: Engine,
        name: str = "",
        measure: Measure = measure_nothing,
    ):
        self.config, self.base, self.vault, self.name, self._measure = config, base, vault, name, measure
        self.task = get_task(config.task)
        self._stop_ids = stop_ids(base)
        # Whether text may spell special tokens is a state of a tokenizer, and loaders are threads: so one for each way.
        self._tokenize = plain_tokenizer(copy.deepcopy(base.tokenizer))
        self._start = first_tokens(base.tokenizer)
        self._recall = Child(Recall, config, vault.root, vault.registry.url, num_threads=NUM_RETRIEVERS)
        self._num_recalling: Counter[str] = Counter()
        self._num_forgotten: Counter[str] = Counter()
        self.following = Following(vault.registry, f"engine {name}", self.forget, self.forget_everyone)
        self.loop = EngineLoop(engine, measure)
        one_thread = partial(torch.set_num_threads, 1)  # no team of their own: see `build_engine`
        self._pool = FairThreads("load", NUM_LOADERS, LOADERS_PER_USER, prepare=one_thread)
        self.following.start()

    def close(self) -> None:
        """End the threads; the vault stays open."""
        self._pool.close()
        self.following.close()
        self._recall.end()
        self.loop.close()

    def forget(self, user_hash: str) -> None:
        """Drop what the engine holds of a user: slots, cached prompts, requests under way.

        Raises:
            EngineDied: It is unknown what the engine still holds.
        """
        self._num_forgotten[user_hash] += 1  # stops requests that have read something and not yet handed it over
        if self._num_recalling[user_hash]:  # its history is being read, or its index built
            self._recall.end()
        elif self._recall.is_running:
            try:
                self._recall.submit("", "forget", user_hash).result(RETRIEVERS_END_S)
            except (TimeoutError, Busy):
                self._recall.end()
        self.loop.call(self.loop.engine.forget, user_hash).result()

    def forget_everyone(self) -> None:
        """Drop what is held of any user, while the registry cannot say who was forgotten."""
        self._recall.end()
        self.loop.call(self.loop.engine.forget_everyone).result()

    def _call(self, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        return asyncio.wrap_future(self.loop.call(function, *args))

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The events of an answer: `Started`, `Delta`s (one, unless it streams), then `Finished`; or `Failed`.

        Whatever goes wrong is a `Failed`; nothing is raised but the caller's own cancellation.
        """
        began = time.monotonic()
        try:
            check_ask(ask)
            async with aclosing(self._answer(ask, began)) as events:
                async for event in events:
                    yield event
                return
        except _Refusal as refusal:
            failed = refusal.event
        except TimeoutError:
            failed = Failed(504, "deadline_exceeded", f"no answer within {ask.deadline_s:g} s")
        except EngineDied:
            failed = ENGINE_FAILED
        except Exception as error:
            failed = failure_of(error, f"request {ask.request_id}")
        self._measure("oppu_errors_total", 1, {"kind": failed.code})
        yield failed

    async def _answer(self, ask: Ask, began: float) -> AsyncGenerator[Event, None]:
        deadline = began + ask.deadline_s
        here = asyncio.get_running_loop()
        arrived: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def sink(event: TokenEvent) -> None:
            with suppress(RuntimeError):  # the event loop is closed: the process is about to end
                here.call_soon_threadsafe(arrived.put_nowait, event)

        num_forgotten = self._num_forgotten[ask.user_hash]

        async def hand_over(request: Request, adapter: FittedAdapter | None = None) -> bool:
            if self.following.is_lost or self._num_forgotten[ask.user_hash] != num_forgotten:
                raise self._cancelled()
            return await _within(deadline, self._call(self.loop.submit, request, adapter, sink))

        items = await self._find_items(ask, deadline)
        request, chosen = await _within(deadline, self._load_for(ask, self._prepare, ask, items))
        try:
            if not await hand_over(replace(request, adapter_id=chosen.adapter_id)):
                chosen = await _within(deadline, self._load_for(ask, self._load, ask.user_hash))
                await hand_over(replace(request, adapter_id=chosen.adapter_id), chosen.adapter)
            version = chosen.version.version if chosen.version else None
            load_s = time.monotonic() - began
            yield Started(version, chosen.fallback, items, len(request.prompt_ids), load_s, self.name)
            unsent: list[TokenEvent] = []
            reason, first_token_s = None, 0.0
            while reason is None:
                unsent.append(await _within(deadline, arrived.get()))
                while not arrived.empty():
                    unsent.append(arrived.get_nowait())
                reason = unsent[-1].finish_reason
                if not first_token_s:
                    first_token_s = time.monotonic() - began
                    self._measure("oppu_first_token_seconds", first_token_s, {})
                if reason == "error":
                    if self.loop.error is not None:
                        raise EngineDied
                    # This answer's own fault: its adapter overflows, say. Asked again, it would fail again.
                    raise _Refusal(500, "answer_failed", unsent[-1].error or "the answer failed")
                if reason == "cancelled" or self.following.is_lost:
                    raise self._cancelled()
                if ask.stream or reason is not None:
                    yield self._delta(unsent)
                    unsent = []
            yield Finished(reason, first_token_s, time.monotonic() - began)
        finally:
            self.loop.call(self.loop.engine.cancel, request.request_id)

    def _load_for(self, ask: Ask, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        """Run what blocks, in one of the loaders that the user may have."""
        return asyncio.wrap_future(self._pool.submit(ask.user_hash, function, *args))

    async def _find_items(self, ask: Ask, deadline: float) -> Items:
        """The user's own items in the question's prompt, best first."""
        if not isinstance(ask.question, Item) or not ask.top_k:
            return ()
        user_hash = UserHash(ask.user_hash)
        num_forgotten = self._num_forgotten[user_hash]
        self._num_recalling[user_hash] += 1
        try:
            for _ in range(2):
                found = self._recall.submit(user_hash, "find", user_hash, ask.question, ask.top_k)
                try:
                    return await _within(deadline, asyncio.wrap_future(found))
                except ChildLost:
                    if self._num_forgotten[user_hash] != num_forgotten:
                        raise self._cancelled() from None
                    # The process was ended because another user was forgotten: the next one answers.
            raise ChildLost
        finally:
            self._num_recalling[user_hash] -= 1
            if not self._num_recalling[user_hash]:
                del self._num_recalling[user_hash]

    def _cancelled(self) -> _Refusal:
        if self.following.is_lost:
            return _Refusal(503, "registry_unavailable", "the registry cannot be reached; try again")
        return _Refusal(409, "forgotten", "you, or items of yours, were forgotten meanwhile")

    def _prepare(self, ask: Ask, items: Items = ()) -> tuple[Request, _Chosen]:
        """The question in tokens, with the user's own items in it, and which adapter should answer."""
        config = self.config
        if ask.generation is not None:  # a token that was verified before its user was forgotten
            self.vault.registry.check_generation(ask.user_hash, ask.generation)
        labels: tuple[tuple[int, ...], ...] = ()
        num_new = ask.max_tokens or config.serve.max_new_tokens
        if isinstance(ask.question, Item):
            labels = tuple(tuple(self._tokenize(" " + label)) for label in self.task.labels)
            # A label is never cut short: it would be another one, or none.
            num_new = max(map(len, labels)) + 1 if labels else ask.max_tokens or config.evaluate.max_new_tokens
            prompt = query_prompt(config, self.task, ask.question)
            prompt = replace(prompt, memory=tuple(line for _, line in items))
            room = config.personal.max_length - config.evaluate.max_new_tokens
            room += config.memory.max_tokens if items else 0
            ids = encode_prompt(prompt, self._tokenize, min(room, config.serve.max_length - num_new), self._start)
        elif isinstance(ask.question, str):
            ids = (*self._start, *self._tokenize(ask.question))
        else:
            ids = encode_chat(self.base.tokenizer, self._tokenize, ask.question)
        if ask.max_tokens is None and not labels:
            num_new = max(1, min(num_new, config.serve.max_length - len(ids)))
        if len(ids) + num_new > config.serve.max_length:
            message = f"{len(ids)} prompt tokens and {num_new} to generate: expected at most {config.serve.max_length}"
            raise _Refusal(400, "context_length_exceeded", message)
        request = Request(
            request_id=ask.request_id,
            prompt_ids=ids,
            max_new_tokens=num_new,
            stop_ids=self._stop_ids,
            stop=ask.stop,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
            labels=labels,
            num_logprobs=ask.num_logprobs,
            user_id=ask.user_hash,
        )
        return request, self._choose(ask.user_hash) if ask.use_adapter else _Chosen()

    def _choose(self, user_hash: str) -> _Chosen:
        """The user's current version, or the newest good one that stands on this base, or the shared model."""
        version = self.vault.registry.current(user_hash)
        if version is None:
            return _Chosen(None, "no_adapter")
        if version.base_fingerprint == self.base.fingerprint:
            return _Chosen(version)
        rows = self.vault.registry.versions(user_hash)
        good = [row for row in rows if row.is_good and row.base_fingerprint == self.base.fingerprint]
        return _Chosen(good[-1] if good else None, "other_base")

    def _load(self, user_hash: str) -> _Chosen:
        """Load and verify what `_choose` says. A corrupt version is quarantined, and the next best is taken."""
        fallback = ""
        while (chosen := self._choose(user_hash)).version is not None:
            fallback = fallback or chosen.fallback
            version = chosen.version.version
            try:
                adapter, _ = self.vault.load_version(chosen.version, base_fingerprint=self.base.fingerprint)
            except CorruptError:
                fallback = "corrupt_version"
                continue
            except ValueError as error:
                logger.error("%s", error)
                raise _Refusal(503, "adapter_unavailable", "your adapter cannot be read now; try again") from error
            try:
                fitted = self.loop.engine.fit(adapter)
            except ValueError as error:
                logger.error("user %s: version %s does not fit the engine: %s", user_hash[:12], version, error)
                return _Chosen(None, "does_not_fit")
            self._measure("oppu_cold_loads_total", 1, {})
            return replace(chosen, fallback=fallback, adapter=fitted)
        return _Chosen(None, fallback or chosen.fallback)

    def _delta(self, events: list[TokenEvent]) -> Delta:
        """What some steps of the engine added to the answer."""
        ids = [token for event in events for token in event.token_ids]
        self._measure("oppu_generated_tokens_total", len(ids), {})
        logprobs = tuple(
            TokenLogprob(self._text(token), event.logprobs[place], self._alternatives(event, place))
            for event in events
            for place, token in enumerate(event.token_ids if event.logprobs else ())
        )
        return Delta("".join(event.text for event in events), len(ids), logprobs)

    def _alternatives(self, event: TokenEvent, place: int) -> tuple[tuple[str, float], ...]:
        top = event.top_logprobs[place] if event.top_logprobs else ()
        return tuple((self._text(token), logprob) for token, logprob in top)

    def _text(self, token: int) -> str:
        return str(self.base.tokenizer.decode([token]))


def build_engine(config: Config) -> tuple[Base, Engine]:
    """The run's task base, and the engine over it with its replica's number of threads, made in a thread that ends.

    OpenMP keeps a team for every thread that has run a parallel loop, and threads of a team no longer wait awake for
    their next loop where all teams have more of them than there are cores: a step takes half as long again, for ever.
    So only the engine's thread may have a team.
    """

    def build() -> tuple[Base, Engine]:
        base = open_task_base(config)
        torch.set_num_threads(max(1, int(config.serve.cpus_per_replica)))
        return base, make_engine(config, base)

    with ThreadPoolExecutor(1) as builder:
        return builder.submit(build).result()


def make_engine(config: Config, base: Base) -> Engine:
    """The engine of one replica, for adapters of the shape that the run trains, its kernels ready."""
    engine = Engine(
        base.model,
        config.serve.num_slots,
        [config.personal.peft],
        max_rows=config.serve.max_rows,
        max_tokens_per_pass=IDLE_PASS_TOKENS,
        max_tokens_while_decoding=PASS_TOKENS,
        max_length=config.serve.max_length,
        prefix_bytes=config.serve.prefix_bytes,
        tokenizer=base.tokenizer,
    )
    engine.warm_up()
    return engine


def encode_chat(tokenizer: Any, tokenize: Tokenize, turns: Sequence[Turn]) -> tuple[int, ...]:
    """A chat in the base's own template, every message as plain text: what a user types never becomes a control token.

    Args:
        tokenize: For the messages, from a `plain_tokenizer`.

    Raises:
        _Refusal: The base has no template, or its template refuses these roles.
    """
    if not tokenizer.chat_template:
        raise _Refusal(400, "no_chat_template", "this base model has no chat template; use /v1/completions")
    marks = [secrets.token_hex(16) for _ in turns]  # what no message can hold stands for the messages meanwhile
    messages = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises, it is about the order of roles
        raise _Refusal(400, "bad_request", f"messages: the base's chat template refuses them: {error}") from error
    ids: list[int] = []
    for turn, mark in zip(turns, marks, strict=True):
        before, found, text = text.partition(mark)
        if not found:
            raise _Refusal(400, "bad_request", f"messages: the base's chat template has no place for a {turn.role}'s")
        ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += tokenize(turn.content)
    return (*ids, *tokenizer(text, add_special_tokens=False)["input_ids"])


async def _within(deadline: float, awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, deadline - time.monotonic())
