"""A cluster of one machine, and stages as its jobs: what happens around the drivers, beside the line.

In: a stage's name and YAML file. Out: its exit code, and on the terminal its log. A reader might question that a job is
named by a digest of what it does: a second submission of the same run while the first is at work follows the first.
Ray is imported where it is used, after `RAY_AUTH_MODE` is set: it reads that once.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oppu_ray.config import load_config, located, located_overrides, to_dict
from oppu_ray.files import oppu_home, write_atomic
from oppu_ray.progress import ClusterLost

DASHBOARD_PORT = 8265
START_S, STOP_S = 180.0, 30.0


def token_path() -> Path:
    """Where Ray looks for the cluster's token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def private_token() -> Path:
    """The cluster's token, made if there is none, readable by nobody else: Ray would write it for everyone to read."""
    path = token_path()
    if os.environ.get("RAY_AUTH_MODE") != "disabled":
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            write_atomic(path, secrets.token_hex(32).encode())
        path.chmod(0o600)
    return path


def listen_on_loopback() -> None:
    """Let a Ray that this process starts later listen on 127.0.0.1 alone, with all its ports; ray.init must follow.

    Ray has a switch for laptops, by which a machine's address is its loopback address. It has read it from the
    environment when it was imported, so it is set here; joining a cluster that exists is not changed by it.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def start_head(port: int, dashboard_port: int) -> str:
    """Start a head on this machine that asks for the token, if there is none yet; returns the dashboard's URL.

    It listens on loopback alone: no other machine can join it.
    Jobs find relative paths of their config in the folder that this was called in.

    Raises:
        ValueError: It does not come up; with the end of its log.
    """
    url = f"http://127.0.0.1:{dashboard_port}"
    state = _state_path()
    if _head_pid() is not None:
        return str(json.loads(state.read_text())["url"])
    private_token()
    state.parent.mkdir(parents=True, exist_ok=True)
    binaries = Path(sys.executable).parent
    command = [str(binaries / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    with socket.create_server(("127.0.0.1", 0)) as free:  # another Ray of this machine may have the usual one
        command.append(f"--dashboard-agent-listen-port={free.getsockname()[1]}")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),  # a job's `python` is the first one in it
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on loopback alone; see `listen_on_loopback`
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "2",
        "OPPU_ROOT": str(Path.cwd()),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with open(state.with_suffix(".log"), "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    write_atomic(state, json.dumps({"pid": head.pid, "url": url}).encode())
    deadline = time.monotonic() + START_S
    while not _answers(url):
        if head.poll() is not None or time.monotonic() > deadline:
            stop_head()
            raise ValueError(f"the head did not start: {state.with_suffix('.log').read_text()[-2000:]}")
        time.sleep(0.2)
    return url


def stop_head() -> bool:
    """Stop the head that `start_head` started, and no other Ray of this machine; False if there is none."""
    pid = _head_pid()
    if pid is None:
        return False
    os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while _group_lives(pid):
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.1)
    _state_path().unlink(missing_ok=True)
    return True


def submit(stage: str, path: Path, overrides: Sequence[str], address: str | None, wait: bool) -> int:
    """Run a stage as a job of the cluster and follow its log; returns the stage's exit code, 3 if it was stopped.

    The checkout goes along as code, less what `.gitignore` and `.rayignore` name; run and data stay where they are, on
    a disk that all nodes see. A job of the same stage and config that is at work is followed, not started twice.

    Raises:
        ValueError: The config is wrong, this is no checkout, or there is no cluster at the address.
        ClusterLost: The cluster went away while the job was at work.
    """
    typed = load_config(path, tuple(overrides))
    config = located(typed)
    if not Path("jobs", f"{stage}.py").is_file():
        raise ValueError(f"{Path.cwd()} has no jobs/{stage}.py: call this in the checkout, whose code the job runs")
    if token_path().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers over an argument
    server = os.environ.setdefault("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{DASHBOARD_PORT}")
    try:
        client = JobSubmissionClient()
        known = {job.submission_id: job.status for job in client.list_jobs()}
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ValueError(f"no cluster at {server}: {error}; try `make cluster`") from error
    digest = hashlib.sha256(json.dumps([stage, to_dict(config)], sort_keys=True).encode()).hexdigest()[:12]
    tries = (f"oppu-{stage}-{digest}-{number}" for number in itertools.count(1))
    job_id = next(name for name in tries if name not in known or not known[name].is_terminal())
    if job_id not in known:
        arguments = [str(path.resolve()), *overrides, *located_overrides(typed)]
        environment = {"OPPU_ROOT": os.environ.get("OPPU_ROOT") or str(Path.cwd())}
        _submit(
            client,
            entrypoint=f"python -m jobs.{stage} {shlex.join(arguments)}",
            submission_id=job_id,
            runtime_env={"working_dir": str(Path.cwd()), "env_vars": environment},
        )
    print(f"job {job_id}", flush=True)
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, job_id))
        info: Any = client.get_job_info(job_id)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ClusterLost(f"the cluster does not answer ({error})") from error
    if info.status == JobStatus.STOPPED:
        return 3
    return 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 4


def _submit(client: Any, **job: Any) -> None:
    """Submit, with patience: a head that has just started answers before it has an agent that could start a job."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ValueError(f"the cluster refuses the job: {error}") from error
            time.sleep(1.0)


async def _follow(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _state_path() -> Path:
    return oppu_home() / "cluster.json"


def _head_pid() -> int | None:
    """The process of our head, if it lives. Its number may have gone to another process: then it is not ours."""
    try:
        pid = int(json.loads(_state_path().read_text())["pid"])
        return pid if b"--head" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else None
    except (OSError, ValueError, KeyError):
        return None


def _group_lives(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)  # where it is our own child, as in tests
    except ChildProcessError:
        pass
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/gcs_healthz", timeout=2) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False
