"""Attention of segments by PyTorch's batched products: on a GPU, or where there is no C++ (under `attention`).

In: a stream's segments, and its queries, keys and values. Out: what `attention.cpp` computes.
The decision a reader would question: segments of similar length are gathered into batches, each with a copy of its
prefix's keys. One product per row against its prefix would copy nothing, but takes several times the calls.

Shapes: T tokens, N segments, L queries of a segment, K keys of a segment (P of the prefix, then L), H query heads, G
query heads per key head, D head width, R padded rows (all groups' tokens times heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oppu_ray.kernels import fused

MAX_PADDING = 0.25  # a segment joins a group only if the group's length exceeds its own by less than this share


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the stream attend causally to each other and to all of [prefix_start, prefix_stop)."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def num_prefix(self) -> int:
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True)
class Group:
    """Segments of similar length, padded to a common one.

    Args:
        query_NL: Stream position of each query. Padding repeats the segment's own first token: were it another user's,
            that user's NaN would spread.
        key_NK: Stream position of each key, prefix first; padded likewise.
        real_NL: False for padding.
        prefix_N: Length of each segment's prefix, at most P.
        row_N: Number of the row each segment belongs to, counted over the rows with a prefix in this group; segments
            without one share a last row of their own that nobody reads.
        prefix_R: Stream positions of those rows' prefixes, end to end.
        padded_R: Their places in [rows, P].
    """

    query_NL: Tensor
    key_NK: Tensor
    real_NL: Tensor
    prefix_N: Tensor
    row_N: Tensor
    prefix_R: Tensor
    padded_R: Tensor
    _biases: dict[int, Tensor] = field(default_factory=dict, init=False)

    def bias(self, window: int, scores: Tensor) -> Tensor:
        """0 where a query may see a key, -inf where not, for scores [N * key heads, G * L, K] and in their type.

        Written out in full, because a broadcast bias or a mask made on the fly halves the speed of the softmax; made
        once per stream and window.
        """
        if window not in self._biases:
            (num, length), num_keys = self.query_NL.shape, self.key_NK.shape[1]
            query_L = torch.arange(length, device=scores.device)[:, None]
            own_K = torch.arange(num_keys, device=scores.device) - (num_keys - length)
            distance_NLK = query_L - torch.where(
                own_K < 0, own_K + num_keys - length - self.prefix_N[:, None, None], own_K
            )
            seen_NLK = (distance_NLK >= 0) & ((own_K >= 0) | (distance_NLK > query_L))
            if window:
                seen_NLK &= distance_NLK < window
            bias_NLK = torch.zeros(seen_NLK.shape, device=scores.device).masked_fill_(~seen_NLK, float("-inf"))
            repeats = (scores.shape[0] // num, scores.shape[1] // length)
            bias = bias_NLK.to(scores.dtype)[:, None, None].expand(-1, *repeats, -1, -1)
            self._biases[window] = bias.reshape(scores.shape)
        return self._biases[window]


class Padded(NamedTuple):
    """How rows of a stream, seen as [T * heads, D], are laid out for the groups: group by group, [N, heads, L, D].

    Args:
        source_R: Stream row of each padded row.
        target: Padded row of each stream row: the one that is a token's own, not its copy as a prefix.
        real_R: 1.0 for a token, 0.0 for padding.
    """

    source_R: Tensor
    target: Tensor
    real_R: Tensor


class Groups:
    """Groups of segments of similar length, which cover every token of a stream, and how they are laid out."""

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        batches: list[list[Segment]] = []
        for segment in sorted(segments, key=lambda s: (s.length + s.num_prefix, s.length), reverse=True):
            if batches and _fits(segment, batches[-1][0]):
                batches[-1].append(segment)
            else:
                batches.append([segment])
        self.groups = [_build_group(batch, device) for batch in batches]
        self._padded: dict[tuple[str, int], Padded] = {}

    def queries(self, heads: int) -> Padded:
        """The groups' queries, made once per stream."""
        if ("q", heads) not in self._padded:
            self._padded["q", heads] = _pad([(g.query_NL, g.real_NL) for g in self.groups], heads)
        return self._padded["q", heads]

    def keys(self, heads: int) -> Padded:
        """The groups' keys, made once per stream."""
        if ("k", heads) not in self._padded:
            own = [
                (g.key_NK, nn.functional.pad(g.real_NL, (g.key_NK.shape[1] - g.real_NL.shape[1], 0)))
                for g in self.groups
            ]
            self._padded["k", heads] = _pad(own, heads)
        return self._padded["k", heads]

    def parts(self, heads: int, key_heads: int) -> Iterator[tuple[Group, slice, slice]]:
        """Each group with its padded rows of queries and of keys."""
        start = key_start = 0
        for group in self.groups:
            stop, key_stop = start + group.query_NL.numel() * heads, key_start + group.key_NK.numel() * key_heads
            yield group, slice(start, stop), slice(key_start, key_stop)
            start, key_start = stop, key_stop


