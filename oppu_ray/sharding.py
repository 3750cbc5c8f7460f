"""Ranks that train together: a base of which each holds a share, and one adapter that all of them train.

Stands beside `training`, which asks a `Group` what it may compute. In: a loaded base and DeepSpeed's own JSON. Out: the
same model, its weights gathered module by module for each pass (ZeRO-3), and gradients and Adam moments shared out
(ZeRO 1 and 2). This is the only file that imports DeepSpeed. CPU ranks talk by gloo, GPU ranks by nccl.
The decision a reader would question: ranks agree before each pass, by one all-reduce of a flag, that somebody still has
one, and those that have none make an empty pass. So ranks need neither as many users, nor steps, nor passes, and an
error between passes (a user's bad data, a NaN) leaves nobody waiting.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import BaseConfig, TrainConfig
from oppu_ray.core import Example, TrainResult, UserWork
from oppu_ray.packing import Row, Stream, build_stream
from oppu_ray.training import Progress, Ranks, attached, backward_step, learning_rate, pass_losses

_EMPTY_ROW = Row(slot=-1, examples=(Example((0, 0), 1),), num_prefix=0, weight=0.0)


def read_settings(config: BaseConfig) -> dict[str, Any]:
    """DeepSpeed's settings from the JSON file `base.deepspeed`.

    What a run's own config says wins: optimizer, batch and clipping (`adapt`); the precision is the base's.

    Raises:
        ValueError: The file is not JSON, or its ZeRO stage is none of 1, 2, 3, or not 3 for a sharded base.
    """
    path = Path(config.deepspeed).expanduser()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"base.deepspeed: {path} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"base.deepspeed: {path} has no zero_optimization.stage; expected 1, 2 or 3") from error
    if stage not in (1, 2, 3) or (config.sharding == "zero3" and stage != 3):
        expected = "3 for base.sharding zero3" if config.sharding == "zero3" else "1, 2 or 3"
        raise ValueError(f"base.deepspeed: {path} has zero_optimization.stage {stage!r}; expected {expected}")
    for name in ("optimizer", "scheduler", "fp16", "bf16", "train_batch_size"):
        settings.pop(name, None)
    return {**settings, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Group(Ranks):
    """This process among the ranks of torch's default process group, which is there already.

    Args:
        model: A frozen base in CPU memory, whole. With ZeRO-3 every rank keeps its share only, on `device`.
        settings: From `read_settings`.
        device: Where this rank computes.
        timeout_s: After how long a silent rank is an error in the others.
        share_steps: Whether the passes of a step are dealt out over the ranks, or every rank has steps of its own.
    """

    def __init__(
        self, model: nn.Module, settings: dict[str, Any], device: torch.device, timeout_s: float, share_steps: bool
    ):
        self.rank, self.num_ranks = distributed.get_rank(), distributed.get_world_size()
        self.settings = {**settings, "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16}}
        self.device, self.share_steps = device, share_steps
        self.root: _Root | None = None
        _start_deepspeed()
        if settings["zero_optimization"]["stage"] == 3:
            self.root = _shard(model, self.settings, device)
        else:
            model.to(device)
        _set_timeout(timeout_s)

    def mine(self, number: int) -> bool:
        return not self.share_steps or number % self.num_ranks == self.rank

    def losses(self, bank: AdapterBank, stream: Stream) -> Tensor:
        if self.root is None:
            return pass_losses(bank, stream)
        self._anyone(True)
        return self.root(bank, stream)

    def keep_company(self, bank: AdapterBank) -> None:
        """Make empty passes until no rank has one left: of its users, or of the step that ranks share."""
        if self.root is None:
            return
        stream = build_stream([_EMPTY_ROW], bank.device)
        bank.use([])
        while self._anyone(False):
            self.root(bank, stream).sum().backward()

    def _anyone(self, busy: bool) -> bool:
        flag = torch.tensor([busy], dtype=torch.int32, device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag.item())


class _Root(nn.Module):
    """The model as DeepSpeed sees it: one call is one pass, so that it learns in which order weights are needed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, bank: AdapterBank, stream: Stream) -> Tensor:
        return pass_losses(bank, stream, _whole)


def _whole(module: nn.Module) -> AbstractContextManager[Any]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(module.parameters())


