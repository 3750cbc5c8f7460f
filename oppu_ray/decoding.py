"""LoRA and cache attention of answering passes, token by token (under `adapters` and `kv_cache`).

In: tensors of one pass: prompts, pieces of prompts, or one new token per row. Out: the same functions as in `adapters`
and `attention`.
Design: each token is computed by the same instructions in the same order, however a prompt is cut into passes, whether
a token is read or decoded, and whatever else is in the pass. Training uses products over each slot's tokens instead,
which are faster and round differently. Without the C++, or on a GPU, PyTorch computes the same up to rounding.

Shapes: T tokens (B rows of one token each, where all are decoded), N parts, H query heads, G key heads, W head width,
S slots, R rank, I and O widths of a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oppu_ray.kernels import fused
from oppu_ray.native import native

RowLora = tuple[Tensor, Tensor, Tensor, Tensor]  # slot_T, scaling_T, a_SRI, b_SOR


@fused
def _lora_rows(x_TI: Tensor, y_TO: Tensor, lora: RowLora) -> Tensor:
    slot_T, scaling_T, a_SRI, b_SOR = lora
    low_TR = (x_TI[:, None].float() * a_SRI[slot_T].float()).sum(-1) * scaling_T[:, None]
    added_TO = (low_TR[:, None] * b_SOR[slot_T].float()).sum(-1)
    return torch.where(scaling_T[:, None] != 0, y_TO.float() + added_TO, y_TO.float()).to(y_TO.dtype)


def add_lora_rows(x_TI: Tensor, y_TO: Tensor, lora: RowLora) -> Tensor:
    """y + scaling * (x A^T) B^T with each token's own slot; a token of scaling 0 is y itself, whatever its slot holds.

    May write over y. Each slot's A is dense, B may lie either way. They are read where they lie: that takes most of the
    time, 40 us for 32 tokens of 32 slots of rank 8.
    """
    slot_T, scaling_T, a_SRI, b_SOR = lora
    function = native("add_lora_rows", x_TI, y_TO, a_SRI, b_SOR)
    if function is None:
        return _lora_rows(x_TI, y_TO, lora)
    x_TI, y_TO = x_TI.contiguous(), y_TO.contiguous()
    stacks = (a_SRI, a_SRI.stride(0), b_SOR, *b_SOR.stride())
    function(*x_TI.shape, *b_SOR.shape[1:], x_TI, y_TO, slot_T, scaling_T, *stacks)
    return y_TO


def attend_cached(
    q_THW: Tensor,
    k_TGW: Tensor,
    v_TGW: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    parts_N4: Tensor,
    scale: float,
    window: int,
) -> Tensor | None:
    """Store each part's new keys and values at the end of what its row holds, and attend to that, [T, H, W].

    Args:
        cos_sin: Each [T, 1, W], to turn queries and keys by; None if they are.
        keys, values: [rows, G, positions, W] of the cache.
        parts_N4: int64 on the CPU: first token, number of tokens, row of the cache, first free position of the row.
            Several parts may belong to one row.
        window: How many positions back a token sees; 0 for all.

    Returns:
        None if this is not to be had here; nothing is stored then.
    """
    function = native("attend_cached", q_THW, k_TGW, v_TGW, keys, *(cos_sin or ()))
    if function is None:
        return None
    q_THW, k_TGW, v_TGW = q_THW.contiguous(), k_TGW.contiguous(), v_TGW.contiguous()
    cos, sin = (x.contiguous() for x in cos_sin) if cos_sin else (None, None)
    out_THW = torch.empty_like(q_THW)
    shape = (q_THW.shape[1], *k_TGW.shape[1:], scale, window)
    given = (q_THW, k_TGW, v_TGW, cos, sin, keys, values, *keys.stride()[:2])
    function(len(parts_N4), parts_N4, *shape, *given, out_THW)
    return out_THW