def _pad(parts: list[tuple[Tensor, Tensor]], heads: int) -> Padded:
    sources, reals = [], []
    for tokens_NL, own_NL in parts:
        head = torch.arange(heads, device=tokens_NL.device)[:, None]
        sources.append((tokens_NL[:, None] * heads + head).flatten())
        reals.append(own_NL[:, None].expand(-1, heads, -1).flatten())
    source_R, real_R = torch.cat(sources), torch.cat(reals)
    target = torch.empty(int(real_R.sum()), dtype=torch.long, device=source_R.device)
    target[source_R[real_R]] = real_R.nonzero()[:, 0]
    return Padded(source_R, target, real_R.float())


def _fits(segment: Segment, longest: Segment) -> bool:
    own, most = segment.length, longest.length
    keys, most_keys = own + segment.num_prefix, most + longest.num_prefix
    slack = 8
    return most_keys <= keys * (1 + MAX_PADDING) + slack and own <= most <= own * (1 + MAX_PADDING) + slack


def _build_group(batch: list[Segment], device: torch.device) -> Group:
    num_prefix = max(s.num_prefix for s in batch)
    facts = ((s.start, s.length, s.prefix_start, s.num_prefix) for s in batch)
    start_N, length_N, prefix_start_N, prefix_N = (torch.tensor(fact)[:, None] for fact in zip(*facts, strict=True))
    place_L, place_P = torch.arange(max(s.length for s in batch)), torch.arange(num_prefix)
    real_NL = place_L < length_N
    query_NL = torch.where(real_NL, start_N + place_L, start_N)
    prefix_NP = torch.where(place_P < prefix_N, prefix_start_N + place_P, start_N)
    key_NK = torch.cat((prefix_NP, query_NL), 1)
    prefixes = sorted({(s.prefix_start, s.prefix_stop) for s in batch if s.num_prefix})
    rows = {prefix: row for row, prefix in enumerate(prefixes)}
    row_N = torch.tensor([rows.get((s.prefix_start, s.prefix_stop), len(rows)) for s in batch])
    spans = [torch.arange(*prefix) for prefix in prefixes]
    places = [torch.arange(len(span)) + row * num_prefix for row, span in enumerate(spans)]
    prefix_R, padded_R = (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long) for parts in (spans, places))
    tensors = (query_NL, key_NK, real_NL, prefix_N[:, 0], row_N, prefix_R, padded_R)
    return Group(*(t.to(device) for t in tensors))


