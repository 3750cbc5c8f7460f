"""Workers as Ray actors, and what happens when one is lost: shards, takeover, exactly one result of everything (D6).

In: shards, each a list of units of work. Out: what the units yield, each result once, whatever dies on the way. An
actor owns a shard and reads the histories of that shard alone. When it is lost, a new one takes over its shard; while
there is no room for a new one (its node is gone, say), an actor that is done with its own shard takes on the rest.

The decision a reader would question: Ray restarts and retries nothing here (`max_restarts` and `max_task_retries` are
0). A unit may be run again by anybody, so this loop says by whom and how often: a pack that costs `MAX_DEATHS` workers
is given up, its users fail with the reason, and the rest goes on. Recovery takes what a new process takes to import
torch and map the base, about 8 s on two shared cores.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import exceptions

from oppu_ray.config import Config, WorkersConfig, from_dict, to_dict
from oppu_ray.core import StepsDone, UserDone
from oppu_ray.progress import ClusterLost, Interrupted, Progress
from oppu_ray.submit import listen_on_loopback, private_token
from oppu_ray.telemetry import Telemetry
from oppu_ray.workers import Worker, failed

MAX_DEATHS = 3
POLL_S = 0.5
REPORT_EVERY_S = 2.0
STOP_GRACE_S = 20.0
ADOPT_AFTER_S = 30.0
HEAD_LOST_AFTER_S = 40.0

logger = logging.getLogger(__name__)
Work = tuple[Any, ...]


@dataclass
class _Shard:
    """A shard's units still to do, and the actor that owns it: asked for, ready, or running `unit`.

    `unsaid` are the failures in `unit` that its next run, if it must be run again, may make good.
    """

    number: int
    waiting: list[Work]
    actor: Any = None
    starting: Any = None
    started_at: float = 0.0
    is_doubted: bool = False
    lost_at: float | None = None
    stream: Any = None
    unit: Work | None = None
    unsaid: list[Any] = field(default_factory=list)

    @property
    def event(self) -> Any:
        """What to wait for: the actor to start, or the next result."""
        return self.starting if self.stream is None else self.stream

    @property
    def is_idle(self) -> bool:
        return self.actor is not None and self.event is None


def run_on_ray(
    config: Config,
    task_base: Path,
    run_id: str,
    method: str,
    shards: Sequence[Sequence[Work]],
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Iterator[Any]:
    """Run `Worker.<method>(*unit)` for every unit; see `workers.run_units`.

    Raises:
        Interrupted: `should_stop` said yes; the workers were given time to leave checkpoints.
        ClusterLost: The head is gone (Ray would end this process without a word 60 s after that), or workers die
            before they begin.
        ValueError: What a worker raised.
    """
    connect()
    pool = _Pool(config, task_base, run_id, method, shards, progress)
    try:
        yield from pool.run(should_stop)
    finally:
        pool.close()


class _Pool:
    def __init__(
        self,
        config: Config,
        task_base: Path,
        run_id: str,
        method: str,
        shards: Sequence[Sequence[Work]],
        progress: Progress,
    ):
        self.method, self.progress, self.telemetry = method, progress, Telemetry(run_id)
        self.arguments = to_dict(config), str(task_base), run_id
        self.actor_class = actor_class(RayWorker, config.workers)
        self.shards = [_Shard(number, list(units)) for number, units in enumerate(shards) if units]
        self.num_left = sum(len(unit[0]) for shard in self.shards for unit in shard.waiting)
        if method == "train":
            self.telemetry.set("oppu_users_left", self.num_left)
        self.seen: set[tuple[str, ...]] = set()
        self.deaths: Counter[Work | int] = Counter()
        self.head, self.head_seen = ray.get_runtime_context().gcs_address, time.monotonic()

    def run(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        while True:
            for shard in self.shards:
                self._assign(shard)
            events = {shard.event: shard for shard in self.shards if shard.event is not None}
            if not events:
                return
            ready, _ = ray.wait(list(events), num_returns=1, timeout=POLL_S, fetch_local=False)
            self.progress.tick()
            self._check_head()
            if should_stop():
                self._stop()
                raise Interrupted("stopped; the workers left checkpoints")
            for event in ready:
                yield from self._handle(events[event])

    def _assign(self, shard: _Shard) -> None:
        """Give a shard an actor, or its actor a unit."""
        if shard.actor is None and shard.waiting:
            shard.actor = self.actor_class.remote(*self.arguments, shard.number)
            shard.starting, shard.started_at = shard.actor.ready.remote(), time.monotonic()
        if shard.is_idle and not shard.waiting:
            self._adopt(shard)
        if shard.starting is not None and not shard.waiting:  # another actor has done it all
            if shard.is_doubted:
                self._lost(shard, "it did not answer, and others took over its packs")
            else:
                self._drop(shard)
        if shard.is_idle and shard.waiting:
            shard.unit, shard.unsaid = shard.waiting.pop(0), []
            shard.stream = shard.actor.run.remote(self.method, shard.unit)

    def _adopt(self, shard: _Shard) -> None:
        """Take one unit of a shard whose new actor finds no room."""
        for other in self.shards:
            if other.starting is not None and time.monotonic() - other.started_at > ADOPT_AFTER_S and other.waiting:
                shard.waiting.append(other.waiting.pop(0))
                return

    def _handle(self, shard: _Shard) -> Iterator[Any]:
        """One event of a shard's actor: it is ready, yields a result, is through with a unit, or is lost."""
        try:
            if shard.starting is not None:
                ray.get(shard.starting)
                self.progress.forecast.begin()
                shard.starting, shard.is_doubted, self.deaths[shard.number] = None, False, 0
                if shard.lost_at is not None:
                    self.progress.recovery_s.append(time.monotonic() - shard.lost_at)
                    shard.lost_at = None
                return
            result = ray.get(next(shard.stream))
        except StopIteration:
            shard.stream = shard.unit = None
            for result in shard.unsaid:
                yield from self._say(shard, result)
            self.progress.pack_done()
            self._count(shard, "oppu_packs_done_total")
        except exceptions.RayTaskError as error:
            if not isinstance(error.cause, Interrupted):
                raise error.cause from None
            self._lost(shard, "it was told to end")  # by SIGTERM: no fault of its pack
        except exceptions.ActorUnavailableError as error:
            self._ask_again(shard, error)
        except exceptions.RayError as error:
            if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
                raise ValueError(f"a worker cannot start: {error}") from error
            unit = shard.unit
            self._lost(shard, _one_line(error))
            if unit is not None and isinstance(error, exceptions.OutOfMemoryError) and self._halve(shard):
                return
            self.deaths[unit or shard.number] += 1
            if self.deaths[unit or shard.number] >= MAX_DEATHS:
                yield from self._give_up(shard, unit)
        else:
            if isinstance(result, StepsDone):
                self.progress.stepped(*result)
            elif self.method == "train" and result.is_retryable:
                shard.unsaid.append(result)
            else:
                yield from self._say(shard, result)

    def _say(self, shard: _Shard, result: Any) -> Iterator[Any]:
        """Yield a result, unless it was said before."""
        if result.key not in self.seen:
            self.seen.add(result.key)
            if self.method == "train":
                self.num_left -= 1
                self.telemetry.settle(result, self.num_left, shard.number)
            yield result

    def _ask_again(self, shard: _Shard, error: Exception) -> None:
        """A request or its reply was lost, and the actor may be well: it answers when it has done what it did get."""
        logger.warning("worker %d is asked again: %s", shard.number, _one_line(error))
        if shard.unit is not None:
            shard.waiting.insert(0, shard.unit)
        shard.stream = shard.unit = None
        shard.is_doubted = True
        shard.starting, shard.started_at = shard.actor.ready.remote(), time.monotonic()

    def _lost(self, shard: _Shard, reason: str) -> None:
        """Put a shard back as it was before its unit began; its next actor begins anew."""
        logger.warning("worker %d is lost: %s", shard.number, reason)
        self.progress.recovered(f"worker {shard.number} is lost: {reason}")
        self._count(shard, "oppu_recoveries_total")
        shard.lost_at = time.monotonic()
        if shard.unit is not None:
            shard.waiting.insert(0, shard.unit)
        self._drop(shard)

    def _drop(self, shard: _Shard) -> None:
        if shard.actor is not None:
            ray.kill(shard.actor)
        shard.actor = shard.starting = shard.stream = shard.unit = None
        shard.is_doubted = False

    def _halve(self, shard: _Shard) -> bool:
        """The pack that was running becomes two, if it can."""
        user_ids, *rest = shard.waiting[0]
        if self.method != "train" or len(user_ids) == 1:
            return False
        num_splits, middle = (rest[0] if rest else 0) + 1, len(user_ids) // 2
        shard.waiting[:1] = [(user_ids[:middle], num_splits), (user_ids[middle:], num_splits)]
        return True

    def _give_up(self, shard: _Shard, unit: Work | None) -> Iterator[UserDone]:
        if unit is None or self.method != "train":
            what = "while it answered" if unit else "before it began"
            raise ClusterLost(f"worker {shard.number} was lost {MAX_DEATHS} times {what} (see the warnings above)")
        shard.waiting.remove(unit)
        reason = f"their pack cost {MAX_DEATHS} workers and was given up"
        for user_id in unit[0]:
            yield from self._say(shard, failed(user_id, reason, is_retryable=True))

    def _count(self, shard: _Shard, name: str, value: float = 1) -> None:
        if self.method == "train":
            self.telemetry.add(name, value, shard.number)

    def _check_head(self) -> None:
        now = time.monotonic()
        if now - self.head_seen < HEAD_LOST_AFTER_S / 10:
            return
        host, _, port = self.head.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=POLL_S).close()
            self.head_seen = now
        except OSError:
            if now - self.head_seen > HEAD_LOST_AFTER_S:
                raise ClusterLost(f"the cluster's head at {self.head} does not answer") from None

    def _stop(self) -> None:
        """Ask the workers to leave checkpoints, and wait for them, but not for long."""
        busy = [shard for shard in self.shards if shard.stream is not None]
        print(f"stopping: {len(busy)} workers leave checkpoints", file=sys.stderr)
        for shard in busy:
            ray.cancel(shard.stream)
        ended = [shard.actor.ready.remote() for shard in busy]  # runs when the unit before it has ended
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=STOP_GRACE_S)

    def close(self) -> None:
        for shard in self.shards:
            self._drop(shard)


