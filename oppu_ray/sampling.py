"""The next token of each row, from its logits and its own request alone (it stands inside `inference`).

In: logits of B rows, and each row's request, tokens so far and random numbers. Out: one `Choice` per row.
The decision a reader would question: a drawn token takes one uniform number from the row's own generator and the
cumulated probabilities, likeliest first where only the likeliest are kept. So an answer depends on its seed and not on
who else is in the batch, and one number decides one token, where Gumbel noise would take 49,152.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oppu_ray.core import Request

MOST_LIKELY = 1024  # a top-p set is first looked for among these: sorting all of 49,152 takes 2 ms a row


@dataclass(frozen=True)
class Choice:
    """A row's next token; `token` is None where the row's logits are not finite (its adapter overflows)."""

    token: int | None
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()


def choose(
    logits_BV: Tensor,
    requests: Sequence[Request],
    answers: Sequence[Sequence[int]],
    draws: Sequence[random.Random],
) -> list[Choice]:
    """One choice per row.

    Args:
        answers: Each row's tokens so far.
        draws: Each row's random numbers; used only where the request's temperature is above 0.
    """
    highest, likeliest = (values.tolist() for values in logits_BV.max(-1))
    choices = []
    for row, (request, answer, draw) in enumerate(zip(requests, answers, draws, strict=True)):
        if not math.isfinite(highest[row]):
            choices.append(Choice(None))
            continue
        token = likeliest[row]
        if request.labels or request.temperature:
            token = _pick(logits_BV[row].float(), request, answer, draw)
        choices.append(_with_logprobs(logits_BV[row], request, token))
    return choices


def _pick(logits_V: Tensor, request: Request, answer: Sequence[int], draw: random.Random) -> int:
    allowed = sorted(allowed_tokens(request, answer)) if request.labels else None
    logits = logits_V if allowed is None else logits_V[allowed]
    index = sample(logits, request.temperature, request.top_p, draw) if request.temperature else int(logits.argmax())
    return index if allowed is None else allowed[index]


def sample(logits_V: Tensor, temperature: float, top_p: float, draw: random.Random) -> int:
    """Draw a token from the likeliest ones that together have at least `top_p` of the probability."""
    probabilities_V = torch.softmax((logits_V - logits_V.max()).double() / temperature, -1)  # however small it is
    if top_p == 1:
        return _draw(probabilities_V, draw)
    likeliest, tokens = probabilities_V.topk(min(MOST_LIKELY, len(probabilities_V)))
    if likeliest.sum() < top_p:
        likeliest, tokens = probabilities_V.sort(descending=True)
    num_kept = int((likeliest.double().cumsum(-1) < top_p).sum()) + 1
    return int(tokens[_draw(likeliest[:num_kept], draw)])


def _draw(weights: Tensor, draw: random.Random) -> int:
    cumulated = weights.double().cumsum(-1)
    place = int(torch.searchsorted(cumulated, draw.random() * float(cumulated[-1]), right=True))
    return min(place, len(cumulated) - 1)


def allowed_tokens(request: Request, answer: Sequence[int]) -> frozenset[int]:
    """What may follow `answer` on the way to a label: the labels' next tokens, and what ends a complete one."""
    num, so_far = len(answer), tuple(answer)
    reached = [label for label in request.labels if label[:num] == so_far]
    after = frozenset(label[num] for label in reached if len(label) > num)
    return after | request.stop_ids if so_far in reached else after


def is_whole_label(request: Request, answer: Sequence[int]) -> bool:
    """Whether `answer` is a label that no other label continues."""
    return tuple(answer) in request.labels and allowed_tokens(request, answer) <= request.stop_ids


def _with_logprobs(logits_V: Tensor, request: Request, token: int) -> Choice:
    if request.num_logprobs is None:
        return Choice(token)
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    values, tokens = logprobs_V.topk(request.num_logprobs)
    return Choice(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
