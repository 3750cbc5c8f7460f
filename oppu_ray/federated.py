"""The task adapter without shared text: rounds over shards that keep their users' histories (the arrow `adapt`).

In: prepared users and a base. Out: the task adapter, what method "product" adds to the base, and a record per round. A
round: the server sends its adapter to the shards drawn for it; each trains a few steps with `train_pack` and answers
with an update; the updates become the next adapter (`aggregation`), as sums only if asked (`secure`), under noise if
asked (`privacy`). `Shard` is a client's side, `train_rounds` the server's; messages are bytes, and these are counted.

The decision a reader would question: a round is a commit. Its state and its record are on disk before the next begins,
and everything drawn at random comes from the run's seed, the round and the shard: whatever is killed, the rounds that
follow have the same bits, as long as the same shards answer. Who answered is in the record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import nn

from oppu_ray.adapters import AdapterBank, peft_dict, scaling
from oppu_ray.aggregation import (
    Arrays,
    RoundState,
    Update,
    cut_rank,
    flatten,
    from_ring,
    join_rank,
    linear_name,
    moved,
    moved_by_products,
    screen,
    to_ring,
    trained_keys,
    trimmed_mean,
    weighted_mean,
)
from oppu_ray.base_model import Base
from oppu_ray.config import Config, FederatedConfig, TrainConfig
from oppu_ray.core import AdapterState, Example, Pack, TrainResult, UserWork
from oppu_ray.files import write_atomic
from oppu_ray.packing import plan_shards, plan_user, user_seed
from oppu_ray.prepared import Index, read_index
from oppu_ray.privacy import clipped, epsilon, gaussian, is_drawn, noise_key
from oppu_ray.progress import ClusterLost, Progress
from oppu_ray.secure import Party, PublicKeys, Revealed, unmask
from oppu_ray.training import Backward, PackState, UserState, attached, backward_step, learning_rate, train_pack
from oppu_ray.workers import TASK_ADAPTER, encode_base_users, open_base, reason_of

MAX_TRIES = 3

logger = logging.getLogger(__name__)
Message = tuple[dict[str, Any], Arrays]


def write_message(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A message or a state as one safetensors file in memory, with the header as its metadata."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"header": json.dumps(header)})


def read_message(content: bytes) -> Message:
    """The inverse of `write_message`."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"]), load(content)


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
        0: neither says anything about a user.

        Raises:
            ValueError: Training broke down.
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
                total_N += clipped(delta_N, federated.clip_norm)
            # Every shard adds its part of the noise, so that the sum has enough of it if only so many answer.
            least = quorum(federated, federated.num_shards)
            std = federated.noise_multiplier * federated.clip_norm / math.sqrt(least)
            # Of this very state: were it of the round alone, a round run again from another would show it twice.
            name = f"round {state.num_rounds} {hashlib.sha256(write_state(state)).hexdigest()}"
            total_N += gaussian(self.key, name, len(total_N), std)
            weight = federated.client_share * len(self.examples)
            return (total_N / weight).astype(np.float32), 0.0, weight
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
        if config.workers.threads:
            torch.set_num_threads(config.workers.threads)
        base = base or open_base(config)
        index = read_index(Path(config.run_dir) / "prepare")
        self.shards = {
            number: Shard(config, number, user_ids, base, index, folder / f"shard-{number}.key")
            for number, user_ids in shards.items()
        }

    def ask(self, number: int, method: str, message: bytes, shared: bytes) -> bytes:
        """Call `Shard.<method>`; what goes wrong in it is an answer with `error`."""
        asked, _ = read_message(message)
        try:
            answer = getattr(self.shards[number], method)(asked, read_state(shared) if shared else None)
        except ValueError as error:
            answer = {"error": str(error)}, {}
        except Exception as error:  # out of memory, say: the round goes on without this shard
            answer = {"error": reason_of(error)}, {}
        return write_message(*answer)


class Hosts(Protocol):
    """Where shards live: `LocalHosts`, or `shard_actors.ActorHosts`."""

    def ask(self, method: str, messages: Mapping[int, bytes], shared: bytes) -> tuple[dict[int, bytes], dict[int, str]]:
        """Each shard's answer to its message and to what all are sent, and why any did not answer."""
        ...

    def close(self) -> None: ...


