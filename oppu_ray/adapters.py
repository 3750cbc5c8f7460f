"""The bank: every user's adapter in one stack of slots over one frozen base (design decision D2).

In: a Hugging Face model whose target linears are wrapped once, and per slot an adapter (LoRA of any rank up to the
bank's, IA3, or prompt tuning; mixed freely). Out: each token of a stream computed with its own slot's adapter, the
gradients of all slots, one Adam step for all of them, and adapters in PEFT's own names.
The decision a reader would question: a slot's product runs over that slot's tokens alone, never as one masked product
over all slots. That keeps one user's NaN out of another user's adapter. Passes that answer compute each token alone, so
that no bit depends on other rows; in training, bits depend on the shapes of the pack.

Shapes: T tokens, B rows of one token each, S slots, R rank of the bank, I and O widths of a linear, D hidden, P virtual
tokens, K tokens whose last hidden states are wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oppu_ray.attention import NAME, SegmentPlan
from oppu_ray.config import PeftConfig
from oppu_ray.core import AdapterState
from oppu_ray.decoding import add_lora_rows
from oppu_ray.kv_cache import DecodePlan

DEFAULT_TARGETS = {"lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "down_proj"), "prompt": ()}
IA3_INPUT_TARGETS = ("down_proj",)
PREFIX = "base_model.model."
NUM_LAYOUTS = 64  # shapes of adapters whose places are kept: a bank sees few

Ranges = Sequence[tuple[int, int, int]]
Masks = Sequence[Tensor] | None


class Stack:
    """One stacked parameter [S, ...] in float32, with its gradient, Adam moments and a copy in the compute type."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, trainable: bool):
        def zeros() -> Tensor:
            return torch.zeros(shape, device=device)

        self.value = zeros()
        self.compute = self.value.to(dtype)
        self.grad: Tensor | None = zeros() if trainable else None
        self.mean: Tensor | None = zeros() if trainable else None
        self.square: Tensor | None = zeros() if trainable else None

    def clear(self, slot: int) -> None:
        """Zero one slot, its Adam state included."""
        for state in (self.value, self.compute, self.grad, self.mean, self.square):
            if state is not None:
                state[slot] = 0

    def write(self, slot: int, value: Tensor) -> None:
        """Write a cleared slot; a smaller value (a lower rank) leaves zeros around it."""
        self.value[slot][tuple(slice(n) for n in value.shape)] = value.to(self.value)
        self.compute[slot] = self.value[slot]


