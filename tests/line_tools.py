"""What the tests of the whole line share: synthetic users, a config on a tiny base, running it by the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from oppu_ray.cli import main

TAGS = ["sci-fi", "comedy", "action", "romance"]


def tagging_user(number: int, num_items: int = 5, role: str = "target", canary: str = "") -> dict[str, Any]:
    """A user who gives most films one tag of their own."""
    items = [
        {
            "id": f"u{number}-{i}",
            "time": f"2020-01-{i + 1:02d}",
            "text": f"film {i} of {number} {canary}",
            "label": TAGS[number % 4 if i % 3 else i % 4],
        }
        for i in range(num_items)
    ]
    return {"user_id": f"user-{number}", "role": role, "history": items}


def chat_user(number: int, num_items: int = 4, role: str = "target") -> dict[str, Any]:
    """A user who ends every reply in the same word."""
    items = [
        {"id": f"c{number}-{i}", "context": [f"Partner: how is day {i}?"], "text": f"funny day {number}"}
        for i in range(num_items)
    ]
    return {"user_id": f"user-{number}", "role": role, "history": items}


def rating_user(number: int, num_items: int = 4, role: str = "target") -> dict[str, Any]:
    """A user who is strict or kind."""
    label = "5" if number % 2 else "1"
    items = [{"id": f"r{number}-{i}", "text": f"the book {i}", "label": label} for i in range(num_items)]
    return {"user_id": f"user-{number}", "role": role, "history": items}


def write_users(path: Path, users: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(user) + "\n" for user in users), encoding="utf-8")
    return path


def write_config(folder: Path, base: Path, users: Path, task: str = "movie_tagging", **top: Any) -> Path:
    """A YAML of a run in `folder` that takes about a second: tiny base, two users a pack, two steps."""
    train = {
        "max_steps": 2,
        "items_per_step": 2,
        "max_length": 160,
        "max_users_per_pack": 2,
        "learning_rate": 0.01,
        "peft": {"rank": 2, "alpha": 4},
    }
    config = {
        "run_dir": str(folder / "run"),
        "data": {"path": str(users), "query_share": 0.4},
        "task": {"name": task, "labels": TAGS if task == "movie_tagging" else []},
        "base": {"name": str(base), "dtype": "float32"},
        "adapt": train,
        "personal": train,
        "evaluate": {"num_bootstrap": 50, "max_new_tokens": 4},
        "workers": {"threads": 1},
        **top,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def oppu(stage: str, config: Path, *overrides: str) -> dict[str, Any]:
    """Runs one stage as a user would, and returns the `result.json` it wrote."""
    assert main([stage, str(config), *overrides]) == 0
    return result(config, "evaluate" if stage == "run" else stage)


def result(config: Path, stage: str) -> dict[str, Any]:
    return json.loads((run_dir(config) / stage / "result.json").read_text())


def run_dir(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def adapters(config: Path) -> dict[str, str]:
    """User to the SHA-256 of their current adapter's tensors, read back through the vault."""
    from oppu_ray.vault import Vault

    vault = Vault(run_dir(config) / "vault")
    digests = {}
    for entry in json.loads((run_dir(config) / "prepare" / "index.json").read_text())["entries"].values():
        user_id = entry["size"]["user_id"]
        if vault.registry.current(vault.user_hash(user_id)) is not None:
            adapter, _ = vault.load(user_id, base_fingerprint=None)
            digest = hashlib.sha256()
            for name, tensor in sorted(adapter.tensors.items()):
                digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
            digests[user_id] = digest.hexdigest()
    vault.close()
    return digests


def versions(config: Path) -> dict[str, str]:
    """User to the name of their current version."""
    from oppu_ray.vault import Vault

    vault = Vault(run_dir(config) / "vault")
    found = {user_id: vault.load(user_id, base_fingerprint=None)[1].version for user_id in adapters(config)}
    vault.close()
    return found
