"""Fused kernels compute what the model's own code computes, forwards and backwards, or are not put in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch
from reference import (
    IA3,
    LORA,
    RATE,
    TYPES,
    close,
    difference,
    make_user,
    random_examples,
    rotary_by_complex_numbers,
    tiny_model,
    train,
    train_alone,
    trained,
)
from tiny import ARCHITECTURES, tiny_config
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from oppu_ray.kernels import (
    KEPT_PRODUCTS,
    RowTiles,
    fuse,
    keep_freed_memory,
    pack_linears,
    token_loss_gradient,
    token_losses,
)

IDS = torch.tensor([[7, 90, 15, 231, 4, 4, 68, 120, 33, 5, 19]])


@pytest.fixture(autouse=True)
def own_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fuse` replaces a function in the model's source file, for the whole process: put it back after each test."""
    for architecture in ARCHITECTURES:
        source = sys.modules[type(tiny_model(architecture)).__module__]
        monkeypatch.setattr(source, "apply_rotary_pos_emb", rotary_by_complex_numbers)


def logits_and_gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of a text, and the gradient of their weighted sum with respect to its embeddings."""
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    towards = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
    (gradient,) = torch.autograd.grad((logits * towards).sum(), embeds)
    return logits.detach(), gradient


@pytest.mark.parametrize(("architecture", "num_fused"), [("llama", 5 + 2), ("qwen3", 9 + 2), ("gemma3", 13)])
def test_a_fused_model_is_the_same_function(architecture: str, num_fused: int) -> None:
    model = tiny_model(architecture)
    expected = logits_and_gradient(model)
    assert fuse(model) == num_fused  # every norm, and the MLPs where they are gated by SiLU
    for found, wanted in zip(logits_and_gradient(model), expected, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_rotary_embedding_is_replaced_and_agrees() -> None:
    model = tiny_model()
    source = sys.modules[type(model).__module__]
    fuse(model)
    fused_rotary = source.apply_rotary_pos_emb
    assert fused_rotary is not rotary_by_complex_numbers
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=draw).requires_grad_() for heads in (4, 2))
    angles = torch.rand(1, 5, 4, generator=draw).repeat(1, 1, 2)
    results = [rotary(q, k, angles.cos(), angles.sin()) for rotary in (fused_rotary, rotary_by_complex_numbers)]
    towards = [torch.randn(x.shape, generator=draw) for x in results[0]]
    gradients = [torch.autograd.grad(result, (q, k), towards) for result in results]
    for found, wanted in zip(results[0] + gradients[0], results[1] + gradients[1], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_rotary_embedding_of_part_of_a_head_stays_as_it_is() -> None:
    values = {**tiny_config().to_dict(), "partial_rotary_factor": 0.5}
    for name in ("model_type", "architectures", "transformers_version", "rope_parameters"):
        values.pop(name, None)
    model = AutoModelForCausalLM.from_config(Phi3Config(**values)).eval()
    expected = model(IDS).logits
    fuse(model)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_a_module_that_computes_something_else_stays_as_it_is() -> None:
    config = tiny_config()
    config.hidden_act = "relu"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = logits_and_gradient(model)
    assert fuse(model) == 5  # the norms; no MLP
    for found, wanted in zip(logits_and_gradient(model), expected, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_a_fused_model_trains_like_peft_on_a_plain_one() -> None:
    users = [make_user(0, LORA, random_examples(0, 5)), make_user(1, IA3, random_examples(1, 5))]
    expected = [train_alone(user, RATE) for user in users]
    model = tiny_model()
    fuse(model)
    results = train(model, users, RATE)
    for user, (adapter, losses) in zip(users, expected, strict=True):
        assert difference(trained(results, user), adapter) < 1e-5
        assert results[user.user_id].losses == pytest.approx(losses, abs=1e-5)


def test_a_fused_model_in_bfloat16_stays_close_to_float32() -> None:
    exact = logits_and_gradient(tiny_model())
    model = tiny_model(dtype=torch.bfloat16)
    assert fuse(model) == 7
    for found, wanted in zip(logits_and_gradient(model), exact, strict=True):
        assert (found.float() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_token_losses_and_their_gradient_are_autograds(softcap: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 50, generator=draw) * 4).requires_grad_()
    targets, weights = torch.randint(50, (6,), generator=draw), torch.rand(6, generator=draw)
    capped = torch.tanh(logits / softcap) * softcap if softcap else logits
    expected = cross_entropy(capped, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(token_losses(logits.detach(), targets, softcap), expected.detach())
    found = token_loss_gradient(logits.detach(), targets, weights, softcap)
    torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_a_linears_row_has_the_same_bits_among_any_number_of_rows(
    dtype: torch.dtype,
    tolerance: float,
    packed: bool,
    threads: int,
    normal: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 1,536 inputs, whose sum oneDNN splits for one row, and MKL for fewer than 16; afterwards all is as before."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: packed)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1536, 200), torch.nn.Linear(200, 8, bias=False)).to(dtype)
    x, threads_before = normal(300, 1536).to(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            before = model(x)
            undo = pack_linears(model)
            expected = model(x)
            for num in (1, 2, 3, 11, 17, 33, 65, 100, 300):
                for rows in (slice(num), slice(300 - num, 300)):
                    assert torch.equal(model(x[rows]), expected[rows])
                    assert torch.equal(model(x[None, rows])[0], expected[rows])
            undo()
            assert torch.equal(model(x), before)
    finally:
        torch.set_num_threads(threads_before)
    close(expected, before, tolerance)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_tile_is_as_large_as_gives_a_row_the_same_bits() -> None:
    """A product that is off for one row, for 2 to 7 rows in the last place, and for more than 100."""
    weight, sizes = torch.randn(20, 40), list[int]()

    def product(x_TI: Tensor) -> Tensor:
        sizes.append(num := len(x_TI))
        y_TO = x_TI @ weight
        if num == 1 or num > 100:
            y_TO = y_TO * (1 + 1e-6)
        elif num < 8:
            y_TO[-1] += 1e-6
        return y_TO

    tiles, x = RowTiles(), torch.randn(300, 20)
    wanted = {1: [8], 3: [8], 8: [8], 9: [12], 32: [32], 33: [32, 8], 40: [48], 300: [96, 96, 96, 12]}
    for num, expected in wanted.items():
        tiles.apply(product, x[:num])
        sizes.clear()
        assert tiles.apply(product, x[:num]).shape == (num, 40)
        assert sizes == expected


def test_kept_products_are_limited_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    keep_freed_memory()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    keep_freed_memory()
    assert os.environ[name] == str(KEPT_PRODUCTS)
