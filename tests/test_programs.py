"""Tests that need a program are skipped aloud without it, and fail in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import PROGRAMS

TESTS = Path(__file__).resolve().parent
NEEDS = {
    "Chromium": "from browser import browser\ndef test_it():\n    with browser(): pass\n",
    "Prometheus": "import test_cluster\npromtool = test_cluster.promtool\ndef test_it(promtool): pass\n",
    "PostgreSQL": "from vault_tools import postgres_server\ndef test_it():\n    with postgres_server(): pass\n",
    "vLLM": "import test_elsewhere\ndef test_it(tmp_path): test_elsewhere.test_vllms_tokens_are_ours(None, tmp_path)\n",
}


def test_every_program_has_a_test_here() -> None:
    assert NEEDS.keys() == PROGRAMS.keys()


@pytest.mark.parametrize("in_ci", [True, False], ids=["in CI", "elsewhere"])
@pytest.mark.parametrize("program", NEEDS)
def test_a_missing_program_is_said_and_fails_in_ci(tmp_path: Path, program: str, in_ci: bool) -> None:
    """As where it is not installed: nothing is found on the path, and no PostgreSQL in its own place."""
    (tmp_path / "conftest.py").write_text("import glob\nglob.glob = lambda _: []\n")
    (tmp_path / "test_one.py").write_text(NEEDS[program])
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rs\n")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    own = {"PATH": str(tmp_path), "PYTHONPATH": paths, "CI": "true" if in_ci else "", "OPPU_VLLM_PYTHON": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True)
    reason = f"no {program} here: {PROGRAMS[program]}"
    if in_ci:
        assert run.returncode == 1 and f"{reason}; in CI it must not be missing" in run.stdout, run.stdout
    else:
        assert run.returncode == 0 and "1 skipped" in run.stdout and reason in run.stdout, run.stdout
