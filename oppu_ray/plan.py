"""`oppu plan`: what a run would take, before anything is computed.

In: user sizes, simulated or from a prepared run. Out: packs and shards by the same planners that a run uses, and from
them time, balance, disk and cost.
The decision a reader would question: time is tokens over a measured rate, nothing else. Starting up and recovering are
not in it; loading, optimiser steps and commits are, because the rate is that of whole `train` stages.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from oppu_ray.config import Above0, Count, NotNegative, Positive, TrainConfig, from_overrides, load_config, section
from oppu_ray.core import UserSize
from oppu_ray.packing import num_steps, plan_packs, plan_shards
from oppu_ray.prepared import read_index


@section
class PlanConfig:
    """What is planned, and the figures it is planned with. The defaults are SmolLM2-135M with LoRA of rank 8.

    Args:
        users, median_items, sigma, max_items, seed: Simulated histories: items are lognormal, clipped to
            [1, `max_items`]. Sets of real histories have a `sigma` of 0.6 to 1.1; the default has a heavier tail.
        words_per_item, tokens_per_word, prompt_tokens: Movie tags: 51 words an item, 64 tokens, 99 shared by a step.
        tokens_per_s: Useful tokens per second of one worker: 1,190 on two Xeon cores with AMX (`make demo`).
        cpus_per_worker, price_per_cpu_hour: US dollars; an m7i.2xlarge on demand in us-east-1 is 0.403 for 8.
        bytes_per_user, registry_bytes_per_user: Measured on a vault after a run, blocks of 4 KiB.
    """

    users: Positive = 100_000
    workers: Positive = 8
    median_items: Above0 = 20.0
    sigma: NotNegative = 1.2
    max_items: Positive = 5_000
    seed: Count = 0
    words_per_item: Above0 = 51.0
    tokens_per_word: Above0 = 1.26
    prompt_tokens: Positive = 99
    tokens_per_s: Above0 = 595.0
    cpus_per_worker: Above0 = 1.0
    price_per_cpu_hour: NotNegative = 0.0504
    bytes_per_user: Positive = 1_900_000
    registry_bytes_per_user: Positive = 1_040
    personal: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Plan:
    """Figures of a planned run. `balance` is the mean shard's time over the longest shard's, at most 1."""

    num_users: int
    num_items: int
    num_workers: int
    num_packs: int
    num_passes: int
    num_tokens: int
    makespan_s: float
    balance: float
    longest_pack_s: float
    longest_user_s: float
    adapter_bytes: int
    registry_bytes: int
    usd_per_1000_users: float
    planning_s: float
    peak_bytes: int


def load_plan(run: Path | None, overrides: Sequence[str]) -> tuple[PlanConfig, list[UserSize]]:
    """The figures and the users to plan with: simulated, or the target users of a prepared run.

    Args:
        run: The run's YAML; its `personal` recipe and its workers become the defaults.
        overrides: `key=value` of `PlanConfig`.

    Raises:
        ValueError: A key is unknown, a value is out of range, or nothing was prepared.
    """
    if run is None:
        config = from_overrides(PlanConfig(), overrides)
        return config, simulate_users(config)
    given = load_config(run)
    sizes = read_index(Path(given.run_dir).expanduser() / "prepare").sizes("target")
    if not sizes:
        raise ValueError(f"{run}: the prepared run in {given.run_dir} has no target users")
    default = PlanConfig(
        users=len(sizes),
        workers=max(1, given.workers.num_workers),
        cpus_per_worker=given.workers.cpus_per_worker,
        personal=given.personal,
    )
    config = from_overrides(default, overrides)
    if config.users != len(sizes):
        raise ValueError(f"users={config.users}: {run} has {len(sizes)} target users; leave `users` out")
    return config, sizes


def simulate_users(config: PlanConfig) -> list[UserSize]:
    """Users with heavy-tailed histories; same config, same users."""
    draw = np.random.default_rng(config.seed)
    items = draw.lognormal(np.log(config.median_items), config.sigma, config.users)
    items = np.clip(np.rint(items), 1, config.max_items).astype(int)
    words = np.maximum(1, np.rint(items * config.words_per_item * draw.lognormal(-0.125, 0.5, config.users)))
    sizes = zip(items.tolist(), words.astype(int).tolist(), strict=True)
    return [UserSize(f"user-{number}", *size) for number, size in enumerate(sizes)]


def plan(config: PlanConfig, sizes: Sequence[UserSize]) -> Plan:
    """Plan packs and shards for real and add up what they come to."""
    started = time.monotonic()
    packs = plan_packs(sizes, config.personal)
    shards = plan_shards(packs, config.workers)
    by_id = {size.user_id: size for size in sizes}
    tokens, num_passes, longest_user = {}, 0, 0.0
    for pack in packs:
        steps = [_steps(by_id[user_id], config) for user_id in pack.user_ids]
        own = [num * size for num, size in steps]
        tokens[pack.pack_id] = sum(own)
        longest_user = max(longest_user, *own)
        num_passes += sum(_passes(steps, config.personal.max_tokens_per_pass))
    loads = [sum(tokens[pack.pack_id] for pack in shard) for shard in shards]
    makespan_s = max(loads) / config.tokens_per_s
    cpu_hours = makespan_s / 3600 * config.workers * config.cpus_per_worker
    return Plan(
        num_users=len(sizes),
        num_items=sum(size.num_items for size in sizes),
        num_workers=config.workers,
        num_packs=len(packs),
        num_passes=num_passes,
        num_tokens=round(sum(loads)),
        makespan_s=makespan_s,
        balance=sum(loads) / len(loads) / max(loads),
        longest_pack_s=max(tokens.values()) / config.tokens_per_s,
        longest_user_s=longest_user / config.tokens_per_s,
        adapter_bytes=len(sizes) * config.bytes_per_user,
        registry_bytes=len(sizes) * config.registry_bytes_per_user,
        usd_per_1000_users=1000 * cpu_hours * config.price_per_cpu_hour / len(sizes),
        planning_s=time.monotonic() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _steps(size: UserSize, config: PlanConfig) -> tuple[int, float]:
    """A user's steps, and the tokens of one: what its examples share once, then their own."""
    steps_per_epoch = -(-size.num_items // config.personal.items_per_step)
    own = size.num_words * config.tokens_per_word / steps_per_epoch
    return num_steps(size.num_items, config.personal), config.prompt_tokens + own


def _passes(steps: Sequence[tuple[int, float]], max_tokens: int) -> Iterator[int]:
    """Passes of a pack, stretch by stretch between two users' ends; `steps` comes longest first, as in a pack."""
    together, start = sum(size for _, size in steps), 0
    for stop, size in reversed(steps):
        yield (stop - start) * math.ceil(together / max_tokens)
        together, start = together - size, stop


def format_plan(config: PlanConfig, plan: Plan) -> str:
    """The plan as a table, then what it was computed with."""
    total = plan.usd_per_1000_users * plan.num_users / 1000
    rows = {
        "users": f"{plan.num_users:,} with {plan.num_items:,} items, {plan.num_tokens:,} useful tokens",
        "packs": f"{plan.num_packs:,} in about {plan.num_passes:,} passes",
        "makespan": f"{_time(plan.makespan_s)} on {plan.num_workers:,} workers",
        "balance": f"{plan.balance:.1%} (mean shard over longest shard)",
        "longest": f"pack {_time(plan.longest_pack_s)}, user {_time(plan.longest_user_s)}: more workers are no faster",
        "disk": f"{plan.adapter_bytes / 1e9:,.1f} GB of adapters, {plan.registry_bytes / 1e6:,.1f} MB of registry",
        "cost": f"${plan.usd_per_1000_users:.2f} per 1,000 users, ${total:,.2f} for all",
        "planning": f"{plan.planning_s:.1f} s, {plan.peak_bytes / 1e9:.2f} GB of memory at most",
    }
    figures = ("tokens_per_s", "cpus_per_worker", "price_per_cpu_hour", "tokens_per_word", "prompt_tokens")
    used = " ".join(f"{name}={getattr(config, name)}" for name in figures)
    return "\n".join([*(f"{name:<10}{text}" for name, text in rows.items()), f"with      {used}"])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
