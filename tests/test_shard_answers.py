"""A shard that answers nonsense, at any step: it is named, left out, and the round is that of the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from oppu_ray.aggregation import RoundState, to_ring
from oppu_ray.config import Config, FederatedConfig
from oppu_ray.federated import RoundRecord, _run_round, commit_round, load_state
from oppu_ray.progress import ClusterLost
from oppu_ray.secure import MESSAGE_BYTES, Party, PublicKeys, share_digest, share_secret
from oppu_ray.shards import Message, read_message, write_message

PREFIX = "base_model.model.l"
STATE = RoundState(
    0,
    {
        f"{PREFIX}.lora_A.weight": np.zeros((2, 3), np.float32),
        f"{PREFIX}.lora_B.weight": np.zeros((3, 2), np.float32),
    },
)
LENGTH, NUM, BAD = 12, 5, 0
Change = Callable[[str, Message], Message | Any]
"""(method, honest answer) -> what is answered instead: a message, or anything else in the place of its bytes."""


class FakeHosts:
    """Five shards without a model, whose update is 1 for shard 1, 2 for shard 2 ...; shard 0's answers are changed.

    Args:
        leave: Shard -> the first step that it does not answer.
    """

    def __init__(self, change: Change, leave: Mapping[int, str] | None = None):
        self.change, self.leave = change, leave or {}
        self.parties: dict[int, Party] = {}
        self.asked: list[tuple[str, list[int]]] = []

    def ask(self, method: str, messages: Mapping[int, bytes], shared: bytes) -> tuple[dict[int, Any], dict[int, str]]:
        self.asked.append((method, sorted(messages)))
        gone = [number for number in messages if self.leave.get(number) == method]
        replies: dict[int, Any] = {}
        for number, message in messages.items():
            if number not in gone:
                answer: Any = self.answer(number, method, read_message(message)[0])
                answer = self.change(method, answer) if number == BAD else answer
                replies[number] = write_message(*answer) if isinstance(answer, tuple) else answer
        return replies, dict.fromkeys(gone, "was lost")

    def answer(self, number: int, method: str, asked: dict[str, Any]) -> Message:
        delta = np.full(LENGTH, number, np.float32)
        if method == "keys":
            self.parties[number] = Party(number, asked["attempt"].encode())
            return {name: key.hex() for name, key in asdict(self.parties[number].public_keys()).items()}, {}
        if method == "shares":
            peers = {int(peer): PublicKeys(*map(bytes.fromhex, keys)) for peer, keys in asked["peers"].items()}
            dealt = self.parties[number].share(peers, asked["threshold"])
            return {"shares": {str(peer): message.hex() for peer, message in dealt.items()}}, {}
        if method == "train" and "inbox" in asked:
            inbox = {int(dealer): bytes.fromhex(message) for dealer, message in asked["inbox"].items()}
            return {}, {"masked": self.parties[number].mask(to_ring(np.append(delta, np.float32(1)), 2.0), inbox)}
        if method == "train":
            return {"loss": 1.0, "weight": 2.0}, {"delta": delta}
        revealed = asdict(self.parties[number].reveal(asked["stayed"]))
        return {kind: {str(peer): share.hex() for peer, share in own.items()} for kind, own in revealed.items()}, {}

    def close(self) -> None:
        pass


def run(
    change: Change, secure: bool, leave: Mapping[int, str] | None = None, num: int = NUM, **options: Any
) -> tuple[float, RoundRecord, FakeHosts]:
    """The mean update of a round, its record, and the shards that it was played with."""
    config = Config(federated=FederatedConfig(num_shards=num, secure=secure, method="naive", **options))
    hosts = FakeHosts(change, leave)
    after, record = _run_round(config, STATE, hosts)
    values = np.concatenate([array.reshape(-1) for array in after.adapter.values()])
    assert np.allclose(values, values[0])
    return float(values[0]), record, hosts


def at(step: str, header: Mapping[str, Any] = {}, arrays: Mapping[str, Any] = {}, drop: str = "") -> Change:  # noqa: B006
    """At one step: these values and arrays in the place of those of the same names, and `drop` not at all."""

    def change(method: str, answer: Message) -> Message:
        if method != step:
            return answer
        parts = [{key: value for key, value in (*old.items(), *new.items()) if key != drop}
                 for old, new in zip(answer, (header, arrays), strict=True)]  # fmt: skip
        return parts[0], parts[1]

    return change


def instead(step: str, reply: Any) -> Change:
    return lambda method, answer: reply if method == step else answer


def each(step: str, name: str, value: Callable[[str, str], str | None]) -> Change:
    """At one step: another value for every shard in an object of the header, by its number and value; None drops it."""

    def change(method: str, answer: Message) -> Message:
        if method != step:
            return answer
        changed = {peer: value(peer, own) for peer, own in answer[0][name].items()}
        return {**answer[0], name: {peer: own for peer, own in changed.items() if own is not None}}, answer[1]

    return change


def no_change(_method: str, answer: Message) -> Message:
    return answer


NO_MESSAGES = {
    "empty": b"",
    "cut": write_message({"loss": 1.0}, {"delta": np.ones(LENGTH, np.float32)})[:-7],
    "noise": bytes(range(256)),
    "deep": len(b"x").to_bytes(8, "little") + b"[" * 3000,
    "nested": save({}, {"header": "[" * 3000}),
    "no header": save({"delta": np.ones(LENGTH, np.float32)}),
    "a list": save({}, {"header": "[]"}),
    "text": "text",
    "nothing": None,
    "huge": write_message({}, {"delta": np.ones(10**6, np.float32)}),
    "long": write_message({"error": "x" * 10**5}, {}),
    "error that is no line": write_message({"error": "two\nlines"}, {}),
    "error that is no text": write_message({"error": {"a": 1}}, {}),
}


@pytest.mark.parametrize("name", NO_MESSAGES)
@pytest.mark.parametrize(("secure", "step"), [(False, "train"), *((True, s) for s in ("keys", "shares", "train"))])
def test_what_is_no_message_is_a_finding(name: str, secure: bool, step: str) -> None:
    mean, record, _ = run(instead(step, NO_MESSAGES[name]), secure)
    assert mean == 2.5 and record.took_part == [1, 2, 3, 4] and list(record.found) == [BAD]
    assert record.num_tries == 1 and record.found[BAD].isprintable() and len(record.found[BAD]) < 400


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_what_is_no_message_when_shares_are_revealed_is_a_finding(name: str) -> None:
    mean, record, _ = run(instead("reveal", NO_MESSAGES[name]), True)
    assert mean == 2.0 and record.took_part == [0, 1, 2, 3, 4] and list(record.found) == [BAD]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (at("train", arrays={"delta": np.ones(3, np.float32)}), "its delta is float32 [3]; expected float32 [12]"),
        (at("train", arrays={"delta": np.ones((1, 12), np.float32)}), "its delta is float32 [1, 12]"),
        (at("train", arrays={"delta": np.ones(12, np.float64)}), "its delta is float64 [12]"),
        (at("train", arrays={"delta": np.ones(12, np.int32)}), "its delta is int32 [12]"),
        (at("train", drop="delta"), "its answer has the arrays []; expected ['delta']"),
        (at("train", arrays={"more": np.ones(1)}), "its answer has the arrays ['delta', 'more']"),
        (at("train", drop="loss"), "its answer has the values ['weight']; expected ['loss', 'weight']"),
        (at("train", {"more": 1}), "its answer has the values ['loss', 'more', 'weight']"),
        (at("train", {"weight": "many"}), "its weight: 'many'; expected a number"),
        (at("train", {"weight": None}), "its weight: None"),
        (at("train", {"weight": True}), "its weight: True"),
        (at("train", {"weight": [1.0]}), "its weight: [1.0]"),
        (at("train", {"weight": float("nan")}), "its weight: nan"),
        (at("train", {"weight": float("inf")}), "its weight: inf"),
        (at("train", {"weight": 10**400}), "its weight: 10000"),
        (at("train", {"weight": -1.0}), "its weight is -1"),
        (at("train", {"weight": 1e30}), "its weight is 1e+30"),
        (at("train", {"loss": "low"}), "its loss: 'low'"),
        (at("train", {"loss": float("nan")}), "its loss: nan"),
        (at("train", arrays={"delta": np.full(12, np.nan, np.float32)}), "its update is not finite"),
        (at("train", arrays={"delta": np.full(12, 1e33, np.float32)}), "too large for a sum"),
        (at("train", {"error": "out of memory"}), "out of memory"),
    ],
)
@pytest.mark.parametrize("robust", ["none", "clip", "trim"])
def test_an_open_update_that_is_not_as_expected_is_a_finding(change: Change, reason: str, robust: str) -> None:
    mean, record, _ = run(change, False, robust=robust)
    assert mean == 2.5 and record.took_part == [1, 2, 3, 4]
    assert list(record.found) == [BAD] and reason in record.found[BAD]


ZEROS, ONE = "00" * 32, "01" + "00" * 31  # both of low order: no exchange has a result
SECURE = [
    (at("keys", {"mask": "ff" * 31}), "its mask: 'ffff"),
    (at("keys", {"cipher": "ff" * 33}), "its cipher: 'ffff"),
    (at("keys", {"mask": "zz" * 32}), "its mask: 'zz"),
    (at("keys", {"mask": 7}), "its mask: 7; expected 32 bytes in hex"),
    (at("keys", {"mask": " ".join(["ff"] * 22)}), "its mask: 'ff ff"),
    (at("keys", {"mask": ZEROS}), "is of low order"),
    (at("keys", {"cipher": ONE}), "is of low order"),
    (at("keys", {"seed": "00"}), "its seed: '00'; expected 32 bytes in hex"),
    (at("keys", drop="cipher"), "its answer has the values ['mask', 'seed']"),
    (each("shares", "shares", lambda *_: "zz"), "its shares: of shard 0: 'zz'; expected 224 bytes in hex"),
    (each("shares", "shares", lambda _, own: own[:-2]), "expected 224 bytes in hex"),
    (each("shares", "shares", lambda _, own: own + "00"), "expected 224 bytes in hex"),
    (each("shares", "shares", lambda peer, own: own if peer != "2" else None), "its shares: of the shards ['0', '1',"),
    (at("shares", {"shares": {}}), "its shares: of the shards []; expected [0, 1, 2, 3, 4]"),
    (at("shares", {"shares": {f"{n:02d}": "00" * MESSAGE_BYTES for n in range(5)}}), "its shares: of the shards ['00'"),
    (at("shares", {"shares": ["00"]}), "its shares: of the shards ['00']"),
    (at("train", arrays={"masked": np.zeros(13, np.uint64)}), "its masked is uint64 [13]; expected uint64 [14]"),
    (at("train", arrays={"masked": np.zeros(14, np.int64)}), "its masked is int64 [14]"),
    (at("train", arrays={"masked": np.full(14, np.nan)}), "its masked is float64 [14]"),
    (at("train", drop="masked"), "its answer has the arrays []; expected ['masked']"),
    (at("train", {"weight": 2.0}), "its answer has the values ['weight']; expected []"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), SECURE)
def test_a_masked_update_that_is_not_as_expected_is_a_finding(change: Change, reason: str) -> None:
    mean, record, hosts = run(change, True)
    assert mean == 2.5 and record.took_part == [1, 2, 3, 4] and record.num_tries == 1
    assert list(record.found) == [BAD] and reason in record.found[BAD]
    assert hosts.asked[-1] == ("reveal", [1, 2, 3, 4])  # it is not asked for what is left to be done


def flipped(_peer: str, own: str) -> str:
    return f"{own[:-1]}{'1' if own[-1] == '0' else '0'}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (each("reveal", "seeds", lambda *_: "ff" * 66), "its seeds: of shard 0: another share than was dealt to it"),
        (each("reveal", "seeds", lambda *_: "ff" * 67), "its seeds: of shard 0: 'ffff"),
        (each("reveal", "seeds", lambda *_: "zz"), "its seeds: of shard 0: 'zz'; expected 66 bytes in hex"),
        (each("reveal", "seeds", flipped), "another share than was dealt to it"),
        (each("reveal", "seeds", lambda peer, own: None if peer == "3" else own), "its seeds: of the shards"),
        (at("reveal", {"seeds": {}}), "its seeds: of the shards []; expected [0, 1, "),
        (at("reveal", {"keys": {"1": "00" * 66}}), "its keys: of the shards ['1']; expected ["),
        (at("reveal", drop="keys"), "its answer has the values ['seeds']"),
        (each("reveal", "seeds", lambda *_: ""), "could not open what the shards [0, 1, "),
    ],
)
@pytest.mark.parametrize("leaver", [None, 2])
def test_a_false_share_is_recognised_and_does_not_spoil_the_sum(
    change: Change, reason: str, leaver: int | None
) -> None:
    leave = {} if leaver is None else {leaver: "train"}
    mean, record, _ = run(change, True, leave, min_shards=3)
    stayed = [number for number in range(NUM) if number != leaver]
    assert mean == pytest.approx(np.mean(stayed)) and record.took_part == stayed and record.num_tries == 1
    assert reason in record.found[BAD] and record.found.keys() == {BAD, *leave}


class Dealer:
    """Deals shares that all have the right form, and are not those of one secret."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, method: str, answer: Message) -> Message:
        if method != "shares":
            return answer
        dealt = answer[0]["shares"]
        if self.kind == "garbage":
            return {"shares": {peer: "ab" * MESSAGE_BYTES for peer in dealt}}, {}
        if self.kind == "the same for all":
            return {"shares": dict.fromkeys(dealt, dealt["0"])}, {}
        return {"shares": {peer: flipped(peer, own) for peer, own in dealt.items()}}, {}


