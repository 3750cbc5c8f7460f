"""Verdicts, bins, studies and claims on runs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oppu_ray.config import Config, TaskConfig, to_dict
from oppu_ray.findings import (
    NOT_SUPPORTED,
    SUPPORTED,
    TOO_LITTLE,
    claim_of,
    comparisons_of,
    find,
    load_runs,
    verdict,
)
from oppu_ray.statistics import paired_gain

TASK = TaskConfig(name="movie_tagging", labels=("a", "b"))
NUM_USERS, NUM_QUERIES = 12, 6


def write_run(
    folder: Path, right: dict[str, float], seed: int = 0, shift: dict[str, float] | None = None, **result: Any
) -> Path:
    """A run whose arms are right with these probabilities, each query by the same draw; `shift` lowers the nll."""
    random = np.random.default_rng(seed)
    (folder / "evaluate").mkdir(parents=True)
    lines = []
    draws = random.random((NUM_USERS, NUM_QUERIES))
    noise = random.normal(2.0, 0.1, (NUM_USERS, NUM_QUERIES))
    for arm, share in right.items():
        for user in range(NUM_USERS):
            for query in range(NUM_QUERIES):
                values = {"arm": arm, "user_id": f"u{user}", "query_id": str(query), "gold": "a", "evaluation": arm}
                values["text"] = values["label_text"] = "a" if draws[user, query] < share else "b"
                values["nll"] = noise[user, query] - (shift or {}).get(arm, 0.0)
                lines.append(json.dumps(values))
    (folder / "evaluate" / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))
    values = {
        "config": to_dict(Config(task=TASK, seed=seed)),
        "fingerprints": {"evaluations": {arm: arm for arm in right}},
        "hardware": {"gpu": None, "cpu": "a CPU", "num_cores": 2},
        "history": {f"u{user}": 10 * (user + 1) for user in range(NUM_USERS)},
        "has_times": True,
        **result,
    }
    (folder / "evaluate" / "result.json").write_text(json.dumps(values))
    return folder


def write_suite(folder: Path, units: list[tuple[str, str, str]]) -> Path:
    """A suite's result.json over (folder, study, variant) units of the set "films"; what "to_do" names is not done."""
    listed = [
        {
            "folder": place,
            "set": "films",
            "study": study,
            "variant": name,
            "state": "to do" if "to_do" in place else "done",
        }
        for place, study, name in units
    ]
    cost = {"elapsed_s": 30.0, "unshared_s": 120.0}
    (folder / "result.json").write_text(json.dumps({"command": "suite", "units": listed, "cost": cost}))
    return folder


def found(folders: list[Path]) -> dict[str, Any]:
    return find(*load_runs(folders), num_resamples=400)


def rows(findings: dict[str, Any], claim: str) -> list[dict[str, Any]]:
    return [row for row in findings["claims"] if row["claim"] == claim]


def test_every_arm_is_compared_with_the_shared_model_with_oppu_and_with_its_control() -> None:
    pairs = comparisons_of(["majority_user", "task", "rag_k1", "oppu", "oppu_k1", "swapped"])
    assert pairs == [
        ("majority_user", "task"), ("rag_k1", "task"), ("oppu", "task"), ("oppu_k1", "task"), ("swapped", "task"),
        ("oppu", "majority_user"), ("oppu", "rag_k1"), ("oppu", "oppu_k1"), ("oppu", "swapped"), ("oppu_k1", "rag_k1"),
    ]  # fmt: skip
    assert comparisons_of(["rag_k1"]) == []


@pytest.mark.parametrize(
    ("arm", "over", "claim"),
    [
        ("oppu", "task", "personal"),
        ("oppu", "swapped", "own"),
        ("oppu", "last_user", "habits"),
        ("oppu", "rag_k4", "over_rag"),
        ("oppu", "pag", "over_pag"),
        ("oppu_k4", "rag_k4", "with_rag"),
        ("oppu_pag", "pag", "with_pag"),
        ("rag_k1", "task", None),
        ("oppu", "oppu_k1", None),
    ],
)
def test_comparisons_speak_to_claims(arm: str, over: str, claim: str | None) -> None:
    assert claim_of(arm, over) == claim