class LocalHosts:
    """All shards in this process, one after another."""

    def __init__(self, config: Config, shards: Mapping[int, Sequence[str]], folder: Path, base: Base):
        self.host = Host(config, shards, folder, base)

    def ask(self, method: str, messages: Mapping[int, bytes], shared: bytes) -> tuple[dict[int, bytes], dict[int, str]]:
        return {number: self.host.ask(number, method, message, shared) for number, message in messages.items()}, {}

    def close(self) -> None:
        pass


@dataclass
class RoundRecord:
    """What is kept of a round. Bytes are of the messages, by shard.

    Args:
        asked, took_part: The shards that were drawn, and those whose update counts.
        found: Shard -> what went wrong: it was left out, its update cut to size, or it was lost when that was sent.
        weight: Tokens trained on; under noise, users expected to be drawn.
        loss: Mean over the shards' steps, in nats per completion token.
        num_tries: How often the round was tried until enough shards answered.
    """

    number: int
    asked: list[int]
    took_part: list[int] = field(default_factory=list)
    found: dict[int, str] = field(default_factory=dict)
    weight: float = 0.0
    loss: float = 0.0
    num_tries: int = 1
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0


class _TooFew(Exception):
    """Fewer shards answered than must."""


class _Round:
    """One attempt at one round, as the server sees it."""

    def __init__(self, config: Config, state: RoundState, hosts: Hosts, record: RoundRecord):
        self.config, self.state, self.hosts, self.record = config, state, hosts, record
        self.min_shards = quorum(config.federated, len(record.asked))

    def run(self) -> RoundState:
        """The next state. `_TooFew` if too few shards answer."""
        if self.config.federated.secure:
            mean_N, self.record.weight = from_ring(self._secure_sum())
            if not self.record.weight:
                return self._unmoved()
            self.record.loss = float(mean_N[-1])
            return moved(self.state, mean_N[:-1], self.config.federated)
        return self._open()

    def _unmoved(self) -> RoundState:
        """The next state when nobody was drawn."""
        return replace(self.state, num_rounds=self.state.num_rounds + 1)

    def _open(self) -> RoundState:
        federated, record = self.config.federated, self.record
        answers = self._ask("train", {number: {} for number in record.asked}, write_state(self._sent()))
        updates = [Update(number, arrays["delta"], head["weight"]) for number, (head, arrays) in answers.items()]
        counted, found = screen([update for update in updates if update.weight], federated)
        for number, reason in found.items():
            self._found(number, reason)
        empty = [update.shard for update in updates if not update.weight]
        record.took_part = sorted(empty + [update.shard for update in counted])
        if not counted and not found:
            return self._unmoved()
        if not counted:
            raise _TooFew
        updates = counted
        record.weight = sum(update.weight for update in updates)
        losses = sum(answers[update.shard][0]["loss"] * update.weight for update in updates)
        record.loss = losses / record.weight
        if federated.method == "product":
            return moved_by_products(self.state, updates, scaling(self.config.adapt.peft))
        mean_N = trimmed_mean(updates, federated.trim_share) if federated.robust == "trim" else weighted_mean(updates)
        return moved(self.state, mean_N, federated)

    def _secure_sum(self) -> np.ndarray:
        attempt = {"attempt": secrets.token_hex(16)}
        answers = self._ask("keys", {number: attempt for number in self.record.asked})
        pairs = {number: [head["mask"], head["cipher"]] for number, (head, _) in answers.items()}
        header = {**attempt, "peers": pairs, "threshold": self.min_shards}
        answers = self._ask("shares", {number: header for number in answers})
        shares = {number: head["shares"] for number, (head, _) in answers.items()}
        headers = {
            number: {
                **attempt,
                "inbox": {sender: own[str(number)] for sender, own in shares.items()},
            }
            for number in shares
        }
        answers = self._ask("train", headers, write_state(self._sent()))
        stayed = sorted(answers)
        total = np.zeros_like(answers[stayed[0]][1]["masked"])
        for _, arrays in answers.values():
            total += arrays["masked"]
        answers = self._ask("reveal", {number: {**attempt, "stayed": stayed} for number in stayed})
        revealed = {
            number: Revealed(
                *({int(of): bytes.fromhex(s) for of, s in head[kind].items()} for kind in ("seeds", "keys"))
            )
            for number, (head, _) in answers.items()
        }
        self.record.took_part = stayed
        keys = {number: PublicKeys(*map(bytes.fromhex, pair)) for number, pair in pairs.items()}
        left = sorted(shares.keys() - set(stayed))
        return unmask(total, stayed, left, keys, revealed, self.min_shards, attempt["attempt"].encode())

    def _sent(self) -> RoundState:
        return replace(self.state, mean={}, square={})

    def _ask(self, method: str, headers: Mapping[int, Mapping[str, Any]], shared: bytes = b"") -> dict[int, Message]:
        """Ask, count the bytes, and note who did not answer."""
        messages = {number: write_message(header, {}) for number, header in headers.items()}
        replies, missing = self.hosts.ask(method, messages, shared)
        up, down = self.record.bytes_up, self.record.bytes_down
        for number, message in messages.items():
            down[number] = down.get(number, 0) + len(message) + len(shared)
        for number, reason in missing.items():
            self._found(number, reason)
        answers = {}
        for number in sorted(replies):
            up[number] = up.get(number, 0) + len(replies[number])
            header, arrays = read_message(replies[number])
            if "error" in header:
                self._found(number, header["error"])
            else:
                answers[number] = header, arrays
        if len(answers) < self.min_shards:
            raise _TooFew
        return answers

    def _found(self, number: int, reason: str) -> None:
        logger.warning("round %d, shard %d: %s", self.state.num_rounds, number, reason)
        self.record.found[number] = reason