@fused
def _exponentials(scores: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax before its division, and one over the row sums: dividing [L, K] here would compute each exp twice."""
    x = scores.float() * scale + bias.float()
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e.to(scores.dtype), 1 / e.sum(-1)


@fused
def _scores_gradient(grad_RK: Tensor, e_RK: Tensor, delta_R: Tensor, scale: float) -> Tensor:
    """Gradient of the raw scores from that of the exponentials; `delta_R` is what each row's softmax takes off."""
    return (e_RK.float() * (grad_RK.float() - delta_R[:, None]) * scale).to(grad_RK.dtype)


@fused
def _times_rows(x_RD: Tensor, factor_R: Tensor) -> Tensor:
    return (x_RD.float() * factor_R[:, None]).to(x_RD.dtype)


@fused
def _row_products(x_RD: Tensor, y_RD: Tensor) -> Tensor:
    return (x_RD.float() * y_RD.float()).sum(-1)


def grouped_forward(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: Groups, scale: float, window: int, saved: list[Tensor]
) -> Tensor:
    """`attention.attention_forward`."""
    (heads, width), key_heads = q_THD.shape[1:], k_THD.shape[1]
    queries, keys = layout.queries(heads), layout.keys(key_heads)
    q_RD = q_THD.reshape(-1, width).index_select(0, queries.source_R)
    k_RD, v_RD = (x.reshape(-1, width).index_select(0, keys.source_R) for x in (k_THD, v_THD))
    out_RD, inverse_R = torch.empty_like(q_RD), torch.empty_like(queries.real_R)
    for group, part, key_part in layout.parts(heads, key_heads):
        num, num_keys = group.key_NK.shape
        q, out = (x[part].view(num * key_heads, -1, width) for x in (q_RD, out_RD))
        k, v = (x[key_part].view(num * key_heads, num_keys, width) for x in (k_RD, v_RD))
        scores = q @ k.transpose(1, 2)
        e, inverse = _exponentials(scores, group.bias(window, scores), scale)
        torch.bmm(e, v, out=out)
        inverse_R[part] = inverse.flatten()
        saved.append(e)
    out_THD = _times_rows(out_RD, inverse_R).index_select(0, queries.target).view(q_THD.shape)
    saved += [q_RD, k_RD, v_RD, inverse_R, out_THD]
    return out_THD


def grouped_backward(
    grad_THD: Tensor, key_heads: int, layout: Groups, scale: float, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention.attention_backward`, of what `grouped_forward` put on `saved`."""
    q_RD, k_RD, v_RD, inverse_R, out_THD = saved[-5:]
    del saved[-5:]
    num_tokens, heads, width = out_THD.shape
    queries, keys = layout.queries(heads), layout.keys(key_heads)
    # Padded queries repeat their segment's first token and would count its gradient twice.
    factor_R = inverse_R * queries.real_R
    grad_rows = grad_THD.reshape(-1, width)
    grad_RD = _times_rows(grad_rows.index_select(0, queries.source_R), factor_R)
    delta_R = _row_products(grad_rows, out_THD.view(-1, width)).index_select(0, queries.source_R) * factor_R
    grad_q_RD, grad_k_RD, grad_v_RD = (torch.empty_like(x) for x in (q_RD, k_RD, v_RD))
    prefix_sums = []
    for group, part, key_part in reversed(list(layout.parts(heads, key_heads))):
        num, num_keys = group.key_NK.shape
        q, grad, grad_q = (x[part].view(num * key_heads, -1, width) for x in (q_RD, grad_RD, grad_q_RD))
        k, v, grad_k, grad_v = (
            x[key_part].view(num * key_heads, num_keys, width) for x in (k_RD, v_RD, grad_k_RD, grad_v_RD)
        )
        e = saved.pop()
        grad_e = (grad @ v.transpose(1, 2)).view(-1, num_keys)
        ds = _scores_gradient(grad_e, e.view(-1, num_keys), delta_R[part], scale).view(e.shape)
        torch.bmm(ds, k, out=grad_q)
        torch.bmm(ds.transpose(1, 2), q, out=grad_k)
        torch.bmm(e.transpose(1, 2), grad, out=grad_v)
        if len(group.prefix_R):
            sums = (_sum_prefix(x.view(num, key_heads, num_keys, width), group) for x in (grad_k, grad_v))
            prefix_sums.append((group.prefix_R, *sums))
    grad_q_THD = grad_q_RD.index_select(0, queries.target).view(num_tokens, heads, width)
    grad_k_THD, grad_v_THD = (
        x.index_select(0, keys.target).view(num_tokens, key_heads, width) for x in (grad_k_RD, grad_v_RD)
    )
    for prefix_R, sum_k, sum_v in prefix_sums:
        for total, part in ((grad_k_THD, sum_k), (grad_v_THD, sum_v)):
            total.index_add_(0, prefix_R, part.to(total.dtype))
    return grad_q_THD, grad_k_THD, grad_v_THD


def _sum_prefix(grad: Tensor, group: Group) -> Tensor:
    """[N, key heads, K, D] -> [prefix tokens of the group, key heads, D] in float32, summed over a row's suffixes."""
    num, heads, keys, width = grad.shape
    prefix = keys - group.query_NL.shape[1]
    part = grad[:, :, :prefix].transpose(1, 2).reshape(num, -1).float()
    rows = part.new_zeros(int(group.row_N.max()) + 1, part.shape[1]).index_add_(0, group.row_N, part)
    return rows.view(-1, heads, width)[group.padded_R]
