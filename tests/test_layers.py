"""The written-out decoder layer is the model's own, forwards and backwards, or is not put in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import (
    IA3,
    LORA,
    PROMPT,
    RATE,
    RS_LORA,
    TRAIN,
    WIDE_LORA,
    base_bytes,
    difference,
    gradients,
    make_user,
    other_text,
    random_adapter,
    random_examples,
    same_bits,
    tiny_model,
    train,
    train_alone,
    trained,
)
from tiny import tiny_config
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, SmolLM3Config

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import Request
from oppu_ray.inference import Engine
from oppu_ray.layers import fuse_layers
from oppu_ray.training import backward_step

DROPOUT = replace(LORA, dropout=0.3)
SCALED_ATTENTION = PeftConfig(kind="ia3", target_modules=("q_proj", "o_proj", "up_proj"))
MIXED = (LORA, RS_LORA, WIDE_LORA, IA3, PROMPT, SCALED_ATTENTION)


def fused_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(dtype=dtype)
    assert fuse_layers(model) == 2
    return model


@pytest.mark.parametrize("pefts", [MIXED, (LORA, RS_LORA, PROMPT)], ids=["everywhere", "before the attention"])
def test_fused_layers_train_what_peft_trains_alone(pefts: tuple[PeftConfig, ...]) -> None:
    """Without adapters behind the attention the last layer leaves out tokens that predict nothing."""
    pack = [make_user(i, peft, random_examples(i, 3 + 2 * i % 5, num_shared=5 * i)) for i, peft in enumerate(pefts)]
    model = fused_model()
    before = base_bytes(model)
    results = train(model, pack)
    for user in pack:
        adapter, losses = train_alone(user)
        assert difference(trained(results, user), adapter) < 1e-5
        assert results[user.user_id].losses == pytest.approx(losses, abs=1e-5)
    assert base_bytes(model) == before


@pytest.mark.parametrize(
    ("config", "pefts"),
    [
        (replace(RATE, max_tokens_per_pass=25), MIXED),
        (replace(RATE, gradient_checkpointing=True), (*MIXED, DROPOUT)),
    ],
    ids=["accumulated", "checkpointed"],
)
def test_how_a_step_is_computed_does_not_change_its_result(config: TrainConfig, pefts: tuple[PeftConfig, ...]) -> None:
    pack = [make_user(i, peft, random_examples(i, 5)) for i, peft in enumerate(pefts)]
    expected, results = train(tiny_model(), pack, RATE), train(fused_model(), pack, config)
    for user in pack:
        assert difference(trained(results, user), trained(expected, user)) < 1e-5


def test_checkpointing_keeps_no_tensor_inside_a_layer() -> None:
    kept = {}
    for checkpointing in (False, True):
        packed: list[int] = []

        def pack(tensor: torch.Tensor, packed: list[int] = packed) -> torch.Tensor:
            packed.append(tensor.numel())
            return tensor

        model, user = fused_model(), make_user(0, LORA, random_examples(0, 4))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train(model, [user], replace(TRAIN, gradient_checkpointing=checkpointing, epochs=1))
        kept[checkpointing] = sum(packed)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("peft", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
def test_what_a_neighbour_wrote_is_not_felt(peft: PeftConfig) -> None:
    user, texts = make_user(0, peft, random_examples(0, 6)), random_examples(1, 6, num_shared=4)
    alone = [
        trained(train(fused_model(), [make_user(1, LORA, their_text), user]), user)
        for their_text in (texts, other_text(texts))
    ]
    assert same_bits(*alone)


def test_in_bfloat16_the_gradients_are_as_close_to_float32_as_the_models_own() -> None:
    found = []
    for model in (tiny_model(), tiny_model(dtype=torch.bfloat16), fused_model(torch.bfloat16)):
        bank = AdapterBank(model, 1, [LORA], trainable=True)
        bank.load(0, random_adapter(LORA, 0))
        backward_step(bank, {0: random_examples(0, 6)}, TRAIN)
        (gradient,) = gradients(bank, [0])
        found.append(torch.cat([torch.from_numpy(gradient.tensors[key]).flatten() for key in sorted(gradient.tensors)]))
    exact, own, fused = found
    assert (fused - exact).norm() < 1.2 * (own - exact).norm() < 0.2 * exact.norm()


def test_the_engine_answers_the_same_with_fused_layers() -> None:
    requests = [Request(str(i), e.input_ids, "ann" if i % 2 else None, 6) for i, e in enumerate(random_examples(0, 5))]
    answers = []
    for model in (tiny_model(), fused_model()):
        engine = Engine(model, 1, [LORA])
        engine.load("ann", random_adapter(LORA, 3))
        answers.append(engine.generate(requests, frozenset()))
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_other_layers_stay_as_they_are(architecture: str) -> None:
    assert fuse_layers(tiny_model(architecture)) == 0


def test_a_layer_that_computes_something_else_stays_as_it_is() -> None:
    config = tiny_config()
    config.hidden_act = "relu"
    assert fuse_layers(AutoModelForCausalLM.from_config(config).eval()) == 0


def test_layers_that_differ_stay_as_they_are() -> None:
    """SmolLM3's every fourth layer knows no positions."""
    values = {**tiny_config().to_dict(), "num_hidden_layers": 4}
    for name in ("model_type", "architectures", "transformers_version", "layer_types"):
        values.pop(name, None)
    model = AutoModelForCausalLM.from_config(SmolLM3Config(**values)).eval()
    assert model.config.no_rope_layers == [1, 1, 1, 0] and fuse_layers(model) == 0


def test_a_layer_with_a_sliding_window_stays_as_it_is() -> None:
    values = {**tiny_config().to_dict(), "sliding_window": 8}
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    assert fuse_layers(AutoModelForCausalLM.from_config(MistralConfig(**values)).eval()) == 0


def test_a_plain_pass_of_a_fused_model_is_the_models_own() -> None:
    ids = torch.tensor([[7, 90, 15, 231, 4]])
    assert torch.equal(fused_model()(ids).logits, tiny_model()(ids).logits)
