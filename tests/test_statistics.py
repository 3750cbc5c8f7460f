"""Intervals and tests against closed forms, exact enumeration, published examples and simulated coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from oppu_ray.statistics import bootstrap_interval, concentration, holm, num_needed, paired_gain, sign_flip_p


def test_the_interval_is_the_percentile_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(5).normal(1.0, 2.0, 400)
    low, high = bootstrap_interval(values, 4000, 0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval(values, 50, 1) == bootstrap_interval(values, 50, 1) != bootstrap_interval(values, 50, 2)
    assert bootstrap_interval(np.full(3, 0.5), 20, 0) == (0.5, 0.5)


def test_resampling_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, 37)
    whole = bootstrap_interval(values, 101, 3), sign_flip_p(values, 101, 3)
    monkeypatch.setattr("oppu_ray.statistics._CHUNK", 64 * 37)
    assert bootstrap_interval(values, 101, 3) == whole[0]
    monkeypatch.setattr("oppu_ray.statistics._CHUNK", 1)
    assert bootstrap_interval(values, 101, 3) == whole[0]
    assert sign_flip_p(values, 101, 3) == pytest.approx(whole[1], abs=0.15)  # other draws, the same test


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(random.exponential(1.0, 80), 300, number) for number in range(300)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98  # 300 trials of .95 (a little less for skewed values): within three deviations


def test_sign_flips_give_the_exact_p_value() -> None:
    values = np.array([0.3, 1.2, -0.4, 0.9, 2.0, 0.1, 0.7, -0.2])
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    exact = np.mean(np.abs(signs @ values) >= values.sum() - 1e-9)
    assert sign_flip_p(values, 40_000, 0) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(values, 1000, 0) == sign_flip_p(-values, 1000, 0)
    assert sign_flip_p(np.zeros(5), 100, 0) == 1.0
    assert sign_flip_p(np.ones(50), 99, 0) == 0.01  # never zero


def test_p_values_are_uniform_where_there_is_nothing() -> None:
    random = np.random.default_rng(2)
    p_values = [sign_flip_p(random.standard_t(3, 30), 400, number) for number in range(400)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.033)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.05)


def test_holms_correction_on_the_textbooks_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_the_queries_needed_have_the_closed_form_and_the_power() -> None:
    assert num_needed(0.5, 1.0) == 32  # (1.96 + 0.8416)^2 / 0.25 = 31.4
    assert num_needed(0.05, 0.5) == 785
    assert num_needed(5.0, 1e-9) == 2
    random = np.random.default_rng(3)
    found = [abs(sample.mean()) > 1.96 / np.sqrt(32) for sample in random.normal(0.5, 1.0, (2000, 32))]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="above 0"):
        num_needed(0.0, 1.0)


def test_concentration_is_the_share_of_the_top_users() -> None:
    curve = concentration(np.array([1.0, 6.0, 2.0, 1.0]))
    assert curve is not None and curve.tolist() == [0.6, 0.8, 0.9, 1.0]
    with_a_loser = concentration(np.array([5.0, -1.0]))
    assert with_a_loser is not None and with_a_loser.tolist() == [1.25, 1.0]
    assert concentration(np.array([1.0, -1.0])) is None


def test_a_gain_is_over_queries_and_over_users() -> None:
    gain = paired_gain(np.array([1.0, 1.0, 0.0, -1.0]), ["ann", "ann", "ann", "bob"], 500, 0)
    assert (gain.mean, gain.num_queries, gain.num_users) == (0.25, 4, 2)
    assert gain.by_user_mean == pytest.approx(-1 / 6)
    assert gain.top_share == 2.0  # Ann holds twice what is left after Bob's loss
    assert (gain.by_user_low, gain.by_user_high) == (-1.0, pytest.approx(2 / 3))


def test_the_deviation_grows_when_a_users_queries_agree() -> None:
    values = np.random.default_rng(4).normal(0.0, 1.0, 200)
    alone = paired_gain(values, [str(number) for number in range(200)], 10, 0)
    assert alone.sd == pytest.approx(values.std(ddof=1))
    repeated = paired_gain(np.repeat(values, 5), [str(number) for number in range(200) for _ in range(5)], 10, 0)
    assert repeated.sd == pytest.approx(alone.sd * np.sqrt(5))  # five equal queries tell what one tells
    one_user = paired_gain(values, ["ann"] * 200, 10, 0)
    assert one_user.sd == pytest.approx(values.std(ddof=1))


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one query, got 0 and 0"):
        paired_gain(np.array([]), [], 10, 0)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_gain(np.ones(2), ["ann"], 10, 0)
