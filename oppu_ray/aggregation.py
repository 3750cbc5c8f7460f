"""Shards' updates -> the next task adapter: the server's arithmetic of one federated round (beside `adapt`).

In: the round's adapter and one update per shard. Out: the next adapter, and by name which shards were left out and why.
Nothing here knows of Ray, files or text; it is numpy over named arrays.

Design: a mean is a sum of 64-bit integers (24 bits of them after the point), not of floats. Integer sums do not depend
on the order of arrival, and masks added to them cancel without a trace, so a round has the same bits with secure
aggregation as without, for 8 bytes a number on the secure wire. Weights are tokens, so what rounding loses of a mean is
2**-24 over the tokens of a round.

The mean of B A is not the product of the means of A and B. `ffa` never trains A, so that the mean of B is exact
(FFA-LoRA, arXiv 2403.12313); `product` takes the mean of the products, keeps its best factors of the adapter's rank and
gives the rest to the base (FedEx-LoRA, arXiv 2410.09432); `naive` makes the mistake, for comparison.

Shapes: N numbers of an update, O and I widths of a linear, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from oppu_ray.config import FederatedConfig

Arrays = dict[str, np.ndarray]
FRACTION_BITS = 24
RING_STEP = 2.0**-FRACTION_BITS
RING_LIMIT = 2.0 ** (62 - FRACTION_BITS) / 1024  # so that a sum of many does not overflow
BACKWARDS = -0.1
ADAM_BETAS, ADAM_FLOOR = (0.9, 0.99), 1e-3  # Reddi et al. 2021, arXiv 2003.00295, section 5


@dataclass(frozen=True)
class RoundState:
    """What a round starts from, after `num_rounds` of them. All arrays are float32.

    Args:
        adapter: The task adapter in PEFT's names: lora_A.weight [R, I] and lora_B.weight [O, R].
        residual: Linear -> [O, I]: what method "product" has given to the base so far.
        mean, square: Server-side Adam's moments, by the adapter's names.
    """

    num_rounds: int
    adapter: Arrays
    residual: Arrays = field(default_factory=dict)
    mean: Arrays = field(default_factory=dict)
    square: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """How far a shard's clients moved the trained numbers on average, [N], and what that weighs (tokens)."""

    shard: int
    delta_N: np.ndarray
    weight: float


def trained_keys(adapter: Mapping[str, np.ndarray], method: str) -> list[str]:
    """The arrays that a method trains, in the order in which they travel."""
    return sorted(key for key in adapter if method != "ffa" or ".lora_B." in key)


def flatten(adapter: Mapping[str, np.ndarray], keys: Iterable[str]) -> np.ndarray:
    """[N] float32."""
    return np.concatenate([adapter[key].reshape(-1) for key in keys]).astype(np.float32, copy=False)


def unflatten(values_N: np.ndarray, like: Mapping[str, np.ndarray], keys: Iterable[str]) -> Arrays:
    """The inverse of `flatten`, in float32, with the shapes of `like`."""
    parts: Arrays = {}
    start = 0
    for key in keys:
        parts[key] = values_N[start : start + like[key].size].reshape(like[key].shape).astype(np.float32)
        start += like[key].size
    return parts


def to_ring(delta_N: np.ndarray, weight: float) -> np.ndarray:
    """[N + 1] integers modulo 2**64: weight times each number, and the weight.

    Raises:
        ValueError: A number is not finite, or too large for a sum of many.
    """
    values = np.append(delta_N.astype(np.float64), 1.0) * weight
    largest = np.abs(values).max()
    if not largest < RING_LIMIT:  # also where it is not a number
        raise ValueError(f"the update's largest number times its weight is {largest:g}; expected below 2**28")
    return np.rint(values * 2.0**FRACTION_BITS).astype(np.int64).view(np.uint64)


def from_ring(total: np.ndarray) -> tuple[np.ndarray, float]:
    """A sum of `to_ring`s -> the weighted mean, [N] float64 (0 where the weights are), and the sum of the weights."""
    values = total.view(np.int64) / 2.0**FRACTION_BITS
    return values[:-1] / (values[-1] or 1.0), float(values[-1])


