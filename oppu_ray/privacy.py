"""Differential privacy: clipping, noise and the account of both, for `federated` (users) and `train` (items).

In: updates or gradients. Out: the same, no longer than a bound and under Gaussian noise, and the epsilon this is worth.

Vectors are rounded to a grid before they are added up, and the noise is a whole number of grid steps (`gaussian`): a
sum shows nothing in its last bits. Rounding can make a vector longer by half a step times the square root of its
length: it is cut to so much less. What is computed from a sum afterwards (Adam, another rounding) costs nothing.

What is protected is what an item says, or a user's whole history. Public are: the config, how many items a user has
(hence their number of steps), and that a training ended. What a private training gives away beside the adapter is
therefore neither a loss nor a count of tokens, and an item whose gradient is not finite adds nothing, in silence. A
user's manifest also has the ids of their items, in the clear: like the history, they are for the owner's eyes.

Design: noise is ChaCha20 under a secret key in a file, not fresh randomness. A run that is killed and resumed then
repeats its noise bit for bit, instead of showing the same data under noise twice, and nobody can compute the noise from
the config's seed. Who has the key can take the noise off: it is as secret as the histories, and may be deleted when the
run is done.

Under DP-SGD (Abadi et al. 2016) each item's gradient is needed by itself, so items share no prefix: a step makes one
pass per item, each over all users of the pack.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import PrivacyConfig, TrainConfig
from oppu_ray.core import Example, InputError, UserWork
from oppu_ray.files import write_once
from oppu_ray.gaussian import discrete_gaussian
from oppu_ray.packing import num_steps
from oppu_ray.secure import derive
from oppu_ray.training import Backward, backward_step

KEY_BYTES = 32


def noise_key(path: Path) -> bytes:
    """The key in a file of mode 0600, drawn when first asked for; processes that ask at once get the same."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_once(path, secrets.token_bytes(KEY_BYTES))
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{path} has {len(key)} bytes; expected a key of {KEY_BYTES}: without it no run can be resumed"
        )
    return key


def noise(key: bytes, name: str, num: int, std: float, grid: float) -> np.ndarray:
    """Draw [num] float64: whole numbers of grid steps with a standard deviation of at least `std`.

    Args:
        name: Same key and name, same numbers; another name, others that have nothing to do with them.
        std, grid: In the unit of what the noise is added to. A `std` of 0 is no noise.
    """
    if not std:
        return np.zeros(num)
    return discrete_gaussian(derive(key, b"noise", name.encode()), num, math.ceil(std / grid)).astype(np.float64)


def is_drawn(key: bytes, name: str, share: float) -> bool:
    """True with probability `share`, for each name by itself (Poisson sampling, as the account supposes)."""
    return int.from_bytes(derive(key, b"draw", name.encode())[:7], "big") < share * 2**56


def fine_grid(norm: float) -> float:
    """A grid so fine that rounding to it costs a vector of 4 million numbers a ten-thousandth of its norm."""
    return 2.0 ** (math.floor(math.log2(norm)) - 24)


def on_grid(parts: Sequence[Tensor], norm: float, grid: float) -> list[Tensor]:
    """Cut a vector to a norm and round it to a grid.

    Args:
        parts: The vector; zeros are taken where it is not finite.
        norm: Largest L2 norm of the result.
        grid: The grid's step.

    Returns:
        Whole numbers of steps, float64.

    Raises:
        ValueError: The grid is too coarse for the norm.
    """
    room = norm - grid / 2 * math.sqrt(sum(part.numel() for part in parts))
    if room < norm / 2:
        raise ValueError(f"clip_norm is {norm:g}; expected one that is large against rounding, {2 * (norm - room):g}")
    length = math.sqrt(sum(float(part.double().pow(2).sum()) for part in parts))
    if not math.isfinite(length):
        return [torch.zeros_like(part, dtype=torch.float64) for part in parts]
    factor = min(1.0, room / length) / grid if length else 0.0
    return [torch.round(part.double() * factor) for part in parts]


def epsilon(noise_multiplier: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """What `num_steps` sums under noise of `noise_multiplier` clipping norms may cost (Opacus' Renyi accountant)."""
    from opacus.accountants.analysis import rdp  # takes seconds

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [128, 256, 512]
    cost = rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=num_steps, orders=orders)
    return float(rdp.get_privacy_spent(orders=orders, rdp=cost, delta=delta)[0])


