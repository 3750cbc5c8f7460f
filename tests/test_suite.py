"""A suite on a tiny base: its units, what they share, resuming, and the report on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from line_tools import tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import stages
from oppu_ray.cli import main
from oppu_ray.configs import find_config
from oppu_ray.suite import is_done, load_suite
from oppu_ray.vault import Vault

USERS = [tagging_user(i, num_items=8) for i in range(4)] + [tagging_user(i, role="base") for i in (8, 9)]


def write_suite(folder: Path, **changes: Any) -> Path:
    """A suite of one set with a variant that shares all, and one that has a task adapter of its own."""
    base = tiny_base(folder / "base")
    users = write_users(folder / "users.jsonl", USERS)
    write_config(folder / "films", base, users).rename(folder / "films.yaml")
    values = {
        "run_dir": str(folder / "suite"),
        "data_root": str(folder),
        "overrides": ["evaluate.arms=[majority_user, task, rag_k1, oppu, oppu_k1, swapped]"],
        "sets": [{"config": "films.yaml", "data": "users.jsonl", "studies": ["amount", "stages"]}],
        "variants": [
            {"study": "amount", "name": "last_1", "overrides": ["study.items=last_1"]},
            {"study": "stages", "name": "short", "overrides": ["adapt.max_steps=1"]},
        ],
        **changes,
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a suite that has run."""
    path = write_suite(tmp_path_factory.mktemp("suites"))
    assert main(["evaluate", "--suite", str(path), "data_root=" + str(path.parent)]) == 0
    return path


def result(suite: Path) -> dict[str, Any]:
    return json.loads((suite.parent / "suite" / "result.json").read_text())


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_units_are_ordinary_runs_that_share_what_is_equal(suite: Path) -> None:
    units = {unit["folder"]: unit for unit in result(suite)["units"]}
    assert list(units) == ["films/seed0/main", "films/seed0/amount-last_1", "films/seed0/stages-short"]
    assert all(unit["state"] == "done" and unit["error"] is None for unit in units.values())
    top = suite.parent / "suite" / "films" / "seed0"
    assert (top / "amount-last_1" / "adapt").resolve() == top / "main" / "adapt"
    assert not (top / "amount-last_1" / "vault").exists() and not (top / "stages-short" / "adapt").is_symlink()
    main_times = units["films/seed0/main"]["times_s"]
    assert set(main_times) == {"prepare", "adapt", "adapt/k1", "train", "train/k1", "evaluate"}
    assert set(units["films/seed0/amount-last_1"]["times_s"]) == {"train", "evaluate"}
    assert set(units["films/seed0/stages-short"]["times_s"]) == {"prepare", "adapt", "train", "evaluate"}


def test_what_sharing_saves_is_the_units_own_times_counted_again(suite: Path) -> None:
    found = result(suite)
    times = [unit["times_s"] for unit in found["units"]]
    assert found["cost"]["elapsed_s"] == pytest.approx(sum(sum(unit.values()) for unit in times))
    main, amount, short = times
    alone = main["evaluate"] + 6 * main["prepare"]  # task; rag_k1; oppu; oppu_k1; swapped
    alone += 3 * main["adapt"] + 2 * main["adapt/k1"] + 2 * main["train"] + main["train/k1"]
    alone += amount["evaluate"] + main["prepare"] + main["adapt"] + amount["train"]
    alone += short["evaluate"] + 2 * short["prepare"] + 2 * short["adapt"] + short["train"]
    assert found["cost"]["unshared_s"] == pytest.approx(alone)


def test_a_variant_bends_personal_training_only(suite: Path) -> None:
    top = suite.parent / "suite" / "films" / "seed0"
    trained = [json.loads((top / name / "train" / "result.json").read_text()) for name in ("main", "amount-last_1")]
    assert trained[0]["fingerprints"]["run"] != trained[1]["fingerprints"]["run"]
    assert trained[1]["num_trained"] == 4 and trained[0]["adapter_bytes"] == trained[1]["adapter_bytes"] > 1000
    arms = {line["arm"] for line in map(json.loads, (top / "amount-last_1/evaluate/predictions.jsonl").open())}
    assert arms == {"oppu"}
    vault = Vault(top / "main" / "vault")
    for run, num_items in zip(trained, (5, 1), strict=True):  # of eight items, three are queries
        version = vault.registry.unit_version(run["fingerprints"]["run"], vault.user_hash("user-0"))
        _, manifest = vault.load("user-0", version, base_fingerprint=None)
        assert len(manifest.item_ids) == num_items and ("study" in manifest.recipe) == (num_items == 1)
    vault.close()


def test_a_suite_that_is_done_is_not_done_again(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(config: Any) -> None:
        raise AssertionError("a stage ran")

    for stage in ("prepare", "adapt", "train", "evaluate"):
        monkeypatch.setattr(stages, stage, must_not_run)
    before = tree(suite.parent / "suite" / "films"), result(suite)["units"], result(suite)["cost"]
    more_workers = (
        'overrides=["evaluate.arms=[majority_user, task, rag_k1, oppu, oppu_k1, swapped]", workers.threads=2]'
    )
    assert main(["evaluate", "--suite", str(suite), more_workers]) == 0
    assert (tree(suite.parent / "suite" / "films"), result(suite)["units"], result(suite)["cost"]) == before


def test_a_suite_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_suite(tmp_path)
    evaluate = stages.evaluate

    def stop(config: Any) -> Any:
        if "amount" in config.run_dir:
            raise KeyboardInterrupt
        return evaluate(config)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "evaluate", stop)
        assert main(["evaluate", "--suite", str(path)]) == 3
    assert "oppu: interrupted; run the same again to continue" in capsys.readouterr().err
    assert [unit["state"] for unit in result(path)["units"]] == ["done", "to do", "to do"]
    before = tree(tmp_path / "suite" / "films" / "seed0" / "main" / "adapt")
    assert main(["evaluate", "--suite", str(path)]) == 0
    assert {unit["state"] for unit in result(path)["units"]} == {"done"}
    assert tree(tmp_path / "suite" / "films" / "seed0" / "main" / "adapt") == before


