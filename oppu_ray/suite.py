"""`oppu evaluate --suite`: many runs as one, each with the ordinary stages; `report.py` reads what it leaves.

In goes a suite's YAML: sets, seeds, and variants, which are overrides of a set's own config. Out come run folders
`<set>/seed<seed>/main` and `.../<study>-<variant>`, and a `result.json` that lists them with their times. A suite may
be killed at any time: a unit that is done is not done again, one that is half done goes on as its stages do.

A reader might question the links: a variant that bends personal training only has the same histories and task adapter
as its main run, so its folder links to these, and its adapters go to the same vault, which keeps versions apart by what
they were made from. What sharing saves is told from the units' own times.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oppu_ray import stages
from oppu_ray.config import Config, load_as, load_config, located, section, to_dict
from oppu_ray.configs import find_config
from oppu_ray.evaluation import parse_arm
from oppu_ray.files import write_atomic
from oppu_ray.findings import MAIN

TIMES_NAME = "times.jsonl"
PERSONAL_KEYS = ("personal.", "privacy.", "study.", "evaluate.")
"""What a variant may change and still share its main run's histories and task adapter."""


@section
class SuiteSet:
    """One data set.

    Args:
        config: An installed config's name, or a YAML file relative to the suite's; its stem is the set's name.
        data: The histories, relative to the suite's `data_root`; "" leaves what the config says.
        overrides: For every unit of this set, after the suite's own.
        studies: Those whose variants run on this set.
    """

    config: str
    data: str = ""
    overrides: tuple[str, ...] = ()
    studies: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return Path(self.config).stem


@section
class Variant:
    """One way to differ from the main run; the names are a folder's and a plot's."""

    study: str
    name: str
    overrides: tuple[str, ...]


@section
class Suite:
    """A suite's YAML. Studies run under the first of the `seeds`, and `seed_overrides` go for all others."""

    run_dir: str = "runs/suite"
    data_root: str = ""
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    seed_overrides: tuple[str, ...] = ()
    sets: tuple[SuiteSet, ...] = ()
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One run of a suite. `folder` is relative to the suite's; `main` is the folder it shares with, or ""."""

    folder: str
    set_name: str
    seed: int
    study: str
    variant: str
    config: Config
    main: str = ""


def load_suite(path: Path, overrides: list[str]) -> tuple[Suite, list[Unit]]:
    """A suite and its units, in the order they run: main runs first, then studies, then the other seeds.

    Raises:
        ValueError: The suite or one of its configs has an unknown key or a bad value, or a set names an unknown study.
    """
    suite = load_as(Suite, path, overrides)
    studies = {variant.study for variant in suite.variants}
    for one in suite.sets:
        if unknown := sorted(set(one.studies) - studies):
            raise ValueError(f"{path}: {one.name}: unknown study {unknown[0]!r}; expected one of {', '.join(studies)}")
    return suite, [*_units(suite, path.parent)]


def _units(suite: Suite, folder: Path) -> Iterator[Unit]:
    if not suite.sets or not suite.seeds:
        raise ValueError("the suite has no sets or no seeds; expected at least one of each")
    first, *others = suite.seeds
    yield from (_unit(suite, folder, one, first) for one in suite.sets)
    for variant in suite.variants:
        yield from (_unit(suite, folder, one, first, variant) for one in suite.sets if variant.study in one.studies)
    for seed in others:
        yield from (_unit(suite, folder, one, seed) for one in suite.sets)


def _unit(suite: Suite, folder: Path, one: SuiteSet, seed: int, variant: Variant | None = None) -> Unit:
    top = Path(located(Config(run_dir=suite.run_dir)).run_dir)
    main = f"{one.name}/seed{seed}/{MAIN}"
    place = f"{one.name}/seed{seed}/{variant.study}-{variant.name}" if variant else main
    of_seed = suite.seed_overrides if seed != suite.seeds[0] else ()
    overrides = [*suite.overrides, *one.overrides, *of_seed, *(variant.overrides if variant else ())]
    shares = variant is not None and all(override.startswith(PERSONAL_KEYS) for override in variant.overrides)
    if variant:
        overrides.append("evaluate.arms=[oppu]" if shares else "evaluate.arms=[task, oppu]")
    config = load_config(find_config(one.config, folder), overrides)
    data = config.data
    if one.data:
        data = dataclasses.replace(data, path=str(Path(suite.data_root).expanduser() / one.data))
    vault = dataclasses.replace(config.vault, path=str(top / main / "vault")) if shares else config.vault
    config = dataclasses.replace(
        config,
        run_dir=str(top / place),
        seed=seed,
        data=data,
        vault=vault,
    )
    study, name = (variant.study, variant.name) if variant else (MAIN, "")
    return Unit(place, one.name, seed, study, name, located(config), main if shares else "")


