"""What this machine is and what it multiplies well (it stands beside `base_model` and every result).

In: /proc/cpuinfo and torch. Out: facts for `result.json`, and the type to compute in. A reader might question that a
list of flags decides and no measurement: the answer must be the same at every start, beside whatever else runs.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from oppu_ray import __version__

CPUINFO = Path("/proc/cpuinfo")
FAST_FLAGS = {"bfloat16": {"amx_bf16", "avx512_bf16", "bf16"}, "float16": {"amx_fp16", "avx512_fp16", "asimdhp"}}
"""A CPU with none of a type's flags multiplies it far slower than float32: 9.6 GFLOP/s a core for 87 on Zen 3."""


def cpu_flags() -> set[str]:
    """The instructions of the first core, as the kernel names them; none where it does not say."""
    return set((_cpu_fact("flags") or _cpu_fact("Features")).split())


def compute_dtype(dtype: str, device_type: str) -> str:
    """In which type weights of `dtype` are best multiplied: their own, or float32 on a CPU without such products."""
    is_slow = device_type == "cpu" and dtype in FAST_FLAGS and not FAST_FLAGS[dtype] & cpu_flags()
    return "float32" if is_slow else dtype


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch  # not above: the doctor reads this file on machines that lack it

    return {
        "cpu": _cpu_fact("model name") or platform.processor(),
        "num_cores": os.cpu_count(),
        "bfloat16": sorted(FAST_FLAGS["bfloat16"] & cpu_flags()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "torch": torch.__version__,
        "oppu_ray": __version__,
    }


def _cpu_fact(name: str) -> str:
    """The first core's, "" where there is none of that name."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in facts if key.strip() == name), "")
