"""A base is opened only where the bank computes what transformers computes, whoever else is in the pass."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import tiny_model
from tiny import ARCHITECTURES, VOCAB_SIZE, tiny_base
from transformers import AutoModelForCausalLM, PreTrainedModel

from oppu_ray import workers
from oppu_ray.agreement import same_answers
from oppu_ray.config import BaseConfig, Config, WorkersConfig
from oppu_ray.kernels import fuse
from oppu_ray.layers import fuse_layers

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
LONG_ROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
}


def make_model(name: str, **values: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **values})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def open_model(model: PreTrainedModel, max_length: int = 1024) -> None:
    with same_answers(model, max_length):
        fuse(model)
        fuse_layers(model)
    assert model.config._attn_implementation != "segments"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_supported_is_opened(architecture: str, dtype: torch.dtype) -> None:
    open_model(tiny_model(architecture, dtype))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("GPTNeoX", {}),
        ("SmolLM3", {}),
        ("Phi3", {"partial_rotary_factor": 0.5}),
        ("Granite", {"residual_multiplier": 2}),
    ],
)
def test_other_layers_that_attend_by_our_attention_are_opened(name: str, values: dict[str, Any]) -> None:
    open_model(make_model(name, **values))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Bloom", {}),
        ("GPTJ", {"rotary_dim": 8}),
        ("DiffLlama", {}),
        ("RecurrentGemma", {}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2, "num_key_value_heads": 2}),
        ("Qwen3Next", {}),
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {}),
    ],
)
def test_what_the_bank_does_not_compute_is_refused_by_name(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}ForCausalLM does not work with many users in one pass"):
        open_model(make_model(name, **values))


def test_rows_that_are_long_enough_to_change_their_neighbours_are_refused() -> None:
    """Phi-3's rope factors are those of the longest row in a pass."""
    model = make_model("Phi3", **LONG_ROPE)
    open_model(model, 64)
    with pytest.raises(ValueError, match="Phi3ForCausalLM .* of up to 65 tokens, a row's logits are .*% off"):
        open_model(model, 65)


@pytest.mark.parametrize(("sharding", "is_tried"), [("none", True), ("zero3", False)])
def test_a_base_is_tried_when_it_is_opened(
    sharding: str, is_tried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "fuse", lambda model: model.lm_head.weight.neg_())
    settings = "" if is_tried else "cluster/deepspeed/zero3.json"
    base = BaseConfig(str(tiny_base(tmp_path)), dtype="float32", sharding=sharding, deepspeed=settings)
    config = replace(Config(), base=base, workers=WorkersConfig(num_workers=2))
    with pytest.raises(ValueError, match="LlamaForCausalLM") if is_tried else nullcontext():
        workers.open_base(config)
