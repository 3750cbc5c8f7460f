"""Attention over one flat stream of tokens that holds many users' rows (design decision D1).

In: queries, keys and values of T tokens laid end to end, and a plan that says which tokens belong together. Out: their
attention, [T, H * D]. A row is a prefix and suffixes; a suffix token sees the prefix and its own suffix up to itself.
The decision a reader would question: instead of one block mask over whole rows, each segment (a prefix, a suffix)
attends by itself, to what stands before it. A row of 100 + 16 x 60 tokens then costs 16 x 60 x 130 scores, not
1060 x 1060, and no linear layer ever computes a padded token. On a CPU that is C++ (`cpp/attention.cpp`), which keeps
no scores: the backward pass makes them again.

Plugs into any Hugging Face model that takes its attention from `AttentionInterface`, under the name "segments".

Shapes: T tokens, N segments, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from oppu_ray.attention_groups import Groups, Segment, grouped_backward, grouped_forward
from oppu_ray.kernels import rotate
from oppu_ray.kv_cache import DecodePlan, Fill, decode_attention
from oppu_ray.native import native

NAME = "segments"
CHUNK_TOKENS = 256  # of a row's suffixes: enough for one thread at a time, few enough for all threads


class Chunks(NamedTuple):
    """Segments for C++: those of a chunk have the same prefix, and share a task.

    Args:
        segment_N4: int64: start, length, prefix's start and length.
        first: Index of each chunk's first segment, and the number of segments.
    """

    segment_N4: Tensor
    first: Tensor


@dataclass
class SegmentPlan:
    """How one stream attends, and where its keys and values are kept, if they are.

    `wanted_K`: Sorted stream positions whose last hidden states are asked for; None for all. Others need no more than
    their keys and values of the last layer.
    """

    segments: Sequence[Segment]
    device: torch.device
    fill: Fill | None = None
    wanted_K: Tensor | None = None

    @cached_property
    def chunks(self) -> Chunks:
        """A row's chunks depend on nothing but the row, and with them how its prefix's gradient is rounded."""
        first, size = [], 0
        for number, (segment, before) in enumerate(zip(self.segments, (None, *self.segments), strict=False)):
            prefix = (segment.prefix_start, segment.prefix_stop)
            if before is None or prefix != (before.prefix_start, before.prefix_stop) or size >= CHUNK_TOKENS:
                first.append(number)
                size = 0
            size += segment.length
        rows = [[s.start, s.length, s.prefix_start, s.num_prefix] for s in self.segments]
        return Chunks(torch.tensor(rows), torch.tensor([*first, len(rows)]))

    @cached_property
    def num_tokens(self) -> int:
        """Of the stream."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def groups(self) -> Groups:
        """For PyTorch."""
        return Groups(self.segments, self.device)


def plan_segments(segments: Sequence[Segment], device: torch.device, max_length: int = 1024) -> SegmentPlan:
    """Plan a stream's attention.

    Args:
        segments: Cover every token of the stream exactly once; a segment's positions continue its prefix's.
        max_length: A longer segment without a prefix is computed piece by piece, each with what stands before it as its
            prefix: a square of scores for 10,000 tokens would not fit in memory.
    """
    return SegmentPlan([piece for segment in segments for piece in _split(segment, max_length)], device)


def _split(segment: Segment, max_length: int) -> list[Segment]:
    if segment.num_prefix or segment.length <= max_length:
        return [segment]
    cuts = [*range(segment.start, segment.stop, max_length), segment.stop]
    return [Segment(start, stop, segment.start, start) for start, stop in itertools.pairwise(cuts)]


