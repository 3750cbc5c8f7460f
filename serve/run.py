"""`oppu serve CONFIG`: a Ray on this machine, the application on it, and how to reach it, until Ctrl-C or SIGTERM.

In: the run's YAML and overrides. Out: nothing; what users change is in the vault.
A reader might question that it starts a Ray of its own: to serve from a cluster there is `serve deploy
serve/config.yaml`, which leaves when it has deployed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve

from oppu_ray.config import ServeConfig, load_config, located
from oppu_ray.submit import listen_on_loopback, private_token
from serve.app import application


def run(path: Path, overrides: Sequence[str]) -> None:
    """Serve until a signal comes, then let what is under way end.

    Raises:
        ValueError: The config is wrong, the run has nothing to serve, or the port is taken.
    """
    stopped = threading.Event()
    config = located(load_config(path, list(overrides)))
    options, app = config.serve, application(config)
    _check_port(options)
    # Room for all replicas twice, since a new version's start before the old ones stop, and for the trainer.
    num_cpus = max(os.cpu_count() or 1, int(2 * options.max_replicas * options.cpus_per_replica) + 2)
    private_token()
    listen_on_loopback()
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which has its own
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": options.host, "port": options.port}, logging_config={"log_level": "WARNING"})
        serve.run(app, name="oppu")
        url = f"http://{options.host}:{options.port}"
        print(f"Serving {config.run_dir} at {url} (reference: {url}/docs); Ctrl-C ends it.")
        print(f"A token for a user:   oppu token create USER --vault {config.run_dir}")
        print(f"One for an operator:  oppu token create --role operator --vault {config.run_dir}", flush=True)
        stopped.wait()
        print("ending what is under way ...", flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()


def _check_port(options: ServeConfig) -> None:
    """Serve would try for ever."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            where = f"serve.host={options.host} serve.port={options.port}"
            raise ValueError(f"{where}: cannot listen there: {error.strerror}; give another serve.port") from error
