"""Retrieval for answers, in a process of its own: a question -> the user's own items in its prompt.

In: a user's hash and a question of the run's task. Out: (item id, line of the prompt) pairs, best first.
`serve.replica` keeps the process: reading a long history and indexing it holds Python's lock for seconds, and every
operation of the engine's step would wait for it. The indexes never leave this process.

Design: an index belongs to one version of a history, as the registry counts it, and is kept until memory is short, the
history changes or the user is forgotten. Calls of one user run one at a time, so eight at once build one index.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from oppu_ray.config import Config
from oppu_ray.core import Item, UserHistory
from oppu_ray.memory import Memories, Memory, query_prompt
from oppu_ray.registry import Forgotten, UserHash
from oppu_ray.tasks import get_task, memory_line
from oppu_ray.vault import Vault
from serve.messages import MAX_TOP_K

BYTES_PER_BYTE = 5
"""Memory that a byte of a history takes here, items and index: 13 MB of 200-word texts take 60 MB."""


class Recall:
    """See the module's docstring. `root` and `registry_url` as for `Vault`."""

    def __init__(self, config: Config, root: Path, registry_url: str):
        self._config, self._task, self._vault = config, get_task(config.task), Vault(root, registry_url, create=False)
        memory = replace(config.memory, top_k=MAX_TOP_K)  # the best k are the first k of these
        self._memories = Memories(replace(config, memory=memory), self._vault, generate=lambda prompts: ())
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def find(self, user_hash: UserHash, question: Item, top_k: int) -> tuple[tuple[str, str], ...]:
        """The `top_k` items that stand in the question's prompt."""
        kept = self._open(user_hash)
        if kept is None:
            return ()
        prompt = query_prompt(self._config, self._task, question)
        hits = kept.memory.search(prompt, question.item_id)[:top_k]
        found = [kept.items[hit.index] for hit in hits]
        return tuple((item.item_id, memory_line(self._task, item, self._config.memory.max_words)) for item in found)

    def forget(self, user_hash: str) -> None:
        """Drop a user's index."""
        with self._lock:
            self._kept.pop(user_hash, None)

    def _open(self, user_hash: UserHash) -> _Kept | None:
        """The index of the history as it is now; None for an empty one."""
        try:
            history = self._vault.history(user_hash)
        except Forgotten:
            return None
        version = (history.generation, history.version)
        with self._lock:
            kept = self._kept.get(user_hash)
            if kept is not None and kept.version == version:
                self._kept.move_to_end(user_hash)
                return kept
        items = self._vault.read_history(user_hash)
        memory = self._memories.open(UserHistory(user_hash, "target", items)) if items else None
        if memory is None:
            return None
        kept = _Kept(version, items, memory, BYTES_PER_BYTE * history.num_bytes)
        with self._lock:
            self._kept.pop(user_hash, None)
            self._kept[user_hash] = kept
            while (
                len(self._kept) > 1
                and sum(one.num_bytes for one in self._kept.values()) > self._config.serve.index_bytes
            ):
                self._kept.popitem(last=False)
        return kept


class _Kept:
    """An index and what it is of."""

    def __init__(self, version: tuple[int, int | None], items: tuple[Item, ...], memory: Memory, num_bytes: int):
        self.version, self.items, self.memory, self.num_bytes = version, items, memory, num_bytes
