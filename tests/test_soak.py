"""The soak's own arithmetic and bookkeeping; the soak itself is `make soak`."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from jobs.soak import summarise


def test_growth_is_of_the_last_quarter_over_the_second() -> None:
    soak: Any = SimpleNamespace(wrong=[], counts=Counter(ask=2), latencies=[0.1, 0.3])
    memory = [9, 9, 100, 100, 500, 1, 110, 112]
    result = summarise(soak, [(5.0 * (number + 1), num, 7) for number, num in enumerate(memory)])
    assert abs(result["growth"] - 0.11) < 1e-9 and result["num_answers"] == 2
    assert (
        result["answers_per_s"] == 2 / 40 and result["memory_bytes"]["peak"] == 500 and result["counts"] == {"ask": 2}
    )
