"""What the tests of vault, registry, archive and forget share: a tiny adapter, a clock, a temporary PostgreSQL."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from programs import skip_without

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


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of an empty PostgreSQL that lives as long as the block; skips the test where it is not installed."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    initdb = shutil.which("initdb") or (found[-1] if found else None)
    if initdb is None:
        skip_without("PostgreSQL")
    binaries = Path(initdb).resolve().parent
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="oppu-pg-") as folder:
        if user:
            shutil.chown(folder, user)

        def run(*command: str) -> None:
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        data = f"{folder}/data"
        run(str(binaries / "initdb"), "-D", data, "-U", "oppu", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run(str(binaries / "pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://oppu@/postgres?host={folder}"
        finally:
            run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")


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
