"""`oppu doctor`: what this machine has, what it lacks, and the exact command to get it (stands beside the line).

In: the installed packages, the machine, `$OPPU_HOME`. Out: a list of `Check`s, printed one a line.

Design: all version ranges are in `pyproject.toml`, and read from the metadata of the installed package.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from oppu_ray.machine import FAST_FLAGS, cpu_flags

PACKAGE = "oppu-ray"
MIN_FREE_BYTES = 3_000_000_000  # both embedded bases, their wheels, and room to prepare them
_PIP = f"{sys.executable} -m pip install"


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is the command that mends it; with `ok` it is a hint, or empty."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def run_doctor(home: Path) -> list[Check]:
    """Looks at everything a run needs; changes nothing and needs no network.

    Args:
        home: `$OPPU_HOME`, which need not exist yet.
    """
    return [
        check_python(sys.version_info[:2]),
        *check_packages(_requirements_of(PACKAGE)),
        check_faiss(),
        check_bitsandbytes(),
        check_compiler(),
        check_cpu(cpu_flags()),
        check_gpu(),
        check_home(home),
        *check_bases(home),
        check_ray_token(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")),
    ]


def print_checks(checks: list[Check], write: Callable[[str], object] = print) -> bool:
    """Prints one line a check, with its advice below it, and a summary; returns whether all are ok."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        write(f"{'ok     ' if check.ok else 'MISSING'}  {check.name:<{width}}  {check.found}")
        if check.advice:
            write(f"{'':<{width + 11}}-> {check.advice}")
    num_bad = sum(not check.ok for check in checks)
    write(f"{len(checks)} checks, " + (f"{num_bad} need attention" if num_bad else "all ok"))
    return num_bad == 0


def check_python(version: tuple[int, ...]) -> Check:
    found = ".".join(map(str, version))
    wanted = _python_range()
    ok = wanted.contains(found)
    text = f"{found} ({sys.executable})"
    return Check("python", ok, text if ok else f"{text}, wanted {wanted}", "" if ok else "python3.11 -m venv .venv")


def check_packages(requirements: list[str] | None) -> list[Check]:
    """Each requirement outside the extras against what is installed; None: our own package isn't installed."""
    if requirements is None:
        return [Check(PACKAGE, False, "not installed", f"{_PIP} -e '.[cpu]'")]
    checks = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version_of(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        found = f"{version or 'not installed'}, wanted {requirement.specifier or 'any'}"
        checks.append(Check(requirement.name, ok, found, "" if ok else f"{_PIP} '{requirement}'"))
    return checks


def check_faiss() -> Check:
    for name in ("faiss-gpu", "faiss-gpu-cu12", "faiss-cpu"):
        if version := _version_of(name):
            return Check("faiss", True, f"{name} {version}")
    return Check("faiss", False, "not installed", _install("faiss-cpu"))


def check_bitsandbytes() -> Check:
    """Only `base.quantization` needs it; one that is installed and does not work is a fault."""
    name = "bitsandbytes"
    version = _version_of(name)
    if version is None:
        return Check(name, True, "not installed; only base.quantization needs it", _install(name))
    try:
        import torch

        from oppu_ray.quantization import why_not

        reason = why_not(torch.device("cpu"))
    except ImportError as error:  # torch is missing, whose advice check_packages has given
        reason = str(error)
    return Check(name, not reason, reason or f"{version}, int8 and nf4 work", _install(name) if reason else "")


def check_compiler() -> Check:
    """DeepSpeed builds an op at first start, and fails outright without one; our own C++ (`native`) needs g++."""
    if path := shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"):
        return Check("C++ compiler", True, path)
    return Check("C++ compiler", False, "none (DeepSpeed needs one, a CPU is slow without)", "apt-get install -y g++")


def check_cpu(flags: set[str]) -> Check:
    fast = " and ".join(sorted(FAST_FLAGS["bfloat16"] & flags))
    found = fast or f"no bfloat16 instructions ({platform.machine()}): bases are multiplied in float32"
    return Check("CPU", True, f"{os.cpu_count()} cores, {found}")


def check_gpu() -> Check:
    """A GPU is never required; one that torch can't use is a fault."""
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", True, "none; everything runs on the CPU")
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    names = listed.stdout.split("\n")[:-1]
    if listed.returncode != 0 or not names:
        return Check("GPU", True, "none; everything runs on the CPU")
    found = f"{len(names)} x {names[0]}"
    if (_version_of("torch") or "+cpu").endswith("+cpu"):
        return Check("GPU", False, f"{found}, but torch is a CPU build", f"{_install('torch')} --force-reinstall")
    return Check("GPU", True, found, "add base.device=cuda to a command to use it")


def check_home(home: Path) -> Check:
    """Whether `home` can be written, and has room for what it will hold."""
    existing = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        found = f"{home} can't be written: {error.strerror}"
        return Check("OPPU_HOME", False, found, "export OPPU_HOME=/a/folder/of/yours")
    free = shutil.disk_usage(existing).free
    found = f"{home}, {free / 1e9:.1f} GB free"
    if free < MIN_FREE_BYTES:
        wanted = f"{found}, wanted {MIN_FREE_BYTES / 1e9:.0f} GB"
        return Check("OPPU_HOME", False, wanted, "export OPPU_HOME=/a/folder/on/a/larger/disk")
    return Check("OPPU_HOME", True, found)


def check_bases(home: Path) -> list[Check]:
    """Whether the embedded bases are prepared; the first use prepares one, so neither has to be."""
    try:
        from oppu_ray.base_model import EMBEDDED, prepared_folder
        from oppu_ray.config import BaseConfig
    except ImportError as error:  # whose advice check_packages has given
        return [Check("bases", False, f"can't be looked at: {error}")]
    checks = []
    for name in EMBEDDED:
        folder = prepared_folder(BaseConfig(name=name), home)
        ready = folder.is_dir()
        code = "from oppu_ray.base_model import prepare_base; from oppu_ray.config import BaseConfig"
        advice = f"""{sys.executable} -c "{code}; prepare_base(BaseConfig('{name}'))" """.strip()
        checks.append(Check(name, True, str(folder) if ready else "not prepared yet", "" if ready else advice))
    return checks


def check_ray_token(path: Path) -> Check:
    """Ray's token is an administrator's key of the cluster, and `ray.init()` writes it readable for everyone."""
    if not path.exists():
        return Check("Ray token", True, f"none at {path}; Ray writes one when it starts")
    mode = stat.S_IMODE(path.stat().st_mode)
    ok = mode & 0o077 == 0
    return Check("Ray token", ok, f"{path}, mode {mode:04o}", "" if ok else f"chmod 600 {path}")


def _requirements_of(package: str) -> list[str] | None:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return None


def _install(name: str) -> str:
    """The command that installs a package in the range that oppu-ray takes, extras included."""
    listed = [one for one in map(Requirement, _requirements_of(PACKAGE) or []) if one.name == name]
    return f"{_PIP} '{name}{listed[0].specifier if listed else ''}'"


def _python_range() -> SpecifierSet:
    try:
        return SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"])
    except metadata.PackageNotFoundError:  # for which `check_packages` has advice
        return SpecifierSet()


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
