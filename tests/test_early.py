"""What a later stage could not do is refused before anything loads, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from line_tools import adapters, oppu, rating_user, result, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    people = [tagging_user(number) for number in range(3)] + [tagging_user(8, role="base")]
    return write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", people))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(one) for one in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("personal.peft.target_modules=[q_proj, v_porj]", "personal.peft.target_modules: found 'v_porj'; .*'v_proj'?"),
        ("adapt.peft.target_modules=[query]", "adapt.peft.target_modules: found 'query'; expected of "),
        ("personal.peft.target_modules=[lm_head]", "personal.peft.target_modules: found 'lm_head'"),
        ("base.name=no/where/at/all", "base.name is 'no/where/at/all', which is no folder"),
        ("task.name=movie_taging", "task.name: unknown task 'movie_taging'; .* did you mean 'movie_tagging'?"),
        ("task.labels=[one]", "task.labels: found the one label 'one'; expected at least 2"),
        ("evaluate.arms=[opppu]", "evaluate.arms: 'opppu' is unknown; .* did you mean 'oppu'?"),
        ("personal.schedule=cosin", "personal.schedule: found 'cosin'; .* did you mean 'cosine'?"),
        ("federated.num_shards=2", "federated.num_shards is 2, but there are 1 base users"),
    ],
)
@pytest.mark.parametrize("stage", ["run", "adapt"])
def test_what_cannot_work_is_refused_at_once(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, message: str, stage: str
) -> None:
    if stage == "adapt":
        oppu("prepare", config)
    assert re.search(message, refused(capsys, stage, config, override))
    assert not (run_dir(config) / "adapt" / "result.json").exists()


def test_a_strategy_that_the_task_has_not_is_refused_by_prepare(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "prepare", config, "task.name=citation", "task.labels=[]", "task.strategy=completion")
    assert "task.strategy: 'completion' does not fit citation; expected one of: next_token, stem" in error


def test_a_source_without_targets_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_users(tmp_path / "base.jsonl", [tagging_user(number, role="base") for number in range(3)])
    error = refused(capsys, "prepare", config, f"data.path={path}")
    assert "no good target user for movie_tagging remains; all 3 users have the role 'base'" in error


def test_items_that_all_have_one_label_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_users(tmp_path / "users.jsonl", [rating_user(number) for number in (1, 3, 5)])
    config = write_config(tmp_path, base, path, "product_rating")
    assert "all items have the label '5'; expected at least two labels" in refused(capsys, "prepare", config)


def tweeter(number: int, num_asked: int = 0) -> dict[str, object]:
    history = [{"id": str(item), "text": f"tweet {item} of {number}"} for item in range(5)]
    asked = [{"id": f"q{item}", "text": "a tweet", "keywords": "tweet"} for item in range(num_asked)]
    return {"user_id": f"user-{number}", "role": "target", "history": [*history, *asked]}


def test_a_target_without_a_question_is_trained_and_not_evaluated(base: Path, tmp_path: Path) -> None:
    people = [tweeter(0), tweeter(1, 2), tweeter(2, 1), {**tweeter(8), "role": "base"}]
    config = write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", people), "tweet_paraphrase")  # type: ignore[list-item]
    oppu("run", config)
    assert sorted(adapters(config)) == ["user-0", "user-1", "user-2"]
    assert result(config, "prepare")["num_queries"] == 3
    lines = (run_dir(config) / "evaluate" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["user_id"] for line in lines} == {"user-1", "user-2"}


def test_a_run_with_nothing_to_evaluate_says_so_before_it_trains(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = write_users(tmp_path / "users.jsonl", [tweeter(0), tweeter(1)])  # type: ignore[list-item]
    config = write_config(tmp_path, base, people, "tweet_paraphrase")
    assert "there is nothing to evaluate: run prepare, adapt and train alone" in refused(capsys, "run", config)
    assert not (run_dir(config) / "adapt").exists()
    for stage in ("adapt", "train"):
        oppu(stage, config)
    assert sorted(adapters(config)) == ["user-0", "user-1"]
    assert "there is nothing to evaluate" in refused(capsys, "evaluate", config)
