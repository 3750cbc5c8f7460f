"""The same rounds with Flower's FedAvg in the server's place end in the same adapter.

Flower lives in an environment of its own, which OPPU_FLOWER_PYTHON names: `pip install flwr`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from line_tools import oppu, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray.aggregation import RoundState, flatten, trained_keys, unflatten
from oppu_ray.config import load_config
from oppu_ray.federated import initial_adapter, plan_base_shards, train_rounds
from oppu_ray.prepared import read_index
from oppu_ray.progress import Progress
from oppu_ray.shards import Shard
from oppu_ray.workers import open_base

pytestmark = pytest.mark.slow
AGGREGATE = """
import sys
import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg
asked = np.load(sys.argv[1])
results = [
    (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([trained]), int(weight), {}))
    for trained, weight in zip(asked["trained"], asked["weights"])
]
parameters, _ = FedAvg().aggregate_fit(1, results, [])
np.save(sys.argv[2], parameters_to_ndarrays(parameters)[0])
"""


@pytest.mark.parametrize("method", ["ffa", "naive"])
def test_flowers_fedavg_gives_the_same_adapter(tmp_path: Path, method: str) -> None:
    python = os.environ.get("OPPU_FLOWER_PYTHON")
    if not python:
        pytest.skip("OPPU_FLOWER_PYTHON does not name an environment with flwr")
    users = [tagging_user(n, 4 + n % 3, "base") for n in range(10, 16)] + [tagging_user(n) for n in range(2)]
    federated = {"num_shards": 3, "num_rounds": 3, "local_steps": 2, "method": method}
    folder = tiny_base(tmp_path / "base")
    path = write_config(tmp_path, folder, write_users(tmp_path / "users.jsonl", users), federated=federated)
    oppu("prepare", path)
    config = load_config(path)
    base, index = open_base(config), read_index(Path(config.run_dir) / "prepare")
    ours, _ = train_rounds(config, index, base, tmp_path / "rounds", Progress())

    plan = plan_base_shards(config, index)
    shards = [Shard(config, number, own, base, index, tmp_path / "key") for number, own in plan.items()]
    state = RoundState(0, initial_adapter(config, base))
    keys = trained_keys(state.adapter, method)
    for number in range(3):
        start = flatten(state.adapter, keys)
        updates = [shard.update(state) for shard in shards]
        trained = np.stack([start + delta for delta, _, _ in updates])
        np.savez(tmp_path / "asked.npz", trained=trained, weights=[weight for _, _, weight in updates])
        subprocess.run([python, "-c", AGGREGATE, tmp_path / "asked.npz", tmp_path / "mean.npy"], check=True)
        state = RoundState(number + 1, state.adapter | unflatten(np.load(tmp_path / "mean.npy"), state.adapter, keys))
    assert np.abs(flatten(state.adapter, keys) - flatten(ours.tensors, keys)).max() < 1e-5
    assert np.abs(flatten(ours.tensors, keys) - flatten(initial_adapter(config, base), keys)).max() > 1e-3
