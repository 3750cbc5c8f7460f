"""The arms with a user's past in the prompt, by the command line: what is trained, shared, answered and resumed."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from line_tools import adapters, chat_user, oppu, result, run_dir, tagging_user, versions, write_config, write_users
from tiny import tiny_base

from oppu_ray import evaluation, stages, workers
from oppu_ray.cli import main
from oppu_ray.config import load_config, to_dict
from oppu_ray.core import TrainingPair
from oppu_ray.evaluation import Arm, explain, parse_arm
from oppu_ray.prepared import read_index
from oppu_ray.tasks import render_prompt
from oppu_ray.vault import Vault

ARMS = "evaluate.arms=[task, oppu, swapped, rag_k1, rag_k2, pag, oppu_k1, oppu_pag_k2]"
USERS = [tagging_user(i) for i in range(4)] + [tagging_user(i, role="base") for i in (8, 9)]
FILM = re.compile(r"film (\d+) of (\d+)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of the default arms, and then once more with arms that need memory."""
    folder = tmp_path_factory.mktemp("arms")
    users = write_users(folder / "users.jsonl", USERS)
    config = write_config(folder, base, users, memory={"max_tokens": 300})
    oppu("run", config)
    return config


@pytest.fixture(scope="module")
def plain(run: Path) -> dict[str, Any]:
    """What the run left before arms with memory were asked for."""
    return {
        "versions": versions(run),
        "lines": predictions(run),
        "adapt": result(run, "adapt"),
        "train": result(run, "train"),
        "tree": tree(run),
    }


@pytest.fixture(scope="module")
def spied(run: Path, plain: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """The run with memory arms: its training pairs and its query prompts, as they were tokenised; units as they ran."""
    seen: dict[str, list[Any]] = {"pairs": [], "queries": [], "units": []}
    encode, encode_prompt, answer = workers.encode, evaluation.encode_prompt, workers.Worker.answer

    def spy_on_pair(pair: TrainingPair, *rest: Any) -> Any:
        seen["pairs"].append(pair)
        return encode(pair, *rest)

    def spy_on_query(prompt: Any, *rest: Any) -> Any:
        seen["queries"].append(prompt)
        return encode_prompt(prompt, *rest)

    def spy_on_unit(worker: workers.Worker, unit: Any, arm: str, *rest: Any, **options: Any) -> Any:
        seen["units"].append(arm)
        return answer(worker, unit, arm, *rest, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers, "encode", spy_on_pair)
        patched.setattr(evaluation, "encode_prompt", spy_on_query)
        patched.setattr(workers.Worker, "answer", spy_on_unit)
        oppu("run", run, ARMS)
    yield seen


def predictions(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir(config) / "evaluate" / "predictions.jsonl").open()]


def tree(config: Path) -> set[str]:
    """Names of what adapting, training and evaluating left, without what a digest names."""
    folders = [run_dir(config) / stage for stage in ("adapt", "train", "evaluate")]
    paths = [path.relative_to(run_dir(config)) for folder in folders for path in folder.rglob("*")]
    return {str(path) for path in paths if "base-" not in str(path)}


@pytest.mark.parametrize(
    ("name", "arm", "text"),
    [
        ("majority_user", Arm("majority_user", "habit"), "the user's own most common label"),
        ("task", Arm("task", "task"), "task-adapted, same for everyone"),
        ("oppu", Arm("oppu", "own", control="swapped"), "OPPU: the user's own adapter"),
        ("rag_k1", Arm("rag_k1", "task", 1), "task-adapted, prompt with 1 past item"),
        ("pag", Arm("pag", "task", 0, True), "task-adapted, prompt with profile"),
        ("pag_k2", Arm("pag_k2", "task", 2, True), "task-adapted, prompt with 2 past items and profile"),
        ("oppu_k12", Arm("oppu_k12", "own", 12, False, "rag_k12"), "OPPU, prompt with 12 past items"),
        ("oppu_pag", Arm("oppu_pag", "own", 0, True, "pag"), "OPPU, prompt with profile"),
        ("oppu_pag_k1", Arm("oppu_pag_k1", "own", 1, True, "pag_k1"), "OPPU, prompt with 1 past item and profile"),
    ],
)
def test_an_arms_name_says_which_model_and_which_prompt(name: str, arm: Arm, text: str) -> None:
    assert parse_arm(name) == arm and explain(name) == text


