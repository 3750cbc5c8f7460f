"""A run keeps the commits of what it took from the hub, whatever its branches do meanwhile."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_tools import Hub
from line_tools import oppu, result, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray.base_model import load_base
from oppu_ray.config import BaseConfig, Config, DataConfig, MemoryConfig, load_config
from oppu_ray.hub import pin_data, pin_models
from oppu_ray.refresh import open_task_base, refresh_user
from oppu_ray.vault import open_vault
from serve.app import application

BASE = ["base.name=someone/tiny"]


def fingerprint(folder: Path) -> str:
    return load_base(BaseConfig(str(folder), dtype="float32")).fingerprint


def test_a_run_stays_on_the_commit_it_began_with(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tiny_base(tmp_path / "old", seed=1), tiny_base(tmp_path / "new", seed=2)
    first = hub.push("someone/tiny", old)
    users = [tagging_user(0), tagging_user(1), tagging_user(8, role="base")]
    path = write_config(tmp_path, tmp_path, write_users(tmp_path / "users.jsonl", users))
    monkeypatch.setenv("OPPU_HOME", str(tmp_path / "home"))
    for stage in ("prepare", "adapt", "train"):
        oppu(stage, path, *BASE)
    adapted = result(path, "adapt")
    assert adapted["config"]["base"]["revision"] == result(path, "train")["config"]["base"]["revision"] == first
    assert adapted["fingerprints"]["base"] == fingerprint(old)

    second = hub.push("someone/tiny", new)
    shutil.rmtree(tmp_path / "home")  # another node
    assert oppu("adapt", path, *BASE)["was_done"] and oppu("train", path, *BASE)["was_done"]
    evaluated = oppu("evaluate", path, *BASE)
    assert evaluated["config"]["base"]["revision"] == first
    assert result(path, "adapt")["fingerprints"] == adapted["fingerprints"]

    config = load_config(path, BASE)
    with closing(open_vault(config)) as vault:
        refresh_user(config, vault, "user-0", open_task_base(config))
        assert vault.load("user-0", base_fingerprint=adapted["fingerprints"]["task_base"])
    served: Any = application(config)._bound_deployment.init_args[0]
    assert served["base"]["revision"] == first

    asked = oppu("adapt", path, *BASE, "base.revision=main")  # who names a revision moves on
    assert asked["config"]["base"]["revision"] == second and asked["fingerprints"]["base"] == fingerprint(new)


def test_every_model_of_a_run_is_pinned_and_what_is_no_hub_id_is_left_alone(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "files").mkdir()
    names = ("someone/base", "someone/writer", "sentence-transformers/tiny")
    commits = [hub.push(name, tmp_path / "files") for name in names]
    memory = MemoryConfig("dense", "tiny", profile="someone/writer@main")
    config = Config(str(tmp_path / "run"), base=BaseConfig("someone/base"), memory=memory)
    pinned = pin_models(config)
    assert pinned.base.revision == commits[0]
    assert pinned.memory.profile == f"someone/writer@{commits[1]}"
    assert pinned.memory.embedder == f"sentence-transformers/tiny@{commits[2]}"
    for name in names:
        hub.push(name, tmp_path / "files")
    assert pin_models(config) == pinned and pin_models(pinned) == pinned
    shutil.rmtree(tmp_path / "hub")
    assert pin_models(config) == pinned, "a run that knows its commits does not ask the hub"

    local = Config(base=BaseConfig(str(tmp_path)), memory=MemoryConfig("hybrid", str(tmp_path), profile="base"))
    for plain in (local, Config(), Config(memory=MemoryConfig("bm25", "someone/unused"))):
        assert pin_models(plain) == plain


def test_a_dataset_is_read_at_the_commit_that_the_run_read_first(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"user_id": f"u{user}", "text": f"film {number}", "label": "comedy"} for user in "ab" for number in range(5)
    ]
    asked: list[tuple[Any, ...]] = []

    def load(name: str, configuration: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, configuration, split, revision))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load)
    (tmp_path / "files").mkdir()
    first = hub.push("someone/films", tmp_path / "files", kind="dataset")
    path = write_config(tmp_path, tmp_path, tmp_path, data={"format": "hf", "hf_name": "someone/films:small"})
    for _ in range(2):
        assert oppu("prepare", path)["config"]["data"]["hf_name"] == f"someone/films@{first}:small"
        second = hub.push("someone/films", tmp_path / "files", kind="dataset")
    oppu("prepare", path, f"data.hf_name=someone/films@{second}:small")
    small = ("someone/films", "small", "train")
    assert asked == [(*small, first), (*small, first), (*small, second)]
    local = Config(data=DataConfig("hf", hf_name=str(tmp_path)))
    assert pin_data(local) == local


@pytest.mark.parametrize("text", ["", "[]", '{"model someone/tiny@main": 1}', '{"a": "main"}', "[" * 100_000])
def test_a_record_of_commits_that_is_none_is_not_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "hub.json").write_text(text)
    config = Config(str(tmp_path), base=BaseConfig("someone/tiny"))
    with pytest.raises(ValueError, match=r"hub.json: (cannot be read|expected a table)"):
        pin_models(config)
    (tmp_path / "hub.json").write_text(json.dumps({"model someone/tiny@default branch": "1" * 40}))
    assert pin_models(config).base.revision == "1" * 40
