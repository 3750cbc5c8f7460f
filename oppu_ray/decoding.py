"""What stands between the matrix products of one decoding step: LoRA, norms, gates, attention to the cache.

In: tensors of one new token per row. Out: the same functions as in `kernels` and `attention`, on a CPU from
`decoding.cpp`, which this machine's C++ compiler builds at first use. The decision a reader would question: C++. With
one token per row a call costs more than what it computes: PyTorch makes 25 a layer, and looking up a compiled kernel
takes 20 to 90 us. Without a compiler, or on a GPU, everything here is done by PyTorch.

Shapes: B rows, H query heads, G key heads, W head width, D hidden, S slots, R rank, I and O widths of a linear.
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
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from oppu_ray.files import oppu_home, write_atomic
from oppu_ray.kernels import fused
from oppu_ray.machine import cpu_flags

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
POINTER, SIZE, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "rms_norm": [*[SIZE] * 2, *[POINTER] * 2, FLOAT, POINTER],
    "gated": [SIZE, *[POINTER] * 2, INT],
    "add_lora": [*[SIZE] * 4, *[POINTER] * 5, SIZE, POINTER, *[SIZE] * 3, INT],
    "attend": [*[SIZE] * 4, *[POINTER] * 7, *[SIZE] * 2, POINTER, SIZE, FLOAT, POINTER, INT],
}

RowLora = tuple[Tensor, Tensor, Tensor, Tensor]  # slot_B, scaling_B, a_SRI, b_SOR


@functools.cache
def _functions() -> dict[tuple[str, torch.dtype], Callable[..., None]]:
    """The functions of `decoding.cpp`; none where they cannot be built."""
    if (compiler := shutil.which("g++")) is None:
        return {}
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error)[:500]
        logger.warning("decoding.cpp cannot be built or loaded, so PyTorch does its work: %s", reason)
        return {}
    functions = {}
    for name, arguments in ARGUMENTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            functions[name, dtype] = function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
            function.argtypes, function.restype = arguments, None
    return functions


def _built(compiler: str) -> Path:
    """The library in `$OPPU_HOME/native`, named by what it was built from and for; built if it is not there.

    It uses the OpenMP that torch has loaded, which is GCC's: another one would be another team of threads.
    """
    about = (SOURCE.read_text(), *FLAGS, compiler, platform.machine(), *sorted(cpu_flags()))
    path = oppu_home() / "native" / f"decoding-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
            write_atomic(path, made.read_bytes())
    return path


def _native(name: str, x: Tensor, *others: Tensor) -> Callable[..., None] | None:
    """The C++ function of that name, if the tensors are such as it takes: on the CPU and of one type."""
    if x.device.type != "cpu" or any(other.dtype != x.dtype for other in others):
        return None
    return _functions().get((name, x.dtype))


def rms_norm_rows(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    function = _native("rms_norm", x_BD, weight_D)
    if function is None:
        return torch.rms_norm(x_BD, weight_D.shape, weight_D, eps)
    x_BD = x_BD.contiguous()
    out_BD = torch.empty_like(x_BD)
    function(*x_BD.shape, x_BD.data_ptr(), weight_D.data_ptr(), eps, out_BD.data_ptr())
    return out_BD


def gated_rows(gate_BD: Tensor, up_BD: Tensor) -> Tensor:
    """silu(gate) * up; may write over the gate."""
    function = _native("gated", gate_BD, up_BD)
    if function is None:
        return torch.nn.functional.silu(gate_BD).mul_(up_BD)
    gate_BD, up_BD = gate_BD.contiguous(), up_BD.contiguous()
    function(gate_BD.numel(), gate_BD.data_ptr(), up_BD.data_ptr(), torch.get_num_threads())
    return gate_BD


@partial(fused, dynamic=None)
def _lora_rows(x_BI: Tensor, y_BO: Tensor, lora: RowLora) -> Tensor:
    slot_B, scaling_B, a_SRI, b_SOR = lora
    low_BR = (x_BI[:, None].float() * a_SRI[slot_B].float()).sum(-1) * scaling_B[:, None]
    added_BO = (low_BR[:, None] * b_SOR[slot_B].float()).sum(-1)
    return torch.where(scaling_B[:, None] != 0, y_BO.float() + added_BO, y_BO.float()).to(y_BO.dtype)


def add_lora_rows(x_BI: Tensor, y_BO: Tensor, lora: RowLora) -> Tensor:
    """y + scaling * (x A^T) B^T with each row's own slot; a row of scaling 0 is y itself, whatever its slot holds.

    May write over y. Each slot's A is dense, B may lie either way. They are read where they lie: that takes most of the
    time, 40 us for 32 rows of rank 8.
    """
    slot_B, scaling_B, a_SRI, b_SOR = lora
    function = _native("add_lora", x_BI, y_BO, a_SRI, b_SOR)
    if function is None:
        return _lora_rows(x_BI, y_BO, lora)
    x_BI, y_BO = x_BI.contiguous(), y_BO.contiguous()
    pointers = (x_BI.data_ptr(), y_BO.data_ptr(), slot_B.data_ptr(), scaling_B.data_ptr(), a_SRI.data_ptr())
    stacks = (a_SRI.stride(0), b_SOR.data_ptr(), *b_SOR.stride())
    function(*x_BI.shape, *b_SOR.shape[1:], *pointers, *stacks, torch.get_num_threads())
    return y_BO


def attend_rows(
    q_BHW: Tensor,
    k_BGW: Tensor,
    v_BGW: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int,
) -> Tensor | None:
    """Store each row's new key and value at the end of what it holds, and attend to that, [B, H, W].

    Args:
        cos_sin: Each [B, 1, W], to turn queries and keys by; None if they are.
        keys, values: [rows, G, positions, W] of the cache, at least B rows.
        lengths_B: Positions each row holds before.
        window: How many positions back a token sees; 0 for all.

    Returns:
        None if this is not to be had here; nothing is stored then.
    """
    function = _native("attend", q_BHW, k_BGW, v_BGW, keys, *(cos_sin or ()))
    if function is None:
        return None
    q_BHW, k_BGW, v_BGW = q_BHW.contiguous(), k_BGW.contiguous(), v_BGW.contiguous()
    cos, sin = (x.contiguous() for x in cos_sin) if cos_sin else (None, None)
    out_BHW = torch.empty_like(q_BHW)
    function(
        *(*q_BHW.shape[:2], *k_BGW.shape[1:]),
        *(None if x is None else x.data_ptr() for x in (q_BHW, k_BGW, v_BGW, cos, sin, keys, values)),
        *(*keys.stride()[:2], lengths_B.data_ptr(), window, scale, out_BHW.data_ptr(), torch.get_num_threads()),
    )
    return out_BHW
