"""Faults on demand: a test puts what shall happen at which step into a run's folder, and a worker does it there, once.

`python -m faults train CONFIG ...` is `oppu train CONFIG ...` with such workers, for the tests that kill the driver.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from oppu_ray import pool, training, workers
from oppu_ray.cli import main


class FaultyWorker(pool.RayWorker):
    """A worker that notes its steps and whose histories it reads, and does what the file `faults/<shard>-<step>` says
    in front of that step.
    """

    def __init__(self, config: dict[str, Any], task_base: str, run_id: str, number: int):
        super().__init__(config, task_base, run_id, number)
        folder = Path(config["run_dir"]) / "faults"
        backward_step, read_users = training.backward_step, workers.read_users

        def faulty(bank: Any, examples: Any, train_config: Any, step: int, *rest: Any) -> Any:
            with open(folder / "steps", "a") as file:
                file.write(f"{number}-{step}\n")
            fault = folder / f"{number}-{step}"
            if fault.exists():
                action = fault.read_text()
                fault.unlink()
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif action == "terminate":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif action == "wait":
                    (folder / f"{number}-waits").touch()
                    until((folder / "go").exists)
                else:
                    allocate_too_much()
            return backward_step(bank, examples, train_config, step, *rest)

        def noted(prepared: Path, index: Any, user_ids: Any) -> Any:
            with open(folder / f"{number}-reads", "a") as file:
                file.writelines(f"{user_id}\n" for user_id in user_ids)
            return read_users(prepared, index, user_ids)

        training.backward_step, workers.read_users = faulty, noted


def allocate_too_much() -> None:
    """Ask for 1 GiB where the system gives this process 64 MiB more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**26, limits[1]))
    try:
        torch.empty(2**30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def until(condition: Callable[[], Any]) -> Any:
    """Polls until the condition holds, and returns it; the deadline only ends what waits in vain.

    On a machine that many share, a driver and its workers have taken four minutes to start.
    """
    end = time.monotonic() + 900
    while not (held := condition()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)
    return held


if __name__ == "__main__":
    from faults import FaultyWorker as ImportableWorker  # not __main__'s, which no worker could import

    pool.RayWorker = ImportableWorker  # type: ignore[misc]
    pool.HEAD_LOST_AFTER_S = 3.0
    sys.exit(main(sys.argv[1:]))
