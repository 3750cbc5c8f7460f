"""The training benchmark's own arithmetic: rows, ratios, table, and what the peers' scripts read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from line_tools import tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray.bench import train as bench_train
from oppu_ray.bench.peers.work import User, batches, read_work
from oppu_ray.config import load_config
from oppu_ray.training import learning_rate

USERS = [
    {"user_id": "ann", "steps": [[], []], "num_useful_tokens": 300},
    {"user_id": "bob", "steps": [[]], "num_useful_tokens": 90},
]


def result(elapsed_s: float, bookkeeping_s: float = 0.0, ann: float = 1.0, bob: float = 2.0) -> dict[str, Any]:
    losses = {"ann": ann, "bob": bob}
    return {"elapsed_s": elapsed_s, "bookkeeping_s": bookkeeping_s, "losses": losses, "peak_bytes": 10**9}


def rows(**results: dict[str, Any]) -> dict[str, Any]:
    found = {system: bench_train.summarise_runs([one], USERS) for system, one in results.items()}
    return {system: {**row, "floor_share": 0.25} for system, row in found.items()}


def test_a_row_is_the_median_run_over_the_users_that_were_trained() -> None:
    row = bench_train.summarise_runs([result(9.0), result(3.0, 1.0), result(4.0, 1.0)], USERS)
    assert row["users_per_hour"] == 2 * 3600 / 4
    assert row["users_per_hour_no_bookkeeping"] == 2 * 3600 / 3
    assert (row["useful_tokens_per_s"], row["tokens_per_user_step"], row["last_loss"]) == (390 / 4, 130, 1.5)
    one = bench_train.summarise_runs([{**result(2.0), "losses": {"bob": 2.0}}], USERS)
    assert (one["users_per_hour"], one["useful_tokens_per_s"]) == (1800, 45)


def test_ratios_are_against_each_system_that_ran_without_its_bookkeeping() -> None:
    found = bench_train.ratios(rows(ours=result(2.0), mlora=result(7.0, 1.0, ann=1.25), ours_one_user=result(1.0)))
    assert found == {
        "ours_vs_mlora": pytest.approx(3.0),
        "loss_difference_mlora": pytest.approx(0.25),
        "memory_vs_one_user": 1.0,
        "floor_share": 0.25,
    }
    assert bench_train.ratios(rows(skyrl_tx=result(1.0))) == {}


def test_the_table_has_a_line_per_row_and_the_notes() -> None:
    both = rows(ours=result(2.0), skyrl_tx={**result(3.0), "note": "in float32"})
    text = bench_train.table({"rows": both, "ratios": bench_train.ratios(both), "floor_tokens_per_s": 800.0})
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["ours", "skyrl_tx"]
    assert "skyrl_tx: in float32" in text.splitlines()
    assert "ours_vs_skyrl_tx: 1.50" in text.splitlines()


def test_a_process_that_fails_is_shown_with_its_own_words() -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nno JAX here"):
        bench_train.run_process([sys.executable, "-c", "import sys; sys.stderr.write('no JAX here'); sys.exit(3)"])
    assert bench_train.run_process([sys.executable, "-c", "print('loading'); print('{\"a\": 1}')"]) == {"a": 1}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    users = write_users(folder / "users.jsonl", [tagging_user(number, num_items=7 - number) for number in range(3)])
    return write_config(folder, tiny_base(folder / "base"), users)


def test_peers_read_the_same_steps_rates_and_starting_weights(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path)
    made = bench_train.make_work(config, 2, 2, tmp_path)
    (tmp_path / "work.json").write_text(json.dumps(made))
    work = read_work(tmp_path / "work.json")
    assert [user.user_id for user in work.users] == ["user-0", "user-1"]
    assert [[len(step) for step in user.steps] for user in work.users] == [[2, 2], [2, 2]]
    assert work.users[0].rates == [learning_rate(config.personal, step, 2) for step in range(2)]
    assert (work.rank, work.alpha) == (2, 4.0)
    for user in work.users:
        for name, value in user.start.items():
            assert ("lora_B" in name) == (not value.any()), name
    assert work.users[0].start.keys() == work.users[1].start.keys()


def test_the_useful_share_is_of_all_tokens_that_a_system_gave_to_the_model(config_path: Path, tmp_path: Path) -> None:
    work = bench_train.make_work(load_config(config_path), 2, 1, tmp_path)
    lengths = [[len(ids) for ids, _ in user["steps"][0]] for user in work["users"]]
    useful = sum(user["num_useful_tokens"] for user in work["users"])
    given = {
        "ours": useful,
        "ours_unshared": sum(length - 1 for step in lengths for length in step),
        "peft_sequential": sum(len(step) * max(step) for step in lengths),
    }
    assert given["ours"] < given["ours_unshared"] < given["peft_sequential"]
    for system, num in given.items():
        found = bench_train.run_system(system, work)
        assert found["num_computed_tokens"] == num
        row = bench_train.summarise_runs([found], work["users"])
        assert row["useful_share"] == useful / num
        text = bench_train.table(
            {"rows": {system: {**row, "floor_share": 0.2}}, "ratios": {}, "floor_tokens_per_s": 1.0}
        )
        assert f" {useful / num:.0%} " in text.splitlines()[1]


def test_batches_hold_every_row_once_with_its_users_mean_shortest_first() -> None:
    lengths = {"ann": [30 - i for i in range(16)], "bob": [9] * 4}
    users = [User(name, [[([7] * n, n - 2) for n in of]], [0.1], {}) for name, of in lengths.items()]
    found = batches(users, 0)
    assert [len(batch) for batch in found] == [16, 4]
    assert [row.user for row in found[0]] == [0] * 12 + [1] * 4
    assert max(len(row.ids) for row in found[0]) == 26 < min(len(row.ids) for row in found[1])
    totals = [sum(2 * row.weight for batch in found for row in batch if row.user == user) for user in (0, 1)]
    assert totals == pytest.approx([1.0, 1.0])
    assert batches(users, 1) == []


def test_a_peer_with_an_interpreter_gets_a_row_and_one_without_a_way_to_install_it(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_train, "best_product", lambda device, dtype: 1e9)
    interpreter = tmp_path / "python"
    answer = json.dumps({**result(2.0), "losses": {"user-0": 1.0, "user-1": 2.0}, "note": "a stand-in"})
    interpreter.write_text(
        f'#!/bin/sh\ntest "$1 $2" = \'-m peers.mlora\' && test -f "$PYTHONPATH/peers/mlora.py" -a -f "$3" '
        f"&& echo '{answer}'\n"
    )
    interpreter.chmod(0o755)
    out = tmp_path / "train.json"
    arguments = [str(config_path), "--users", "2", "--steps", "1", "--repeats", "1", "--out", str(out)]
    arguments += ["--systems", "mlora", "skyrl_tx", "--mlora-python", str(interpreter), "--tx-python", ""]
    monkeypatch.setattr(sys, "argv", ["bench_train", *arguments])
    assert bench_train.main() == 0
    printed = capsys.readouterr().out
    assert "mlora: a stand-in" in printed and "pip install --no-deps skyrl-tx" in printed
    written = json.loads(out.read_text())
    assert list(written["rows"]) == ["mlora"]
    assert written["rows"]["mlora"]["users_per_hour"] == 3600