class BankLinear(nn.Module):
    """A frozen linear plus the slots' LoRA products and IA3 scales."""

    def __init__(self, base: nn.Module, bank: AdapterBank, name: str):
        super().__init__()
        self.base = base
        self.bank = [bank]  # in a list, so that the bank isn't registered as a submodule
        self.name = name
        self.a: Stack | None = None
        self.b: Stack | None = None
        self.scale: Stack | None = None
        self.target = name.rsplit(".", 1)[-1]
        self.scales_input = self.target in IA3_INPUT_TARGETS

    @property
    def in_features(self) -> int:
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.out_features  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank[0]
        if bank.tokens is not None:
            return self._answer(x[0], bank.tokens)[None]
        lora, scales = self.active()
        if scales and self.scales_input:
            x = _Scale.apply(x, bank.anchor, self.scale, scales)
        y = self.base(x)
        if lora:
            masks = bank.dropout_masks(x, self.name, lora) if self.training else None
            y = _LoRA.apply(y, x, bank.anchor, self, lora, masks)
        if scales and not self.scales_input:
            y = _Scale.apply(y, bank.anchor, self.scale, scales)
        return y

    def active(self) -> tuple[Ranges, Ranges]:
        """The ranges in use whose slot has a LoRA for this linear, and those whose slot has IA3 scales."""
        bank = self.bank[0]
        lora = bank.active("lora", self.target) if self.a is not None else ()
        return lora, bank.active("ia3", self.target) if self.scale is not None else ()

    def _answer(self, x_TI: Tensor, tokens: TokenSlots) -> Tensor:
        """Each token by itself."""
        if self.scale is not None and self.scales_input:
            x_TI = tokens.scaled(x_TI, self.scale, self.target)
        y_TO = self.base(x_TI)
        if self.scale is not None and not self.scales_input:
            y_TO = tokens.scaled(y_TO, self.scale, self.target)
        if self.a is None or self.b is None or (scaling_T := tokens.scaling("lora", self.target)) is None:
            return y_TO
        return add_lora_rows(x_TI, y_TO, (tokens.slot_T, scaling_T, self.a.compute, self.b.compute))

    def add_lora(self, y_TO: Tensor, x_TI: Tensor, ranges: Ranges, masks: Masks) -> None:
        """y += scaling * (x A^T) B^T for each slot's tokens, in place."""
        a, b, scaling_S = self.a, self.b, self.bank[0].scaling_S
        assert a is not None and b is not None
        uniform = _uniform(ranges, x_TI.shape[0]) if masks is None else None
        if uniform is not None:
            slots, num = uniform
            low = x_TI.view(len(ranges), num, -1) @ a.compute[slots].transpose(1, 2)
            low *= _column(scaling_S, ranges, low)
            y_TO.view(len(ranges), num, -1).baddbmm_(low, b.compute[slots].transpose(1, 2))
            return
        for index, (slot, start, stop) in enumerate(ranges):
            x_s = x_TI[start:stop] if masks is None else x_TI[start:stop] * masks[index]
            y_TO[start:stop].addmm_(x_s @ a.compute[slot].T, b.compute[slot].T, alpha=scaling_S[slot])

    def add_lora_gradient(self, grad_x_TI: Tensor, grad_TO: Tensor, x_TI: Tensor, ranges: Ranges, masks: Masks) -> None:
        """Add the gradients of `add_lora`: of A and B to their stacks, of x to `grad_x_TI`, in place."""
        a, b, scaling_S = self.a, self.b, self.bank[0].scaling_S
        assert a is not None and b is not None and a.grad is not None and b.grad is not None
        for index, (slot, start, stop) in enumerate(ranges):
            mask = None if masks is None else masks[index]
            x_s, grad_s = x_TI[start:stop], grad_TO[start:stop]
            if mask is not None:
                x_s = x_s * mask
            low, low_grad = x_s @ a.compute[slot].T, grad_s @ b.compute[slot]
            b.grad[slot].add_((low.T @ grad_s).T, alpha=scaling_S[slot])  # a quarter of the time of grad^T low
            a.grad[slot].add_(low_grad.T @ x_s, alpha=scaling_S[slot])
            if mask is None:
                grad_x_TI[start:stop].addmm_(low_grad, a.compute[slot], alpha=scaling_S[slot])
            else:
                grad_x_TI[start:stop] += (low_grad @ a.compute[slot]).mul_(scaling_S[slot]) * mask


