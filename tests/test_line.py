"""The whole line by the command line, from raw file to table: each kind of task, on Ray as inline, interrupted."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from line_tools import (
    adapters,
    chat_user,
    oppu,
    rating_user,
    result,
    run_dir,
    tagging_user,
    versions,
    write_config,
    write_users,
)
from tiny import tiny_base

from oppu_ray import stages, workers
from oppu_ray.cli import main
from oppu_ray.vault import Vault

CANARY = "xyzzyplugh"
COMMON = {"command", "config", "hardware", "fingerprints", "elapsed_s"}
TARGETS = ["user-0", "user-1", "user-2", "user-3"]
ARMS = ["majority_global", "majority_user", "last_user", "base", "task", "oppu", "swapped"]
TAGGING = [tagging_user(i, canary=CANARY) for i in range(4)] + [tagging_user(i, role="base") for i in (8, 9)]
BAD = {"user_id": "bad", "role": "target", "history": [{"id": "1", "text": "film", "label": "no such tag"}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def inline(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a whole run in one process: four targets in two packs, two base users, one bad user."""
    folder = tmp_path_factory.mktemp("inline")
    config = write_config(folder, base, write_users(folder / "users.jsonl", [*TAGGING, BAD]))
    oppu("run", config)
    return config


@pytest.fixture
def fresh(base: Path, inline: Path, tmp_path: Path) -> Path:
    """The config of the same run elsewhere, prepared and adapted but not trained."""
    config = write_config(tmp_path, base, inline.parent / "users.jsonl")
    oppu("prepare", config)
    oppu("adapt", config)
    return config