@pytest.mark.parametrize(
    "name", ["rag", "rag_k0", "rag_k", "oppu_k01", "oppu_kk", "swapped_k1", "oppu_rag_k1", "PAG", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"evaluate.arms: '{name}' is unknown; expected one of majority_global, .*<K>"):
        parse_arm(name)


def test_default_arms_leave_what_they_left_before_there_was_memory(run: Path, plain: dict[str, Any]) -> None:
    config = to_dict(load_config(run))
    adapted, trained = plain["adapt"]["fingerprints"], plain["train"]["fingerprints"]
    own = config["personal"], config["task"], config["seed"]
    assert trained["run"] == stages._digest(trained["histories"], adapted["task_base"], *own)
    of_base_users = read_index(Path(config["run_dir"]) / "prepare").base_fingerprint
    task_base = stages._digest(of_base_users, adapted["base"], config["adapt"], *own[1:])
    assert plain["adapt"]["task_base"].endswith(f"/adapt/base-{task_base}")
    assert plain["tree"] == {f"{stage}/result.json" for stage in ("adapt", "train", "evaluate")} | {
        "evaluate/predictions.jsonl"
    }
    vault = Vault(run_dir(run) / "vault")
    assert [vault.blob_names(row.user_hash) for row in vault.registry.users()] == [[]] * 4
    vault.close()


def test_arms_of_one_kind_of_prompt_share_a_task_adapter_and_only_own_arms_train_users(
    run: Path, plain: dict[str, Any], spied: dict[str, list[Any]]
) -> None:
    kinds = {"k1", "k2", "pag", "pag_k2"}
    assert {path.parent.name for path in run_dir(run).glob("adapt/*/result.json")} == kinds
    assert {path.parent.name for path in run_dir(run).glob("train/*/result.json")} == {"k1", "pag_k2"}
    adapted = [json.loads(path.read_text()) for path in run_dir(run).glob("adapt/**/result.json")]
    assert len({one["fingerprints"]["task_base"] for one in adapted}) == 5
    trained = [json.loads(path.read_text()) for path in run_dir(run).glob("train/**/result.json")]
    assert len({one["fingerprints"]["run"] for one in trained}) == 3
    assert {one["config"]["memory"]["top_k"]: one["num_trained"] for one in trained} == {0: 0, 1: 4, 2: 4}
    assert result(run, "adapt")["task_base"] == plain["adapt"]["task_base"]


def test_a_task_adapter_that_is_being_trained_is_locked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, base, write_users(tmp_path / "users.jsonl", USERS))
    train = stages._train_task_adapter

    def train_locked(*args: Any) -> Any:
        (lock,) = run_dir(config).glob(".adapt-*.lock")
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return train(*args)

    oppu("prepare", config)
    monkeypatch.setattr(stages, "_train_task_adapter", train_locked)
    assert oppu("adapt", config)["losses"]


def test_answers_that_were_given_are_not_given_again_when_arms_are_added(
    run: Path, plain: dict[str, Any], spied: dict[str, list[Any]]
) -> None:
    assert list(dict.fromkeys(spied["units"])) == ["rag_k1", "oppu_k1", "rag_k2", "pag", "oppu_pag_k2"]
    lines = predictions(run)
    assert [line for line in lines if line in plain["lines"]] == plain["lines"]
    assert len(lines) == len(plain["lines"]) + 5 * 8


