"""A pack in the middle of training, on disk: where a worker that takes over goes on (arrow `packing -> train_pack`).

In: a `PackState` between two steps, and what was reported of users that are through. Out: the same, verified, in
another process. `<run>/checkpoints/<run id>-<pack>/<steps>/` has one file per user and `pack.json`, and is one rename.
It goes when the pack is done. A reader might question a file per user: it is personal data, so it is named by the
user's keyed hash, as `forget` looks for it, and sealed where the vault seals; what is left is then no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from oppu_ray.core import UserDone
from oppu_ray.files import new_folder
from oppu_ray.registry import RegistryError
from oppu_ray.training import PackState, UserState
from oppu_ray.vault import DiskError, Vault

logger = logging.getLogger(__name__)


class Checkpoint:
    """Where one pack of one run leaves its state. `base_fingerprint` guards against going on over another base."""

    def __init__(self, run_dir: Path, vault: Vault, run_id: str, user_ids: Sequence[str], base_fingerprint: str):
        self._vault, self._hashes = vault, {user_id: vault.user_hash(user_id) for user_id in user_ids}
        self._head = {"run_id": run_id, "base_fingerprint": base_fingerprint, "pack": list(self._hashes.values())}
        self._key = f"{run_id}-{hashlib.sha256(json.dumps(self._head).encode()).hexdigest()[:16]}"
        self._folder = run_dir / "checkpoints" / self._key

    def save(self, state: PackState, finished: Sequence[UserDone]) -> None:
        """Write the state and drop older ones. A disk that is full costs the checkpoint, not the training."""
        target = self._folder / f"{state.num_steps:08d}"
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with new_folder(target) as partial:
                users = {}
                for user_id, user in state.users.items():
                    name, content = self._hashes[user_id], save(user.tensors)
                    users[name] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "losses": user.losses,
                        "num_tokens": user.num_tokens,
                    }
                    sealed = self._vault.seal(name, f"{self._key}/{target.name}", content)
                    _write(partial / f"{name}.safetensors", sealed)
                done = [asdict(replace(one, user_id=self._hashes[one.user_id])) for one in finished]
                body = {**self._head, "num_steps": state.num_steps, "users": users, "finished": done}
                text = json.dumps(body).encode()
                _write(partial / "pack.json", hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            for path in self._folder.iterdir():
                if path != target:
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError) as error:
            logger.warning("%s: no checkpoint written: %s", target, error)

    def load(self) -> tuple[PackState, list[UserDone]] | None:
        """The newest whole state and what was reported before it; None, with a warning, if there is none to trust.

        What is damaged is removed; what cannot be read, or not unsealed now, stays.
        """
        names = sorted(path for path in self._folder.glob("*") if not path.name.startswith("."))
        for folder in reversed(names):
            try:
                return self._read(folder)
            except (OSError, DiskError, RegistryError) as error:
                logger.warning("%s: cannot be read, ignored: %r", folder, error)
            except (ValueError, KeyError, TypeError, SafetensorError) as error:
                logger.warning("%s: not the checkpoint of this pack and run, ignored: %r", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def remove(self) -> None:
        """The pack is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, folder: Path) -> tuple[PackState, list[UserDone]]:
        digest, _, text = (folder / "pack.json").read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("pack.json is damaged")
        body = json.loads(text)
        if {name: body[name] for name in self._head} != self._head:
            raise ValueError("pack.json is of another pack, run or base")
        user_ids = {name: user_id for user_id, name in self._hashes.items()}
        users = {}
        for name, entry in body["users"].items():
            data = (folder / f"{name}.safetensors").read_bytes()
            content = self._vault.unseal(name, f"{self._key}/{folder.name}", data)
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ValueError(f"{name[:12]}.safetensors is damaged")
            users[user_ids[name]] = UserState(load(content), tuple(entry["losses"]), entry["num_tokens"])
        finished = [UserDone(**{**one, "user_id": user_ids[one["user_id"]]}) for one in body["finished"]]
        return PackState(body["num_steps"], users), finished


def _write(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def remove_checkpoints(run_dir: Path, run_id: str) -> None:
    """Remove what workers of a run left that were lost for good."""
    for folder in (run_dir / "checkpoints").glob(f"{run_id}-*"):
        shutil.rmtree(folder, ignore_errors=True)
