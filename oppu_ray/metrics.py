"""The arrow (gold, answer) -> score, by LaMP's rules (reference: eval/evaluation.py of LaMP-Benchmark/LaMP).

In go golds and answers as text, out come numbers by metric name. A reader might question ROUGE's average: LaMP takes
the median of 1,000 bootstrapped means, which is random in its fourth digit; we take the mean that it estimates.
LaMP's ROUGE drops all letters but a to z: texts of a LaMP task that are mostly ASCII are scored so, others by words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from oppu_ray.tasks import Task
from oppu_ray.words import is_mostly_ascii, letters

LOWER_IS_BETTER = frozenset({"mae", "rmse", "nll"})


def main_metric(task: Task) -> str:
    """The metric that gains are counted in: a mean over queries, so that two arms can be paired."""
    return {"classification": "accuracy", "rating": "mae", "generation": "rougeL"}[task.kind]


def score_answers(task: Task, golds: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Scores of all answers together.

    Returns:
        Classification: accuracy and macro_f1, over the full label list, an unknown answer being wrong. Rating: mae and
        rmse, not clipped, an unparsable answer counting as the end of the scale farther from the gold. Generation:
        rouge1 and rougeL (F measure, 0 to 1, no stemming), averaged over the answers.

    Raises:
        ValueError: No answers, different numbers of golds and answers, or a gold outside the label set.
    """
    if not golds or len(golds) != len(answers):
        raise ValueError(f"expected as many answers as golds and at least one, got {len(answers)} and {len(golds)}")
    if task.kind == "rating":
        errors = [_rating_error(task, gold, answer) for gold, answer in zip(golds, answers, strict=True)]
        mean_square = sum(error * error for error in errors) / len(errors)
        return {"mae": sum(errors) / len(errors), "rmse": math.sqrt(mean_square)}
    scores = [score_one(task, gold, answer) for gold, answer in zip(golds, answers, strict=True)]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    if task.kind == "classification":
        means["macro_f1"] = _macro_f1(task.labels, [gold.strip() for gold in golds], [text.strip() for text in answers])
    return means


def score_one(task: Task, gold: str, answer: str) -> dict[str, float]:
    """One query's share of the metrics that are means over queries: accuracy (0 or 1), mae, or rouge1 and rougeL.

    Raises:
        ValueError: The gold is outside the task's label set.
    """
    if task.kind == "generation":
        is_lamps = bool(task.lamp) and is_mostly_ascii(gold)
        scores = _rouge_scorer(is_lamps).score(gold.strip(), answer.strip())
        return {name: float(scores[name].fmeasure) for name in task.metrics}
    if task.kind == "rating":
        return {"mae": _rating_error(task, gold, answer)}
    _check_gold(task, gold)
    return {"accuracy": float(gold.strip() == answer.strip())}


@cache
def _rouge_scorer(is_lamps: bool) -> Any:
    """LaMP's scorer, which sees the letters a to z and digits only, or one that sees the words of every script."""
    from rouge_score.rouge_scorer import RougeScorer  # with NLTK and SciPy, a tenth of what a worker imports

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False, tokenizer=None if is_lamps else _AnyScript())


class _AnyScript:
    """A tokenizer of rouge_score's kind."""

    def tokenize(self, text: str) -> list[str]:
        return letters(text)


def _check_gold(task: Task, gold: str) -> None:
    if gold.strip() not in task.labels:
        raise ValueError(f"{task.name}: gold {gold!r} is not a label; expected one of {', '.join(task.labels)}")


def _rating_error(task: Task, gold: str, answer: str) -> float:
    """Absolute error in points. NaN and infinity, which Python parses, count as unparsable."""
    _check_gold(task, gold)
    rating, low, high = float(gold), float(task.labels[0]), float(task.labels[-1])
    try:
        said = float(answer.strip())
    except ValueError:
        said = math.nan
    if not math.isfinite(said):
        said = low if abs(low - rating) > abs(high - rating) else high
    return abs(said - rating)


def _macro_f1(labels: Sequence[str], golds: Sequence[str], answers: Sequence[str]) -> float:
    """Mean over all `labels` of 2 TP / (2 TP + FP + FN); 0 for a label that is neither gold nor answered."""
    num_gold, num_said = Counter(golds), Counter(answers)
    num_right = Counter(gold for gold, answer in zip(golds, answers, strict=True) if gold == answer)
    return sum(2 * num_right[label] / max(1, num_gold[label] + num_said[label]) for label in labels) / len(labels)
