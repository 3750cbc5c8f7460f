"""Measures the vault: looking up a user among many, loading and verifying an adapter, committing one. Prints one JSON.

    python -m jobs.bench.vault [--users 100000 --repeats 200 --folder runs]

The adapter is a 1 MiB LoRA. Vaults are made in a temporary folder below `--folder`, whose disk is then measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oppu_ray.core import AdapterState
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the vault is made and removed (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = {}
        for name, is_sealed in (("plain", False), ("sealed", True)):
            vault = Vault(Path(folder) / name, encrypt=is_sealed)
            rows[name] = measure(vault, options.users, options.repeats)
            vault.close()
    print(json.dumps({"users": options.users, "machine": platform.platform(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
