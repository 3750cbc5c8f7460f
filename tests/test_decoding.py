"""The C++ of a decoding step computes what PyTorch does, each row alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from reference import TYPES, close, rotary_by_complex_numbers
from tiny import tiny_config
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oppu_ray import native
from oppu_ray.attention import answer_attention, plan_segments
from oppu_ray.attention_groups import Segment
from oppu_ray.decoding import add_lora_rows, attend_cached
from oppu_ray.kernels import rotate as rotary
from oppu_ray.kv_cache import DecodePlan, Fill, KVCache, Part, decode_attention

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
        parts = torch.tensor([[place, 1, place, lengths[row]] for place, row in enumerate(rows)])
        out = attend_cached(q[rows], k[rows], v[rows], own, *filled, parts, 0.3, window)
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


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (2, 2, 128), (7, 1, 20)])
@pytest.mark.parametrize("window", [0, 3, 50])
def test_a_rows_attention_has_the_same_bits_however_it_is_cut(
    dtype: torch.dtype,
    tolerance: float,
    heads: int,
    key_heads: int,
    width: int,
    window: int,
    normal: Callable[..., Tensor],
) -> None:
    """A row of 200 positions: read at once, in pieces beside another row, decoded one by one, and in no cache."""
    q, k, v = ((normal(200, h, width) / 2).to(dtype) for h in (heads, key_heads, key_heads))
    angle = normal(200, 1, width // 2).repeat(1, 1, 2)
    cos_sin = (angle.cos().to(dtype), angle.sin().to(dtype))
    other = [(normal(9, h, width) / 2).to(dtype) for h in (heads, key_heads, key_heads, 1, 1)]

    def run(cuts: list[int], beside: bool = False) -> tuple[Tensor, Tensor]:
        cache, out = torch.zeros(2, 3, key_heads, 256, width, dtype=dtype), []
        for start, stop in itertools.pairwise([0, *cuts, 200]):
            parts, tensors = [[0, stop - start, 1, start]], [x[start:stop] for x in (q, k, v, *cos_sin)]
            if beside:
                parts = [[0, 9, 0, start], [9, stop - start, 1, start]]
                tensors = [torch.cat(pair) for pair in zip(other, tensors, strict=True)]
            *qkv, cos, sin = tensors
            found = attend_cached(*qkv, (cos, sin), *cache, torch.tensor(parts), 0.3, window)
            assert found is not None
            out.append(found[-(stop - start) :])
        return torch.cat(out), cache[:, 1]

    whole, held = run([])
    for cuts, beside in (([1, 2, 77, 130], False), ([33, 64, 199], True), (list(range(1, 200)), False)):
        found, also_held = run(cuts, beside)
        assert torch.equal(found, whole) and torch.equal(also_held, held)
    turned_q, turned_k = (rotary(x, *cos_sin) for x in (q, k))
    stream = plan_segments([Segment(0, 40), Segment(40, 200, 0, 40)], q.device)
    assert torch.equal(answer_attention(turned_q, turned_k, v, stream, 0, 0.3, window), whole)
    age_QK = torch.arange(200)[:, None] - torch.arange(200)
    seen_QK = (age_QK >= 0) & (age_QK < (window or 200))
    qkv = (x.double().transpose(0, 1) for x in (turned_q, turned_k, v))
    expected = scaled_dot_product_attention(*qkv, attn_mask=seen_QK, scale=0.3, enable_gqa=True)
    close(whole, expected.transpose(0, 1), 2 * tolerance)


def test_a_plan_beyond_the_cache_is_refused() -> None:
    cache = KVCache(tiny_config("llama"), 2, 20, torch.zeros(()))
    cache.reserve(8)
    held = cache.layers.shape[4]
    assert DecodePlan(cache, [0, held - 1]).num_keys == held
    for lengths in ([0, 0, 0], [held]):
        with pytest.raises(IndexError, match=f"in a cache of 2 and {held}"):
            DecodePlan(cache, lengths)
    q = torch.randn(5, 4, 16)
    for part in (Part(0, 5, 2, 0), Part(0, 5, 1, held - 4)):
        with pytest.raises(IndexError, match=f"in a cache of 2 and {held}"):
            Fill(cache, [part]).attend(0, q, q[:, :2], q[:, :2], 1.0, 0, None)
    with pytest.raises(IndexError, match="5 queries, in parts of 4 tokens"):
        Fill(cache, [Part(0, 4, 1, 0)]).attend(0, q, q[:, :2], q[:, :2], 1.0, 0, None)


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

    def read() -> tuple[Tensor, Tensor]:
        """The second row's first token, and one more of the third's."""
        own = copy.deepcopy(cache)
        plan = plan_segments([Segment(0, 1), Segment(1, 3)], q.device)
        plan.fill = Fill(own, [Part(0, 1, 1, 0), Part(1, 3, 2, 33)])
        return answer_attention(q, k, v, plan, 1, 0.3, window, cos_sin), own.layers

    expected = *run(), *read()
    monkeypatch.setattr(native, "functions", dict)
    for one, other in zip((*run(), *read()), expected, strict=True):
        close(one, other, tolerance)
    assert not any(torch.equal(filled, cache.layers) for filled in expected[1::2])
