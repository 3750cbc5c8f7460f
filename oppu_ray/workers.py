"""The worker: a plain class that owns a shard of users, and the two ways to run it: inline, or as Ray actors (D6).

In: units of work, each a tuple of user ids. Out: what the units yield, as users finish. A worker reads its own users'
histories from the prepared file, trains or answers, and commits adapters to the vault; only counts, losses and
predictions leave it. This is the only file of the package that imports Ray.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oppu_ray import evaluation
from oppu_ray.base_model import Base, load_base
from oppu_ray.config import Config, from_dict, to_dict
from oppu_ray.core import AdapterState, Example, Prediction, UserDone, UserHistory, UserWork
from oppu_ray.kernels import fuse, keep_freed_memory
from oppu_ray.layers import fuse_layers
from oppu_ray.packing import encode, plan_user
from oppu_ray.pairs import make_pairs
from oppu_ray.prepared import read_index, read_users
from oppu_ray.tasks import get_task
from oppu_ray.training import train_pack
from oppu_ray.vault import Manifest, Vault

Unit = tuple[str, ...]


def user_seed(seed: int, user_id: str) -> int:
    """A user's own seed: from the run's seed and the id, never from the position among other users."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{user_id}".encode()).digest()[:6], "big")


def open_base(config: Config, path: Path | None = None) -> Base:
    """Load the base and make it fast; `path` is a merged task base, None the config's own base."""
    keep_freed_memory()
    base = load_base(config.base, path)
    fuse(base.model)
    fuse_layers(base.model)
    gc.collect()
    gc.freeze()  # a loaded model is many objects that Python would look through again and again: 4 % of a step
    return base


class Worker:
    """Trains and answers for the users it is given. `run_id` names the run in the vault; a unit may be run twice."""

    def __init__(self, config: Config, task_base: Path, run_id: str):
        if config.workers.threads:
            torch.set_num_threads(config.workers.threads)
        self.config, self.run_id = config, run_id
        self.run_dir = Path(config.run_dir)
        self.index = read_index(self.run_dir / "prepare")
        self.task = get_task(config.task)
        self.vault = Vault(self.run_dir / "vault")
        self.task_base_path = task_base
        self._bases: dict[Path | None, Base] = {}

    def _base(self, path: Path | None) -> Base:
        if path not in self._bases:
            self._bases[path] = open_base(self.config, path)
        return self._bases[path]

    def train(self, unit: Unit, progress: Any = None) -> Iterator[UserDone]:
        """Train and commit a pack.

        A pack that this run has committed whole is not trained again. One that was cut short is trained as a whole, so
        that its products have the same shapes and the same bits; committing a user twice changes nothing.
        """
        base = self._base(self.task_base_path)
        works, item_ids = [], {}
        for user in read_users(self.run_dir / "prepare", self.index, unit):
            item_ids[user.user_id] = tuple(item.item_id for item in user.items)
            try:
                works.append(self._work(user, base))
            except ValueError as error:
                yield UserDone(user.user_id, None, f"user {user.user_id!r}: {error}", 0.0, 0.0, 0, 0)
        if self.vault.done(self.run_id, unit) == {work.user_id for work in works}:
            yield from (UserDone(work.user_id, None, None, 0.0, 0.0, 0, 0) for work in works)
            return
        config = self.config.personal
        for result in train_pack(base.model, works, config, progress):
            version = None
            if result.adapter is not None:
                manifest = Manifest(
                    base_fingerprint=base.fingerprint,
                    task_fingerprint="",
                    item_ids=item_ids[result.user_id],
                    recipe=to_dict(config),
                    seed=user_seed(self.config.seed, result.user_id),
                    metrics={"first_loss": result.losses[0], "last_loss": result.losses[-1]},
                    run_id=self.run_id,
                )
                named = {**result.adapter.peft_config, "base_model_name_or_path": str(base.path)}
                adapter = replace(result.adapter, peft_config=named)
                version = self.vault.commit(result.user_id, adapter, manifest)
            first, last = (result.losses[0], result.losses[-1]) if result.losses else (0.0, 0.0)
            yield UserDone(
                result.user_id, version, result.error, first, last, len(result.losses), result.num_useful_tokens
            )

    def _work(self, user: UserHistory, base: Base) -> UserWork:
        examples = encode_user(self.config, user, base)
        return plan_user(user.user_id, user_seed(self.config.seed, user.user_id), examples, self.config.personal)

    def answer(self, unit: Unit, arm: str, partners: Unit = (), progress: Any = None) -> Iterator[Prediction]:
        """Answer the users' queries by one arm; `partners` are the users whose adapters "swapped" uses."""
        base = self._base(None if arm == "base" else self.task_base_path)
        users = read_users(self.run_dir / "prepare", self.index, unit)
        adapters = None
        if arm in ("oppu", "swapped"):
            owners = partners if arm == "swapped" else unit
            adapters = [self._adapter(owner, base) for owner in owners]
        yield from evaluation.answer_users(base, self.task, self.config, arm, users, adapters, progress)

    def _adapter(self, user_id: str, base: Base) -> AdapterState:
        """The adapter that this run committed for the user, whatever has become current since."""
        version = self.vault.registry.unit_version(self.run_id, self.vault.user_hash(user_id))
        if version is None:
            raise ValueError(f"user {user_id!r}: run {self.run_id} has committed no adapter; run `train` first")
        return self.vault.load(user_id, version, base_fingerprint=base.fingerprint)[0]