def check_sum(total: np.ndarray, num: int) -> None:
    """Refuse what no sum of `num` vectors of `to_ring` can be. Of random numbers, one in 2048 / `num` would pass.

    Raises:
        ValueError: A number of it is too large, or the weight is negative.
    """
    values = total.view(np.int64) / 2.0**FRACTION_BITS
    largest = float(np.abs(values).max())
    if largest > num * RING_LIMIT or values[-1] < 0:
        raise ValueError(f"its largest number is {largest:g} and its weight {values[-1]:g}")


def weighted_mean(updates: Sequence[Update]) -> np.ndarray:
    """[N] float64: the same bits in any order."""
    total = np.zeros(len(updates[0].delta_N) + 1, np.uint64)
    for update in updates:
        total += to_ring(update.delta_N, update.weight)
    return from_ring(total)[0]


def trimmed_mean(updates: Sequence[Update], trim_share: float) -> np.ndarray:
    """[N] float64: of every number the mean without its largest and smallest values; weights do not count.

    Of n updates, ceil(trim_share * n) are cut off at either end, as long as one is left (Yin et al. 2018).
    """
    values = np.sort(np.stack([update.delta_N for update in updates]).astype(np.float64), axis=0)
    cut = min(math.ceil(trim_share * len(updates)), (len(updates) - 1) // 2)
    return values[cut : len(updates) - cut].mean(axis=0)


def screen(updates: Sequence[Update], config: FederatedConfig) -> tuple[list[Update], dict[int, str]]:
    """The updates that count, and what was found wrong by shard: left out, or cut to size.

    What no sum can hold is always found. With `robust`, also an update that points away from the median of all (cosine
    below -0.1: independent ones have 0, and honest ones more), and one longer than `robust_factor` times the median
    length, which is cut to it; with "clip", which weighs by what shards say, their weights likewise.
    """
    found = {update.shard: reason for update in updates if (reason := _unfit(update))}
    kept = sorted((u for u in updates if u.shard not in found), key=lambda update: update.shard)
    if config.robust == "none" or len(kept) < 3:
        return kept, found
    middle_N = np.median(np.stack([update.delta_N for update in kept]), axis=0)
    norms = {update.shard: float(np.linalg.norm(update.delta_N.astype(np.float64))) for update in kept}
    limit = config.robust_factor * float(np.median(list(norms.values())))
    heaviest = config.robust_factor * float(np.median([update.weight for update in kept]))
    counted = []
    for update in kept:
        norm = norms[update.shard]
        cosine = float(update.delta_N @ middle_N) / max(norm * float(np.linalg.norm(middle_N)), 1e-30)
        if cosine < BACKWARDS:
            found[update.shard] = f"its update points against the others (cosine {cosine:.2f})"
            continue
        if norm > limit:
            found[update.shard] = f"its update is {norm / limit * config.robust_factor:.1f} medians long, cut to size"
            update = replace(update, delta_N=(update.delta_N * (limit / norm)).astype(np.float32))
        if config.robust == "clip" and update.weight > heaviest:
            weight = f"its weight is {update.weight / heaviest * config.robust_factor:.1f} medians, cut to size"
            found[update.shard] = "; ".join(filter(None, [found.get(update.shard), weight]))
            update = replace(update, weight=heaviest)
        counted.append(update)
    return counted, found


def _unfit(update: Update) -> str:
    """Why an update cannot be in a sum, or nothing."""
    if not 0 <= update.weight < RING_LIMIT:  # also where it is not a number
        return f"its weight is {update.weight:g}"
    largest = np.abs(update.delta_N).max()
    if not np.isfinite(largest):
        return "its update is not finite"
    return "" if float(largest) * update.weight < RING_LIMIT else f"its update has a {largest:g}, too large for a sum"


def moved(state: RoundState, mean_N: np.ndarray, config: FederatedConfig) -> RoundState:
    """The next state: the adapter moved by the mean update, or by Adam with the mean update as its gradient."""
    keys = trained_keys(state.adapter, config.method)
    delta = unflatten(mean_N, state.adapter, keys)
    if config.server == "mean":
        adapter = {key: value + delta[key] if key in delta else value for key, value in state.adapter.items()}
        return replace(state, num_rounds=state.num_rounds + 1, adapter=adapter)
    adapter, means, squares = dict(state.adapter), dict[str, np.ndarray](), dict[str, np.ndarray]()
    beta1, beta2 = ADAM_BETAS
    for key in keys:
        mean, square = (moments.get(key, np.float32(0.0)) for moments in (state.mean, state.square))
        means[key] = (beta1 * mean + (1 - beta1) * delta[key]).astype(np.float32)
        squares[key] = (beta2 * square + (1 - beta2) * delta[key] ** 2).astype(np.float32)
        step = config.server_rate * means[key] / (np.sqrt(squares[key]) + ADAM_FLOOR)
        adapter[key] = (adapter[key] + step).astype(np.float32)
    return RoundState(state.num_rounds + 1, adapter, state.residual, means, squares)


def moved_by_products(state: RoundState, updates: Sequence[Update], scaling: float) -> RoundState:
    """The next state: base + residual + scaling * B A is exactly the weighted mean of the shards' merged weights.

    The new factors are the mean's best of the adapter's rank; A has orthonormal rows, so that a direction in which B is
    still 0 can be learnt.
    """
    keys = trained_keys(state.adapter, "product")
    total = sum(update.weight for update in updates)
    shares = [update.weight / total for update in updates]
    trained = []
    for update in updates:
        delta = unflatten(update.delta_N, state.adapter, keys)
        trained.append({key: state.adapter[key].astype(np.float64) + delta[key] for key in keys})
    adapter, residual = {}, dict[str, np.ndarray]()
    for key_a in (key for key in keys if ".lora_A." in key):
        key_b, name = key_a.replace(".lora_A.", ".lora_B."), linear_name(key_a)
        wide_OM = np.concatenate([share * one[key_b] for share, one in zip(shares, trained, strict=True)], axis=1)
        tall_MI = np.concatenate([one[key_a] for one in trained])
        b_OR, a_RI = best_factors(wide_OM, tall_MI, len(state.adapter[key_a]))
        adapter[key_a], adapter[key_b] = a_RI.astype(np.float32), b_OR.astype(np.float32)
        rest_OI = wide_OM @ tall_MI - adapter[key_b].astype(np.float64) @ adapter[key_a]
        residual[name] = (state.residual.get(name, 0.0) + scaling * rest_OI).astype(np.float32)
    return replace(state, num_rounds=state.num_rounds + 1, adapter=adapter, residual=residual)


def best_factors(b_OM: np.ndarray, a_MI: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B [O, rank] and A [rank, I] whose product is nearest to `b_OM @ a_MI`; A's rows are orthonormal."""
    left_OM, left = np.linalg.qr(b_OM)
    right_IM, right = np.linalg.qr(a_MI.T)
    u, s, vt = np.linalg.svd(left @ right.T)
    return (left_OM @ u)[:, :rank] * s[:rank], (vt @ right_IM.T)[:rank]


def linear_name(key: str) -> str:
    """The module a PEFT key belongs to."""
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


def cut_rank(adapter: Mapping[str, np.ndarray], rank: int) -> tuple[Arrays, Arrays]:
    """The first `rank` directions of an adapter, and the rest of it, which a client of that rank leaves as it is."""

    def part(rows: slice) -> Arrays:
        return {key: (value[rows] if ".lora_A." in key else value[:, rows]).copy() for key, value in adapter.items()}

    return part(slice(rank)), part(slice(rank, None))


def join_rank(head: Mapping[str, np.ndarray], rest: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `cut_rank`."""
    return {key: np.concatenate([head[key], rest[key]], axis=0 if ".lora_A." in key else 1) for key in head}
