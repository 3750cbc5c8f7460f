"""Hugging Face datasets, of the hub or a local folder -> users.

Design: the library finds the files of a split, and CSV and JSON files are then read as everywhere else: its own readers
guess types, which makes one user of `007` and `7`, and a date of a text. Other kinds of datasets come with types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.formats import tables
from oppu_ray.formats.files import suffix_of
from oppu_ray.formats.raw import Users
from oppu_ray.tasks import Task

UNTYPED = (".csv", ".tsv", ".json", *tables.JSON_LINES)


def read_hub(data: DataConfig, task: Task) -> Users:
    """Rows are users where they have `history`, otherwise items.

    Raises:
        ValueError: The dataset or its split cannot be loaded.
    """
    try:
        files, rows = _load(data)
    except Exception as error:  # the library has no common base class for "not found", "no such split", "no network"
        raise ValueError(f"data.hf_name: cannot load split {data.hf_split!r} of {data.hf_name!r}: {error}") from error
    if files:
        return tables.read_files(data, task, [(Path(path), name, suffix_of(Path(name))) for name, path in files])
    return tables.read_rows(data, task, data.hf_name, rows.column_names, rows)


def _load(data: DataConfig) -> tuple[list[tuple[str, str]], Any]:
    """(name, local path) of the split's files where their kind has no types, else the rows of the split."""
    from datasets import DownloadManager, load_dataset, load_dataset_builder  # slow to import

    name, _, configuration = data.hf_name.partition(":")
    builder = load_dataset_builder(name, configuration or None)
    by_split = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if any(suffix_of(Path(file)) in UNTYPED for files in by_split.values() for file in files):
        if data.hf_split not in by_split:
            raise ValueError(f"expected data.hf_split to be one of {', '.join(by_split)}")
        names = by_split[data.hf_split]
        return list(zip(names, DownloadManager().download(names), strict=True)), None
    return [], load_dataset(name, configuration or None, split=data.hf_split)
