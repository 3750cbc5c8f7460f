"""Files and folders appear whole or not at all; a wheel is downloaded once, verified, and never installed."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from oppu_ray.files import fetch_wheel, new_folder, oppu_home, write_atomic, write_once

WHEEL = "tiny_data-1.0-py3-none-any.whl"


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_home_is_the_environments_or_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for value, home in (("/data/oppu", "/data/oppu"), ("~/oppu", "/home/ann/oppu"), ("", "/home/ann/.cache/oppu-ray")):
        monkeypatch.setenv("OPPU_HOME", value)
        assert oppu_home() == Path(home)
    monkeypatch.delenv("OPPU_HOME")
    assert oppu_home() == Path("/home/ann/.cache/oppu-ray")


@pytest.mark.parametrize(("write", "left"), [(write_atomic, b"new"), (write_once, b"old")])
def test_a_file_is_written_whole_or_not_at_all(
    write: Callable[[Path, bytes], None], left: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == left and stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(os, "fsync", full_disk)
    for name in ("a.json", "b.json"):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / name, b"newer")
    assert path.read_bytes() == left and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())
    with new_folder(tmp_path / "deep" / "a") as partial:
        (partial / "whole").write_text("x")
        assert not (tmp_path / "deep" / "a").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]
    with (
        pytest.raises(ValueError, match="deep/a: already exists and is never overwritten"),
        new_folder(partial.parent / "a"),
    ):
        pass
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"), new_folder(tmp_path / "deep" / "b") as partial:
        (partial / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


def test_every_file_of_a_new_folder_is_synced_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def record(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(name if (tmp_path / "a").exists() else f"early {name}")

    monkeypatch.setattr(os, "fsync", record)
    with new_folder(tmp_path / "a") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
    assert set(synced) == {"early file", "early sub", f"early {partial.name}", tmp_path.name}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of PyPI, with one wheel; building it or importing it would fail."""
    (tmp_path / "shop").mkdir()
    with zipfile.ZipFile(tmp_path / "shop" / WHEEL, "w") as wheel:
        wheel.writestr("tiny_data/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    return tmp_path / "shop"


def test_a_wheel_is_downloaded_once_and_verified_every_time(shop: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256((shop / WHEEL).read_bytes()).hexdigest()
    path = fetch_wheel("tiny-data==1.0", tmp_path / "wheels", sha256)
    assert [*(tmp_path / "wheels").iterdir()] == [path] and path.name == WHEEL
    (shop / WHEEL).unlink()
    assert fetch_wheel("tiny-data==1.0", tmp_path / "wheels", sha256) == path
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{WHEEL}: SHA-256 is .*: expected {sha256}; remove the file and try again"):
        fetch_wheel("tiny-data==1.0", tmp_path / "wheels", sha256)


def test_a_wheel_that_cannot_be_had_says_how_to_put_it_there(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip could not download nobody==1: ERROR: (.|\n)*put into .*wheels by hand: "):
        fetch_wheel("nobody==1", tmp_path / "wheels")
    assert not any((tmp_path / "wheels").iterdir())