def encode_user(config: Config, user: UserHistory, base: Base) -> list[Example]:
    """A user's items as tokenised training examples."""
    pairs = make_pairs(get_task(config.task), user.items, config.task)
    return [encode(pair, base.tokenizer, config.personal.max_length) for pair in pairs]


def run_units(
    config: Config, task_base: Path, run_id: str, method: str, units: Sequence[tuple[Any, ...]], progress: Any = None
) -> Iterator[Any]:
    """Run `Worker.<method>(*unit)` for every unit and yield what they yield, as it comes.

    With `workers.num_workers` 0 in this process, in order; otherwise on that many Ray actors, each taking the next unit
    when it is done with one. The results are the same; their order is not.
    """
    if config.workers.num_workers == 0:
        worker = Worker(config, task_base, run_id)
        for unit in units:
            yield from getattr(worker, method)(*unit, progress=progress)
    else:
        yield from _run_on_ray(config, task_base, run_id, method, units)


def _run_on_ray(
    config: Config, task_base: Path, run_id: str, method: str, units: Sequence[tuple[Any, ...]]
) -> Iterator[Any]:
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    workers = config.workers
    threads = {} if workers.threads else {"OMP_NUM_THREADS": str(max(1, int(workers.cpus_per_worker)))}
    actor_class: Any = ray.remote(_RayWorker).options(
        num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, runtime_env={"env_vars": threads}
    )
    num_actors = min(workers.num_workers, len(units))
    actors = [actor_class.remote(to_dict(config), str(task_base), run_id) for _ in range(num_actors)]
    waiting = list(reversed(units))
    running: dict[Any, Any] = {}
    try:
        for actor in actors:
            running[actor.run.remote(method, waiting.pop())] = actor
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            stream: Any = ready[0]
            try:
                yield ray.get(next(stream))
            except StopIteration:
                actor = running.pop(stream)
                if waiting:
                    running[actor.run.remote(method, waiting.pop())] = actor
    finally:
        for actor in actors:
            ray.kill(actor)


class _RayWorker:
    """`Worker` as an actor: plain data in, a stream of results out."""

    def __init__(self, config: dict[str, Any], task_base: str, run_id: str):
        self.worker = Worker(from_dict(config), Path(task_base), run_id)

    def run(self, method: str, unit: tuple[Any, ...]) -> Iterator[Any]:
        for result in getattr(self.worker, method)(*unit):  # noqa: UP028 (Ray sends values in; a list refuses them)
            yield result
