"""What the tests of vault, registry, archive and forget share: a tiny adapter, a clock, a temporary PostgreSQL."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from oppu_ray.core import AdapterState, Item
from oppu_ray.vault import Manifest, Vault

BASE = "base-fingerprint-1"
_KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


class Clock:
    """Unix seconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make_adapter(seed: int, rank: int = 2, width: int = 8, layers: int = 1) -> AdapterState:
    """A LoRA adapter on `q_proj` of `layers` layers."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        tensors[_KEY.format(layer, "A")] = random.standard_normal((rank, width), dtype=np.float32)
        tensors[_KEY.format(layer, "B")] = random.standard_normal((width, rank), dtype=np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return AdapterState(tensors, {**config, "base_model_name_or_path": "tiny"})


def make_manifest(item_ids: tuple[str, ...] = ("1", "2"), run_id: str = "", base: str = BASE) -> Manifest:
    return Manifest(base, "task-1", item_ids, {"epochs": 3}, seed=7, metrics={"loss": 0.5}, run_id=run_id)


def make_items(*item_ids: str, label: str = "a") -> list[Item]:
    return [Item(item_id, time="2024-01-01", text=f"text of {item_id}", label=label) for item_id in item_ids]


def same(a: AdapterState, b: AdapterState) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(np.array_equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def segment_files(vault: Vault, user: str) -> list[Path]:
    """The files of a user's history, in order."""
    folder = vault.user_folder(vault.user_hash(user)) / "history"
    return [folder / segment.name for segment in vault.history(user).segments]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: these tests make hundreds of vaults, and a vault syncs all it writes."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="oppu-test-") as folder:
        yield Path(folder)


class PostgresServer:
    """A PostgreSQL server of our own in a folder, which can be killed, started again, and followed by a standby."""

    def __init__(self, folder: Path) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        initdb = shutil.which("initdb") or (found[-1] if found else None)
        if initdb is None:
            pytest.skip("no PostgreSQL server here: apt-get install postgresql")
        self._binaries = Path(initdb).resolve().parent
        self._user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
        self.folder, self._data = folder, folder / "data"
        self.url = f"postgresql+psycopg://oppu@/postgres?host={folder}"
        if self._user:
            shutil.chown(folder, self._user)

    def _run(self, command: str, *arguments: str) -> None:
        run = [str(self._binaries / command), "-D", str(self._data), *arguments]
        subprocess.run(run, user=self._user, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def create(self) -> None:
        self._run("initdb", "-U", "oppu", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8")

    def follow(self, primary: PostgresServer) -> None:
        """Become a standby of another server that is running."""
        self._run("pg_basebackup", "-h", str(primary.folder), "-U", "oppu", "-R", "-c", "fast", "--no-sync")

    def start(self, *settings: str) -> None:
        """Start, with settings such as "synchronous_standby_names=*"."""
        always = ("listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=off")
        options = " ".join(f"-c {setting}" for setting in (*always, *settings))
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def promote(self) -> None:
        """From a standby to a primary."""
        self._run("pg_ctl", "-w", "promote")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and all its processes; returns when they are gone."""
        pid_file = self._data / "postmaster.pid"
        parent = int(pid_file.read_text().split()[0])
        found = {int(path.name): _state_and_parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        killed = [parent, *(pid for pid, (_, its_parent) in found.items() if its_parent == parent)]
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(_state_and_parent(Path("/proc", str(pid)))[0] not in "ZX" for pid in killed):
            time.sleep(0.01)
        for path in (pid_file, *self.folder.glob(".s.PGSQL.*")):
            path.unlink()  # with the id of a zombie (nothing may reap it) it keeps the next server from starting


def _state_and_parent(process: Path) -> tuple[str, int]:
    """As in /proc/<pid>/stat; ("X", 0) when it is gone."""
    try:
        fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[1])


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket, which the server's user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="oppu-pg-") as folder:
        yield Path(folder)


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of an empty PostgreSQL that lives as long as the block; skips the test where it is not installed."""
    with server_folder() as folder:
        server = PostgresServer(folder)
        server.create()
        server.start()
        try:
            yield server.url
        finally:
            server.stop()


def empty_postgres(url: str) -> None:
    """Drop all tables, so that the next test finds a new database."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and never come back; returns the child's process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child
