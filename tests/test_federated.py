"""Federated rounds: what an aggregate is, what crosses, who is left out, and the same bits whatever is killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from line_tools import adapters, oppu, result, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import federated
from oppu_ray.adapters import scaling
from oppu_ray.aggregation import RING_STEP, Arrays, RoundState, flatten, linear_name, trained_keys, unflatten
from oppu_ray.base_model import Base, load_base
from oppu_ray.cli import main
from oppu_ray.config import Config, load_config
from oppu_ray.federated import LocalHosts, RoundRecord, load_state, plan_base_shards, summarise_rounds, train_rounds
from oppu_ray.prepared import read_index
from oppu_ray.progress import ClusterLost, Progress
from oppu_ray.shards import Shard, read_message, read_state, write_message
from oppu_ray.workers import open_base

CANARY = "xyzzyplugh"
NUM = 4
FEDERATED: dict[str, Any] = {"num_shards": NUM, "num_rounds": 3, "local_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a prepared run: eight base users of different sizes and tastes, two targets."""
    home = tmp_path_factory.mktemp("run")
    users = [tagging_user(n, 4 + n % 3, "base", CANARY) for n in range(10, 18)] + [tagging_user(n) for n in range(2)]
    path = write_config(home, folder, write_users(home / "users.jsonl", users), federated=FEDERATED)
    oppu("prepare", path)
    return path


@pytest.fixture(scope="module")
def base(prepared: Path) -> Base:
    return open_base(load_config(prepared))


@contextmanager
def tampered(change: Callable[[int, int, str, bytes], bytes | str | None]) -> Iterator[None]:
    """`change(round, shard, method, reply)` gives what arrives instead: bytes, or a str: why nothing does."""
    before = LocalHosts.ask

    def ask(
        self: LocalHosts, method: str, messages: Mapping[int, bytes], shared: bytes
    ) -> tuple[dict[int, bytes], dict[int, str]]:
        replies, missing = before(self, method, messages, shared)
        for number, reply in list(replies.items()):
            changed = change(read_state(shared).num_rounds if shared else -1, number, method, reply)
            if isinstance(changed, str):
                missing[number] = changed
                del replies[number]
            elif changed is not None:
                replies[number] = changed
        return replies, missing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalHosts, "ask", ask)
        yield


def configured(prepared: Path, **changes: Any) -> Config:
    config = load_config(prepared)
    return replace(config, federated=replace(config.federated, **changes))


def rounds(config: Config, base: Base, home: Path) -> tuple[Arrays, list[dict[str, Any]]]:
    """Train all rounds: the adapter (and what the base is given), and the records."""
    adapter, residual = train_rounds(config, read_index(Path(config.run_dir) / "prepare"), base, home, Progress())
    records = [json.loads(path.read_text()) for path in sorted(home.glob("round-*.json"))]
    return adapter.tensors | residual, records


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def shards_of(config: Config, base: Base, home: Path) -> dict[int, Shard]:
    index = read_index(Path(config.run_dir) / "prepare")
    plan = plan_base_shards(config, index)
    return {n: Shard(config, n, users, base, index, home / f"{n}.key") for n, users in plan.items()}


def first_state(config: Config, base: Base) -> RoundState:
    return RoundState(0, federated.initial_adapter(config, base))


