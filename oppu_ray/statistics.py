"""What paired differences prove: intervals, p-values, corrections, power, concentration. Beside the arrow that ends in
result.json; used by `evaluation.py` and `findings.py`.

In go gains, one per query (more is better), and whose query each was; out come numbers. A reader might question that
every gain has two of each: queries of one user share an adapter, so resampling queries asks "would these users gain on
other queries" and resampling users asks "would other users gain". One user with many queries can carry the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.05
"""Of all tests and intervals: p below it is significant, intervals hold 1 - LEVEL."""
POWER = 0.8
_CHUNK = 2**21  # resampled values held at a time


@dataclass(frozen=True)
class Gain:
    """A paired comparison of two arms, more is better.

    Args:
        mean, low, high, p: Of the mean over queries, queries resampled: 95 % interval, two-sided p-value.
        by_user_mean, by_user_low, by_user_high, by_user_p: Of the mean of the users' means, users resampled.
        num_queries, num_users: What was compared.
        sd: Standard deviation of one query's gain such that `sd / sqrt(num_queries)` is the standard error of `mean`
            with users as the sampling unit: the plain one for one query a user, larger where a user's queries agree.
        by_user_sd: Standard deviation of the users' means; 0 of one user.
        top_share: Share of the summed gain that the tenth of the users with the largest sums holds (at least one user);
            above 1 where others lose; None where there is no gain to share.
    """

    mean: float
    low: float
    high: float
    p: float
    by_user_mean: float
    by_user_low: float
    by_user_high: float
    by_user_p: float
    by_user_sd: float
    num_queries: int
    num_users: int
    sd: float
    top_share: float | None


def paired_gain(gain_Q: np.ndarray, users: Sequence[str], num_resamples: int, seed: int) -> Gain:
    """Everything about one comparison.

    Args:
        gain_Q: One signed difference per query.
        users: Whose query each was.

    Raises:
        ValueError: No queries, or another number of users.
    """
    if not len(gain_Q) or len(gain_Q) != len(users):
        raise ValueError(f"expected a gain and its user for at least one query, got {len(gain_Q)} and {len(users)}")
    sum_U, num_U = sum_by_user(gain_Q, users)
    gain_U = sum_U / num_U
    low, high = bootstrap_interval(gain_Q, num_resamples, seed)
    user_low, user_high = bootstrap_interval(gain_U, num_resamples, seed)
    curve = concentration(sum_U)
    # Of one user nothing is known about other users: then queries stand alone.
    residual = sum_U - num_U * gain_Q.mean() if len(sum_U) > 1 else gain_Q - gain_Q.mean()
    return Gain(
        mean=float(gain_Q.mean()),
        low=low,
        high=high,
        p=sign_flip_p(gain_Q, num_resamples, seed),
        by_user_mean=float(gain_U.mean()),
        by_user_low=user_low,
        by_user_high=user_high,
        by_user_p=sign_flip_p(gain_U, num_resamples, seed),
        by_user_sd=float(gain_U.std(ddof=1)) if len(gain_U) > 1 else 0.0,
        num_queries=len(gain_Q),
        num_users=len(sum_U),
        sd=float(np.sqrt((residual**2).sum() / len(gain_Q) * len(residual) / max(1, len(residual) - 1))),
        top_share=float(curve[max(1, round(len(sum_U) / 10)) - 1]) if curve is not None else None,
    )


def sum_by_user(gain_Q: np.ndarray, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each user's summed gain and number of queries, users in order of name."""
    _, index_Q = np.unique(np.asarray(users), return_inverse=True)
    return np.bincount(index_Q, weights=gain_Q), np.bincount(index_Q)


def bootstrap_interval(values: np.ndarray, num_resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` under resampling with replacement."""
    random = np.random.default_rng(seed)
    size = len(values)
    counts = _chunks(num_resamples, size)
    means = [values[random.integers(size, size=(count, size))].mean(axis=1) for count in counts]
    low, high = np.percentile(np.concatenate(means), [50 * LEVEL, 100 - 50 * LEVEL])
    return float(low), float(high)


def sign_flip_p(values: np.ndarray, num_resamples: int, seed: int) -> float:
    """Two-sided p-value of the mean of `values` being zero, by the paired randomisation test: signs are drawn anew.

    Never zero: `num_resamples` draws cannot show less than 1 / (num_resamples + 1).
    """
    random = np.random.default_rng(seed)
    observed = abs(values.sum()) * (1 - 1e-12)  # equal sums, added in another order, are equal
    counts = _chunks(num_resamples, len(values))
    sums = (
        random.integers(2, size=(count, len(values)), dtype=np.int8) @ (2 * values) - values.sum() for count in counts
    )
    num_extreme = sum(int((np.abs(part) >= observed).sum()) for part in sums)
    return (1 + num_extreme) / (1 + num_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: below LEVEL, all that are so hold together at that level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def num_needed(gain: float, sd: float, level: float = LEVEL) -> int:
    """Values for which a two-sided test at `level` finds a mean of `gain` with probability POWER (normal theory).

    Raises:
        ValueError: `gain` is not positive.
    """
    if gain <= 0:
        raise ValueError(f"expected a gain above 0 to look for, got {gain}")
    normal = NormalDist()
    return max(2, math.ceil(((normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)) * sd / gain) ** 2))


def concentration(sum_U: np.ndarray) -> np.ndarray | None:
    """Share of the summed gain held by the 1, 2, ... users with the largest sums; None where the sum isn't positive."""
    total = sum_U.sum()
    return np.cumsum(np.sort(sum_U)[::-1]) / total if total > 0 else None


def _chunks(num_resamples: int, size: int) -> list[int]:
    step = max(1, _CHUNK // max(1, size))
    return [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
