"""What to compute in follows from the CPU's own flags, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from oppu_ray import machine

X86 = "processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "flag", "bfloat16", "float16"),
    [
        (X86, "", "float32", "float32"),
        (X86, "amx_bf16", "bfloat16", "float32"),
        (X86, "avx512_bf16", "bfloat16", "float32"),
        (X86, "avx512_fp16", "float32", "float16"),
        (ARM, "", "float32", "float32"),
        (ARM, "bf16", "bfloat16", "float32"),
        (ARM, "asimdhp", "float32", "float16"),
    ],
)
def test_a_type_without_products_of_its_own_is_computed_in_float32(
    text: str, flag: str, bfloat16: str, float16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text.format(flag))
    assert [machine.compute_dtype(dtype, "cpu") for dtype in ("bfloat16", "float16", "float32")] == [
        bfloat16,
        float16,
        "float32",
    ]
    assert [machine.compute_dtype(dtype, "cuda") for dtype in ("bfloat16", "float16")] == ["bfloat16", "float16"]
    assert machine.hardware()["bfloat16"] == ([flag] if bfloat16 == "bfloat16" else [])


def test_the_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_flags() == set() and isinstance(machine.hardware()["cpu"], str)
    (tmp_path / "cpuinfo").write_text(X86.format(""))
    found = machine.hardware()
    assert found["cpu"] == "A CPU: fast" and machine.cpu_flags() == {"fpu", "avx2"}
    assert {"num_cores", "memory_bytes", "gpu", "disk_free_bytes", "torch", "oppu_ray"} <= found.keys()