def test_the_line_runs_on_a_federated_base(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = [tagging_user(n, role="base") for n in range(10, 16)] + [tagging_user(n) for n in range(2)]
    path = write_config(tmp_path, folder, write_users(tmp_path / "users.jsonl", users))
    oppu("run", path)
    central, central_adapters = result(path, "adapt"), adapters(path)
    options = [f"federated.{key}={value}" for key, value in FEDERATED.items()]
    oppu("run", path, *options)
    ours = result(path, "adapt")
    assert ours["fingerprints"]["task_base"] != central["fingerprints"]["task_base"]
    assert load_base(load_config(path).base, Path(ours["task_base"])).fingerprint == ours["fingerprints"]["task_base"]
    assert all(adapters(path)[user] != central_adapters[user] for user in central_adapters)
    assert {"task", "oppu"} <= result(path, "evaluate")["arms"].keys()
    summary = ours["federated"]
    assert len(summary["losses"]) == 3 and summary["losses"][-1] < summary["losses"][0]
    assert "3 rounds over 4 shards; at most" in capsys.readouterr().out
    folder_of_rounds = next((run_dir(path) / "adapt").glob("rounds-*"))
    assert {file.suffix for file in folder_of_rounds.iterdir()} == {".json"}
    again = oppu("adapt", path, *options)  # nothing is trained again, and nothing is forgotten
    assert again["federated"] == summary and again["fingerprints"] == ours["fingerprints"]


@pytest.mark.parametrize("client", ["shard", "user"])
@pytest.mark.parametrize("method", ["ffa", "naive"])
def test_a_round_is_the_weighted_mean_of_what_shards_do_alone(
    prepared: Path, base: Base, tmp_path: Path, client: str, method: str
) -> None:
    config = configured(prepared, client=client, method=method, num_rounds=1)
    state = first_state(config, base)
    alone = [shard.update(state) for shard in shards_of(config, base, tmp_path).values()]
    after, _ = rounds(config, base, tmp_path / "rounds")
    keys = trained_keys(state.adapter, method)
    moved = np.average([delta for delta, _, _ in alone], axis=0, weights=[weight for _, _, weight in alone])
    assert np.abs(moved).max() > 1e-3
    assert np.abs(flatten(after, keys) - flatten(state.adapter, keys) - moved).max() < 1e-6
    is_same = [np.array_equal(after[key], state.adapter[key]) for key in after if ".lora_A." in key]
    assert all(is_same) if method == "ffa" else not any(is_same)


@pytest.mark.parametrize("ranks", [(), (2, 1)])
def test_by_products_the_merged_base_is_the_mean_of_the_shards_merged_bases(
    prepared: Path, base: Base, tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    config = configured(prepared, method="product", num_rounds=2, ranks=ranks)
    factor, index = scaling(config.adapt.peft), read_index(Path(config.run_dir) / "prepare")
    rounds(replace(config, federated=replace(config.federated, num_rounds=1)), base, tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.num_rounds == 1
    alone = [shard.update(state) for shard in shards_of(config, base, tmp_path).values()]
    adapter, residual = train_rounds(config, index, base, tmp_path, Progress())
    keys = trained_keys(state.adapter, "product")
    for key_a in (key for key in keys if ".lora_A." in key):
        key_b, name = key_a.replace("lora_A", "lora_B"), linear_name(key_a)
        merged = []
        for delta, _, _ in alone:
            trained = federated_adapter(state, keys, delta)
            merged.append(state.residual[name] + factor * trained[key_b] @ trained[key_a])
        mean = np.average(merged, axis=0, weights=[weight for _, _, weight in alone])
        ours = residual[name] + factor * adapter.tensors[key_b] @ adapter.tensors[key_a]
        assert np.abs(ours - mean).max() < 1e-5 and np.abs(mean - state.residual[name]).max() > 1e-3
    oppu("adapt", prepared, "federated.method=product", "federated.num_rounds=2", f"federated.ranks={list(ranks)}")
    merged_base = load_base(config.base, Path(result(prepared, "adapt")["task_base"]))
    weight = merged_base.model.get_submodule(name).weight - base.model.get_submodule(name).weight
    assert np.abs(weight.detach().numpy() - ours).max() < 1e-5


def note(seen: list[Any], number: int, shard: int, reply: bytes) -> None:
    seen.append((number, shard, reply))


def federated_adapter(state: RoundState, keys: list[str], delta: np.ndarray) -> Arrays:
    return {key: state.adapter[key] + moved for key, moved in unflatten(delta, state.adapter, keys).items()}


def test_a_shard_of_a_lower_rank_leaves_the_other_directions_alone(prepared: Path, base: Base, tmp_path: Path) -> None:
    config = configured(prepared, method="naive", ranks=(1,), num_rounds=1)
    state = first_state(config, base)
    drawn = np.random.default_rng(0)
    full = {key: drawn.normal(0, 0.1, value.shape).astype(np.float32) for key, value in state.adapter.items()}
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    delta, loss, _ = shards_of(config, base, tmp_path)[0].update(RoundState(0, full))
    trained = federated_adapter(RoundState(0, full), trained_keys(full, "naive"), delta)
    for key, value in trained.items():
        head, rest = (value[:1], value[1:]) if ".lora_A." in key else (value[:, :1], value[:, 1:])
        old_head, old_rest = (
            (full[key][:1], full[key][1:]) if ".lora_A." in key else (full[key][:, :1], full[key][:, 1:])
        )
        assert np.array_equal(rest, old_rest) and not np.array_equal(head, old_head)
    whole = configured(prepared, method="naive", num_rounds=1)
    _, whole_loss, _ = shards_of(whole, base, tmp_path)[0].update(RoundState(0, full))
    assert loss == pytest.approx(whole_loss, rel=0.02)  # the rest is not trained, but it is there
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())


@pytest.mark.parametrize("changes", [{"method": "ffa"}, {"method": "naive", "client": "user", "client_share": 0.6}])
def test_masked_rounds_have_the_bits_of_open_ones(
    prepared: Path, base: Base, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain, plain_records = rounds(configured(prepared, **changes), base, tmp_path / "plain")
    masked, records = rounds(configured(prepared, secure=True, **changes), base, tmp_path / "masked")
    assert same(plain, masked)
    assert [record["took_part"] for record in records] == [record["took_part"] for record in plain_records]
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in plain_records])
    assert [record["weight"] for record in records] == [record["weight"] for record in plain_records]


@pytest.mark.parametrize("secure", [False, True])
def test_a_shard_that_is_lost_in_a_round_is_left_out_and_joins_the_next(
    prepared: Path, base: Base, tmp_path: Path, secure: bool
) -> None:
    config = configured(prepared, secure=secure)

    def lose(number: int, shard: int, method: str, _: bytes) -> str | None:
        return "was lost" if (number, shard, method) == (1, 2, "train") else None

    with tampered(lose):
        ours, records = rounds(config, base, tmp_path / "ours")
    assert [record["took_part"] for record in records] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert [record["found"] for record in records] == [{}, {"2": "was lost"}, {}]
    with tampered(lose):
        other, _ = rounds(configured(prepared, secure=not secure), base, tmp_path / "other")
    assert same(ours, other)  # the sum of the rest, masked or not
    assert not same(ours, rounds(config, base, tmp_path / "all")[0])


@pytest.mark.parametrize("changes", [{"method": "product", "client_share": 0.6}, {"server": "adam"}, {"secure": True}])
def test_a_killed_run_goes_on_to_the_same_bits(
    prepared: Path, base: Base, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = configured(prepared, num_rounds=4, **changes)
    whole, _ = rounds(config, base, tmp_path / "whole")

    def kill(number: int, shard: int, method: str, _: bytes) -> None:
        if (number, method) == (2, "train"):
            raise KeyboardInterrupt

    with tampered(kill), pytest.raises(KeyboardInterrupt):
        rounds(config, base, tmp_path / "killed")
    assert load_state(tmp_path / "killed").num_rounds == 2  # type: ignore[union-attr]
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 2
    ours, records = rounds(config, base, tmp_path / "killed")
    assert same(ours, whole) and len(records) == 4


def test_a_damaged_round_is_run_again(
    prepared: Path, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(prepared)
    whole, _ = rounds(config, base, tmp_path)
    path = tmp_path / "round-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path).num_rounds == 2  # type: ignore[union-attr]
    assert f"{path}: is damaged" in caplog.text
    assert same(rounds(config, base, tmp_path)[0], whole)
    (tmp_path / "round-00002.json").unlink()  # as if killed before the record
    assert same(rounds(config, base, tmp_path)[0], whole)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "product"}, {"secure": True}, {"client": "user", "noise_multiplier": 1.0}],
    ids=["open", "product", "secure", "private"],
)
def test_no_text_leaves_a_shard_and_its_bytes_are_counted(
    prepared: Path, base: Base, tmp_path: Path, changes: dict[str, Any]
) -> None:
    replies: list[tuple[int, int, bytes]] = []
    with tampered(lambda number, shard, method, reply: note(replies, number, shard, reply)):
        _, records = rounds(configured(prepared, num_rounds=2, **changes), base, tmp_path)
    prepared_text = (run_dir(prepared) / "prepare" / "users.jsonl").read_text()
    assert prepared_text.count(CANARY) > 20
    tokens = np.array(base.tokenizer(CANARY)["input_ids"], np.int64).tobytes()
    for _, _, reply in replies:
        header, _ = read_message(reply)
        assert CANARY.encode() not in reply and tokens not in reply and b"film" not in reply
        assert header.keys() <= {"loss", "weight", "mask", "cipher", "seed", "shares", "seeds", "keys"}
        if "noise_multiplier" in changes:
            assert header.get("loss", 0.0) == 0.0
    counted = {int(n): sum(record["bytes_up"][n] for record in records) for n in records[0]["bytes_up"]}
    assert counted == {n: sum(len(reply) for _, shard, reply in replies if shard == n) for n in range(NUM)}


