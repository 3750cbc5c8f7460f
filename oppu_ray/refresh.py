"""Train one user again from what the vault holds of them (arrow `vault -> train_pack -> vault`).

In: a user with a history in the vault, and the task base. Out: a new current version, trained on all of their items.
It is what follows a forgotten item or a grown history; a run's own `train` reads prepared files instead.

A reader might question that the version belongs to no run: it may have seen items that are a run's queries, so no
run's evaluation may take it for its own. Same items and seed give the adapter that the run would have trained.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from oppu_ray.base_model import Base
from oppu_ray.config import Config
from oppu_ray.core import InputError, UserDone, UserHistory
from oppu_ray.hub import pin_models
from oppu_ray.packing import plan_user
from oppu_ray.privacy import account, private_backward
from oppu_ray.randomness import user_seed
from oppu_ray.registry import UserHash
from oppu_ray.training import train_pack
from oppu_ray.vault import Vault
from oppu_ray.workers import encode_user, open_base, settled, with_lineage

LEASE_S = 60.0
"""Renewed between steps; for so long a user waits whose training died with its process."""


def open_task_base(config: Config) -> Base:
    """The base that a run's personal adapters stand on. ValueError if the run has not got that far."""
    return open_base(pin_models(config), task_base_path(config))


def task_base_path(config: Config) -> Path:
    """Where that base is. ValueError if the run has not got that far."""
    path = Path(config.run_dir) / "adapt" / "result.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `adapt` with this config first")
    return Path(json.loads(path.read_text())["task_base"])


def refresh_user(
    config: Config, vault: Vault, user: str, base: Base, progress: Callable[[int, int], None] | None = None
) -> UserDone:
    """Train a user on all of their history in the vault (whatever `study.items` says), and commit the adapter.

    The user is leased meanwhile: who forgets them, or some of their items, during the training has the last word.

    Args:
        user: Their id, or their `UserHash` where no id is known.
        progress: Called after each step with the number of steps done and of all.

    Raises:
        Refused: The user is being trained elsewhere, or was forgotten meanwhile.
        InputError: No history, or `privacy.max_epsilon` allows no more training.
        ValueError: An item that cannot be trained on, or the vault failed.
    """
    config = replace(pin_models(config), study=replace(config.study, items="all"))
    user_hash = vault.user_hash(user)
    lease = vault.lease(user_hash, f"refresh-{secrets.token_hex(8)}", LEASE_S)
    try:
        items = vault.read_history(user_hash)
        if not items:
            raise InputError(f"user {user_hash[:12]}: has no history in the vault; expected at least one item")
        is_private = config.privacy.noise_multiplier > 0
        cost = None
        if is_private:
            cost = account(config.privacy, config.personal, len(items), vault.registry.rho(user_hash))
        current = vault.registry.current(user_hash)
        # The id is not kept in the vault. A run's seed is made from it, and stands in what the run committed.
        seed = user_seed(config.seed, user)
        if isinstance(user, UserHash) and current is not None:
            seed = vault.load(user_hash, base_fingerprint=None)[1].seed
        examples = encode_user(config, UserHistory(user_hash, "target", items), base)
        work = plan_user(user_hash, seed, examples, config.personal)
        done, renewed = 0, time.monotonic()

        def advance(_tokens: int, _users: Sequence[str]) -> None:
            nonlocal done, renewed
            done += 1
            if time.monotonic() - renewed >= LEASE_S / 4:
                vault.registry.renew_leases([lease], LEASE_S)
                renewed = time.monotonic()
            if progress:
                progress(done, len(work.steps))

        backward = private_backward(config.privacy, [work], secrets.token_bytes(32)) if is_private else None
        (result,) = train_pack(base.model, [work], config.personal, advance, backward=backward)
        version = None
        if result.adapter is not None:
            item_ids = tuple(item.item_id for item in items)
            adapter, manifest = with_lineage(config, base, result, item_ids, seed, cost=cost)
            version = vault.commit(user_hash, adapter, manifest, lease)
        return replace(settled(result, version), user_id=user, epsilon=cost["epsilon"] if cost else 0.0)
    finally:
        vault.registry.release_lease(lease)
