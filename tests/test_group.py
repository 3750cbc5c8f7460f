"""Ranks together are a process alone: a shared-out base, a shared task adapter, uneven and bad users, lost ranks."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from line_tools import oppu, result, run_dir, write_config, write_users
from reference import IA3, INFINITE, LORA, TRAIN, difference, make_user, random_examples, tiny_model, train, trained
from safetensors.torch import load_file
from tiny import tiny_base

from oppu_ray import group
from oppu_ray.config import BaseConfig, Config, PeftConfig, WorkersConfig, load_config
from oppu_ray.core import TrainResult, UserDone, UserWork
from oppu_ray.group import run_group, train_shards
from oppu_ray.layers import fuse_layers
from oppu_ray.progress import Progress
from oppu_ray.sharding import Group, read_settings, train_together
from oppu_ray.stages import _plan, evaluate, run
from oppu_ray.telemetry import Telemetry
from oppu_ray.training import attached, train_pack
from oppu_ray.vault import Vault
from oppu_ray.workers import failed

ROOT = Path(__file__).resolve().parents[1]
DROPOUT = replace(LORA, dropout=0.5)
SMALL_PASSES = replace(TRAIN, max_tokens_per_pass=25)
CHECKPOINTED = replace(SMALL_PASSES, gradient_checkpointing=True)


def settings_path(stage: int) -> str:
    return str(ROOT / "cluster" / "deepspeed" / f"zero{stage}.json")


def user(number: int, peft: PeftConfig = LORA) -> UserWork:
    """A user of 3, 7, 1, 5, 9 ... examples."""
    return make_user(number, peft, random_examples(number, 1 + (4 * number + 2) % 10))


# Rank -> its packs, of unlike numbers of packs, users, steps and passes; user 4's loss is not a number.
PACKS = {
    0: [[user(0), user(1, DROPOUT), user(2, IA3)], [user(3)]],
    1: [[user(4, INFINITE), user(5)]],
}
TASK = user(8, DROPOUT)
BROKEN = user(8, INFINITE)


def train_on_every_stage(job: dict[str, Any]) -> None:
    """What each rank of the group does; puts (what, rank, value)."""

    def group_of(stage: int, share_steps: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, Group]:
        model = tiny_model(dtype=dtype)
        assert fuse_layers(model) == 2
        settings = read_settings(BaseConfig(dtype="float32", deepspeed=settings_path(stage)))
        return model, Group(model, settings, torch.device("cpu"), 120, share_steps)

    def put(what: str, value: Any) -> None:
        job["results"].put((what, group.rank, value))

    model, group = group_of(3, share_steps=False)
    put("share", sum(p.ds_tensor.numel() for p in model.parameters()) / sum(p.ds_numel for p in model.parameters()))
    put("whole", sum(parameter.numel() for parameter in model.parameters()))
    for name, config in (("trained", SMALL_PASSES), ("checkpointed", CHECKPOINTED)):
        for pack in PACKS[group.rank]:
            for one in train_pack(model, pack, config, ranks=group):
                put(name, one)
        with attached(model, [], config) as bank:
            group.keep_company(bank)
    group.share_steps = True
    put("task", train_together(model, TASK, SMALL_PASSES, group))
    for stage in (1, 2):
        model, group = group_of(stage, share_steps=True)
        put("task", train_together(model, TASK, SMALL_PASSES, group))
        put("broken", train_together(model, BROKEN, SMALL_PASSES, group))
    put("bf16", [group_of(1, True, dtype)[1].settings["bf16"] for dtype in (torch.float32, torch.bfloat16)])


@pytest.fixture(scope="module")
def outcome(ray_session: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, Any]]:
    config = Config(
        run_dir=str(tmp_path_factory.mktemp("ranks")),
        base=BaseConfig(dtype="float32", deepspeed=settings_path(3)),
        workers=WorkersConfig(num_workers=2, threads=1),
    )
    return list(run_group(config, train_on_every_stage, {}, Progress(), Telemetry("test")))


def values(outcome: list[tuple[str, int, Any]], what: str) -> list[Any]:
    return [value for name, _, value in outcome if name == what]


def test_each_rank_holds_half_of_the_base_and_none_of_it_whole(outcome: list[tuple[str, int, Any]]) -> None:
    assert values(outcome, "share") == [0.5, 0.5] and values(outcome, "whole") == [0, 0]


def test_deepspeeds_precision_is_the_models(outcome: list[tuple[str, int, Any]]) -> None:
    assert values(outcome, "bf16") == [[{"enabled": False}, {"enabled": True}]] * 2


@pytest.mark.parametrize("name", ["trained", "checkpointed"])
def test_users_on_a_shared_base_train_as_alone_however_uneven_the_ranks(
    outcome: list[tuple[str, int, Any]], name: str
) -> None:
    results: dict[str, TrainResult] = {result.user_id: result for result in values(outcome, name)}
    works = [work for packs in PACKS.values() for pack in packs for work in pack]
    assert len(values(outcome, name)) == len(works)
    for work in works:
        alone = train(tiny_model(), [work], SMALL_PASSES)[work.user_id]
        result = results[work.user_id]
        if alone.adapter is None:
            assert work.user_id == "user4" and result.adapter is None and "loss nan" in str(result.error)
        else:
            assert difference(trained(results, work), alone.adapter) < 1e-5
            assert result.losses == pytest.approx(alone.losses, abs=1e-5)


def test_ranks_that_share_every_step_of_a_task_adapter_train_what_one_process_trains(
    outcome: list[tuple[str, int, Any]],
) -> None:
    alone = train(tiny_model(), [TASK], SMALL_PASSES)[TASK.user_id]
    tasks: list[TrainResult] = values(outcome, "task")
    assert len(tasks) == 2 * 3  # ranks, ZeRO stages
    for task in tasks:
        assert task.adapter is not None and alone.adapter is not None
        assert difference(task.adapter, alone.adapter) < 1e-5
        assert task.losses == pytest.approx(alone.losses, abs=1e-5)
        assert task.num_useful_tokens == alone.num_useful_tokens
    for broken in values(outcome, "broken"):
        assert broken.adapter is None and broken.error.startswith("step 1: loss nan, gradient norm ")


STRATEGY = "task.strategy=title_to_abstract"
GROUP = (
    STRATEGY,
    "base.sharding=zero3",
    f"base.deepspeed={settings_path(3)}",
    "workers.num_workers=2",
    "workers.group_timeout_s=10",
)
PERSONAL = {
    "max_steps": 120,
    "items_per_step": 2,
    "max_length": 160,
    "max_users_per_pack": 1,
    "learning_rate": 0.01,
    "peft": {"rank": 2, "alpha": 4},
}


def author(number: int, role: str = "target", **paper: str) -> dict[str, Any]:
    """An author of three papers; without an abstract there is nothing to train on, which is found in the worker."""
    papers = [{"id": f"{number}-{i}", "text": f"paper {i} of {number}", **paper} for i in range(3)]
    query = {"id": "q", "text": "paper", "options": ["one", "two"], "label": "[1]"}
    return {"user_id": f"user-{number}", "role": role, "history": [*papers, query], "query_start": 3}


@pytest.fixture(scope="module")
def line(ray_session: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configs of one run twice, adapted inline and by two ranks."""
    folder = tmp_path_factory.mktemp("line")
    base = tiny_base(folder / "base")
    targets = [author(number, abstract=f"long {number}") for number in range(6)]
    users = write_users(folder / "users.jsonl", [*targets, author(6), author(7, "base", abstract="short")])
    configs = [write_config(folder / name, base, users, "citation", personal=PERSONAL) for name in ("alone", "group")]
    for config, overrides in zip(configs, ((STRATEGY,), GROUP), strict=True):
        oppu("prepare", config, *overrides)
        oppu("adapt", config, *overrides)
    return configs[0], configs[1]


