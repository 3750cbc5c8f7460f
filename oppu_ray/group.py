"""The Ray Train group: ranks that hold a share of the base each (ZeRO-3), or train the task adapter together.

In: a config and shards of units, one shard a rank. Out: what their users come to, each user once, or the task adapter.
`sharding.py` says how ranks compute together, this file how they are started, and started again when one is lost.
The decision a reader would question: ranks report no checkpoints to Ray Train. Its `report` is a barrier, and of a rank
killed just after it the checkpoint was lost when we tried. The vault is what remembers: a group that starts again skips
the users it had committed, and what it then says twice is said once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from torch import distributed

from oppu_ray.base_model import Base
from oppu_ray.config import Config, from_dict, to_dict
from oppu_ray.core import TrainResult, UserDone
from oppu_ray.machine import compute_dtype
from oppu_ray.pool import connect, thread_environment
from oppu_ray.progress import ClusterLost, Interrupted, Progress
from oppu_ray.sharding import Group, read_settings, train_together
from oppu_ray.telemetry import Telemetry
from oppu_ray.training import attached
from oppu_ray.workers import TASK_ADAPTER, Worker, open_base, task_work

MAX_RESTARTS = 3
_POLL_S = 0.5
_STARTED = "started"


def train_shards(
    config: Config,
    task_base: Path,
    run_id: str,
    shards: Sequence[Sequence[tuple[Any, ...]]],
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[UserDone]:
    """Run `Worker.train(*unit)` for every unit, each rank those of its shard, on a base sharded over the ranks.

    Raises:
        ValueError: The config does not fit a group.
        ClusterLost: The group failed `MAX_RESTARTS` times and once more. What is committed stays so.
        Interrupted: `should_stop` said yes.
    """
    telemetry = _start(config, run_id)
    packs = [(rank, set(unit[0])) for rank, shard in enumerate(shards) for unit in shard]
    pack_of = {user_id: pack for pack in packs for user_id in pack[1]}
    num_left = len(pack_of)
    job = {"task_base": str(task_base), "run_id": run_id, "shards": shards}
    for done in _said_once(run_group(config, _train, job, progress, telemetry, should_stop)):
        rank, waiting = pack_of[done.user_id]
        yield done
        waiting.remove(done.user_id)
        num_left -= 1
        telemetry.settle(done, num_left, rank)
        if not waiting:
            progress.pack_done()
            telemetry.add("oppu_packs_done_total", worker=rank)


def _said_once(results: Iterator[UserDone]) -> Iterator[UserDone]:
    """Each user once, however often the group starts; what its next start may make good, when it has ended."""
    said, unsaid = set[str](), dict[str, UserDone]()
    for done in results:
        if done.is_retryable:
            unsaid[done.user_id] = done
        elif done.user_id not in said:
            said.add(done.user_id)
            yield done
    yield from (done for user_id, done in unsaid.items() if user_id not in said)


def adapt(config: Config, progress: Progress) -> TrainResult:
    """Train the task adapter (`workers.task_work`), every rank a share of each step.

    A group that is started again begins anew. Raises as `train_shards`.
    """
    trained = TrainResult(TASK_ADAPTER, None)
    for message in run_group(config, _adapt, {}, progress, _start(config, TASK_ADAPTER)):
        if isinstance(message, TrainResult):
            trained = message
            continue
        step, num_tokens = message
        if step > progress.num_done:  # a group that begins anew takes its first steps again
            progress.advance(1, num_tokens)
    if trained.adapter is None:
        return trained
    tensors = {name: tensor.copy() for name, tensor in trained.adapter.tensors.items()}  # Ray's own are read-only
    return replace(trained, adapter=replace(trained.adapter, tensors=tensors))


def _start(config: Config, run_id: str) -> Telemetry:
    """Read the DeepSpeed file, so that a bad one is named here, and connect to Ray."""
    read_settings(config.base)
    connect()
    return Telemetry(run_id)


def run_group(
    config: Config,
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    progress: Progress,
    telemetry: Telemetry,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """Run `loop(job)` on every rank and yield what the ranks put into `job["results"]`, as it comes."""
    results = Queue(actor_options={"num_cpus": 0})
    job = {**job, "config": to_dict(config), "settings": read_settings(config.base), "results": results}
    # In a process of its own: when this generator is closed, it can be ended, and the group with it.
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(loop, job, MAX_RESTARTS)
    num_starts = 0
    try:
        while True:
            is_over = bool(ray.wait([fit], timeout=0)[0])
            message = _next(results)
            progress.tick()
            if should_stop():
                raise Interrupted("stopped; the group has ended")
            if message == _STARTED:
                num_starts += 1
                progress.forecast.begin()
                if num_starts > 1:
                    progress.recovered("a rank was lost or silent; the group has started again")
                    telemetry.add("oppu_recoveries_total")
            elif message is not None:
                yield message
            elif is_over:
                break
        if error := ray.get(fit):
            raise ClusterLost(f"the group failed {MAX_RESTARTS + 1} times, last {error}")
    except RayError as error:
        raise ClusterLost(f"the group is lost: {' '.join(str(error).split())[:500]}") from error
    finally:
        ray.cancel(fit, force=True)
        results.shutdown(force=True)


def _next(results: Queue) -> Any:
    try:
        return results.get(timeout=_POLL_S)
    except Empty:
        return None


def _fit(loop: Callable[[dict[str, Any]], None], job: dict[str, Any], max_restarts: int) -> str:
    """One Ray Train run; returns why it failed, or nothing."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # the config's relative paths mean in a rank what they mean here
    config = from_dict(job["config"])
    workers = config.workers
    use_gpu = workers.gpus_per_worker > 0
    gpus = {"GPU": workers.gpus_per_worker} if use_gpu else {}
    environment = {"DS_ACCELERATOR": "cuda" if use_gpu else "cpu", **thread_environment(workers)}
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees Ray Train's first version
            name="group",
            storage_path=str(Path(config.run_dir).expanduser().resolve()),
            failure_config=FailureConfig(max_failures=max_restarts),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        last_lines = {rank: str(failure).strip().rpartition("\n")[2] for rank, failure in error.worker_failures.items()}
        return "; ".join(f"rank {rank}: {line}" for rank, line in last_lines.items())
    return ""


