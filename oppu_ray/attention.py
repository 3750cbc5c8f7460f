"""Attention over one flat stream of tokens that holds many users' rows (design decision D1).

In: queries, keys and values of T tokens laid end to end, and a plan that says which tokens belong together. Out: their
attention, [T, H * D]. A row is a prefix and suffixes; a suffix token sees the prefix and its own suffix up to itself.
The decision a reader would question: instead of one block mask over whole rows, tokens are gathered into batches of
segments of similar length. A row of 100 + 16 x 60 tokens then costs 16 x 60 x 160 scores, not 1060 x 1060, and no
linear layer ever computes a padded token. The linear layers are where a plan pays; the gathers cost 3 % of a layer.

Plugs into any Hugging Face model that takes its attention from `AttentionInterface`, under the name "segments".

Shapes: T tokens, N segments, L queries of a segment, K keys of a segment, H query heads, G query heads per key head,
D head width, B rows of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from oppu_ray.kernels import fused

NAME = "segments"


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the stream attend causally to each other and to all of [prefix_start, prefix_stop)."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass
class Group:
    """Segments of similar length, padded to a common one.

    Args:
        query_NL: Stream position of each query. Padding repeats the segment's own first token: were it another user's,
            that user's NaN would spread.
        key_NK: Stream position of each key, prefix first; padded likewise.
        bias_NLK: 0 where the query may see the key, -inf where not, in the model's dtype. Padded queries see key 0.
        real_NL: 1 for a query, 0 for padding.
        distance_NLK: Query position minus key position, for layers with a sliding window.
        row_N: Number of the row each segment belongs to, counted over the rows with a prefix in this group; segments
            without one share a last row of their own that nobody reads.
        prefix_R: Stream positions of those rows' prefixes, end to end.
        padded_R: Their places in [rows, longest prefix].
    """

    query_NL: Tensor
    key_NK: Tensor
    bias_NLK: Tensor
    real_NL: Tensor
    distance_NLK: Tensor
    row_N: Tensor
    prefix_R: Tensor
    padded_R: Tensor
    _biases: dict[int | None, Tensor] = field(default_factory=dict, init=False)

    def bias(self, window: int | None, q_shape: torch.Size) -> Tensor:
        """[N, key heads, G * L, K], written out in full because a broadcast bias halves the speed of the softmax.

        Made once per stream and window size.
        """
        if window not in self._biases:
            bias_NLK = self.bias_NLK
            if window:
                bias_NLK = bias_NLK.masked_fill(self.distance_NLK >= window, float("-inf"))
            num_heads, num_rows = q_shape[1:3]
            self._biases[window] = bias_NLK[:, None].repeat(1, num_heads, num_rows // bias_NLK.shape[1], 1)
        return self._biases[window]


@dataclass
class SegmentPlan:
    """How one stream attends: `source_T[t]` is token t's place in the groups' queries, laid end to end."""

    groups: list[Group]
    source_T: Tensor
    cache: KVCache | None = None
    cache_rows_T: Tensor | None = None
    cache_positions_T: Tensor | None = None


@dataclass
class DecodePlan:
    """One new token for each of the first B rows of `cache`, whose lengths before it are `lengths_B`."""

    cache: KVCache
    lengths_B: Tensor
    longest: int


class KVCache:
    """Keys and values of rows being answered: per layer two tensors [rows, positions, key heads, D]."""

    def __init__(self, num_layers: int, num_rows: int, num_positions: int, num_heads: int, head_dim: int, like: Tensor):
        shape = (num_layers, 2, num_rows, num_positions, num_heads, head_dim)
        self.layers = torch.zeros(shape, dtype=like.dtype, device=like.device)

    @property
    def num_positions(self) -> int:
        return self.layers.shape[3]

    def clear(self, rows: slice) -> None:
        """Zero rows before they are used: a NaN left over by another user would pass a mask (0 * NaN is NaN)."""
        self.layers[:, :, rows] = 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        self.layers[:, :, target] = self.layers[:, :, source]


def plan_segments(
    segments: Sequence[Segment],
    positions: Sequence[int],
    like: Tensor,
    max_padding: float = 0.25,
) -> SegmentPlan:
    """Group segments of similar length.

    Args:
        segments: Cover every token of the stream exactly once.
        positions: Position id of each of the T tokens.
        like: Gives dtype and device of the biases.
        max_padding: A segment joins a group only if the group's length exceeds its own by less than this share.
    """
    order = sorted(range(len(segments)), key=lambda i: (_key_length(segments[i]), segments[i].stop - segments[i].start))
    batches: list[list[Segment]] = []
    for index in reversed(order):
        segment = segments[index]
        if batches and _fits(segment, batches[-1][0], max_padding):
            batches[-1].append(segment)
        else:
            batches.append([segment])
    source = torch.zeros(len(positions), dtype=torch.long)
    position_T = torch.as_tensor(positions)
    groups, offset = [], 0
    for batch in batches:
        group, places = _build_group(batch, position_T, like)
        for segment, place in zip(batch, places, strict=True):
            source[segment.start : segment.stop] = torch.arange(
                offset + place, offset + place + segment.stop - segment.start
            )
        offset += group.query_NL.numel()
        groups.append(group)
    return SegmentPlan(groups, source.to(like.device))


def _key_length(segment: Segment) -> int:
    return segment.stop - segment.start + segment.prefix_stop - segment.prefix_start


def _fits(segment: Segment, longest: Segment, max_padding: float) -> bool:
    own, most = segment.stop - segment.start, longest.stop - longest.start
    keys, most_keys = _key_length(segment), _key_length(longest)
    slack = 8
    return most_keys <= keys * (1 + max_padding) + slack and own <= most <= own * (1 + max_padding) + slack


def _build_group(batch: list[Segment], position_T: Tensor, like: Tensor) -> tuple[Group, list[int]]:
    num, longest = len(batch), max(s.stop - s.start for s in batch)
    prefix = max(s.prefix_stop - s.prefix_start for s in batch)
    start_N = torch.tensor([s.start for s in batch])
    query_NL = start_N[:, None].repeat(1, longest)
    key_NK = start_N[:, None].repeat(1, prefix + longest)
    own_N = torch.tensor([s.stop - s.start for s in batch])
    prefix_N = torch.tensor([s.prefix_stop - s.prefix_start for s in batch])
    for row, s in enumerate(batch):
        query_NL[row, : s.stop - s.start] = torch.arange(s.start, s.stop)
        key_NK[row, : s.prefix_stop - s.prefix_start] = torch.arange(s.prefix_start, s.prefix_stop)
        key_NK[row, prefix : prefix + s.stop - s.start] = torch.arange(s.start, s.stop)
    column_K, row_L = torch.arange(prefix + longest), torch.arange(longest)
    in_prefix_NK = column_K < prefix_N[:, None]
    causal_LK = (column_K >= prefix) & (column_K - prefix <= row_L[:, None])
    seen_NLK = in_prefix_NK[:, None] | causal_LK[None]
    real_NL = row_L < own_N[:, None]
    seen_NLK = torch.where(real_NL[..., None], seen_NLK, column_K == 0)
    bias_NLK = torch.zeros(seen_NLK.shape).masked_fill(~seen_NLK, float("-inf")).to(like)
    distance_NLK = position_T[query_NL][:, :, None] - position_T[key_NK][:, None, :]
    distance_NLK = torch.where(real_NL[..., None], distance_NLK, 0)
    stops = {s.prefix_start: s.prefix_stop for s in batch if s.prefix_stop > s.prefix_start}
    starts = sorted(stops)
    row_N = torch.tensor(
        [starts.index(s.prefix_start) if s.prefix_stop > s.prefix_start else len(starts) for s in batch]
    )
    spans = [torch.arange(start, stops[start]) for start in starts]
    places = [torch.arange(len(span)) + row * prefix for row, span in enumerate(spans)]
    prefix_R, padded_R = (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long) for parts in (spans, places))
    tensors = (query_NL, key_NK, bias_NLK, real_NL.to(like.dtype), distance_NLK, row_N, prefix_R, padded_R)
    return Group(*(t.to(like.device) for t in tensors)), [row * longest for row in range(num)]


@fused
def _exponentials(scores: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax before its division, and one over the row sums: dividing [L, K] here would compute each exp twice."""
    x = scores.float() * scale + bias.float()
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e.to(scores.dtype), 1 / e.sum(-1)


