"""What holds Python's lock for long, in processes of its own: histories, exports, forgetting, lists of everything.

In: hashes of users, from verified tokens. Out: bytes and plain values, as the routes of `serve.account` send them.
`serve.guard.Bounds` keeps the processes; each has the vault open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oppu_ray.archive import pack_user
from oppu_ray.config import Config
from oppu_ray.forget import forget_items, forget_user
from oppu_ray.registry import UserHash
from oppu_ray.vault import Vault
from serve.history import add_items, newest_items
from serve.messages import Failed


class Chores:
    """See the module's docstring. `root` and `registry_url` as for `Vault`."""

    def __init__(self, config: Config, root: Path, registry_url: str):
        self._config, self._vault = config, Vault(root, registry_url)

    def add_items(self, user_hash: UserHash, generation: int | None, body: bytes) -> dict[str, Any] | Failed:
        """See `history.add_items`."""
        return add_items(self._vault, self._config, user_hash, generation, body)

    def newest_items(self, user_hash: UserHash, limit: int) -> bytes:
        """See `history.newest_items`."""
        return newest_items(self._vault, user_hash, limit)

    def export(self, user_hash: UserHash) -> bytes:
        """The user's archive."""
        return pack_user(self._vault, user_hash)

    def forget_user(self, user_hash: UserHash, folders: Sequence[Path]) -> dict[str, Any]:
        """The receipt of `forget.forget_user`."""
        return asdict(forget_user(self._vault, user_hash, folders))

    def forget_items(self, user_hash: UserHash, item_ids: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
        """The receipt of `forget.forget_items`."""
        return asdict(forget_items(self._vault, user_hash, item_ids, folders))

    def users(self) -> bytes:
        """All users, as JSON."""
        return json.dumps({"users": [asdict(user) for user in self._vault.registry.users()]}).encode()

    def tokens(self) -> bytes:
        """All tokens without their secrets, as JSON."""
        return json.dumps({"tokens": [asdict(token) for token in self._vault.registry.tokens()]}).encode()

    def audit(self, limit: int) -> bytes:
        """The newest `limit` lines of the audit log, and the first break of its chain, as JSON."""
        registry = self._vault.registry
        newest = registry.audit_log()[-limit:] if limit > 0 else []
        entries = [{**asdict(entry), "detail": json.loads(entry.detail)} for entry in newest]
        return json.dumps({"broken": registry.verify_audit(), "entries": entries}).encode()
