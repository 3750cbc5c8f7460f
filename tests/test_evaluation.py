"""Scores, paired gains and their intervals on predictions made by hand; habits; the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from oppu_ray.config import TaskConfig
from oppu_ray.core import Item, Prediction, UserHistory
from oppu_ray.evaluation import answer_by_habit, format_table, summarise
from oppu_ray.statistics import Gain
from oppu_ray.tasks import get_task

TAGS = get_task(TaskConfig(name="movie_tagging", labels=("a", "b", "c")))
RATINGS = get_task(TaskConfig(name="product_rating"))
CHAT = get_task(TaskConfig(name="chat_reply"))
GAIN_KEYS = {"over", "metric", "changed", *(field.name for field in fields(Gain))}
# Ann has three queries, Bob one. The gold is always "a".
QUERIES = [("ann", "1"), ("ann", "2"), ("ann", "3"), ("bob", "1")]


def answers(arm: str, texts: Sequence[str], nlls: Sequence[float] | None = None, gold: str = "a") -> list[Prediction]:
    return [
        Prediction(arm, user, query, gold, text, None if nlls is None else nlls[i], None if nlls is None else "a")
        for i, ((user, query), text) in enumerate(zip(QUERIES, texts, strict=True))
    ]


PREDICTIONS = [
    *answers("majority_user", "bbba"),
    *answers("task", "abbb", [2.0, 2.0, 2.0, 2.0]),
    *answers("oppu", "aaab", [1.0, 1.5, 2.0, 3.0]),
    *answers("swapped", "bbba", [3.0, 3.0, 3.0, 3.0]),
]


def test_arms_have_the_tasks_metrics_and_counts() -> None:
    arms = summarise(TAGS, PREDICTIONS, 10, 0)["arms"]
    assert set(arms["majority_user"]) == {"accuracy", "macro_f1", "num_queries", "num_users"}
    assert set(arms["oppu"]) == {*arms["majority_user"], "accuracy_by_label", "macro_f1_by_label", "nll"}
    assert list(arms) == ["majority_user", "task", "oppu", "swapped"]
    assert [arms[arm]["accuracy"] for arm in arms] == [0.25, 0.25, 0.75, 0.25]
    assert arms["oppu"]["accuracy_by_label"] == 1.0 and arms["oppu"]["nll"] == 1.875
    assert (arms["oppu"]["num_queries"], arms["oppu"]["num_users"]) == (4, 2)


def test_gains_are_paired_signed_and_averaged_over_queries_and_over_users() -> None:
    summary = summarise(TAGS, PREDICTIONS, 500, 0)
    assert set(summary) == {"arms", "gains", "nll_gains", "controls", "nll_controls"}
    assert set(summary["gains"]) == {"majority_user", "oppu", "swapped"}
    assert set(summary["nll_gains"]) == {"oppu", "swapped"}
    gain = summary["gains"]["oppu"]  # per query 0, 1, 1 | 0
    assert set(gain) == GAIN_KEYS and (gain["over"], gain["metric"]) == ("task", "accuracy")
    assert gain["mean"] == 0.5 and gain["by_user_mean"] == pytest.approx(1 / 3) and gain["changed"] == 0.5
    assert (gain["low"], gain["high"]) == (0.0, 1.0)
    assert gain["by_user_low"] == 0.0 and gain["by_user_high"] == pytest.approx(2 / 3)
    nll = summary["nll_gains"]["oppu"]  # per query 1, 0.5, 0 | -1: less is better, so the sign is turned
    assert nll["mean"] == 0.125 and nll["by_user_mean"] == pytest.approx(-0.25) and nll["metric"] == "nll"
    control = summary["controls"]["oppu"]  # per query 1, 1, 1 | -1
    assert control["over"] == "swapped" and control["mean"] == 0.5 and control["by_user_mean"] == 0.0
    assert control["changed"] == 1.0 and set(control) == GAIN_KEYS
    assert summary["nll_controls"]["oppu"]["mean"] == pytest.approx(1.125)


def test_pairs_are_found_by_user_and_query_not_by_position() -> None:
    straight, mixed = summarise(TAGS, PREDICTIONS, 100, 0), summarise(TAGS, PREDICTIONS[::-1], 100, 0)
    assert {arm: mixed["arms"][arm] for arm in straight["arms"]} == straight["arms"]
    assert {arm: mixed["gains"][arm] for arm in straight["gains"]} == straight["gains"]
    partial = summarise(TAGS, [p for p in PREDICTIONS if (p.arm, p.query_id) != ("oppu", "3")], 100, 0)
    assert partial["gains"]["oppu"]["mean"] == pytest.approx(1 / 3)  # the queries that both arms have


def test_a_rating_that_errs_less_is_a_gain() -> None:
    predictions = [*answers("task", "1155", gold="5"), *answers("oppu", "3555", gold="5")]
    summary = summarise(RATINGS, predictions, 10, 0)
    assert summary["arms"]["task"] == {"mae": 2.0, "rmse": pytest.approx(8**0.5), "num_queries": 4, "num_users": 2}
    assert (summary["gains"]["oppu"]["metric"], summary["gains"]["oppu"]["mean"]) == ("mae", 1.5)


def test_free_text_is_compared_by_rouge_l() -> None:
    predictions = [*answers("task", ["x y"] * 4, gold="a b"), *answers("oppu", ["a b", "a b", "x", "x"], gold="a b")]
    gain = summarise(CHAT, predictions, 10, 0)["gains"]["oppu"]
    assert (gain["metric"], gain["mean"]) == ("rougeL", 0.5)


def test_without_the_task_arm_there_is_nothing_to_gain_over() -> None:
    summary = summarise(TAGS, [p for p in PREDICTIONS if p.arm == "oppu"], 10, 0)
    assert set(summary["arms"]) == {"oppu"}
    assert summary["gains"] == summary["nll_gains"] == summary["controls"] == summary["nll_controls"] == {}


def user(user_id: str, labels: str, num_queries: int = 1) -> UserHistory:
    items = tuple(Item(str(i), text="film", label=label) for i, label in enumerate(labels))
    queries = tuple(Item(f"q{i}", text="film", label="a") for i in range(num_queries))
    return UserHistory(user_id, "target", items, queries)


def test_habits_are_the_base_users_majority_the_users_own_and_the_last() -> None:
    users = [user("ann", "abba", 2), user("bob", "cbb"), user("eve", "ab")]
    labels = {"a": 3, "b": 1, "c": 4}

    def texts(arm: str) -> list[str]:
        return [prediction.text for prediction in answer_by_habit(TAGS, arm, users, labels)]

    assert texts("majority_global") == ["c", "c", "c", "c"]
    assert texts("majority_user") == ["a", "a", "b", "b"]  # of two equals, the one used last
    assert texts("last_user") == ["a", "a", "b", "b"]
    first, second, *_ = answer_by_habit(TAGS, "majority_user", users, labels)
    assert first == Prediction("majority_user", "ann", "q0", "a", "a") and second.query_id == "q1"


def test_habits_of_nobody() -> None:
    bare = replace(user("ann", ""), items=(Item("1", text="film"),))
    for arm in ("majority_user", "last_user"):
        assert answer_by_habit(TAGS, arm, [bare], {"b": 1})[0].text == "b"
        assert answer_by_habit(TAGS, arm, [bare], {})[0].text == ""


def test_the_table_says_every_arm_its_gain_and_the_controls() -> None:
    table = format_table(TAGS, summarise(TAGS, PREDICTIONS, 100, 0)).splitlines()
    head, _, *rows = table
    assert head.split()[:2] == ["arm", "what"] and all(name in head for name in ("accuracy", "macro_f1", "nll"))
    assert [row.split()[0] for row in rows[:4]] == ["majority_user", "task", "oppu", "swapped"]
    assert rows[1].endswith("2.000") and "[" not in rows[1]  # the reference has no gain over itself
    assert rows[2].split("adapter")[-1].split()[:3] == ["0.750", "0.286", "1.875"]
    assert "+0.500 [+0.000, +1.000]" in rows[2] and rows[0].split("label")[1].split()[2] == "-"
    assert any(row.startswith("OPPU over task, by user: +0.333") for row in rows)
    assert any(row.startswith("OPPU over another user's adapter, answers: +0.500") for row in rows)
    assert rows[-1] == "OPPU changed 50% of the task model's answers."
