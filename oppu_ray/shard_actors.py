"""Federated shards as Ray actors: all are asked, and those that do not answer in time are left out.

In: messages to shards. Out: their answers, and why any is missing. An actor hosts one or more shards (`shards.Host`)
and reads their users' histories alone.

Design: nothing is retried here. A round counts without the missing shards; a lost actor is started again when it is
next asked, and a late one is asked again once it has answered what it was asked before. The late are waited for only
where too few others would be left to ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import exceptions

from oppu_ray.config import Config, from_dict, to_dict
from oppu_ray.pool import actor_class, connect
from oppu_ray.shards import Host, quorum

POLL_S = 0.5


class RayHost:
    """`shards.Host` as an actor."""

    def __init__(self, config: dict[str, Any], shards: dict[int, Sequence[str]], folder: str):
        self.host = Host(from_dict(config), shards, Path(folder))

    def ask(self, number: int, method: str, message: bytes, shared: bytes) -> bytes:
        return self.host.ask(number, method, message, shared)


class ActorHosts:
    """`workers.num_workers` actors that host the shards, dealt in turn."""

    def __init__(
        self, config: Config, shards: Mapping[int, Sequence[str]], folder: Path, tick: Callable[[], None] = lambda: None
    ):
        connect()
        num = min(config.workers.num_workers, len(shards))
        self.actor_class = actor_class(RayHost, config.workers)
        self.config, self.folder, self.tick = config, folder, tick
        self.groups = [{number: shards[number] for number in sorted(shards)[place::num]} for place in range(num)]
        self.actors: list[Any] = [None] * num
        self.late: dict[Any, int] = {}

    def ask(self, method: str, messages: Mapping[int, bytes], shared: bytes) -> tuple[dict[int, bytes], dict[int, str]]:
        """Ask all at once and wait `federated.round_timeout_s`; before that as long for the late, if they are needed.

        Raises:
            ValueError: A shard cannot be set up from the config, or its users' items cannot be trained on.
        """
        self._settle_late(messages)
        sent, asked = ray.put(shared), dict[Any, int]()
        replies, missing = dict[int, bytes](), dict[int, str]()
        for number, message in messages.items():
            if number in self.late.values():
                missing[number] = "is still busy with what it was asked before"
            else:
                asked[self._actor(number).ask.remote(number, method, message, sent)] = number
        timeout_s = self.config.federated.round_timeout_s
        deadline = time.monotonic() + timeout_s
        while asked and time.monotonic() < deadline:
            ready, _ = ray.wait(list(asked), num_returns=1, timeout=POLL_S)
            self.tick()
            for reply in ready:
                number = asked.pop(reply)
                try:
                    replies[number] = ray.get(reply)
                except exceptions.RayTaskError as error:  # `Host.ask` answers errors, so its process is not in order
                    missing[number] = f"failed ({type(error.cause).__name__})"
                except exceptions.RayError as error:
                    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
                        raise ValueError(f"shard {number} cannot start: {error}") from error
                    missing[number] = "was lost"
                    self._drop(number % len(self.actors))
        for reply, number in asked.items():
            missing[number] = f"did not answer within {timeout_s:g} s"
            self.late[reply] = number
        return replies, missing

    def close(self) -> None:
        for place in range(len(self.actors)):
            self._drop(place)

    def _actor(self, number: int) -> Any:
        place = number % len(self.actors)
        if self.actors[place] is None:
            self.actors[place] = self.actor_class.remote(to_dict(self.config), self.groups[place], str(self.folder))
        return self.actors[place]

    def _drop(self, place: int) -> None:
        if self.actors[place] is not None:
            ray.kill(self.actors[place])
            self.actors[place] = None

    def _settle_late(self, messages: Mapping[int, bytes]) -> None:
        """Forget who has answered by now, or by the time that enough have to ask the rest."""
        needed = quorum(self.config.federated, len(messages))
        deadline = time.monotonic() + self.config.federated.round_timeout_s
        timeout_s = 0.0
        while self.late:
            done, _ = ray.wait(list(self.late), num_returns=len(self.late), timeout=timeout_s)
            for reply in done:
                del self.late[reply]
            if len(messages.keys() - set(self.late.values())) >= needed or time.monotonic() >= deadline:
                return
            self.tick()
            timeout_s = POLL_S
