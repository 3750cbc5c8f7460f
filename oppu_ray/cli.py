"""`oppu`: one subcommand per stage, each taking one YAML file and `dotted.key=value` overrides."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from oppu_ray.config import load_config, to_dict

STAGES = {
    "prepare": "read and check histories, split them by time",
    "adapt": "train the shared task adapter and merge it into the base",
    "train": "train one adapter per target user",
    "evaluate": "answer the targets' later items by every arm and compare",
    "run": "prepare, adapt, train and evaluate",
}
DEMO = Path(__file__).resolve().parents[1] / "jobs" / "configs" / "demo.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 when something was found wrong (doctor), 2 for bad input."""
    parser = argparse.ArgumentParser(prog="oppu", description="One PEFT Per User: a personal adapter for everyone.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="YAML file, e.g. jobs/configs/demo.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. personal.epochs=5")
    demo = commands.add_parser("demo", help="the whole line on embedded real chats")
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    bench = commands.add_parser("bench", help="training speed against the alternatives (from a checkout)")
    bench.add_argument("what", choices=["train"])
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="see python -m jobs.bench_train --help")
    plan = commands.add_parser("plan", help="time, balance, disk and cost of a run, before it is run")
    plan.add_argument("--config", type=Path, help="plan a prepared run's users instead of simulated ones")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. users=1000000 workers=256")
    commands.add_parser("doctor", help="what is installed, what is missing, how to get it")
    options = parser.parse_args(arguments)
    try:
        if options.command == "bench":
            return subprocess.call([sys.executable, "-m", "jobs.bench_train", *options.rest], cwd=DEMO.parents[2])
        if options.command == "doctor":
            return _doctor()
        if options.command == "plan":
            return _plan(options.config, options.overrides)
        if options.command == "demo":
            return run_stage("run", DEMO, options.overrides)
        return run_stage(options.command, options.config, options.overrides)
    except ValueError as error:
        print(f"oppu: {error}", file=sys.stderr)
        return 2


def run_stage(stage: str, path: Path, overrides: list[str]) -> int:
    """Load the config, print it as resolved, run one stage."""
    config = load_config(path, overrides)
    print(yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, default_flow_style=None, width=120))
    # Imported here: torch and transformers take seconds, and a wrong config should not wait for them.
    from oppu_ray import stages

    function: Callable[..., Any] = getattr(stages, stage)
    function(config)
    return 0


def job(stage: str) -> int:
    """What a file in `jobs/` does: `python -m jobs.<stage> CONFIG [key=value ...]`."""
    return main([stage, *sys.argv[1:]])


def _doctor() -> int:
    from oppu_ray.doctor import print_checks, run_doctor
    from oppu_ray.files import oppu_home

    return 0 if print_checks(run_doctor(oppu_home())) else 1


def _plan(run: Path | None, overrides: list[str]) -> int:
    from oppu_ray.plan import format_plan, load_plan, plan

    config, sizes = load_plan(run, overrides)
    print(format_plan(config, plan(config, sizes)))
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