@pytest.fixture
def crossing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that goes to workers and comes back from them, as it happens."""
    seen: list[Any] = []

    def run_units(*arguments: Any, **options: Any) -> Iterator[Any]:
        seen.extend(arguments)
        for one in workers.run_units(*arguments, **options):
            seen.append(one)
            yield one

    monkeypatch.setattr(stages, "run_units", run_units)
    return seen


def predictions(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir(config) / "evaluate" / "predictions.jsonl").open()]


def test_every_result_has_its_documented_keys(inline: Path) -> None:
    results = {stage: result(inline, stage) for stage in ("prepare", "adapt", "train", "evaluate")}
    own = {
        "prepare": "num_target_users num_target_items num_base_users num_base_items num_queries num_rejected",
        "adapt": "task_base losses num_tokens was_done",
        "train": "num_done num_trained num_failed num_to_retry failed num_packs num_split_users num_recoveries "
        "was_done adapter_bytes recovery_s shard_words num_tokens useful_tokens_per_s users_per_hour",
        "evaluate": "arms gains nll_gains controls nll_controls history has_times was_done",
    }
    prints = {
        "prepare": {"histories"},
        "adapt": {"histories", "base", "task_base"},
        "train": {"histories", "run"},
        "evaluate": {"histories", "run", "evaluations"},
    }
    for stage, one in results.items():
        assert set(one) == COMMON | set(own[stage].split()) and one["command"] == stage
        assert set(one["fingerprints"]) == prints[stage] and one["elapsed_s"] > 0
        assert {"cpu", "num_cores", "memory_bytes", "gpu", "torch", "oppu_ray"} <= set(one["hardware"])
        assert one["config"]["personal"]["learning_rate"] == 0.01
    prepare, train = results["prepare"], results["train"]
    assert [prepare[f"num_{name}"] for name in ("target_users", "target_items", "queries")] == [4, 12, 8]
    assert [prepare[f"num_{name}"] for name in ("base_users", "base_items", "rejected")] == [2, 10, 1]
    assert (train["num_done"], train["num_trained"], train["failed"], train["num_packs"]) == (4, 4, {}, 2)
    assert train["num_tokens"] > 0 and train["users_per_hour"] > 0 and len(train["shard_words"]) == 1
    assert len(results["adapt"]["losses"]) == 2
    assert results["adapt"]["fingerprints"]["base"] != results["adapt"]["fingerprints"]["task_base"]


def test_the_evaluation_compares_all_arms_on_the_same_queries(inline: Path) -> None:
    evaluation = result(inline, "evaluate")
    assert list(evaluation["arms"]) == ARMS
    assert {(arm["num_queries"], arm["num_users"]) for arm in evaluation["arms"].values()} == {(8, 4)}
    assert set(evaluation["gains"]) == set(ARMS) - {"task"} and set(evaluation["controls"]) == {"oppu"}
    assert set(evaluation["nll_gains"]) == {"base", "oppu", "swapped"}
    nlls = {evaluation["arms"][arm]["nll"] for arm in ("base", "task", "oppu", "swapped")}
    assert len(nlls) == 4 and evaluation["nll_gains"]["oppu"]["mean"] > 0
    lines = predictions(inline)
    assert len(lines) == 7 * 8 and len({line["evaluation"] for line in lines}) == 1
    assert set(lines[0]) == {"evaluation", "arm", "user_id", "query_id", "gold", "text", "nll", "label_text"}


def test_a_bad_user_is_rejected_with_the_reason_and_the_rest_goes_on(inline: Path) -> None:
    (line,) = (run_dir(inline) / "prepare" / "rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["user_id"], rejected["line"], rejected["value"]) == ("bad", 7, "no such tag")
    assert "Item '1' has the label 'no such tag'; expected one of sci-fi" in rejected["reason"]
    assert sorted(adapters(inline)) == TARGETS


@pytest.mark.parametrize(
    ("task", "user", "metric"), [("chat_reply", chat_user, "rougeL"), ("product_rating", rating_user, "mae")]
)
def test_the_line_for_other_kinds_of_task(base: Path, tmp_path: Path, task: str, user: Any, metric: str) -> None:
    users = [user(i) for i in range(3)] + [user(8, role="base")]
    config = write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", users), task)
    evaluation = oppu("run", config)
    assert list(evaluation["arms"]) == (ARMS if task == "product_rating" else ARMS[3:])
    assert evaluation["gains"]["oppu"]["metric"] == metric and metric in evaluation["arms"]["oppu"]
    assert evaluation["nll_gains"]["oppu"]["mean"] > 0
    labels = {line["label_text"] for line in predictions(config) if line["arm"] == "oppu"}
    assert labels <= set("12345") if task == "product_rating" else labels == {None}


def test_a_user_who_cannot_be_trained_is_in_failed_and_the_rest_goes_on(base: Path, tmp_path: Path) -> None:
    def author(number: int, **paper: str) -> dict[str, Any]:
        papers = [{"id": f"{number}-{i}", "text": f"paper {i} of {CANARY}", **paper} for i in range(3)]
        query = {"id": "q", "text": "paper", "options": ["one", "two"], "label": "[1]"}
        return {"user_id": f"user-{number}", "role": "target", "history": [*papers, query], "query_start": 3}

    users = [author(0, abstract="long"), author(1), author(2, abstract="short")]
    config = write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", users), "citation")
    evaluation = oppu("run", config, "task.strategy=title_to_abstract", "evaluate.arms=[task, oppu]")
    train = result(config, "train")
    assert set(train["failed"]) == {"user-1"} and (train["num_done"], train["num_failed"]) == (2, 1)
    assert train["failed"]["user-1"].startswith("user 'user-1': item '1-0': no query-label pair (options, label empty)")
    assert CANARY not in json.dumps(train)
    assert evaluation["arms"]["oppu"]["num_users"] == 2 and sorted(adapters(config)) == ["user-0", "user-2"]
    again = oppu("train", config, "task.strategy=title_to_abstract")
    assert (again["num_done"], again["num_trained"], set(again["failed"])) == (2, 0, {"user-1"})


def test_a_second_run_trains_and_answers_nothing_again(inline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, evaluation, lines = versions(inline), result(inline, "evaluate"), predictions(inline)
    for module, name in (
        (stages, "_train_task_adapter"),
        (workers, "train_steps"),
        (workers.evaluation, "answer_users"),
    ):
        monkeypatch.setattr(module, name, None)
    oppu("run", inline)
    train = result(inline, "train")
    assert (train["num_done"], train["num_trained"], train["num_tokens"], train["users_per_hour"]) == (4, 0, 0, 0.0)
    assert versions(inline) == before and predictions(inline) == lines
    assert {key: result(inline, "evaluate")[key] for key in ("arms", "gains")} == {
        key: evaluation[key] for key in ("arms", "gains")
    }


def test_a_run_stopped_in_its_second_pack_continues_to_the_same_bits(
    inline: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, commits = Vault.commit, []

    def stop_at_the_fourth(*arguments: Any, **options: Any) -> str:
        commits.append(arguments[1])
        if len(commits) == 4:
            raise KeyboardInterrupt
        return commit(*arguments, **options)

    monkeypatch.setattr(Vault, "commit", stop_at_the_fourth)
    assert main(["train", str(fresh)]) == 3
    monkeypatch.undo()
    assert not (run_dir(fresh) / "train" / "result.json").exists()
    first = versions(fresh)
    assert sorted(first) == sorted(commits[:3])
    train = oppu("train", fresh)
    assert (train["num_done"], train["num_trained"]) == (4, 2)  # the second pack, as a whole
    assert adapters(fresh) == adapters(inline)
    assert {user_id: versions(fresh)[user_id] for user_id in first} == first


def test_one_users_history_moves_no_other_users_adapter(base: Path, inline: Path, tmp_path: Path) -> None:
    users = json.loads(json.dumps([*TAGGING, BAD]))
    for item in users[1]["history"]:
        item["text"] = item["text"].replace("of 1", "of 7")  # as many tokens: the shapes of the pack stay as they are
    config = write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", users))
    for stage in ("prepare", "adapt", "train"):
        oppu(stage, config)
    mine, theirs = adapters(config), adapters(inline)
    assert [user_id for user_id in TARGETS if mine[user_id] != theirs[user_id]] == ["user-1"]


def test_another_seed_is_another_run(inline: Path, fresh: Path) -> None:
    train = oppu("train", fresh, "seed=1")
    assert train["num_trained"] == 4 and train["fingerprints"]["run"] != result(inline, "train")["fingerprints"]["run"]
    assert not set(adapters(fresh).values()) & set(adapters(inline).values())


def test_an_evaluation_goes_on_after_its_torn_last_line(inline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_dir(inline) / "evaluate" / "predictions.jsonl"
    whole, before = path.read_bytes().splitlines(keepends=True), result(inline, "evaluate")
    other = json.dumps(json.loads(whole[0]) | {"evaluation": "another"}).encode() + b"\n"
    cut = next(i for i, line in enumerate(whole) if b'"oppu"' in line) + 3  # in the middle of the second user
    path.write_bytes(b"".join([other, *whole[:cut], whole[cut][:20]]))
    asked: list[tuple[str, list[str]]] = []
    answer = workers.Worker.answer

    def recorded(self: workers.Worker, unit: tuple[str, ...], arm: str, *rest: Any, **options: Any) -> Iterator[Any]:
        asked.append((arm, list(unit)))
        return answer(self, unit, arm, *rest, **options)

    monkeypatch.setattr(workers.Worker, "answer", recorded)
    after = oppu("evaluate", inline)
    assert asked == [("oppu", TARGETS[1:2]), ("oppu", TARGETS[2:]), ("swapped", TARGETS[:2]), ("swapped", TARGETS[2:])]
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole) + 1 and set(lines) == {other, *whole}
    assert after["arms"] == before["arms"] and after["gains"] == before["gains"]


def test_a_line_separator_in_an_answer_is_text(inline: Path, tmp_path: Path) -> None:
    line = predictions(inline)[0] | {"text": "one\u2028two\x85three"}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n")
    kept = stages._resume_predictions(path, {line["arm"]: line.pop("evaluation")}, {line["user_id"]: 1})
    assert [dataclasses.asdict(one) for one in kept] == [line]


def test_a_history_leaves_no_word_in_logs_results_or_what_train_returns(
    fresh: Path, crossing: list[Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    oppu("train", fresh, "run_dir=" + str(run_dir(fresh)))
    assert CANARY not in repr(crossing) and "user-3" in repr(crossing)
    oppu("evaluate", fresh)
    assert CANARY in (run_dir(fresh) / "prepare" / "users.jsonl").read_text()
    output = capfd.readouterr()
    assert CANARY not in caplog.text + output.out + output.err and "4 users trained" in output.out
    for path in run_dir(fresh).rglob("result.json"):
        assert CANARY not in path.read_text()


def test_two_actors_give_the_same_adapters_and_answers_and_leak_no_word(
    inline: Path, fresh: Path, crossing: list[Any], ray_session: Path
) -> None:
    train = oppu("train", fresh, "workers.num_workers=2")
    assert (train["num_trained"], train["failed"], len(train["shard_words"])) == (4, {}, 2)
    assert train["fingerprints"]["run"] == result(inline, "train")["fingerprints"]["run"]
    assert adapters(fresh) == adapters(inline)
    assert len(crossing) == 11 and CANARY not in repr(crossing)  # seven arguments, four users done
    evaluation = oppu("evaluate", fresh, "workers.num_workers=2")
    mine = result(inline, "evaluate")
    assert evaluation["arms"] == mine["arms"] and evaluation["gains"] == mine["gains"]
    logs = [path for path in ray_session.rglob("logs/*") if path.is_file()]
    assert logs and not [path for path in logs if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("train", (), "run `adapt` with this config first"),
        (
            "evaluate",
            ("evaluate.arms=[task, opu]",),
            "evaluate.arms: 'opu' is unknown; expected one of majority_global",
        ),
        ("adapt", ("run_dir=nowhere",), "index.json does not exist: run `prepare` with this config first"),
        ("prepare", ("data.path=nowhere.jsonl",), "nowhere.jsonl' does not exist"),
    ],
)
def test_a_stage_too_early_or_a_wrong_value_says_what_to_do(
    base: Path, inline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stage: str, overrides: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, base, inline.parent / "users.jsonl")
    oppu("prepare", config)
    assert main([stage, str(config), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_adapting_to_other_histories_must_be_done_again(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oppu("prepare", fresh, "data.num_targets=3")
    assert main(["train", str(fresh)]) == 2
    assert "belongs to other histories than" in capsys.readouterr().err
