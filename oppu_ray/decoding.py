"""What a decoding step does for each of its rows: LoRA, and attention to the cache (under `adapters` and `kv_cache`).

In: tensors of one new token per row. Out: the same functions as in `adapters` and `attention`. The decision a reader
would question: that one-token steps have code of their own. A call costs more there than what it computes, so a layer
is a few calls of C++; without it, or on a GPU, PyTorch does everything here.

Shapes: B rows, H query heads, G key heads, W head width, S slots, R rank, I and O widths of a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oppu_ray.kernels import fused
from oppu_ray.native import native

RowLora = tuple[Tensor, Tensor, Tensor, Tensor]  # slot_B, scaling_B, a_SRI, b_SOR


@fused
def _lora_rows(x_BI: Tensor, y_BO: Tensor, lora: RowLora) -> Tensor:
    slot_B, scaling_B, a_SRI, b_SOR = lora
    low_BR = (x_BI[:, None].float() * a_SRI[slot_B].float()).sum(-1) * scaling_B[:, None]
    added_BO = (low_BR[:, None] * b_SOR[slot_B].float()).sum(-1)
    return torch.where(scaling_B[:, None] != 0, y_BO.float() + added_BO, y_BO.float()).to(y_BO.dtype)


def add_lora_rows(x_BI: Tensor, y_BO: Tensor, lora: RowLora) -> Tensor:
    """y + scaling * (x A^T) B^T with each row's own slot; a row of scaling 0 is y itself, whatever its slot holds.

    May write over y. Each slot's A is dense, B may lie either way. They are read where they lie: that takes most of the
    time, 40 us for 32 rows of rank 8.
    """
    slot_B, scaling_B, a_SRI, b_SOR = lora
    function = native("add_lora_rows", x_BI, y_BO, a_SRI, b_SOR)
    if function is None:
        return _lora_rows(x_BI, y_BO, lora)
    x_BI, y_BO = x_BI.contiguous(), y_BO.contiguous()
    stacks = (a_SRI, a_SRI.stride(0), b_SOR, *b_SOR.stride())
    function(*x_BI.shape, *b_SOR.shape[1:], x_BI, y_BO, slot_B, scaling_B, *stacks)
    return y_BO


def attend_rows(
    q_BHW: Tensor,
    k_BGW: Tensor,
    v_BGW: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int,
) -> Tensor | None:
    """Store each row's new key and value at the end of what it holds, and attend to that, [B, H, W].

    Args:
        cos_sin: Each [B, 1, W], to turn queries and keys by; None if they are.
        keys, values: [rows, G, positions, W] of the cache, at least B rows.
        lengths_B: Positions each row holds before.
        window: How many positions back a token sees; 0 for all.

    Returns:
        None if this is not to be had here; nothing is stored then.
    """
    function = native("attend_rows", q_BHW, k_BGW, v_BGW, keys, *(cos_sin or ()))
    if function is None:
        return None
    q_BHW, k_BGW, v_BGW = q_BHW.contiguous(), k_BGW.contiguous(), v_BGW.contiguous()
    cos, sin = (x.contiguous() for x in cos_sin) if cos_sin else (None, None)
    out_BHW = torch.empty_like(q_BHW)
    shape = (*q_BHW.shape[:2], *k_BGW.shape[1:])
    function(*shape, q_BHW, k_BGW, v_BGW, cos, sin, keys, values, *keys.stride()[:2], lengths_B, window, scale, out_BHW)
    return out_BHW
