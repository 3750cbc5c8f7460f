"""A hub without a network: the cache of Hugging Face's own client, which offline is all that the client looks at."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


class Hub:
    """Repositories as the client keeps them: `refs/<branch>` names a commit, `snapshots/<commit>` has its files."""

    def __init__(self, cache: Path):
        self.cache, self._number = cache, 0

    def push(self, name: str, folder: Path, branch: str = "main", kind: str = "model") -> str:
        """A new commit with the files of `folder`, to which the branch moves; returns its hash."""
        self._number += 1
        commit = hashlib.sha1(f"{name} {self._number}".encode()).hexdigest()
        top = self._folder(name, kind)
        shutil.copytree(folder, top / "snapshots" / commit)
        (top / "refs").mkdir(exist_ok=True)
        (top / "refs" / branch).write_text(commit)
        return commit

    def remove(self, name: str, kind: str = "model") -> None:
        shutil.rmtree(self._folder(name, kind))

    def _folder(self, name: str, kind: str) -> Path:
        return self.cache / f"{kind}s--{name.replace('/', '--')}"
