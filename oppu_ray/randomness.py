"""Where seeds come from (no torch here: processes that only retrieve do without it)."""

from __future__ import annotations

import hashlib


def user_seed(seed: int, user_id: str) -> int:
    """A user's own seed: from the run's seed and the id, never from the position among other users."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{user_id}".encode()).digest()[:6], "big")