class TokenSlots:
    """The slots of a pass that answers, token by token; -1 is the base alone.

    Args:
        slots: Of each row.
        nums: Tokens of each row; None for one.
    """

    def __init__(self, bank: AdapterBank, slots: Sequence[int], nums: Sequence[int] | None = None):
        self._pefts = [bank.peft[slot] if slot >= 0 else None for slot in slots]
        self._scalings = [bank.scaling_S[slot] for slot in slots]
        self._nums_B = None if nums is None else torch.tensor(nums, device=bank.device)
        self.slot_T = self._by_token(torch.tensor([max(slot, 0) for slot in slots], device=bank.device))
        self._found: dict[tuple[str, str], Tensor | None] = {}

    def _by_token(self, value_B: Tensor) -> Tensor:
        return value_B if self._nums_B is None else value_B.repeat_interleave(self._nums_B)

    def scaling(self, kind: str, target: str) -> Tensor | None:
        """[T] float32: LoRA's scaling (1 for IA3) where a token's adapter is of `kind` and targets `target`, else 0.

        None if there is no such token.
        """
        if (kind, target) not in self._found:
            has = [peft is not None and peft.kind == kind and target in targets(peft) for peft in self._pefts]
            own = self._scalings if kind == "lora" else [1.0] * len(has)
            scalings = [scaling if mine else 0.0 for scaling, mine in zip(own, has, strict=True)]
            found = self._by_token(torch.tensor(scalings, device=self.slot_T.device)) if any(has) else None
            self._found[kind, target] = found
        return self._found[kind, target]

    def scaled(self, x_TD: Tensor, scale: Stack, target: str) -> Tensor:
        """Each token with IA3 scales for `target` times its slot's."""
        scaling_T = self.scaling("ia3", target)
        if scaling_T is None:
            return x_TD
        return torch.where(scaling_T[:, None] != 0, x_TD * scale.compute[self.slot_T], x_TD)


class _LoRA(torch.autograd.Function):
    """`BankLinear.add_lora`; the adapters' gradients go straight into the stacks."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, linear: BankLinear, ranges: Ranges, masks: Masks
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        linear.add_lora(y.view(-1, y.shape[-1]), x_TI, ranges, masks)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x_TI)
        ctx.parts = linear, ranges, masks
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI,) = ctx.saved_tensors
        linear, ranges, masks = ctx.parts
        grad_x = torch.zeros_like(x_TI)
        linear.add_lora_gradient(grad_x, grads[0].reshape(-1, grads[0].shape[-1]), x_TI, ranges, masks)
        return grads[0], grad_x.view(*grads[0].shape[:-1], -1), None, None, None, None


class _Scale(torch.autograd.Function):
    """x * scale for each slot's tokens (IA3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, scale: Stack, ranges: Ranges) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parts = scale, ranges
        return scaled(x, scale, ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return scaled_gradient(grads[0], x, *ctx.parts), None, None, None


def scaled(x: Tensor, scale: Stack, ranges: Ranges) -> Tensor:
    """A copy of x [..., D] with each slot's tokens times the slot's scale."""
    y = x.clone()
    y_TD = y.view(-1, y.shape[-1])
    for slot, start, stop in ranges:
        y_TD[start:stop] *= scale.compute[slot]
    return y


def scaled_gradient(grad: Tensor, x: Tensor, scale: Stack, ranges: Ranges) -> Tensor:
    """The gradient of `scaled` with respect to x; that of the scales is added to the stack."""
    assert scale.grad is not None
    grad_x = grad.clone()
    x_TD, grad_TD = x.reshape(-1, x.shape[-1]), grad_x.view(-1, x.shape[-1])
    for slot, start, stop in ranges:
        scale.grad[slot].add_((grad_TD[start:stop].float() * x_TD[start:stop].float()).sum(0))
        grad_TD[start:stop] *= scale.compute[slot]
    return grad_x


class _Virtual(torch.autograd.Function):
    """Write each slot's prompt-tuning vectors over its rows' virtual positions."""

    @staticmethod
    def forward(ctx: Any, embeds_TD: Tensor, anchor: Tensor, prompts: Stack, virtual: Ranges) -> Tensor:
        embeds_TD = embeds_TD.clone()
        for slot, start, stop in virtual:
            embeds_TD[start:stop] = prompts.compute[slot, : stop - start]
        ctx.parts = prompts, virtual
        return embeds_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        prompts, virtual = ctx.parts
        for slot, start, stop in virtual:
            prompts.grad[slot, : stop - start] += grads[0][start:stop]
        return grads[0], None, None, None


def _uniform(ranges: Ranges, num_tokens: int) -> tuple[slice | list[int], int] | None:
    """(slots, tokens each) where every slot has as many tokens and together they are the stream, else None."""
    num = ranges[0][2] - ranges[0][1]
    if len(ranges) < 2 or num * len(ranges) != num_tokens or any(stop - start != num for _, start, stop in ranges):
        return None
    slots = [slot for slot, _, _ in ranges]
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots)), num
    return slots, num


