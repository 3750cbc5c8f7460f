"""`oppu`: one subcommand per stage, each taking one YAML file and `dotted.key=value` overrides."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from oppu_ray import __version__, users
from oppu_ray.config import load_config, located, to_dict
from oppu_ray.configs import find_config
from oppu_ray.progress import ClusterLost, Interrupted, format_status, read_status

STAGES = {
    "prepare": "read and check histories, split them by time",
    "adapt": "train the shared task adapter and merge it into the base",
    "train": "train one adapter per target user",
    "evaluate": "answer the targets' later items by every arm and compare",
    "run": "prepare, adapt, train and evaluate",
}


def main(arguments: list[str] | None = None) -> int:
    """Returns one of the exit codes that README documents.

    0 done (users with bad data are in the result); 1 users failed who may succeed when it is run again, or the doctor
    found something; 2 bad input; 3 interrupted and 4 cluster lost: run the same again to continue.
    """
    parser = argparse.ArgumentParser(prog="oppu", description="One PEFT Per User: a personal adapter for everyone.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "evaluate":
            command.add_argument("--suite", metavar="NAME", help="all runs of a suite: paper, tune, or a YAML file")
        command.add_argument("config", nargs="?", help="YAML file, or the name of an installed config, e.g. demo")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. personal.epochs=5")
    page = commands.add_parser("report", help="what runs and suites show, as a page with plots")
    page.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of an evaluated run, or of a suite")
    page.add_argument("--out", type=Path, help="default: report/ in the first folder")
    demo = commands.add_parser("demo", help="the whole line on embedded real chats")
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    bench = commands.add_parser("bench", help="speed against the alternatives")
    bench.add_argument("what", choices=["train", "serve"])
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="see oppu bench train --help, or serve")
    plan = commands.add_parser("plan", help="time, balance, disk and cost of a run, before it is run")
    plan.add_argument("--config", help="plan a prepared run's users instead of simulated ones")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. users=1000000 workers=256")
    status = commands.add_parser("status", help="how far a run is; needs no Ray")
    status.add_argument("run", help="the run's folder, its YAML file or the name of an installed config")
    status.add_argument("overrides", nargs="*", metavar="key=value")
    status.add_argument("--watch", action="store_true", help="again every 2 s until the stage has ended")
    job = commands.add_parser("submit", help="run a stage as a job of a Ray cluster, and follow it")
    job.add_argument("stage", choices=STAGES)
    job.add_argument("config", help="YAML file, or the name of an installed config")
    job.add_argument("overrides", nargs="*", metavar="key=value")
    job.add_argument("--address", help="of the dashboard; default $RAY_API_SERVER_ADDRESS, or this machine")
    job.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    cluster = commands.add_parser("cluster", help="a Ray head on this machine, with dashboard and token")
    cluster.add_argument("what", choices=["start", "stop"])
    cluster.add_argument("--port", type=int, default=6379)
    cluster.add_argument("--dashboard-port", type=int, default=8265)
    server = commands.add_parser("serve", help="answer a trained run's users over HTTP")
    server.add_argument("config", help="the run's YAML file, or the name of an installed config, e.g. demo")
    server.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. serve.port=8001")
    commands.add_parser("doctor", help="what is installed, what is missing, how to get it")
    users.add_parsers(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "bench":
            return subprocess.call([sys.executable, "-m", f"oppu_ray.bench.{options.what}", *options.rest])
        if options.command in ("users", "token"):
            return users.main(options)
        if options.command == "serve":
            from serve.run import run as serve_run

            serve_run(find_config(options.config), options.overrides)
            return 0
        if options.command == "doctor":
            return _doctor()
        if options.command == "plan":
            return _plan(options.config and find_config(options.config), options.overrides)
        if options.command == "demo":
            return run_stage("run", find_config("demo"), options.overrides)
        if options.command == "submit":
            from oppu_ray.submit import submit

            path = find_config(options.config)
            return submit(options.stage, path, options.overrides, options.address, not options.no_wait)
        if options.command == "cluster":
            return _cluster(options.what, options.port, options.dashboard_port)
        if options.command == "report":
            return _report(options.folders, options.out or options.folders[0] / "report")
        if options.command == "evaluate" and options.suite:
            return _suite(options.suite, [*filter(None, [options.config]), *options.overrides])
        if options.command == "status":
            return _status(options.run, options.overrides, options.watch)
        if options.config is None:
            parser.error(f"{options.command}: expected a YAML file or the name of an installed config, e.g. demo")
        return run_stage(options.command, find_config(options.config), options.overrides)
    except ValueError as error:
        print(f"oppu: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"oppu: {str(stop) or 'interrupted'}; run the same again to continue", file=sys.stderr)
        return 3
    except ClusterLost as lost:
        print(f"oppu: {lost}; run the same again to continue, on any cluster", file=sys.stderr, flush=True)
        return 4


def run_stage(stage: str, path: Path, overrides: list[str]) -> int:
    """Load the config, print it as resolved, run one stage."""
    config = located(load_config(path, overrides))
    print(yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, default_flow_style=None, width=120))
    # Imported here: torch and transformers take seconds, and a wrong config should not wait for them.
    from oppu_ray import stages

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stage that can end more gently says so itself
    function: Callable[..., Any] = getattr(stages, stage)
    return 1 if function(config).get("num_to_retry") else 0


def job(stage: str) -> int:
    """What a file in `jobs/` does: `python -m jobs.<stage> CONFIG [key=value ...]`."""
    return main([stage, *sys.argv[1:]])


def _suite(name: str, overrides: list[str]) -> int:
    """`oppu evaluate --suite`."""
    from oppu_ray.suite import run_suite

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return 1 if run_suite(find_config(name, kind="suites"), overrides)["num_to_retry"] else 0


def _report(folders: list[Path], out: Path) -> int:
    """`oppu report`."""
    from oppu_ray.report import report

    report(folders, out)
    print(f"{out / 'index.html'} (also report.md and its pictures)")
    return 0


def _cluster(what: str, port: int, dashboard_port: int) -> int:
    """`oppu cluster start` and `stop`."""
    from oppu_ray.submit import private_token, start_head, stop_head

    if what == "stop":
        print("stopped" if stop_head() else "there is no head that was started here")
        return 0
    url = start_head(port, dashboard_port)
    print(f"dashboard {url} (token in {private_token()}); `oppu submit run demo` runs a job on it")
    return 0


def _status(run: str, overrides: list[str], watch: bool) -> int:
    """`oppu status`."""
    folder = Path(run)
    if not folder.is_dir():
        folder = Path(located(load_config(find_config(run), overrides)).run_dir)
    while True:
        status = read_status(folder)
        print(format_status(status), flush=True)
        if not watch or status["state"] != "running":
            return 0
        time.sleep(2)


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
