"""Adapters go to disk and back in plain PEFT format, and whatever PEFT would let pass in silence is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.numpy import save_file
from tiny import ARCHITECTURES, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from oppu_ray.adapter_files import load_adapter, save_adapter
from oppu_ray.core import AdapterState

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]
    ),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def tiny_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()


def trained_peft_model(architecture: str, kind: str) -> PeftModel:
    """A PEFT model whose adapter does something: PEFT's own starting values leave the base as it is."""
    model = get_peft_model(tiny_model(architecture), CONFIGS[kind]())
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).view(2, 10), attention_mask=torch.ones(2, 10)).logits


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_saves_we_load_we_save_peft_loads(tmp_path: Path, architecture: str, kind: str) -> None:
    model = trained_peft_model(architecture, kind)
    expected = logits(model)
    assert not torch.allclose(expected[:, -10:], logits(tiny_model(architecture)))
    model.save_pretrained(str(tmp_path / "peft"))
    adapter = load_adapter(tmp_path / "peft")
    adapter.peft_config["base_model_name_or_path"] = "a/base"
    save_adapter(tmp_path / "ours", adapter)
    again = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), expected)
    peft_keys = json.loads((tmp_path / "peft" / "adapter_config.json").read_text()).keys()
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert ours.keys() == peft_keys and ours["base_model_name_or_path"] == "a/base" and ours["task_type"] == "CAUSAL_LM"


def small_lora(**changes: Any) -> AdapterState:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4.0,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "a/base",
    }
    tensors = {
        f"{PREFIX}.lora_A.weight": np.arange(12, dtype=np.float32).reshape(2, 6),
        f"{PREFIX}.lora_B.weight": np.arange(8, dtype=np.float32).reshape(4, 2),
    }
    return AdapterState({**tensors, **changes.pop("tensors", {})}, {**config, **changes})


