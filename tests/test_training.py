"""Training in a pack is training alone: exact against PEFT, untouched by neighbours, and the base stays as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    IA3,
    INFINITE,
    LORA,
    PROMPT,
    RS_LORA,
    TRAIN,
    WIDE_LORA,
    base_bytes,
    difference,
    fresh_adapter,
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
from tiny import ARCHITECTURES, VOCAB_SIZE, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, PhiConfig

from oppu_ray.adapters import AdapterBank
from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import Example, Prompt, TrainingPair, UserWork
from oppu_ray.packing import encode
from oppu_ray.training import backward_step, learning_rate, train_pack

PACKS = {
    "lora": (LORA, LORA, LORA),
    "ia3": (IA3, IA3, IA3),
    "prompt": (PROMPT, PROMPT, PROMPT),
    "mixed": (LORA, RS_LORA, WIDE_LORA, IA3, PROMPT),
}
MIXED = PACKS["mixed"]
CHECKPOINTED = replace(TRAIN, gradient_checkpointing=True)


def make_pack(pefts: tuple[PeftConfig, ...], config: TrainConfig = TRAIN) -> list[UserWork]:
    """Users of 3 to 7 examples; the first one's share no prefix."""
    return [
        make_user(i, peft, random_examples(i, 3 + 2 * i % 5, num_shared=5 * i), config) for i, peft in enumerate(pefts)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pefts", PACKS.values(), ids=PACKS)
def test_a_pack_trains_what_peft_trains_alone_on_separate_rows(
    architecture: str, pefts: tuple[PeftConfig, ...]
) -> None:
    pack = make_pack(pefts)
    results = train(tiny_model(architecture), pack)
    for user in pack:
        adapter, losses = train_alone(user, TRAIN, architecture)
        assert difference(trained(results, user), adapter) < 1e-5
        assert results[user.user_id].losses == pytest.approx(losses, abs=1e-5)
        assert difference(adapter, fresh_adapter(user.peft, user.seed, architecture)) > 5e-3


@pytest.mark.parametrize(
    "config",
    [replace(TRAIN, max_tokens_per_pass=25), replace(TRAIN, share_prefix=False), CHECKPOINTED],
    ids=["accumulated", "separate rows", "checkpointed"],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_how_a_step_is_computed_does_not_change_its_result(architecture: str, config: TrainConfig) -> None:
    pack, model = make_pack(MIXED), tiny_model(architecture)
    expected, results = train(model, pack), train(model, pack, config)
    for user in pack:
        assert difference(trained(results, user), trained(expected, user)) < 1e-5
        assert results[user.user_id].losses == pytest.approx(expected[user.user_id].losses, abs=1e-5)


def test_sharing_a_prefix_computes_fewer_tokens() -> None:
    user = make_user(0, LORA, random_examples(0, 4, num_shared=20), replace(TRAIN, epochs=1))
    shared, separate = (train(tiny_model(), [user], replace(TRAIN, share_prefix=share)) for share in (True, False))
    saved = separate["user0"].num_useful_tokens - shared["user0"].num_useful_tokens
    assert saved == 3 * 20
    num_tokens = sum(len(example.input_ids) for step in user.steps for example in step)
    assert separate["user0"].num_useful_tokens == num_tokens - 4  # an example's last token predicts nothing


def test_the_same_pack_gives_the_same_bits() -> None:
    one, again = (train(tiny_model(), make_pack(MIXED)) for _ in range(2))
    for user in make_pack(MIXED):
        assert same_bits(trained(one, user), trained(again, user))
        assert one[user.user_id].losses == again[user.user_id].losses


def test_a_user_after_others_on_the_same_model_is_as_on_a_fresh_one() -> None:
    model, later = tiny_model(), make_user(9, LORA, random_examples(9, 6))
    train(model, make_pack((*MIXED, INFINITE)))
    after = train(model, [later])
    alone = train(tiny_model(), [later])
    assert same_bits(trained(after, later), trained(alone, later))


@pytest.mark.parametrize("position", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("neighbour", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
@pytest.mark.parametrize("peft", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
def test_what_a_neighbour_wrote_is_not_felt(peft: PeftConfig, neighbour: PeftConfig, position: int) -> None:
    user, texts = make_user(0, peft, random_examples(0, 6)), random_examples(1, 6, num_shared=4)
    adapters = []
    for their_text in (texts, other_text(texts)):
        pack = [make_user(1, neighbour, their_text)]
        pack.insert(position, user)
        adapters.append(trained(train(tiny_model(), pack), user))
    assert same_bits(*adapters)


# A's and B's shared prefixes and suffixes, in tokens: what is padded together changes with them.
LAYOUTS = {"alike": (11, 11), "short": (3, 3), "B shares nothing": (3, 0), "A shares nothing": (0, 3)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("position", [0, 1], ids=["before", "after"])
def test_a_neighbour_whose_loss_is_nan_gets_an_error_and_is_not_felt(layout: tuple[int, int], position: int) -> None:
    user, texts = make_user(0, LORA, random_examples(0, 6, layout[0])), random_examples(1, 6, layout[1])
    adapters = []
    for their_peft in (LORA, INFINITE):
        their_work = make_user(1, their_peft, texts, replace(TRAIN, epochs=1, items_per_step=6))  # one step
        pack = [their_work]
        pack.insert(position, user)
        results = train(tiny_model(), pack)
        adapters.append(trained(results, user))
    assert same_bits(*adapters)
    broken = results["user1"]
    assert broken.adapter is None and broken.error is not None and "step 1: loss nan" in broken.error
    assert len(broken.losses) == 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("their_peft", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
@pytest.mark.parametrize("peft", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
def test_a_neighbours_adapter_full_of_nan_leaves_the_gradients_alone(
    peft: PeftConfig, their_peft: PeftConfig, layout: tuple[int, int]
) -> None:
    texts: dict[int, Sequence[Example]] = {0: random_examples(0, 4, layout[0]), 1: random_examples(1, 4, layout[1])}
    found = []
    for their_rate in (0.0, float("nan")):
        bank = AdapterBank(tiny_model(), 2, [peft, their_peft], trainable=True)
        bank.load(0, random_adapter(peft, 0))
        bank.load(1, random_adapter(their_peft, 1))
        bank.adam_step({1: their_rate}, step=1, clip_norm=0.0, weight_decay=0.0)
        losses, _ = backward_step(bank, texts, TRAIN)
        found.append((losses[0], gradients(bank, [0])[0]))
    assert math.isnan(losses[1]) and found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])


def test_a_pack_in_which_everyone_breaks_ends() -> None:
    pack = [make_user(i, INFINITE, random_examples(i, 6)) for i in range(2)]
    results = train(tiny_model(), pack)
    assert [result.adapter for result in results.values()] == [None, None]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_base_is_left_as_it_was(checkpointing: bool) -> None:
    model = tiny_model()
    before, modules = base_bytes(model), [(name, type(module)) for name, module in model.named_modules()]
    train(model, make_pack((*MIXED, INFINITE)), replace(TRAIN, gradient_checkpointing=checkpointing))
    assert base_bytes(model) == before
    assert all(weight.grad is None for weight in model.parameters())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not model.training and not model.is_gradient_checkpointing


def test_a_pack_that_is_given_up_leaves_the_model_usable() -> None:
    model, pack = tiny_model(), make_pack((LORA, IA3))
    results = train_pack(model, pack, TRAIN)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert same_bits(trained(train(model, pack), pack[0]), trained(train(tiny_model(), pack), pack[0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_answers_as_before_once_training_is_over(architecture: str) -> None:
    model, ids = tiny_model(architecture), torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    train(model, make_pack((LORA,)))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_users_of_one_item_of_many_items_and_of_items_beyond_all_limits() -> None:
    config = replace(TRAIN, epochs=1, items_per_step=300, max_tokens_per_pass=200)
    pair = TrainingPair(Prompt("which tag?", "a film " * 100, "tag:"), " funny", "i1")
    long = encode(pair, tiny_tokenizer(), max_length=60)
    assert len(long.input_ids) == 60
    draw = random_examples(3, 300, num_shared=2)
    many = [Example((*e.input_ids[:4], e.input_ids[-1]), 4) for e in draw]
    pack = [
        make_user(0, LORA, random_examples(0, 1), config),
        make_user(1, LORA, many, config),
        make_user(2, LORA, [long, *random_examples(2, 2)], config),
        make_user(3, PROMPT, [long], replace(config, epochs=2)),
        make_user(4, LORA, [Example(tuple(i % VOCAB_SIZE for i in range(2500)), 2490)], config),
    ]
    results = train(tiny_model(), pack, config)
    for user in pack:
        adapter, losses = train_alone(user, config)
        assert difference(trained(results, user), adapter) < 1e-5
        assert results[user.user_id].losses == pytest.approx(losses, abs=1e-5)
    for user in pack:
        assert difference(trained(train(tiny_model(), [user], config), user), trained(results, user)) < 1e-5


def test_results_come_as_soon_as_a_user_is_done() -> None:
    short, long = make_user(0, LORA, random_examples(0, 2)), make_user(1, IA3, random_examples(1, 9))
    seen: list[tuple[int, Sequence[str]]] = []
    results = train_pack(tiny_model(), [long, short], TRAIN, lambda tokens, users: seen.append((tokens, users)))
    first = next(results)
    assert first.user_id == "user0" and len(first.losses) == 3 and len(seen) == 2
    (second,) = results
    assert len(second.losses) == 9 and [users for _, users in seen] == [["user1", "user0"]] * 3 + [["user1"]] * 6
    assert sum(tokens for tokens, _ in seen) == first.num_useful_tokens + second.num_useful_tokens


DROPOUT = replace(LORA, dropout=0.3)


def test_dropout_of_a_user_in_a_pack_is_the_users_own() -> None:
    user = make_user(0, DROPOUT, random_examples(0, 6))
    neighbours = [make_user(1, DROPOUT, random_examples(1, 7)), make_user(2, IA3, random_examples(2, 5))]
    alone = trained(train(tiny_model(), [user]), user)
    packed = trained(train(tiny_model(), [neighbours[0], user, neighbours[1]]), user)
    without = trained(train(tiny_model(), [replace(user, peft=LORA)]), replace(user, peft=LORA))
    other_seed = replace(user, seed=5)
    start = fresh_adapter(DROPOUT, user.seed)
    assert difference(alone, packed) < 1e-5
    assert difference(replace(alone, peft_config={}), replace(without, peft_config={})) > 1e-3
    assert same_bits(alone, trained(train(tiny_model(), [user]), user)) and not same_bits(alone, start)
    assert difference(alone, trained(train(tiny_model(), [other_seed]), other_seed)) > 1e-3


@pytest.mark.parametrize("config", [TRAIN, CHECKPOINTED], ids=["plain", "checkpointed"])
def test_the_bases_own_dropout_is_off(config: TrainConfig) -> None:
    user, results = make_user(0, DROPOUT, random_examples(0, 5)), []
    for drops in (0.0, 0.5):
        values = {**tiny_config().to_dict(), "resid_pdrop": drops, "embd_pdrop": drops}
        for name in ("model_type", "architectures", "transformers_version"):
            values.pop(name, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(PhiConfig(**values)).eval().requires_grad_(False)
        results.append(trained(train(model, [user], config), user))
    assert same_bits(*results)


def test_dropout_does_not_depend_on_what_the_neighbours_adapt() -> None:
    user, neighbour = make_user(0, DROPOUT, random_examples(0, 6)), make_user(1, WIDE_LORA, random_examples(1, 6))
    packed = trained(train(tiny_model(), [user, neighbour]), user)
    assert difference(packed, trained(train(tiny_model(), [user]), user)) < 1e-5


def test_dropout_does_not_depend_on_how_the_pack_is_cut_into_passes() -> None:
    config = replace(TRAIN, max_tokens_per_pass=50, share_prefix=False)
    user, neighbour = make_user(1, DROPOUT, random_examples(0, 8)), make_user(0, DROPOUT, random_examples(1, 6))
    packed = trained(train(tiny_model(), [neighbour, user], config), user)
    assert difference(packed, trained(train(tiny_model(), [user], config), user)) < 1e-5


def test_dropout_with_gradient_checkpointing_drops_the_same() -> None:
    user = make_user(0, DROPOUT, random_examples(0, 6))
    plain = train(tiny_model(), [user])
    checkpointed = train(tiny_model(), [user], CHECKPOINTED)
    assert difference(trained(checkpointed, user), trained(plain, user)) < 1e-5


def test_dropout_leaves_the_gradient_right_on_average() -> None:
    """At the start B is zero, so B's gradient is linear in what is dropped: on average it is the plain one."""
    texts: dict[int, Sequence[Example]] = {slot: random_examples(0, 2, num_shared=4) for slot in range(32)}
    found = []
    for rate in (0.0, 0.3):
        bank = AdapterBank(tiny_model().train(), 32, [LORA], trainable=True)
        for slot in texts:
            bank.start(slot, replace(LORA, dropout=rate), seed=slot)
        backward_step(bank, texts, TRAIN)
        states = gradients(bank, list(texts))
        found.append(np.concatenate([v.ravel() for one in states for k, v in one.tensors.items() if "lora_B" in k]))
    plain, dropped = found
    assert dropped @ plain / (plain @ plain) == pytest.approx(1.0, abs=0.1)
    assert np.linalg.norm(dropped) > 1.05 * np.linalg.norm(plain)


def test_a_bfloat16_base_stays_close_to_float32() -> None:
    pack = make_pack((LORA, IA3, PROMPT))
    exact, rounded = train(tiny_model(), pack), train(tiny_model(dtype=torch.bfloat16), pack)
    for user in pack:
        assert rounded[user.user_id].losses == pytest.approx(exact[user.user_id].losses, rel=0.02)
        assert trained(rounded, user).tensors.keys() == trained(exact, user).tensors.keys()
        assert all(value.dtype == "float32" for value in trained(rounded, user).tensors.values())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_decays_and_is_never_zero(schedule: str) -> None:
    config = TrainConfig(learning_rate=2.0, schedule=schedule, warmup_share=0.25)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and min(rates) > 0
    middle, last = {"linear": (10 / 9, 2 / 9), "cosine": (1.1736482, 0.0603074), "constant": (2.0, 2.0)}[schedule]
    assert (rates[7], rates[11]) == pytest.approx((middle, last))
    for num_steps in (1, 2, 3):
        assert all(learning_rate(config, step, num_steps) > 0 for step in range(num_steps))
    assert learning_rate(replace(config, warmup_share=0.0), 0, 5) == 2.0


def test_a_pack_goes_on_from_any_step_to_the_same_bits() -> None:
    dropping = replace(LORA, dropout=0.3)
    pack, states = make_pack((dropping, RS_LORA, WIDE_LORA, IA3, PROMPT)), []
    whole = {
        one.user_id: one
        for one in train_pack(tiny_model(), pack, TRAIN, between_steps=lambda take: states.append(take()))
    }
    assert [state.num_steps for state in states] == list(range(1, max(len(user.steps) for user in pack)))
    for state in states:
        on = {one.user_id: one for one in train_pack(tiny_model(), pack, TRAIN, state=state)}
        assert set(on) == set(state.users) == {u.user_id for u in pack if len(u.steps) > state.num_steps}
        for user in (user for user in pack if user.user_id in on):
            assert same_bits(trained(on, user), trained(whole, user))
            assert (on[user.user_id].losses, on[user.user_id].num_useful_tokens) == (
                whole[user.user_id].losses,
                whole[user.user_id].num_useful_tokens,
            )
