"""The Ray Serve application: an ingress, engine replicas chosen by the user's hash, a trainer (arrow engine -> HTTP).

In: `ServeArgs`, the run's YAML. Out: an application for `serve run`, `serve deploy` or `oppu serve`. This file and
`serve/run.py` are all of serving that knows Ray.
A reader might question consistent hashing in place of `@serve.multiplexed`: that takes the model from a header that any
client can send, evicts adapters in use, and cannot mix users in a batch. Here the session is the hash from the verified
token, and only steers which replica has the adapter resident.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `build_app`, and ignores one that is a string.

import asyncio
import logging
import os
import urllib.request
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import metrics as ray_metrics

from oppu_ray.config import Config, from_dict, load_config, located, to_dict
from oppu_ray.configs import find_config
from oppu_ray.telemetry import SERVING_METRICS
from oppu_ray.vault import open_vault
from serve.guard import RETRY_AFTER_S
from serve.messages import INTERNAL_ERROR, Ask, Event, Failed, Refresh

logger = logging.getLogger(__name__)
DRAIN_S = 10.0
"""What a replica has beyond the longest deadline to end what it does, when it is replaced."""


class ServeArgs(BaseModel):
    """What to serve.

    Args:
        config: The name of an installed config, or the run's YAML file; a relative path is taken from `$OPPU_ROOT`.
        overrides: `dotted.key=value`, as for `oppu`.
    """

    config: str
    overrides: list[str] = []


def build_app(args: ServeArgs) -> serve.Application:
    """The application for one run: its vault, its task base, its task.

    Raises:
        ValueError: The config is wrong, or the run has no task base yet.
    """
    path = find_config(args.config, Path(os.environ.get("OPPU_ROOT", "")))
    return application(located(load_config(path, args.overrides)))


def application(config: Config) -> serve.Application:
    """The application for a config whose paths are absolute. ValueError if the run has no task base yet."""
    if not (Path(config.run_dir) / "adapt" / "result.json").exists():
        raise ValueError(f"{config.run_dir}: there is nothing to serve yet; train it with `oppu run` first")
    options, values = config.serve, to_dict(config)
    scaling: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.max_replicas > options.min_replicas:
        autoscaling = AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.max_rows / 2,
        )
        scaling = {"autoscaling_config": autoscaling}
    router: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    # A replica that is replaced ends what it does. Where there may be two, its successor is ready before it stops.
    common = {
        "graceful_shutdown_timeout_s": options.deadline_s + DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
    }
    engine = _deployment(
        Engine,
        **scaling,
        **common,
        max_surge_percent=100,
        max_ongoing_requests=2 * options.max_rows,
        max_queued_requests=options.max_queued,
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"num_fallback_replicas": 1}
        ),
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
    ).bind(values)
    trainer = _deployment(
        Trainer, **common, max_ongoing_requests=100, ray_actor_options={"num_gpus": options.gpus_per_replica}
    ).bind(values)
    return _deployment(
        serve.ingress()(Ingress),
        **common,
        max_surge_percent=100,
        max_ongoing_requests=500,
        max_queued_requests=500,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0},
    ).bind(values, engine, trainer)


def _close_grpc_port() -> None:
    """Keep a port of this replica on loopback; call it in the replica's constructor, after which Serve opens the port.

    Every replica of Ray Serve 2.60 listens on all interfaces for gRPC calls of other deployments, whose arguments it
    unpickles. There is no setting for its address. Unless gRPC is switched on, Serve calls replicas by Ray instead.
    """
    from ray.serve._private import constants, replica

    if not constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, _address: add_port(server, "127.0.0.1:0")


def _deployment(cls: Any, **options: Any) -> Any:
    return serve.deployment(**options)(cls)


class Engine:
    """`serve.replica.Replica` behind Serve."""

    def __init__(self, values: dict[str, Any]):
        from serve.replica import Replica, build_engine

        _close_grpc_port()
        config = from_dict(values)
        name = serve.get_replica_context().replica_id.unique_id
        base, engine = build_engine(config)
        self.replica = Replica(config, base, open_vault(config), engine, name, Meters(name))

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """See `Replica.ask`."""
        async for event in self.replica.ask(ask):
            yield event

    def check_health(self) -> None:
        """Raises where Serve should replace this replica."""
        self.replica.loop.check()


class Trainer:
    """`serve.trainer.Trainer` behind Serve; one replica, for it knows who is being trained."""

    def __init__(self, values: dict[str, Any]):
        from oppu_ray.refresh import open_task_base
        from serve import trainer

        _close_grpc_port()
        config = from_dict(values)
        self.trainer = trainer.Trainer(config, open_vault(config), lambda: open_task_base(config))

    def start(self, user_hash: str) -> Refresh:
        """See `Trainer.start`."""
        return self.trainer.start(user_hash)

    def status(self, user_hash: str) -> Refresh:
        """See `Trainer.status`."""
        return self.trainer.status(user_hash)


class Ingress:
    """`serve.web` behind Serve."""

    def __init__(self, values: dict[str, Any], engine: DeploymentHandle, trainer: DeploymentHandle):
        _close_grpc_port()
        self._config = from_dict(values)
        self._backend = RayBackend(self._config, engine, trainer)

    def __serve_build_asgi_app__(self) -> Any:
        from serve.web import create_web

        meters = Meters(serve.get_replica_context().replica_id.unique_id)
        return create_web(
            self._backend,
            self._config,
            lambda route, status: meters("oppu_requests_total", 1, {"route": route, "status": str(status)}),
        )


class RayBackend:
    """`serve.messages.Backend` by Ray Serve's handles."""

    def __init__(self, config: Config, engine: DeploymentHandle, trainer: DeploymentHandle):
        self.vault = open_vault(config)
        self._engine, self._trainer = engine, trainer

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The events of the replica that the user's hash leads to, or of the next on the ring if that is full."""
        answer: Any = self._engine.options(stream=True, session_id=ask.user_hash).ask.remote(ask)
        try:
            async for event in answer:
                yield event
        except BackPressureError:
            yield Failed(503, "overloaded", "too many requests wait; try again")
        except RayTaskError as error:  # the replica lives, and would fail again; the error's text is a traceback
            logger.error("request %s: %s in the replica", ask.request_id, type(error.cause).__name__)
            yield INTERNAL_ERROR
        except (RayError, RayServeException):
            yield Failed(503, "replica_lost", "the replica that answered is gone; try again")
        finally:
            with suppress(RayError, RayServeException):  # it raises what the answer ended with
                answer.cancel()

    async def start_refresh(self, user_hash: str) -> Refresh:
        """See `Trainer.start`; "unknown" while the trainer is being replaced."""
        try:
            return await self._trainer.start.remote(user_hash)
        except (RayError, RayServeException):
            return Refresh("unknown")

    async def refresh_status(self, user_hash: str) -> Refresh:
        """See `Trainer.status`; "unknown" while the trainer is being replaced."""
        try:
            return await self._trainer.status.remote(user_hash)
        except (RayError, RayServeException):
            return Refresh("unknown")

    async def metrics(self) -> str:
        """Our own metrics of all processes, from the exporters of the cluster's nodes."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        pages = await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls))
        lines = [line for page in pages for line in page.splitlines() if "oppu_" in line]
        comments = dict.fromkeys(line for line in lines if line.startswith("#"))
        return "\n".join([*comments, *(line for line in lines if not line.startswith("#"))]) + "\n"


def _read(url: str) -> str:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()
    return ""  # a node that just went has no metrics


class Meters:
    """The metrics of `SERVING_METRICS` in one replica: `meters(name, value, further tags)`."""

    def __init__(self, replica: str):
        kinds = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge, "histogram": ray_metrics.Histogram}
        self._metrics: dict[str, Any] = {}
        for name, metric in SERVING_METRICS.items():
            more = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
            made = kinds[metric.kind](name, description=metric.description, tag_keys=metric.tags, **more)
            self._metrics[name] = made.set_default_tags({"replica": replica})

    def __call__(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        verb = {"counter": "inc", "gauge": "set", "histogram": "observe"}[SERVING_METRICS[name].kind]
        if value or verb != "inc":
            getattr(self._metrics[name], verb)(value, tags=dict(tags))