@pytest.mark.parametrize("kind", ["garbage", "the same for all", "changed"])
@pytest.mark.parametrize("leave", [{}, {BAD: "train"}, {BAD: "reveal"}])
def test_a_shard_whose_shares_do_not_open_is_not_in_the_next_attempt(kind: str, leave: dict[int, str]) -> None:
    mean, record, hosts = run(Dealer(kind), True, leave)
    assert mean == 2.5 and record.took_part == [1, 2, 3, 4] and record.num_tries == 2
    assert "of its shares could be opened; expected at least 4" in record.found[BAD]
    assert [numbers for method, numbers in hosts.asked if method == "keys"] == [[0, 1, 2, 3, 4], [1, 2, 3, 4]]
    assert all(f"could not open what the shards [{BAD}] dealt" in record.found[n] for n in record.found if n != BAD)


@pytest.mark.parametrize("leave", [{}, {BAD: "train"}])
def test_a_shard_that_deals_shares_of_another_secret_is_not_in_the_next_attempt(
    leave: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Party.share

    def another(self: Party, peers: Mapping[int, PublicKeys], threshold: int) -> dict[int, bytes]:
        honest = share(self, peers, threshold)
        if self.number != BAD:
            return honest
        false = share_secret(bytes(32), peers, threshold)
        return {peer: self._seal(peer, false[peer], false[peer]) for peer in peers}

    monkeypatch.setattr(Party, "share", another)
    mean, record, _ = run(no_change, True, leave)
    assert mean == 2.5 and record.took_part == [1, 2, 3, 4] and record.num_tries == 2
    assert record.found == {BAD: "its shares do not make the secret that it committed to"}


def test_a_single_share_that_does_not_open_costs_nothing() -> None:
    change = each("shares", "shares", lambda peer, own: flipped(peer, own) if peer == "3" else own)
    mean, record, _ = run(change, True)
    assert mean == 2.0 and record.took_part == [0, 1, 2, 3, 4] and record.num_tries == 1
    assert record.found == {3: "could not open what the shards [0] dealt to it"}


@pytest.mark.parametrize("step", ["shares", "train", "reveal"])
def test_who_leaves_while_another_answers_nonsense_is_recovered(step: str) -> None:
    change = each("reveal", "seeds", lambda *_: "00" * 66)
    mean, record, _ = run(change, True, {4: step}, num=6, min_shards=4)
    stayed = [0, 1, 2, 3, 5] if step != "reveal" else [0, 1, 2, 3, 4, 5]
    assert mean == pytest.approx(np.mean(stayed)) and record.took_part == stayed
    assert record.found == {0: record.found[0], 4: "was lost"} and "another share" in record.found[0]


def test_a_vector_that_was_not_masked_ends_the_round_at_once_and_says_so() -> None:
    """To find the shard by leaving out one after another would give away the updates of all, as differences of sums."""
    change = at("train", arrays={"masked": np.arange(14, dtype=np.uint64)})
    with pytest.raises(ClusterLost, match=r"masked updates of the shards \[0, 1, 2, 3, 4\] do not make a sum"):
        run(change, True)


@pytest.mark.parametrize("secure", [False, True])
def test_too_few_sound_answers_change_nothing_on_the_disk_and_the_run_goes_on(tmp_path: Path, secure: bool) -> None:
    commit_round(tmp_path, STATE, RoundRecord(-1, []))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ClusterLost, match=r"round 0 had too few answers 3 times: shard 0: .*; shard 4: was lost"):
        run(instead("train", b""), secure, {4: "train"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    state = load_state(tmp_path)
    assert state is not None and state.num_rounds == 0
    assert run(no_change, secure)[0] == 2.0


def test_what_a_shard_sends_does_not_get_into_the_log_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    text = "forged\n2026-01-01 round 0, shard 3: " + "x" * 1000
    with caplog.at_level(logging.WARNING):
        for change in (at("train", {"error": text}), at("train", {text: 1}), at("train", {"weight": text})):
            _, record, _ = run(change, False)
            assert len(record.found[BAD]) < 400 and record.found[BAD].isprintable()
            assert json.dumps(record.found)
    assert all("\n" not in line.getMessage() for line in caplog.records) and len(caplog.records) == 3


def test_a_digest_is_of_one_share_for_one_receiver() -> None:
    share = bytes(66)
    digests = {share_digest(kind, share, a, b) for kind in ("seed", "key") for a in (0, 1) for b in (0, 1)}
    assert len(digests) == 8
