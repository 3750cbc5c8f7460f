"""Load on a running service, and its memory meanwhile: `python -m jobs.load_serve demo --minutes 10`.

In: the run that `oppu serve` serves on this machine, with the same overrides. Out: latencies, errors and the growth of
the replicas' memory, in `<run_dir>/load_serve/result.json`. Each client asks for one user after another, by every arm;
one question in ten is a stream that it hangs up on. Ends with 1 if a request failed or memory kept growing.
A reader might question that only the second half of the load counts for growth: in the first, slots and caches fill.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import random
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from oppu_ray.config import Config, load_config, to_dict
from oppu_ray.configs import find_config
from oppu_ray.core import Item
from oppu_ray.files import write_atomic
from oppu_ray.machine import hardware
from oppu_ray.tasks import get_task
from oppu_ray.vault import open_vault

SAMPLE_S = 5.0
MAX_GROWTH = 2**20
"""Bytes per minute that count as flat: allocators never stand quite still."""


@dataclasses.dataclass
class Asked:
    """A user of the load: a token that ends with it, and questions made of their own history."""

    token: str
    questions: list[dict[str, Any]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=find_config)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    users = ask_users(config, options.minutes * 60 + 600)
    stop = threading.Event()
    latencies: list[float] = []
    failures: list[str] = []
    clients = [
        threading.Thread(target=ask_on, args=(config, users, seed, stop, latencies, failures))
        for seed in range(options.clients)
    ]
    for client in clients:
        client.start()
    samples: list[tuple[float, int, int]] = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < options.minutes * 60:
        samples.append((elapsed, *memory_and_files()))
        print(f"\r{elapsed:.0f} s: {len(latencies)} answers, {len(failures)} failures", end="", flush=True)
        time.sleep(SAMPLE_S)
    stop.set()
    for client in clients:
        client.join()
    result = summarise(samples, latencies, failures) | {"config": to_dict(config), "hardware": hardware()}
    folder = Path(config.run_dir).expanduser() / "load_serve"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "result.json", json.dumps(result, indent=1).encode())
    shown = {key: value for key, value in result.items() if key not in ("config", "hardware")}
    print("\n" + json.dumps(shown, indent=1))
    return 1 if failures or result["growth_bytes_per_minute"] > MAX_GROWTH else 0


def ask_users(config: Config, ttl_s: float) -> list[Asked]:
    """Everybody with an adapter and something to ask in their history."""
    task = get_task(config.task)
    users = []
    with closing(open_vault(config, create=False)) as vault:
        for user in vault.registry.users():
            items = vault.read_history(user.user_hash)[-20:]
            questions = [
                {field: getattr(item, field) for field, _ in task.inputs} for item in items if _asks(item, task)
            ]
            if user.current and questions:
                token = vault.registry.create_token("user", user.user_hash, ttl_s)
                users.append(Asked(token, questions))
    if not users:
        raise ValueError(f"{config.run_dir}: no user with an adapter and a history; run `oppu run` first")
    return users


def _asks(item: Item, task: Any) -> bool:
    return all(getattr(item, field) for field, _ in task.inputs)


def ask_on(
    config: Config, users: list[Asked], seed: int, stop: threading.Event, latencies: list[float], failures: list[str]
) -> None:
    """One client: asks until told to stop."""
    draw = random.Random(seed)
    while not stop.is_set():
        user = draw.choice(users)
        began = time.monotonic()
        try:
            is_left = draw.random() < 0.1
            arm = draw.choice(["oppu", "oppu", "rag", "task"])
            body = {"input": draw.choice(user.questions), "arm": arm}
            status = hang_up(config, user) if is_left else ask(config, user, body)
            if status != 200:
                failures.append(str(status))
            elif not is_left:
                latencies.append(time.monotonic() - began)
        except (OSError, http.client.HTTPException) as error:
            failures.append(type(error).__name__)
            stop.wait(0.1)  # or a service that is not there would be asked 10,000 times a second


def ask(config: Config, user: Asked, body: dict[str, Any]) -> int:
    """One question to the end; the status of its answer."""
    with closing(_post(config, user, "/v1/personalize", body)) as connection:
        response = connection.getresponse()
        response.read()
        return response.status


def hang_up(config: Config, user: Asked) -> int:
    """One stream, left after its first bytes; the status of its answer."""
    body = {"prompt": "Once upon a time", "max_tokens": config.serve.max_new_tokens, "stream": True}
    with closing(_post(config, user, "/v1/completions", body)) as connection:
        response = connection.getresponse()
        response.read(64)
        return response.status


def _post(config: Config, user: Asked, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(config.serve.host, config.serve.port, timeout=config.serve.deadline_s + 10)
    headers = {"Authorization": f"Bearer {user.token}", "Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection


def memory_and_files() -> tuple[int, int]:
    """Bytes of memory that are a replica's own, and open files, of all replicas on this machine."""
    num_bytes = num_files = 0
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:oppu:"):
                memory = process.memory_info()
                num_bytes += memory.rss - memory.shared
                num_files += process.num_fds()
        except psutil.Error:  # it ended meanwhile
            continue
    return num_bytes, num_files


def summarise(samples: list[tuple[float, int, int]], latencies: list[float], failures: list[str]) -> dict[str, Any]:
    """The figures; growth is a slope over the second half of the samples."""
    seconds, num_bytes, num_files = np.array(samples, dtype=float)[len(samples) // 2 :].T
    p50, p95, p99 = np.percentile(latencies or [float("nan")], [50, 95, 99])
    return {
        "command": "load_serve",
        "num_answers": len(latencies),
        "num_failures": len(failures),
        "failures": {kind: failures.count(kind) for kind in sorted(set(failures))},
        "latency_s": {"p50": p50, "p95": p95, "p99": p99},
        "answers_per_s": len(latencies) / samples[-1][0],
        "peak_bytes": max(sample[1] for sample in samples),
        "growth_bytes_per_minute": float(np.polyfit(seconds, num_bytes, 1)[0] * 60),
        "growth_files_per_minute": float(np.polyfit(seconds, num_files, 1)[0] * 60),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
