"""Federated shards as Ray actors: the bits of one process, and rounds that go on without who is dead or late."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import until
from line_tools import oppu, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import shard_actors
from oppu_ray.aggregation import RoundState
from oppu_ray.config import Config, load_config
from oppu_ray.federated import LocalHosts, initial_adapter, plan_base_shards, train_rounds
from oppu_ray.prepared import read_index
from oppu_ray.progress import Progress
from oppu_ray.shard_actors import ActorHosts, RayHost
from oppu_ray.shards import Host, read_state, write_message, write_state
from oppu_ray.workers import open_base

pytestmark = pytest.mark.usefixtures("ray_session")
FEDERATED = {"num_shards": 4, "num_rounds": 3, "local_steps": 1, "min_shards": 2}


class FaultyHost(RayHost):
    """Does what the file `<folder>/<round>-<shard>` says before it trains, once."""

    def __init__(self, config: dict[str, Any], shards: Any, folder: str):
        super().__init__(config, shards, folder)
        self.folder = Path(folder)

    def ask(self, number: int, method: str, message: bytes, shared: bytes) -> bytes:
        fault = self.folder / f"{read_state(shared).num_rounds if shared else -1}-{number}"
        if fault.exists():
            action = fault.read_text()
            fault.unlink()
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if action == "raise":
                raise KeyError(number)
            if action == "nonsense":
                return None  # type: ignore[return-value]
            until((self.folder / "go").exists)
        return super().ask(number, method, message, shared)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a prepared run with four shards on two actors; a round counts with half of them."""
    home = tmp_path_factory.mktemp("run")
    base = tiny_base(tmp_path_factory.mktemp("base"))
    users = [tagging_user(n, 4, "base") for n in range(10, 16)] + [tagging_user(n) for n in range(2)]
    path = write_config(home, base, write_users(home / "users.jsonl", users), federated=FEDERATED)
    oppu("prepare", path)
    return load_config(path, ["workers.num_workers=2", "workers.cpus_per_worker=0.5"])


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the rounds, where faults are put."""
    monkeypatch.setattr(shard_actors, "RayHost", FaultyHost)
    return tmp_path


def rounds(config: Config, home: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    index = read_index(Path(config.run_dir) / "prepare")
    adapter, residual = train_rounds(config, index, open_base(config), home, Progress())
    return adapter.tensors | residual, [json.loads(path.read_text()) for path in sorted(home.glob("round-*.json"))]


def test_actors_have_the_bits_of_one_process_and_a_dead_one_joins_the_next_round(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "1-1").write_text("kill")  # with it goes shard 3, whose turn would have been next
    actors, records = rounds(config, folder)
    assert [record["took_part"] for record in records] == [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]
    assert records[1]["found"] == {"1": "was lost", "3": "was lost"}
    ask = LocalHosts.ask

    def lose(self: LocalHosts, method: str, messages: dict[int, bytes], shared: bytes) -> Any:
        replies, missing = ask(self, method, messages, shared)
        lost = [1, 3] if read_state(shared).num_rounds == 1 else []
        return {n: reply for n, reply in replies.items() if n not in lost}, missing | dict.fromkeys(lost, "was lost")

    monkeypatch.setattr(LocalHosts, "ask", lose)
    inline, same_records = rounds(replace(config, workers=replace(config.workers, num_workers=0)), folder / "inline")
    assert all(np.array_equal(inline[key], actors[key]) for key in inline)
    for one, other in zip(records, same_records, strict=True):
        assert {**one, "elapsed_s": 0} == {**other, "elapsed_s": 0}


def test_an_actor_that_raises_or_answers_nonsense_is_left_out_and_joins_the_next_round(
    config: Config, folder: Path
) -> None:
    (folder / "0-1").write_text("raise")
    (folder / "1-2").write_text("nonsense")
    _, records = rounds(config, folder)
    assert [record["took_part"] for record in records] == [[0, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    found = [{"1": "failed (KeyError)"}, {"2": "its answer is a NoneType; expected bytes"}, {}]
    assert [record["found"] for record in records] == found


def test_a_late_shard_is_left_out_and_asked_again_when_it_has_answered_and_waited_for_if_needed(
    config: Config, folder: Path
) -> None:
    (folder / "0-1").write_text("wait")
    plan = plan_base_shards(config, read_index(Path(config.run_dir) / "prepare"))
    base = open_base(config)
    state = write_state(RoundState(0, initial_adapter(config, base)))
    train = dict.fromkeys(plan, write_message({}, {}))
    hello = dict.fromkeys(plan, write_message({"attempt": "a"}, {}))
    hosts = ActorHosts(config, plan, folder)
    assert hosts.ask("keys", hello, b"")[1] == {}  # all are up
    hosts.config = replace(config, federated=replace(config.federated, round_timeout_s=4.0))
    replies, missing = hosts.ask("train", train, state)
    assert sorted(replies) == [0, 2] and missing == dict.fromkeys((1, 3), "did not answer within 4 s")
    _, missing = hosts.ask("keys", hello, b"")
    assert missing == dict.fromkeys((1, 3), "is still busy with what it was asked before")
    hosts.config = replace(config, federated=replace(config.federated, min_shards=3))
    hosts.tick = (folder / "go").touch
    assert hosts.ask("keys", hello, b"")[1] == {}
    hosts.config = config
    replies, missing = hosts.ask("train", train, state)
    alone = Host(config, plan, folder, base)
    assert missing == {} and all(replies[n] == alone.ask(n, "train", train[n], state) for n in plan)
    hosts.close()


@pytest.mark.slow
def test_a_shard_that_cannot_be_set_up_is_the_configs_fault(config: Config, tmp_path: Path) -> None:
    broken = replace(config, base=replace(config.base, name=str(tmp_path)))
    plan = plan_base_shards(config, read_index(Path(config.run_dir) / "prepare"))
    hosts = ActorHosts(broken, plan, tmp_path)
    with pytest.raises(ValueError, match="cannot start"):
        hosts.ask("keys", {0: write_message({"attempt": "a"}, {})}, b"")
    hosts.close()
