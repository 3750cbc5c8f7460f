"""The arrow raw files -> raw users: one reader per family of formats, each giving users in the shape of our own JSONL.

In goes a `DataConfig`, out come `RawUser` records (not yet checked: `history` does that once for all formats) and
`Rejected` ones. To add a format, write a function `(DataConfig, Task) -> Users` and name it in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from oppu_ray.config import DataConfig, Format
from oppu_ray.formats import assistants, chitchat, files, hub, lamp, mail, messengers, ratings, tables, twitter
from oppu_ray.formats.files import bounded_lines
from oppu_ray.formats.raw import RawUser, Users, short, user_name
from oppu_ray.tasks import Task

__all__ = ["RawUser", "bounded_lines", "format_of", "read_users", "short", "user_name"]

READERS: dict[str, Callable[[DataConfig, Task], Users]] = {
    "jsonl": lambda data, task: tables.read_parts(data, task, Path(data.path)),
    "table": lambda data, task: tables.read_parts(data, task, Path(data.path)),
    "lamp": lamp.read_lamp,
    "oppu": lamp.read_oppu,
    "hf": hub.read_hub,
    "chitchat": chitchat.read_chitchat,
    "chatgpt": assistants.read_chatgpt,
    "claude": assistants.read_claude,
    "oasst": assistants.read_oasst,
    "sharegpt": assistants.read_sharegpt,
    "whatsapp": messengers.read_whatsapp,
    "telegram": messengers.read_telegram,
    "slack": messengers.read_slack,
    "twitter": twitter.read_twitter,
    "mbox": mail.read_mbox,
    "movielens": ratings.read_movielens,
    "goodreads": ratings.read_goodreads,
    "amazon": ratings.read_amazon,
}
WITHOUT_PATH = ("hf", "chitchat")
BY_SUFFIX: dict[Format, tuple[str, ...]] = {"jsonl": (*tables.JSON_LINES, ".json"), "table": tables.TABLES}


def read_users(data: DataConfig, task: Task) -> Users:
    """Every user of the source in its order; what cannot be read at all comes as `Rejected`.

    Args:
        data: `format`, or where that is "auto" the suffix of `path`, is one of

            - jsonl: `path` is a file of one record a line, or a folder of such parts: {"user_id", "history": [item]}
              and optionally "task", "role" ("target" or "base") and "query_start" (index of the first query); or a row
              of one item, with "user_id". An item has the fields that its task needs; others are not read.
            - table: `path` is a .csv, .tsv or .parquet file or a folder of parts. Rows are items.
            - hf: `hf_name` is a dataset of the hub or a local folder, "name:config" where it has configurations.
            - lamp: LaMP's official files. User split: `path` is the folder with `train_questions.json`,
              `train_outputs.json`, `dev_questions.json` and `dev_outputs.json`; train users are base, dev users are
              targets. Time split (the same users in all files): `path` is one questions file and `outputs_path` its
              golds; no roles, so the most active users become targets.
            - oppu: `path` is the archive's folder of the task; users' roles follow from the file.
            - chitchat: `path` is the chitchat-dataset wheel, fetched from PyPI where empty.

            `columns` maps our names to the source's, for jsonl, table and hf; null drops one.
        task: Says which fields are read, and how LaMP's questions are.

    Raises:
        ValueError: Missing file, or a source that is not what the format says.
    """
    name = format_of(data)
    if name not in WITHOUT_PATH and (not data.path or not Path(data.path).exists()):
        raise ValueError(f"data.path: {data.path!r} does not exist; format {name!r} needs it")
    return READERS[name](replace(data, format=name), task)


def format_of(data: DataConfig) -> Format:
    """The format to read; "auto" goes by the suffix of the path, in a folder by its files'.

    Raises:
        ValueError: The suffix says nothing, or another format than the config.
    """
    path = Path(data.path)
    if data.format == "auto" and data.hf_name:
        return "hf"
    if data.format not in ("auto", "jsonl", "table"):
        return data.format
    if not data.path or not path.exists():
        raise ValueError(f"data.path: {data.path!r} does not exist; expected a file or a folder of parts")
    suffixes = {files.suffix_of(part) for part in files.parts_of(path)}
    found = {name for name, known in BY_SUFFIX.items() if suffixes & set(known)}
    if data.format == "auto" and len(found) == 1:
        return found.pop()
    if data.format == "auto" or (found and data.format not in found):
        kinds = ", ".join(sorted(suffixes)) or "no file"
        raise ValueError(
            f"data.format is {data.format!r}, and {data.path} holds {kinds}; expected one of .jsonl, .ndjson, .json, "
            f".csv, .tsv or .parquet, or data.format set; `oppu inspect {data.path}` proposes one"
        )
    return data.format
