"""The arrow result.json + predictions.jsonl -> findings: what runs show, claim by claim; `report.py` makes the page.

In go folders of runs or suites, on any data and any base; out come plain values. Nothing is computed by a model here.
A reader might question that a verdict needs both tests, over queries and over users, after Holm's correction over all
sets: a gain that one user carries, or one set of nine by chance, is not what the paper claims. What is not significant
is "not supported" only where the interval rules out the smallest gain that matters; all else is too little data.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oppu_ray.config import from_dict
from oppu_ray.core import Prediction
from oppu_ray.evaluation import HEURISTIC_ARMS, Key, answers_by_arm, paired_gains, parse_arm, score_arm, share_changed
from oppu_ray.metrics import main_metric
from oppu_ray.statistics import LEVEL, Gain, concentration, holm, num_needed, paired_gain, sum_by_user
from oppu_ray.tasks import Task, get_task

SMALLEST_GAIN = {"accuracy": 0.02, "mae": 0.05, "rougeL": 0.01, "nll": 0.02}
"""What a gain must be to matter, per metric: two answers in a hundred, a twentieth of a point, 2 % of perplexity."""
SUPPORTED, NOT_SUPPORTED, TOO_LITTLE = "supported", "not supported", "too little data"
MAIN, ORDINARY = "main", "ordinary"
MIN_USERS_PER_BIN = 12
SHORT_TO_LONG = {2: ("short histories", "long histories"), 3: ("short histories", "middle", "long histories")}
CLAIMS = {
    "personal": "a user's own adapter beats the task-adapted model that all share",
    "own": "it is the user's own: another user's adapter does worse",
    "habits": "it beats what needs no model: the user's most common and last label",
    "over_rag": "it beats retrieval (RAG)",
    "over_pag": "it beats a profile in the prompt (PAG)",
    "with_rag": "it adds to retrieval",
    "with_pag": "it adds to a profile",
    "behaviour_shift": "it helps where the history is unlike the queries, too",
    "activity": "it helps users of every activity",
    "history_formats": "it helps in whatever form the history comes",
    "peft_methods": "it helps with every PEFT method",
    "history_amount": "it helps with little history",
    "privacy": "it helps where training is private",
    "federated": "it helps on a task adapter that was trained federated",
}
"""What the paper says, claim by claim; `own` and `habits` are controls of ours, the last three go beyond it."""


@dataclass(frozen=True)
class Run:
    """One evaluated run folder; a suite's runs have more of a name than others.

    Args:
        set_name: The data, e.g. "movie_tagging": a folder's name where no suite says it.
        study, variant: "main" and "", or what was varied and how.
        answers: Arm -> (user, query) -> answer.
    """

    folder: Path
    set_name: str
    seed: int
    study: str
    variant: str
    task: Task
    result: dict[str, Any]
    answers: dict[str, dict[Key, Prediction]]


def load_runs(folders: Sequence[Path]) -> tuple[list[Run], list[dict[str, Any]]]:
    """The evaluated runs in `folders`, each a run's or a suite's, and the suites' own results.

    Runs of one set on several bases are several sets, named after both.

    Raises:
        ValueError: A folder holds no evaluated run, a file in it is not what an evaluation leaves, or two runs have one
            name.
    """
    runs, suites = [], []
    for folder in folders:
        path = folder / "result.json"
        if path.exists():
            suite = _read_json(path)
            suites.append(suite)
            done = [unit for unit in suite["units"] if unit["state"] == "done"]
            runs += [_load_run(folder / u["folder"], u["set"], u["study"], u["variant"]) for u in done]
        else:
            runs.append(_load_run(folder, folder.resolve().name, MAIN, ""))
    if not runs:
        raise ValueError(f"{', '.join(map(str, folders))}: no run has been evaluated yet")
    if len({_base(run) for run in runs}) > 1:
        runs = [dataclasses.replace(run, set_name=f"{run.set_name} on {_base(run)}") for run in runs]
    names: dict[tuple[str, int, str, str], Path] = {}
    for run in runs:
        first = names.setdefault((run.set_name, run.seed, run.study, run.variant), run.folder)
        if first != run.folder:
            raise ValueError(f"{run.folder}: {run.set_name} with seed {run.seed} is there twice, first in {first}")
    return runs, suites


def _base(run: Run) -> str:
    return Path(run.result["config"]["base"]["name"]).name


def _load_run(folder: Path, set_name: str, study: str, variant: str) -> Run:
    result = _read_json(folder / "evaluate" / "result.json")
    path = folder / "evaluate" / "predictions.jsonl"
    wanted = result["fingerprints"].get("evaluations")
    predictions = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                evaluation = values.pop("evaluation")
                if wanted is None or wanted.get(values["arm"]) == evaluation:
                    predictions.append(Prediction(**values))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{path}: line {number}: expected an answer as `oppu evaluate` writes it") from None
    if not predictions:
        raise ValueError(f"{path}: holds no answers of its result.json; expected what `oppu evaluate` left")
    config = from_dict(result["config"])
    return Run(
        folder, set_name, config.seed, study, variant, get_task(config.task), result, answers_by_arm(predictions)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected the folder of an evaluated run") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, found {type(values).__name__}")
    return values


def find(runs: Sequence[Run], suites: Sequence[dict[str, Any]], num_resamples: int) -> dict[str, Any]:
    """All findings as plain values.

    Returns:
        `sets.<set>`: task, arms, comparisons, history bins, time slices, concentration, spread over seeds.
        `studies.<study>.<set>.<variant>`: gain over the task-adapted model, and what an adapter costs.
        `claims`: one row per claim, set (and variant) and metric, with its verdict.
        `cost`: time of the suites, and what sharing saved.
    """
    by_set: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_set[run.set_name].append(run)
    mains = {name: [run for run in group if run.study == MAIN] for name, group in by_set.items()}
    for run in runs:
        if run.seed not in {main.seed for main in mains[run.set_name]}:
            raise ValueError(f"{run.folder}: its {MAIN} run with seed {run.seed} is missing; run the suite again")
    sets = {name: _find_set(group, num_resamples) for name, group in mains.items()}
    studies: dict[str, Any] = {}
    for name, group in by_set.items():
        reference = mains[name]
        for run in (run for run in group if run.study != MAIN):
            variants = studies.setdefault(run.study, {}).setdefault(name, {})
            if run.variant not in variants:
                same = [other for other in group if (other.study, other.variant) == (run.study, run.variant)]
                variants[run.variant] = _find_variant(same, reference, num_resamples)
    for kind, study in studies.items():
        for name, variants in study.items():
            seeds = {run.seed for run in by_set[name] if run.study == kind}
            same = [run for run in mains[name] if run.seed in seeds]
            study[name] = {ORDINARY: _find_variant(same, same, num_resamples), **variants}
    findings = {"sets": sets, "studies": studies, "cost": _cost(suites)}
    return {**findings, "claims": _claims(findings), "hardware": runs[0].result["hardware"]}


# --- one set


def compare(pairs: Iterable[tuple[Run, str, Run, str]], metric: str, num_resamples: int) -> tuple[Gain, list[float]]:
    """`arm` of one run over `arm` of another, pair by pair of runs (one per seed).

    Gains of one query under several seeds are averaged: the query is what is sampled. Also the mean gain of each seed.
    """
    by_query: dict[Key, list[float]] = defaultdict(list)
    by_seed = []
    for run, arm, over_run, over in pairs:
        answers, reference = run.answers[arm], over_run.answers[over]
        gain_Q, _ = paired_gains(run.task, answers, reference, metric)
        for key, gain in zip(sorted(answers.keys() & reference.keys()), gain_Q, strict=True):
            by_query[key].append(float(gain))
        by_seed.append(float(gain_Q.mean()))
    keys = sorted(by_query)
    gain_Q = np.array([np.mean(by_query[key]) for key in keys])
    return paired_gain(gain_Q, [user_id for user_id, _ in keys], num_resamples, seed=0), by_seed


def comparisons_of(arms: Iterable[str]) -> list[tuple[str, str]]:
    """(arm, over) pairs to look at: all over the task-adapted model, OPPU over all, and arms over their control."""
    known = list(arms)
    pairs = [(arm, "task") for arm in known if arm != "task" and "task" in known]
    pairs += [("oppu", arm) for arm in known if arm not in ("oppu", "task") and "oppu" in known]
    pairs += [(arm, control) for arm in known if (control := parse_arm(arm).control) in known]
    return list(dict.fromkeys(pairs))


def _find_set(runs: list[Run], num_resamples: int) -> dict[str, Any]:
    """Of the first seed's arms, each over the seeds that have it."""
    first = runs[0]
    metric, arms = main_metric(first.task), list(first.answers)
    comparisons: dict[str, Any] = {}
    for arm, over in comparisons_of(arms):
        metrics = [metric] if {arm, over} & set(HEURISTIC_ARMS) else [metric, "nll"]
        if not first.answers[arm].keys() & first.answers[over].keys():
            continue
        pairs = [(run, arm, run, over) for run in runs if {arm, over} <= run.answers.keys()]
        comparisons[f"{arm}/{over}"] = {name: _gain_dict(*compare(pairs, name, num_resamples)) for name in metrics} | {
            "changed": share_changed(first.answers[arm], first.answers[over])
        }
    found = {
        "task": first.task.name,
        "lamp": first.task.lamp,
        "metric": metric,
        "base": _base(first),
        "seeds": [run.seed for run in runs],
        "num_users": len({user for user, _ in first.answers[arms[0]]}),
        "num_queries": len(first.answers[arms[0]]),
        "arms": {arm: _mean_scores([run for run in runs if arm in run.answers], arm) for arm in arms},
        "comparisons": comparisons,
    }
    if {"oppu", "task"} <= set(arms):
        runs = [run for run in runs if {"oppu", "task"} <= run.answers.keys()]
        num_items = first.result.get("history", {})
        found["activity"] = _by_bins(runs, metric, num_resamples, {key: num_items.get(key[0]) for key in _keys(runs)})
        found["time"] = _by_bins(runs, metric, num_resamples, _times(first) if first.result.get("has_times") else {})
        found["concentration"] = _concentration(runs, metric)
    return found


