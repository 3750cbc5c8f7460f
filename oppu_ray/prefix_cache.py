"""Keys and values of what was read before, for the same user's next prompt (it stands inside `inference`).

In: the tokens of an answered request and their keys and values. Out: those of the longest common beginning with a new
prompt. An entry belongs to one user and one version of their adapter: nobody else, and no other version, can reach it.
The decision a reader would question: entries are whole copies, not a tree of shared blocks. A user's prompts share one
beginning (instruction, profile), so there is little to share twice. 200 tokens of SmolLM2-135M are 4.6 MB.

Shapes: keys and values [layers, 2, key heads, positions, D], prompt tuning's virtual positions first.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from oppu_ray.slots import Key

MIN_TOKENS = 16  # a shorter beginning is not worth the copy


class PrefixCache:
    """Least recently used entries are dropped when there are more than `max_bytes` of them."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[Key, tuple[int, ...]], Tensor] = OrderedDict()  # least recently used first
        self._tokens: dict[Key, set[tuple[int, ...]]] = {}

    def find(self, key: Key, prompt_ids: tuple[int, ...]) -> tuple[int, Tensor] | None:
        """(number of shared tokens, their keys and values and maybe more); at least one token is left to compute."""
        shared = {tokens: common_length(tokens, prompt_ids) for tokens in self._tokens.get(key, ())}
        best = max(shared, key=lambda tokens: shared[tokens], default=())
        length = min(shared.get(best, 0), len(prompt_ids) - 1)
        if length < MIN_TOKENS:
            return None
        self._entries.move_to_end((key, best))
        return length, self._entries[key, best]

    def store(self, key: Key, tokens: tuple[int, ...], values: Tensor) -> None:
        """Keep an entry; those that are its beginning are dropped."""
        if len(tokens) < MIN_TOKENS or values.nbytes > self.max_bytes:
            return
        own = self._tokens.setdefault(key, set())
        for other in [other for other in own if common_length(other, tokens) == len(other)]:
            self._drop(key, other)
        self._tokens.setdefault(key, set()).add(tokens)
        self._entries[key, tokens] = values
        self.num_bytes += values.nbytes
        while self.num_bytes > self.max_bytes:
            self._drop(*next(iter(self._entries)))

    def forget(self, key: Key) -> None:
        """Drop all entries of one user's version."""
        for tokens in list(self._tokens.get(key, ())):
            self._drop(key, tokens)

    def keys(self) -> list[Key]:
        return list(self._tokens)

    def _drop(self, key: Key, tokens: tuple[int, ...]) -> None:
        self.num_bytes -= self._entries.pop((key, tokens)).nbytes
        self._tokens[key].remove(tokens)
        if not self._tokens[key]:
            del self._tokens[key]


def common_length(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of equal tokens at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
