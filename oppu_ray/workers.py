"""The worker: a plain class that trains, answers and commits for the users it is given (design decision D6).

In: units of work, each a tuple of user ids. Out: what the units yield, as users finish. A worker reads its own users'
histories from the prepared file, trains or answers, and commits adapters to the vault; only counts, losses and
predictions leave it. `pool.py` runs workers as Ray actors.

The decision a reader would question: a unit may be run any number of times, by any number of workers at once. What is
committed is not trained again, a lease says whose commit counts, and a pack cut short is trained again as a whole (or
from its checkpoint), so that its products have the same shapes and its adapters the same bits.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from oppu_ray import evaluation
from oppu_ray.agreement import same_answers
from oppu_ray.base_model import Base, load_base, prepare_base
from oppu_ray.checkpoints import Checkpoint
from oppu_ray.config import Config, StudyConfig, to_dict
from oppu_ray.core import AdapterState, Example, Prediction, StepsDone, TrainResult, UserDone, UserHistory, UserWork
from oppu_ray.hub import split_revision
from oppu_ray.kernels import fuse, keep_freed_memory
from oppu_ray.layers import fuse_layers
from oppu_ray.memory import Memories, Memory, choose_items, older_half
from oppu_ray.packing import encode, plan_user, virtual_tokens
from oppu_ray.pairs import make_pairs
from oppu_ray.prepared import Index, read_index, read_users
from oppu_ray.privacy import account, noise_key, private_backward
from oppu_ray.progress import Interrupted, Progress
from oppu_ray.randomness import user_seed
from oppu_ray.registry import Lease, Refused, RegistryError
from oppu_ray.secure import derive
from oppu_ray.tasks import get_task
from oppu_ray.telemetry import Telemetry
from oppu_ray.training import ALONE, PackState, Ranks, attached, train_steps
from oppu_ray.vault import Manifest, open_vault

TASK_ADAPTER = "task adapter"
LEASE_TTL_S = 120.0
LEASE_POLL_S = 0.5

logger = logging.getLogger(__name__)
Unit = tuple[str, ...]
PROFILE_TOKENS = 160  # for a model to write; `profiles` keeps 120 words


def open_base(config: Config, path: Path | None = None, compute: str = "") -> Base:
    """Load the base and make it fast; `path` and `compute` are `load_base`'s.

    Sets `workers.threads` for this process: the number of threads is in the bits of every product.
    """
    if config.workers.threads:
        torch.set_num_threads(config.workers.threads)
    keep_freed_memory()
    base = load_base(config.base, path, compute)
    # A base to be shared out is too large to be tried whole.
    with nullcontext() if config.base.sharding == "zero3" else same_answers(base.model, _longest_row(config)):
        fuse(base.model)
        fuse_layers(base.model)
    gc.collect()
    gc.freeze()  # a loaded model is many objects that Python would look through again and again: 4 % of a step
    return base


def _longest_row(config: Config) -> int:
    """Most tokens of a row in training or serving."""
    trained = max(train.max_length + virtual_tokens(train.peft) for train in (config.adapt, config.personal))
    return max(trained + config.memory.max_tokens, config.serve.max_length)


def profile_writer(config: Config) -> Callable[[Sequence[str]], list[str]]:
    """Prompts to texts, by the model that `memory.profile` names; it is loaded when first asked."""
    name, revision = split_revision(config.memory.profile)
    base = config.base if name == "base" else replace(config.base, name=name, revision=revision)
    load = cache(lambda: open_base(replace(config, base=base)))
    return lambda prompts: evaluation.complete(load(), prompts, PROFILE_TOKENS, config.evaluate.batch_rows)


class Worker:
    """Trains and answers for the users it is given.

    Args:
        run_id: Names the run in the vault.
        telemetry: Where to count; by default nowhere.
        should_stop: Asked between steps and units. When it says yes, training leaves a checkpoint and raises
            `Interrupted`.
        report_every_s: How often `train` yields the steps taken since; None for never.
        opened: The task base, where it is open already.
        ranks: Who computes its passes.
    """

    def __init__(
        self,
        config: Config,
        task_base: Path,
        run_id: str,
        telemetry: Telemetry | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        report_every_s: float | None = None,
        opened: Base | None = None,
        ranks: Ranks = ALONE,
    ):
        self.config, self.run_id = config, run_id
        self.run_dir = Path(config.run_dir)
        self.index = read_index(self.run_dir / "prepare")
        self.task = get_task(config.task)
        self.vault = open_vault(config)
        self.task_base_path, self.ranks = task_base, ranks
        self.telemetry, self.should_stop = telemetry or Telemetry(run_id), should_stop
        self.report_every_s = report_every_s
        self._bases: dict[Path | None, Base] = {task_base: opened} if opened else {}
        is_private = config.privacy.noise_multiplier > 0
        self._noise = derive(noise_key(self.run_dir / "noise.key"), b"run", run_id.encode()) if is_private else None

    def _base(self, path: Path | None) -> Base:
        if path not in self._bases:
            self._bases[path] = open_base(self.config, path)
            self.telemetry.add("oppu_base_loads_total")
        return self._bases[path]

    @cached_property
    def memories(self) -> Memories:
        """The memories of the users; not made with the worker, for it may have to load an embedder."""
        return Memories(self.config, self.vault, profile_writer(self.config))

    def train(self, unit: Unit, num_splits: int = 0) -> Iterator[UserDone | StepsDone]:
        """Train and commit a pack.

        A pack that does not get through (out of memory, say) is halved, and its halves, until a user fails alone.

        Raises:
            Interrupted: It was asked to stop; what is done is kept.
        """
        committed = self.vault.done(self.run_id, unit)
        if committed == set(unit):
            yield from map(_done_before, unit)
            return
        leases: dict[str, Lease] = {}
        reason = None
        try:
            yield from self._lease(unit, leases)  # before reading: who forgets a user ends their lease
            base = self._base(self.task_base_path)
            works, item_ids, costs = [], dict[str, tuple[str, ...]](), dict[str, dict[str, float]]()
            kept: list[UserHistory] = []
            for user in read_users(self.run_dir / "prepare", self.index, tuple(leases)):
                learnt = choose_items(self.config, user)
                item_ids[user.user_id] = tuple(item.item_id for item in learnt.items)
                try:
                    self._keep_history(user, leases[user.user_id])
                    kept.append(learnt)
                except ValueError as error:
                    yield self._failure(user.user_id, error)
            self.memories.write_profiles(kept)
            for user in kept:
                try:
                    if self._noise and user.user_id not in committed:
                        costs[user.user_id] = self._account(user)
                    works.append(self._work(user, base))
                except ValueError as error:
                    yield self._failure(user.user_id, error)
            for user_id in leases.keys() - item_ids.keys():
                yield failed(user_id, "was forgotten since the run began")
            left = [work.user_id for work in works]
            if committed.issuperset(left):
                yield from map(_done_before, left)
                return
            pack = self._train_pack(base, works, leases, item_ids, costs)
            while True:
                try:
                    done = next(pack)
                except StopIteration as end:
                    reason = end.value
                    break
                if isinstance(done, StepsDone):
                    yield done
                    continue
                left.remove(done.user_id)
                yield replace(done, num_splits=num_splits)
        finally:
            self.telemetry.set("oppu_bank_slots_used", 0)
            self.telemetry.set("oppu_useful_tokens_per_s", 0)
            for lease in leases.values():
                self.vault.registry.release_lease(lease)
        if reason is None:
            return
        if len(left) == 1:
            yield failed(left[0], reason, is_retryable=True)
            return
        logger.warning("a pack of %d users is halved: %s", len(left), reason)
        for half in (left[: len(left) // 2], left[len(left) // 2 :]):
            yield from self.train(tuple(half), num_splits + 1)

    def _lease(self, unit: Unit, leases: dict[str, Lease]) -> Iterator[UserDone]:
        """Fill `leases`; yields the users that another run keeps for longer than a lease lives."""
        deadline = time.monotonic() + LEASE_TTL_S
        for user_id in unit:
            while user_id not in leases:
                try:
                    leases[user_id] = self.vault.lease(user_id, self.run_id, LEASE_TTL_S)
                except Refused as refusal:
                    if time.monotonic() >= deadline or self.should_stop():
                        yield failed(user_id, str(refusal), is_retryable=True)
                        break
                    time.sleep(LEASE_POLL_S)

    def _keep_history(self, user: UserHistory, lease: Lease) -> None:
        """The vault has a user's history before it has an adapter made from it."""
        try:
            self.vault.append_history(user.user_id, user.items, skip_known=True, lease=lease)
        except Refused:  # as in `_commit`: another worker of this run may have taken the user over, and does it
            user_hash, registry = self.vault.user_hash(user.user_id), self.vault.registry
            if registry.leaseholder(user_hash) != self.run_id or not registry.has_user(user_hash):
                raise

    def _train_pack(
        self,
        base: Base,
        works: Sequence[UserWork],
        leases: dict[str, Lease],
        item_ids: dict[str, tuple[str, ...]],
        costs: dict[str, dict[str, float]],
    ) -> Generator[UserDone | StepsDone, None, str | None]:
        """Train from the last checkpoint, if there is one. Returns why the pack did not get through, or None."""
        user_ids = [work.user_id for work in works]
        checkpoint = Checkpoint(self.run_dir, self.vault, self.run_id, user_ids, base.fingerprint)
        state, finished = checkpoint.load() or (None, [])
        yield from finished
        stepped = reported = saved = renewed = time.monotonic()
        num_tokens, stepped_ids = 0, list[str]()  # not reported yet
        self.telemetry.set("oppu_bank_slots_used", len(works))

        def between_steps(take: Callable[[], PackState]) -> None:
            nonlocal saved, renewed
            must_stop = self.should_stop()
            if must_stop or time.monotonic() - saved >= self.config.workers.checkpoint_every_s:
                checkpoint.save(take(), finished)
                saved = time.monotonic()
            if time.monotonic() - renewed >= LEASE_TTL_S / 4:
                self.vault.registry.renew_leases(leases.values(), LEASE_TTL_S)
                renewed = time.monotonic()
            if must_stop:
                raise Interrupted("stopped between two steps; the pack goes on from its checkpoint")

        reason, config = None, self.config.personal
        backward = private_backward(self.config.privacy, works, self._noise) if self._noise else None
        try:
            with attached(base.model, works, config) as bank:
                for event in train_steps(bank, works, config, state, between_steps, self.ranks, backward):
                    if isinstance(event, TrainResult):
                        done = self._finish(event, base, item_ids[event.user_id], leases, costs.get(event.user_id))
                        finished.append(done)
                        yield done
                        continue
                    now = time.monotonic()
                    self.telemetry.add("oppu_computed_tokens_total", event.num_tokens)
                    self.telemetry.set("oppu_useful_tokens_per_s", event.num_tokens / max(now - stepped, 1e-9))
                    stepped = now
                    num_tokens += event.num_tokens
                    stepped_ids += event.user_ids
                    if self.report_every_s is not None and now - reported >= self.report_every_s:
                        yield StepsDone(num_tokens, stepped_ids)
                        num_tokens, stepped_ids, reported = 0, [], now
            if self.report_every_s is not None and stepped_ids:
                yield StepsDone(num_tokens, stepped_ids)
        except (Interrupted, ValueError):  # a ValueError speaks of the config or the base, not of a user
            raise
        except Exception as error:
            if self.ranks is not ALONE:
                raise  # the others are in the middle of this pass
            reason = reason_of(error)
        checkpoint.remove()
        losses = [done.last_loss for done in finished if done.error is None]
        if losses and not self._noise:
            self.telemetry.set("oppu_train_loss", sum(losses) / len(losses))
        return reason

    def _finish(
        self,
        result: TrainResult,
        base: Base,
        item_ids: tuple[str, ...],
        leases: dict[str, Lease],
        cost: dict[str, float] | None,
    ) -> UserDone:
        """Commit a result, under the lease that was taken before the user's history was read."""
        user_id = result.user_id
        if result.adapter is None:
            return settled(result, None)
        seed = user_seed(self.config.seed, user_id)
        adapter, manifest = with_lineage(self.config, base, result, item_ids, seed, self.run_id, cost)
        started = time.monotonic()
        try:
            version = self._commit(user_id, adapter, manifest, leases)
        except ValueError as error:
            return self._failure(user_id, error, is_retryable=True)
        self.telemetry.observe("oppu_commit_seconds", time.monotonic() - started)
        return settled(result, version)

    def _failure(self, user_id: str, error: ValueError, is_retryable: bool = False) -> UserDone:
        """What is told of a user after `error`; that the registry fails is nobody's fault."""
        is_registry = isinstance(error, RegistryError)
        if is_registry and self.ranks is not ALONE:
            raise error  # a rank that hangs may hold the lock: only a new start of the group ends it
        return failed(user_id, str(error), is_retryable or is_registry)

    def _commit(self, user_id: str, adapter: AdapterState, manifest: Manifest, leases: dict[str, Lease]) -> str:
        is_served = not self.config.memory.name
        try:
            return self.vault.commit(user_id, adapter, manifest, leases[user_id], is_served)
        except Refused:
            # Another worker of this very run may have taken the user over (the run was submitted twice): whoever
            # comes first commits, with the same bits. But a user whom nobody holds was forgotten.
            user_hash = self.vault.user_hash(user_id)
            if done := self.vault.registry.unit_version(self.run_id, user_hash):
                return done
            if self.vault.registry.leaseholder(user_hash) != self.run_id:
                raise
            leases[user_id] = self.vault.lease(user_id, self.run_id, LEASE_TTL_S)
            return self.vault.commit(user_id, adapter, manifest, leases[user_id], is_served)

    def _account(self, user: UserHistory) -> dict[str, float]:
        """What this run's version costs the user's privacy. ValueError if that is more than the config allows."""
        rho = self.vault.registry.rho(self.vault.user_hash(user.user_id))
        return account(self.config.privacy, self.config.personal, len(user.items), rho)

    def _work(self, user: UserHistory, base: Base) -> UserWork:
        examples = encode_user(self.config, user, base, self.memories.open(user))
        return plan_user(user.user_id, user_seed(self.config.seed, user.user_id), examples, self.config.personal)

    def answer(self, unit: Unit, arm: str, partners: Unit = ()) -> Iterator[Prediction]:
        """Answer the users' queries by one arm; `partners` are the users whose adapters "swapped" uses.

        Who was forgotten since the run began is left out, and who would answer by the adapter of such a user.
        """
        base = self._base(None if arm == "base" else self.task_base_path)
        users = read_users(self.run_dir / "prepare", self.index, unit)
        wearing = {"own": unit, "swapped": partners}.get(evaluation.parse_arm(arm).model)
        adapters = None
        if wearing is not None:
            owner = dict(zip(unit, wearing, strict=True))
            found = [(user, self._adapter(owner[user.user_id], base)) for user in users]
            users = [user for user, adapter in found if adapter]
            adapters = [adapter for _, adapter in found if adapter]
        self.memories.write_profiles(users)
        memories = [self.memories.open(user) for user in users]
        yield from evaluation.answer_users(base, self.task, self.config, arm, users, adapters, memories)

    def _adapter(self, user_id: str, base: Base) -> AdapterState | None:
        """The adapter that this run committed for the user, whatever has become current since; None if forgotten."""
        user_hash = self.vault.user_hash(user_id)
        version = self.vault.registry.unit_version(self.run_id, user_hash)
        if version is None:
            if any(entry.action == "forget" for entry in self.vault.registry.audit_log(user_hash)):
                return None
            raise ValueError(f"user {user_id!r}: run {self.run_id} has committed no adapter; run `train` first")
        return self.vault.load(user_id, version, base_fingerprint=base.fingerprint)[0]


