"""A checkpoint comes back as it was, or not at all; it is private, and nothing of it stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oppu_ray.checkpoints import Checkpoint, remove_checkpoints
from oppu_ray.core import UserDone
from oppu_ray.forget import forget_user
from oppu_ray.training import PackState, UserState
from oppu_ray.vault import Vault

PACK = ("ann", "bob", "cleo")
DONE = UserDone("cleo", "000001-1", None, 2.5, 1.25, 3, 70)


def state(num_steps: int) -> PackState:
    """Ann and Bob after so many steps; Cleo is through."""
    users = {
        user_id: UserState({"q.a.value": torch.full((2, 3), 0.1 + i + num_steps)}, (1 / 3, 0.1), 17 + i)
        for i, user_id in enumerate(PACK[:2])
    }
    return PackState(num_steps, users)


def same(a: PackState, b: PackState) -> bool:
    return (
        a.num_steps == b.num_steps
        and a.users.keys() == b.users.keys()
        and all(
            (x.losses, x.num_tokens, x.tensors.keys()) == (y.losses, y.num_tokens, y.tensors.keys())
            and all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
            for x, y in ((a.users[user_id], b.users[user_id]) for user_id in a.users)
        )
    )


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault", encrypt=request.param)


@pytest.fixture
def checkpoint(vault: Vault, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Makes the checkpoint as a new process would; pack, run and base can differ."""

    def make(pack: tuple[str, ...] = PACK, run_id: str = "run", base: str = "base") -> Checkpoint:
        return Checkpoint(tmp_path / "run", vault, run_id, pack, base)

    return make


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_what_is_saved_comes_back(checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    assert checkpoint().load() is None
    checkpoint().save(state(1), [])
    checkpoint().save(state(4), [DONE])
    loaded, finished = checkpoint().load()  # type: ignore[misc]
    assert same(loaded, state(4)) and finished == [DONE]
    assert {path.parent.name for path in files(tmp_path)} == {"00000004"}  # the older one is gone
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files(tmp_path))
    assert all(path.stat().st_mode & 0o77 == 0 for path in (tmp_path / "run" / "checkpoints").rglob("*"))


def test_a_user_is_named_by_their_hash_alone_and_forgetting_them_leaves_no_checkpoint(
    checkpoint: Callable[..., Checkpoint], vault: Vault, tmp_path: Path
) -> None:
    vault.add_users(PACK)
    checkpoint().save(state(1), [DONE])
    assert not [path for path in files(tmp_path) if any(user.encode() in path.read_bytes() for user in PACK)]
    is_sealed = all(b"q.a.value" not in path.read_bytes() for path in files(tmp_path))
    assert is_sealed == vault.is_encrypted
    forget_user(vault, "bob", [tmp_path / "run"])
    assert not [path for path in files(tmp_path) if vault.user_hash("bob") in path.name]
    assert checkpoint().load() is None


@pytest.mark.parametrize("name", ["pack.json", "*.safetensors"])
def test_a_damaged_checkpoint_is_ignored_with_a_warning(
    checkpoint: Callable[..., Checkpoint], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint().save(state(1), [])
    damaged = next((tmp_path / "run").rglob(name))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert checkpoint().load() is None and "ignored" in caplog.text
    checkpoint().save(state(1), [])  # and it does not stand in the way of the next
    assert same(checkpoint().load()[0], state(1))  # type: ignore[index]


def test_a_checkpoint_that_cannot_be_read_now_stays(
    vault: Vault, checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint().save(state(1), [])
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert checkpoint().load() is None and files(tmp_path) == before
    if vault.is_encrypted:
        os.rename(vault.root / "keys", tmp_path / "kept")
        assert checkpoint().load() is None and files(tmp_path) == before
        os.rename(tmp_path / "kept", vault.root / "keys")
    assert same(checkpoint().load()[0], state(1))  # type: ignore[index]


def test_another_pack_run_or_base_has_another_checkpoint(checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint().save(state(1), [])
    for other in (checkpoint(("bob", "ann", "cleo")), checkpoint(run_id="other"), checkpoint(base="other")):
        assert other.load() is None
        other.remove()
    assert checkpoint().load() is not None


def test_a_torn_write_leaves_the_older_one(
    checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint().save(state(1), [])
    with monkeypatch.context() as patch:
        patch.setattr("oppu_ray.checkpoints._write", lambda path, content: (_ for _ in ()).throw(OSError(28, "full")))
        checkpoint().save(state(2), [])
    assert "no checkpoint written" in caplog.text and same(checkpoint().load()[0], state(1))  # type: ignore[index]


def test_nothing_stays(checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    for run_id in ("run", "other"):
        checkpoint(run_id=run_id).save(state(1), [])
        checkpoint(("dan",), run_id).save(PackState(1, {}), [])
    checkpoint().remove()
    assert checkpoint().load() is None and len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    remove_checkpoints(tmp_path / "run", "run")
    remove_checkpoints(tmp_path / "run", "other")
    assert files(tmp_path) == []
