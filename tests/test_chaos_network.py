"""A cluster of two hosts whose network is cut: two network namespaces on this machine, joined by one virtual cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import until
from invariants import check_training, fingerprint
from line_tools import adapters, oppu, result, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "10.77.0.1:6399"
OVERRIDES = ("personal.max_steps=4", "workers.num_workers=2", "workers.cpus_per_worker=2")


@dataclass
class Hosts:
    """Two hosts, `head` at 10.77.0.1 and `far` at 10.77.0.2, and the folder of their Ray."""

    folder: str
    processes: list[subprocess.Popen[bytes]]

    def start(self, host: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, its output in `<folder>/<host>.log`."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "RAY_ADDRESS": ADDRESS,
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        with open(f"{self.folder}/{host}.log", "ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"oppu-{host}", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def cable(self, state: str) -> None:
        """`state`: up or down."""
        subprocess.run(["ip", "-n", "oppu-far", "link", "set", "oppu-v1", state], check=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and `ip`")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def remove() -> None:
        for host in ("head", "far"):
            subprocess.run(["ip", "netns", "del", f"oppu-{host}"], stderr=subprocess.DEVNULL)

    remove()
    try:
        ip("netns", "add", "oppu-head")
        ip("netns", "add", "oppu-far")
        ip(
            "link",
            "add",
            "oppu-v0",
            "netns",
            "oppu-head",
            "type",
            "veth",
            "peer",
            "name",
            "oppu-v1",
            "netns",
            "oppu-far",
        )
    except subprocess.CalledProcessError:
        remove()
        pytest.skip("this machine does not let us make network namespaces")
    for number, host in enumerate(("head", "far")):
        ip("-n", f"oppu-{host}", "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"oppu-v{number}")
        for device in ("lo", f"oppu-v{number}"):
            ip("-n", f"oppu-{host}", "link", "set", device, "up")
    with tempfile.TemporaryDirectory(prefix="oppu-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Hosts(folder, [])
        yield made
        for process in reversed(made.processes):
            process.terminate()
        for process in made.processes:
            process.wait(timeout=60)
        print(Path(folder, "head.log").read_text(errors="replace")[-3000:])
        remove()


def test_a_network_split_in_the_middle_of_a_run(
    hosts: Hosts, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    base = tiny_base(tmp_path / "base")
    users = write_users(tmp_path / "users.jsonl", [tagging_user(number) for number in range(4)])
    configs = [write_config(tmp_path / name, base, users) for name in ("alone", "split")]
    for config in configs:
        oppu("prepare", config)
        oppu("adapt", config)
    oppu("train", configs[0], "personal.max_steps=4")
    bases = {folder: fingerprint(folder) for folder in {base, Path(result(configs[1], "adapt")["task_base"])}}
    faults = run_dir(configs[1]) / "faults"
    faults.mkdir()
    for shard in (0, 1):
        (faults / f"{shard}-1").write_text("wait")

    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
    small = ["--object-store-memory=83886080", "--include-dashboard=false", f"--temp-dir={hosts.folder}"]
    hosts.start("head", *ray, "--head", "--node-ip-address=10.77.0.1", "--port=6399", *small)
    until(lambda: b"Ray runtime started" in Path(hosts.folder, "head.log").read_bytes())
    hosts.start("far", *ray, f"--address={ADDRESS}", "--node-ip-address=10.77.0.2", "--object-store-memory=83886080")
    until(lambda: b"Ray runtime started" in Path(hosts.folder, "far.log").read_bytes())
    driver = hosts.start("head", sys.executable, "-m", "faults", "train", str(configs[1]), *OVERRIDES)
    until(lambda: len(list(faults.glob("?-waits"))) == 2)
    cut = time.monotonic()
    hosts.cable("down")
    until(lambda: b"is lost" in Path(hosts.folder, "head.log").read_bytes())
    record_property("recovery_s", time.monotonic() - cut)  # until the loss is seen and the shard free to be taken over
    (faults / "go").touch()  # for both: the far worker goes on, cut off, over a disk that both hosts see
    assert driver.wait() == 0
    trained = check_training(configs[1], adapters(configs[0]), bases)
    assert trained["num_recoveries"] == 1
    hosts.cable("up")