def with_lineage(
    config: Config,
    base: Base,
    result: TrainResult,
    item_ids: tuple[str, ...],
    seed: int,
    run_id: str = "",
    cost: Mapping[str, float] | None = None,
) -> tuple[AdapterState, Manifest]:
    """A trained adapter that names its base, and where it comes from: what `Vault.commit` takes.

    Args:
        cost: `privacy.account`, where it was trained under noise: it stands in the place of the losses.
    """
    assert result.adapter is not None
    manifest = Manifest(
        base_fingerprint=base.fingerprint,
        task_fingerprint="" if base.path == prepare_base(config.base) else base.path.name,
        item_ids=item_ids,
        recipe=to_dict(config.personal)
        | ({"memory": config.memory.recipe} if config.memory.name else {})
        | config.privacy.recipe
        | config.study.recipe,
        seed=seed,
        metrics=dict(cost) if cost else {"first_loss": result.losses[0], "last_loss": result.losses[-1]},
        run_id=run_id,
    )
    named = {**result.adapter.peft_config, "base_model_name_or_path": str(base.path)}
    return replace(result.adapter, peft_config=named), manifest


def encode_user(config: Config, user: UserHistory, base: Base, memory: Memory | None = None) -> list[Example]:
    """A user's items as tokenised training examples."""
    pairs = make_pairs(get_task(config.task), user.items, config.task, config.study.pairs)
    if memory:
        pairs = memory.add_past(pairs)
    max_length = config.personal.max_length + config.memory.num_extra_tokens
    return [encode(pair, base.tokenizer, max_length) for pair in pairs]


