import math

import pytest

from oppu_ray.config import TaskConfig
from oppu_ray.metrics import LOWER_IS_BETTER, score_answers, score_one
from oppu_ray.tasks import TASKS, Task, get_task

CITATION, RATING, HEADLINE = (get_task(TaskConfig(name=name)) for name in ("LaMP-1", "LaMP-3", "LaMP-4"))


def test_an_unknown_answer_is_wrong_and_costs_its_gold_label_a_recall() -> None:
    scores = score_answers(CITATION, ["[1]", "[1]", "[2]", "[2]"], [" [1] ", "maybe", "[2]", "[1]"])
    # [1]: 1 right of 2 gold and 2 said -> 2/4; [2]: 1 right of 2 gold and 1 said -> 2/3
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 4 + 2 / 3) / 2)}


def test_macro_f1_counts_labels_that_never_occur_as_zero() -> None:
    movies = get_task(TaskConfig(name="LaMP-2M"))
    scores = score_answers(movies, ["comedy", "action"], ["comedy", "action"])
    assert scores == {"accuracy": 1.0, "macro_f1": pytest.approx(2 / 15)}


@pytest.mark.parametrize(
    ("gold", "answer", "error"),
    [
        ("4", "4", 0.0),
        ("4", " 2.5\n", 1.5),
        ("5", "9", 4.0),  # not clipped to the scale
        ("1", "-3", 4.0),
        ("2", "good", 3.0),  # farther end: 5
        ("4", "", 3.0),  # farther end: 1
        ("3", "no idea", 2.0),
        ("5", "nan", 4.0),
        ("1", "inf", 4.0),
    ],
)
def test_rating_errors_are_lamps(gold: str, answer: str, error: float) -> None:
    assert score_one(RATING, gold, answer) == {"mae": error}


def test_mae_and_rmse() -> None:
    scores = score_answers(RATING, ["1", "2", "5"], ["1", "4", "4"])
    assert scores == {"mae": pytest.approx(1.0), "rmse": pytest.approx(math.sqrt(5 / 3))}


def test_rouge_is_f_measure_without_stemming() -> None:
    # 2 of 4 gold and 2 of 3 answered words in common; "runs" is not "running"
    scores = score_one(HEADLINE, "the dog runs home", "home the DOG")
    assert scores["rouge1"] == pytest.approx(2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4))
    assert scores["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert score_one(HEADLINE, "he runs", "running") == {"rouge1": 0.0, "rougeL": 0.0}


@pytest.mark.parametrize(
    ("task", "golds", "answers"),
    [
        (CITATION, ["[1]", "[2]", "[2]"], ["[1]", "[1]", "x"]),
        (RATING, ["1", "3", "5"], ["2", "x", "5"]),
        (HEADLINE, ["a b c", "d e"], ["a c", "d e f"]),
    ],
)
def test_scores_of_all_are_the_means_of_single_scores(task: Task, golds: list[str], answers: list[str]) -> None:
    singles = [score_one(task, gold, answer) for gold, answer in zip(golds, answers, strict=True)]
    together = score_answers(task, golds, answers)
    assert set(together) == set(task.metrics)
    for name in singles[0]:
        assert together[name] == pytest.approx(sum(single[name] for single in singles) / len(singles))


def test_every_task_names_its_metrics_and_which_are_errors() -> None:
    assert {task.metrics for task in TASKS} == {("accuracy", "macro_f1"), ("mae", "rmse"), ("rouge1", "rougeL")}
    assert {name for task in TASKS for name in task.metrics if name in LOWER_IS_BETTER} == {"mae", "rmse"}


def test_bad_calls_are_errors() -> None:
    with pytest.raises(ValueError, match="as many answers as golds and at least one, got 0 and 0"):
        score_answers(CITATION, [], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_answers(CITATION, ["[1]", "[2]"], ["[1]"])
    with pytest.raises(ValueError, match=r"citation: gold '\[3\]' is not a label; expected one of \[1\], \[2\]"):
        score_answers(CITATION, ["[3]"], ["[3]"])
