"""Repositories of the Hugging Face hub, at one commit for the whole life of a run.

In: a config whose models and dataset may be hub ids, at a branch or at none. Out: the same config with commits.

Design: branches move. The first stage that needs a repository asks the hub for its commit and writes it to
`<run_dir>/hub.json`; later stages, other nodes and the service take that one. To move on, name another revision, or a
commit, in the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from oppu_ray.config import Config
from oppu_ray.files import write_atomic

PINS_NAME = "hub.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether a name is neither an embedded model nor a path that exists, and could be a hub id."""
    is_here = name.startswith("embedded:") or Path(name).expanduser().exists()
    return not is_here and _HUB_ID.fullmatch(name) is not None


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


def split_revision(name: str) -> tuple[str, str]:
    """A name and its revision: "org/name@v1" is ("org/name", "v1"). A path that exists has none."""
    before, _, revision = (name, "", "") if Path(name).expanduser().exists() else name.partition("@")
    return before, revision


def embedder_id(name: str) -> str:
    """An embedder's hub id: without a slash, it is one of sentence-transformers'."""
    return name if "/" in name else f"sentence-transformers/{name}"


def find_commit(key: str, name: str, revision: str, kind: str = "model") -> str:
    """The commit of a branch or tag: the hub's, or the one last seen where the hub cannot be reached.

    Args:
        key: The config's key, for errors.
        revision: "" is the default branch; a commit is itself.
        kind: "model" or "dataset".

    Raises:
        ValueError: The hub does not give it.
    """
    if is_commit(revision):
        return revision
    from huggingface_hub import resolve_revision

    with _hub_errors(key, name, revision):
        return resolve_revision(name, repo_type=kind, revision=revision or None).resolved


def download(
    key: str, name: str, commit: str, allow: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> Path:
    """The folder of a model's files at a commit; from the hub's own cache, without a network, if they are there.

    Args:
        key: The config's key, for errors.
        allow: Patterns of the files wanted; None means all but those of `ignore`.

    Raises:
        ValueError: The hub does not give them.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(key, name, commit):
        patterns = list(allow) if allow else None, list(ignore) if ignore else None
        folder = snapshot_download(name, revision=commit, allow_patterns=patterns[0], ignore_patterns=patterns[1])
        return Path(folder)


@contextmanager
def _hub_errors(key: str, name: str, revision: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no network, no such repository or revision, no rights: without a common class
        where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
        raise ValueError(f"{key} is {where}: no such folder, and the hub does not give it: {error}") from error


def pin_models(config: Config) -> Config:
    """The config with a commit for each model of the hub: base, writer of profiles, embedder.

    Raises:
        ValueError: The hub does not give a commit, or the run's record of commits cannot be read.
    """
    base, memory = config.base, config.memory
    if is_hub_id(base.name):
        base = replace(base, revision=_pin(config, "base.name", base.name, base.revision))
    profile, revision = split_revision(memory.profile)
    if profile not in ("template", "base") and is_hub_id(profile):
        memory = replace(memory, profile=f"{profile}@{_pin(config, 'memory.profile', profile, revision)}")
    embedder, revision = split_revision(memory.embedder)
    if memory.retriever in ("dense", "hybrid") and is_hub_id(embedder):
        embedder = embedder_id(embedder)
        memory = replace(memory, embedder=f"{embedder}@{_pin(config, 'memory.embedder', embedder, revision)}")
    return replace(config, base=base, memory=memory)


def pin_data(config: Config) -> Config:
    """The config with a commit for its dataset, if that is one of the hub. Raises as `pin_models`."""
    full_name, colon, configuration = config.data.hf_name.partition(":")
    name, revision = split_revision(full_name)
    if config.data.format != "hf" or not is_hub_id(name):
        return config
    commit = _pin(config, "data.hf_name", name, revision, kind="dataset")
    return replace(config, data=replace(config.data, hf_name=f"{name}@{commit}{colon}{configuration}"))


def _pin(config: Config, key: str, name: str, revision: str, kind: str = "model") -> str:
    """The commit that this run uses for a revision of a repository."""
    if is_commit(revision):
        return revision
    path = Path(config.run_dir) / PINS_NAME
    pins = _read_pins(path)
    pin = f"{kind} {name}@{revision or 'default branch'}"
    if pin not in pins:
        pins[pin] = find_commit(key, name, revision, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(pins, indent=1).encode())
    return pins[pin]


def _read_pins(path: Path) -> dict[str, str]:
    try:
        pins = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected the commits that this run uses") from error
    if not isinstance(pins, dict) or not all(isinstance(one, str) and is_commit(one) for one in pins.values()):
        raise ValueError(f"{path}: expected a table of repositories and their commits; restore it, or remove it")
    return pins