def epsilon_of(rho: float, delta: float) -> float:
    """What versions whose costs add up to `rho` are worth together; `account` says how they add up."""
    return epsilon(1 / math.sqrt(2 * rho), 1.0, 1, delta) if rho else 0.0


def account(config: PrivacyConfig, train: TrainConfig, num_items: int, rho_before: float) -> dict[str, float]:
    """What one more version costs a user's privacy: the metrics of its manifest.

    A step under noise z is a Gaussian mechanism: 1 / (2 z**2) of zero-concentrated differential privacy (Bun and
    Steinke 2016, arXiv 1605.02065), which adds up over steps and versions, whatever their z. An item of this version
    that the others had not costs less: the sum is of an item that all had.

    Args:
        num_items: That it is trained on.
        rho_before: What the user's versions have cost so far (`Registry.rho`).

    Returns:
        `rho_before`, `rho` (with this version), and `epsilon` and `delta` of all versions together.

    Raises:
        InputError: Epsilon would be above `config.max_epsilon`.
    """
    looks = num_looks(num_steps(num_items, train), num_items, train.items_per_step)
    rho = rho_before + looks / (2 * config.noise_multiplier**2)
    cost = epsilon_of(rho, config.delta)
    if cost > config.max_epsilon:
        before = epsilon_of(rho_before, config.delta)
        raise InputError(
            f"privacy.max_epsilon is {config.max_epsilon:g}, and training once more on {num_items} items would bring "
            f"the epsilon of all versions from {before:.2f} to {cost:.2f} at delta {config.delta:g}; expected no more"
        )
    return {"rho_before": rho_before, "rho": rho, "epsilon": cost, "delta": config.delta}


def num_looks(num_steps: int, num_items: int, items_per_step: int) -> int:
    """How often a user's item can have been in a step: once an epoch."""
    return math.ceil(num_steps / math.ceil(num_items / items_per_step)) if num_steps else 0


def private_backward(config: PrivacyConfig, pack: Sequence[UserWork], key: bytes) -> Backward:
    """A step of DP-SGD in the place of `training.backward_step`.

    A slot's gradient is the sum of its items' gradients, each cut to `config.clip_norm`, plus noise, over
    `items_per_step`. Epsilon counts an item as in or out of a step, not how it was drawn: `epsilon` with a sample rate
    of 1 and `num_looks` steps holds in whatever order items come. Losses and counts of tokens have no noise: all are 0.
    """
    grid, std = fine_grid(config.clip_norm), config.noise_multiplier * config.clip_norm

    # Noise is of these very steps: had a user other items, no noise would be seen twice.
    names = [f"user {work.user_id} {hashlib.sha256(repr(work.steps).encode()).hexdigest()}" for work in pack]

    def backward(
        bank: AdapterBank, examples: Mapping[int, Sequence[Example]], train: TrainConfig, step: int
    ) -> tuple[dict[int, float], dict[int, int]]:
        stacks = list(bank.stacks().values())
        sums = [torch.zeros_like(stack.value, dtype=torch.float64) for stack in stacks]
        for number in range(max(map(len, examples.values()))):
            single = {slot: (own[number],) for slot, own in examples.items() if number < len(own)}
            backward_step(bank, single, train, step)
            for slot in single:
                grads = [stack.grad[slot] for stack in stacks]  # type: ignore[index]
                for total, units in zip(sums, on_grid(grads, config.clip_norm, grid), strict=True):
                    total[slot] += units
            bank.zero_grad()
        for slot in examples:
            size = sum(total[slot].numel() for total in sums)
            drawn = torch.from_numpy(noise(key, f"{names[slot]} step {step}", size, std, grid))
            for stack, total in zip(stacks, sums, strict=True):
                part, drawn = drawn[: total[slot].numel()], drawn[total[slot].numel() :]
                noisy = (total[slot] + part.view_as(total[slot]).to(total)) * grid
                stack.grad[slot] = noisy / train.items_per_step  # type: ignore[index]
        return dict.fromkeys(examples, 0.0), dict.fromkeys(examples, 0)

    return backward