def _join(job: dict[str, Any], path: Path | None, share_steps: bool) -> tuple[Config, Base, Group]:
    config = from_dict(job["config"])
    mapped, device = replace(config, base=replace(config.base, device="cpu")), ray.train.torch.get_device()
    base = open_base(mapped, path, _common_dtype(config.base.dtype, device))
    group = Group(base.model, job["settings"], device, config.workers.group_timeout_s, share_steps)
    if group.rank == 0:
        job["results"].put(_STARTED)
    return config, base, group


def _common_dtype(dtype: str, device: torch.device) -> str:
    """What all ranks compute in: one that has no products of the base's type makes it float32 for all."""
    mine = torch.tensor([compute_dtype(dtype, device.type) != dtype], dtype=torch.int32, device=device)
    distributed.all_reduce(mine, distributed.ReduceOp.MAX)
    return "float32" if mine.item() else dtype


def _train(job: dict[str, Any]) -> None:
    path = Path(job["task_base"])
    config, base, group = _join(job, path, share_steps=False)
    telemetry = Telemetry(job["run_id"], group.rank)
    worker = Worker(config, path, job["run_id"], telemetry, opened=base, ranks=group)
    for unit in job["shards"][group.rank]:
        for done in worker.train(*unit):
            job["results"].put(done)
    with attached(base.model, [], config.personal) as bank:
        group.keep_company(bank)


def _adapt(job: dict[str, Any]) -> None:
    config, base, group = _join(job, None, share_steps=True)
    steps = itertools.count(1)

    def progress(num_tokens: int, _: Sequence[str]) -> None:
        if group.rank == 0:
            job["results"].put((next(steps), num_tokens))

    result = train_together(base.model, task_work(config, base), config.adapt, group, progress)
    if group.rank == 0:
        job["results"].put(result)
