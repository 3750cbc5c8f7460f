"""Keys and values of the rows being answered, and attention over them (it stands inside `inference`).

In: each layer's new queries, keys and values. Out: their attention to everything their own row holds.
The decision a reader would question: a row is one stretch of memory, moved when a gap opens, not a list of pages. Rows
0 to B - 1 are always the ones being decoded, so one step attends with one call per layer and copies nothing. What a
row does not fill is zero, always: a masked NaN left over by another user would still pass a mask (0 * NaN is NaN).

Shapes: B rows, T tokens of a stream, L tokens of one row, K positions of the longest row, H query heads, G key heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oppu_ray.decoding import attend_cached
from oppu_ray.kernels import rotate

GROWTH = 256
PIECE = 128  # tokens of a part that one thread computes at a time


class KVCache:
    """`layers` is [layers, 2 (keys, values), rows, key heads, positions, D]; positions grow with need.

    Args:
        config: The model's, of its text part.
        max_positions: Most positions of a row.
        like: Gives dtype and device.
    """

    def __init__(self, config: Any, num_rows: int, max_positions: int, like: Tensor):
        self.max_positions = max_positions
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = like.new_zeros((config.num_hidden_layers, 2, num_rows, num_heads, 0, head_dim))

    def reserve(self, num_positions: int) -> None:
        """Make room for rows of `num_positions`."""
        present = self.layers.shape[4]
        if num_positions > present:
            wanted = min(-(-num_positions // GROWTH) * GROWTH, self.max_positions)
            grown = self.layers.new_zeros((*self.layers.shape[:4], wanted, self.layers.shape[5]))
            grown[..., :present, :] = self.layers
            self.layers = grown

    def read(self, row: int, length: int) -> Tensor:
        """A copy of a row's first positions, [layers, 2, key heads, length, D]."""
        return self.layers[:, :, row, :, :length].clone()

    def write(self, row: int, values: Tensor) -> None:
        """The inverse of `read`."""
        self.layers[:, :, row, :, : values.shape[3]] = values

    def clear(self, row: int, length: int) -> None:
        """Zero a row that filled `length` positions."""
        self.layers[:, :, row, :, :length] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Move a row that fills `length` positions to a cleared one."""
        self.layers[:, :, target, :, :length] = self.layers[:, :, source, :, :length]
        self.clear(source, length)


@dataclass
class DecodePlan:
    """One new token for each of the first B rows of `cache`, whose lengths before it are `lengths`."""

    cache: KVCache
    lengths: Sequence[int]
    _biases: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        device = self.cache.layers.device
        self.rows_B = torch.arange(len(self.lengths), device=device)
        self.lengths_B = torch.tensor(self.lengths, device=device)
        self.num_keys = max(self.lengths) + 1
        parts = [Part(row, row + 1, row, length) for row, length in enumerate(self.lengths)]
        self.parts_N4 = _part_table(self.cache, parts)

    def bias(self, window: int) -> Tensor:
        """[B, 1, 1, K]: 0 where a row's new token may see a position, -inf where not. Made once per step and window."""
        if window not in self._biases:
            layers = self.cache.layers
            age_BK = self.lengths_B[:, None] - torch.arange(self.num_keys, device=layers.device)
            seen_BK = (age_BK >= 0) & (age_BK < window) if window else age_BK >= 0
            bias_BK = layers.new_zeros(seen_BK.shape).masked_fill_(~seen_BK, float("-inf"))
            self._biases[window] = bias_BK[:, None, None]
        return self._biases[window]


