"""A federated client: a shard of users whose text does not leave it, and the messages it exchanges (`federated`).

In: a round's adapter, as bytes. Out: an update, as bytes: in the open, masked (`secure`) or under noise (`privacy`). A
shard trains with `train_pack`, as personal training does; heterogeneous ranks train the first directions of the adapter
and freeze the others into the base.

Design: `Host` answers every error instead of raising it: a round goes on without a shard that cannot take part, and its
reason is in the record.

Shapes: N numbers of an update; R rank, I and O inputs and outputs of a linear.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from oppu_ray.adapters import AdapterBank, scaling
from oppu_ray.aggregation import (
    RING_STEP,
    Arrays,
    RoundState,
    cut_rank,
    flatten,
    join_rank,
    linear_name,
    to_ring,
    trained_keys,
)
from oppu_ray.base_model import Base
from oppu_ray.config import Config, FederatedConfig, TrainConfig
from oppu_ray.core import Example, TrainResult, UserWork
from oppu_ray.packing import plan_user
from oppu_ray.prepared import Index, read_index
from oppu_ray.privacy import is_drawn, noise, noise_key, on_grid
from oppu_ray.randomness import user_seed
from oppu_ray.secure import Party, PublicKeys
from oppu_ray.training import Backward, PackState, UserState, backward_step, learning_rate, train_pack
from oppu_ray.workers import encode_base_users, open_base, reason_of

Message = tuple[dict[str, Any], Arrays]


def write_message(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A message or a state as one safetensors file in memory, with the header as its metadata."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"header": json.dumps(header)})


def read_message(content: bytes) -> Message:
    """The inverse of `write_message`.

    Raises:
        ValueError: It is no such message.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
        if not isinstance(header, dict):
            raise TypeError(f"its header is a {type(header).__name__}")
        return header, load(content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{len(content)} bytes that are no message: {type(error).__name__}") from error


def write_state(state: RoundState) -> bytes:
    groups = {name: getattr(state, name) for name in ("adapter", "residual", "mean", "square")}
    arrays = {f"{name}/{key}": array for name, group in groups.items() for key, array in group.items()}
    return write_message({"num_rounds": state.num_rounds}, arrays)


def read_state(content: bytes) -> RoundState:
    header, arrays = read_message(content)
    groups: dict[str, Arrays] = {"adapter": {}, "residual": {}, "mean": {}, "square": {}}
    for name, array in arrays.items():
        group, _, key = name.partition("/")
        groups[group][key] = array
    return RoundState(header["num_rounds"], **groups)


def quorum(federated: FederatedConfig, num_asked: int) -> int:
    """How many of the shards asked must answer."""
    return federated.min_shards or math.ceil(2 * num_asked / 3)


class Shard:
    """A client's side: trains on the users it owns, whose text does not leave it.

    Args:
        number: The shard's, from 0.
        user_ids: The base users it owns; with split "items" all of them, and it takes its own part of their items.
        base: May be shared with other shards; it is as before after each call.
        key_path: Where the shard keeps the key of its noise.
    """

    def __init__(self, config: Config, number: int, user_ids: Sequence[str], base: Base, index: Index, key_path: Path):
        self.config, self.federated, self.number, self.base = config, config.federated, number, base
        self.examples = encode_base_users(config, base, index, user_ids)
        if self.federated.split == "items":
            self.examples = {user_id: self._own_part(user_id, own) for user_id, own in self.examples.items()}
        is_private = self.federated.noise_multiplier > 0
        public = hashlib.sha256(f"{config.seed} shard {number}".encode()).digest()
        self.key = noise_key(key_path) if is_private else public
        self.party: Party | None = None

    def _own_part(self, user_id: str, examples: list[Example]) -> list[Example]:
        dealt = random.Random(user_seed(self.config.seed, f"items of {user_id}"))
        return [example for example in examples if dealt.randrange(self.federated.num_shards) == self.number]

    def keys(self, asked: Mapping[str, Any], _state: RoundState | None) -> Message:
        """Secure aggregation 1: new keys for this attempt at a round."""
        self.party = Party(self.number, asked["attempt"].encode())
        return {name: key.hex() for name, key in asdict(self.party.public_keys()).items()}, {}

    def shares(self, asked: Mapping[str, Any], _state: RoundState | None) -> Message:
        """Secure aggregation 2: this shard's secrets in shares, encrypted for the others."""
        peers = {int(peer): PublicKeys(*map(bytes.fromhex, keys)) for peer, keys in asked["peers"].items()}
        shares = self._party(asked).share(peers, asked["threshold"])
        return {"shares": {peer: share.hex() for peer, share in shares.items()}}, {}

    def train(self, asked: Mapping[str, Any], state: RoundState | None) -> Message:
        """Train from the round's adapter and answer with the update: in the open, or masked (secure aggregation 3)."""
        assert state is not None
        delta_N, loss, weight = self.update(state)
        if "inbox" not in asked:
            return {"loss": loss, "weight": weight}, {"delta": delta_N}
        inbox = {int(sender): bytes.fromhex(share) for sender, share in asked["inbox"].items()}
        return {}, {"masked": self._party(asked).mask(to_ring(np.append(delta_N, np.float32(loss)), weight), inbox)}

    def reveal(self, asked: Mapping[str, Any], _state: RoundState | None) -> Message:
        """Secure aggregation 4: what takes the masks off the sum."""
        revealed = asdict(self._party(asked).reveal(asked["stayed"]))
        return {kind: {peer: share.hex() for peer, share in own.items()} for kind, own in revealed.items()}, {}

    def _party(self, asked: Mapping[str, Any]) -> Party:
        if self.party is None or self.party.context != asked["attempt"].encode():
            raise ValueError("it was not there when this round's keys were made")
        return self.party

    def update(self, state: RoundState) -> tuple[np.ndarray, float, float]:
        """One round's training: (update [N] float32, mean loss of its steps in nats, weight).

        The weight is the tokens trained on. Under noise it is the number of users expected to be drawn, and the loss is
        0: neither says anything about a user. The update is then float64, so that weight times update is, to the bit,
        the noisy sum on the grid of `aggregation`'s integers: these add up to a sum with the noise of all shards.

        Raises:
            ValueError: Training broke down, or `federated.clip_norm` is too small for the grid.
        """
        federated, adapt = self.federated, self.config.adapt
        factor = scaling(adapt.peft)
        rank = federated.ranks[self.number % len(federated.ranks)] if federated.ranks else adapt.peft.rank
        head, rest = cut_rank(state.adapter, rank)
        local = replace(
            adapt,
            peft=replace(adapt.peft, rank=rank, alpha=factor * rank, rslora=False),
            max_steps=federated.local_steps,
            learning_rate=learning_rate(adapt, state.num_rounds, federated.num_rounds),
            schedule="constant",
            warmup_share=0.0,
            weight_decay=0.0 if federated.method == "ffa" else adapt.weight_decay,  # it would move A, too
        )
        works = self._works(state.num_rounds, local)
        results: list[TrainResult] = []
        with shifted(self.base.model, frozen_part(state.residual, rest, factor)):
            for start in range(0, len(works), local.max_users_per_pack):
                pack = works[start : start + local.max_users_per_pack]
                begin = PackState(0, {work.user_id: starting_from(head) for work in pack})
                results += train_pack(self.base.model, pack, local, state=begin, backward=self._backward(head))
        trained = sorted((one for one in results if one.adapter), key=lambda result: result.user_id)
        keys = trained_keys(state.adapter, federated.method)
        before_N = flatten(state.adapter, keys)
        deltas = [flatten(join_rank(one.adapter.tensors, rest), keys) - before_N for one in trained if one.adapter]
        if federated.noise_multiplier:
            total_N = np.zeros(len(before_N))
            for delta_N in deltas:
                total_N += on_grid([torch.from_numpy(delta_N)], federated.clip_norm, RING_STEP)[0].numpy()
            # Every shard adds its part of the noise, so that the sum has enough of it if only so many answer. A sum of
            # discrete Gaussians is one up to exp(-2 pi**2 sigma**2), sigma in grid steps: some 10**5 here (Kairouz, Liu
            # and Steinke 2021, arXiv 2102.06387).
            least = quorum(federated, federated.num_shards)
            std = federated.noise_multiplier * federated.clip_norm / math.sqrt(least)
            # Of this very state: were it of the round alone, a round run again from another would show it twice.
            name = f"round {state.num_rounds} {hashlib.sha256(write_state(state)).hexdigest()}"
            total_N += noise(self.key, name, len(total_N), std, RING_STEP)
            weight = federated.client_share * len(self.examples)
            return total_N * RING_STEP / weight, 0.0, weight
        if not works:
            return np.zeros_like(before_N), 0.0, 0.0  # nobody was drawn
        if not deltas:
            raise ValueError(results[0].error)
        tokens = np.array([one.num_useful_tokens for one in trained], dtype=np.float64)
        mean_N = sum(share * delta_N for share, delta_N in zip(tokens / tokens.sum(), deltas, strict=True))
        losses = np.array([np.mean(one.losses) for one in trained])
        return np.asarray(mean_N, np.float32), float(losses @ tokens / tokens.sum()), float(tokens.sum())

    def _works(self, round_number: int, local: TrainConfig) -> list[UserWork]:
        name = f"round {round_number} shard {self.number}"
        if self.federated.client == "shard":
            examples = [example for own in self.examples.values() for example in own]
            return [plan_user(name, user_seed(self.config.seed, name), examples, local)] if examples else []
        return [
            plan_user(user_id, user_seed(self.config.seed, f"{name} user {user_id}"), own, local)
            for user_id, own in self.examples.items()
            if own and is_drawn(self.key, f"round {round_number} user {user_id}", self.federated.client_share)
        ]

    def _backward(self, start: Arrays) -> Backward:
        begin = stack_values(start)

        def backward(
            bank: AdapterBank, examples: Mapping[int, Sequence[Example]], train: TrainConfig, step: int
        ) -> tuple[dict[int, float], dict[int, int]]:
            counted = backward_step(bank, examples, train, step)
            for name, stack in bank.stacks().items():
                assert stack.grad is not None
                if self.federated.method == "ffa" and name.endswith(".a"):
                    stack.grad.zero_()
                elif self.federated.prox:
                    stack.grad += self.federated.prox * (stack.value - begin[name].to(stack.value))
            return counted

        return backward


def stack_values(adapter: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """An adapter's arrays by the names of the bank's stacks."""
    parts = {key: "a" if ".lora_A." in key else "b" for key in adapter}
    return {f"{linear_name(key)}.{parts[key]}": torch.from_numpy(array) for key, array in adapter.items()}


def starting_from(adapter: Mapping[str, np.ndarray]) -> UserState:
    """A user who has the adapter and has not taken a step."""
    tensors = dict[str, torch.Tensor]()
    for name, value in stack_values(adapter).items():
        tensors |= {f"{name}.value": value, f"{name}.mean": torch.zeros_like(value)}
        tensors[f"{name}.square"] = torch.zeros_like(value)
    return UserState(tensors, (), 0)


def frozen_part(residual: Mapping[str, np.ndarray], rest: Mapping[str, np.ndarray], factor: float) -> Arrays:
    """What is added to a shard's base in a round: the residual, and the directions above the shard's own rank."""
    added = dict(residual)
    for key_a, a_RI in rest.items():
        if ".lora_A." in key_a and len(a_RI):
            name = linear_name(key_a)
            product_OI = factor * (rest[key_a.replace(".lora_A.", ".lora_B.")] @ a_RI)
            added[name] = added[name] + product_OI if name in added else product_OI
    return added


@contextmanager
def shifted(model: nn.Module, added: Mapping[str, np.ndarray]) -> Iterator[None]:
    """The model with something added to its linears' weights; its own weights are not written to."""
    originals: dict[str, Any] = {name: model.get_submodule(name).weight for name in added}
    before = {name: weight.data for name, weight in originals.items()}
    try:
        for name, weight in originals.items():
            weight.data = (before[name].float() + torch.from_numpy(added[name]).to(weight.device)).to(weight.dtype)
        yield
    finally:
        for name, weight in originals.items():
            weight.data = before[name]


class Host:
    """Some shards in one process, over one base."""

    def __init__(self, config: Config, shards: Mapping[int, Sequence[str]], folder: Path, base: Base | None = None):
        base = base or open_base(config)
        index = read_index(Path(config.run_dir) / "prepare")
        self.shards = {
            number: Shard(config, number, user_ids, base, index, folder / f"shard-{number}.key")
            for number, user_ids in shards.items()
        }

    def ask(self, number: int, method: str, message: bytes, shared: bytes) -> bytes:
        """Call `Shard.<method>`; what goes wrong in it is an answer with `error`."""
        try:
            asked, _ = read_message(message)
            answer = getattr(self.shards[number], method)(asked, read_state(shared) if shared else None)
            return write_message(*answer)
        except ValueError as error:
            return write_message({"error": str(error)}, {})
        except Exception as error:  # out of memory, say: the round goes on without this shard
            return write_message({"error": reason_of(error)}, {})