def _shard(model: nn.Module, settings: dict[str, Any], device: torch.device) -> _Root:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else rank 0's bytes would be written into our map of the file
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if layers := getattr(model.base_model, "layers", None):
        # A decoder layer is gathered as one: its forward may read its linears' weights itself (`layers.py`).
        set_z3_leaf_modules(model, [type(layers[0])])
    root = _Root(model)
    deepspeed.initialize(model=root, config=settings)  # no optimizer: weights are only gathered and let go of
    # Every module's output then needs a gradient, whatever this rank trains: a backward gathers the same on all ranks.
    model.enable_input_require_grads()  # type: ignore[operator]
    return root


def _start_deepspeed() -> None:
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled here; gloo does its work
    deepspeed.init_distributed(distributed.get_backend(), verbose=False)


def _set_timeout(timeout_s: float) -> None:
    """For torch's group and DeepSpeed's own copy of it. They start with half an hour, since bases load at leisure."""
    from deepspeed.utils import groups

    for group in (distributed.group.WORLD, groups._get_data_parallel_group()):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def train_together(
    model: nn.Module, work: UserWork, config: TrainConfig, group: Group, progress: Progress | None = None
) -> TrainResult:
    """Train one adapter, each rank computing its share of every step's passes.

    The result is that of `train_pack` in one process, up to the order in which float32 gradients are summed.

    Args:
        model: As given to `group`.
        work: The same on every rank.
        progress: Called after each step with the useful tokens of all ranks and the work's user id.
    """
    with attached(model, [work], config) as bank:
        bank.start(0, work.peft, work.seed)
        optimizer = _SharedAdam(bank, config, group)
        losses: list[float] = []
        num_tokens = 0
        for step, examples in enumerate(work.steps):
            step_losses, step_tokens = backward_step(bank, {0: examples}, config, step, group)
            group.keep_company(bank)
            loss = torch.tensor(step_losses[0], device=group.device)
            distributed.all_reduce(loss)
            norm = optimizer.step(learning_rate(config, step, len(work.steps)))
            losses.append(loss.item())
            num_tokens += step_tokens[0]
            if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
                error = f"step {step + 1}: loss {losses[-1]}, gradient norm {norm}"
                return TrainResult(work.user_id, None, tuple(losses), error, num_tokens)
            if progress:
                progress(step_tokens[0], [work.user_id])
        return TrainResult(work.user_id, bank.export(0), tuple(losses), None, num_tokens)


class _SharedAdam:
    """The bank's AdamW step by DeepSpeed: gradients summed over ranks, moments shared out as the ZeRO stage says.

    The bank has made its gradients already, so DeepSpeed is given a loss that has just these: the sum of value times
    gradient. ZeRO-3 is about the base; the adapter's own part in it is that of ZeRO-2.
    """

    def __init__(self, bank: AdapterBank, config: TrainConfig, group: Group):
        import deepspeed

        self.stacks, self.num_ranks = list(bank.stacks().values()), group.num_ranks
        self.bank = bank
        values = nn.ParameterList(nn.Parameter(stack.value.clone()) for stack in self.stacks)
        zero = group.settings["zero_optimization"]
        settings = {
            **group.settings,
            "bf16": {"enabled": False},  # the bank keeps adapters in float32
            "zero_optimization": {**zero, "stage": min(zero["stage"], 2)},
            "gradient_clipping": config.clip_norm,
        }
        self.engine, *_ = deepspeed.initialize(
            model=_Products(values),
            optimizer=torch.optim.AdamW(values, weight_decay=config.weight_decay),
            config=settings,
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Move the bank's values and clear its gradients; returns the norm of the summed gradient before clipping."""
        with torch.enable_grad():
            loss = self.engine([stack.grad for stack in self.stacks])
            self.engine.backward(loss * self.num_ranks)  # DeepSpeed takes the mean over ranks
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self.engine.step()
        for stack, value in zip(self.stacks, self.engine.module.values, strict=True):
            stack.value.copy_(value)
            stack.compute.copy_(value)
        self.bank.zero_grad()
        return float(self.engine.get_global_grad_norm())


class _Products(nn.Module):
    def __init__(self, values: nn.ParameterList):
        super().__init__()
        self.values = values

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(value * grad).sum() for value, grad in zip(self.values, grads, strict=True)]).sum()
