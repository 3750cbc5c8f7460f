"""A Ray cluster on this machine whose head keeps its state on disk, so that it can be killed and come back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

TESTS = Path(__file__).resolve().parent


@contextmanager
def lasting_head(num_cpus: int) -> Iterator[Cluster]:
    """The cluster; `folder` is the head's. The settings hold for what starts inside."""
    with tempfile.TemporaryDirectory(prefix="oppu-ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", f"{folder}/gcs")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # no worker is killed for what else runs on this machine
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)  # where no Ray ran yet, Cluster fails without it
        head = {"num_cpus": num_cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.folder = Path(folder)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()