@fused
def _scores_gradient(grad: Tensor, e: Tensor, inverse: Tensor, scale: float) -> Tensor:
    """Gradient of the raw scores from that of the probabilities, where `grad` is already times `inverse`."""
    weights, g = e.float(), grad.float()
    return (weights * (g - (weights * g).sum(-1, keepdim=True) * inverse[..., None]) * scale).to(grad.dtype)


class _SegmentAttention(torch.autograd.Function):
    """Softmax attention per group.

    A token's gradient as a key comes from its own segment, and for a prefix also from every suffix of its row: those
    are added up in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SegmentPlan, scale: float, window: int | None
    ) -> Tensor:
        saved, outputs = [], []
        for group in plan.groups:
            key_heads, length = k_THD.shape[1], group.query_NL.shape[1]
            q = _gather(q_THD, group.query_NL, key_heads)
            k, v = (_gather(x, group.key_NK, key_heads) for x in (k_THD, v_THD))
            e, inverse = _exponentials(q @ k.transpose(-1, -2), group.bias(window, q.shape), scale)
            outputs.append(_ungather((e @ v).mul_(inverse[..., None]), length))
            saved += [q, k, v, e, inverse]
        ctx.save_for_backward(*saved)
        ctx.parts = plan, scale
        return torch.cat(outputs).index_select(0, plan.source_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale = ctx.parts
        grad_THD = grads[0].contiguous()
        saved = ctx.saved_tensors
        own: list[list[Tensor]] = [[], [], []]
        prefix_sums = []
        for number, group in enumerate(plan.groups):
            q, k, v, e, inverse = saved[5 * number : 5 * number + 5]
            length = group.query_NL.shape[1]
            grad = _gather(grad_THD, group.query_NL, k.shape[1])
            # Padded queries repeat their segment's first token and would count its gradient twice.
            grad.mul_(inverse[..., None] * group.real_NL.repeat(1, q.shape[2] // length)[:, None, :, None])
            grad_s = _scores_gradient(grad @ v.transpose(-1, -2), e, inverse, scale)
            grad_k, grad_v = grad_s.transpose(-1, -2) @ q, e.transpose(-1, -2) @ grad
            own[0].append(_ungather(grad_s @ k, length))
            for parts, part in ((own[1], grad_k), (own[2], grad_v)):
                parts.append(_ungather(part[:, :, -length:], length))
            if len(group.prefix_R):
                prefix_sums.append((group.prefix_R, _sum_prefix(grad_k, group), _sum_prefix(grad_v, group)))
        grad_q, grad_k, grad_v = (torch.cat(parts).index_select(0, plan.source_T) for parts in own)
        for prefix_R, sum_k, sum_v in prefix_sums:
            for total, part in ((grad_k, sum_k), (grad_v, sum_v)):
                total[prefix_R] = (total[prefix_R].float() + part).to(total.dtype)
        return grad_q, grad_k, grad_v, None, None, None


def _sum_prefix(grad: Tensor, group: Group) -> Tensor:
    """[N, key heads, K, D] -> [prefix tokens of the group, key heads, D] in float32, summed over a row's suffixes."""
    num, heads, keys, width = grad.shape
    prefix = keys - group.query_NL.shape[1]
    part = grad[:, :, :prefix].transpose(1, 2).reshape(num, -1).float()
    rows = part.new_zeros(int(group.row_N.max()) + 1, part.shape[1]).index_add_(0, group.row_N, part)
    return rows.view(-1, heads, width)[group.padded_R]


