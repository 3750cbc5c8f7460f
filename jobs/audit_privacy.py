"""Membership inference: can an item's loss tell whether an adapter was trained on it? Prints a table.

    python -m jobs.audit_privacy movie_tagging data.path=users.jsonl.gz

Takes a run whose `adapt` and `train` are done, with the same overrides. An attacker (Yeom et al. 2018) calls an item a
member where the adapted model's loss is low; AUC 0.5 is a coin, 1.0 is certainty. Of a personal adapter, members are
the items it was trained on, others the same user's later queries; of the task adapter, the base users' items and
the targets'. Loss alone also tells items apart by how easy they are, so the same AUC is given for the model without the
adapter, and for how much the adapter lowered the loss. Writes `audit_privacy/result.json` in the run's folder.

What it prints comes from losses without noise, and no epsilon covers it: do not publish it for private users.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from oppu_ray.adapters import peft_from_dict
from oppu_ray.base_model import Base
from oppu_ray.config import Config, StudyConfig, load_config, located, to_dict
from oppu_ray.configs import find_config
from oppu_ray.core import AdapterState, Example, UserHistory
from oppu_ray.files import write_atomic
from oppu_ray.hub import pin_models
from oppu_ray.inference import Engine
from oppu_ray.machine import hardware
from oppu_ray.memory import choose_items
from oppu_ray.prepared import read_index, read_users
from oppu_ray.refresh import open_task_base
from oppu_ray.vault import open_vault
from oppu_ray.workers import encode_user, open_base

MAX_ITEMS = 500


def main() -> None:
    config = located(load_config(find_config(sys.argv[1]), sys.argv[2:]))
    rows = {"task adapter": audit_task(config), "personal adapters": audit_personal(config)}
    print(f"{'':18} {'members':>8} {'others':>8} {'AUC':>6} {'without adapter':>16} {'by the difference':>18}")
    for name, row in rows.items():
        print(
            f"{name:18} {row['num_members']:8} {row['num_others']:8} {row['auc']:6.3f} {row['auc_without']:16.3f} "
            f"{row['auc_difference']:18.3f}"
        )
    folder = Path(config.run_dir) / "audit_privacy"
    folder.mkdir(exist_ok=True)
    result = {"command": "audit_privacy", "config": to_dict(config), "hardware": hardware(), "rows": rows}
    write_atomic(folder / "result.json", json.dumps(result, indent=1).encode())


def audit_task(config: Config) -> dict[str, float]:
    """Base users' items against target users', by the task base and by the base it was made from."""
    folder = Path(config.run_dir) / "prepare"
    index = read_index(folder)
    members, others = (
        read_users(folder, index, [size.user_id for size in index.sizes(role)]) for role in ("base", "target")
    )
    adapting = replace(config, personal=config.adapt, study=StudyConfig())
    losses = []
    for base in (open_task_base(config), open_base(pin_models(config))):
        sides = [[e for user in users for e in encode_user(adapting, user, base)] for users in (members, others)]
        losses.append([score(base, [None], [thinned(side)])[0] for side in sides])
    return compare(*losses)


def audit_personal(config: Config) -> dict[str, float]:
    """Targets' items against their later queries, by their own adapters and by the task base."""
    folder = Path(config.run_dir) / "prepare"
    index = read_index(folder)
    trained = json.loads((folder.parent / "train" / "result.json").read_text())
    base, run_id, vault = open_task_base(config), trained["fingerprints"]["run"], open_vault(config, create=False)
    user_ids = sorted(vault.done(run_id, [size.user_id for size in index.sizes("target")]))
    losses: list[list[list[float]]] = [[[], []], [[], []]]
    for user in read_users(folder, index, user_ids[: config.evaluate.max_users or None]):
        version = vault.registry.unit_version(run_id, vault.user_hash(user.user_id))
        adapter, _ = vault.load(user.user_id, version, base_fingerprint=base.fingerprint)
        later = UserHistory(user.user_id, user.role, user.queries)
        sides = [encode_user(config, one, base) for one in (choose_items(config, user), later)]
        for model, own in enumerate((adapter, None)):
            for side, scores in enumerate(score(base, [own, own], sides)):
                losses[model][side] += scores
    vault.close()
    return compare(*losses)


def thinned(examples: Sequence[Example]) -> list[Example]:
    """At most `MAX_ITEMS`, evenly spread."""
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(len(examples), MAX_ITEMS)).astype(int)]


def score(base: Base, adapters: Sequence[AdapterState | None], sides: Sequence[Sequence[Example]]) -> list[list[float]]:
    """Each example's mean loss per completion token, by side; a side's adapter is that of all of them, or None."""
    pefts = [peft_from_dict(adapter.peft_config) for adapter in adapters[:1] if adapter]
    engine = Engine(base.model, 1, pefts, max_rows=32)
    try:
        if adapters[0]:
            engine.load("own", adapters[0])
        return engine.score([("own" if adapter else None, side) for adapter, side in zip(adapters, sides, strict=True)])
    finally:
        engine.close()


def compare(losses: Sequence[Sequence[float]], without: Sequence[Sequence[float]]) -> dict[str, float]:
    """AUCs from (members' losses, others' losses) with the adapter and without it."""
    difference = [np.subtract(with_it, bare) for with_it, bare in zip(losses, without, strict=True)]
    return {
        "num_members": len(losses[0]),
        "num_others": len(losses[1]),
        "auc": auc(*map(np.asarray, losses)),
        "auc_without": auc(*map(np.asarray, without)),
        "auc_difference": auc(*difference),
    }


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """How likely a member's number is below another's; ties count half."""
    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    return float(1 - (below + up_to).mean() / 2 / len(others))


if __name__ == "__main__":
    main()
