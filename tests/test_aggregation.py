"""Shards' updates become the next adapter: exactly where that is promised, in whatever order or with what poison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oppu_ray.aggregation import (
    RoundState,
    Update,
    best_factors,
    check_sum,
    cut_rank,
    flatten,
    from_ring,
    join_rank,
    moved,
    moved_by_products,
    screen,
    to_ring,
    trained_keys,
    trimmed_mean,
    unflatten,
    weighted_mean,
)
from oppu_ray.config import FederatedConfig

NAME = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{NAME}.lora_{part}.weight" for part in "AB")
OUT, IN, RANK, SCALING = 12, 10, 3, 2.0


def adapter(seed: int, rank: int = RANK) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed)
    shapes = {A: (rank, IN), B: (OUT, rank)}
    return {key: drawn.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def product(one: dict[str, np.ndarray]) -> np.ndarray:
    return SCALING * one[B].astype(np.float64) @ one[A]


def honest(num: int, seed: int = 0, size: int = 200) -> list[Update]:
    """Updates that agree on a direction, up to noise."""
    drawn = np.random.default_rng(seed)
    common = drawn.normal(size=size)
    return [Update(shard, (common + drawn.normal(size=size)).astype(np.float32), 100.0 + shard) for shard in range(num)]


def test_the_mean_has_the_same_bits_in_any_order_and_is_the_weighted_one() -> None:
    updates = honest(8)
    mean = weighted_mean(updates)
    assert np.array_equal(mean, weighted_mean(updates[::-1]))
    expected = np.average([u.delta_N for u in updates], axis=0, weights=[u.weight for u in updates])
    assert np.abs(mean - expected).max() < 1e-9
    assert from_ring(to_ring(updates[1].delta_N, 101.0))[1] == 101.0


def test_random_numbers_are_no_sum_of_updates() -> None:
    parts = [to_ring(update.delta_N, update.weight) for update in honest(5)]
    total = np.sum(parts, axis=0, dtype=np.uint64)
    check_sum(total, 5)
    check_sum(total * np.uint64(0), 5)
    drawn = np.random.default_rng(0).integers(0, 2**64, total.shape, np.uint64)
    with pytest.raises(ValueError, match="its largest number is"):
        check_sum(drawn, 5)
    with pytest.raises(ValueError, match="its weight -"):
        check_sum(np.negative(total), 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**28])
def test_what_no_sum_can_hold_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected below 2"):
        to_ring(np.array([0.0, bad], np.float32), 1.0)


def test_the_product_is_the_exact_mean_of_the_merged_weights_over_rounds() -> None:
    state = RoundState(0, adapter(0))
    keys = trained_keys(state.adapter, "product")
    for number in range(3):
        trained = [adapter(10 * number + shard + 1) for shard in range(5)]
        weights = [1.0, 2.0, 3.0, 4.0, 5.0]
        before = state.residual.get(NAME, 0.0)
        updates = [
            Update(shard, flatten(one, keys) - flatten(state.adapter, keys), weight)
            for shard, (one, weight) in enumerate(zip(trained, weights, strict=True))
        ]
        merged = before + np.average([product(one) for one in trained], axis=0, weights=weights)
        state = moved_by_products(state, updates, SCALING)
        assert np.abs(state.residual[NAME] + product(state.adapter) - merged).max() < 1e-5
        assert state.num_rounds == number + 1 and state.adapter[A].shape == (RANK, IN)
        assert np.abs(state.adapter[A] @ state.adapter[A].T - np.eye(RANK)).max() < 1e-6
        naive = {key: np.average([one[key] for one in trained], axis=0, weights=weights) for key in keys}
        assert np.abs(before + product(naive) - merged).max() > 0.1  # what this is all about


def test_the_factors_are_the_nearest_of_their_rank() -> None:
    drawn = np.random.default_rng(1)
    wide, tall = drawn.normal(size=(OUT, 8)), drawn.normal(size=(8, IN))
    b, a = best_factors(wide, tall, RANK)
    lost = np.linalg.norm(wide @ tall - b @ a)
    assert lost == pytest.approx(np.sqrt((np.linalg.svd(wide @ tall)[1][RANK:] ** 2).sum()))


def test_with_a_frozen_the_mean_of_b_is_the_mean_of_the_products() -> None:
    state = RoundState(0, adapter(0))
    keys = trained_keys(state.adapter, "ffa")
    assert keys == [B]
    trained = [{A: state.adapter[A], B: adapter(shard + 1)[B]} for shard in range(4)]
    updates = [
        Update(shard, flatten(one, keys) - flatten(state.adapter, keys), 1.0 + shard)
        for shard, one in enumerate(trained)
    ]
    after = moved(state, weighted_mean(updates), FederatedConfig(method="ffa"))
    expected = np.average([product(one) for one in trained], axis=0, weights=[1.0, 2.0, 3.0, 4.0])
    assert np.abs(product(after.adapter) - expected).max() < 1e-5
    assert np.array_equal(after.adapter[A], state.adapter[A])


def test_the_server_takes_reddis_adam_step() -> None:
    config = FederatedConfig(method="ffa", server="adam", server_rate=0.5)
    state = RoundState(0, adapter(0))
    first, second = (np.full(OUT * RANK, value) for value in (0.3, -0.1))
    state = moved(moved(state, first, config), second, config)
    mean = 0.9 * 0.1 * 0.3 + 0.1 * -0.1
    square = 0.99 * 0.01 * 0.3**2 + 0.01 * 0.1**2
    steps = 0.5 * 0.1 * 0.3 / (0.1 * 0.3 + 1e-3) + 0.5 * mean / (square**0.5 + 1e-3)
    assert np.allclose(state.adapter[B], adapter(0)[B] + steps, atol=1e-6)
    assert state.num_rounds == 2 and np.allclose(state.mean[B], mean) and np.allclose(state.square[B], square)


def test_ranks_are_cut_and_joined() -> None:
    whole = adapter(3)
    head, rest = cut_rank(whole, 2)
    assert head[A].shape == (2, IN) and rest[B].shape == (OUT, 1)
    joined = join_rank(head, rest)
    assert all(np.array_equal(joined[key], whole[key]) for key in whole)
    assert np.allclose(product(head) + product(rest), product(whole), atol=1e-6)
    back = unflatten(flatten(whole, sorted(whole)), whole, sorted(whole))
    assert all(np.array_equal(back[key], whole[key]) for key in whole)


@pytest.mark.parametrize("robust", ["none", "clip", "trim"])
def test_an_update_that_is_not_finite_is_always_left_out_and_named(robust: str) -> None:
    updates = honest(8)
    updates[5].delta_N[3] = np.nan
    kept, found = screen(updates, FederatedConfig(robust=robust))
    assert [update.shard for update in kept] == [0, 1, 2, 3, 4, 6, 7]
    assert found == {5: "its update is not finite"}


@pytest.mark.parametrize("robust", ["none", "clip", "trim"])
@pytest.mark.parametrize(
    ("factor", "weight", "reason"),
    [
        (1.0, np.nan, "its weight is nan"),
        (1.0, np.inf, "its weight is inf"),
        (1.0, -100.0, "its weight is -100"),
        (1.0, 1e30, "its weight is 1e+30"),
        (1e30, 100.0, "too large for a sum"),
    ],
)
def test_what_no_sum_can_hold_is_always_left_out_and_named(
    robust: str, factor: float, weight: float, reason: str
) -> None:
    updates = honest(8)
    updates[5] = replace(updates[5], delta_N=updates[5].delta_N * np.float32(factor), weight=weight)
    kept, found = screen(updates, FederatedConfig(robust=robust))
    assert [update.shard for update in kept] == [0, 1, 2, 3, 4, 6, 7]
    assert list(found) == [5] and reason in found[5]
    assert np.isfinite(weighted_mean(kept)).all()


def test_a_shard_that_says_it_weighs_more_than_all_others_does_not() -> None:
    updates = honest(8)
    updates[2] = replace(updates[2], delta_N=updates[2].delta_N * 3, weight=1e6)
    kept, found = screen(updates, FederatedConfig(robust="clip"))
    assert kept[2].weight == pytest.approx(2.0 * np.median([update.weight for update in updates]))
    assert list(found) == [2] and "medians long, cut to size; its weight is " in found[2]
    updates[2] = replace(updates[2], delta_N=honest(8)[2].delta_N)
    assert screen(updates, FederatedConfig(robust="clip"))[1] == {2: "its weight is 9569.4 medians, cut to size"}
    assert screen(updates, FederatedConfig(robust="trim"))[1] == {}  # which does not weigh


def test_an_overlong_update_is_cut_and_named() -> None:
    updates = honest(8)
    updates[2] = replace(updates[2], delta_N=updates[2].delta_N * 1000)
    kept, found = screen(updates, FederatedConfig(robust="clip"))
    assert list(found) == [2] and "medians long, cut to size" in found[2]
    norms = [float(np.linalg.norm(update.delta_N)) for update in kept]
    assert norms[2] == pytest.approx(2.0 * np.median([np.linalg.norm(u.delta_N) for u in updates]), rel=1e-5)
    good = weighted_mean(honest(8))
    assert np.linalg.norm(weighted_mean(kept) - good) < 0.3 * np.linalg.norm(good)
    assert np.linalg.norm(weighted_mean(updates) - good) > 10 * np.linalg.norm(good)  # without the cut


@pytest.mark.parametrize("factor", [-1.0, -1000.0])
def test_a_flipped_update_is_left_out_and_named(factor: float) -> None:
    updates = honest(8)
    updates[0] = replace(updates[0], delta_N=updates[0].delta_N * np.float32(factor))
    kept, found = screen(updates, FederatedConfig(robust="clip"))
    assert 0 not in [update.shard for update in kept] and "points against the others (cosine -0." in found[0]
    assert screen(honest(8), FederatedConfig(robust="clip"))[1] == {}
    assert screen(updates, FederatedConfig())[1] == {}  # and only if asked


def test_a_trimmed_mean_stays_among_the_honest() -> None:
    updates = honest(8)
    good = np.stack([update.delta_N for update in updates[1:]])
    updates[0] = replace(updates[0], delta_N=updates[0].delta_N * np.float32(-1000))
    mean = trimmed_mean(updates, 0.2)
    assert (mean >= good.min(axis=0) - 1e-6).all() and (mean <= good.max(axis=0) + 1e-6).all()
    assert np.array_equal(
        trimmed_mean(updates[:2], 0.4), np.mean([u.delta_N for u in updates[:2]], axis=0, dtype=float)
    )