def _gather(x_THD: Tensor, index_NL: Tensor, key_heads: int) -> Tensor:
    """[T, H, D] -> [N, key heads, H / key heads * L, D]."""
    num, length = index_NL.shape
    heads, width = x_THD.shape[1:]
    index = index_NL[:, None, :] * heads + torch.arange(heads, device=x_THD.device)[:, None]
    rows = x_THD.reshape(-1, width).index_select(0, index.reshape(-1))
    return rows.view(num, key_heads, -1, width)


def _ungather(x: Tensor, length: int) -> Tensor:
    """[N, key heads, G * L, D] -> [N * L, H, D]."""
    return x.reshape(x.shape[0], -1, length, x.shape[-1]).transpose(1, 2).reshape(x.shape[0] * length, -1, x.shape[-1])


def _decode(
    q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, plan: DecodePlan, layer: int, scale: float, window: Any
) -> Tensor:
    rows_B = torch.arange(q_BHD.shape[0], device=q_BHD.device)
    num, key_heads, width = k_BHD.shape
    keys, values = plan.cache.layers[layer]
    keys[rows_B, plan.lengths_B], values[rows_B, plan.lengths_B] = k_BHD, v_BHD
    k_BKHD, v_BKHD = keys[:num, : plan.longest + 1], values[:num, : plan.longest + 1]
    age_BK = plan.lengths_B[:, None] - torch.arange(plan.longest + 1, device=q_BHD.device)
    seen_BK = (age_BK >= 0) & (age_BK < window) if window else age_BK >= 0
    scores = q_BHD.view(num, key_heads, -1, width) @ k_BKHD.permute(0, 2, 3, 1)
    scores = scores.float().mul_(scale).masked_fill_(~seen_BK[:, None, None], float("-inf"))
    return (torch.softmax(scores, -1).to(q_BHD.dtype) @ v_BKHD.transpose(1, 2)).reshape(num, -1, width)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: SegmentPlan | DecodePlan,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [1, H, T, D] in, [1, T, H, D] out. `plan` travels as a model argument."""
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__}: attention soft caps and sinks are not supported")
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(plan, DecodePlan):
        return _decode(q_THD, k_THD, v_THD, plan, layer, scaling, sliding_window)[None], None
    if plan.cache is not None:
        index = (plan.cache_rows_T, plan.cache_positions_T)
        plan.cache.layers[layer, 0].index_put_(index, k_THD)
        plan.cache.layers[layer, 1].index_put_(index, v_THD)
    return _SegmentAttention.apply(q_THD, k_THD, v_THD, plan, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, attend)