def test_the_adapt_stage_on_ranks_merges_what_one_process_merges(line: tuple[Path, Path]) -> None:
    alone, together = (result(config, "adapt") for config in line)
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert together["num_tokens"] == alone["num_tokens"]
    one, other = (load_file(Path(one["task_base"]) / "model.safetensors") for one in (alone, together))
    assert one.keys() == other.keys() and max((one[key] - other[key]).abs().max() for key in one) < 1e-5
    assert any((one[key] != other[key]).any() for key in one) or alone["task_base"] != together["task_base"]


def pids() -> list[int]:
    """The ranks' processes: descendants of this one."""
    family = psutil.Process().children(recursive=True)
    return sorted(process.pid for process in family if "RayTrainWorker" in "".join(process.cmdline()))


@pytest.mark.chaos
@pytest.mark.timeout(900)  # three starts of a group
def test_a_killed_and_a_hanging_rank_and_a_bad_user_cost_nobody_else_their_adapter(line: tuple[Path, Path]) -> None:
    alone, together = line
    (run_dir(together) / "adapt" / "result.json").write_text((run_dir(alone) / "adapt" / "result.json").read_text())
    config = load_config(together, GROUP)
    _, task_base, run_id = _plan(config)
    shards = [[((f"user-{number}",),) for number in range(rank, 7, 2)] for rank in range(2)]  # 4 users and 3
    faults, done = [signal.SIGKILL, signal.SIGSTOP], []
    progress = Progress()
    for one in train_shards(config, task_base, run_id, shards, progress):
        done.append(one)
        if len(done) in (1, 3):
            os.kill(pids()[0], faults.pop(0))
    assert sorted(one.user_id for one in done) == [f"user-{number}" for number in range(7)]  # each once
    errors = {one.user_id: one.error for one in done if one.error}
    assert errors.keys() == {"user-6"} and not faults, errors
    assert (progress.num_recoveries, progress.num_packs_done) == (2, 7)
    assert "no query-label pair" in str(errors["user-6"])
    oppu("train", alone, STRATEGY)
    vaults = [Vault(run_dir(config) / "vault") for config in line]
    for user_id in sorted({one.user_id for one in done} - {"user-6"}):
        (expected, _), (found, _) = (vault.load(user_id, base_fingerprint=None) for vault in vaults)
        assert difference(found, expected) < 1e-5
    for vault in vaults:
        vault.close()


