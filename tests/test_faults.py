"""Whatever dies on the way: the adapters are those of a run without faults, to the bit, and each user is done once.

The last two tests take the cluster apart, so the order of this file matters.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from clusters import lasting_head
from faults import FaultyWorker, until
from invariants import check_training, fingerprint, no_secrets
from line_tools import adapters, oppu, result, run_dir, tagging_user, write_config, write_users
from ray.cluster_utils import Cluster
from tiny import tiny_base

from oppu_ray import pool
from oppu_ray.cli import main
from oppu_ray.progress import read_status
from oppu_ray.telemetry import TRAINING_METRICS
from oppu_ray.vault import Vault

ROOT = Path(__file__).resolve().parents[1]
Record = Callable[[str, object], None]
CANARY = "xyzzyplugh"
USERS = [f"user-{i}" for i in range(4)]
FOUR_STEPS = ("personal.max_steps=4", "workers.num_workers=2", "workers.checkpoint_every_s=1000")


@dataclass
class Run:
    """A run that is prepared and adapted: two packs of two users, each a shard of its own. `bases` are fingerprints."""

    config: Path
    bases: dict[Path, str] = field(default_factory=dict)
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return run_dir(self.config)

    def fault(self, shard: int, step: int, action: str) -> None:
        (self.folder / "faults" / f"{shard}-{step}").write_text(action)

    def steps(self, shard: int) -> list[int]:
        """The steps that workers of a shard began, in order."""
        lines = (self.folder / "faults" / "steps").read_text().split()
        return [int(line.partition("-")[2]) for line in lines if line.startswith(f"{shard}-")]

    def train(self, *overrides: str) -> int:
        return main(["train", str(self.config), *FOUR_STEPS, *overrides])

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, "-m", "faults", "train", str(self.config), *FOUR_STEPS, *overrides]
        with open(self.folder / "driver.log", "a") as log:
            driver = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log, text=True
            )
        self.drivers.append(driver)
        return driver

    def versions(self) -> dict[str, int]:
        vault = Vault(self.folder / "vault")
        counts = {user_id: len(vault.registry.versions(vault.user_hash(user_id))) for user_id in USERS}
        vault.close()
        return counts


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without faults, in this process."""
    folder = tmp_path_factory.mktemp("inline")
    base = tiny_base(folder / "base")
    users = [tagging_user(i, canary=CANARY) for i in range(4)] + [tagging_user(8, role="base")]
    config = write_config(folder, base, write_users(folder / "users.jsonl", users))
    oppu("prepare", config)
    oppu("adapt", config)
    oppu("train", config, "personal.max_steps=4")
    task_base = Path(result(config, "adapt")["task_base"])
    return Run(config, {folder: fingerprint(folder) for folder in (base, task_base)})


