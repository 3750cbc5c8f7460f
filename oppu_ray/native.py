"""The C++ in `cpp/`, built by this machine's compiler at first use (under `kernels`, `attention` and `decoding`).

In: the name of a function and the tensors that it is for. Out: the function, or None where PyTorch is to do its work:
on a GPU, for other types than float32 and bfloat16, or without g++. The decision a reader would question: C++ at all.
Between the matrix products of a small model stands as much time as in them: passes over memory, exponentials, copies
for batched products, and for one token per row the mere calls. torch.compile mends a part of that, for seconds at every
start and 20 to 90 us a call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oppu_ray.files import oppu_home, write_atomic
from oppu_ray.machine import cpu_flags

logger = logging.getLogger(__name__)
SOURCES = Path(str(files("oppu_ray"))) / "cpp"
# Without jump threading: it turns the clamps of an exponential into cases, and a vector then computes each of them.
EXACT = ("-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", *EXACT, "-shared", "-fPIC")
DTYPES = (torch.float32, torch.bfloat16)
TENSOR, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SEGMENTS = (SIZE, TENSOR, TENSOR, SIZE, SIZE, SIZE, FLOAT, SIZE)
ARGUMENTS = {  # each takes the number of threads, too
    "rms_norm": (SIZE, SIZE, TENSOR, TENSOR, FLOAT, TENSOR),
    "rms_norm_gradient": (SIZE, SIZE, *[TENSOR] * 3, FLOAT, *[TENSOR] * 2),
    "gated": (SIZE, *[TENSOR] * 3),
    "gated_gradient": (SIZE, *[TENSOR] * 5),
    "rotate": (*[SIZE] * 3, *[TENSOR] * 4),
    "rotate_back": (*[SIZE] * 3, *[TENSOR] * 4),
    "token_losses": (SIZE, SIZE, *[TENSOR] * 3),
    "token_loss_gradient": (SIZE, SIZE, *[TENSOR] * 4),
    "segments_forward": (*SEGMENTS, *[TENSOR] * 5),
    "segments_backward": (*SEGMENTS, *[TENSOR] * 9),
    "add_lora_rows": (*[SIZE] * 4, *[TENSOR] * 5, SIZE, TENSOR, *[SIZE] * 3),
    "attend_cached": (SIZE, TENSOR, *[SIZE] * 3, FLOAT, SIZE, *[TENSOR] * 7, *[SIZE] * 2, TENSOR),
}

Function = Callable[..., None]
"""Takes contiguous tensors (None for none) and numbers, and looks at neither: shapes are the caller's to know."""


def native(name: str, x: Tensor, *others: Tensor) -> Function | None:
    """The C++ function of that name, if the tensors are such as it takes: on the CPU and of one type."""
    if x.device.type != "cpu" or any(other.dtype != x.dtype for other in others):
        return None
    return functions().get((name, x.dtype))


@functools.cache
def functions() -> dict[tuple[str, torch.dtype], Function]:
    """All of them; none where they cannot be built."""
    if (compiler := shutil.which("g++")) is None:
        return {}
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error)[:500]
        logger.warning("oppu_ray/cpp cannot be built or loaded, so PyTorch does its work: %s", reason)
        return {}
    return {
        (name, dtype): _function(getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}"), arguments)
        for name, arguments in ARGUMENTS.items()
        for dtype in DTYPES
    }


def _function(function: Any, arguments: tuple[Any, ...]) -> Function:
    function.argtypes, function.restype = (*arguments, ctypes.c_int), None

    def call(*given: Tensor | float | None) -> None:
        function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given), torch.get_num_threads())

    return call


def _built(compiler: str) -> Path:
    """The library in `$OPPU_HOME/native`, named by what it was built from and for; built if it is not there.

    It uses the OpenMP that torch has loaded, which is GCC's: another one would be another team of threads.
    """
    sources, headers = (sorted(SOURCES.glob(pattern)) for pattern in ("*.cpp", "*.h"))
    texts = [path.read_text() for path in (*sources, *headers)]
    about = (*texts, *FLAGS, compiler, platform.machine(), *sorted(cpu_flags()))
    path = oppu_home() / "native" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, *map(str, sources), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            write_atomic(path, made.read_bytes())
    return path
