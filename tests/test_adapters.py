"""The bank: adapters that fit nowhere are refused and change nothing; saved is loaded, and is PEFT's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference import (
    IA3,
    LORA,
    PROMPT,
    RS_LORA,
    WIDE_LORA,
    base_bytes,
    fresh_adapter,
    gradients,
    make_user,
    mean_nll,
    peft_model,
    random_adapter,
    random_examples,
    same_bits,
    tiny_model,
    train,
    trained,
)
from tiny import ARCHITECTURES

from oppu_ray.adapter_files import load_adapter, save_adapter
from oppu_ray.adapters import AdapterBank, peft_dict, peft_from_dict, scaling, targets
from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import AdapterState, Example
from oppu_ray.inference import Engine
from oppu_ray.training import backward_step

KINDS = {"lora": LORA, "rslora": RS_LORA, "wide lora": WIDE_LORA, "ia3": IA3, "prompt": PROMPT}
ALL = tuple(KINDS.values())
EXAMPLES = random_examples(0, 4)


def scores(adapter: AdapterState, architecture: str = "llama") -> list[float]:
    engine = Engine(tiny_model(architecture), 1, ALL)
    engine.load("one", adapter)
    return engine.score([("one", EXAMPLES)])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("peft", ALL, ids=KINDS)
def test_a_trained_adapter_saved_is_loaded_and_peft_reads_the_same(
    peft: PeftConfig, architecture: str, tmp_path: Path
) -> None:
    user = make_user(0, peft, EXAMPLES)
    adapter = trained(train(tiny_model(architecture), [user]), user)
    named = AdapterState(adapter.tensors, {**adapter.peft_config, "base_model_name_or_path": "tiny"})
    save_adapter(tmp_path / "adapter", named)
    loaded = load_adapter(tmp_path / "adapter")
    assert same_bits(loaded, adapter)
    assert scores(loaded, architecture) == scores(adapter, architecture)
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "adapter").eval()
    assert scores(loaded, architecture) == pytest.approx([mean_nll(theirs, e) for e in EXAMPLES], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores(fresh_adapter(peft, 0, architecture), architecture),
                                          scores(adapter, architecture), strict=True)) > 1e-3  # fmt: skip


@pytest.mark.parametrize("peft", ALL, ids=KINDS)
def test_an_adapter_leaves_a_bank_as_it_came_in(peft: PeftConfig) -> None:
    adapter = random_adapter(peft, 3)
    alone = peft_model(adapter)
    expected = pytest.approx([mean_nll(alone, example) for example in EXAMPLES], abs=1e-5)
    engine = Engine(tiny_model(), 1, ALL)
    for other in ALL:  # what was in the slot before, of any kind and rank, must not shine through
        engine.load("one", random_adapter(other, 4))
        engine.load("one", adapter)
        exported = engine.bank.export(0)
        assert same_bits(exported, adapter) and exported.peft_config == peft_dict(peft)
        assert engine.score([("one", EXAMPLES)])[0] == expected


@pytest.mark.parametrize("peft", [LORA, RS_LORA, IA3], ids=["lora", "rslora", "ia3"])
def test_a_fresh_adapter_is_the_base_model(peft: PeftConfig) -> None:
    base = tiny_model()
    assert scores(fresh_adapter(peft, 0)) == pytest.approx([mean_nll(base, example) for example in EXAMPLES], abs=1e-6)


def test_fresh_prompt_tuning_starts_from_words_of_the_vocabulary() -> None:
    words = tiny_model().state_dict()["model.embed_tokens.weight"]
    (vectors,) = fresh_adapter(PROMPT, 0).tensors.values()
    assert vectors.shape == (3, 64)
    assert all((words == torch.from_numpy(vector)).all(1).any() for vector in vectors)


def test_a_fresh_adapter_comes_from_the_users_seed_alone() -> None:
    bank = AdapterBank(tiny_model(), 3, ALL, trainable=False)
    for peft in (LORA, PROMPT):
        for slot, seed in ((0, 5), (1, 6), (2, 5)):
            bank.start(slot, peft, seed)
        assert same_bits(bank.export(0), bank.export(2)) and same_bits(bank.export(0), fresh_adapter(peft, 5))
        assert not same_bits(bank.export(0), bank.export(1))


def test_fresh_lora_is_drawn_as_peft_draws_it() -> None:
    """A uniform within 1 / sqrt(inputs), B zero."""
    fresh = fresh_adapter(replace(LORA, rank=64), 0).tensors
    for key, value in fresh.items():
        if "lora_B" in key:
            assert not value.any()
        else:
            assert np.abs(value).max() == pytest.approx(1 / 8, rel=0.01) and np.abs(value).max() <= 1 / 8
            assert value.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.05)


def changed(adapter: AdapterState, key: str, value: np.ndarray | None) -> AdapterState:
    tensors = {**adapter.tensors, key: value}
    return AdapterState({k: v for k, v in tensors.items() if v is not None}, adapter.peft_config)


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NAN = np.full((4, 64), np.nan, np.float32)
REFUSED = {
    "kind": (lambda: random_adapter(IA3, 0), "not made for"),
    "rank": (lambda: random_adapter(replace(LORA, rank=8), 0), "q_proj.lora_A.weight has shape .* the bank's rank"),
    "target": (lambda: random_adapter(replace(LORA, target_modules=("o_proj",)), 0), "not made for"),
    "virtual": (lambda: random_adapter(replace(PROMPT, num_virtual_tokens=9), 0), r"prompt_embeddings has shape \(9"),
    "missing": (lambda: changed(random_adapter(LORA, 0), FIRST_A, None), FIRST_A),
    "extra": (lambda: changed(random_adapter(LORA, 0), "layers.7.q_proj", NAN), "layers.7.q_proj"),
    "shape": (lambda: changed(random_adapter(LORA, 0), FIRST_A, NAN[:, :-1]), rf"{FIRST_A} has shape \(4, 63\)"),
    "nan": (lambda: changed(random_adapter(LORA, 0), FIRST_A, NAN), f"{FIRST_A} has a value that is not finite"),
    "unknown": (lambda: AdapterState({}, {"peft_type": "VERA"}), "'VERA' is not supported; expected LORA, IA3"),
}


@pytest.mark.parametrize("made, message", REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_the_slot_is_as_before(
    made: Callable[[], AdapterState], message: str
) -> None:
    bank = AdapterBank(tiny_model(), 2, [LORA, PROMPT], trainable=False)
    before = random_adapter(LORA, 1)
    bank.load(0, before)
    with pytest.raises(ValueError, match=message):
        bank.load(0, made())
    assert same_bits(bank.export(0), before)


def test_an_empty_slot_has_nothing_to_export() -> None:
    with pytest.raises(ValueError, match="slot 1 is empty"):
        AdapterBank(tiny_model(), 2, [LORA], trainable=False).export(1)


def test_an_unknown_target_module_names_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match="'Wqkv' is not a linear of this model; it has .*'down_proj'.*'q_proj'"):
        AdapterBank(tiny_model(), 1, [replace(LORA, target_modules=("Wqkv",))], trainable=False)


def test_a_bank_that_cannot_be_made_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    modules, attention = dict(model.named_modules()), model.config._attn_implementation
    for names in (("q_proj", "zzz"), ("q_proj", "lm_head")):
        with pytest.raises(ValueError, match=f"target module '{names[1]}' is "):
            AdapterBank(model, 1, [replace(LORA, target_modules=names)], trainable=True)
        assert dict(model.named_modules()) == modules and model.config._attn_implementation == attention


def test_a_model_has_one_bank_at_a_time() -> None:
    model = tiny_model()
    bank = AdapterBank(model, 1, [LORA], trainable=True)
    with pytest.raises(ValueError, match="q_proj has another bank's adapters"):
        AdapterBank(model, 1, [LORA], trainable=True)
    assert model.get_submodule("model.layers.0.self_attn.q_proj") is bank.linears["model.layers.0.self_attn.q_proj"]


def test_removing_a_bank_gives_the_model_its_own_linears_back() -> None:
    model = tiny_model()
    modules, content = dict(model.named_modules()), base_bytes(model)
    bank = AdapterBank(model, 2, ALL, trainable=True)
    assert dict(model.named_modules()).keys() != modules.keys()
    bank.remove()
    assert dict(model.named_modules()) == modules and base_bytes(model) == content


def test_an_adam_step_is_torchs_adamw_for_each_slot_alone() -> None:
    """Three steps of two users with their own rates; the third slot, not named, does not move."""
    config, pefts = TrainConfig(), (LORA, IA3, RS_LORA)
    bank = AdapterBank(tiny_model(), 3, pefts, trainable=True)
    starts = [random_adapter(peft, slot) for slot, peft in enumerate(pefts)]
    texts: dict[int, Sequence[Example]] = {slot: random_examples(slot, 3) for slot in range(3)}
    weights, optimizers = [], []
    for slot, start in enumerate(starts):
        bank.load(slot, start)
        weights.append({key: torch.from_numpy(value.copy()).requires_grad_() for key, value in start.tensors.items()})
        optimizers.append(torch.optim.AdamW(weights[slot].values(), lr=0.01 * (slot + 1), weight_decay=0.1))
    for step in range(1, 4):
        probe = AdapterBank(tiny_model(), 3, pefts, trainable=True)
        for slot in range(3):
            probe.load(slot, bank.export(slot))
        backward_step(probe, texts, config)
        for slot, gradient in enumerate(gradients(probe, range(3))):
            for key, weight in weights[slot].items():
                weight.grad = torch.from_numpy(gradient.tensors[key])
        clipped = [torch.nn.utils.clip_grad_norm_(weights[slot].values(), 0.3) for slot in range(2)]
        for slot in range(2):
            optimizers[slot].step()
        backward_step(bank, texts, config)
        norms = bank.adam_step({0: 0.01, 1: 0.02}, step, clip_norm=0.3, weight_decay=0.1)
        bank.zero_grad()
        assert norms == pytest.approx({0: clipped[0].item(), 1: clipped[1].item()}, rel=1e-3)
    for slot in range(2):
        for key, value in bank.export(slot).tensors.items():
            np.testing.assert_allclose(value, weights[slot][key].detach(), atol=1e-4)
            assert np.abs(value - starts[slot].tensors[key]).max() > 0.01
    assert same_bits(bank.export(2), starts[2])


@pytest.mark.parametrize("peft", [*ALL, replace(LORA, dropout=0.1)])
def test_a_config_survives_pefts_names(peft: PeftConfig) -> None:
    back = peft_from_dict(peft_dict(peft))
    assert back.kind == peft.kind and targets(back) == tuple(sorted(targets(peft)))
    assert peft_dict(back) == peft_dict(peft) and (peft.kind != "lora" or scaling(back) == scaling(peft))


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    config = PeftConfig(rank=16, alpha=8.0)
    assert (scaling(config), scaling(replace(config, rslora=True))) == (0.5, 2.0)