def quorum(federated: FederatedConfig, num_asked: int) -> int:
    """How many of the shards asked must answer."""
    return federated.min_shards or math.ceil(2 * num_asked / 3)


def plan_base_shards(config: Config, index: Index) -> dict[int, tuple[str, ...]]:
    """Shard -> its base users, balanced by words.

    Raises:
        ValueError: The config does not fit federated training, or there are fewer base users than shards.
    """
    federated, sizes = config.federated, sorted(index.sizes("base"), key=lambda size: size.user_id)
    num_asked = len(draw_shards(config, 0))
    threshold = quorum(federated, num_asked)
    if config.adapt.peft.kind != "lora":
        raise ValueError(f"adapt.peft.kind is {config.adapt.peft.kind!r}; expected lora for federated training")
    if config.base.deepspeed:
        raise ValueError("base.deepspeed gives every rank all base users; expected it empty with federated.num_shards")
    if not 1 <= threshold <= num_asked or (federated.secure and not num_asked < 2 * threshold):
        least = "more than half, at most all" if federated.secure else "1 to all"
        raise ValueError(f"federated.min_shards is {threshold}; expected {least} of the {num_asked} asked in a round")
    if bad := [rank for rank in federated.ranks if not 1 <= rank <= config.adapt.peft.rank]:
        raise ValueError(f"federated.ranks has {bad[0]}; expected 1 to adapt.peft.rank {config.adapt.peft.rank}")
    if len(sizes) < federated.num_shards:
        raise ValueError(f"federated.num_shards is {federated.num_shards}, but there are {len(sizes)} base users")
    if federated.split == "items":
        return {number: tuple(size.user_id for size in sizes) for number in range(federated.num_shards)}
    packs = [Pack(number, (size.user_id,), size.num_words) for number, size in enumerate(sizes)]
    shards = plan_shards(packs, federated.num_shards)
    return {number: tuple(pack.user_ids[0] for pack in own) for number, own in enumerate(shards)}


def draw_shards(config: Config, round_number: int) -> list[int]:
    """The shards that are asked in a round: all of them where users are drawn."""
    federated = config.federated
    numbers = range(federated.num_shards)
    if federated.client == "user":
        return list(numbers)
    num = max(1, round(federated.client_share * federated.num_shards))
    return sorted(random.Random(user_seed(config.seed, f"shards of round {round_number}")).sample(numbers, num))


def train_rounds(
    config: Config, index: Index, base: Base, folder: Path, progress: Progress
) -> tuple[AdapterState, Arrays]:
    """Train the task adapter in rounds, from the last one that `folder` has; (adapter, residual for the base).

    Raises:
        ValueError: The config does not fit, or shards' training breaks down.
        ClusterLost: Too few shards answered, `MAX_TRIES` times over. Earlier rounds are kept.
    """
    shards = plan_base_shards(config, index)
    folder.mkdir(parents=True, exist_ok=True)
    state = load_state(folder) or RoundState(0, initial_adapter(config, base))
    progress.advance(state.num_rounds, 0)
    if config.workers.num_workers:
        from oppu_ray.shard_actors import ActorHosts  # and Ray with it

        hosts: Hosts = ActorHosts(config, shards, folder, progress.tick)
    else:
        hosts = LocalHosts(config, shards, folder, base)
    try:
        while state.num_rounds < config.federated.num_rounds:
            state, record = _run_round(config, state, hosts)
            commit_round(folder, state, record)
            progress.advance(1, 0 if config.federated.noise_multiplier else round(record.weight))
    finally:
        hosts.close()
    return AdapterState(state.adapter, peft_dict(config.adapt.peft)), state.residual


