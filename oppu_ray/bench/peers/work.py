"""What the peers' scripts share: the work file in, one line of JSON out.

The file is `bench.train.make_work`'s. A step's rows are cut into batches of similar length, as for PEFT's mixed
batch, so that no trainer pads more than it must; of 16 rows, since 32 movie-tag rows took mLoRA over 13 GB and 16 take
9. Needs NumPy and safetensors only.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

BATCH_ROWS = 16


@dataclass(frozen=True)
class Row:
    """One example of `users[user]`: the first `num_prompt` of `ids` are the prompt.

    `weight` is 1 over the completion tokens of the user's step: weighted losses add up to the user's mean per token.
    """

    user: int
    ids: list[int]
    num_prompt: int
    weight: float


@dataclass(frozen=True)
class User:
    """`steps` of (ids, num_prompt) examples, `rates` one learning rate a step, `start` LoRA weights by PEFT's keys."""

    user_id: str
    steps: list[list[tuple[list[int], int]]]
    rates: list[float]
    start: dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """The users to train, on the base model in the folder `base`."""

    base: Path
    users: list[User]
    rank: int
    alpha: float
    clip_norm: float
    weight_decay: float


def read_work(path: Path) -> Work:
    work = json.loads(path.read_text())
    users = [User(user["user_id"], user["steps"], user["rates"], load_file(user["start"])) for user in work["users"]]
    config = work["config"]["personal"]
    peft = config["peft"]
    return Work(Path(work["base"]), users, peft["rank"], peft["alpha"], config["clip_norm"], config["weight_decay"])


def batches(users: list[User], step: int) -> list[list[Row]]:
    """The step's rows of all users, shortest first, 16 at a time; inside a batch a user's rows lie together."""
    rows = []
    for index, user in enumerate(users):
        if step < len(user.steps):
            total = sum(len(ids) - num_prompt for ids, num_prompt in user.steps[step])
            rows += [Row(index, ids, num_prompt, 1 / total) for ids, num_prompt in user.steps[step]]
    rows.sort(key=lambda row: len(row.ids))
    parts = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
    return [sorted(part, key=lambda row: row.user) for part in parts]


def print_result(elapsed_s: float, bookkeeping_s: float, losses: dict[str, float], note: str) -> None:
    """What `bench.train.run_system` returns for the other rows, and a `note` on what was unlike."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"elapsed_s": elapsed_s, "bookkeeping_s": bookkeeping_s, "losses": losses, "peak_bytes": peak}
    print(json.dumps({**result, "note": note}))
