"""The membership audit finds an adapter that has learnt its items by heart, and says 0.5 of one that has not."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from line_tools import TAGS, oppu, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base

from jobs.audit_privacy import auc, main


def test_auc_is_the_chance_that_a_member_is_below() -> None:
    assert auc(np.array([0.1, 0.2]), np.array([0.3, 0.4, 0.5])) == 1.0
    assert auc(np.array([0.5, 0.2]), np.array([0.3])) == 0.5
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([2.0]), np.array([1.0, 3.0, 4.0, 5.0])) == 0.75


def test_what_was_learnt_by_heart_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = random.Random(0)
    users = [tagging_user(n, 12) for n in range(3)] + [tagging_user(8, role="base")]
    for item in (item for user in users for item in user["history"]):
        item["label"] = drawn.choice(TAGS)  # so that nothing but memory helps
    path = write_config(tmp_path, tiny_base(tmp_path / "base"), write_users(tmp_path / "users.jsonl", users))
    rows = {}
    for stage in ("prepare", "adapt"):
        oppu(stage, path)
    for name, options in {
        "heart": ["personal.max_steps=40", "personal.learning_rate=0.03", "personal.items_per_step=8"],
        "noise": ["personal.max_steps=2", "privacy.noise_multiplier=50"],
        "study": ["personal.max_steps=2", "study.items=last_3", "study.pairs=next_token"],
    }.items():
        oppu("train", path, *options)
        monkeypatch.setattr(sys, "argv", ["audit_privacy", str(path), *options])
        main()
        assert "personal adapters" in capsys.readouterr().out
        rows[name] = json.loads((run_dir(path) / "audit_privacy" / "result.json").read_text())["rows"]
    heart, noise = rows["heart"]["personal adapters"], rows["noise"]["personal adapters"]
    assert (heart["num_members"], heart["num_others"]) == (21, 15)
    assert heart["auc_difference"] > 0.65 and heart["auc_difference"] > noise["auc_difference"]
    assert heart["auc_without"] == noise["auc_without"]
    assert 0.0 <= rows["heart"]["task adapter"]["auc"] <= 1.0
    assert rows["study"]["personal adapters"]["num_members"] == 9  # what it was not trained on is no member
    assert rows["study"]["task adapter"] == rows["heart"]["task adapter"]  # no study is about the task adapter