def test_a_unit_with_users_who_may_succeed_next_time_is_not_done(suite: Path) -> None:
    _, units = load_suite(suite, ["data_root=" + str(suite.parent)])
    path = Path(units[0].config.run_dir) / "train" / "k1" / "result.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "num_to_retry": 1}))
    try:
        assert [is_done(unit) for unit in units] == [False, True, True]
    finally:
        path.write_text(before)


def test_times_that_were_lost_or_torn_count_as_nothing(tmp_path: Path) -> None:
    path = write_suite(tmp_path, overrides=["evaluate.arms=[task]"], variants=[], sets=[{"config": "films.yaml"}])
    assert main(["evaluate", "--suite", str(path)]) == 0
    times = tmp_path / "suite" / "times.jsonl"
    *_, evaluated = lines = times.read_text().splitlines()
    assert json.loads(evaluated)["what"] == "evaluate"
    times.write_text("\n".join(lines[:-1]) + "\n" + evaluated[:20])
    assert main(["evaluate", "--suite", str(path)]) == 0
    assert "evaluate" not in result(path)["units"][0]["times_s"] and result(path)["cost"]["elapsed_s"] > 0


def test_rounds_count_in_a_suites_time_and_what_is_done_does_not_count_again(tmp_path: Path) -> None:
    arms = "evaluate.arms=[task]"
    rounds = ["federated.num_shards=2", "federated.num_rounds=1", "federated.local_steps=1"]
    path = write_suite(tmp_path, overrides=[arms, *rounds], variants=[], sets=[{"config": "films.yaml"}])
    assert main(["evaluate", "--suite", str(path)]) == 0
    before = result(path)["units"][0]["times_s"]
    assert before["adapt"] > 0
    (tmp_path / "suite" / "films" / "seed0" / "main" / "evaluate" / "result.json").unlink()
    assert main(["evaluate", "--suite", str(path)]) == 0
    after = result(path)["units"][0]["times_s"]
    assert {**after, "prepare": 0} == {**before, "prepare": 0} and after["prepare"] > before["prepare"]


def test_one_bad_set_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [{"config": "films.yaml", "data": "nowhere.jsonl"}, {"config": "films2.yaml", "data": "users.jsonl"}]
    path = write_suite(tmp_path, sets=sets, variants=[], overrides=["evaluate.arms=[task]"])
    (tmp_path / "films2.yaml").write_text((tmp_path / "films.yaml").read_text())
    assert main(["evaluate", "--suite", str(path)]) == 1
    bad, good = result(path)["units"]
    assert (bad["state"], good["state"]) == ("failed", "done") and "nowhere.jsonl" in bad["error"]
    assert "nowhere.jsonl" in capsys.readouterr().out


def test_the_report_reads_a_suite(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oppu_ray.report.NUM_RESAMPLES", 50)
    top = suite.parent / "suite"
    assert main(["report", str(top)]) == 0
    found = json.loads((top / "report" / "result.json").read_text())
    assert list(found["studies"]) == ["amount", "stages"] and list(found["sets"]) == ["films"]
    assert found["cost"]["saved_share"] > 0 and found["sets"]["films"]["num_queries"] == 12
    evaluated = json.loads((top / "films" / "seed0" / "main" / "evaluate" / "result.json").read_text())
    assert evaluated["history"] == {f"user-{number}": 5 for number in range(4)}
    assert set(evaluated["fingerprints"]["evaluations"]) == set(evaluated["arms"])


@pytest.mark.parametrize("name", ["paper", "tune"])
def test_the_shipped_suites_are_whole(name: str) -> None:
    suite, units = load_suite(find_config(name, kind="suites"), ["data_root=/data"])
    assert len({unit.folder for unit in units}) == len(units)
    assert all(Path(unit.config.data.path).parts[:2] == ("/", "data") for unit in units)
    assert {variant.study for variant in suite.variants} == {study for one in suite.sets for study in one.studies}


def test_seeds_come_after_the_studies_and_may_have_fewer_arms(tmp_path: Path) -> None:
    seeds = {"seeds": [3, 4], "seed_overrides": ["evaluate.arms=[task, oppu]"]}
    _, units = load_suite(write_suite(tmp_path, **seeds), [])
    order = [(unit.study, unit.config.seed) for unit in units]
    assert order == [("main", 3), ("amount", 3), ("stages", 3), ("main", 4)]
    assert len(units[0].config.evaluate.arms) == 6 and units[3].config.evaluate.arms == ("task", "oppu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": []}, "no sets or no seeds"),
        ({"sets": [{"config": "films.yaml", "studies": ["sleep"]}]}, "films: unknown study 'sleep'"),
        ({"overrides": ["personal.epoch=2"]}, "personal.epoch: unknown key"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_a_bad_suite_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["evaluate", "--suite", str(write_suite(tmp_path, **changes))]) == 2
    assert message in capsys.readouterr().err


def test_without_a_config_or_a_suite_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate"])
    assert "expected a YAML file" in capsys.readouterr().err