def actor_class(plain: type, workers: WorkersConfig) -> Any:
    """A plain class as one of actors, each with a worker's cores, GPUs and threads."""
    environment = {"env_vars": thread_environment(workers)}
    return ray.remote(plain).options(
        num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, runtime_env=environment
    )


def thread_environment(workers: WorkersConfig) -> dict[str, str]:
    """As many threads as a worker has cores, unless `workers.threads` says how many."""
    return {} if workers.threads else {"OMP_NUM_THREADS": str(max(1, int(workers.cpus_per_worker)))}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class RayWorker:
    """`Worker` as an actor: plain data in, a stream of results out.

    On SIGTERM (a node that is taken away) it finishes the commit or step it is in, leaves a checkpoint and ends; after
    `STOP_GRACE_S` it ends in any case, which a commit survives.
    """

    def __init__(self, config: dict[str, Any], task_base: str, run_id: str, number: int):
        self.is_terminated = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
        telemetry = Telemetry(run_id, number)
        self.worker = Worker(from_dict(config), Path(task_base), run_id, telemetry, self._should_stop, REPORT_EVERY_S)

    def ready(self) -> None:
        """Answered when the actor is up and has nothing else to do."""

    def run(self, method: str, unit: Work) -> Iterator[Any]:
        if self.is_terminated:
            raise Interrupted("this worker was told to end")
        for result in getattr(self.worker, method)(*unit):  # noqa: UP028 (Ray sends values in; a list refuses them)
            yield result

    def _should_stop(self) -> bool:
        return self.is_terminated or (ray.is_initialized() and ray.get_runtime_context().is_canceled())

    def _terminate(self, *_: Any) -> None:
        self.is_terminated = True
        threading.Timer(STOP_GRACE_S, os._exit, (128 + signal.SIGTERM,)).start()


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of this machine, or start one of this process's own."""
    if ray.is_initialized():
        return
    if not os.environ.get("RAY_ADDRESS"):
        private_token()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = signal.getsignal(signal.SIGTERM)
    listen_on_loopback()
    ray.init(include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would end this process in the middle of anything
