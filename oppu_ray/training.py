"""Packs -> adapters: many users' steps in one forward pass, each user's update what it would be alone (D1-D3).

In: a base model and the work of one pack's users. Out: one `TrainResult` per user, yielded as the user's last step
is done.
The decision a reader would question: a pack's step is computed in passes of bounded size, because on a CPU a pass of
4,000 tokens already fills the matrix units and a bigger one only costs memory. Gradients gather in the bank, then one
Adam step moves every slot. Cost of the passes is linear in tokens, so nothing waits for the longest row.

Shapes: C completion tokens, K tokens that predict them, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oppu_ray.adapters import AdapterBank, BankLinear
from oppu_ray.config import TrainConfig
from oppu_ray.core import Example, StepsDone, TrainResult, UserWork
from oppu_ray.kernels import return_freed_memory, token_loss_gradient, token_losses
from oppu_ray.packing import Stream, build_stream, make_rows, plan_passes, virtual_tokens

HEAD_CHUNK = 256
Progress = Callable[[int, Sequence[str]], None]
Backward = Callable[
    [AdapterBank, Mapping[int, Sequence[Example]], TrainConfig, int], tuple[dict[int, float], dict[int, int]]
]
"""Adds each slot's gradient to the bank; see `backward_step`."""


@dataclass(frozen=True)
class UserState:
    """A user in the middle of training: their slot of every stack with Adam's moments, and what was counted."""

    tensors: dict[str, Tensor]
    losses: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True)
class PackState:
    """A pack between two steps, after `num_steps` of them: all that `train_pack` needs to go on to the same bits.

    `users` holds those still training; every other user of the pack has had their result.
    """

    num_steps: int
    users: dict[str, UserState]


class Ranks:
    """The processes that compute a step: here this one alone. `sharding.Group` is several."""

    def mine(self, number: int) -> bool:
        """Whether pass `number` of a step is computed here."""
        return True

    def losses(self, bank: AdapterBank, stream: Stream) -> Tensor:
        """`pass_losses`, in step with the others."""
        return pass_losses(bank, stream)


ALONE = Ranks()


def train_pack(
    model: nn.Module,
    pack: Sequence[UserWork],
    config: TrainConfig,
    progress: Progress | None = None,
    state: PackState | None = None,
    between_steps: Callable[[Callable[[], PackState]], None] | None = None,
    ranks: Ranks = ALONE,
    backward: Backward | None = None,
) -> Generator[TrainResult]:
    """Train every user of a pack from start to end.

    Args:
        model: A frozen Hugging Face causal LM; it is as before when the generator ends or is closed.
        pack: The users to train together.
        progress: Called after each step with the useful tokens (each shared prefix counted once) and the ids of the
            users who took it.
        state: Go on from here, with the same pack; users that had their result get no second one.
        between_steps: Called between two steps, when all results so far are yielded, with a function that takes the
            state; it may raise to stop.
        ranks: Who computes the passes.
        backward: In the place of `backward_step`, where ranks do not share a step.

    Yields:
        One result per user. A user whose loss or gradient is not finite gets an error instead of an adapter; the
        others are untouched by it.
    """
    with attached(model, pack, config) as bank:
        for event in train_steps(bank, pack, config, state, between_steps, ranks, backward):
            if isinstance(event, TrainResult):
                yield event
            elif progress:
                progress(*event)


@contextmanager
def attached(model: nn.Module, pack: Sequence[UserWork], config: TrainConfig) -> Iterator[AdapterBank]:
    """A bank with a slot for each user on a model in the mode of training; the model is as before afterwards."""
    bank = AdapterBank(model, len(pack), [user.peft for user in pack], trainable=True)
    was_training = model.training
    try:
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        # Nothing else: a base's own dropout would draw from one source of chance for all users.
        for module in model.modules():
            module.training = isinstance(module, BankLinear) or bool(getattr(module, "gradient_checkpointing", False))
        yield bank
    finally:
        bank.remove()
        if config.gradient_checkpointing:
            model.activation_checkpointing_disable()  # type: ignore[operator]
        model.train(was_training)
        return_freed_memory()


def train_steps(
    bank: AdapterBank,
    pack: Sequence[UserWork],
    config: TrainConfig,
    state: PackState | None = None,
    between_steps: Callable[[Callable[[], PackState]], None] | None = None,
    ranks: Ranks = ALONE,
    backward: Backward | None = None,
) -> Generator[TrainResult | StepsDone]:
    """Train a pack in a bank of its own (`attached`), and say after each step who took it; else as `train_pack`."""
    users = {slot: user for slot, user in enumerate(pack) if state is None or user.user_id in state.users}
    losses: dict[int, list[float]] = {slot: [] for slot in users}
    tokens = dict.fromkeys(users, 0)
    for slot, user in list(users.items()):
        if not user.steps:
            yield TrainResult(users.pop(slot).user_id, None, error="there is nothing to train on")
            continue
        bank.start(slot, user.peft, user.seed)
        if state is not None:
            before = state.users[user.user_id]
            losses[slot], tokens[slot] = list(before.losses), before.num_tokens
            _restore(bank, slot, before)
    for step in itertools.count(state.num_steps if state is not None else 0):
        if not users:
            return
        examples = {slot: user.steps[step] for slot, user in users.items()}
        if backward:
            step_losses, step_tokens = backward(bank, examples, config, step)
        else:
            step_losses, step_tokens = backward_step(bank, examples, config, step, ranks)
        rates = {slot: learning_rate(config, step, len(user.steps)) for slot, user in users.items()}
        norms = bank.adam_step(rates, step + 1, config.clip_norm, config.weight_decay)
        bank.zero_grad()
        for slot, user in list(users.items()):
            losses[slot].append(step_losses[slot])
            tokens[slot] += step_tokens[slot]
            broken = not (math.isfinite(step_losses[slot]) and math.isfinite(norms[slot]))
            if broken or step + 1 == len(user.steps):
                del users[slot]
                error = f"step {step + 1}: loss {step_losses[slot]}, gradient norm {norms[slot]}" if broken else None
                adapter = None if broken else bank.export(slot)
                yield TrainResult(user.user_id, adapter, tuple(losses[slot]), error, tokens[slot])
        yield StepsDone(sum(step_tokens.values()), [pack[slot].user_id for slot in examples])
        if between_steps and users:
            between_steps(
                lambda done=step + 1: PackState(
                    done,
                    {  # type: ignore[misc]
                        user.user_id: _take(bank, slot, losses[slot], tokens[slot]) for slot, user in users.items()
                    },
                )
            )


