"""What each answer of a shard must hold: the server checks it here, once, before anything is computed from it.

In: an answer's bytes, and what the step of the round expects (`Expected`). Out: the answer with its header's values
parsed (hex is bytes, shards are numbers) and its array of the right type and length, or a ValueError: the finding
against the shard. An answer that says `error` is a finding, too.

Design: an answer is exactly what was expected, or it does not count. What a well-formed answer says (a NaN, an update
far longer than the others') is judged later, by `aggregation.screen`.

Shapes: N numbers of an update.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oppu_ray.secure import (
    DIGEST_BYTES,
    MESSAGE_BYTES,
    SHARE_BYTES,
    check_public_key,
    dealt_digests,
    share_digest,
)
from oppu_ray.shards import Message, read_message

HEADER_BYTES, SHARD_BYTES = 4096, 1024  # of the largest header: for all, and for each shard that it speaks of
ERROR_LENGTH = 300
LARGEST = 1e100  # so that no sum of losses times weights overflows
Check = Callable[[Any], Any]
"""A header's value as JSON has it -> the value; ValueError says what it is and what was expected."""


@dataclass(frozen=True)
class Expected:
    """What an answer must hold: these header values, these arrays (data type and length), nothing else."""

    header: Mapping[str, Check]
    arrays: Mapping[str, tuple[type[np.generic], int]] = field(default_factory=dict)
    num_shards: int = 0

    @property
    def max_bytes(self) -> int:
        arrays = sum(np.dtype(kind).itemsize * length for kind, length in self.arrays.values())
        return HEADER_BYTES + SHARD_BYTES * self.num_shards + arrays


def open_update(length: int, kind: type[np.generic]) -> Expected:
    """`train` without secure aggregation: N numbers, their weight, and the loss."""
    return Expected({"loss": _number, "weight": _number}, {"delta": (kind, length)})


def public_keys() -> Expected:
    """`keys`."""
    return Expected({"mask": _public_key, "cipher": _public_key, "seed": _hex(DIGEST_BYTES)})


def dealt_shares(peers: Iterable[int]) -> Expected:
    """`shares`: a message for every peer."""
    checks = {peer: _hex(MESSAGE_BYTES) for peer in peers}
    return Expected({"shares": _by_shard(checks)}, num_shards=len(checks))


def masked_update(length: int) -> Expected:
    """`train` under secure aggregation: N numbers, loss and weight, all under masks."""
    return Expected({}, {"masked": (np.uint64, length + 2)})


def revealed_shares(
    shard: int, stayed: Iterable[int], left: Iterable[int], dealt: Mapping[int, Mapping[int, bytes]]
) -> Expected:
    """`reveal`: a share of the seed of each who stayed, and of the mask key of each who left.

    Args:
        dealt: Dealer -> receiver -> message. A share must be that of its digest there, or empty: it did not open.
    """
    digests = {dealer: dealt_digests(own[shard]) for dealer, own in dealt.items()}
    seeds = {dealer: _share("seed", dealer, shard, digests[dealer][0]) for dealer in stayed}
    keys = {dealer: _share("key", dealer, shard, digests[dealer][1]) for dealer in left}
    return Expected({"seeds": _by_shard(seeds), "keys": _by_shard(keys)}, num_shards=len(seeds) + len(keys))


def read_answer(content: Any, expected: Expected) -> Message:
    """An answer's parsed header and its arrays.

    Raises:
        ValueError: It is not what was expected, or it says what went wrong.
    """
    if not isinstance(content, bytes):
        raise ValueError(f"its answer is a {type(content).__name__}; expected bytes")
    if len(content) > expected.max_bytes:
        raise ValueError(f"its answer has {len(content)} bytes; expected at most {expected.max_bytes}")
    header, arrays = read_message(content)
    if "error" in header:
        raise ValueError(_error(header["error"]))
    for what, found, names in (("values", header, expected.header), ("arrays", arrays, expected.arrays)):
        if found.keys() != names.keys():
            raise ValueError(f"its answer has the {what} {_shown(sorted(found))}; expected {sorted(names)}")
    for name, (kind, length) in expected.arrays.items():
        array = arrays[name]
        if array.dtype != kind or array.shape != (length,):
            raise ValueError(f"its {name} is {array.dtype} {list(array.shape)}; expected {np.dtype(kind)} {[length]}")
    parsed = {}
    for name, check in expected.header.items():
        try:
            parsed[name] = check(header[name])
        except ValueError as error:
            raise ValueError(f"its {name}: {error}") from None
    return parsed, arrays


def _number(value: Any) -> float:
    # Python compares whole numbers of any length with floats; NaN and infinity are within no bounds.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        raise ValueError(f"{_shown(value)}; expected a number within {LARGEST:g}")
    return float(value)


def _hex(size: int) -> Check:
    def check(value: Any) -> bytes:
        try:
            content = bytes.fromhex(value)
        except (TypeError, ValueError):
            content = b""
        if len(content) != size or len(value) != 2 * size:  # fromhex skips blanks
            raise ValueError(f"{_shown(value)}; expected {size} bytes in hex")
        return content

    return check


def _public_key(value: Any) -> bytes:
    key: bytes = _hex(32)(value)
    check_public_key(key)
    return key


def _share(kind: str, dealer: int, receiver: int, digest: bytes) -> Check:
    def check(value: Any) -> bytes:
        if value == "":
            return b""
        share: bytes = _hex(SHARE_BYTES)(value)
        if share_digest(kind, share, dealer, receiver) != digest:
            raise ValueError("another share than was dealt to it; expected that, or nothing where it did not open")
        return share

    return check


def _by_shard(checks: Mapping[int, Check]) -> Check:
    """An object with a value for each of these shards, and no other."""

    def check(value: Any) -> dict[int, Any]:
        if not isinstance(value, dict) or value.keys() != {str(number) for number in checks}:
            found = _shown(sorted(value)) if isinstance(value, dict) else _shown(value)
            raise ValueError(f"of the shards {found}; expected {sorted(checks)}")
        parsed = {}
        for number, one in checks.items():
            try:
                parsed[number] = one(value[str(number)])
            except ValueError as error:
                raise ValueError(f"of shard {number}: {error}") from None
        return parsed

    return check


def _error(text: Any) -> str:
    """What the shard says went wrong, if that is one line that a log can take."""
    if isinstance(text, str) and text.isprintable() and 0 < len(text) <= ERROR_LENGTH:
        return text
    return f"its error is {_shown(text)}; expected a line of at most {ERROR_LENGTH} characters"


def _shown(value: Any) -> str:
    """A value from outside, short and on one line."""
    return reprlib.repr(value)
