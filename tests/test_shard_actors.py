"""Federated shards as Ray actors: the bits of one process, and rounds that go on without who is dead or late."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_tools import oppu, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import federated, shard_actors
from oppu_ray.config import Config, load_config
from oppu_ray.federated import Host, plan_base_shards, read_state, train_rounds
from oppu_ray.prepared import read_index
from oppu_ray.progress import Progress
from oppu_ray.shard_actors import ActorHosts, RayHost
from oppu_ray.workers import open_base

pytestmark = pytest.mark.usefixtures("ray_session")
FEDERATED = {"num_shards": 4, "num_rounds": 3, "local_steps": 1, "min_shards": 2}


class FaultyHost(RayHost):
    """Does what the file `<folder>/<round>-<shard>` says before it trains, once."""

    def ask(self, number: int, method: str, message: bytes, shared: bytes) -> bytes:
        if method == "train":
            fault = Path(self.folder) / f"{read_state(shared).num_rounds}-{number}"
            if fault.exists():
                action = fault.read_text()
                fault.unlink()
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                go = Path(self.folder) / "go"
                while not go.exists():
                    pass
        return super().ask(number, method, message, shared)

    def __init__(self, config: dict[str, Any], shards: Any, folder: str):
        super().__init__(config, shards, folder)
        self.folder = folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("run")
    base = tiny_base(tmp_path_factory.mktemp("base"))
    users = [tagging_user(n, 4, "base") for n in range(10, 16)] + [tagging_user(n) for n in range(2)]
    path = write_config(home, base, write_users(home / "users.jsonl", users), federated=FEDERATED)
    oppu("prepare", path)
    return load_config(path)


def rounds(config: Config, home: Path, num_workers: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    config = replace(config, workers=replace(config.workers, num_workers=num_workers, cpus_per_worker=0.5))
    index = read_index(Path(config.run_dir) / "prepare")
    adapter, residual = train_rounds(config, index, open_base(config), home, Progress())
    return adapter.tensors | residual, [json.loads(path.read_text()) for path in sorted(home.glob("round-*.json"))]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of the rounds, where faults are put."""
    monkeypatch.setattr(shard_actors, "RayHost", FaultyHost)
    (tmp_path / "rounds").mkdir()
    yield tmp_path / "rounds"


def test_actors_have_the_bits_of_one_process(config: Config, tmp_path: Path) -> None:
    for name, changes in {"open": {"method": "product"}, "masked": {"secure": True, "min_shards": 3}}.items():
        changed = replace(config, federated=replace(config.federated, **changes))  # type: ignore[arg-type]
        inline, records = rounds(changed, tmp_path / f"{name}-inline", 0)
        actors, their_records = rounds(changed, tmp_path / f"{name}-actors", 2)
        assert all(np.array_equal(inline[key], actors[key]) for key in inline)
        for one, other in zip(records, their_records, strict=True):
            assert one["took_part"] == other["took_part"] == [0, 1, 2, 3]
            if name == "open":  # a masked message's length depends on nothing either, but its numbers are drawn anew
                assert one["bytes_up"] == other["bytes_up"]


def test_a_dead_actors_shards_are_left_out_and_join_the_next_round(config: Config, faulty: Path) -> None:
    (faulty / "1-3").write_text("kill")
    _, records = rounds(config, faulty, 2)
    assert [record["took_part"] for record in records] == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]] or [
        record["took_part"] for record in records
    ] == [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]
    assert records[1]["found"]["3"] == "was lost"


def test_a_late_shard_is_left_out_and_asked_again_when_it_has_answered(config: Config, faulty: Path) -> None:
    (faulty / "0-1").write_text("wait")
    plan = plan_base_shards(config, read_index(Path(config.run_dir) / "prepare"))
    patient = replace(config, workers=replace(config.workers, num_workers=4, cpus_per_worker=0.25))
    hosts = ActorHosts(patient, plan, faulty)
    base = open_base(config)
    state = federated.write_state(federated.RoundState(0, federated.initial_adapter(config, base)))
    message = federated.write_message({"min_shards": 2}, {})
    keys = federated.write_message({"attempt": "a"}, {})
    hosts.ask("keys", dict.fromkeys(plan, keys), b"")  # all are up
    hosts.config = replace(patient, federated=replace(patient.federated, round_timeout_s=5.0))
    replies, missing = hosts.ask("train", dict.fromkeys(plan, message), state)
    assert sorted(replies) == [0, 2, 3] and missing == {1: "did not answer within 5 s"}
    _, missing = hosts.ask("keys", dict.fromkeys(plan, keys), b"")
    assert missing == {1: "is still busy with what it was asked before"}
    (faulty / "go").touch()
    hosts.config = patient
    while True:
        replies, missing = hosts.ask("train", dict.fromkeys(plan, message), state)
        if not missing:
            break
    alone = Host(config, plan, faulty, base)
    assert all(replies[n] == alone.ask(n, "train", message, state) for n in plan)
    hosts.close()


def test_a_shard_that_cannot_be_set_up_is_the_configs_fault(config: Config, tmp_path: Path) -> None:
    broken = replace(config, base=replace(config.base, name=str(tmp_path)))
    workers = replace(config.workers, num_workers=1, cpus_per_worker=0.5)
    plan = plan_base_shards(config, read_index(Path(config.run_dir) / "prepare"))
    hosts = ActorHosts(replace(broken, workers=workers), plan, tmp_path)
    with pytest.raises(ValueError, match="cannot start"):
        hosts.ask("keys", {0: federated.write_message({"attempt": "a"}, {})}, b"")
    hosts.close()