def _take(bank: AdapterBank, slot: int, losses: Sequence[float], num_tokens: int) -> UserState:
    tensors = {
        f"{name}.{part}": getattr(stack, part)[slot].cpu().clone()
        for name, stack in bank.stacks().items()
        for part in ("value", "mean", "square")
    }
    return UserState(tensors, tuple(losses), num_tokens)


def _restore(bank: AdapterBank, slot: int, state: UserState) -> None:
    for name, stack in bank.stacks().items():
        for part in ("value", "mean", "square"):
            getattr(stack, part)[slot] = state.tensors[f"{name}.{part}"].to(stack.value.device)
        stack.compute[slot] = stack.value[slot].to(bank.dtype)


def backward_step(
    bank: AdapterBank,
    examples: Mapping[int, Sequence[Example]],
    config: TrainConfig,
    step: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[dict[int, float], dict[int, int]]:
    """Add each slot's gradient of its mean completion-token loss to the bank.

    Returns:
        Slot -> mean loss per completion token in nats, and slot -> tokens computed. Where ranks share a step's passes,
        gradient and loss are this rank's part of the sum, the tokens are all ranks'.
    """
    rows = [
        row
        for slot, own in examples.items()
        for row in make_rows(
            slot, own, config.max_tokens_per_pass, config.share_prefix, virtual_tokens(bank.peft[slot])
        )
    ]
    losses = torch.zeros(bank.num_slots, device=bank.device)
    tokens = dict.fromkeys(examples, 0)
    passes = []
    for part in plan_passes(rows, config.max_tokens_per_pass):
        passes.append((sum(row.num_tokens for row in part), part, dict(tokens)))
        for row in part:
            tokens[row.slot] += row.num_tokens
    passes.sort(key=lambda one: -one[0])  # largest first: what it frees has room for all that follow
    for number, (_, part, tokens_before) in enumerate(passes):
        if ranks.mine(number):
            stream = build_stream(part, bank.device)
            bank.use(stream.ranges, step, tokens_before)
            nll_C = ranks.losses(bank, stream)
            nll_C.sum().backward()
            losses.index_add_(0, stream.slot_C, nll_C.detach())
    return {slot: losses[slot].item() for slot in examples}, tokens


def pass_losses(
    bank: AdapterBank, stream: Stream, whole: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """Weighted loss of each completion token of one pass, [C], with the slots given to `bank.use`.

    `whole` opens a context in which a module's weights can be read, which only its own forward could otherwise.
    """
    hidden_KD = bank.hidden_states(stream.input_ids_T, stream.position_ids_T, stream.plan, stream.virtual)
    with whole(bank.model.get_output_embeddings()):  # type: ignore[operator]
        return _HeadLoss.apply(hidden_KD, bank.model, stream)


class _HeadLoss(torch.autograd.Function):
    """Weighted losses of the completion tokens; the gradient is made chunk by chunk in the forward pass.

    The LM head is a fifth of a small model's arithmetic: it runs only where a completion is predicted, and no logits
    outlive their chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, model: nn.Module, stream: Stream) -> Tensor:
        head, softcap = model.get_output_embeddings(), logit_softcap(model)  # type: ignore[operator]
        losses, grads = [], []
        for start in range(0, len(stream.predict_C), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            targets, weights = stream.targets_C[part], stream.weights_C[part]
            logits_CV = linear(hidden_KD[stream.predict_C[part]], head.weight, head.bias)
            losses.append(token_losses(logits_CV, targets, softcap) * weights)
            grads.append(token_loss_gradient(logits_CV, targets, weights, softcap) @ head.weight)
        ctx.save_for_backward(torch.cat(grads), stream.predict_C)
        ctx.num_wanted = hidden_KD.shape[0]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_CD, predict_C = ctx.saved_tensors
        grad_KD = torch.zeros(ctx.num_wanted, grad_CD.shape[1], device=grad_CD.device)
        grad_KD.index_add_(0, predict_C, grad_CD.float() * grads[0][:, None])
        return grad_KD.to(grad_CD.dtype), None, None


def logit_softcap(model: nn.Module) -> float:
    """Gemma 2's cap on the final logits, 0.0 for none."""
    return float(getattr(model.config, "final_logit_softcapping", None) or 0.0)  # type: ignore[union-attr]


def head_logits(model: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Logits [N, V] of last hidden states."""
    logits_NV = model.get_output_embeddings()(hidden_ND)  # type: ignore[operator]
    softcap = logit_softcap(model)
    return torch.tanh(logits_NV / softcap) * softcap if softcap else logits_NV


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) out of a user's own `num_steps`: linear warm-up, then the schedule's decay."""
    warmup = math.ceil(config.warmup_share * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * (1 - share)