def test_a_group_that_starts_again_counts_no_step_twice_and_makes_failures_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def came(*messages: Any) -> None:
        monkeypatch.setattr(group, "run_group", lambda *_: iter(messages))

    monkeypatch.setattr(group, "_start", lambda *_: Telemetry("test"))
    progress, trained = Progress(), TrainResult("task adapter", None, (), "a loss of nan")
    came((1, 10), (2, 20), (1, 10), (2, 20), (3, 30), trained)  # lost after two steps
    assert group.adapt(Config(), progress) == trained
    assert (progress.num_done, progress.num_tokens) == (3, 60)
    a, b = (UserDone(user_id, "1", None, 1.0, 0.5, 2, 10) for user_id in "ab")
    refused = [failed(user_id, "the registry is locked", is_retryable=True) for user_id in "ac"]
    came(refused[0], b, b, a, refused[1], refused[1])
    shards = [[(("a", "b"),), (("c",),)]]
    assert list(train_shards(Config(), Path("base"), "run", shards, progress)) == [b, a, refused[1]]
    assert progress.num_packs_done == 2


@pytest.mark.parametrize(
    ("text", "sharding", "message"),
    [
        (None, "none", "cannot be read as JSON: .*No such file"),
        ("{", "none", "cannot be read as JSON"),
        ("[]", "none", "has no zero_optimization.stage; expected 1, 2 or 3"),
        ('{"zero_optimization": {}}', "zero3", "has no zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 0}}', "none", "has zero_optimization.stage 0; expected 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 2}}',
            "zero3",
            "has zero_optimization.stage 2; expected 3 for base.sharding zero3",
        ),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_named(
    tmp_path: Path, text: str | None, sharding: str, message: str
) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"base.deepspeed: {path} {message}"):
        read_settings(BaseConfig(sharding=sharding, deepspeed=str(path)))


def test_what_the_run_says_wins_over_the_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(
        '{"zero_optimization": {"stage": 1}, "optimizer": {"type": "SGD"}, "bf16": {"enabled": true}, '
        '"train_batch_size": 64, "steps_per_print": 7}'
    )
    assert read_settings(BaseConfig(dtype="float32", deepspeed=str(path))) == {
        "zero_optimization": {"stage": 1},
        "steps_per_print": 7,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"base": BaseConfig(sharding="zero3")}, "base.deepspeed is empty; expected a DeepSpeed JSON file"),
        ({"workers": WorkersConfig()}, "workers.num_workers is 0, but base.deepspeed needs ranks"),
        (
            {"workers": WorkersConfig(num_workers=2, gpus_per_worker=1)},
            "base.device is 'cpu' and .*; expected cuda and above 0",
        ),
        ({"personal": replace(TRAIN, peft=PeftConfig(kind="prompt"))}, "personal.peft.kind is 'prompt'"),
    ],
)
def test_a_config_that_does_not_fit_a_group_is_refused_before_it_starts(
    overrides: dict[str, Any], message: str
) -> None:
    fitting = Config(
        base=BaseConfig(sharding="zero3", deepspeed=settings_path(3)), workers=WorkersConfig(num_workers=2)
    )
    with pytest.raises(ValueError, match=message):
        replace(fitting, **overrides)


def test_what_a_shared_base_cannot_do_is_said(tmp_path: Path) -> None:
    sharded = BaseConfig(sharding="zero3", deepspeed=settings_path(3))
    config = Config(run_dir=str(tmp_path), base=sharded, workers=WorkersConfig(num_workers=2))
    for stage in (evaluate, run):
        with pytest.raises(ValueError, match="answering takes a whole base; expected base.sharding=none"):
            stage(config)
    assert not any(tmp_path.rglob("*.json"))