def a_gain(mean: float, half: float, **changes: float) -> dict[str, Any]:
    values = {"mean": mean, "low": mean - half, "high": mean + half, "by_user_mean": mean, "by_user_high": mean + half}
    return {**values, "sd": 1.0, "by_user_sd": 0.1, "num_queries": 100, "num_users": 20, **changes}


@pytest.mark.parametrize(
    ("gain", "p", "by_user_p", "said", "num_needed"),
    [
        (a_gain(0.1, 0.05), 0.01, 0.04, SUPPORTED, None),
        (a_gain(0.1, 0.05), 0.01, 0.06, TOO_LITTLE, 785),  # other users might not gain
        (a_gain(0.1, 0.05), 0.05, 0.01, TOO_LITTLE, 785),
        (a_gain(0.001, 0.015), 0.9, 0.9, NOT_SUPPORTED, None),  # rules out the .02 that would matter
        (a_gain(0.001, 0.03), 0.9, 0.9, TOO_LITTLE, 19623),  # does not: what would show .02
        (a_gain(-0.1, 0.05), 0.01, 0.01, NOT_SUPPORTED, None),
        (a_gain(0.1, 0.05, by_user_mean=-0.1), 0.01, 0.01, TOO_LITTLE, 985),
        (a_gain(0.001, 0.015, by_user_high=0.2), 0.9, 0.9, TOO_LITTLE, 19623),
        (a_gain(0.1, 0.05, by_user_sd=0.5), 0.01, 0.06, TOO_LITTLE, 197 * 5),  # 197 users with 5 queries each
    ],
)
def test_a_verdict_needs_queries_and_users(
    gain: dict[str, Any], p: float, by_user_p: float, said: str, num_needed: int | None
) -> None:
    assert verdict(gain, "accuracy", p, by_user_p, 1) == {"verdict": said, "num_needed": num_needed}


def test_more_sets_need_more_queries_each() -> None:
    one, nine = (verdict(a_gain(0.1, 0.05), "accuracy", 0.2, 0.2, num)["num_needed"] for num in (1, 9))
    assert (one, nine) == (785, 1307)  # (2.773 + 0.8416)^2 / .01: the level is .05 / 9


def test_a_clear_gain_is_supported_and_none_is_not(tmp_path: Path) -> None:
    right = {"majority_user": 0.9, "task": 0.3, "oppu": 0.8, "swapped": 0.3}
    shift = {"oppu": 0.5, "swapped": -0.5}
    findings = found([write_run(tmp_path / "films", right, shift=shift)])
    films = findings["sets"]["films"]
    assert (films["metric"], films["num_users"], films["num_queries"], films["seeds"]) == ("accuracy", 12, 72, [0])
    assert films["arms"]["oppu"]["accuracy"] > films["arms"]["task"]["accuracy"]
    personal, nll = rows(findings, "personal")
    assert (personal["metric"], personal["verdict"], nll["verdict"]) == ("accuracy", SUPPORTED, SUPPORTED)
    assert nll["gain"]["mean"] == pytest.approx(0.5)
    assert [row["verdict"] for row in rows(findings, "own")] == [SUPPORTED, SUPPORTED]
    (habits,) = rows(findings, "habits")  # no likelihood without a model
    assert habits["verdict"] != SUPPORTED
    assert findings["cost"] is None and findings["studies"] == {}


def test_holm_runs_over_the_sets_of_one_claim_and_measure(tmp_path: Path) -> None:
    right = {"task": 0.4, "oppu": 0.5}
    runs = [write_run(tmp_path / name, right, seed, {"oppu": 0.1}) for seed, name in enumerate("abc")]
    claims = rows(found(runs), "personal")
    for metric in ("accuracy", "nll"):
        family = [row for row in claims if row["metric"] == metric]
        smallest = min(family, key=lambda row: row["gain"]["p"])
        assert len(family) == 3 and smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["gain"]["p"]))


def test_bins_by_history_and_by_time_hold_every_query_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oppu_ray.findings.MIN_USERS_PER_BIN", 6)
    films = found([write_run(tmp_path / "films", {"task": 0.4, "oppu": 0.6})])["sets"]["films"]
    assert [(part["low"], part["high"]) for part in films["activity"]] == [(10, 60), (70, 120)]
    assert [part["nll"]["num_users"] for part in films["activity"]] == [6, 6]
    assert [part["accuracy"]["num_queries"] for part in films["time"]] == [36, 36]
    assert (films["time"][0]["low"], films["time"][-1]["high"]) == (0.0, 1.0)
    assert len(films["concentration"]["accuracy"]) == 12