def test_the_table_pairs_every_arm_with_the_task_model_and_with_its_control(
    run: Path, spied: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation_result = oppu("evaluate", run, ARMS, "evaluate.arms=[task, oppu, swapped, rag_k1, pag, oppu_k1]")
    assert list(evaluation_result["arms"]) == ["task", "oppu", "swapped", "rag_k1", "pag", "oppu_k1"]
    assert {(arm["num_queries"], arm["num_users"]) for arm in evaluation_result["arms"].values()} == {(8, 4)}
    assert len({arm["nll"] for arm in evaluation_result["arms"].values()}) == 6
    assert {arm: gain["over"] for arm, gain in evaluation_result["gains"].items()} == dict.fromkeys(
        ["oppu", "swapped", "rag_k1", "pag", "oppu_k1"], "task"
    )
    overs = {arm: control["over"] for arm, control in evaluation_result["controls"].items()}
    assert overs == {"oppu": "swapped", "oppu_k1": "rag_k1"}
    assert evaluation_result["nll_controls"]["oppu_k1"]["mean"] != 0
    assert re.search(r"^oppu_k1 over rag_k1, nats per token: [+-]0\.\d{3} \[", capsys.readouterr().out, re.MULTILINE)


def test_the_version_that_is_served_stays_the_plain_one(
    run: Path, plain: dict[str, Any], spied: dict[str, list[Any]]
) -> None:
    assert versions(run) == plain["versions"]
    vault = Vault(run_dir(run) / "vault")
    rows = vault.registry.versions(vault.user_hash("user-1"))
    manifests = [vault.load("user-1", row.version, base_fingerprint=None)[1] for row in rows]
    assert [manifest.recipe.get("memory", {}).get("top_k") for manifest in manifests] == [None, 1, 2]
    assert manifests[2].recipe["memory"]["profile"] == "template"
    assert len({manifest.base_fingerprint for manifest in manifests}) == 3
    with pytest.raises(ValueError, match="no good version before"):  # a version of another base is no way back
        vault.rollback("user-1")
    vault.close()


def test_prompts_quote_only_their_own_user_and_only_the_past(spied: dict[str, list[Any]]) -> None:
    for pair in spied["pairs"]:
        number, place = map(int, re.fullmatch(r"u(\d+)-(\d+)", pair.item_id).groups())  # type: ignore[union-attr]
        found = [tuple(map(int, match)) for match in FILM.findall(render_prompt(pair.prompt))]
        assert found[-1] == (place, number) and all(item < place for item, _ in found[:-1])
        assert {owner for _, owner in found} == {number} and len(found) - 1 == len(pair.prompt.memory)
    lengths = [len(prompt.memory) for prompt in spied["queries"]]
    assert sorted(set(lengths)) == [0, 1, 2] and len(lengths) == 5 * 8
    for prompt in spied["queries"]:
        *past, (asked, number) = [tuple(map(int, match)) for match in FILM.findall(render_prompt(prompt))]
        assert asked >= 3 and all(item < 3 and owner == number for item, owner in past)
    with_profile = [prompt for prompt in spied["queries"] if prompt.profile]
    assert len(with_profile) == 2 * 8 and all("of 3)" in prompt.profile for prompt in with_profile)


def test_a_base_users_profile_is_of_items_before_all_that_show_it(spied: dict[str, list[Any]]) -> None:
    shown = {}
    for pair in spied["pairs"]:
        number, place = map(int, re.fullmatch(r"u(\d+)-(\d+)", pair.item_id).groups())  # type: ignore[union-attr]
        if number >= 8 and pair.prompt.profile:
            shown.setdefault((number, pair.prompt.profile), set()).add(place)
    assert len(shown) == 2
    for (_, profile), places in shown.items():
        assert "(2 of 2)" in profile or "(1 of 2)" in profile
        assert min(places) == 2


def test_training_and_answering_are_given_the_same_profile_and_room(spied: dict[str, list[Any]]) -> None:
    profiles: dict[str, set[str]] = {}
    for prompt in [pair.prompt for pair in spied["pairs"]] + spied["queries"]:
        if prompt.profile:
            profiles.setdefault(FILM.findall(prompt.input)[0][1], set()).add(prompt.profile)
    assert set(profiles) == set("012389") and {len(texts) for texts in profiles.values()} == {1}


def test_memory_is_cut_before_the_question(run: Path) -> None:
    config = load_config(run)
    config = replace(config, memory=replace(config.memory, top_k=4, max_tokens=0))
    user = workers.read_users(run_dir(run) / "prepare", workers.read_index(run_dir(run) / "prepare"), ["user-8"])[0]
    base, vault = workers.open_base(config), Vault(run_dir(run) / "vault")
    opened = workers.Memories(config, vault, workers.profile_writer(config)).open(user)
    examples = workers.encode_user(config, user, base, opened)
    vault.close()
    texts = [base.tokenizer.decode(example.input_ids) for example in examples]
    assert all(f"film {i} of 8" in text and "Which tag fits this movie?" in text for i, text in enumerate(texts))
    assert all(len(example.input_ids) <= 160 for example in examples)
    assert 1 < len(FILM.findall(texts[4])) < 5  # there were four to quote
    assert not any(
        "Most frequent tag" in text for text in texts
    )  # there is a profile of this user, but not for this arm


def test_a_run_stopped_while_it_trains_with_memory_goes_on(
    run: Path, spied: dict[str, list[Any]], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, base, run.parent / "users.jsonl", memory={"max_tokens": 300})
    for stage in ("prepare", "adapt"):
        oppu(stage, config, ARMS)
    commit, commits = Vault.commit, []

    def stop_at_the_seventh(*arguments: Any, **options: Any) -> str:
        commits.append(arguments[1])
        if len(commits) == 7:
            raise KeyboardInterrupt
        return commit(*arguments, **options)

    monkeypatch.setattr(Vault, "commit", stop_at_the_seventh)
    assert main(["train", str(config), ARMS]) == 3
    monkeypatch.undo()
    oppu("train", config, ARMS)
    trained = {path.parent.name: json.loads(path.read_text()) for path in run_dir(config).glob("train/**/result.json")}
    assert {kind: one["num_trained"] for kind, one in trained.items()} == {"train": 0, "k1": 2, "pag_k2": 4}
    assert adapters(config) == adapters(run)
    evaluated = oppu("evaluate", config, ARMS)
    mine = {line["arm"]: line for line in predictions(run)}
    assert all(mine[line["arm"]] == line for line in predictions(config)[-1:])
    assert evaluated["arms"]["oppu_k1"] == oppu("evaluate", run, ARMS)["arms"]["oppu_k1"]


@pytest.mark.slow
def test_two_actors_give_the_same_answers_as_one_process(base: Path, tmp_path: Path, ray_session: Path) -> None:
    users, results = write_users(tmp_path / "users.jsonl", [chat_user(i) for i in (0, 1)]), []
    for number in (0, 2):
        config = write_config(tmp_path / str(number), base, users, "chat_reply", memory={"retriever": "recency"})
        arms = "evaluate.arms=[task, oppu_k1, rag_k1]"
        results.append(oppu("run", config, arms, f"workers.num_workers={number}"))
    assert results[0]["arms"] == results[1]["arms"] and results[0]["controls"] == results[1]["controls"]
