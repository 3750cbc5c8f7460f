"""`oppu doctor` finds what is missing, and says the command that gets it."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from oppu_ray import doctor
from oppu_ray.doctor import Check

ROOT = Path(__file__).resolve().parents[1]


def test_every_part_is_looked_at_and_home_is_not_made(tmp_path: Path) -> None:
    checks = doctor.run_doctor(tmp_path / "not" / "yet")
    names = {check.name for check in checks}
    assert {"python", "faiss", "bitsandbytes", "C++ compiler", "CPU", "GPU", "OPPU_HOME", "Ray token"} <= names
    assert {"embedded:smollm2-135m", "embedded:gemma3-270m"} <= names
    assert not (tmp_path / "not").exists()


def test_package_versions_against_ranges() -> None:
    numpy = metadata.version("numpy")
    good, old, missing = doctor.check_packages(
        [f"numpy=={numpy}", "numpy<1", "no-such-package-of-ours>=2", "pytest>=99; extra == 'dev'"]
    )
    assert good == Check("numpy", True, f"{numpy}, wanted =={numpy}")
    assert not old.ok and old.found == f"{numpy}, wanted <1"
    assert old.advice == f"{sys.executable} -m pip install 'numpy<1'"
    assert not missing.ok and missing.found == "not installed, wanted >=2"


def test_our_own_package_not_installed() -> None:
    (check,) = doctor.check_packages(None)
    assert check.name == "oppu-ray" and not check.ok and "-e '.[cpu]'" in check.advice


@pytest.mark.parametrize(("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 15), False)])
def test_the_pythons_are_those_of_the_packages_metadata(
    version: tuple[int, int], ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": project["requires-python"]})
    check = doctor.check_python(version)
    assert check.ok == ok and (ok or check.found.endswith("wanted <3.15,>=3.11"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_compiler().ok
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler() == Check(
        "C++ compiler", False, "none (DeepSpeed needs one, a CPU is slow without)", "apt-get install -y g++"
    )


def test_no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version_of", lambda name: None)
    check = doctor.check_faiss()
    assert not check.ok and check.advice.endswith("pip install 'faiss-cpu<2,>=1.15.1'")  # as an extra asks for it


def test_bitsandbytes_is_optional_and_must_work_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert doctor.check_bitsandbytes().ok and doctor.check_bitsandbytes().found.endswith("int8 and nf4 work")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    broken = doctor.check_bitsandbytes()
    assert not broken.ok and "cannot be imported" in broken.found and "pip install 'bitsandbytes<" in broken.advice
    monkeypatch.setattr(doctor, "_version_of", lambda name: None)
    absent = doctor.check_bitsandbytes()
    assert absent.ok and "only base.quantization needs it" in absent.found and absent.advice == broken.advice


def test_cpu_features() -> None:
    assert "amx_bf16" in doctor.check_cpu({"amx_bf16", "fpu"}).found
    plain = doctor.check_cpu({"fpu"})
    assert plain.ok and plain.found.endswith("bases are multiplied in float32")


def _fake_nvidia_smi(folder: Path, output: str, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{output}\nexit {code}\n")
    script.chmod(0o755)


def test_gpu_with_a_torch_that_cannot_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _fake_nvidia_smi(tmp_path, "echo 'NVIDIA H100'; echo 'NVIDIA H100'")
    monkeypatch.setattr(doctor, "_version_of", lambda name: "2.13.0+cpu")
    check = doctor.check_gpu()
    assert not check.ok and check.found.startswith("2 x NVIDIA H100") and "torch" in check.advice
    monkeypatch.setattr(doctor, "_version_of", lambda name: "2.13.0+cu130")
    assert doctor.check_gpu().ok
    _fake_nvidia_smi(tmp_path, "echo 'no devices were found'", code=9)
    assert doctor.check_gpu().found.startswith("none")


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.check_home(tmp_path / "file")
    assert not check.ok and str(tmp_path / "file") in check.found and check.advice.startswith("export OPPU_HOME=")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_too_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 10**18)
    assert not doctor.check_home(tmp_path).ok


def test_bases_prepared_or_not(tmp_path: Path) -> None:
    (tmp_path / "bases" / "smollm2-135m-bfloat16").mkdir(parents=True)
    smollm2, gemma3 = doctor.check_bases(tmp_path)
    assert smollm2.found == str(tmp_path / "bases" / "smollm2-135m-bfloat16") and not smollm2.advice
    assert gemma3.ok and gemma3.found == "not prepared yet"
    assert "prepare_base(BaseConfig('embedded:gemma3-270m'))" in gemma3.advice


def test_ray_token_that_others_can_read(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert doctor.check_ray_token(token).ok
    token.write_text("secret")
    token.chmod(0o644)
    check = doctor.check_ray_token(token)
    assert not check.ok and check.advice == f"chmod 600 {token}" and "secret" not in check.found
    token.chmod(0o600)
    assert doctor.check_ray_token(token).ok


def test_printer_shows_advice_and_counts() -> None:
    lines: list[str] = []
    checks = [Check("a", True, "fine"), Check("b", False, "gone", "get b")]
    assert doctor.print_checks(checks, lines.append) is False
    assert lines[0].startswith("ok") and lines[1].startswith("MISSING") and lines[2].endswith("-> get b")
    assert lines[-1] == "2 checks, 1 need attention"
    assert doctor.print_checks(checks[:1], lines.append) is True