def decode_attention(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    plan: DecodePlan,
    layer: int,
    scale: float,
    window: int,
    cos_sin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Store one token per row and attend to its row, [B, H, D].

    `window` 0 means no sliding window. `cos_sin`, each [B, 1, D], turn queries and keys that are not turned yet.
    """
    keys, values = plan.cache.layers[layer]
    out_BHD = attend_cached(q_BHD, k_BGD, v_BGD, cos_sin, keys, values, plan.parts_N4, scale, window)
    if out_BHD is not None:
        return out_BHD
    if cos_sin:
        q_BHD, k_BGD = rotate(q_BHD, *cos_sin), rotate(k_BGD, *cos_sin)
    keys[plan.rows_B, :, plan.lengths_B], values[plan.rows_B, :, plan.lengths_B] = k_BGD, v_BGD
    num, num_keys = len(plan.lengths), plan.num_keys
    return scaled_dot_product_attention(
        q_BHD[:, :, None],
        keys[:num, :, :num_keys],
        values[:num, :, :num_keys],
        attn_mask=plan.bias(window),
        scale=scale,
        enable_gqa=True,
    )[:, :, 0]


@dataclass(frozen=True)
class Part:
    """Tokens [start, stop) of a stream follow the first `done` positions of cache row `row`."""

    start: int
    stop: int
    row: int
    done: int


def _part_table(cache: KVCache, parts: Sequence[Part]) -> Tensor:
    """[N, 4] for `attend_cached`."""
    num_rows, _, num_positions = cache.layers.shape[2:5]
    wanted_rows = max(part.row for part in parts) + 1
    wanted = max(part.done + part.stop - part.start for part in parts)
    if wanted_rows > num_rows or wanted > num_positions:  # nothing behind here looks
        here = f"a cache of {num_rows} and {num_positions}"
        raise IndexError(f"{wanted_rows} rows of up to {wanted} positions in {here}")
    return torch.tensor([[part.start, part.stop - part.start, part.row, part.done] for part in parts])


@dataclass(frozen=True)
class Fill:
    """Where a stream's keys and values go: its parts cover it in order, each a row's next positions."""

    cache: KVCache
    parts: Sequence[Part]

    @cached_property
    def pieces_N4(self) -> Tensor:
        """The parts, in pieces for several threads."""
        pieces = [
            Part(start, min(start + PIECE, part.stop), part.row, part.done + start - part.start)
            for part in self.parts
            for start in range(part.start, part.stop, PIECE)
        ]
        return _part_table(self.cache, pieces)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and position of each token, for PyTorch."""
        device = self.cache.layers.device
        rows = [torch.full((part.stop - part.start,), part.row) for part in self.parts]
        positions = [torch.arange(part.done, part.done + part.stop - part.start) for part in self.parts]
        return torch.cat(rows).to(device), torch.cat(positions).to(device)

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        scale: float,
        window: int,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """Keep keys and values, and attend to all that each token's row holds up to it; None where there is no C++."""
        if len(q_THD) != self.parts[-1].stop:  # nothing behind here looks
            raise IndexError(f"{len(q_THD)} queries, in parts of {self.parts[-1].stop} tokens")
        keys, values = self.cache.layers[layer]
        return attend_cached(q_THD, k_TGD, v_TGD, cos_sin, keys, values, self.pieces_N4, scale, window)

    def apply(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, out_THD: Tensor, scale: float, window: int
    ) -> None:
        """The same by PyTorch, where `out_THD` is right already for tokens whose row held nothing before."""
        keys, values = self.cache.layers[layer]
        rows_T, positions_T = self.places
        keys[rows_T, :, positions_T], values[rows_T, :, positions_T] = k_TGD, v_TGD
        for part in self.parts:
            if not part.done:
                continue
            position_K = torch.arange(part.done + part.stop - part.start, device=q_THD.device)
            stop, age_LK = len(position_K), position_K[part.done :, None] - position_K
            seen_LK = (age_LK >= 0) & (age_LK < window) if window else age_LK >= 0
            out_THD[part.start : part.stop] = scaled_dot_product_attention(
                q_THD[None, part.start : part.stop].transpose(1, 2),
                keys[None, part.row, :, :stop],
                values[None, part.row, :, :stop],
                attn_mask=seen_LK,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
