"""`oppu users` on a real run: looking, moving, versions, and forgetting that leaves nothing and changes no one else."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from line_tools import oppu, tagging_user, write_config, write_users
from peft import PeftModel
from tiny import VOCAB_SIZE, tiny_base
from transformers import AutoModelForCausalLM
from vault_tools import empty_postgres, make_adapter, make_manifest, tree

from oppu_ray import refresh
from oppu_ray.adapters import peft_from_dict
from oppu_ray.cli import main
from oppu_ray.config import load_config
from oppu_ray.core import Example
from oppu_ray.inference import Engine
from oppu_ray.refresh import open_task_base, refresh_user
from oppu_ray.registry import Refused
from oppu_ray.vault import Vault, open_vault
from oppu_ray.workers import run_units

TARGETS = ["user-0", "user-1", "user-2", "user-3"]
BASES = ["user-8", "user-9"]
USERS = [tagging_user(int(one[-1]), canary=f"canary-of-{one}") for one in TARGETS]
USERS += [tagging_user(int(one[-1]), role="base", canary=f"canary-of-{one}") for one in BASES]
BAD = {"user_id": "user-0", "role": "target", "history": [{"id": "1", "text": "again", "label": "comedy"}] * 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run of four targets and two base users; one target stands in `rejected.jsonl` too."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny_base(folder / "base")
    oppu("run", write_config(folder, base, write_users(folder / "users.jsonl", [*USERS, BAD])))
    return folder


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Path:
    """The config of a copy of that run, whose base lies where it was."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run").glob("*/result.json"):
        path.write_text(path.read_text().replace(str(made / "run"), str(tmp_path / "run")))
    return write_config(tmp_path, made / "base", made / "users.jsonl")


@pytest.fixture
def run(config: Path) -> Path:
    return config.parent / "run"


