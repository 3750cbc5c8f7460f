"""What Ray costs: the same packs inline and on one Ray worker, and the base's memory with one and with two workers.

    python -m jobs.bench.ray demo --packs 3 --repeats 3

Wants a config that is prepared and adapted. The first pack warms up (the base is opened, kernels are compiled) and is
not timed. Memory is the proportional share (PSS) of the base's file in each worker, plus parameters that are no longer
in the file's mapping, summed over the workers of the node.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from oppu_ray.config import Config, load_config, located, to_dict
from oppu_ray.configs import find_config
from oppu_ray.files import write_atomic
from oppu_ray.machine import hardware
from oppu_ray.packing import plan_packs
from oppu_ray.pool import RayWorker, connect
from oppu_ray.prepared import read_index
from oppu_ray.progress import Progress
from oppu_ray.refresh import task_base_path
from oppu_ray.workers import run_units


class Clock(Progress):
    """Notes when packs are done."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def pack_done(self) -> None:
        super().pack_done()
        self.times.append(time.monotonic())


class MeasuredWorker(RayWorker):
    """A worker that says how much of the base it holds."""

    def base_bytes(self) -> tuple[int, int]:
        """PSS of the base's file, and parameters outside its mapping, once every parameter has been touched."""
        model = self.worker._base(self.worker.task_base_path).model
        for parameter in model.parameters():
            parameter.sum()
        ranges, pss = [], 0
        is_base = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first = line.split()[0]
            if not first.endswith(":"):
                is_base = line.endswith(".safetensors")
                if is_base:
                    ranges.append(tuple(int(end, 16) for end in first.split("-")))
            elif first == "Pss:" and is_base:
                pss += int(line.split()[1]) * 1024
        outside = {
            parameter.data_ptr(): parameter.numel() * parameter.element_size()
            for parameter in model.parameters()
            if not any(start <= parameter.data_ptr() < end for start, end in ranges)
        }
        return pss, sum(outside.values())


def time_packs(config: Config, task_base: Path, units: list[Any], num_workers: int) -> float:
    """Seconds for all units but the first, in a vault of their own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prepare").symlink_to(Path(config.run_dir) / "prepare")
        workers = replace(config.workers, num_workers=num_workers, threads=1)
        clock = Clock()
        run = replace(config, run_dir=folder, workers=workers)
        failed = [one.error for one in run_units(run, task_base, "bench", "train", [units], clock) if one.error]
        if failed:
            raise ValueError(f"a user failed, so there is nothing to compare: {failed[0]}")
        return clock.times[-1] - clock.times[0]


def measure_base(config: Config, task_base: Path) -> tuple[int, int]:
    """Bytes that the base takes on this node with one worker and with two; nobody else may have opened it."""
    actor_class: Any = ray.remote(MeasuredWorker).options(num_cpus=1)
    first, second = (actor_class.remote(to_dict(config), str(task_base), "bench", number) for number in range(2))
    one = sum(ray.get(first.base_bytes.remote()))
    ray.get(second.base_bytes.remote())  # both have opened it before they are measured together
    two = sum(map(sum, ray.get([first.base_bytes.remote(), second.base_bytes.remote()])))
    for actor in (first, second):
        ray.kill(actor)
    return one, two


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=find_config, nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--packs", type=int, default=3, help="the first is not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ray.json"))
    options = parser.parse_intermixed_args()
    config = located(load_config(options.config, options.overrides))
    run_dir = Path(config.run_dir)
    task_base = task_base_path(config)
    packs = plan_packs(read_index(run_dir / "prepare").sizes("target"), config.personal)[: options.packs]
    units = [(pack.user_ids,) for pack in packs]
    connect()
    one, two = measure_base(config, task_base)
    print(f"base: {one / 1e6:.1f} MB with one worker, {two / 1e6:.1f} MB with two", flush=True)
    seconds: dict[str, list[float]] = {"inline": [], "ray": []}
    for _ in range(options.repeats):
        for name, times in seconds.items():
            times.append(time_packs(config, task_base, units, num_workers=int(name == "ray")))
            print(f"{name}: {times[-1]:.2f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {"ray_vs_inline": medians["ray"] / medians["inline"], "base_two_vs_one": two / one}
    result = {
        "command": "bench ray",
        "config": to_dict(config),
        "hardware": hardware(),
        "rows": {name: {"elapsed_s": medians[name], "all_s": times} for name, times in seconds.items()},
        "base_bytes": {"one_worker": one, "two_workers": two},
        "ratios": ratios,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(result, indent=1).encode())
    print("\n".join(f"{name}: {value:.3f}" for name, value in ratios.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
