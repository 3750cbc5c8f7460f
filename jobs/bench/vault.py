"""Measures the vault: looking up a user among many, loading and verifying an adapter, committing one. Prints one JSON.

    python -m jobs.bench.vault [--users 100000 --repeats 200 --folder runs]
    python -m jobs.bench.vault --versions 10 [--users 100000 --folder runs]

The adapter is a 1 MiB LoRA. Vaults are made in a temporary folder below `--folder`, whose disk is then measured. With
`--versions` it measures the walks over everyone instead, each in a process of its own, and prints the processor seconds
and the peak of memory above that of an open vault: with a tenth of the users, and with all.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from oppu_ray import registry as registry_module
from oppu_ray.core import AdapterState
from oppu_ray.registry import Entry, Segment, Version
from oppu_ray.vault import Manifest, Vault

BASE = "a base"


def adapter_of_1_mib() -> AdapterState:
    """LoRA of rank 8 on 16 layers' `q_proj` of 1024 x 1024: 16 x (8 x 1024 + 1024 x 8) floats."""
    random = np.random.default_rng(0)
    name, shapes = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight", {"A": (8, 1024), "B": (1024, 8)}
    tensors = {
        name.format(layer, part): random.standard_normal(shape, dtype=np.float32)
        for layer in range(16)
        for part, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    return AdapterState(tensors, {**config, "base_model_name_or_path": BASE})


def median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def measure(vault: Vault, num_users: int, repeats: int) -> dict[str, float]:
    """Medians in milliseconds, and what registering everyone took in seconds."""
    adapter, manifest = adapter_of_1_mib(), Manifest(BASE, "", ("1",), {}, 0, {})
    started = time.perf_counter()
    vault.add_users([f"user {number}" for number in range(num_users)])
    add_s = time.perf_counter() - started
    user = f"user {num_users // 2}"
    commit_ms = median_ms(lambda: vault.commit(user, adapter, manifest), max(1, repeats // 10))
    return {
        "add_users_s": round(add_s, 2),
        "commit_ms": commit_ms,
        "lookup_ms": median_ms(lambda: vault.registry.current(vault.user_hash(user)), repeats),
        "load_and_verify_ms": median_ms(lambda: vault.load(user, base_fingerprint=BASE), repeats),
    }


def fill(vault: Vault, num_users: int, num_versions: int) -> None:
    """Rows as commits and appends leave them, audit log included; on the disk each user's newest version and segment.

    Past the registry's own methods: a million transactions would take hours.
    """
    vault.add_users([f"user {number}" for number in range(num_users)])
    registry, segment = vault.registry, Segment(1, "000001-0.jsonl", 1, 1, bytes(16))
    last = registry.audit_log()[-1]
    with registry._write() as connection:
        for user in registry.hashes():
            folder = vault.user_folder(user)
            rows = [Version(user, f"{n:06d}-{n}", n, BASE, "0" * 64, "", float(n)) for n in range(1, num_versions + 1)]
            (folder / "adapters" / rows[-1].version).mkdir(parents=True)
            (folder / "history").mkdir()
            (folder / "history" / segment.name).touch()
            lines = []
            for row in rows:
                line = Entry(last.number + 1, 0.0, "publish", user, json.dumps({"version": row.version}), "")
                last = replace(line, chain=registry._chain(last.chain, line))
                lines.append(asdict(last))
            connection.execute(sa.insert(registry_module._VERSIONS), [asdict(row) for row in rows])
            connection.execute(sa.insert(registry_module._SEGMENTS), [{"user_hash": user, **asdict(segment)}])
            connection.execute(sa.insert(registry_module._AUDIT), lines)


WALKS: dict[str, Callable[[Vault], object]] = {
    "open": lambda vault: None,
    "list": lambda vault: vault.registry.users(),
    "list_by_pages": lambda vault: sum(1 for _ in vault.registry.hashes()),
    "gc": lambda vault: vault.gc(),
    "verify_audit": lambda vault: vault.registry.verify_audit(),
}


def walk(root: Path, name: str) -> None:
    """One walk, measured in this process; prints [processor seconds, peak of memory in MB]."""
    vault = Vault(root, create=False)
    started = time.process_time()
    WALKS[name](vault)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([round(time.process_time() - started, 2), round(peak_kb / 1000)]))


def measure_walks(folder: Path, num_users: int, num_versions: int) -> dict[str, dict[str, float]]:
    """Name of the walk to its processor seconds and its peak of memory."""
    vault = Vault(folder)
    fill(vault, num_users, num_versions)
    vault.close()
    rows: dict[str, dict[str, float]] = {}
    command = [sys.executable, "-m", "jobs.bench.vault", "--walk"]
    for name in WALKS:
        found = subprocess.run([*command, name, "--folder", str(folder)], check=True, capture_output=True, text=True)
        seconds, peak_mb = json.loads(found.stdout)
        rows[name] = {"cpu_s": seconds, "peak_mb": peak_mb - (rows["open"]["peak_mb"] if "open" in rows else 0)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the vault is made and removed (default: the system's)")
    parser.add_argument("--versions", type=int, help="measure the walks over everyone, with so many versions each")
    parser.add_argument("--walk", choices=WALKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.walk:
        walk(options.folder, options.walk)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows: dict[str, Any] = {}
        if options.versions:
            for num_users in (options.users // 10, options.users):
                rows[f"{num_users} users"] = measure_walks(Path(folder) / str(num_users), num_users, options.versions)
        else:
            for name, is_sealed in (("plain", False), ("sealed", True)):
                vault = Vault(Path(folder) / name, encrypt=is_sealed)
                rows[name] = measure(vault, options.users, options.repeats)
                vault.close()
    print(json.dumps({"users": options.users, "machine": platform.platform(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