def test_saved_equals_loaded_and_bytes_repeat(tmp_path: Path) -> None:
    adapter = small_lora(target_modules=["v_proj", "q_proj"])
    v_proj = {key.replace("q_proj", "v_proj"): tensor.T.T for key, tensor in adapter.tensors.items()}
    adapter.tensors.update(v_proj)
    save_adapter(tmp_path / "a", adapter)
    save_adapter(tmp_path / "b", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = load_adapter(tmp_path / "a")
    assert loaded.tensors.keys() == adapter.tensors.keys()
    for key, tensor in adapter.tensors.items():
        assert loaded.tensors[key].dtype == np.float32 and np.array_equal(loaded.tensors[key], tensor)
    assert loaded.peft_config["target_modules"] == ["q_proj", "v_proj"] and loaded.peft_config["r"] == 2


def test_an_adapter_read_from_a_file_is_checked_and_written_again_without_peft(tmp_path: Path) -> None:
    """Importing PEFT takes seconds of a process that serves."""
    save_adapter(tmp_path / "a", small_lora())
    code = f"""
import sys
from pathlib import Path
from oppu_ray.adapter_files import encode_adapter, load_adapter
files = encode_adapter(load_adapter(Path({str(tmp_path / "a")!r})), "here")
assert all((Path({str(tmp_path / "a")!r}) / name).read_bytes() == data for name, data in files.items())
print(sorted({{"peft", "torch"}} & sys.modules.keys()))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_a_config_straight_from_peft_is_taken(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="a/base").to_dict()
    assert not isinstance(config["target_modules"], list)
    save_adapter(tmp_path / "a", AdapterState(small_lora().tensors, config))
    assert load_adapter(tmp_path / "a").peft_config["peft_type"] == "LORA"


def test_half_precision_files_are_widened(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    save_adapter(tmp_path / "a", small_lora())
    half = {key: torch.from_numpy(tensor).bfloat16() for key, tensor in small_lora().tensors.items()}
    save_torch(half, tmp_path / "a" / "adapter_model.safetensors")
    loaded = load_adapter(tmp_path / "a")
    assert all(np.array_equal(loaded.tensors[key], half[key].float().numpy()) for key in half)


ZEROS = np.zeros
BAD_ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected one of LORA, IA3, PROMPT_TUNING"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is True; expected PEFT's default False"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
    ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
    ({"r": 3}, "has shape (2, 6); expected (3, 6)"),
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"target_modules": []}, "target_modules is []"),
    ({"target_modules": [1]}, "target_modules is [1]"),
    ({"target_modules": "q_proj("}, "target_modules is 'q_proj('"),
    ({"target_modules": ["q_proj", "v_proj"]}, "no tensors for target module 'v_proj'"),
    ({"target_modules": ["v_proj"]}, "q_proj.lora_A.weight' is not a key"),
    ({"target_modules": r".*\.layers\.1\..*"}, "q_proj.lora_A.weight' is not a key"),
    ({"tensors": {"lm_head.weight": ZEROS((2, 2), np.float32)}}, "'lm_head.weight' is not a key"),
    ({"tensors": {f"{PREFIX}.ia3_l": ZEROS((4, 1), np.float32)}}, "ia3_l' is not a key of a LORA"),
    ({"tensors": {f"{PREFIX}.lora_B.weight": ZEROS((4, 3), np.float32)}}, "shape (4, 3); expected (4, 2)"),
    ({"tensors": {f"{PREFIX}.lora_B.weight": ZEROS((0, 2), np.float32)}}, "shape (0, 2)"),
    ({"tensors": {f"{PREFIX}.lora_B.weight": ZEROS(8, np.float32)}}, "shape (8,)"),
    ({"tensors": {f"{PREFIX}.lora_B.weight": ZEROS((), np.float32)}}, "shape ()"),
    ({"tensors": {f"{PREFIX}.lora_B.weight": np.full((4, 2), np.nan, np.float32)}}, "lora_B.weight' holds NaN"),
    ({"tensors": {f"{PREFIX.replace('0', '1')}.lora_A.weight": ZEROS((2, 6), np.float32)}}, "has no lora_B.weight"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ADAPTERS)
def test_bad_adapters_are_refused_at_both_doors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bad = small_lora(**dict(changes))
    with pytest.raises(ValueError) as refused:
        save_adapter(tmp_path / "bad", bad)
    assert message in str(refused.value) and str(tmp_path / "bad") in str(refused.value)
    assert not any(tmp_path.iterdir())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(bad.peft_config))
    save_file(bad.tensors, tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(ValueError) as refused:
        load_adapter(tmp_path / "bad")
    assert message in str(refused.value) and str(tmp_path / "bad") in str(refused.value)


@pytest.mark.parametrize("changes", [{"num_virtual_tokens": 4}, {"token_dim": 7}, {"num_virtual_tokens": None}])
def test_prompt_of_a_wrong_size(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "base_model_name_or_path": "a/base"}
    prompt = {"prompt_embeddings": np.ones((5, 8), np.float32)}
    save_adapter(tmp_path / "good", AdapterState(prompt, config))
    with pytest.raises(ValueError, match="num_virtual_tokens is|has shape"):
        save_adapter(tmp_path / "bad", AdapterState(prompt, {**config, **changes}))


def test_ia3_vector_on_the_wrong_side(tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "base_model_name_or_path": "a/base"}
    save_adapter(tmp_path / "good", AdapterState({f"{PREFIX}.ia3_l": np.ones((4, 1), np.float32)}, config))
    with pytest.raises(ValueError, match="expected \\(4, 1\\)"):
        save_adapter(tmp_path / "bad", AdapterState({f"{PREFIX}.ia3_l": np.ones((1, 4), np.float32)}, config))


def test_unknown_key_and_missing_base_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ranks'"):
        save_adapter(tmp_path / "a", small_lora(ranks=3))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        save_adapter(tmp_path / "a", small_lora(base_model_name_or_path=None))
    with pytest.raises(ValueError, match="is float64; expected float32"):
        save_adapter(tmp_path / "a", small_lora(tensors={f"{PREFIX}.lora_A.weight": np.zeros((2, 6))}))


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", small_lora())
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match="only adapter_model.bin, a pickle"):
        load_adapter(tmp_path / "a")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter_config.json"):
        load_adapter(tmp_path / "missing")
    save_adapter(tmp_path / "a", small_lora())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="adapter_model.safetensors: not a whole safetensors file"):
            load_adapter(tmp_path / "a")
    save_file({key: tensor.astype(np.int32) for key, tensor in small_lora().tensors.items()}, weights)
    with pytest.raises(ValueError, match="is I32; expected one of F32, F16, BF16"):
        load_adapter(tmp_path / "a")
    for text, message in (("{", "not JSON"), ("[]", "holds a list")):
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path / "a")


def test_tensors_that_overlap_leave_gaps_or_lie_about_their_size_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", small_lora())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:begin]), whole[begin:]
    key = f"{PREFIX}.lora_B.weight"
    assert header[key]["data_offsets"] == [48, 80]
    changes: list[dict[str, Any]] = [
        {"data_offsets": [44, 76]},
        {"data_offsets": [48, 84]},
        {"data_offsets": [0, 32]},
        {"shape": [4, 3]},
        {"shape": [-4, -2]},
        {"shape": [2**70, 2]},
        {"shape": None},
        {"dtype": ["F32"]},
        {"dtype": "F16"},
    ]
    for change in changes:
        text = json.dumps({**header, key: {**header[key], **change}}).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + body)
        with pytest.raises(ValueError, match="adapter_model.safetensors: not a whole safetensors file"):
            load_adapter(tmp_path / "a")
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert np.array_equal(load_adapter(tmp_path / "a").tensors[key], small_lora().tensors[key])


def test_an_adapter_is_never_overwritten(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", small_lora())
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already exists and is never overwritten"):
        save_adapter(tmp_path / "a", small_lora(lora_alpha=1.0))
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
