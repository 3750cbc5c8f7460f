"""Forgetting removes one user, or one item, everywhere; proves it; and changes no one else."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vault_tools import (
    BASE,
    empty_postgres,
    in_child,
    make_adapter,
    make_items,
    make_manifest,
    memory_folder,
    same,
    tree,
)

from oppu_ray import archive as archive_module
from oppu_ray import stages
from oppu_ray import vault as vault_module
from oppu_ray.archive import export_user, import_user
from oppu_ray.config import Config, MemoryConfig, TaskConfig
from oppu_ray.core import Item, Rejected, UserHistory
from oppu_ray.files import write_atomic
from oppu_ray.forget import Receipt, forget_items, forget_user, read_receipt, verify_receipt, without_forgotten
from oppu_ray.memory import Memories
from oppu_ray.prepared import write_prepared
from oppu_ray.registry import Refused
from oppu_ray.vault import Vault

CANARIES = ("alice", "canary été 1", "canary été 2", "profile canary")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=["plain", "sealed", "postgresql"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vault]:
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        empty_postgres(url)
    made = Vault(tmp_path / "vault", url, encrypt=request.param == "sealed")
    for user in ("alice", "bob"):
        canaries = [f"canary été {number}" if user == "alice" else f"text {number}" for number in (1, 2)]
        made.append_history(user, [Item("1", text=canaries[0])])
        made.append_history(user, [Item("2", text=canaries[1]), Item("3", text="c")])
        made.put_blob(user, "profile.txt", b"profile canary" if user == "alice" else b"profile")
        made.commit(user, make_adapter(1), make_manifest(("1",)))
        made.commit(user, make_adapter(2), make_manifest(("1", "2", "3"), run_id="run"))
    yield made
    made.close()


@pytest.fixture
def runs(vault: Vault, tmp_path: Path) -> Path:
    """A run folder that speaks of both users in every way a run does."""
    folder = tmp_path / "runs"
    checkpoint = folder / "checkpoints" / vault.user_hash("alice")
    checkpoint.mkdir(parents=True)
    (checkpoint / "moments.safetensors").write_text("canary été 1")
    (folder / "checkpoints" / f"{vault.user_hash('bob')}.safetensors").write_bytes(b"bob")
    lines = [
        {"user_id": "alice", "query_id": "2", "gold": "canary été 2"},
        {"user_id": "alice", "query_id": "9", "gold": "else"},
        {"user_id": "bob", "query_id": "2", "gold": "of bob"},
    ]
    predictions = "".join(json.dumps(line) + "\n" for line in lines) + "not json\n"
    (folder / "predictions.jsonl").write_text(predictions)
    history = {"user_id": "alice", "items": [{"item_id": "1", "text": "canary été 1"}, {"item_id": "2"}], "queries": []}
    (folder / "histories.jsonl.gz").write_bytes(gzip.compress(json.dumps(history, ensure_ascii=False).encode() + b"\n"))
    return folder


def test_a_forgotten_user_is_nowhere_and_no_one_else_has_changed(vault: Vault, runs: Path) -> None:
    bob = vault.user_folder(vault.user_hash("bob"))
    before, bobs_token = tree(bob), vault.registry.create_token("user", vault.user_hash("bob"))
    vault.registry.create_token("user", vault.user_hash("alice"))
    receipt = forget_user(vault, "alice", [runs])
    assert verify_receipt(vault, receipt, [runs], CANARIES) == []
    assert tree(bob) == before and same(vault.load("bob", base_fingerprint=BASE)[0], make_adapter(2))
    assert vault.registry.verify_token(bobs_token) is not None and len(vault.registry.tokens()) == 1
    assert vault.verify() == []
    with pytest.raises(ValueError, match="no such user"):
        vault.load("alice", base_fingerprint=BASE)
    assert vault.read_history("alice") == () and vault.done("run", ["alice", "bob"]) == {"bob"}
    left = (runs / "predictions.jsonl").read_text().splitlines()
    assert len(left) == 2 and json.loads(left[0])["user_id"] == "bob" and left[1] == "not json"
    assert (runs / "checkpoints" / f"{vault.user_hash('bob')}.safetensors").exists()


def test_the_receipt_says_what_went_and_tells_nothing(vault: Vault, runs: Path) -> None:
    folder = vault.user_folder(vault.user_hash("alice"))
    files = set(tree(folder))
    receipt = forget_user(vault, "alice", [runs])
    removed = {path for path, _ in receipt.removed}
    outside = {"predictions.jsonl", "histories.jsonl.gz", f"checkpoints/{receipt.user_hash}/moments.safetensors"}
    assert removed == files | {f"runs/{name}" for name in outside}
    assert receipt.before != receipt.after and not receipt.needs_training
    kept = vault.registry.receipts(receipt.user_hash)
    assert [read_receipt(body) for body in kept] == [receipt]
    assert all(canary not in kept[0] and json.dumps(canary)[1:-1] not in kept[0] for canary in CANARIES)


def test_a_changed_or_foreign_receipt_is_not_believed(vault: Vault, tmp_path: Path) -> None:
    receipt = forget_user(vault, "alice")
    assert verify_receipt(vault, receipt) == []
    for forged in (
        replace(receipt, user_hash=vault.user_hash("carol")),
        replace(receipt, removed=()),
        replace(receipt, signature=""),
        replace(receipt, signature="no hex"),
    ):
        assert "signature" in verify_receipt(vault, forged)[0]
    assert "signature" in verify_receipt(Vault(tmp_path / "other"), receipt)[0]
    for text in ("", "{}", "[]", '{"removed": 1}'):
        with pytest.raises(ValueError, match="not a receipt"):
            read_receipt(text)


def test_the_scan_finds_what_is_left_behind(vault: Vault, runs: Path) -> None:
    user_hash = vault.user_hash("alice")
    receipt = forget_user(vault, "alice", [runs])
    (runs / "report.html").write_text("<td>canary été 1</td>")
    (runs / "log.txt").write_text(json.dumps("canary été 2"))
    (runs / "old.jsonl.gz").write_bytes(gzip.compress(b"profile canary"))
    vault.append_history("alice", make_items("5"))
    (vault.root / "tmp" / f"{user_hash}-1").write_bytes(b"x")
    problems = verify_receipt(vault, receipt, [runs], CANARIES)
    assert "the registry has 2 rows of the user" in problems
    for name in ("report.html", "log.txt", "old.jsonl.gz"):
        assert any(name in problem and "forgotten text" in problem for problem in problems)
    assert sum("named by the user's hash" in problem for problem in problems) >= 2


def test_forgetting_no_one_is_an_error(vault: Vault) -> None:
    with pytest.raises(ValueError, match="no such user"):
        forget_user(vault, "carol")
    with pytest.raises(ValueError, match="has no item '7'"):
        forget_items(vault, "alice", ["1", "7"])
    assert vault.verify() == [] and len(vault.read_history("alice")) == 3


def test_an_unknown_item_is_refused_without_waiting_for_who_forgets_or_reading_the_run(
    vault: Vault, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []

    def refuse() -> None:
        with pytest.raises(ValueError) as refusal:
            forget_items(vault, "alice", ["7"], [runs])
        refusals.append(str(refusal.value))

    monkeypatch.setattr("oppu_ray.forget._speaking", None)  # which reads every file
    with vault.alone():
        asking = threading.Thread(target=refuse, daemon=True)
        asking.start()
        asking.join(30)
        assert refusals == [f"user {vault.user_hash('alice')[:12]}: has no item '7'"]
    monkeypatch.undo()
    monkeypatch.setattr("oppu_ray.forget._prepared", None)  # which reads the index of all users
    with pytest.raises(TypeError):
        forget_items(vault, "alice", ["7"], [runs])
    assert forget_items(vault, "alice", ["3"]).items, "a known item is found in the registry's list"


def test_a_job_that_is_training_a_forgotten_user_cannot_bring_them_back(vault: Vault) -> None:
    lease = vault.lease("alice", "job", 60)
    receipt = forget_user(vault, "alice")
    with pytest.raises(Refused, match="lease of job"):
        vault.commit("alice", make_adapter(3), make_manifest(), lease)
    vault.gc(min_age_s=-1)
    assert verify_receipt(vault, receipt, canaries=CANARIES) == []


def test_items_are_forgotten_while_a_refused_commit_takes_its_own_files_away(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vault.user_folder(vault.user_hash("alice"))
    read, rmtree, seen = Path.read_bytes, shutil.rmtree, set[Path]()

    def quicker(path: Path) -> None:
        """Another process has removed one of the files, and goes on with the rest."""
        if path in seen:
            rmtree(path)
        else:
            seen.add(path)
            next(path.rglob("*")).unlink()
            raise FileNotFoundError(path)

    def gone(path: Path) -> bytes:
        if path.name == "README" and path not in seen:
            seen.add(path)
            path.unlink()
        return read(path)

    (folder / "adapters" / "unpublished").mkdir()
    (folder / "adapters" / "unpublished" / "README").touch()
    (folder / "adapters" / "unpublished" / "manifest.json").touch()
    monkeypatch.setattr(vault_module.shutil, "rmtree", quicker)
    monkeypatch.setattr(Path, "read_bytes", gone)
    receipt = forget_items(vault, "alice", ["2"])
    assert [path.name for path in (folder / "adapters").iterdir()] == [
        vault.registry.versions(vault.user_hash("alice"))[0].version
    ]
    assert len(seen) >= 3 and verify_receipt(vault, receipt) == []


def test_a_user_is_forgotten_while_a_run_takes_its_checkpoints_away(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints" / "pack"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(vault.user_hash("alice"))
    (folder / "b.json").touch()
    listed = Path.rglob

    def gone(path: Path, pattern: str) -> Iterator[Path]:
        found = [*listed(path, pattern)]
        (folder / "a.json").unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(Path, "rglob", gone)
    receipt = forget_user(vault, "alice", [tmp_path / "run"])
    assert not (folder / "a.json").exists() and verify_receipt(vault, receipt, [tmp_path / "run"]) == []


def test_a_link_in_the_users_place_is_removed_but_not_followed(vault: Vault, tmp_path: Path) -> None:
    folder, elsewhere = vault.user_folder(vault.user_hash("alice")), tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = tree(elsewhere)
    forget_user(vault, "alice")
    assert tree(elsewhere) == before and not folder.is_symlink()


def test_a_forgotten_item_takes_what_was_made_from_it(vault: Vault, runs: Path) -> None:
    bob = tree(vault.user_folder(vault.user_hash("bob")))
    receipt = forget_items(vault, "alice", ["2"], [runs])
    assert verify_receipt(vault, receipt, [runs], ["canary été 2", "profile canary"]) == []
    assert receipt.needs_training and len(receipt.items) == 1 and "2" not in receipt.items
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "3"]
    adapter, manifest = vault.load("alice", base_fingerprint=BASE)
    assert same(adapter, make_adapter(1)) and manifest.item_ids == ("1",)  # the version that never saw item 2
    assert len(vault.registry.versions(vault.user_hash("alice"))) == 1
    assert vault.get_blob("alice", "profile.txt") is None
    assert vault.done("run", ["alice"]) == set()  # so that the run trains her again
    assert tree(vault.user_folder(vault.user_hash("bob"))) == bob and vault.verify() == []
    lines = (runs / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["query_id"] for line in lines[:2]] == ["9", "2"]
    history = json.loads(gzip.decompress((runs / "histories.jsonl.gz").read_bytes()))
    assert [item["item_id"] for item in history["items"]] == ["1"]
    vault.append_history("alice", make_items("2"))
    assert any("forgotten item" in problem for problem in verify_receipt(vault, receipt))


def test_an_item_no_version_was_trained_on_needs_no_training(vault: Vault) -> None:
    vault.append_history("alice", make_items("4"))
    receipt = forget_items(vault, "alice", ["4"])
    assert not receipt.needs_training and same(vault.load("alice", base_fingerprint=BASE)[0], make_adapter(2))


def test_a_version_whose_manifest_cannot_be_read_goes_too(vault: Vault) -> None:
    folder = vault.user_folder(vault.user_hash("alice")) / "adapters"
    for manifest in folder.glob("*/manifest.json"):
        manifest.write_bytes(b"?")
    assert forget_items(vault, "alice", ["3"]).needs_training
    assert list(folder.iterdir()) == [] and vault.verify() == []


def test_a_vault_in_one_of_the_folders_is_not_taken_for_what_was_made_from_it(vault: Vault, tmp_path: Path) -> None:
    before = tree(vault.user_folder(vault.user_hash("bob")))
    receipt = forget_items(vault, "alice", ["2"], [tmp_path])
    assert [item.item_id for item in vault.read_history("alice")] == ["1", "3"] and vault.verify() == []
    assert verify_receipt(vault, receipt, [tmp_path], ["canary été 2"]) == []
    assert verify_receipt(vault, forget_user(vault, "alice", [tmp_path]), [tmp_path], CANARIES) == []
    assert tree(vault.user_folder(vault.user_hash("bob"))) == before


def test_what_an_adapter_answered_goes_with_it(vault: Vault, runs: Path) -> None:
    alice, bob = vault.user_hash("alice"), vault.user_hash("bob")
    lines = [{"arm": arm, "user_id": user, "query_id": "9"} for arm in ("oppu", "swapped") for user in ("alice", "bob")]
    (runs / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs / "result.json").write_text(json.dumps({"failed": {"alice": "user 'alice': no", "bob": "no"}, "n": [1]}))
    for pack, hashes in (("both", [alice, bob]), ("bob's", [bob])):
        steps = runs / "checkpoints" / pack / "00000004"
        steps.mkdir(parents=True)
        (steps / "pack.json").write_text("digest\n" + json.dumps({"pack": hashes}))
        for name in hashes:
            (steps / f"{name}.safetensors").write_bytes(b"moments")
    receipt = forget_items(vault, "alice", ["2"], [runs])
    assert [json.loads(line) for line in (runs / "predictions.jsonl").read_text().splitlines()] == [lines[1]]
    assert json.loads((runs / "result.json").read_text()) == {"failed": {"bob": "no"}, "n": [1]}
    assert not (runs / "checkpoints" / "both").exists() and len(tree(runs / "checkpoints" / "bob's")) == 2
    removed = {Path(path).name for path, _ in receipt.removed}
    assert {"predictions.jsonl", "result.json", "pack.json", f"{alice}.safetensors"} <= removed
    with (runs / "predictions.jsonl").open("a") as file:  # trained and asked again, without the item
        file.write(json.dumps(lines[0]) + "\n" + json.dumps(lines[2]) + "\n")
    assert verify_receipt(vault, receipt, [runs]) == []
    whole = forget_user(vault, "alice", [runs])
    (runs / "predictions.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert [problem for problem in verify_receipt(vault, whole, [runs]) if "predictions.jsonl: speaks of" in problem]


def test_a_variant_of_a_suite_is_forgotten_with_the_run_that_it_links_to(vault: Vault, tmp_path: Path) -> None:
    write_prepared(tmp_path / "main" / "prepare", [ANN])
    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "prepare").symlink_to(Path("..", "main", "prepare"))
    receipt = forget_items(vault, "alice", ["2"], [tmp_path / "variant"])
    assert b"canary 2" not in (tmp_path / "main" / "prepare" / "users.jsonl").read_bytes()
    (tmp_path / "main" / "log").write_text("canary 2")
    assert len(verify_receipt(vault, receipt, [tmp_path / "variant"], ["canary 2"])) == 1


def test_what_a_killed_process_has_half_written_goes_too(vault: Vault, tmp_path: Path) -> None:
    left = tmp_path / "run" / "prepare" / ".users.jsonl.0a1b2c3d.partial"
    others = tmp_path / "run" / ".status.json.0a1b2c3d.partial"
    left.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="no such user"):
        forget_user(vault, "carol", [tmp_path / "run"])
    for path in (left, others):
        path.write_text('{"user_id": "alice", "items": [{"item_id": "1", "te')
    receipt = forget_user(vault, "alice", [tmp_path / "run"])
    assert not left.exists() and others.exists() and "run/prepare/" + left.name in dict(receipt.removed)
    left.touch()
    assert verify_receipt(vault, receipt, [tmp_path / "run"]) == [f"{left}: is half-written, and may speak of the user"]


@pytest.mark.parametrize("text", ['ein "Zitat" für sie', "C:\\Übung", "größer\tals"])
def test_the_scan_finds_a_text_as_our_files_escape_it(vault: Vault, tmp_path: Path, text: str) -> None:
    receipt = forget_user(vault, "alice")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "users.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    assert len(verify_receipt(vault, receipt, [tmp_path / "runs"], [text])) == 1


def test_a_user_called_like_a_part_of_a_result_takes_only_their_own(vault: Vault, tmp_path: Path) -> None:
    vault.add_users(["config"])
    result = {"config": {"seed": 1}, "failed": {"config": "no", "bob": "no"}, "history": {"config": 2}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    forget_user(vault, "config", [tmp_path])
    wanted = {"config": {"seed": 1}, "failed": {"bob": "no"}, "history": {}}
    assert json.loads((tmp_path / "result.json").read_text()) == wanted


def test_a_file_that_cannot_be_unpacked_is_named_before_anything_goes(vault: Vault, runs: Path) -> None:
    whole = gzip.compress(b"of anyone " * 99)
    for damaged in (whole[:-9], whole[:12] + b"\xff" * 9 + whole[21:], b"no gzip"):
        (runs / "other.jsonl.gz").write_bytes(damaged)
        before = tree(runs), vault.read_history("alice")
        with pytest.raises(ValueError, match="other.jsonl.gz: cannot be unpacked"):
            forget_user(vault, "alice", [runs])
        with pytest.raises(ValueError, match="other.jsonl.gz: cannot be unpacked"):
            forget_items(vault, "alice", ["2"], [runs])
        assert (tree(runs), vault.read_history("alice")) == before and vault.registry.receipts() == []
    (runs / "other.jsonl.gz").rename(runs / "other.gz")
    with pytest.raises(ValueError, match="other.gz: cannot be unpacked"):
        verify_receipt(vault, forget_user(vault, "alice", [runs]), [runs], CANARIES)


def test_lines_of_another_shape_do_not_stop_forgetting(vault: Vault, tmp_path: Path) -> None:
    odd = [{"user_id": "alice", "items": ["a"]}, {"user_id": "alice", "queries": 3, "item_id": ["2"]}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    forget_items(vault, "alice", ["2"], [tmp_path])
    assert [json.loads(line) for line in (tmp_path / "odd.jsonl").read_text().splitlines()] == odd


ANN = UserHistory("alice", "target", (Item("1", text="canary 1"), Item("2", text="canary 2"), Item("3")))


def test_who_returns_after_forgetting_can_have_an_item_forgotten(vault: Vault) -> None:
    forget_user(vault, "alice")
    vault.append_history("alice", ANN.items)
    assert without_forgotten(vault)(ANN) == ANN
    forget_items(vault, "alice", ["2"])
    assert without_forgotten(vault)(ANN) == replace(ANN, items=(ANN.items[0], ANN.items[2]))


def test_prepare_does_not_tell_again_why_a_forgotten_user_was_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(tmp_path / "run" / "vault")
    vault.append_history("alice", ANN.items)
    forget_items(vault, "alice", ["1"])
    rejected = [Rejected("users.jsonl", 1, user, "canary 1", "no") for user in ("alice", "bob", None)]
    monkeypatch.setattr("oppu_ray.stages.load_histories", lambda *_: ([replace(ANN, user_id="carol")], rejected))
    assert stages.prepare(Config(run_dir=str(tmp_path / "run")))["num_rejected"] == 2
    lines = (tmp_path / "run" / "prepare" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["user_id"] for line in lines] == ["bob", None]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(forget_user, user="alice"), partial(forget_user, user="bob")),
        (partial(forget_items, user="alice", item_ids=["1"]), partial(forget_items, user="alice", item_ids=["2"])),
        (lambda vault, folders: stages.prepare(Config(run_dir=str(folders[0]))), partial(forget_user, user="alice")),
    ],
    ids=["users", "items", "prepare"],
)
def test_who_forgets_and_who_prepares_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Callable[..., object], other: Callable[..., object]
) -> None:
    """The other comes when the first has read and not yet written."""
    vault, runs, users = Vault(tmp_path / "runs" / "vault"), tmp_path / "runs", [ANN, replace(ANN, user_id="bob")]
    vault.append_history("alice", ANN.items)
    write_prepared(runs / "prepare", users)
    came, flock, write = threading.Event(), fcntl.flock, write_atomic

    def come() -> None:
        try:
            other(vault, folders=[runs])
        finally:
            came.set()

    def lock(file: Any, operation: int) -> None:
        if threading.current_thread() is thread and os.readlink(f"/proc/self/fd/{file.fileno()}").endswith("/lock"):
            came.set()  # at the lock of the files outside the vault
        flock(file, operation)

    def write_after_the_other(*args: Any) -> None:
        if not thread.ident:
            thread.start()
            came.wait()
        write(*args)

    thread = threading.Thread(target=come)
    monkeypatch.setattr("fcntl.flock", lock)
    monkeypatch.setattr("oppu_ray.prepared.write_atomic", write_after_the_other)
    monkeypatch.setattr("oppu_ray.stages.load_histories", lambda *_: (users, []))
    one(vault, folders=[runs])
    thread.join()
    receipts = [read_receipt(body) for body in vault.registry.receipts()]
    assert receipts and [verify_receipt(vault, receipt, [runs]) for receipt in receipts] == [[]] * len(receipts)


# ---- forgetting is a fence


LATE = b"canary late"
WRITERS: dict[str, Callable[[Vault], object]] = {
    "append": lambda vault: vault.append_history("alice", [Item("9", text=LATE.decode())]),
    "blob": lambda vault: vault.put_blob("alice", "profile.txt", LATE),
    "commit": lambda vault: vault.commit("alice", make_adapter(3), make_manifest((LATE.decode(),))),
    "import": lambda vault: import_user(vault, "carol", vault.root.parent / "archive", base_fingerprint=None),
}


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_killed_at_any_step_leaves_nothing_to_be_found_after_forgetting(
    tmp_path: Path, name: str, encrypt: bool
) -> None:
    user = "carol" if name == "import" else "alice"
    source = Vault(tmp_path / "source")
    source.append_history("dave", [Item("1", text=LATE.decode())])
    source.put_blob("dave", "profile.txt", LATE)
    source.commit("dave", make_adapter(1), make_manifest())
    export_user(source, "dave", tmp_path / "archive")
    source.close()
    template = Vault(tmp_path / "template", encrypt=encrypt)
    template.append_history("alice", make_items("1"))
    template.close()

    def write_until(at: int, root: Path) -> None:
        vault, count = Vault(root), 0

        def killed(operation: Callable[..., Any], *args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args)

        for module in (vault_module, archive_module):
            module.step = killed  # type: ignore[assignment]
        WRITERS[name](vault)
        os._exit(0)

    at = 0
    while True:
        at += 1
        shutil.copytree(tmp_path / "template", root := tmp_path / str(at))
        _, status = os.waitpid(in_child(partial(write_until, at, root)), 0)
        vault = Vault(root)
        user_hash = vault.user_hash(user)
        assert verify_receipt(vault, forget_user(vault, user), canaries=[LATE.decode()]) == []
        assert not any(user_hash in str(path) or LATE in path.read_bytes() for path in files(root)), at
        vault.close()
        if not os.WIFSIGNALED(status):
            break
    assert os.WEXITSTATUS(status) == 0 and at > 8


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("forget", ["user", "user who came back", "item"])
def test_a_write_begun_before_a_forgetting_fails_and_leaves_nothing(vault: Vault, tmp_path: Path, forget: str) -> None:
    alice = vault.user_hash("alice")
    token = vault.registry.create_token("user", alice)
    asked = vault.registry.verify_token(token)
    assert asked is not None
    lease, generation = vault.lease("alice", "job", 60), vault.registry.generation(alice)
    made = UserHistory(alice, "target", vault.read_history(alice))
    if forget == "item":
        forget_items(vault, "alice", ["2"])
    else:
        forget_user(vault, "alice")
    if forget == "user who came back":
        vault.append_history("alice", make_items("7"))
    before, rows, history = tree(vault.root / "users"), vault.registry.num_rows(alice), vault.read_history(alice)
    profiles = Memories(
        replace(Config(task=TaskConfig(name="movie_tagging")), memory=MemoryConfig(with_profile=True)),
        vault,
        lambda prompts: ["canary"] * len(prompts),
    )
    refused: list[Callable[[], object]] = [
        lambda: vault.append_history(asked.user_hash or "", make_items("8"), generation=asked.generation),
        lambda: vault.append_history("alice", make_items("8"), lease=lease),
        lambda: vault.put_blob("alice", "vectors.safetensors", b"canary", generation),
        lambda: vault.commit("alice", make_adapter(5), make_manifest(("1", "2"))),
        lambda: vault.commit("alice", make_adapter(5), make_manifest(("1", "2")), lease),
    ]
    for write in refused:
        with pytest.raises(Refused):
            write()
    profiles.open(made)  # goes on, and keeps nothing
    assert vault.add_users(["alice", "zoe"], again=False) == 1
    assert tree(vault.root / "users") == before and list((vault.root / "tmp").iterdir()) == []
    assert vault.registry.num_rows(alice) == rows and vault.read_history(alice) == history
    if forget == "user":
        with pytest.raises(ValueError, match="no such user"):
            vault.registry.create_token("user", alice)
        later = vault.lease("alice", "job that began with an old list of users", 60)
        with pytest.raises(Refused, match="was forgotten"):
            vault.append_history("alice", make_items("8"), lease=later)
        assert not vault.registry.has_user(alice)
    vault.commit("bob", make_adapter(5), make_manifest(("1", "2")))


def test_what_a_crash_left_of_a_forgotten_user_does_not_become_theirs_when_they_come_back(vault: Vault) -> None:
    alice = vault.user_hash("alice")
    vault.registry.delete_user(alice)  # and then the process died
    vault.append_history("alice", make_items("7"))
    assert vault.blob_names(alice) == [] and [item.item_id for item in vault.read_history("alice")] == ["7"]
    assert vault.verify() == []


def test_forgetting_waits_for_who_writes_and_takes_what_they_wrote(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, flock = vault_module.write_file, fcntl.flock
    is_writing, waits = threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        write(path, data)
        is_writing.set()
        waits.wait()

    def lock(file: Any, operation: int) -> None:
        try:
            flock(file, operation)
        except BlockingIOError:
            waits.set()
            raise

    monkeypatch.setattr(vault_module, "write_file", slow)
    monkeypatch.setattr("fcntl.flock", lock)
    writer = threading.Thread(target=vault.put_blob, args=("alice", "late.txt", LATE))
    writer.start()
    is_writing.wait()
    receipt = forget_user(vault, "alice")
    writer.join()
    assert waits.is_set() and "blobs/late.txt" in dict(receipt.removed)
    assert verify_receipt(vault, receipt, canaries=[LATE.decode()]) == []


def test_forgetting_does_not_wait_for_ever_for_a_writer_that_was_stopped(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "LOCK_WAIT_S", 0.0)
    with vault.writing(vault.user_hash("alice")):
        receipt = forget_user(vault, "alice")
    assert "has open" in receipt.not_checked[0] and verify_receipt(vault, receipt, canaries=CANARIES) == []
    assert "has open" not in " ".join(forget_user(vault, "bob").not_checked)


def test_nobody_waits_while_a_users_forgetting_walks_through_the_runs(
    vault: Vault, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, walks, go = os.walk, threading.Event(), threading.Event()

    def slow(*args: Any) -> Iterator[Any]:
        if threading.current_thread() is thread and not vault.registry.has_user(vault.user_hash("alice")):
            for step in walk(*args):
                walks.set()
                go.wait()
                yield step
        else:
            yield from walk(*args)

    monkeypatch.setattr(os, "walk", slow)
    done: list[Receipt] = []
    thread = threading.Thread(target=lambda: done.append(forget_user(vault, "alice", [runs])))
    vault.append_history("dave", make_items("1"))
    thread.start()
    walks.wait()
    vault.append_history("bob", make_items("9"))
    vault.append_history("alice", make_items("1"))  # even the user comes back at once
    assert verify_receipt(vault, forget_user(vault, "dave")) == []
    go.set()
    thread.join()
    assert done and vault.read_history("alice") == tuple(make_items("1"))


class Crash(BaseException):
    pass


@pytest.mark.parametrize(
    ("forget", "gone"),
    [
        (lambda vault, runs: forget_user(vault, "alice", [runs]), CANARIES),
        (lambda vault, runs: forget_items(vault, "alice", ["2"], [runs]), ("canary été 2", "profile canary")),
        (lambda vault, runs: forget_items(vault, "alice", ["9"], [runs]), ("canary query",)),
        (lambda vault, runs: forget_user(vault, "carol", [runs]), ("carol", "canary base")),
        (lambda vault, runs: forget_user(vault, "dave", [runs]), ("dave", "canary known")),
    ],
    ids=["user", "item", "query", "base user", "base user in the vault"],
)
@pytest.mark.parametrize("encrypt", [False, True])
def test_forgetting_goes_on_after_a_crash_at_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget: Callable[[Vault, Path], Receipt],
    gone: tuple[str, ...],
    encrypt: bool,
) -> None:
    vault = Vault(tmp_path / "template" / "vault", encrypt=encrypt)
    vault.append_history("alice", [Item("1"), Item("2", text="canary été 2")])
    vault.put_blob("alice", "profile.txt", b"profile canary")
    vault.commit("alice", make_adapter(1), make_manifest(("1",)))
    vault.commit("alice", make_adapter(2), make_manifest(("1", "2")))
    vault.add_users(["dave"])
    vault.close()
    source = [
        UserHistory("alice", "target", (Item("1"), Item("2", text="canary été 2")), (Item("9", text="canary query"),)),
        UserHistory("carol", "base", (Item("1", text="canary base"),)),
        UserHistory("dave", "base", (Item("1", text="canary known"),)),
        UserHistory("eve", "base", (Item("1"),)),
    ]
    write_prepared(tmp_path / "template" / "runs" / "prepare", source)
    (tmp_path / "template" / "runs" / "adapt").mkdir()
    line = json.dumps({"user_id": "alice", "query_id": "2"}) + "\n"
    (tmp_path / "template" / "runs" / "predictions.jsonl").write_text(line)
    at, receipt = 0, None
    while receipt is None:
        at += 1
        shutil.copytree(tmp_path / "template", tmp_path / f"{at}")
        vault, runs = Vault(tmp_path / f"{at}" / "vault"), tmp_path / f"{at}" / "runs"
        count = 0

        def die(operation: Callable[..., Any], *args: Any, at: int = at) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                raise Crash
            return operation(*args)

        with monkeypatch.context() as patch:
            patch.setattr(vault_module, "step", die)
            patch.setattr("oppu_ray.forget.step", die)
            try:
                receipt = forget(vault, runs)
            except Crash:
                pass
        if receipt is None:
            again = forget(vault, runs)
            vault.gc(min_age_s=-1)
            assert verify_receipt(vault, again, [runs], gone) == []
            assert (runs / "adapt").exists() == (again.user_hash == vault.user_hash("alice"))
            assert again.needs_training or gone[0] != "canary été 2"
            prepared_again = repr(list(map(without_forgotten(vault), source)))
            assert not any(canary in prepared_again for canary in gone)
        assert vault.verify() == []
        vault.close()
    assert at > 5
