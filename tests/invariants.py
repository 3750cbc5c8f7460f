"""What must hold after any fault in training, checked from the files of a run and from nothing it says of itself.

I1 a published adapter is a whole, checksummed version; I2 a user's adapter does not depend on others; I3 the base does
not change; I4 each user is done, or failed with a reason, once; I6 no history, prompt or user id in logs and status;
I8 what is left needs no cleaning by hand; I9 the same results for any number of workers, with and without a fault.
(I5, an answer names its version, and I7, overload is refused, are checked by the tests of the service.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from line_tools import adapters, result, run_dir

from oppu_ray.progress import read_status
from oppu_ray.vault import Vault


def fingerprint(folder: Path) -> str:
    """SHA-256 over every file of a folder, names and bytes: what a base must keep."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def check_training(config: Path, expected: Mapping[str, str], bases: Mapping[Path, str]) -> dict[str, Any]:
    """Assert them, given the adapters of a run without faults (as `adapters` gives them) and the bases' fingerprints.

    Returns:
        The stage's result.
    """
    folder = run_dir(config)
    vault = Vault(folder / "vault")
    assert [problem for problem in vault.verify() if "left over" not in problem] == [], "I1"
    assert adapters(config) == expected, "I2, I9: other adapters than those of the run without faults"
    assert {base: fingerprint(base) for base in bases} == bases, "I3"
    counts = {user_id: len(vault.registry.versions(vault.user_hash(user_id))) for user_id in expected}
    assert counts == dict.fromkeys(expected, 1), "I4: not committed once"
    trained = result(config, "train")
    assert (trained["num_done"], trained["failed"]) == (len(expected), {}), "I4"
    assert read_status(folder)["state"] == "done", "I4"
    assert no_secrets([*folder.glob("*.log"), folder / "status.json"], expected), "I6"
    assert not list(folder.glob("checkpoints/*")), "I8"
    vault.gc(min_age_s=-1)
    assert vault.verify() == [], "I8: gc leaves something"
    vault.close()
    return trained


def no_secrets(paths: Iterable[Path], secrets: Iterable[str]) -> bool:
    """Whether none of the texts stands in any of the files that exist."""
    needles = [secret.encode() for secret in secrets]
    contents = [path.read_bytes() for path in paths if path.is_file()]
    return not any(needle in content for content in contents for needle in needles)