def _run_round(config: Config, state: RoundState, hosts: Hosts) -> tuple[RoundState, RoundRecord]:
    started = time.monotonic()
    record = RoundRecord(state.num_rounds, draw_shards(config, state.num_rounds))
    while True:
        try:
            after = _Round(config, state, hosts, record).run()
            record.elapsed_s = time.monotonic() - started
            return after, record
        except _TooFew:
            if record.num_tries == MAX_TRIES:
                found = "; ".join(f"shard {number}: {reason}" for number, reason in sorted(record.found.items()))
                raise ClusterLost(f"round {state.num_rounds} had too few answers {MAX_TRIES} times: {found}") from None
            record.num_tries += 1


def initial_adapter(config: Config, base: Base) -> Arrays:
    """The adapter that the first round starts from: that of centralised training."""
    work = UserWork(TASK_ADAPTER, user_seed(config.seed, TASK_ADAPTER), config.adapt.peft, ())
    with attached(base.model, [work], config.adapt) as bank:
        bank.start(0, work.peft, work.seed)
        return bank.export(0).tensors


def commit_round(folder: Path, state: RoundState, record: RoundRecord) -> None:
    """Write a round's state, then its record, which makes it count; the state before it is kept, older ones go."""
    content = write_state(state)
    write_atomic(_path(folder, record.number, "safetensors"), content)
    body = {**asdict(record), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomic(_path(folder, record.number, "json"), json.dumps(body, indent=1).encode())
    for path in sorted(folder.glob("round-*.safetensors"))[:-2]:
        path.unlink()


def load_state(folder: Path) -> RoundState | None:
    """The state after the newest whole round; what is damaged is passed over with a warning."""
    for path in sorted(folder.glob("round-*.json"), reverse=True):
        state_path = path.with_suffix(".safetensors")
        try:
            content = state_path.read_bytes()
            if hashlib.sha256(content).hexdigest() == json.loads(path.read_text())["sha256"]:
                return read_state(content)
            logger.warning("%s: is damaged, and its round is run again", state_path)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: is no whole round, and is run again: %r", path, error)
    return None


def drop_states(folder: Path) -> None:
    """Leave only the records: the adapter is in the task base now. The noise keys go, too."""
    for pattern in ("round-*.safetensors", "shard-*.key"):
        for path in folder.glob(pattern):
            path.unlink()


def summarise_rounds(config: Config, index: Index, folder: Path) -> dict[str, Any]:
    """What `result.json` says of the rounds in a folder; see the README."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]
    shards = plan_base_shards(config, index)
    text = {number: sum(index.entries[user].length for user in users) for number, users in shards.items()}
    up = {number: sum(record["bytes_up"].get(str(number), 0) for record in records) for number in shards}
    down = {number: sum(record["bytes_down"].get(str(number), 0) for record in records) for number in shards}
    federated = config.federated
    summary: dict[str, Any] = {
        "bytes_text": text,
        "bytes_up": up,
        "bytes_down": down,
        "losses": [record["loss"] for record in records],
        "weights": [record["weight"] for record in records],
        "found": [
            {"round": record["number"], "shard": int(number), "reason": reason}
            for record in records
            for number, reason in record["found"].items()
        ],
        "rounds": records,
    }
    if federated.noise_multiplier:
        cost = epsilon(federated.noise_multiplier, federated.client_share, len(records), federated.delta)
        summary["privacy"] = {"unit": "user", "epsilon": cost, "delta": federated.delta}
    return summary


def format_summary(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    most = max(summary["bytes_up"].values())
    text = sum(summary["bytes_text"].values()) / len(summary["bytes_text"])
    lines = [
        f"{len(summary['rounds'])} rounds over {len(summary['bytes_up'])} shards; at most {most / 1e6:.1f} MB left a "
        f"shard, none of it text (a shard's text is {text / 1e6:.2f} MB)"
    ]
    lines += [f"round {one['round']}, shard {one['shard']}: {one['reason']}" for one in summary["found"]]
    if privacy := summary.get("privacy"):
        lines.append(
            f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g}, for any one user's whole history"
        )
    return "\n".join(lines)


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"round-{number:05d}.{suffix}"
