"""The discrete Gaussian: the right probabilities, whole numbers, and the same from the same key."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from oppu_ray import gaussian
from oppu_ray.gaussian import discrete_gaussian

KEY = bytes(range(32))


def fit(drawn: np.ndarray, sigma: float) -> float:
    """The p-value of numbers drawn from the discrete Gaussian."""
    k = np.arange(-100, 101)
    weight = np.exp(-(k.astype(float) ** 2) / (2 * sigma**2))
    expected = len(drawn) * weight / weight.sum()
    counted = np.bincount(drawn - k[0], minlength=len(k))
    is_common = expected > 10
    pooled = [np.append(values[is_common], values[~is_common].sum()) for values in (counted, expected)]
    assert counted.sum() == len(drawn) and is_common.sum() >= 7
    return float(stats.chisquare(*pooled, sum_check=False).pvalue)


@pytest.mark.parametrize("sigma", [1, 3, 15])
def test_each_whole_number_has_its_probability(sigma: int) -> None:
    drawn = discrete_gaussian(KEY, 400_000, sigma)
    assert fit(drawn, sigma) > 0.001
    assert fit(drawn, 1.02 * sigma) < 1e-6 and fit(drawn, 0.98 * sigma) < 1e-6


@pytest.mark.parametrize("sigma", [2**24, 2**24 + 12_345, 3 * 2**38])
def test_with_a_large_sigma_it_is_the_normal_distribution(sigma: int) -> None:
    drawn = discrete_gaussian(KEY, 400_000, sigma) / sigma
    assert stats.kstest(drawn, "norm").pvalue > 0.001
    assert stats.kstest(drawn * 1.02, "norm").pvalue < 1e-3
    assert abs(drawn.mean()) < 0.006 and abs((drawn**2).mean() - 1) < 0.009
    assert abs((drawn**3).mean()) < 0.03 and abs((drawn**4).mean() - 3) < 0.06
    assert 4.2 < np.abs(drawn).max() < 6.5


def test_the_last_bits_are_uniform() -> None:
    drawn = discrete_gaussian(KEY, 400_000, 2**24)
    assert stats.chisquare(np.bincount(drawn & 15)).pvalue > 0.001
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_the_same_key_gives_the_same_numbers_and_another_key_others() -> None:
    drawn = discrete_gaussian(KEY, 100_000, 1000)
    assert drawn.dtype == np.int64 and np.array_equal(drawn[:777], discrete_gaussian(KEY, 777, 1000))
    assert abs(np.corrcoef(drawn, discrete_gaussian(bytes(32), 100_000, 1000))[0, 1]) < 0.01
    assert len(discrete_gaussian(KEY, 0, 5)) == 0


@pytest.mark.parametrize("sigma", [1, 5, 2**24 + 1])
def test_what_floats_decide_is_what_decimals_decide(sigma: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "PROPOSALS", 512)
    quick = discrete_gaussian(KEY, 500, sigma)
    monkeypatch.setattr(gaussian, "_chance", lambda x, v: np.full(len(x), 0.5))
    monkeypatch.setattr(gaussian, "CLOSE", 2.0)  # nothing is left to floats
    assert np.array_equal(discrete_gaussian(KEY, 500, sigma), quick)


def test_a_close_decision_has_128_more_bits() -> None:
    """At u 0, v 1 everything is taken; at u 0, v 0 what is below exp(1/2) / 2."""
    assert gaussian._is_taken(0, 1, 7, b"\xff" * 24)
    exact = 0x_D309_4C70_F034_DE4B  # floor(exp(1/2) / 2 * 2**64)
    assert gaussian._is_taken(0, 0, 7, (exact - 1).to_bytes(8, "big") + b"\xff" * 16)
    assert not gaussian._is_taken(0, 0, 7, (exact + 1).to_bytes(8, "big") + bytes(16))
    decided = {gaussian._is_taken(0, 0, 7, exact.to_bytes(8, "big") + bytes([more]) + bytes(15)) for more in range(256)}
    assert decided == {True, False}


@pytest.mark.parametrize("sigma", [0, -1, 2**41])
def test_a_sigma_out_of_bounds_is_refused(sigma: int) -> None:
    with pytest.raises(ValueError, match=f"sigma is {sigma}; expected a whole number from 1"):
        discrete_gaussian(KEY, 1, sigma)