def test_many_users_are_put_into_three_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oppu_ray.findings.MIN_USERS_PER_BIN", 4)
    findings = found([write_run(tmp_path / "films", {"task": 0.4, "oppu": 0.6})])
    bins = findings["sets"]["films"]["activity"]
    assert [(part["low"], part["high"]) for part in bins] == [(10, 40), (50, 80), (90, 120)]
    said = [row["variant"] for row in rows(findings, "activity") if row["metric"] == "nll"]
    assert said == ["short histories", "middle", "long histories"]


@pytest.mark.parametrize("history", [{}, {f"u{user}": 24 for user in range(NUM_USERS)}])
def test_histories_unknown_or_all_of_one_length_make_no_bins(tmp_path: Path, history: dict[str, int]) -> None:
    findings = found([write_run(tmp_path / "films", {"task": 0.4, "oppu": 0.6}, history=history)])
    assert findings["sets"]["films"]["activity"] == [] == rows(findings, "activity")


def test_few_users_make_no_bins_and_what_has_no_times_is_not_cut_by_time(tmp_path: Path) -> None:
    films = found([write_run(tmp_path / "films", {"task": 0.4, "oppu": 0.6}, has_times=False)])["sets"]["films"]
    assert films["activity"] == [] and films["time"] == []  # 6 users in either of two bins


def test_holm_does_not_run_over_the_variants_of_a_claim_about_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oppu_ray.findings.MIN_USERS_PER_BIN", 6)
    findings = found([write_run(tmp_path / "films", {"task": 0.4, "oppu": 0.6}, shift={"oppu": 0.1})])
    activity = rows(findings, "activity")
    assert len(activity) == 4 and all(row["p_holm"] == row["gain"]["p"] for row in activity)


def test_seeds_are_averaged_query_by_query_over_those_that_have_the_arm(tmp_path: Path) -> None:
    for seed, gain, more in ((0, 0.2, {"rag_k1": 0.5}), (1, 0.4, {})):
        write_run(tmp_path / f"seed{seed}", {"task": 0.4, "oppu": 0.6, **more}, seed, {"oppu": gain, "rag_k1": 0.1})
    suite = write_suite(tmp_path, [("seed0", "main", ""), ("seed1", "main", "")])
    films = found([suite])["sets"]["films"]
    nll = films["comparisons"]["oppu/task"]["nll"]
    assert films["comparisons"]["rag_k1/task"]["nll"]["by_seed"] == pytest.approx([0.1])
    assert nll["num_queries"] == 72 and nll["mean"] == pytest.approx(0.3)
    assert nll["by_seed"] == pytest.approx([0.2, 0.4]) and nll["seed_spread"] == pytest.approx(0.1 * 2**0.5)


def test_a_variant_is_held_against_the_main_runs_shared_model(tmp_path: Path) -> None:
    write_run(tmp_path / "main", {"task": 0.3, "oppu": 0.8}, shift={"oppu": 0.5})
    ia3 = write_run(tmp_path / "ia3", {"oppu": 0.3}, shift={"oppu": 0.1})
    (ia3 / "train").mkdir()
    trained = {"users_per_hour": 1800.0, "adapter_bytes": 1e5, "num_trained": 12, "num_done": 12}
    (ia3 / "train" / "result.json").write_text(json.dumps(trained))
    write_run(tmp_path / "to_do", {"oppu": 0.3})  # made with another config
    units = [("main", "main", ""), ("ia3", "peft_methods", "ia3"), ("to_do", "peft_methods", "prompt")]
    findings = found([write_suite(tmp_path, units)])
    variants = findings["studies"]["peft_methods"]["films"]
    assert list(variants) == ["ordinary", "ia3"]
    assert variants["ia3"]["nll"]["mean"] == pytest.approx(0.1) and variants["ordinary"]["nll"][
        "mean"
    ] == pytest.approx(0.5)
    assert (variants["ia3"]["adapter_bytes"], variants["ia3"]["s_per_user"]) == (1e5, 2.0)
    assert {row["variant"] for row in rows(findings, "peft_methods")} == {"ia3"}
    assert findings["cost"] == {"elapsed_s": 30.0, "unshared_s": 120.0, "saved_share": 0.75}
    (ia3 / "train" / "result.json").write_text(json.dumps({**trained, "num_trained": 3}))  # went on after a kill
    assert found([tmp_path])["studies"]["peft_methods"]["films"]["ia3"]["s_per_user"] is None