@pytest.fixture
def run(inline: Run, tmp_path: Path) -> Iterator[Run]:
    """The same run elsewhere, not yet trained; no driver of it outlives a test that failed."""
    text = inline.config.read_text().replace(str(inline.folder), str(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(text)
    shutil.copytree(inline.folder / "prepare", tmp_path / "run" / "prepare")
    shutil.copytree(inline.folder / "adapt", tmp_path / "run" / "adapt")
    (tmp_path / "run" / "faults").mkdir()
    made = Run(tmp_path / "config.yaml")
    yield made
    for driver in made.drivers:
        driver.kill()
        driver.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with lasting_head(num_cpus=2) as cluster:
        ray.init(log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture(autouse=True)
def faulty_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RayWorker", FaultyWorker)
    monkeypatch.setattr(pool, "ADOPT_AFTER_S", 1000.0)  # on a machine that is busy, a new worker may take minutes


def check(run: Run, inline: Run) -> dict[str, Any]:
    """The invariants: all users are there, once, with the adapters of the run without faults."""
    return check_training(run.config, adapters(inline.config), inline.bases)


def all_metrics(cluster: Cluster) -> str | None:
    """What Prometheus would read from the node, once every metric of training is there."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_oppu_")]
    return "\n".join(lines) if all(f"ray_{name}" in text for name in TRAINING_METRICS if "failed" not in name) else None


def test_workers_killed_in_every_step_of_a_run(
    cluster: Cluster, run: Run, inline: Run, record_property: Record
) -> None:
    for shard, step in ((0, 0), (0, 1), (1, 2), (1, 3)):
        run.fault(shard, step, "kill")
    assert run.train() == 0
    trained = check(run, inline)
    assert trained["num_recoveries"] == 4 and len(trained["recovery_s"]) == 4
    record_property("recovery_s", max(trained["recovery_s"]))
    assert run.steps(0) == [0, 0, 1, 0, 1, 2, 3] and run.steps(1) == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    read = [set((run.folder / "faults" / f"{shard}-reads").read_text().split()) for shard in (0, 1)]
    assert read == [set(USERS[:2]), set(USERS[2:])]  # each worker its own shard's histories
    logs = [path for path in cluster.folder.rglob("logs/*") if path.is_file()]
    assert logs and no_secrets(logs, [CANARY])
    exported = until(lambda: all_metrics(cluster))
    assert CANARY not in exported and "user-" not in exported


def test_a_lost_worker_goes_on_from_its_checkpoint(
    cluster: Cluster, run: Run, inline: Run, record_property: Record
) -> None:
    run.fault(0, 2, "kill")
    run.fault(1, 1, "terminate")  # which ends it after the step, with a checkpoint whatever the interval
    assert run.train("workers.checkpoint_every_s=0") == 0
    trained = check(run, inline)
    assert trained["num_recoveries"] == 2
    record_property("recovery_s", max(trained["recovery_s"]))
    assert run.steps(0) == [0, 1, 2, 2, 3] and run.steps(1) == [0, 1, 2, 3]


def test_a_pack_that_costs_too_many_workers_is_given_up_until_the_run_is_started_again(
    cluster: Cluster, run: Run, inline: Run
) -> None:
    for step in range(pool.MAX_DEATHS):
        run.fault(1, step, "kill")
    assert run.train() == 1
    trained = result(run.config, "train")
    assert trained["failed"] == {u: f"user {u!r}: their pack cost 3 workers and was given up" for u in USERS[2:]}
    assert (trained["num_done"], trained["num_to_retry"], trained["num_recoveries"]) == (2, 2, 3)
    assert run.versions() == {"user-0": 1, "user-1": 1, "user-2": 0, "user-3": 0}
    assert run.train() == 0
    assert check(run, inline)["num_trained"] == 2 and run.steps(0) == [0, 1, 2, 3]


def test_a_pack_out_of_memory_is_halved_and_the_result_says_so(cluster: Cluster, run: Run, inline: Run) -> None:
    run.fault(1, 1, "out of memory")
    assert run.train() == 0
    trained = result(run.config, "train")
    assert (trained["num_done"], trained["num_split_users"], trained["num_recoveries"]) == (4, 2, 0)
    assert run.versions() == dict.fromkeys(USERS, 1)
    mine, theirs = adapters(run.config), adapters(inline.config)
    assert all(mine[user_id] == theirs[user_id] for user_id in USERS[:2])  # the others had other shapes
    assert run.steps(1) == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]


def test_a_driver_that_is_killed_or_told_to_end(
    cluster: Cluster, run: Run, inline: Run, record_property: Record
) -> None:
    run.fault(0, 1, "wait")
    run.fault(1, 1, "wait")
    driver = run.start()
    until(lambda: len(list(run.folder.glob("faults/?-waits"))) == 2)
    assert read_status(run.folder)["state"] == "running"
    driver.terminate()
    until(lambda: b"stopping" in (run.folder / "driver.log").read_bytes())
    (run.folder / "faults" / "go").touch()
    assert driver.wait() == 3 and read_status(run.folder)["state"] == "interrupted"
    assert len(list(run.folder.glob("checkpoints/*/00000002/pack.json"))) == 2
    for path in run.folder.glob("faults/?-waits"):
        path.unlink()
    run.fault(0, 3, "wait")
    (run.folder / "faults" / "go").unlink()
    driver = run.start()
    until((run.folder / "faults" / "0-waits").exists)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    began = time.monotonic()
    assert run.train() == 0
    record_property("recovery_s", time.monotonic() - began)
    check(run, inline)
    assert run.steps(0) == [0, 1, 2, 3, 2, 3]
    assert "run the same again to continue" in (run.folder / "driver.log").read_text()


def test_requests_and_replies_lost_between_driver_and_workers(cluster: Cluster, run: Run, inline: Run) -> None:
    lost = {"num_failures": 6, "req_failure_prob": 50, "resp_failure_prob": 50, "in_flight_failure_prob": 0}
    failures = {"CoreWorkerService.grpc_client.PushTask": lost}
    assert run.start(RAY_testing_rpc_failure=json.dumps(failures)).wait() == 0
    check(run, inline)


def test_the_clusters_head_process_restarts_in_the_middle(
    cluster: Cluster, run: Run, inline: Run, record_property: Record
) -> None:
    run.fault(0, 1, "wait")
    driver = run.start()
    until((run.folder / "faults" / "0-waits").exists)
    cluster.head_node.kill_gcs_server()
    (run.folder / "faults" / "go").touch()
    cluster.head_node.start_gcs_server()
    began = time.monotonic()
    assert driver.wait() == 0
    record_property("recovery_s", time.monotonic() - began)
    check(run, inline)


def test_a_lost_node_with_no_room_elsewhere(
    cluster: Cluster, run: Run, inline: Run, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    lost: list[float] = []
    monkeypatch.setattr(pool, "ADOPT_AFTER_S", 1.0)
    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    run.fault(0, 0, "wait")
    run.fault(1, 0, "wait")

    def lose_the_node(driver: Any) -> None:
        if len(list(run.folder.glob("faults/?-waits"))) == 2 and node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
            lost.append(time.monotonic())
        elif node not in cluster.worker_nodes and any(shard.stream is None for shard in driver.shards):
            (run.folder / "faults" / "go").touch()  # not before the loss is seen: its worker would finish first

    monkeypatch.setattr(pool._Pool, "_check_head", lose_the_node)  # called in every turn of the driver's loop
    assert run.train("workers.cpus_per_worker=2") == 0
    record_property("recovery_s", time.monotonic() - lost[0])
    assert check(run, inline)["num_recoveries"] == 1


@pytest.mark.chaos
def test_an_actor_killed_through_ray(
    cluster: Cluster,
    run: Run,
    inline: Run,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    run.fault(0, 1, "wait")
    killed = []

    def kill_it(driver: Any) -> None:
        if (run.folder / "faults" / "0-waits").exists() and not killed:
            ray.kill(driver.shards[0].actor, no_restart=False)
            killed.append(driver)

    monkeypatch.setattr(pool._Pool, "_check_head", kill_it)
    assert run.train() == 0
    trained = check(run, inline)
    assert killed and trained["num_recoveries"] == 1 and run.steps(0) == [0, 1, 0, 1, 2, 3]
    record_property("recovery_s", max(trained["recovery_s"]))


@pytest.mark.chaos
def test_two_drivers_of_one_run_at_once(cluster: Cluster, run: Run, inline: Run) -> None:
    run.fault(0, 1, "wait")
    first = run.start()
    until((run.folder / "faults" / "0-waits").exists)
    second = run.start()
    until(lambda: b"another process trains this run" in (run.folder / "driver.log").read_bytes())
    (run.folder / "faults" / "go").touch()
    assert (first.wait(), second.wait()) == (0, 0)
    assert check(run, inline)["num_trained"] == 0  # by the second
    assert run.steps(0) == [0, 1, 2, 3] and run.steps(1) == [0, 1, 2, 3]


@pytest.mark.chaos
def test_a_user_who_does_not_fit_into_memory_fails_alone(cluster: Cluster, run: Run, inline: Run) -> None:
    run.fault(1, 1, "allocate")  # the pack is halved
    run.fault(1, 2, "allocate")  # and its first half is a user alone
    assert run.train() == 1
    trained = result(run.config, "train")
    (failed,) = trained["failed"]
    assert "out of memory" in trained["failed"][failed] and (trained["num_done"], trained["num_to_retry"]) == (3, 1)
    assert run.versions() == {user_id: int(user_id != failed) for user_id in USERS}
    assert run.train() == 0
    assert run.versions() == dict.fromkeys(USERS, 1)


@pytest.mark.chaos
def test_a_full_object_store_spills(cluster: Cluster, run: Run, inline: Run) -> None:
    parts = [np.full(20 * 2**20, number, np.uint8) for number in range(8)]
    held = [ray.put(part) for part in parts]  # twice what the store holds
    assert run.train() == 0
    check(run, inline)
    assert all(np.array_equal(ray.get(one), part) for one, part in zip(held, parts, strict=True))


@pytest.mark.chaos
def test_a_storm_by_a_seed(
    cluster: Cluster,
    run: Run,
    inline: Run,
    request: pytest.FixtureRequest,
    record_property: Record,
) -> None:
    draw = random.Random(request.config.getoption("--chaos-seed"))
    storm = [(shard, step, draw.choice(["kill", "terminate"])) for shard in (0, 1) for step in draw.sample(range(4), 2)]
    record_property("schedule", storm)
    for fault in storm:
        run.fault(*fault)
    assert run.train(f"workers.checkpoint_every_s={draw.choice([0, 1000])}") == 0, storm
    trained = check(run, inline)
    assert trained["num_recoveries"] >= 2, storm
    record_property("recovery_s", max(trained["recovery_s"]))


@pytest.mark.slow
def test_the_whole_line_on_three_nodes(cluster: Cluster, run: Run, inline: Run, tmp_path: Path) -> None:
    one_each = ("personal.max_users_per_pack=1", "evaluate.arms=[task, oppu]")
    alone = tmp_path / "alone"
    oppu("run", run.config, *one_each, f"run_dir={alone}")
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20) for _ in range(2)]
    spread = ("workers.num_workers=3", "workers.cpus_per_worker=2")  # which fills a node, so that there is one on each
    evaluated = oppu("run", run.config, *one_each, *spread)
    assert len(list(run.folder.glob("faults/?-reads"))) == 3
    assert evaluated["arms"] == json.loads((alone / "evaluate" / "result.json").read_text())["arms"]
    other = tmp_path / "alone.yaml"
    other.write_text(run.config.read_text().replace(str(run.folder), str(alone)))
    assert adapters(run.config) == adapters(other)
    for node in nodes:
        cluster.remove_node(node)


def test_a_cluster_without_a_head_ends_the_driver_and_the_run_goes_on_elsewhere(
    cluster: Cluster, run: Run, inline: Run, record_property: Record
) -> None:
    run.fault(0, 1, "wait")
    driver = run.start()
    until((run.folder / "faults" / "0-waits").exists)
    ray.shutdown()
    cluster.head_node.kill_gcs_server()
    began = time.monotonic()
    assert driver.wait() == 4
    (run.folder / "faults" / "go").touch()
    assert "does not answer; run the same again" in (run.folder / "driver.log").read_text()
    assert run.train("workers.num_workers=0") == 0
    record_property("recovery_s", time.monotonic() - began)
    check(run, inline)