def task_work(config: Config, base: Base) -> UserWork:
    """All base users' items as the work of one: that of the task adapter."""
    index = read_index(Path(config.run_dir) / "prepare")
    encoded = encode_base_users(config, base, index, [size.user_id for size in index.sizes("base")])
    examples = [example for own in encoded.values() for example in own]
    return plan_user(TASK_ADAPTER, user_seed(config.seed, TASK_ADAPTER), examples, config.adapt)


def encode_base_users(config: Config, base: Base, index: Index, user_ids: Sequence[str]) -> dict[str, list[Example]]:
    """User to the examples that their items are for the task adapter."""
    users = read_users(Path(config.run_dir) / "prepare", index, user_ids)
    vault = open_vault(config)
    if config.memory.name:  # what is made from their histories is kept in the vault
        vault.add_users([user.user_id for user in users], again=False)
    memories = Memories(config, vault, profile_writer(config))
    # Whoever has two items would else be told the label to learn: it would be half of the profile.
    memories.write_profiles([older_half(user) for user in users])
    adapting = replace(config, personal=config.adapt, study=StudyConfig())
    opened = ((user, memories.open(user, older_half(user))) for user in users)
    examples = {user.user_id: encode_user(adapting, user, base, memory) for user, memory in opened}
    vault.close()
    return examples


