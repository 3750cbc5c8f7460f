"""A base in 8 or 4 bits: bitsandbytes' weights, PEFT's training, Hugging Face's answers, nobody else's influence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from line_tools import oppu, tagging_user, write_config, write_users
from reference import (
    IA3,
    LORA,
    PROMPT,
    TRAIN,
    WIDE_LORA,
    base_bytes,
    difference,
    greedy_alone,
    make_user,
    other_text,
    peft_model,
    random_adapter,
    random_examples,
    same_bits,
    tiny_model,
    train,
    train_alone,
    trained,
)
from tiny import tiny_base
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from oppu_ray.base_model import load_base, merge_adapter
from oppu_ray.config import BaseConfig
from oppu_ray.core import Request
from oppu_ray.inference import Engine
from oppu_ray.kernels import fuse
from oppu_ray.layers import fuse_layers
from oppu_ray.quantization import QuantizedLinear, quantize

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
KINDS = ("int8", "nf4")
CPU = torch.device("cpu")
USERS = [make_user(i, peft, random_examples(i, 5, num_shared=5 * i)) for i, peft in enumerate((LORA, WIDE_LORA, IA3))]


def ours(kind: str, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(architecture, dtype)
    quantize(model, kind, CPU)
    return model


def written_out(kind: str) -> PreTrainedModel:
    model = ours(kind)
    assert fuse(model) == 7 and fuse_layers(model) == 2
    return model


def transformers_own(folder: Path, kind: str, architecture: str = "llama") -> PreTrainedModel:
    """The same weights as `tiny_model`, quantised by transformers, in bitsandbytes' own layers.

    They are kept in training mode, in which bitsandbytes too multiplies by decoded weights.
    """
    if not folder.exists():
        tiny_model(architecture).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    for module in model.eval().requires_grad_(False).modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.training, module.train = True, lambda mode=True, module=module: module
    return model


@pytest.fixture
def peft_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the reference's PEFT run on transformers' own quantised model of a kind."""

    def choose(kind: str) -> None:
        monkeypatch.setattr(reference, "tiny_model", lambda *args: transformers_own(tmp_path / "own", kind))

    return choose


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # tied head and untied
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_transformers_own_loading(tmp_path: Path, kind: str, architecture: str) -> None:
    own = transformers_own(tmp_path / "own", kind, architecture)
    expected = {name: module for name, module in own.named_modules() if type(module).__module__.startswith("bitsand")}
    model = ours(kind, architecture)
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found.keys() == expected.keys() and len(found) == 14
    plain = dict(tiny_model(architecture).named_modules())
    for name, linear in found.items():
        assert torch.equal(linear.codes.view(torch.uint8), expected[name].weight.view(torch.uint8))
        x = torch.eye(linear.in_features)
        assert torch.allclose(linear.weight.T, expected[name](x), atol=1e-7)
        weight = plain[name].weight
        assert 0 < (linear.weight - weight).norm() / weight.norm() < {"int8": 0.01, "nf4": 0.12}[kind]


@pytest.mark.parametrize("make", [ours, written_out])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_trains_what_peft_trains_alone(
    kind: str, make: Callable[[str], PreTrainedModel], peft_is_on: Callable[[str], None]
) -> None:
    """Both multiply by the same float32 weights: as near as on a plain base."""
    model = make(kind)
    before = base_bytes(model)
    results = train(model, USERS)
    apart = train(model, USERS, replace(TRAIN, share_prefix=False))
    assert base_bytes(model) == before
    plain = train(tiny_model(), USERS)
    peft_is_on(kind)
    for user in USERS:
        adapter, losses = train_alone(user)
        assert difference(trained(results, user), adapter) < 1e-5
        assert difference(trained(apart, user), adapter) < 1e-5
        assert results[user.user_id].losses == pytest.approx(losses, abs=1e-5)
        assert difference(trained(plain, user), adapter) > 1e-4  # as the plain base would not


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_feels_a_neighbour(kind: str) -> None:
    """Not even one whose activations are outliers, for which bitsandbytes' int8 product would change its own way."""
    model, (user, other, _) = written_out(kind), USERS
    shout = replace(other, steps=tuple(tuple(other_text(step)) for step in other.steps))
    alone, beside = (train(model, [one, user]) for one in (other, shout))
    assert same_bits(trained(alone, user), trained(beside, user))
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(6, linear.in_features, generator=torch.Generator().manual_seed(0))
    loud = torch.cat([x[:5], x[5:] * 1000])
    assert torch.equal(linear(x)[:5], linear(loud)[:5])