@pytest.fixture
def users(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`oppu users ... --json` on the run, as data; `code` is the expected exit code."""
    monkeypatch.setenv("OPPU_VAULT", str(run))

    def call(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["users", *map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def holding(folder: Path, *texts: str) -> set[str]:
    """Files below a folder with one of the texts in them, in any way that we write text."""
    needles = [needle for text in texts for needle in (text.encode(), json.dumps(text)[1:-1].encode())]
    return {name for name, data in tree(folder).items() if any(needle in data for needle in needles)}


def digests(run: Path) -> dict[str, bytes]:
    """User to all bytes of their current adapter's tensors."""
    vault = Vault(run / "vault")
    found = {}
    for user_id in TARGETS:
        if vault.registry.current(vault.user_hash(user_id)):
            adapter, _ = vault.load(user_id, base_fingerprint=None)
            found[user_id] = b"".join(tensor.tobytes() for _, tensor in sorted(adapter.tensors.items()))
    vault.close()
    return found


# ---- looking


def test_a_vault_is_named_by_its_run_its_config_its_folder_or_the_environment(
    config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    seen = set()
    for where in ("run", str(config), "run/vault"):
        assert main(["users", "list", "--vault", where]) == 0
        seen.add(capsys.readouterr().out)
    monkeypatch.setenv("OPPU_VAULT", "run")
    assert main(["users", "list"]) == 0
    assert seen == {shown := capsys.readouterr().out}
    lines = shown.splitlines()
    assert lines[0].split() == ["user", "hash", "current", "num_versions", "created"] and lines[-1] == "4 users"
    assert sorted(line.split()[0] for line in lines[1:-1]) == TARGETS


def test_the_vault_has_a_users_past_and_not_their_queries(users: Callable[..., Any], run: Path) -> None:
    vault = Vault(run / "vault")
    assert [item.item_id for item in vault.read_history("user-1")] == ["u1-0", "u1-1", "u1-2"]
    vault.close()
    shown = users("show", "user-1")
    assert (shown["num_items"], shown["num_versions"], shown["quarantined"]) == (3, 1, [])
    (listed,) = (row for row in users("list") if row["user"] == "user-1")
    assert shown["hash"] == listed["hash"] and shown["current"] == listed["current"]
    assert users("show", listed["hash"][:12], "--hash") == shown
    assert users("verify") == []


def test_a_version_says_what_it_was_made_from(
    users: Callable[..., Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (version,) = users("versions", "user-2")
    adapted = json.loads((run / "adapt" / "result.json").read_text())
    manifest = version["manifest"]
    assert version["is_current"] and manifest["base_fingerprint"] == adapted["fingerprints"]["task_base"]
    assert manifest["task_fingerprint"] == Path(adapted["task_base"]).name != ""
    assert manifest["item_ids"] == ["u2-0", "u2-1", "u2-2"] and manifest["recipe"]["max_steps"] == 2
    assert main(["users", "versions", "user-2"]) == 0
    shown = capsys.readouterr().out
    assert version["version"] in shown and manifest["task_fingerprint"] in shown and "current" in shown


def test_training_again_gives_the_vault_no_item_twice(config: Path, users: Callable[..., Any]) -> None:
    assert oppu("train", config, "seed=5")["failed"] == {}
    assert users("show", "user-1")["num_versions"] == 2 and users("show", "user-1")["num_items"] == 3


# ---- moving


def test_an_exported_adapter_gives_in_peft_what_it_gives_here(
    users: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    users("export", "user-1", tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "out")
    base = open_task_base(load_config(config))
    vault = open_vault(load_config(config))
    adapter, _ = vault.load("user-1", base_fingerprint=base.fingerprint)
    vault.close()
    prompt = tuple(range(5, 40))
    engine = Engine(base.model, 1, [peft_from_dict(adapter.peft_config)])
    engine.load("user-1", adapter)
    groups = [
        (who, [Example((*prompt, token), len(prompt)) for token in range(VOCAB_SIZE)]) for who in ("user-1", None)
    ]
    ours, without = engine.score(groups)
    engine.close()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), tmp_path / "out" / "adapter"
    )
    with torch.no_grad():
        theirs = -torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    assert torch.allclose(torch.tensor(ours), theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(torch.tensor(without), theirs, atol=1e-2, rtol=0)


def test_a_user_moves_to_another_vault_of_the_same_base_only(
    users: Callable[..., Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert users("export", "user-1", tmp_path / "one.zip") == {"path": str(tmp_path / "one.zip")}
    moved = users("import", "ann", tmp_path / "one.zip", "--vault", tmp_path / "other")
    shown = users("show", "ann", "--vault", tmp_path / "other")
    assert (shown["num_items"], shown["current"]) == (3, moved["version"])
    (version,) = users("versions", "ann", "--vault", tmp_path / "other")
    assert version["manifest"]["item_ids"] == ["u1-0", "u1-1", "u1-2"]

    vault = Vault(tmp_path / "foreign")
    vault.commit("bob", make_adapter(1), make_manifest(base="f" * 64))
    vault.close()
    for place, options in ((tmp_path / "foreign", []), (tmp_path / "new", ["--base", "f" * 64])):
        said = error(capsys, "users", "import", "ann", tmp_path / "one.zip", "--vault", place, *options)
        assert version["manifest"]["base_fingerprint"] in said and "this is base ffff" in said
        assert all(row["hash"] != moved["hash"] for row in users("list", "--vault", place))
    assert "exists already" in error(capsys, "users", "import", "user-1", tmp_path / "one.zip", "--vault", run)


def test_an_archive_cut_or_swapped_is_refused_in_one_line(
    users: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users("export", "user-1", tmp_path / "one.zip")
    whole = (tmp_path / "one.zip").read_bytes()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("history.jsonl", b"0" * 2**20)
    traversal = io.BytesIO()
    with zipfile.ZipFile(traversal, "w") as archive:
        archive.writestr("../../escaped", b"x")
    for content in (whole[:-40], whole[:2000], b"", bomb.getvalue(), traversal.getvalue()):
        (tmp_path / "bad.zip").write_bytes(content)
        assert str(tmp_path / "bad.zip") in error(capsys, "users", "import", "new", tmp_path / "bad.zip")
    assert len(users("list")) == 4 and not (tmp_path.parent / "escaped").exists()


def test_items_are_added_once_and_a_wrong_one_is_named(
    users: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text('{"id": "later", "time": "2021-01-02", "text": "a film", "label": "comedy"}\n\n')
    assert users("history", "add", "user-1", new) == {"num_added": 1, "num_items": 4}
    assert "item 'later': is there twice" in error(capsys, "users", "history", "add", "user-1", new)
    for line, expected in (
        (
            '{"id": "x", "text": "a film", "label": "no such"}',
            "line 1: Item 'x' has the label 'no such'; expected one of",
        ),
        ('{"text": "a film"}', "line 1: Item 1 has no id; expected"),
        ('{"id": "x", ', "line 1: not valid JSON"),
        ("[]", "line 1: Item 1 is a list; expected an object."),
        (
            '{"id": "x", "time": "2021", "text": "a film", "label": "comedy"}\n'
            '{"id": "y", "text": "a film", "label": "comedy"}',
            "1 of 2 items have no time, the first of them 'y'; expected one in all or in none",
        ),
    ):
        new.write_text(line)
        said = error(capsys, "users", "history", "add", "user-1", new)
        assert str(new) in said and expected in said
    assert "cannot be read" in error(capsys, "users", "history", "add", "user-1", tmp_path / "none")
    assert users("show", "user-1")["num_items"] == 4


# ---- versions


def test_refresh_use_rollback_and_diff(users: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"id": "later", "time": "2021-01-02", "text": "a film", "label": "comedy"}')
    users("history", "add", "user-1", tmp_path / "new.jsonl")
    loaded, steps = load_config(config, ["study.items=last_2"]), []
    vault, base = open_vault(loaded), open_task_base(loaded)
    before = digests(tmp_path / "run")
    done = refresh_user(loaded, vault, "user-1", base, lambda step, of: steps.append((step, of)))
    assert done.error is None and steps == [(1, 2), (2, 2)]
    by_hash = refresh_user(loaded, vault, vault.user_hash("user-1"), base)  # as the service, which knows no id
    vault.close()
    after = digests(tmp_path / "run")
    assert {user for user in TARGETS if after[user] != before[user]} == {"user-1"}
    first, second, third = users("versions", "user-1")
    assert (second["version"], third["version"]) == (done.version, by_hash.version) and third["is_current"]
    assert second["manifest"]["item_ids"] == ["u1-0", "u1-1", "u1-2", "later"] and second["run_id"] == ""
    assert "study" not in second["manifest"]["recipe"]  # all items are what it learns from
    assert set(users("diff", "user-1", done.version, by_hash.version)["tensors"].values()) == {0.0}  # the seed is kept
    assert max(users("diff", "user-1", first["version"], done.version)["tensors"].values()) > 0
    assert users("rollback", "user-1") == {"current": done.version}
    assert users("use", "user-1", first["version"]) == {"current": first["version"]}
    assert digests(tmp_path / "run") == before


def test_diff_and_rollback_say_what_they_mean(
    users: Callable[..., Any], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old,) = users("versions", "user-0")
    assert f"no good version before {old['version']}" in error(capsys, "users", "rollback", "user-0")
    assert "no good version 'x'" in error(capsys, "users", "use", "user-0", "x")
    oppu("train", config, "seed=5")
    new = users("show", "user-0")["current"]
    capsys.readouterr()
    assert main(["users", "diff", "user-0", old["version"], new]) == 0
    shown = capsys.readouterr().out
    assert f"seed: {old['manifest']['seed']} -> " in shown and "checksums differ" in shown
    assert " tensors changed, most:" in shown and "\n0 of " not in shown


def test_two_refreshes_at_once_and_one_of_a_forgotten_user(
    users: Callable[..., Any], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_config(config)
    vault, base = open_vault(loaded), open_task_base(loaded)

    def meanwhile(*_arguments: Any) -> Any:
        with pytest.raises(Refused, match="leased to refresh-"):
            refresh_user(loaded, vault, "user-1", base)
        users("forget", "user-1", "--yes")
        return encode(*_arguments)

    encode = refresh.encode_user
    monkeypatch.setattr(refresh, "encode_user", meanwhile)
    with pytest.raises(Refused, match="lease of refresh-.* was lost"):
        refresh_user(loaded, vault, "user-1", base)
    assert not vault.registry.has_user(vault.user_hash("user-1")) and vault.verify() == []
    with pytest.raises(ValueError, match="has no history in the vault"):
        refresh_user(loaded, vault, "user-1", base)
    vault.close()


def test_a_long_training_keeps_its_lease(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_config(config)
    vault, base = open_vault(loaded), open_task_base(loaded)
    monkeypatch.setattr(refresh, "LEASE_S", 1e-3)  # it has ended before each step

    def others_may_have_it(done: int, of_all: int) -> None:
        assert vault.registry.leaseholder(vault.user_hash("user-1")).startswith("refresh-")  # type: ignore[union-attr]
        ends.append(done)

    ends: list[int] = []
    renew, renewed = vault.registry.renew_leases, []
    monkeypatch.setattr(vault.registry, "renew_leases", lambda *args: (renewed.append(args), renew(*args)))
    assert refresh_user(loaded, vault, "user-1", base, others_may_have_it).error is None
    assert len(renewed) == len(ends) > 1
    vault.close()


# ---- forgetting


def test_a_forgotten_user_is_nowhere_in_the_run_and_the_run_goes_on(
    users: Callable[..., Any], config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.write_text("canary-of-user-1\nuser-1\n")
    assert holding(run, "canary-of-user-1", "user-1") >= {"prepare/users.jsonl", "prepare/index.json"}
    checkpoint = run / "checkpoints" / "pack"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"users": [users("show", "user-1")["hash"]]}))
    before, history = digests(run), tree(run / "vault")
    receipt = users("forget", "user-1", "--yes", "--receipt", tmp_path / "receipt.json")
    assert holding(run, "canary-of-user-1", "user-1") == set() and not checkpoint.exists()
    assert users("verify-receipt", tmp_path / "receipt.json", "--texts", texts) == []
    assert main(["users", "verify-receipt", receipt["receipt_id"], "--texts", str(texts)]) == 0
    assert "proven: nothing is left in" in capsys.readouterr().out
    assert [path for path, _ in receipt["removed"] if path.endswith("predictions.jsonl")]
    del before["user-1"]
    assert digests(run) == before
    others = {name: data for name, data in history.items() if name.startswith("users/")}
    assert {name: others[name] for name in tree(run / "vault") if name in others} == {
        name: data for name, data in others.items() if receipt["user_hash"] not in name
    }

    result = oppu("run", config)  # the source still has them: that run must not bring them back
    assert json.loads((run / "train" / "result.json").read_text())["num_trained"] == 0
    assert result["arms"]["oppu"]["num_users"] == 3 and digests(run) == before
    assert users("verify-receipt", receipt["receipt_id"], "--texts", texts) == []
    users("add", "user-1")  # they come back
    oppu("run", config)
    assert digests(run).keys() == {*TARGETS}
    assert users("verify-receipt", receipt["receipt_id"], code=1)


def test_who_is_forgotten_during_a_run_fails_alone_and_does_not_come_back(
    users: Callable[..., Any], config: Path, run: Path
) -> None:
    base = Path(json.loads((run / "adapt" / "result.json").read_text())["task_base"])
    stream = run_units(load_config(config), base, "another run", "train", [[(("user-0",),), (("user-1", "user-2"),)]])
    first = next(stream)
    receipt = users("forget", "user-1", "--yes")
    done = {one.user_id: one for one in [first, *stream]}
    assert done["user-0"].version and done["user-2"].version and not done["user-1"].version
    assert done["user-1"].error == "user 'user-1': was forgotten since the run began"

    # a worker that starts only now, in the place of one that died, no longer finds them in the index
    late = run_units(load_config(config), base, "a third run", "train", [[(("user-1", "user-2"),)]])
    late_done = {one.user_id: one for one in late}
    assert late_done["user-2"].version and late_done["user-1"].error == done["user-1"].error
    late = run_units(load_config(config), base, "a third run", "answer", [[(("user-1", "user-2"), "oppu", ())]])
    assert {answer.user_id for answer in late} == {"user-2"}
    assert users("verify-receipt", receipt["receipt_id"]) == []


def test_a_forgotten_item_is_gone_and_the_user_trained_again_without_it(
    users: Callable[..., Any], config: Path, run: Path, made: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.write_text("film 1 of 2")
    before = digests(run)
    receipt = users("forget", "user-2", "--item", "u2-1", "--yes", "--vault", config)
    (version,) = users("versions", "user-2")
    assert version["version"] == receipt["new_version"] and version["is_current"]
    assert version["manifest"]["item_ids"] == ["u2-0", "u2-2"] and receipt["needs_training"]
    assert users("verify-receipt", receipt["receipt_id"], "--texts", texts) == []
    assert holding(run, "film 1 of 2", "u2-1") == set()
    assert "film 0 of 2" in (run / "prepare" / "users.jsonl").read_text()
    after = digests(run)
    assert {user for user in TARGETS if after[user] != before[user]} == {"user-2"}

    never = [{**one, "history": [item for item in one["history"] if item["id"] != "u2-1"]} for one in USERS]
    elsewhere = write_config(tmp_path / "never", made / "base", write_users(tmp_path / "never.jsonl", never))
    oppu("prepare", elsewhere, "data.query_share=0.5")
    oppu("adapt", elsewhere)
    base = json.loads((run / "adapt" / "result.json").read_text())["task_base"]
    loaded = load_config(elsewhere)
    (done,) = run_units(loaded, Path(base), "never", "train", [[(("user-2",),)]])
    assert done.error is None
    assert digests(tmp_path / "never" / "run")["user-2"] == after["user-2"]  # as if the item had never been there

    oppu("run", config)
    rest = [user for user in TARGETS if user != "user-2"]
    assert digests(run) == before | {"user-2": digests(run)["user-2"]} and len(users("versions", "user-2")) == 2
    assert [len(users("versions", user)) for user in rest] == [1, 1, 1]
    assert holding(run, "film 1 of 2", "u2-1") == set()


def test_a_query_can_be_forgotten_and_needs_no_training(users: Callable[..., Any], run: Path) -> None:
    receipt = users("forget", "user-3", "--item", "u3-4", "--yes")
    assert not receipt["needs_training"] and receipt["new_version"] is None
    assert holding(run, "u3-4", "film 4 of 3") == set()
    assert users("verify-receipt", receipt["receipt_id"]) == []


def test_a_user_without_items_left_has_no_adapter(users: Callable[..., Any], run: Path) -> None:
    items = [argument for number in range(3) for argument in ("--item", f"u0-{number}")]
    assert users("forget", "user-0", *items, "--yes")["new_version"] is None
    assert users("versions", "user-0") == [] and users("show", "user-0")["num_items"] == 0
    assert holding(run / "prepare", "canary-of-user-0") == set()


def test_a_forgotten_base_user_takes_the_task_base_along(
    users: Callable[..., Any], config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["users", "forget", "user-8", "--yes"]) == 0
    assert "run `adapt` and `train` again" in capsys.readouterr().out
    assert holding(run, "canary-of-user-8", "user-8") == set() and not (run / "adapt").exists()
    assert main(["train", str(config)]) == 2 and "run `adapt` with this config first" in capsys.readouterr().err
    oppu("run", config)
    assert json.loads((run / "train" / "result.json").read_text())["num_trained"] == 4
    assert holding(run, "canary-of-user-8") == set()
    variant = run.parent / "variant"  # as in a suite
    variant.mkdir()
    for name in ("prepare", "adapt", "vault"):
        (variant / name).symlink_to(run / name)
    capsys.readouterr()
    assert main(["users", "forget", "user-9", "--yes", "--vault", str(variant)]) == 0
    assert "run `adapt` and `train` again" in capsys.readouterr().out
    assert holding(run, "canary-of-user-9") == set() and not (run / "adapt").exists()


def test_by_the_whole_hash_a_user_is_forgotten_again(
    users: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = users("show", "user-1")["hash"]
    assert users("forget", whole[:12], "--hash", "--yes")["user_hash"] == whole
    assert "fits 0 users" in error(capsys, "users", "forget", whole[:12], "--hash", "--yes")
    assert users("forget", whole, "--hash", "--yes")["user_hash"] == whole
    assert "no such user" in error(capsys, "users", "show", whole, "--hash")


def test_nothing_is_forgotten_unasked(users: Callable[..., Any], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[str, bytes]:
        return {name: data for name, data in tree(run).items() if not name.startswith("vault/registry")}

    before, listed = files(), users("list")
    assert "this cannot be undone: add --yes" in error(capsys, "users", "forget", "user-1")
    assert "no such user" in error(capsys, "users", "forget", "nobody", "--yes")
    assert "has no item 'x'" in error(capsys, "users", "forget", "user-1", "--item", "x", "--yes")
    for place in (run / "nowhere" / "receipt.json", run / "prepare" / "index.json"):
        assert f"--receipt {place}" in error(capsys, "users", "forget", "user-1", "--yes", "--receipt", place)
    assert "--scan /nowhere" in error(capsys, "users", "forget", "user-1", "--yes", "--scan", "/nowhere")
    assert files() == before and users("list") == listed
    assert "no such receipt" in error(capsys, "users", "verify-receipt", "0" * 32)
    (run.parent / "receipt").write_text("{}")
    assert "not a receipt" in error(capsys, "users", "verify-receipt", run.parent / "receipt")
    said = error(capsys, "users", "verify-receipt", run.parent / "receipt", "--texts", "/nowhere")
    assert said == "oppu: /nowhere: No such file or directory\n"


@pytest.mark.parametrize(
    "user", ["../../etc", "/etc/passwd", "'; DROP TABLE users; --", "$(touch /tmp/x)", "аnn", "NULL", "*", "x" * 256]
)
def test_hostile_ids_are_ordinary_users(users: Callable[..., Any], run: Path, user: str) -> None:
    before = {name for name in tree(run) if not name.startswith("vault/")}
    assert users("add", user, user) == {"num_added": 1}
    assert users("show", user)["num_items"] == 0
    assert users("verify-receipt", users("forget", user, "--yes")["receipt_id"]) == []
    assert len(users("list")) == 4 and {name for name in tree(run) if not name.startswith("vault/")} == before


@pytest.mark.parametrize("user", ["", "a\nb", "a\0b", "x" * 10_000, "\u202eann"])
def test_ids_that_no_one_can_read_are_refused(
    users: Callable[..., Any], user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["add"], ["show"], ["forget", "--yes"]):
        assert len(error(capsys, "users", command[0], user, *command[1:])) < 300
    assert len(users("list")) == 4


# ---- care


def test_a_flipped_byte_is_found_and_the_last_good_version_answers(
    users: Callable[..., Any], config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = users("show", "user-1")["current"]
    oppu("train", config, "seed=5")
    shown = users("show", "user-1")
    path = Path(shown["folder"]) / "adapters" / shown["current"] / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = users("verify", code=1)
    assert shown["current"] in problem and "SHA-256" in problem
    assert users("verify", "user-2") == []
    vault = Vault(run / "vault")
    assert vault.load("user-1", base_fingerprint=None)[1].version == good
    vault.close()
    assert users("show", "user-1")["quarantined"] == [shown["current"]]
    assert main(["users", "versions", "user-1"]) == 0
    assert "bad" in capsys.readouterr().out


def test_gc_removes_what_a_crash_left(users: Callable[..., Any], run: Path) -> None:
    (run / "vault" / "tmp" / "left").write_bytes(b"x")
    assert users("gc") == [] and len(users("verify", code=1)) == 1
    assert users("gc", "--min-age", "-1") == ["tmp/left"] and users("verify") == []


def test_a_sealed_run_shows_no_word_in_its_vault(made: Path, tmp_path: Path, users: Callable[..., Any]) -> None:
    config = write_config(tmp_path / "sealed", made / "base", made / "users.jsonl", vault={"encrypt": True})
    shutil.copytree(made / "run" / "adapt", tmp_path / "sealed" / "run" / "adapt")
    oppu("prepare", config)
    oppu("train", config)
    sealed = tmp_path / "sealed" / "run"
    assert holding(sealed / "vault", "canary-of", "item_id", "lora_A") == set()
    assert digests(sealed) == digests(made / "run")
    shown = users("show", "user-1", "--vault", sealed)
    assert shown["is_sealed"] and shown["num_items"] == 3
    shutil.rmtree(sealed / "vault" / "keys")  # who deletes the key has forgotten the user
    vault = Vault(sealed / "vault")
    with pytest.raises(ValueError, match="no good adapter version"):
        vault.load("user-1", base_fingerprint=None)
    vault.close()


def test_a_vault_may_lie_elsewhere_with_its_registry_in_postgresql(
    made: Path, tmp_path: Path, users: Callable[..., Any], postgres_url: str
) -> None:
    empty_postgres(postgres_url)
    vault = {"path": str(tmp_path / "shared"), "registry_url": postgres_url}
    config = write_config(tmp_path / "pg", made / "base", made / "users.jsonl", vault=vault)
    shutil.copytree(made / "run" / "adapt", tmp_path / "pg" / "run" / "adapt")
    oppu("prepare", config)
    oppu("train", config)
    assert digests(made / "run") and not (tmp_path / "pg" / "run" / "vault").exists()
    assert not (tmp_path / "shared" / "registry.sqlite").exists()
    receipt = users("forget", "user-1", "--yes", "--vault", config)
    assert len(users("list", "--vault", tmp_path / "pg" / "run")) == 3
    assert users("verify-receipt", receipt["receipt_id"], "--vault", config) == []
    assert holding(tmp_path / "shared", "canary-of-user-1") == set()


def test_what_names_no_vault_says_what_would(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPPU_VAULT", raising=False)
    assert "which vault? give --vault" in error(capsys, "users", "list")
    for where in (tmp_path / "none", tmp_path, run / "prepare"):
        assert f"{where}: no vault in" in error(capsys, "users", "list", "--vault", where)
    assert not (tmp_path / "none").exists()
    assert "no vault in" in error(capsys, "users", "add", "ann", "--vault", run / "prepare")
    assert "no such user" in error(capsys, "users", "show", "ann", "--vault", run)
    assert "fits 4 users" in error(capsys, "users", "show", "", "--hash", "--vault", run)


def test_tokens_are_shown_once_listed_without_secrets_and_revoked(
    users: Callable[..., Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", "create", "user-1", "--days", "1"]) == 0
    token = capsys.readouterr().out.strip()
    assert main(["token", "create", "--role", "operator"]) == 0
    vault = Vault(run / "vault")
    verified = vault.registry.verify_token(token)
    assert verified is not None and verified.user_hash == vault.user_hash("user-1")
    capsys.readouterr()
    assert main(["token", "list"]) == 0
    shown = capsys.readouterr().out
    assert verified.token_id in shown and "user-1" in shown and token not in shown and "2 tokens" in shown
    assert main(["token", "revoke", verified.token_id]) == 0
    assert vault.registry.verify_token(token) is None
    vault.close()
    assert "no such user" in error(capsys, "token", "create", "nobody")
    assert "role 'king'" in error(capsys, "token", "create", "--role", "king")