def test_the_ordinary_row_has_the_seeds_of_its_variants(tmp_path: Path) -> None:
    for seed, gain in ((0, 0.2), (1, 0.4)):
        write_run(tmp_path / f"seed{seed}", {"task": 0.4, "oppu": 0.6}, seed, {"oppu": gain})
    write_run(tmp_path / "ia3", {"oppu": 0.3}, shift={"oppu": 0.1})
    units = [("seed0", "main", ""), ("seed1", "main", ""), ("ia3", "peft_methods", "ia3")]
    findings = found([write_suite(tmp_path, units)])
    assert findings["studies"]["peft_methods"]["films"]["ordinary"]["nll"]["by_seed"] == pytest.approx([0.2])
    assert findings["sets"]["films"]["comparisons"]["oppu/task"]["nll"]["mean"] == pytest.approx(0.3)


def test_a_variant_with_a_shared_model_of_its_own_is_held_against_that(tmp_path: Path) -> None:
    write_run(tmp_path / "main", {"task": 0.3, "oppu": 0.8})
    write_run(tmp_path / "private", {"task": 0.3, "oppu": 0.3}, shift={"task": -0.4, "oppu": -0.1})
    units = [("main", "main", ""), ("private", "privacy", "noise_1")]
    variants = found([write_suite(tmp_path, units)])["studies"]["privacy"]["films"]
    assert variants["noise_1"]["nll"]["mean"] == pytest.approx(0.3)  # not -0.1: its task adapter is another one


def test_answers_of_other_evaluations_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "films", {"task": 0.3, "oppu": 0.8})
    path = run / "evaluate" / "predictions.jsonl"
    stale = {"arm": "oppu", "user_id": "u0", "query_id": "0", "gold": "a", "text": "b", "evaluation": "old", "nll": 9.0}
    path.write_text(path.read_text() + json.dumps(stale) + "\n")
    (read,), _ = load_runs([run])
    assert read.answers["oppu"]["u0", "0"].nll != 9.0


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty.*cannot be read"):
        load_runs([tmp_path / "empty"])
    run = write_run(tmp_path / "films", {"task": 0.3})
    with (run / "evaluate" / "predictions.jsonl").open("a") as file:
        file.write("{half\n")
    with pytest.raises(ValueError, match="predictions.jsonl: line 73: expected an answer"):
        load_runs([run])
    write_run(tmp_path / "ia3", {"oppu": 0.3})
    with pytest.raises(ValueError, match="ia3: its main run with seed 0 is missing"):
        found([write_suite(tmp_path, [("ia3", "peft_methods", "ia3")])])
    with pytest.raises(ValueError, match="no run has been evaluated"):
        load_runs([write_suite(tmp_path, [("to_do", "main", "")])])


def test_runs_of_one_name_are_refused_and_other_bases_are_other_sets(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "films", {"task": 0.3, "oppu": 0.8})
    second = write_run(tmp_path / "b" / "films", {"task": 0.3, "oppu": 0.8})
    with pytest.raises(ValueError, match="b/films: films with seed 0 is there twice, first in .*a/films"):
        load_runs([first, second])
    path = second / "evaluate" / "result.json"
    path.write_text(path.read_text().replace("embedded:smollm2-135m", "big/llama"))
    findings = found([first, second])
    assert set(findings["sets"]) == {"films on embedded:smollm2-135m", "films on llama"}


def test_a_gain_of_the_findings_is_that_of_the_statistics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "films", {"task": 0.3, "oppu": 0.8})
    (read,), _ = load_runs([run])
    keys = sorted(read.answers["oppu"])
    values = [(read.answers["oppu"][key].text == "a") - (read.answers["task"][key].text == "a") for key in keys]
    expected = paired_gain(np.array(values, dtype=float), [user for user, _ in keys], 400, 0)
    gain = found([run])["sets"]["films"]["comparisons"]["oppu/task"]["accuracy"]
    assert (gain["mean"], gain["low"], gain["by_user_p"]) == (expected.mean, expected.low, expected.by_user_p)
