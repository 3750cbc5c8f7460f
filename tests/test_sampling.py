"""Tokens are drawn from the distribution they should be, each row by itself."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from oppu_ray import sampling
from oppu_ray.core import Request
from oppu_ray.sampling import choose, sample

LOGITS_V = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -30.0])
NUM_DRAWS = 4000


def shares(temperature: float, top_p: float) -> list[float]:
    draw = random.Random(0)
    counts = Counter(sample(LOGITS_V, temperature, top_p, draw) for _ in range(NUM_DRAWS))
    return [counts[token] / NUM_DRAWS for token in range(len(LOGITS_V))]


@pytest.mark.parametrize("most_likely", [1, 2, 1024])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9), (1.0, 1e-9)])
def test_tokens_are_drawn_in_proportion_within_top_p(
    temperature: float, top_p: float, most_likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_LIKELY", most_likely)
    exact_V = torch.softmax(LOGITS_V.double() / temperature, -1)
    kept, total = [], 0.0
    for token in exact_V.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(token)
            total += float(exact_V[token])
    found = shares(temperature, top_p)
    for token, share in enumerate(found):
        expected = float(exact_V[token]) / total if token in kept else 0.0
        assert share == 0 if token not in kept else share == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 5e-324])
def test_however_low_the_temperature_the_likeliest_is_drawn(temperature: float) -> None:
    assert {sample(LOGITS_V, temperature, top_p, random.Random(0)) for top_p in (1.0, 0.9)} == {1}


def test_the_first_of_equals_is_taken_as_hugging_face_does() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.bfloat16)
    requests, draws = [Request("a", (1,)), Request("b", (1,))], [random.Random(0)] * 2
    assert [choice.token for choice in choose(logits_BV, requests, [[], []], draws)] == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_its_neighbours_have(bad: float) -> None:
    logits_BV = torch.stack([LOGITS_V, LOGITS_V.clone(), LOGITS_V])
    logits_BV[1, 3] = bad
    requests = [Request("a", (1,)), Request("b", (1,), temperature=1.0), Request("c", (1,), temperature=1.0)]
    draws = [random.Random(seed) for seed in range(3)]
    tokens = [choice.token for choice in choose(logits_BV, requests, [[]] * 3, draws)]
    assert tokens == [1, None, sample(LOGITS_V, 1.0, 1.0, random.Random(2))]