def run_units(
    config: Config,
    task_base: Path,
    run_id: str,
    method: str,
    shards: Sequence[Sequence[tuple[Any, ...]]],
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """Run `Worker.<method>(*unit)` for every unit of every shard and yield what they yield, each result once.

    With `workers.num_workers` 0 in this process, in order; otherwise on that many Ray actors, each of which owns a
    shard. The results are the same; their order is not.

    Raises:
        Interrupted: `should_stop` said yes; what is done is kept.
    """
    progress = progress or Progress()
    if config.base.sharding == "zero3":
        from oppu_ray.group import train_shards  # which imports this file, and Ray

        yield from train_shards(config, task_base, run_id, shards, progress, should_stop)
        return
    if config.workers.num_workers:
        from oppu_ray.pool import run_on_ray  # which imports this file, and Ray

        yield from run_on_ray(config, task_base, run_id, method, shards, progress, should_stop)
        return
    worker = Worker(config, task_base, run_id, should_stop=should_stop, report_every_s=0.0)
    for unit in (unit for shard in shards for unit in shard):
        if should_stop():
            raise Interrupted("stopped between two packs")
        for result in getattr(worker, method)(*unit):
            if isinstance(result, StepsDone):
                progress.stepped(*result)
            else:
                yield result
        progress.pack_done()


def _done_before(user_id: str) -> UserDone:
    return UserDone(user_id, None, None, 0.0, 0.0, 0, 0)


def settled(result: TrainResult, version: str | None) -> UserDone:
    """What is told of a trained user: the committed version, or why there is none."""
    first, last = (result.losses[0], result.losses[-1]) if result.losses else (0.0, 0.0)
    num_steps = len(result.losses)
    return UserDone(result.user_id, version, result.error, first, last, num_steps, result.num_useful_tokens)


def failed(user_id: str, reason: str, is_retryable: bool = False) -> UserDone:
    """What is told of a user who was not trained to the end, and why."""
    return UserDone(user_id, None, f"user {user_id!r}: {reason}", 0.0, 0.0, 0, 0, is_retryable=is_retryable)


def reason_of(error: Exception) -> str:
    """What went wrong in training, without the error's own words: they might quote a history."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in training ({Path(place.filename).name}, line {place.lineno})"