def _column(scaling_S: list[float], ranges: Ranges, like: Tensor) -> Tensor:
    return torch.tensor([scaling_S[slot] for slot, _, _ in ranges], dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter checked against a bank and laid out as one of its slots: all that is left is to copy it in."""

    peft: PeftConfig
    memory_N: Tensor


@dataclass(frozen=True)
class Place:
    """Where a bank has one tensor of an adapter.

    Args:
        shape: On disk.
        start, room: Its part of a slot's memory; B lies there as [R, O]. A lower rank leaves zeros behind it.
    """

    stack: Stack
    shape: tuple[int, ...]
    start: int
    room: int
    is_b: bool


class AdapterBank:
    """S slots of adapters over `model`, whose target linears are wrapped in place.

    Args:
        model: A frozen Hugging Face causal LM.
        num_slots: How many adapters at once.
        configs: The adapter shapes to expect; the bank's rank and targets are the largest and the union of theirs.
        trainable: Whether to hold gradients and Adam moments.

    Raises:
        ValueError: A target module name is not found among the model's linears, or the model has a bank; it is as
            before.
    """

    def __init__(self, model: nn.Module, num_slots: int, configs: Iterable[PeftConfig], trainable: bool):
        self._attention = model.config._attn_implementation  # type: ignore[union-attr]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.model, self.num_slots, self.trainable = model, num_slots, trainable
        self.dtype, self.device, self.hidden = embedding.weight.dtype, embedding.weight.device, embedding.embedding_dim
        self.anchor = torch.zeros((), device=self.device, requires_grad=trainable)
        self.peft: list[PeftConfig | None] = [None] * num_slots
        self.scaling_S: list[float] = [0.0] * num_slots
        self.seeds: list[int] = [0] * num_slots
        self.linears: dict[str, BankLinear] = {}
        self.prompts: Stack | None = None
        self.tokens: TokenSlots | None = None
        self._ranges: Ranges = ()
        self._active: dict[tuple[str, str], Ranges] = {}
        self._step, self._tokens_before = 0, dict[int, int]()
        try:
            self._attach(list(configs))
        except BaseException:
            self.remove()
            raise

    def _attach(self, configs: Sequence[PeftConfig]) -> None:
        self.model.set_attn_implementation(NAME)  # type: ignore[operator]
        for kind in ("lora", "ia3"):
            of_kind = [config for config in configs if config.kind == kind]
            if of_kind:
                rank = max(config.rank for config in of_kind)
                for name in sorted({t for config in of_kind for t in targets(config)}):
                    self._wrap(name, kind, rank)
        num_virtual = max((config.num_virtual_tokens for config in configs if config.kind == "prompt"), default=0)
        if num_virtual:
            self.prompts = self._stack(num_virtual, self.hidden)
        self._slot_size = sum(stack.value[0].numel() for stack in self.stacks().values())
        self._places = lru_cache(NUM_LAYOUTS)(self._find_places)
        self._memory_SN: Tensor | None = None
        if not self.trainable:  # each slot in one piece of the compute type: an adapter is placed with one copy
            self._memory_SN = torch.zeros(self.num_slots, self._slot_size, dtype=self.dtype, device=self.device)
            for stack, value in self._views(self._memory_SN):
                stack.value = stack.compute = value

    def _views(self, memory_SN: Tensor) -> list[tuple[Stack, Tensor]]:
        """Each stack with its part of a memory that holds slots one after another.

        B lies as [R, O]: that is how `add_lora_rows` reads it.
        """
        views, start = [], 0
        for name, stack in self.stacks().items():
            shape = stack.value.shape[1:]
            part_SN = memory_SN[:, start : start + math.prod(shape)]
            is_b = name.endswith(".b")
            view = part_SN.unflatten(1, shape[::-1]).transpose(1, 2) if is_b else part_SN.unflatten(1, shape)
            views.append((stack, view))
            start += math.prod(shape)
        return views

    def _stack(self, *shape: int) -> Stack:
        return Stack((self.num_slots, *shape), self.dtype, self.device, self.trainable)

    def _wrap(self, target: str, kind: str, rank: int) -> None:
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if name.rsplit(".", 1)[-1] == target and isinstance(module, nn.Linear | BankLinear)
        ]
        if not found:
            linears = {n.rsplit(".", 1)[-1] for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
            raise ValueError(f"target module {target!r} is not a linear of this model; it has {sorted(linears)}")
        for name, module in found:
            if module is self.model.get_output_embeddings():  # type: ignore[operator]
                raise ValueError(f"target module {target!r} is the output embedding; expected a linear of the layers")
            if isinstance(module, BankLinear) and module.bank[0] is not self:
                raise ValueError(f"{name} has another bank's adapters; expected one bank on a model at a time")
            if not isinstance(module, BankLinear):
                parent, _, child = name.rpartition(".")
                base, module = module, BankLinear(module, self, name)
                module.train(base.training)
                self.linears[name] = module
                setattr(self.model.get_submodule(parent), child, module)
            if kind == "lora":
                module.a, module.b = self._stack(rank, module.in_features), self._stack(module.out_features, rank)
            else:
                module.scale = self._stack(module.in_features if module.scales_input else module.out_features)

    def remove(self) -> None:
        """Put the model's own linears and attention back."""
        self.model.set_attn_implementation(self._attention)  # type: ignore[operator]
        for name, linear in self.linears.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, linear.base)
        self.linears = {}

    def stacks(self) -> dict[str, Stack]:
        """Every stacked parameter by name, in a fixed order."""
        found = {}
        for name, linear in self.linears.items():
            for part in ("a", "b", "scale"):
                stack = getattr(linear, part)
                if stack is not None:
                    found[f"{name}.{part}"] = stack
        if self.prompts is not None:
            found["prompts"] = self.prompts
        return found

    def use(self, ranges: Ranges, step: int = 0, tokens_before: dict[int, int] | None = None) -> None:
        """Say which slot computes which tokens in the training passes that follow. (-1, start, stop) is the base alone.

        `step` and `tokens_before` (slot -> the slot's tokens in earlier passes of the step) are for dropout.
        """
        self.tokens = None
        self._ranges = [r for r in ranges if r[0] >= 0]
        self._active = {}
        self._step, self._tokens_before = step, tokens_before or {}

    def use_rows(self, slots: Sequence[int], nums: Sequence[int] | None = None) -> None:
        """Say which slot computes each row of the pass that follows, which answers and has no gradient.

        A token's bits depend on nothing but its own slot and what its row holds. `nums` are the rows' tokens; None for
        one each.
        """
        self.tokens = TokenSlots(self, slots, nums)

    def active(self, kind: str, target: str) -> Ranges:
        """The ranges whose slot holds an adapter of `kind` for the linears called `target`."""
        if (kind, target) not in self._active:
            pefts = [(r, self.peft[r[0]]) for r in self._ranges]
            self._active[kind, target] = [r for r, p in pefts if p and p.kind == kind and target in targets(p)]
        return self._active[kind, target]

    def hidden_states(
        self, input_ids_T: Tensor, position_ids_T: Tensor, plan: SegmentPlan | DecodePlan, virtual: Ranges = ()
    ) -> Tensor:
        """Last hidden states of one stream, [T, D] or for `plan.wanted_K` [K, D], by the slots given to `use`."""
        embeds_TD = self.model.get_input_embeddings()(input_ids_T)  # type: ignore[operator]
        output = self.model.base_model(  # type: ignore[operator]
            inputs_embeds=self._embed(embeds_TD, virtual)[None],
            position_ids=position_ids_T[None],
            use_cache=False,
            plan=plan,
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        wanted_K = plan.wanted_K if isinstance(plan, SegmentPlan) else None
        return hidden_TD if wanted_K is None or len(hidden_TD) == len(wanted_K) else hidden_TD[wanted_K]

    def _embed(self, embeds_TD: Tensor, virtual: Ranges) -> Tensor:
        """Put prompt-tuning vectors in place of virtual tokens' embeddings."""
        if not virtual:
            return embeds_TD
        return _Virtual.apply(embeds_TD, self.anchor, self.prompts, virtual)

    def dropout_masks(self, x: Tensor, layer: str, ranges: Ranges) -> list[Tensor] | None:
        """One inverted-dropout mask per range.

        It is drawn from the user's seed, the step, the layer's name and the token's place among the user's tokens of
        the step: neither neighbours, nor how a step is cut into passes, nor recomputation changes it.
        """
        rates = [self.peft[slot].dropout for slot, _, _ in ranges]  # type: ignore[union-attr]
        if not any(rates):
            return None
        masks = []
        for (slot, start, stop), rate in zip(ranges, rates, strict=True):
            name = f"{self.seeds[slot]} {self._step} {layer}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
            before = self._tokens_before.get(slot, 0)
            drawn = torch.rand(before + stop - start, x.shape[-1], generator=generator)[before:]
            masks.append(((drawn >= rate) / (1 - rate)).to(x))
        return masks

    def start(self, slot: int, peft: PeftConfig, seed: int) -> None:
        """Initialise a fresh adapter as PEFT does, from the user's own seed: it starts as the base model.

        Prompt tuning starts from embeddings of random vocabulary words (Lester et al. 2021), since there is no neutral
        start.
        """
        generator = torch.Generator().manual_seed(seed)
        self._occupy(slot, peft, seed)
        for linear in self._targeted(peft):
            if peft.kind == "lora":
                bound = 1 / math.sqrt(linear.in_features)
                a = (torch.rand(peft.rank, linear.in_features, generator=generator) * 2 - 1) * bound
                linear.a.write(slot, a)  # type: ignore[union-attr]
            else:
                linear.scale.write(slot, torch.ones(linear.scale.value.shape[1]))  # type: ignore[union-attr]
        if peft.kind == "prompt":
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            ids = torch.randint(embedding.weight.shape[0], (peft.num_virtual_tokens,), generator=generator)
            with torch.no_grad():
                self.prompts.write(slot, embedding(ids.to(self.device)).float())  # type: ignore[union-attr]

    def _name(self, slot: int, peft: PeftConfig, seed: int = 0) -> None:
        self.peft[slot], self.seeds[slot], self.scaling_S[slot] = peft, seed, scaling(peft)

    def _occupy(self, slot: int, peft: PeftConfig, seed: int = 0) -> None:
        self._name(slot, peft, seed)
        self._clear(slot)

    def _clear(self, slot: int) -> None:
        if self._memory_SN is not None:
            self._memory_SN[slot] = 0
            return
        for stack in self.stacks().values():
            stack.clear(slot)

    def _targeted(self, peft: PeftConfig) -> list[BankLinear]:
        names = targets(peft)
        return [linear for name, linear in self.linears.items() if name.rsplit(".", 1)[-1] in names]

    def export(self, slot: int) -> AdapterState:
        """The slot's adapter as float32 arrays under PEFT's on-disk names."""
        peft = self.peft[slot]
        if peft is None:
            raise ValueError(f"slot {slot} is empty")
        tensors = {}
        for key, place in self._places(peft).items():
            value = place.stack.value[slot]
            if peft.kind != "ia3":
                value = value[tuple(slice(n) for n in place.shape)]
            tensors[key] = value.reshape(place.shape).float().cpu().numpy().copy()
        return AdapterState(tensors, peft_dict(peft))

    def load(self, slot: int, adapter: AdapterState) -> None:
        """Put an exported adapter in a slot.

        Raises:
            ValueError: The adapter does not fit the bank (kind, rank, targets, shapes, NaN); the slot is as before.
        """
        self.place(slot, self.fit(adapter))

    def fit(self, adapter: AdapterState) -> FittedAdapter:
        """Check an adapter against the bank: the slow part of `load`, which touches no slot and can run in any thread.

        Raises:
            ValueError: As `load`.
        """
        peft = peft_from_dict(adapter.peft_config)
        places = self._places(peft)
        if places.keys() != adapter.tensors.keys():
            odd = sorted(places.keys() ^ adapter.tensors.keys())[:3]
            raise ValueError(f"the adapter's tensors do not match this bank's target modules: {odd}")
        memory_N, end = np.empty(self._slot_size, np.float32), 0
        for key, place in places.items():
            value = adapter.tensors[key]
            if value.shape != place.shape or value.size > place.room:
                shapes = f"{value.shape}, expected {place.shape}"
                raise ValueError(f"the adapter's {key} has shape {shapes} within the bank's rank")
            memory_N[end : place.start] = 0
            end = place.start + value.size
            value = value.T if place.is_b else value
            memory_N[place.start : end].reshape(value.shape)[...] = value
        memory_N[end:] = 0
        if not np.isfinite(memory_N).all():
            key = next(key for key, value in adapter.tensors.items() if not np.isfinite(value).all())
            raise ValueError(f"the adapter's {key} has a value that is not finite")
        return FittedAdapter(peft, torch.from_numpy(memory_N).to(torch.float32 if self.trainable else self.dtype))

    def place(self, slot: int, fitted: FittedAdapter) -> None:
        """Copy a fitted adapter into a slot."""
        if self._memory_SN is not None:
            self._name(slot, fitted.peft)
            self._memory_SN[slot] = fitted.memory_N
            return
        self._occupy(slot, fitted.peft)
        for stack, value in self._views(fitted.memory_N[None]):
            stack.write(slot, value[0])

    def vacate(self, slot: int) -> None:
        """Empty a slot, its memory too."""
        self.peft[slot], self.scaling_S[slot] = None, 0.0
        self._clear(slot)

    def _find_places(self, peft: PeftConfig) -> dict[str, Place]:
        """PEFT's on-disk name -> where the bank has it, in the order of a slot's memory."""
        found: list[tuple[str, Stack | None, tuple[int, ...]]] = []
        for linear in self._targeted(peft):
            key = PREFIX + linear.name
            if peft.kind == "lora":
                found.append((f"{key}.lora_A.weight", linear.a, (peft.rank, linear.in_features)))
                found.append((f"{key}.lora_B.weight", linear.b, (linear.out_features, peft.rank)))
            else:
                shape = (1, linear.in_features) if linear.scales_input else (linear.out_features, 1)
                found.append((f"{key}.ia3_l", linear.scale, shape))
        if peft.kind == "prompt":
            found.append(("prompt_embeddings", self.prompts, (peft.num_virtual_tokens, self.hidden)))
        if not found or any(stack is None for _, stack, _ in found):
            raise ValueError(f"this bank was not made for {peft}")
        starts, start = dict[int, int](), 0
        for stack in self.stacks().values():
            starts[id(stack)] = start
            start += stack.value[0].numel()
        return {
            key: Place(stack, shape, starts[id(stack)], stack.value[0].numel(), key.endswith("lora_B.weight"))  # type: ignore[union-attr, arg-type]
            for key, stack, shape in found
        }

    def zero_grad(self) -> None:
        for stack in self.stacks().values():
            stack.grad.zero_()  # type: ignore[union-attr]

    @torch.no_grad()
    def adam_step(
        self,
        learning_rates: dict[int, float],
        step: int,
        clip_norm: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> dict[int, float]:
        """One AdamW step, each slot as if it were alone: own gradient norm, own clipping, own learning rate.

        Args:
            learning_rates: Slot -> learning rate; slots not named are left untouched, moments included.
            step: Number of this step, from 1, equal for all named slots.
            clip_norm: Largest gradient norm of a slot; 0 means no clipping.

        Returns:
            Slot -> gradient norm before clipping.
        """
        slots = torch.tensor(sorted(learning_rates), device=self.device)
        stacks = list(self.stacks().values())
        squares_S = [stack.grad[slots].flatten(1).pow(2).sum(1) for stack in stacks]  # type: ignore[index]
        norm_S = torch.stack(squares_S).sum(0).sqrt()
        factor_S = (clip_norm / (norm_S + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(norm_S)
        rate_S = torch.tensor([learning_rates[int(slot)] for slot in slots], device=self.device)
        correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
        for stack in stacks:
            shape = (-1, *[1] * (stack.value.dim() - 1))
            grad = stack.grad[slots] * factor_S.view(shape)  # type: ignore[index]
            mean = stack.mean[slots].lerp_(grad, 1 - betas[0])  # type: ignore[index]
            square = stack.square[slots].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])  # type: ignore[index]
            stack.mean[slots], stack.square[slots] = mean, square  # type: ignore[index]
            denominator = square.sqrt_().div_(math.sqrt(correction2)).add_(eps)
            rate = rate_S.view(shape)
            value = stack.value[slots].mul_(1 - rate * weight_decay)
            stack.value[slots] = value.sub_(mean.div_(denominator).mul_(rate / correction1))
            stack.compute[slots] = stack.value[slots].to(self.dtype)
        return dict(zip(slots.tolist(), norm_S.tolist(), strict=True))


def targets(peft: PeftConfig) -> tuple[str, ...]:
    """The adapter's target module names (last parts)."""
    return peft.target_modules or DEFAULT_TARGETS[peft.kind]


def scaling(peft: PeftConfig) -> float:
    """What the LoRA product is multiplied by; rsLoRA divides by the root of the rank (Kalajdzievski 2023)."""
    return peft.alpha / (math.sqrt(peft.rank) if peft.rslora else peft.rank)


def peft_dict(peft: PeftConfig) -> dict[str, Any]:
    """PEFT's own names for the adapter's shape, as in adapter_config.json."""
    if peft.kind == "lora":
        return {
            "peft_type": "LORA",
            "r": peft.rank,
            "lora_alpha": peft.alpha,
            "lora_dropout": peft.dropout,
            "use_rslora": peft.rslora,
            "target_modules": sorted(targets(peft)),
        }
    if peft.kind == "ia3":
        names = sorted(targets(peft))
        feedforward = [name for name in names if name in IA3_INPUT_TARGETS]
        return {"peft_type": "IA3", "target_modules": names, "feedforward_modules": feedforward}
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": peft.num_virtual_tokens}


def peft_from_dict(values: dict[str, Any]) -> PeftConfig:
    """The inverse of `peft_dict`, for any adapter_config.json of the three kinds.

    Raises:
        ValueError: The PEFT type is none of LORA, IA3, PROMPT_TUNING.
    """
    kind = str(values.get("peft_type", "")).rsplit(".", 1)[-1]
    names = values.get("target_modules") or ()
    modules = (names,) if isinstance(names, str) else tuple(sorted(names))
    if kind == "LORA":
        return PeftConfig(
            kind="lora",
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            rslora=bool(values.get("use_rslora", False)),
            dropout=float(values.get("lora_dropout", 0.0)),
            target_modules=modules,
        )
    if kind == "IA3":
        return PeftConfig(kind="ia3", target_modules=modules)
    if kind == "PROMPT_TUNING":
        return PeftConfig(kind="prompt", num_virtual_tokens=int(values["num_virtual_tokens"]))
    raise ValueError(f"PEFT type {kind!r} is not supported; expected LORA, IA3 or PROMPT_TUNING")
