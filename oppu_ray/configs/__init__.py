"""Find configs: those that are installed with the package by their name, all others by their path."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path


def find_config(text: str, beside: Path = Path(), kind: str = "") -> Path:
    """Return the path of a config.

    Args:
        text: The name of an installed config, such as "movie_tagging", or the path of a YAML file.
        beside: The folder from which a relative path is taken.
        kind: "" for the config of a run, "suites" for a suite.

    Raises:
        ValueError: `text` is neither an installed name nor looks like a path.
    """
    installed = {path.stem: path for path in Path(str(files(__name__)), kind).glob("*.yaml")}
    if text in installed:
        return installed[text]
    path = beside / text
    if path.suffix or path.name != text or path.exists():
        return path
    near = difflib.get_close_matches(text, installed, 1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(sorted(installed))
    raise ValueError(f"config {text!r}: {meant}expected a YAML file or the name of an installed one ({names})")