@pytest.mark.parametrize("make", [ours, written_out])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_answers_as_hugging_face_on_the_quantised_model(
    kind: str, make: Callable[[str], PreTrainedModel], peft_is_on: Callable[[str], None]
) -> None:
    pefts, model = {"lora": LORA, "wide": WIDE_LORA, "ia3": IA3, "prompt": PROMPT}, make(kind)
    adapters = {name: random_adapter(peft, number) for number, (name, peft) in enumerate(pefts.items())}
    before, engine = base_bytes(model), Engine(model, 4, pefts.values(), max_tokens_per_pass=17)
    for name, adapter in adapters.items():
        engine.load(name, adapter)
    names = (None, *pefts)
    made = engine.generate([Request(f"r{i}", tuple(range(40, 50 + i)), n, 8) for i, n in enumerate(names)], frozenset())
    engine.close()
    assert base_bytes(model) == before  # bitsandbytes' 4-bit linear would have rewritten its weights
    peft_is_on(kind)
    for i, name in enumerate(names):
        alone = peft_model(adapters[name] if name else None)
        assert made[i].token_ids == greedy_alone(alone, tuple(range(40, 50 + i)), 8, frozenset())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_no_more_than_a_plain_base_does(kind: str) -> None:
    """By up to twice as much: a decoded weight is rounded, a stored one is not."""

    def error(quantized: bool) -> float:
        models = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16).float()
        for model in models if quantized else ():
            quantize(model, kind, CPU)
        found, exact = (model(input_ids=torch.arange(3, 23)[None]).logits.float() for model in models)
        return ((found - exact).norm() / exact.norm()).item()

    assert 0 < error(True) < 2 * error(False)


def test_every_kind_is_a_base_of_its_own_over_one_file(tmp_path: Path) -> None:
    config = BaseConfig(name=str(tiny_base(tmp_path / "base")), dtype="float32")
    files = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    nf4, int8 = (load_base(replace(config, quantization=kind)) for kind in ("nf4", "int8"))  # nothing recorded yet
    plain = load_base(config)
    assert len({nf4.fingerprint, int8.fingerprint, plain.fingerprint}) == 3
    assert load_base(replace(config, quantization="nf4")).fingerprint == nf4.fingerprint
    assert not any(isinstance(module, QuantizedLinear) for module in plain.model.modules())
    adapter = random_adapter(LORA, 0)
    assert merge_adapter(nf4, adapter, tmp_path / "one") == merge_adapter(plain, adapter, tmp_path / "two")
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_line_runs_and_its_task_base_is_stored_plain(tmp_path: Path, kind: str) -> None:
    users = write_users(
        tmp_path / "users.jsonl", [tagging_user(i, role="base" if i < 2 else "target") for i in range(4)]
    )
    config = write_config(tmp_path, tiny_base(tmp_path / "base"), users)
    quantization = f"base.quantization={kind}"
    oppu("prepare", config)
    adapted = oppu("adapt", config, quantization)
    stored = load_base(BaseConfig(name=adapted["task_base"], dtype="float32"))
    assert all(parameter.dtype == torch.float32 for parameter in stored.model.parameters())
    assert adapted["fingerprints"]["task_base"] not in (stored.fingerprint, adapted["fingerprints"]["base"])
    assert oppu("train", config, quantization)["num_done"] == 2
    assert oppu("evaluate", config, quantization)["arms"]["oppu"]["num_users"] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": "int4"}, "quantization: found 'int4'; expected 'none', 'int8' or 'nf4'"),
        ({"quantization": "nf4", "sharding": "zero3"}, "DeepSpeed cannot share such a base out"),
        ({"quantization": "int8", "deepspeed": "zero2.json"}, "expected base.quantization=none"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseConfig(**values)


def test_without_bitsandbytes_the_key_and_the_command_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"base.quantization is 'nf4', but .* cannot be imported .*\.\[quantized\]"):
        quantize(tiny_model(), "nf4", CPU)


def test_a_build_that_decodes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizedLinear, "weight", property(lambda linear: torch.zeros(linear.out_features, 64)))
    with pytest.raises(ValueError, match="is wrong in int8 on cpu: a weight comes back 100% off"):
        quantize(nn.Sequential(), "int8", CPU)
