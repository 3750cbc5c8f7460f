"""The wheel: what is in it suffices for the commands, in an empty folder, without the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from line_tools import tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("oppu_ray", "serve")
Oppu = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: setuptools leaves its folders in the source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Oppu:
    """`oppu ...` from the wheel in an environment of its own, in an empty folder.

    Dependencies are those of the interpreter that `WHEEL_PYTHON` names (`make test-wheel`), by default of this one.
    """
    folder = tmp_path_factory.mktemp("installed")
    with_dependencies = os.environ.get("WHEEL_PYTHON", sys.executable)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([with_dependencies, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs, own = (
        subprocess.run([one, "-c", where], capture_output=True, text=True, check=True).stdout
        for one in (with_dependencies, python)
    )
    # A line in a .pth file adds the folder, but not what its own .pth files name: the checkout stays out.
    (Path(own.strip()) / "dependencies.pth").write_text(theirs)
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments: str, program: str = "oppu") -> subprocess.CompletedProcess[str]:
        command = [str(folder / "venv" / "bin" / program), *arguments]
        return subprocess.run(command, cwd=folder / "empty", env=environment, capture_output=True, text=True)

    return call


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    assert names == {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def test_the_code_is_the_wheels(installed: Oppu) -> None:
    where = installed("-c", "import oppu_ray, serve; print(oppu_ray.__file__, serve.__file__)", program="python").stdout
    assert where.count("/venv/lib/") == 2 and str(ROOT) not in where
    assert installed("--version").stdout == f"oppu {__version__}\n"


def test_the_newest_release_of_the_changelog_is_this_version() -> None:
    releases = re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == __version__


def test_a_tiny_line_runs_from_the_wheel(installed: Oppu, tmp_path: Path) -> None:
    users = write_users(tmp_path / "users.jsonl", [tagging_user(number) for number in range(2)])
    config = write_config(tmp_path, tiny_base(tmp_path / "base"), users, evaluate={"arms": ["task", "oppu"]})
    done = installed("run", str(config), "workers.num_workers=0")
    assert done.returncode == 0 and "2 users trained and committed, 0 failed" in done.stdout, done.stderr
    reported = installed("report", str(tmp_path / "run"))
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "<h1>One PEFT Per User" in page and "<table>" in page
    result = json.loads((tmp_path / "run" / "evaluate" / "result.json").read_text())
    assert result["arms"]["oppu"]["num_users"] == 2


def test_installed_configs_and_suites_are_known_by_name(installed: Oppu) -> None:
    wrong = installed("run", "movie_taging", "data.path=users.jsonl.gz")
    assert wrong.returncode == 2 and "did you mean 'movie_tagging'?" in wrong.stderr
    idle = installed("status", "movie_tagging")
    assert idle.returncode == 2 and "/empty/runs/movie_tagging/status.json: cannot be read" in idle.stderr
    suite = installed("evaluate", "--suite", "tune", "data_root=/nowhere")
    assert suite.returncode == 1 and "/nowhere/movie_tagging_ml10m/users.jsonl.gz" in suite.stdout


def test_the_other_commands_find_what_they_need(installed: Oppu) -> None:
    assert "checks, " in installed("doctor").stdout
    assert installed("bench", "train", "--help").returncode == installed("bench", "serve", "--help").returncode == 0
    untrained = installed("serve", "demo")
    assert untrained.returncode == 2 and "nothing to serve yet" in untrained.stderr
    code = "from serve.web import STATIC; from oppu_ray.native import SOURCES; "
    found = installed("-c", code + "print(*STATIC.iterdir(), *SOURCES.iterdir())", program="python").stdout
    assert "static/index.html" in found and "cpp/attention.cpp" in found
