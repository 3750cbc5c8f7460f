"""Everything at once for long, with kills: `python -m jobs.soak --minutes 60 --seed 0`.

In: nothing; it makes a tiny run and serves it on a Ray of its own. Clients ask, users add to their histories, train,
roll back, forget items and themselves, a run trains everybody anew again and again, and in the seed's order processes
are killed: replicas, the trainer, training workers, Serve's controller. Out: `runs/soak/result.json`; ends with 1 if
anything was lost or doubled, an answer named a version that its user never had, or memory grew.

A reader might question that refusals are no failures: who asks a replica that dies gets a 503 and asks again. What was
confirmed must be there in the end, and what was refused must not be there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import ray

from oppu_ray.files import write_atomic
from oppu_ray.machine import hardware
from oppu_ray.registry import Refused
from oppu_ray.submit import listen_on_loopback
from oppu_ray.vault import Vault

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # whose tiny run and service this is

from faults import until  # noqa: E402
from line_tools import TAGS  # noqa: E402
from serve_tools import token_of  # noqa: E402
from service import GUESTS, USERS, Service, running  # noqa: E402

SAMPLE_S = 5.0
MAX_GROWTH = 0.1
"""By which memory may differ between the second and the last quarter: replicas come and go."""
REFUSALS = {409, 429, 500, 503, 504}
KILLS = ("Engine", "Engine", "Trainer", "RayWorker", "controller")


@dataclass
class Person:
    """What one user was told: ids of items they have, of items that may be there (the answer was lost), versions."""

    name: str
    token: str
    sure: set[str] = field(default_factory=set)
    maybe: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Soak:
    def __init__(self, service: Service, seed: int):
        self.service, self.seed = service, seed
        self.stopped = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latencies: list[float] = []
        self.people = [Person(name, token_of(service.vault, name)) for name in (*USERS, *GUESTS)]
        for person in self.people:
            person.sure = {item.item_id for item in service.vault.read_history(person.name)}

    def call(
        self, person: Person, method: str, path: str, body: Any = None, also: tuple[int, ...] = ()
    ) -> httpx2.Response | None:
        """One request; None where the answer was lost on the way. Statuses of refusals, and `also`, are not wrong."""
        headers = {"Authorization": f"Bearer {person.token}"}
        try:
            answer = httpx2.request(method, self.service.url + path, json=body, headers=headers, timeout=70)
        except httpx2.HTTPError as error:
            self.counts[f"lost: {type(error).__name__}"] += 1
            return None
        self.counts[f"status {answer.status_code}"] += 1
        if answer.status_code >= 400 and answer.status_code not in REFUSALS.union(also):
            self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def guarded(self, job: Callable[[], None]) -> None:
        """A thread's work; what it raises ends the soak."""
        try:
            job()
        except Exception as error:
            self.wrong.append(f"a thread ended: {error!r}")

    # ---- what goes on at the same time, each in a thread of its own

    def ask(self, number: int) -> None:
        draw = random.Random(f"{self.seed}/ask/{number}")
        registry, user_hash = self.service.vault.registry, self.service.vault.user_hash
        while not self.stopped.is_set():
            person = draw.choice(self.people)
            with person.lock:  # nobody is forgotten, and so signed out, in the middle of a question
                began = time.monotonic()
                body = {"input": f"film {draw.randrange(5)}", "arm": draw.choice(["oppu", "oppu", "rag", "task"])}
                answer = self.call(person, "POST", "/v1/personalize", body)
                if answer is not None and answer.status_code == 200:
                    self.latencies.append(time.monotonic() - began)
                    version = answer.json()["adapter_version"]
                    known = {row.version for row in registry.versions(user_hash(person.name))}
                    if version is not None and version not in known:
                        self.wrong.append(f"an answer by {version}, which is none of the user's")

    def live(self, number: int) -> None:
        """Users who do more than ask."""
        draw = random.Random(f"{self.seed}/live/{number}")
        while not self.stopped.wait(draw.uniform(0.1, 1.0)):
            person = draw.choice(self.people)
            with person.lock:
                action = draw.choice(
                    [self.add, self.add, self.add, self.train, self.roll_back, self.forget_item, self.forget]
                )
                action(person, draw)
                self.counts[action.__name__] += 1

    def add(self, person: Person, draw: random.Random) -> None:
        item = f"i{draw.getrandbits(60)}"
        body = {"items": [{"item_id": item, "text": "a film", "label": draw.choice(TAGS)}]}
        answer = self.call(person, "POST", "/v1/me/history", body)
        if answer is not None and answer.status_code == 200:
            person.sure.add(item)
        else:
            person.maybe.add(item)

    def train(self, person: Person, draw: random.Random) -> None:
        if person.sure:
            self.call(person, "POST", "/v1/me/refresh")

    def roll_back(self, person: Person, draw: random.Random) -> None:
        with suppress(ValueError):  # there is none before
            self.service.vault.rollback(person.name)

    def forget_item(self, person: Person, draw: random.Random) -> None:
        if not person.sure:
            return
        item = draw.choice(sorted(person.sure))
        answer = self.call(person, "POST", "/v1/me/history/forget", {"item_ids": [item]})
        person.sure.remove(item)
        if answer is None or answer.status_code != 200:
            person.maybe.add(item)

    def forget(self, person: Person, draw: random.Random) -> None:
        if person.name not in GUESTS or draw.random() < 0.7:
            return
        until(lambda: self.is_forgotten(person))
        if self.service.vault.registry.has_user(self.service.vault.user_hash(person.name)):
            self.wrong.append("a user who was forgotten is there")
        until(lambda: self.is_back(person))
        person.token = token_of(self.service.vault, person.name)
        person.sure, person.maybe = set(), set()

    def is_forgotten(self, person: Person) -> bool:
        answer = self.call(person, "DELETE", "/v1/me", also=(401,))  # a first try may have done it, its answer lost
        return answer is not None and answer.status_code in (200, 401)

    def is_back(self, person: Person) -> bool:
        with suppress(Refused):  # the trainer has just taken them from its queue, and finds nobody
            self.service.vault.add_users([person.name])
            return True
        return False

    def train_all(self) -> None:
        """A whole run after another, by one worker on the same Ray."""
        number = 0
        environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        while not self.stopped.is_set():
            number += 1
            command = [sys.executable, "-m", "jobs.train", str(self.service.config), f"seed={number}"]
            with open(self.service.folder / "train.log", "ab") as log:
                code = subprocess.run(
                    [*command, "workers.num_workers=1", "workers.cpus_per_worker=0.2"],
                    cwd=ROOT, env=environment, stdout=log, stderr=log,
                ).returncode  # fmt: skip
            self.counts[f"runs ended with {code}"] += 1
            if code not in (0, 1, 4):  # 1: a pack lost three workers; 4: so it did before it began
                words = (self.service.folder / "train.log").read_text(errors="replace").rstrip().rpartition("\n")[2]
                self.wrong.append(f"a run ended with {code}: {words[-500:]}")

    def kill(self) -> None:
        draw = random.Random(f"{self.seed}/kill")
        while not self.stopped.wait(draw.uniform(10, 30)):
            what = draw.choice(KILLS)
            if what == "controller":
                with suppress(ValueError):
                    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
                    self.counts["killed controller"] += 1
            elif found := self.processes(what):
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(found).pid, signal.SIGKILL)
                    self.counts[f"killed {what}"] += 1

    def processes(self, what: str = "ray::") -> list[psutil.Process]:
        """Processes of this Ray with these words in their title."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and what in title:
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    # ---- the end

    def check(self) -> None:
        """Nothing that was confirmed is lost, nothing is there twice or that nobody gave, and all of it is whole."""
        vault = self.service.vault
        for person in self.people:
            items = [item.item_id for item in vault.read_history(person.name)]
            if lost := person.sure - set(items):
                self.wrong.append(f"{len(lost)} items lost")
            if len(set(items)) < len(items) or set(items) - person.sure - person.maybe:
                self.wrong.append("items doubled, or from nowhere")
            if vault.registry.current(vault.user_hash(person.name)):
                vault.load(person.name, base_fingerprint=None)
        later = Vault(vault.root, clock=lambda: time.time() + 1000)  # when the leases of the dead have ended
        later.gc(min_age_s=-1)
        self.wrong += later.verify()
        later.close()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory(prefix="oppu-soak-", dir="/tmp") as folder:
        listen_on_loopback()
        ray.init(
            "local",
            num_cpus=6,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        with running(Path(folder), Path(folder) / "run", max_items=100_000) as service:
            soak = Soak(service, options.seed)
            samples = run(soak, options.minutes * 60)
            until(lambda: all(service.ask(user).status_code == 200 for user in USERS))
            soak.check()
        ray.shutdown()
    result = summarise(soak, samples) | {"minutes": options.minutes, "seed": options.seed, "hardware": hardware()}
    target = Path("runs/soak")
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "result.json", json.dumps(result, indent=1).encode())
    print("\n" + json.dumps({key: value for key, value in result.items() if key != "hardware"}, indent=1))
    return 1 if soak.wrong or result["growth"] > MAX_GROWTH else 0


def run(soak: Soak, seconds: float) -> list[tuple[float, int, int]]:
    """Let it all go on; samples of (seconds, bytes of memory of its own of all processes, open files)."""
    jobs = [*[partial(soak.ask, number) for number in range(4)], *[partial(soak.live, number) for number in range(2)]]
    threads = [threading.Thread(target=soak.guarded, args=(job,)) for job in (*jobs, soak.train_all, soak.kill)]
    for thread in threads:
        thread.start()
    began, samples = time.monotonic(), []
    while (elapsed := time.monotonic() - began) < seconds and not soak.wrong:
        num_bytes = num_files = 0
        for process in [psutil.Process(), *soak.processes()]:
            with suppress(psutil.Error):
                memory = process.memory_info()
                num_bytes, num_files = num_bytes + memory.rss - memory.shared, num_files + process.num_fds()
        samples.append((elapsed, num_bytes, num_files))
        print(f"\r{elapsed:.0f} s: {len(soak.latencies)} answers, {num_bytes >> 20} MiB", end="", flush=True)
        time.sleep(SAMPLE_S)
    soak.stopped.set()
    for thread in threads:
        thread.join()
    return samples


def summarise(soak: Soak, samples: list[tuple[float, int, int]]) -> dict[str, Any]:
    """The figures. `growth` is the share by which memory's median grew from the second to the last quarter."""
    quarter = max(1, len(samples) // 4)
    seconds, num_bytes, num_files = np.array(samples, dtype=float).T
    before, after = np.median(num_bytes[quarter : 2 * quarter]), np.median(num_bytes[-quarter:])
    p50, p95 = np.percentile(soak.latencies or [float("nan")], [50, 95])
    return {
        "command": "soak",
        "wrong": soak.wrong,
        "counts": dict(sorted(soak.counts.items())),
        "num_answers": len(soak.latencies),
        "answers_per_s": len(soak.latencies) / seconds[-1],
        "latency_s": {"p50": p50, "p95": p95},
        "memory_bytes": {"second_quarter": before, "last_quarter": after, "peak": num_bytes.max()},
        "growth": after / before - 1,
        "open_files": {"second_quarter": np.median(num_files[quarter : 2 * quarter]), "last": num_files[-1]},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
