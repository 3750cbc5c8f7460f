"""Differential privacy: clipping, noise and the account of both, for `federated` (users) and `train` (items).

In: updates or gradients. Out: the same, no longer than a bound and under Gaussian noise, and the epsilon this is worth.

The decision a reader would question: noise is ChaCha20 under a secret key in a file, not fresh randomness. A run that
is killed and resumed then repeats its noise bit for bit, instead of showing the same data under noise twice, and nobody
can compute the noise from the config's seed. Who has the key can take the noise off: it is as secret as the histories,
and may be deleted when the run is done. (Gaussians in floating point leak more than the theory says: Mironov 2012.)

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

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import PrivacyConfig, TrainConfig
from oppu_ray.core import Example, UserWork
from oppu_ray.files import write_once
from oppu_ray.secure import derive, stream
from oppu_ray.training import Backward, backward_step

KEY_BYTES = 32
_EPS = 2.0**-53


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


def gaussian(key: bytes, name: str, num: int, std: float) -> np.ndarray:
    """[num] float64 from the normal distribution; same key and name, same numbers (Box and Muller 1958)."""
    half = -(-num // 2)
    drawn = np.frombuffer(stream(derive(key, b"noise", name.encode()), 16 * half), np.uint64)
    radius_angle = ((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * _EPS
    radius, angle = np.sqrt(-2 * np.log(radius_angle[:half])), 2 * np.pi * radius_angle[half:]
    return std * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:num]


def is_drawn(key: bytes, name: str, share: float) -> bool:
    """True with probability `share`, for each name by itself (Poisson sampling, as the account supposes)."""
    return int.from_bytes(derive(key, b"draw", name.encode())[:7], "big") < share * 2**56


def clipped(values: np.ndarray, norm: float) -> np.ndarray:
    """The values, scaled down to the L2 norm `norm` if they are longer."""
    length = float(np.linalg.norm(values.astype(np.float64)))
    return values if length <= norm else values * (norm / length)


def epsilon(noise_multiplier: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """What `num_steps` sums under noise of `noise_multiplier` clipping norms may cost (Opacus' Renyi accountant)."""
    from opacus.accountants.analysis import rdp  # takes seconds

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [128, 256, 512]
    cost = rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=num_steps, orders=orders)
    return float(rdp.get_privacy_spent(orders=orders, rdp=cost, delta=delta)[0])


def num_looks(num_steps: int, num_items: int, items_per_step: int) -> int:
    """How often a user's item can have been in a step: once an epoch."""
    return math.ceil(num_steps / math.ceil(num_items / items_per_step)) if num_steps else 0


def private_backward(config: PrivacyConfig, pack: Sequence[UserWork], key: bytes) -> Backward:
    """A step of DP-SGD in the place of `training.backward_step`.

    A slot's gradient is the sum of its items' gradients, each cut to `config.clip_norm`, plus noise, over
    `items_per_step`. Epsilon counts an item as in or out of a step, not how it was drawn: `epsilon` with a sample rate
    of 1 and `num_looks` steps holds in whatever order items come.
    """

    # Noise is of these very steps: had a user other items, no noise would be seen twice.
    names = [f"user {work.user_id} {hashlib.sha256(repr(work.steps).encode()).hexdigest()}" for work in pack]

    def backward(
        bank: AdapterBank, examples: Mapping[int, Sequence[Example]], train: TrainConfig, step: int
    ) -> tuple[dict[int, float], dict[int, int]]:
        stacks = list(bank.stacks().values())
        sums = [torch.zeros_like(stack.value) for stack in stacks]
        losses, tokens = dict.fromkeys(examples, 0.0), dict.fromkeys(examples, 0)
        for number in range(max(map(len, examples.values()))):
            single = {slot: (own[number],) for slot, own in examples.items() if number < len(own)}
            one_losses, one_tokens = backward_step(bank, single, train, step)
            for slot in single:
                losses[slot] += one_losses[slot] / len(examples[slot])
                tokens[slot] += one_tokens[slot]
                grads = [stack.grad[slot] for stack in stacks]  # type: ignore[index]
                norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))
                factor = min(1.0, config.clip_norm / norm) if norm else 1.0
                for total, grad in zip(sums, grads, strict=True):
                    total[slot] += factor * grad
            bank.zero_grad()
        for slot in examples:
            size = sum(total[slot].numel() for total in sums)
            std = config.noise_multiplier * config.clip_norm
            noise = torch.from_numpy(gaussian(key, f"{names[slot]} step {step}", size, std))
            for stack, total in zip(stacks, sums, strict=True):
                part, noise = noise[: total[slot].numel()], noise[total[slot].numel() :]
                noisy = total[slot] + part.view_as(total[slot]).to(total)
                stack.grad[slot] = noisy / train.items_per_step  # type: ignore[index]
        return losses, tokens

    return backward