def _gain_dict(gain: Gain, by_seed: list[float]) -> dict[str, Any]:
    spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    return dataclasses.asdict(gain) | {"by_seed": by_seed, "seed_spread": spread}


def _mean_scores(runs: list[Run], arm: str) -> dict[str, float]:
    scores = [score_arm(run.task, list(run.answers[arm].values())) for run in runs]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _keys(runs: list[Run]) -> list[Key]:
    return sorted({key for run in runs for key in run.answers["oppu"].keys() & run.answers["task"].keys()})


def _times(run: Run) -> dict[Key, float | None]:
    """Where in a user's later items each query stands, from 0 (first after the past) to 1 (last)."""
    places: dict[str, list[Key]] = defaultdict(list)
    for key in run.answers["oppu"]:  # in the order they were asked, which is that of time
        places[key[0]].append(key)
    return {
        key: place / (len(keys) - 1) if len(keys) > 1 else None
        for keys in places.values()
        for place, key in enumerate(keys)
    }


def _by_bins(
    runs: list[Run], metric: str, num_resamples: int, value_of: dict[Key, float | None]
) -> list[dict[str, Any]]:
    """OPPU's gain in two or three bins of equal numbers of queries, by a value of theirs.

    [] where all are in one bin, or few users in one: with 6 of them 2 / 2 ** 6 is the least p-value there is.
    """
    values = sorted(value for value in value_of.values() if value is not None)
    num_bins = 3 if len({user_id for user_id, _ in value_of}) >= 3 * MIN_USERS_PER_BIN else 2
    edges = sorted({values[len(values) * part // num_bins] for part in range(num_bins)}) if values else []
    if len(edges) < 2:
        return []
    bins: list[dict[str, Any]] = []
    for low, after in zip(edges, [*edges[1:], np.inf], strict=True):
        keys = {key for key, value in value_of.items() if value is not None and low <= value < after}
        inside = [_restrict(run, keys) for run in runs]
        inside = [run for run in inside if run.answers["oppu"].keys() & run.answers["task"].keys()]
        held = [value for value in values if low <= value < after]
        bins.append(
            {"low": low, "high": held[-1]}
            | {
                name: _gain_dict(*compare([(run, "oppu", run, "task") for run in inside], name, num_resamples))
                for name in (metric, "nll")
            }
        )
    return bins if all(part["nll"]["num_users"] >= MIN_USERS_PER_BIN for part in bins) else []


def _restrict(run: Run, keys: set[Key]) -> Run:
    answers = {
        arm: {key: answer for key, answer in by_key.items() if key in keys} for arm, by_key in run.answers.items()
    }
    return dataclasses.replace(run, answers=answers)


def _concentration(runs: list[Run], metric: str) -> dict[str, list[float] | None]:
    """Share of OPPU's summed gain over the task-adapted model held by the top 1, 2, ... users, of the first seed."""
    curves: dict[str, list[float] | None] = {}
    for name in (metric, "nll"):
        gain_Q, users = paired_gains(runs[0].task, runs[0].answers["oppu"], runs[0].answers["task"], name)
        curve = concentration(sum_by_user(gain_Q, users)[0])
        curves[name] = None if curve is None else [float(share) for share in curve]
    return curves


# --- studies


def _find_variant(runs: list[Run], mains: list[Run], num_resamples: int) -> dict[str, Any]:
    """OPPU of a study's variant over the task-adapted model: its own where it has one, else the main run's, by seed."""
    of_seed = {run.seed: run for run in mains}
    pairs = [(run, "oppu", run if "task" in run.answers else of_seed[run.seed], "task") for run in runs]
    metric = main_metric(runs[0].task)
    gains = {name: _gain_dict(*compare(pairs, name, num_resamples)) for name in (metric, "nll")}
    scores = {"scores": _mean_scores(runs, "oppu"), "task_scores": _mean_scores([run for *_, run, _ in pairs], "task")}
    return {"metric": metric, **scores, **gains, **_adapter_cost(runs[0])}


def _adapter_cost(run: Run) -> dict[str, float | None]:
    path = run.folder / "train" / "result.json"
    trained = _read_json(path) if path.exists() else {}
    # Of a run that was stopped and went on, the last part's time says little.
    rate = trained.get("users_per_hour") if trained.get("num_trained") == trained.get("num_done") else None
    return {"adapter_bytes": trained.get("adapter_bytes"), "s_per_user": 3600 / rate if rate else None}


# --- claims


def _claims(findings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim on every set and metric with its verdict; Holm's correction runs over the sets, for each variant of
    its own: a claim about every variant needs them all, which asks for no correction over them.
    """
    rows: list[dict[str, Any]] = []

    def add(claim: str, set_name: str, variant: str, gains: dict[str, Any]) -> None:
        for metric in SMALLEST_GAIN:
            if metric in gains:
                rows.append(
                    {"claim": claim, "set": set_name, "variant": variant, "metric": metric, "gain": gains[metric]}
                )

    for name, found in findings["sets"].items():
        for pair, gains in found["comparisons"].items():
            if claim := claim_of(*pair.split("/")):
                add(claim, name, pair, gains)
        bins = found.get("activity", [])
        for number, part in enumerate(bins):
            add("activity", name, SHORT_TO_LONG[len(bins)][number], part)
    for study, of_sets in findings["studies"].items():
        for name, variants in of_sets.items():
            for variant, gains in variants.items():
                if variant != ORDINARY:
                    add(study, name, variant, gains)
    families: dict[tuple[str, str, bool], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        families[row["claim"], row["variant"], row["metric"] == "nll"].append(row)
    for family in families.values():
        for key in ("p", "by_user_p"):
            for row, adjusted in zip(family, holm([row["gain"][key] for row in family]), strict=True):
                row[f"{key}_holm"] = adjusted
        for row in family:
            row |= verdict(row["gain"], row["metric"], row["p_holm"], row["by_user_p_holm"], len(family))
    order = {claim: number for number, claim in enumerate(CLAIMS)}
    return sorted(rows, key=lambda row: order.get(row["claim"], len(order)))


def claim_of(arm: str, over: str) -> str | None:
    """The claim that a comparison of two arms speaks to."""
    if arm == "oppu":
        named = {
            "task": "personal",
            "swapped": "own",
            "majority_user": "habits",
            "last_user": "habits",
            "pag": "over_pag",
        }
        return "over_rag" if over.startswith("rag_k") else named.get(over)
    is_own = parse_arm(arm).control == over
    return ("with_pag" if "pag" in arm else "with_rag") if is_own else None


def verdict(gain: dict[str, Any], metric: str, p: float, by_user_p: float, num_tests: int) -> dict[str, Any]:
    """Supported, not supported or too little data, and then the queries with which both tests would likely hold.

    Args:
        gain: As `statistics.Gain`.
        p, by_user_p: Corrected over the claim's family.
        num_tests: Size of the family: the level of Holm's first step is LEVEL by it.
    """
    smallest = SMALLEST_GAIN[metric]
    is_up = gain["mean"] > 0 and gain["by_user_mean"] > 0
    if is_up and p < LEVEL and by_user_p < LEVEL:
        return {"verdict": SUPPORTED, "num_needed": None}
    if max(gain["high"], gain["by_user_high"]) < smallest:
        return {"verdict": NOT_SUPPORTED, "num_needed": None}
    level = LEVEL / num_tests
    queries = num_needed(max(gain["mean"], smallest), gain["sd"], level)
    users = num_needed(max(gain["by_user_mean"], smallest), gain["by_user_sd"], level)
    per_user = gain["num_queries"] / gain["num_users"]
    return {"verdict": TOO_LITTLE, "num_needed": max(queries, round(users * per_user))}


# --- cost


def _cost(suites: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Of suites: seconds spent, seconds that arms and variants run one by one would take, and the share saved."""
    if not suites:
        return None
    spent = sum(suite["cost"]["elapsed_s"] for suite in suites)
    alone = sum(suite["cost"]["unshared_s"] for suite in suites)
    return {"elapsed_s": spent, "unshared_s": alone, "saved_share": 1 - spent / alone if alone else 0.0}