def poison(kind: str) -> Callable[[int, int, str, bytes], bytes | None]:
    def change(number: int, shard: int, method: str, reply: bytes) -> bytes | None:
        if shard != 1:
            return None
        header, arrays = read_message(reply)
        if kind == "heavy":
            return write_message({**header, "weight": 1e6}, arrays)
        factor = {"nan": np.nan, "huge": 1e33, "scaled": 1000.0, "flipped": -1.0}[kind]
        return write_message(header, {"delta": (arrays["delta"] * factor).astype(np.float32)})

    return change


@pytest.mark.parametrize(
    ("kind", "robust", "reason"),
    [
        ("nan", "none", "its update is not finite"),
        ("huge", "none", "too large for a sum"),
        ("heavy", "clip", "medians, cut to size"),
        ("scaled", "clip", "medians long, cut to size"),
        ("flipped", "clip", "points against the others"),
        ("flipped", "trim", "points against the others"),
        ("scaled", "trim", "medians long, cut to size"),
    ],
)
def test_a_poisoned_update_is_bounded_and_named(
    prepared: Path, base: Base, tmp_path: Path, kind: str, robust: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(prepared, num_rounds=2, robust=robust)
    clean, _ = rounds(config, base, tmp_path / "clean")
    with tampered(poison(kind)), caplog.at_level(logging.WARNING):
        ours, records = rounds(config, base, tmp_path / "ours")
    assert all(list(record["found"]) == ["1"] and reason in record["found"]["1"] for record in records)
    assert f"round 0, shard 1: {records[0]['found']['1']}" in caplog.text
    start = first_state(config, base).adapter
    keys = trained_keys(start, "ffa")
    moved, off = (flatten(clean, keys) - flatten(one, keys) for one in (start, ours))
    assert np.linalg.norm(off) < np.linalg.norm(moved)
    assert (1 in records[0]["took_part"]) == (kind in ("scaled", "heavy"))


def test_one_user_moves_the_private_sum_no_further_than_the_bound(prepared: Path, base: Base, tmp_path: Path) -> None:
    config = configured(prepared, client="user", noise_multiplier=1e-9, clip_norm=0.02)
    state, shards = first_state(config, base), shards_of(config, base, tmp_path)
    shard = next(one for one in shards.values() if len(one.examples) > 1)
    with_user, loss, weight = shard.update(state)
    gone = shard.examples.pop(sorted(shard.examples)[0])
    without, _, smaller = shard.update(state)
    assert len(gone) > 1 and loss == 0.0 and (weight, smaller) == (len(shard.examples) + 1, len(shard.examples))
    moved = np.linalg.norm(with_user * weight - without * smaller)
    assert 0.015 < moved <= 0.02 * (1 + 1e-4)


def test_noise_is_enough_if_only_the_least_answer_and_the_key_is_the_shards_own(
    prepared: Path, base: Base, tmp_path: Path
) -> None:
    config = configured(prepared, client="user", noise_multiplier=2.0, clip_norm=0.5)
    state = first_state(config, base)
    calm = configured(prepared, client="user", noise_multiplier=1e-9, clip_norm=0.5)
    noises = []
    for number, shard in shards_of(config, base, tmp_path).items():
        delta, _, weight = shard.update(state)
        quiet, _, _ = shards_of(calm, base, tmp_path)[number].update(state)
        noises.append((delta - quiet) * weight)
    assert all(noise.std() == pytest.approx(1.0 / np.sqrt(3), rel=0.1) for noise in noises)
    assert np.sum(noises[:3], axis=0).std() == pytest.approx(1.0, rel=0.1)
    other = replace(state, adapter={key: value + np.float32(1e-6) for key, value in state.adapter.items()})
    noises.append(shards_of(config, base, tmp_path)[0].update(other)[0] * 2)
    assert np.abs(np.corrcoef(noises)[~np.eye(NUM + 1, dtype=bool)]).max() < 0.2  # nor twice over another state
    assert len({(tmp_path / f"{n}.key").read_bytes() for n in range(NUM)}) == NUM


@pytest.mark.parametrize("secure", [False, True])
def test_the_noisy_sum_arrives_as_whole_steps_of_the_grid(
    prepared: Path, base: Base, tmp_path: Path, secure: bool
) -> None:
    config = configured(prepared, client="user", noise_multiplier=2.0, clip_norm=0.5, num_rounds=1, secure=secure)
    state, shards = first_state(config, base), shards_of(config, base, tmp_path)
    alone = {number: shard.update(state) for number, shard in shards.items()}
    (tmp_path / "rounds").mkdir()
    for number in shards:
        (tmp_path / f"{number}.key").rename(tmp_path / "rounds" / f"shard-{number}.key")
    after, records = rounds(config, base, tmp_path / "rounds")
    units = {number: delta * weight / RING_STEP for number, (delta, _, weight) in alone.items()}
    assert all(delta.dtype == np.float64 and np.abs(own - np.rint(own)).max() < 1e-3
               for (delta, *_), own in zip(alone.values(), units.values(), strict=True))  # fmt: skip
    keys = trained_keys(state.adapter, "ffa")
    total = sum(np.rint(own) for own in units.values()) * RING_STEP / records[0]["weight"]
    assert np.array_equal(flatten(after, keys), flatten(state.adapter, keys) + total.astype(np.float32))


def test_the_cost_in_privacy_stands_in_the_result(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["client=user", "noise_multiplier=1.5", "client_share=0.5", "delta=1e-3", "secure=true"]
    ours = oppu("adapt", prepared, *(f"federated.{option}" for option in options))
    privacy = ours["federated"]["privacy"]
    assert privacy == {"unit": "user", "delta": 1e-3, "epsilon": pytest.approx(privacy["epsilon"])}
    assert 1.0 < privacy["epsilon"] < 8.0 and f"epsilon {privacy['epsilon']:.2f} at delta" in capsys.readouterr().out


def test_a_round_with_less_noise_than_was_accounted_for_does_not_count(
    prepared: Path, base: Base, tmp_path: Path
) -> None:
    def spoil(number: int, shard: int, method: str, reply: bytes) -> bytes | None:
        header, arrays = read_message(reply)
        return write_message(header, {"delta": arrays["delta"] * np.float32(np.nan)}) if shard in (0, 3) else None

    config = configured(prepared, client="user", noise_multiplier=1.0)
    with tampered(spoil), pytest.raises(ClusterLost, match="round 0 had too few answers 3 times: shard 0: its update"):
        rounds(config, base, tmp_path)


def test_a_pull_back_and_a_slow_server_move_less(prepared: Path, base: Base, tmp_path: Path) -> None:
    def length(**changes: Any) -> float:
        config = configured(prepared, num_rounds=1, local_steps=4, **changes)
        start = first_state(config, base).adapter
        keys = trained_keys(start, config.federated.method)
        home = tmp_path / "-".join(map(str, changes.values()))
        return float(np.linalg.norm(flatten(rounds(config, base, home)[0], keys) - flatten(start, keys)))

    free = length(method="ffa")
    assert length(prox=100.0) < 0.8 * free
    assert length(server="adam", server_rate=1e-6) < 0.01 * free


def test_shards_that_share_everybodys_items_have_no_more_text_than_there_is(prepared: Path, tmp_path: Path) -> None:
    index = read_index(run_dir(prepared) / "prepare")
    all_bytes = sum(index.entries[size.user_id].length for size in index.sizes("base"))
    for split in ("users", "items"):
        text = summarise_rounds(configured(prepared, split=split), index, tmp_path)["bytes_text"]
        assert len(text) == NUM and all_bytes - NUM < sum(text.values()) <= all_bytes


def test_items_dealt_by_chance_are_each_at_one_shard(prepared: Path, base: Base, tmp_path: Path) -> None:
    by_items = shards_of(configured(prepared, split="items"), base, tmp_path)
    by_users = shards_of(configured(prepared), base, tmp_path)
    owners = [user for shard in by_users.values() for user in shard.examples]
    assert len(owners) == len(set(owners)) == 8

    def all_of(shards: dict[int, Shard]) -> list[Any]:
        return sorted(e.input_ids for shard in shards.values() for own in shard.examples.values() for e in own)

    assert all_of(by_items) == all_of(by_users)
    assert all(sum(map(len, shard.examples.values())) > 2 for shard in by_items.values())


def test_a_shard_without_memory_is_left_out(
    prepared: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Shard.update

    def without_memory(self: Shard, state: RoundState) -> Any:
        if (self.number, state.num_rounds) == (2, 1):
            raise MemoryError(CANARY)
        return update(self, state)

    monkeypatch.setattr(Shard, "update", without_memory)
    _, records = rounds(configured(prepared), base, tmp_path)
    assert [record["found"] for record in records] == [{}, {"2": "out of memory"}, {}]
    assert [record["took_part"] for record in records] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]


def test_too_few_answers_stop_the_run_and_keep_its_rounds(prepared: Path, base: Base, tmp_path: Path) -> None:
    def lose(number: int, shard: int, method: str, _: bytes) -> str | None:
        return "was lost" if number == 1 and shard in (0, 3) else None

    config = configured(prepared)
    with (
        tampered(lose),
        pytest.raises(ClusterLost, match="round 1 had too few answers 3 times: shard 0: was lost; sha"),
    ):
        rounds(config, base, tmp_path)
    assert load_state(tmp_path).num_rounds == 1  # type: ignore[union-attr]
    assert same(rounds(config, base, tmp_path)[0], rounds(config, base, tmp_path / "whole")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=best"], "federated.method: found 'best'; expected 'ffa', 'product' or 'naive'"),
        (["method=product", "secure=true"], "federated.method product does not go with federated.secure"),
        (["secure=true", "robust=clip"], "federated.secure does not go with federated.robust clip"),
        (["noise_multiplier=1"], "federated.noise_multiplier does not go with federated.client shard"),
        (
            ["noise_multiplier=1", "client=user", "robust=trim"],
            "federated.noise_multiplier does not go with federated.robust trim",
        ),
        (["client_share=0"], "federated.client_share: found '0'; expected greater than 0"),
        (["trim_share=0.5"], "federated.trim_share: found '0.5'; expected less than 0.5"),
        (["num_shards=9"], "federated.num_shards is 9, but there are 8 base users"),
        (["ranks=[2, 3]"], "federated.ranks has 3; expected 1 to adapt.peft.rank 2"),
        (["secure=true", "min_shards=2"], "federated.min_shards is 2; expected more than half, at most all of the 4"),
        (["secure=true", "client_share=0.25"], "federated.secure: a round asks 1 of 4 shards"),
        (["secure=true", "num_shards=1"], "federated.secure: a round asks 1 of 1 shards"),
        (["min_shards=5"], "federated.min_shards is 5; expected 1 to all of the 4 asked in a round"),
    ],
)
def test_what_does_not_fit_is_said(
    prepared: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", str(prepared), *(f"federated.{option}" for option in options)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"method": "product"}, {"method": "naive", "ranks": (2, 1)}])
def test_a_quantized_base_that_rounds_would_add_to_is_refused(prepared: Path, changes: dict[str, Any]) -> None:
    config, index = configured(prepared, **changes), read_index(run_dir(prepared) / "prepare")
    assert len(plan_base_shards(config, index)) == NUM
    with pytest.raises(ValueError, match="base.quantization is 'int8', and method product and ranks add to"):
        plan_base_shards(replace(config, base=replace(config.base, quantization="int8")), index)


def test_a_record_says_what_a_round_was(prepared: Path, base: Base, tmp_path: Path) -> None:
    _, records = rounds(configured(prepared, client_share=0.5), base, tmp_path)
    assert all(record.keys() == {*vars(RoundRecord(0, [])), "sha256"} for record in records)
    assert all(len(record["asked"]) == 2 and record["took_part"] == record["asked"] for record in records)
    assert len({tuple(record["asked"]) for record in records}) > 1
