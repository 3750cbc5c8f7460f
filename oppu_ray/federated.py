"""The task adapter without shared text: rounds over shards that keep their users' histories (the arrow `adapt`).

In: prepared users and a base. Out: the task adapter, what method "product" adds to the base, and a record per round. A
round: the server sends its adapter to the shards drawn for it; each trains a few steps with `train_pack` and answers
with an update; the updates become the next adapter (`aggregation`), as sums only if asked (`secure`), under noise if
asked (`privacy`). A client's side is `shards.Shard`, the server's `train_rounds`; messages are bytes and are counted.
Every answer is checked once, where it arrives (`shard_answers`): what is wrong with it is a finding against the shard,
and the round goes on without it as long as enough shards remain.

Design: a round is a commit. Its state and its record are on disk before the next begins, and everything drawn at random
comes from the run's seed, the round and the shard: whatever is killed, the rounds that follow have the same bits, as
long as the same shards answer. Who answered is in the record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from oppu_ray.adapters import peft_dict, scaling
from oppu_ray.aggregation import (
    Arrays,
    RoundState,
    Update,
    check_sum,
    from_ring,
    moved,
    moved_by_products,
    screen,
    trained_keys,
    trimmed_mean,
    weighted_mean,
)
from oppu_ray.base_model import Base
from oppu_ray.config import Config
from oppu_ray.core import AdapterState, Pack, UserWork
from oppu_ray.files import write_atomic
from oppu_ray.packing import plan_shards
from oppu_ray.prepared import Index
from oppu_ray.privacy import epsilon
from oppu_ray.progress import ClusterLost, Progress
from oppu_ray.randomness import user_seed
from oppu_ray.secure import PublicKeys, Revealed, Unrecoverable, unmask
from oppu_ray.shard_answers import (
    Expected,
    dealt_shares,
    masked_update,
    open_update,
    public_keys,
    read_answer,
    revealed_shares,
)
from oppu_ray.shards import Host, Message, quorum, read_state, write_message, write_state
from oppu_ray.training import attached
from oppu_ray.workers import TASK_ADAPTER

MAX_TRIES = 3

logger = logging.getLogger(__name__)


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
    """One attempt at one round, as the server sees it.

    Args:
        barred: Shards whose part of an earlier attempt at this round made it fail: they are not asked again.
    """

    def __init__(self, config: Config, state: RoundState, hosts: Hosts, record: RoundRecord, barred: set[int]):
        self.config, self.state, self.hosts, self.record, self.barred = config, state, hosts, record, barred
        self.asked = [number for number in record.asked if number not in barred]
        self.min_shards = quorum(config.federated, len(record.asked))
        keys = trained_keys(state.adapter, config.federated.method)
        self.length = sum(state.adapter[key].size for key in keys)

    def run(self) -> RoundState:
        """Compute the next state.

        Raises:
            _TooFew: Too few shards answered.
            ClusterLost: The masked updates do not make a sum.
        """
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
        expected = open_update(self.length, np.float64 if federated.noise_multiplier else np.float32)
        answers = self._ask("train", {number: ({}, expected) for number in self.asked}, write_state(self._sent()))
        updates = [Update(number, arrays["delta"], head["weight"]) for number, (head, arrays) in answers.items()]
        counted, found = screen([update for update in updates if update.weight], federated)
        for number, reason in found.items():
            self._found(number, reason)
        empty = [update.shard for update in updates if not update.weight]
        record.took_part = sorted(empty + [update.shard for update in counted])
        if not counted and not found:
            return self._unmoved()
        # An update that no sum can hold is no answer; under noise each one brings its part of it.
        if not counted or len(counted if federated.noise_multiplier else record.took_part) < self.min_shards:
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
        answers = self._ask("keys", {number: (attempt, public_keys()) for number in self.asked})
        keys = {number: PublicKeys(**header) for number, (header, _) in answers.items()}
        peers = {number: [key.hex() for key in astuple(own)] for number, own in keys.items()}
        asking = {**attempt, "peers": peers, "threshold": self.min_shards}
        answers = self._ask("shares", {number: (asking, dealt_shares(keys)) for number in keys})
        dealt = {number: header["shares"] for number, (header, _) in answers.items()}
        inboxes = {number: {dealer: own[number].hex() for dealer, own in dealt.items()} for number in dealt}
        expected = masked_update(self.length)
        answers = self._ask(
            "train",
            {number: ({**attempt, "inbox": inbox}, expected) for number, inbox in inboxes.items()},
            write_state(self._sent()),
        )
        self.record.took_part = stayed = sorted(answers)
        left = sorted(dealt.keys() - answers.keys())
        total = np.zeros(self.length + 2, np.uint64)
        for _, arrays in answers.values():
            total += arrays["masked"]
        asking = {**attempt, "stayed": stayed}
        answers = self._ask(
            "reveal", {number: (asking, revealed_shares(number, stayed, left, dealt)) for number in stayed}
        )
        revealed = {number: Revealed(**header) for number, (header, _) in answers.items()}
        for number, own in revealed.items():
            if unopened := sorted(dealer for dealer, share in (own.seeds | own.keys).items() if not share):
                self._found(number, f"could not open what the shards {unopened} dealt to it")
        try:
            total = unmask(total, stayed, left, keys, revealed, self.min_shards, attempt["attempt"].encode())
        except Unrecoverable as error:
            for number, reason in error.reasons.items():
                self._found(number, reason)
            self.barred.update(error.reasons)
            raise _TooFew from error
        try:
            check_sum(total, len(stayed))
        except ValueError as error:
            # Trying without one shard after another would tell, but give away updates as differences of two sums.
            raise ClusterLost(
                f"round {self.state.num_rounds}: the masked updates of the shards {stayed} do not make a sum ({error});"
                " one of them is not masked as was agreed, and only single updates could tell which"
            ) from error
        return total

    def _sent(self) -> RoundState:
        return replace(self.state, mean={}, square={})

    def _ask(
        self, method: str, questions: Mapping[int, tuple[Mapping[str, Any], Expected]], shared: bytes = b""
    ) -> dict[int, Message]:
        """Ask, count the bytes, and note whose answer is missing or not as expected.

        Raises:
            _TooFew: Fewer answers are left than must be.
        """
        messages = {number: write_message(header, {}) for number, (header, _) in questions.items()}
        replies, missing = self.hosts.ask(method, messages, shared)
        up, down = self.record.bytes_up, self.record.bytes_down
        answers = {}
        for number, (_, expected) in sorted(questions.items()):
            down[number] = down.get(number, 0) + len(messages[number]) + len(shared)
            if number not in replies:
                self._found(number, missing.get(number, "did not answer"))
                continue
            reply = replies[number]
            try:
                answers[number] = read_answer(reply, expected)
            except ValueError as error:
                self._found(number, str(error))
            up[number] = up.get(number, 0) + (len(reply) if isinstance(reply, bytes) else 0)
        if len(answers) < self.min_shards:
            raise _TooFew
        return answers

    def _found(self, number: int, reason: str) -> None:
        logger.warning("round %d, shard %d: %s", self.state.num_rounds, number, reason)
        self.record.found[number] = reason


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
    if config.base.quantization != "none" and (federated.method == "product" or federated.ranks):
        raise ValueError(
            f"base.quantization is {config.base.quantization!r}, and method product and ranks add to the base's "
            "weights; expected base.quantization=none, or federated.method=ffa or naive without federated.ranks"
        )
    if federated.secure and num_asked < 2:
        raise ValueError(
            f"federated.secure: a round asks {num_asked} of {federated.num_shards} shards, and a sum of one is its "
            "update; expected at least 2: raise federated.num_shards or federated.client_share"
        )
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
        ClusterLost: Too few shards answered, `MAX_TRIES` times over, or masked updates made no sum. Earlier rounds are
            kept, and the same command goes on from them.
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
    """The next state and the round's record; nothing is written.

    Raises:
        ClusterLost: As `train_rounds`.
    """
    started = time.monotonic()
    record = RoundRecord(state.num_rounds, draw_shards(config, state.num_rounds))
    barred = set[int]()
    while True:
        try:
            after = _Round(config, state, hosts, record, barred).run()
            record.elapsed_s = time.monotonic() - started
            return after, record
        except _TooFew:
            if record.num_tries >= MAX_TRIES + len(barred):
                found = "; ".join(f"shard {number}: {reason}" for number, reason in sorted(record.found.items()))
                raise ClusterLost(
                    f"round {state.num_rounds} had too few answers {record.num_tries} times: {found}"
                ) from None
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
    federated, shards = config.federated, plan_base_shards(config, index)
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]
    num_parts = federated.num_shards if federated.split == "items" else 1  # a shard's part of everybody's items
    text = {number: sum(index.entries[user].length for user in own) // num_parts for number, own in shards.items()}
    if federated.noise_multiplier:  # nothing of the users that has no noise
        text = {}
    up = {number: sum(record["bytes_up"].get(str(number), 0) for record in records) for number in shards}
    down = {number: sum(record["bytes_down"].get(str(number), 0) for record in records) for number in shards}
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
    text = list(summary["bytes_text"].values())
    lines = [
        f"{len(summary['rounds'])} rounds over {len(summary['bytes_up'])} shards; at most {most / 1e6:.1f} MB left a "
        "shard, none of it text" + (f" (a shard's text is {sum(text) / len(text) / 1e6:.2f} MB)" if text else "")
    ]
    lines += [f"round {one['round']}, shard {one['shard']}: {one['reason']}" for one in summary["found"]]
    if privacy := summary.get("privacy"):
        lines.append(
            f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g}, for any one user's whole history"
        )
    return "\n".join(lines)


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"round-{number:05d}.{suffix}"
