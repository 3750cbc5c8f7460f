"""`oppu bench`: speed of training and serving beside the alternatives, each measured in the same run.

Design: the scripts in `peers/` run in other interpreters, so they import nothing of oppu_ray.
"""

from __future__ import annotations

import os
from importlib.resources import files


def peer_environment() -> dict[str, str]:
    """Return the environment in which another interpreter finds `peers`, and nothing else of ours."""
    return {**os.environ, "PYTHONPATH": str(files(__name__))}
