"""The C++ of a decoding step computes what PyTorch does, each row alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from reference import TYPES, close, rotary_by_complex_numbers
from tiny import tiny_config
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oppu_ray import native
from oppu_ray.decoding import add_lora_rows, attend_rows
from oppu_ray.kv_cache import DecodePlan, KVCache, decode_attention

NAN = float("nan")


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("b_lies_as", ["rank by out", "out by rank"])
def test_each_row_is_adapted_by_its_own_slot(
    dtype: torch.dtype, tolerance: float, b_lies_as: str, normal: Callable[..., Tensor], made_by: str
) -> None:
    """A row of scaling 0 takes nothing from its slot, not even NaN."""
    slot_B, scaling_B = torch.tensor([2, 0, 1, 2]), torch.tensor([1.0, 0.5, 0.0, 1.0])
    x, y, a = normal(4, 24).to(dtype), normal(4, 80).to(dtype), normal(3, 5, 24).to(dtype)
    b = normal(3, 80, 5).to(dtype)
    if b_lies_as == "rank by out":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    a[1], b[1] = NAN, NAN

    def run(rows: list[int]) -> Tensor:
        return add_lora_rows(x[rows], y[rows], (slot_B[rows], scaling_B[rows], a, b))

    found = run([0, 1, 2, 3])
    for row, (slot, scaling) in enumerate(zip(slot_B.tolist(), scaling_B.tolist(), strict=True)):
        added = x[row].double() @ a[slot].double().T @ b[slot].double().T * scaling if scaling else 0
        close(found[row], y[row].double() + added, 2 * tolerance)
    assert torch.equal(found[2], y[2])
    if made_by == "C++":
        assert all(torch.equal(run([row])[0], found[row]) for row in range(4))
    a[2] *= -3
    changed = run([0, 1, 2, 3])
    assert torch.equal(changed[1:3], found[1:3]) and not torch.equal(changed[[0, 3]], found[[0, 3]])


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (2, 2, 128), (3, 1, 20)])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_each_row_attends_to_what_it_holds(
    dtype: torch.dtype,
    tolerance: float,
    heads: int,
    key_heads: int,
    width: int,
    window: int,
    turned: bool,
    normal: Callable[..., Tensor],
) -> None:
    lengths, num_rows = [0, 70, 9, 2], 4
    cache = normal(2, 6, key_heads, 90, width).to(dtype)  # with room for more rows and positions than there are
    q, k, v = (normal(num_rows, h, width).to(dtype) for h in (heads, key_heads, key_heads))
    angle = normal(num_rows, 1, width // 2).repeat(1, 1, 2)
    cos_sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None

    def run(rows: list[int], filled: Tensor) -> Tensor:
        own = None if cos_sin is None else (cos_sin[0][rows], cos_sin[1][rows])
        held = torch.tensor([lengths[row] for row in rows])
        out = attend_rows(q[rows], k[rows], v[rows], own, *filled, held, 0.3, window)
        assert out is not None
        return out

    filled = cache.clone()
    found = run([0, 1, 2, 3], filled)
    queries, new_keys = q.double(), k.double()
    if cos_sin:
        queries, new_keys = rotary_by_complex_numbers(queries, new_keys, angle[:, 0].cos(), angle[:, 0].sin())
    for row, length in enumerate(lengths):
        query = queries[row]
        close(filled[0, row, :, length], new_keys[row], tolerance)
        assert torch.equal(filled[1, row, :, length], v[row])
        first = max(length + 1 - window, 0) if window else 0
        keys, values = filled[:, row, :, first : length + 1].double()
        expected = scaled_dot_product_attention(query[:, None], keys, values, scale=0.3, enable_gqa=True)[:, 0]
        close(found[row], expected, tolerance)
    untouched = torch.ones_like(cache, dtype=torch.bool)
    untouched[:, range(num_rows), :, lengths] = False
    assert torch.equal(filled[untouched], cache[untouched])

    alone = cache[:, 1:].clone()
    assert torch.equal(run([1], alone)[0], found[1]) and torch.equal(alone[:, 0], filled[:, 1])
    q[2] = NAN
    beside = run([0, 1, 2, 3], cache.clone())
    assert beside[2].isnan().all() and torch.equal(beside[[0, 1, 3]], found[[0, 1, 3]])


def test_a_plan_beyond_the_cache_is_refused() -> None:
    cache = KVCache(tiny_config("llama"), 2, 20, torch.zeros(()))
    cache.reserve(8)
    held = cache.layers.shape[4]
    assert DecodePlan(cache, [0, held - 1]).num_keys == held
    for lengths in ([0, 0, 0], [held]):
        with pytest.raises(IndexError, match=f"in a cache of 2 and {held}"):
            DecodePlan(cache, lengths)


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_pytorch_stores_and_attends_alike(
    dtype: torch.dtype,
    tolerance: float,
    window: int,
    turned: bool,
    normal: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = KVCache(tiny_config("llama"), 3, 40, torch.zeros((), dtype=dtype))
    cache.reserve(40)
    _, _, _, key_heads, _, width = cache.layers.shape
    lengths = [5, 0, 33]
    for row, length in enumerate(lengths):
        cache.write(row, normal(len(cache.layers), 2, key_heads, length, width).to(dtype))
    q, k, v = (normal(3, h, width).to(dtype) for h in (2 * key_heads, key_heads, key_heads))
    angle = normal(3, 1, width // 2).repeat(1, 1, 2)
    cos_sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None

    def run() -> tuple[Tensor, Tensor]:
        own = copy.deepcopy(cache)
        return decode_attention(q, k, v, DecodePlan(own, lengths), 1, 0.3, window, cos_sin), own.layers

    expected, filled = run()
    monkeypatch.setattr(native, "functions", dict)
    found, also_filled = run()
    close(found, expected, tolerance)
    close(also_filled, filled, tolerance)
    assert not torch.equal(filled, cache.layers)