def run_suite(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Run every unit that is not done; what is done and how long it took, as the suite's `result.json` has it.

    A unit whose data is bad is left out with its reason, and the rest goes on.
    """
    suite, units = load_suite(path, overrides)
    top = Path(located(Config(run_dir=suite.run_dir)).run_dir)
    top.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    num_to_retry = 0
    for number, unit in enumerate(units, start=1):
        if not is_done(unit):
            print(f"\n== unit {number} of {len(units)}: {unit.folder}", flush=True)
            try:
                num_to_retry += run_unit(unit, top)
            except ValueError as error:
                failed[unit.folder] = str(error)
                print(f"{unit.folder}: {error}", flush=True)
        _write_result(suite, units, top, failed)
    return {"num_to_retry": num_to_retry + len(failed)}


def is_done(unit: Unit) -> bool:
    """Whether the unit was evaluated with this very config, whatever the number of workers, and nobody is left out
    who may be trained next time.
    """
    found = _evaluated(unit).get("config", {})
    wanted = json.loads(json.dumps(to_dict(unit.config)))
    trained = [json.loads(path.read_text()) for path in Path(unit.config.run_dir).glob("train/**/result.json")]
    is_whole = not any(result["num_to_retry"] for result in trained)
    return is_whole and {**found, "workers": None} == {**wanted, "workers": None}


def _evaluated(unit: Unit) -> dict[str, Any]:
    path = Path(unit.config.run_dir) / "evaluate" / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_unit(unit: Unit, top: Path) -> int:
    """The stages of one unit, all or those that its main run has not done for it; how many users failed for now."""
    folder = Path(unit.config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if unit.main:
        for name in ("prepare", "adapt"):
            if not (folder / name).exists():
                (folder / name).symlink_to(Path("..") / MAIN / name)
    else:
        _timed(stages.prepare, unit, top)
        _timed(stages.adapt, unit, top)
    trained = _timed(stages.train, unit, top)
    _timed(stages.evaluate, unit, top)
    return int(trained["num_to_retry"])


def _timed(stage: Callable[[Config], dict[str, Any]], unit: Unit, top: Path) -> dict[str, Any]:
    """Run a stage and add what it took, by kind of prompt ("adapt", "adapt/k1"), to `times.jsonl`.

    A stage that found its work done adds nothing; the time of one that was killed is lost.
    """
    folder, started = Path(unit.config.run_dir), time.time()
    result = stage(unit.config)
    with (top / TIMES_NAME).open("a", encoding="utf-8") as file:
        for path in sorted((folder / result["command"]).rglob("result.json")):
            found = json.loads(path.read_text())
            if path.stat().st_mtime >= started and not found.get("was_done"):
                what = str(path.parent.relative_to(folder))
                file.write(json.dumps({"folder": unit.folder, "what": what, "elapsed_s": found["elapsed_s"]}) + "\n")
    return result


def _write_result(suite: Suite, units: list[Unit], top: Path, failed: dict[str, str]) -> None:
    times: dict[str, dict[str, float]] = {unit.folder: {} for unit in units}
    if (top / TIMES_NAME).exists():
        for line in (top / TIMES_NAME).read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # killed while it was written
            of_unit = times.setdefault(entry["folder"], {})
            of_unit[entry["what"]] = of_unit.get(entry["what"], 0.0) + entry["elapsed_s"]
    listed = [
        {
            "folder": unit.folder,
            "set": unit.set_name,
            "seed": unit.seed,
            "study": unit.study,
            "variant": unit.variant,
            "state": "failed" if unit.folder in failed else "done" if is_done(unit) else "to do",
            "error": failed.get(unit.folder),
            "times_s": times[unit.folder],
        }
        for unit in units
    ]
    cost = {
        "elapsed_s": sum(sum(of_unit.values()) for of_unit in times.values()),
        "unshared_s": sum(_alone(unit, times) for unit in units),
    }
    result = {
        "command": "suite",
        "config": to_dict(suite),
        "hardware": stages.hardware(),
        "units": listed,
        "cost": cost,
    }
    write_atomic(top / "result.json", json.dumps(result, indent=1).encode())


def _alone(unit: Unit, times: dict[str, dict[str, float]]) -> float:
    """Seconds that the unit's arms would take one by one, each as a run of its own that shares nothing."""
    own, shared = times[unit.folder], times[unit.main or unit.folder]
    if not is_done(unit):
        return sum(own.values())  # it has saved nothing yet
    seconds = own.get("evaluate", 0.0)
    for name in _evaluated(unit)["arms"]:
        arm = parse_arm(name)
        kind = dataclasses.replace(unit.config.memory, top_k=arm.top_k, with_profile=arm.with_profile).name
        seconds += shared.get("prepare", 0.0)
        if arm.model in ("task", "own", "swapped"):
            seconds += shared.get(str(Path("adapt", kind)), 0.0)
        if arm.model in ("own", "swapped"):
            seconds += own.get(str(Path("train", kind)), 0.0)
    return seconds