def answer_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    plan: SegmentPlan | DecodePlan,
    layer: int,
    scale: float,
    window: int,
    cos_sin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of any pass, [T, H, D], without a gradient.

    Args:
        layer: Its number, for the cache.
        window: How many positions back a token sees; 0 for all.
        cos_sin: Each [T, 1, D], to turn queries and keys by; None if they are.
    """
    if isinstance(plan, DecodePlan):
        return decode_attention(q_THD, k_TGD, v_TGD, plan, layer, scale, window, cos_sin)
    if plan.fill is not None:
        out_THD = plan.fill.attend(layer, q_THD, k_TGD, v_TGD, scale, window, cos_sin)
        if out_THD is not None:
            return out_THD
    if cos_sin:
        q_THD, k_TGD = rotate(q_THD, *cos_sin), rotate(k_TGD, *cos_sin)
    out_THD = attention_forward(q_THD, k_TGD, v_TGD, plan, scale, window, [])
    if plan.fill is not None:
        plan.fill.apply(layer, q_THD, k_TGD, v_TGD, out_THD, scale, window)
    return out_THD


def attention_forward(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, plan: SegmentPlan, scale: float, window: int, saved: list[Tensor]
) -> Tensor:
    """Softmax attention of a stream, [T, H, D]; what `attention_backward` needs is put on `saved`.

    `window` 0 means no sliding window.
    """
    function = native("segments_forward", q_THD, k_TGD, v_TGD)
    if function is None:
        return grouped_forward(q_THD, k_TGD, v_TGD, plan.groups, scale, window, saved)
    if {len(q_THD), len(k_TGD), len(v_TGD)} != {plan.num_tokens}:  # nothing behind here looks
        raise IndexError(f"{len(q_THD)} queries and {len(k_TGD)} keys, in a plan for {plan.num_tokens} tokens")
    q_THD, k_TGD, v_TGD = q_THD.contiguous(), k_TGD.contiguous(), v_TGD.contiguous()
    out_THD, log_sum_TH = torch.empty_like(q_THD), torch.empty(q_THD.shape[:2])
    shape = (q_THD.shape[1], *k_TGD.shape[1:], scale, window)
    function(len(plan.chunks.first) - 1, *plan.chunks, *shape, q_THD, k_TGD, v_TGD, out_THD, log_sum_TH)
    saved += [q_THD, k_TGD, v_TGD, out_THD, log_sum_TH]
    return out_THD


def attention_backward(
    grad_THD: Tensor, key_heads: int, plan: SegmentPlan, scale: float, window: int, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; takes from `saved` what `attention_forward` put there.

    A token's gradient as a key comes from its own segment, and for a prefix also from every suffix of its row: those
    are added up in float32 first.
    """
    function = native("segments_backward", *saved[-5:-2])  # queries, keys and values, as in the forward pass
    if function is None:
        return grouped_backward(grad_THD, key_heads, plan.groups, scale, saved)
    q_THD, k_TGD, v_TGD, out_THD, log_sum_TH = saved[-5:]
    del saved[-5:]
    grad_q_THD, grad_k_TGD, grad_v_TGD = torch.empty_like(q_THD), torch.empty(k_TGD.shape), torch.empty(v_TGD.shape)
    shape = (q_THD.shape[1], *k_TGD.shape[1:], scale, window)
    given = (q_THD, k_TGD, v_TGD, out_THD, log_sum_TH, grad_THD.to(q_THD.dtype).contiguous())
    function(len(plan.chunks.first) - 1, *plan.chunks, *shape, *given, grad_q_THD, grad_k_TGD, grad_v_TGD)
    return grad_q_THD, grad_k_TGD.to(k_TGD.dtype), grad_v_TGD.to(v_TGD.dtype)


class _SegmentAttention(torch.autograd.Function):
    """`attention_forward` and `attention_backward` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SegmentPlan, scale: float, window: int
    ) -> Tensor:
        saved: list[Tensor] = []
        out_THD = attention_forward(q_THD, k_THD, v_THD, plan, scale, window, saved)
        ctx.save_for_backward(*saved)
        ctx.parts = k_THD.shape[1], plan, scale, window
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key_heads, plan, scale, window = ctx.parts
        saved = list(ctx.saved_tensors)
        return *attention_backward(grads[0], key_heads, plan, scale, window, saved), None, None, None


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
    window = sliding_window or 0
    if isinstance(plan, DecodePlan) or not torch.is_grad_enabled():
        return answer_attention(q_THD, k_THD, v_THD, plan, layer, scaling, window)[None], None
    return _SegmentAttention.apply(q_THD, k_THD, v_THD, plan, scaling, window)[None], None


AttentionInterface.register(NAME, attend)
