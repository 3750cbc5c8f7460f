"""Differential privacy: noise of the promised size, no item above its bound, and an epsilon that is not too small."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from line_tools import adapters, oppu, result, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from oppu_ray.config import PeftConfig, PrivacyConfig, TrainConfig
from oppu_ray.core import Example, UserWork
from oppu_ray.privacy import epsilon, fine_grid, is_drawn, noise, noise_key, num_looks, on_grid, private_backward
from oppu_ray.training import attached, backward_step, train_pack
from oppu_ray.vault import Vault

KEY = bytes(range(32))
TRAIN = TrainConfig(items_per_step=3, max_steps=2, learning_rate=0.01, peft=PeftConfig(rank=2, alpha=4.0))
EXAMPLES = tuple(Example(tuple((7 * i + j) % 250 + 5 for j in range(6 + i)), 3) for i in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


def user(number: int, examples: tuple[Example, ...] = EXAMPLES) -> UserWork:
    return UserWork(f"user-{number}", number, TRAIN.peft, (examples, examples))


def gradients(model: AutoModelForCausalLM, pack: list[UserWork], privacy: PrivacyConfig, slot: int = 0) -> np.ndarray:
    """A slot's whole gradient of the first step, after a warm start that leaves no B at 0."""
    with attached(model, pack, TRAIN) as bank:
        for number, work in enumerate(pack):
            bank.start(number, work.peft, work.seed)
        for stack in bank.stacks().values():
            stack.value += 0.05
            stack.compute.copy_(stack.value)
        private_backward(privacy, pack, KEY)(bank, {n: w.steps[0] for n, w in enumerate(pack)}, TRAIN, 0)
        return np.concatenate([stack.grad[slot].numpy().reshape(-1) for stack in bank.stacks().values()])  # type: ignore[index]


def test_noise_is_whole_steps_of_a_grid_of_the_promised_size_and_repeats_under_its_name_alone() -> None:
    drawn = noise(KEY, "round 1", 200_001, 3.0, 0.125)
    assert len(drawn) == 200_001 and np.array_equal(drawn, noise(KEY, "round 1", 200_001, 3.0, 0.125))
    assert np.array_equal(drawn, np.rint(drawn)) and drawn.std() * 0.125 == pytest.approx(3.0, rel=0.01)
    assert noise(KEY, "round 1", 200_001, 2.99, 0.125).std() * 0.125 >= 2.99  # between two grid steps the larger
    for key, name in ((KEY, "round 2"), (bytes(32), "round 1")):
        assert abs(np.corrcoef(drawn, noise(key, name, 200_001, 3.0, 0.125))[0, 1]) < 0.01
    assert not noise(KEY, "round 1", 5, 0.0, 0.125).any()


def test_users_are_drawn_each_by_themselves() -> None:
    drawn = [is_drawn(KEY, f"user {n}", 0.3) for n in range(4000)]
    assert abs(np.mean(drawn) - 0.3) < 0.03
    assert all(is_drawn(KEY, f"user {n}", 1.0) for n in range(100))


def test_the_key_is_drawn_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "noise.key"
    key = noise_key(path)
    assert key == noise_key(path) != noise_key(tmp_path / "other.key") and len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600 and [p.name for p in path.parent.iterdir()] == ["noise.key"]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes; expected a key of 32"):
        noise_key(path)


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("grid", [2.0**-6, 2.0**-12, fine_grid(1.0)])
def test_what_is_cut_and_rounded_is_on_the_grid_and_never_longer_than_the_norm(scale: float, grid: float) -> None:
    torch.manual_seed(0)
    for parts in ([scale * torch.randn(40, 5), scale * torch.randn(300)], [torch.full((500,), scale)]):
        units = on_grid(parts, 1.0, grid)
        flat = torch.cat([part.reshape(-1) for part in units])
        assert flat.dtype == torch.float64 and torch.equal(flat, flat.round())
        assert sum(int(unit) ** 2 for unit in flat.tolist()) <= (1.0 / grid) ** 2
        if scale == 0.01:  # short enough: rounded, and not cut
            before = torch.cat([part.reshape(-1) for part in parts])
            assert (flat * grid - before).abs().max() <= grid / 2


def test_rounding_up_everywhere_does_not_make_a_vector_longer_than_the_norm() -> None:
    grid, num = 2.0**-8, 4096
    value = 3.5001 * grid  # each would be rounded to 4 steps
    norm = value * math.sqrt(num)
    (units,) = on_grid([torch.full((num,), value, dtype=torch.float64)], norm, grid)
    assert float((units * grid).norm()) <= norm < 4 * grid * math.sqrt(num)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_adds_nothing(bad: float) -> None:
    units = on_grid([torch.ones(3), torch.tensor([1.0, bad])], 1.0, 0.01)
    assert [part.tolist() for part in units] == [[0.0] * 3, [0.0] * 2]


def test_a_grid_that_is_too_coarse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip_norm is 0.1; expected one that is large against rounding, 0.5"):
        on_grid([torch.ones(100)], 0.1, 0.05)


def test_epsilon_is_above_the_exact_one_and_moves_the_right_way() -> None:
    # The Gaussian mechanism's exact epsilon at sigma 1, delta 1e-5 is 4.377 (Balle and Wang 2018).
    assert 4.377 < epsilon(1.0, 1.0, 1, 1e-5) < 5.5
    assert epsilon(2.0, 1.0, 1, 1e-5) < epsilon(1.0, 1.0, 1, 1e-5) < epsilon(1.0, 1.0, 3, 1e-5)
    assert epsilon(1.0, 0.1, 10, 1e-5) < epsilon(1.0, 1.0, 10, 1e-5)
    assert epsilon(1.0, 1.0, 10, 1e-6) > epsilon(1.0, 1.0, 10, 1e-5)
    # Moments accountant's own example (Abadi et al. 2016): q .01, sigma 4, 10,000 steps, delta 1e-5: 1.26.
    assert epsilon(4.0, 0.01, 10_000, 1e-5) == pytest.approx(1.26, abs=0.3)


@pytest.mark.parametrize(
    ("steps", "items", "size", "looks"), [(9, 12, 4, 3), (9, 11, 4, 3), (2, 3, 16, 2), (4, 12, 4, 2)]
)
def test_an_item_is_seen_once_an_epoch(steps: int, items: int, size: int, looks: int) -> None:
    assert num_looks(steps, items, size) == looks


def test_without_noise_the_gradient_is_the_mean_of_the_cut_ones(model: AutoModelForCausalLM) -> None:
    bound = 0.5
    ours = gradients(model, [user(0)], PrivacyConfig(0.0, bound))
    singles = []
    with attached(model, [user(0)], TRAIN) as bank:
        bank.start(0, TRAIN.peft, 0)
        for stack in bank.stacks().values():
            stack.value += 0.05
            stack.compute.copy_(stack.value)
        for example in EXAMPLES:
            backward_step(bank, {0: (example,)}, TRAIN)
            singles.append(np.concatenate([s.grad[0].numpy().reshape(-1) for s in bank.stacks().values()]))  # type: ignore[index]
            bank.zero_grad()
    norms = [float(np.linalg.norm(single)) for single in singles]
    assert max(norms) > bound  # else nothing is tested
    expected = sum(single * min(1.0, bound / norm) for single, norm in zip(singles, norms, strict=True)) / 3
    assert np.abs(ours - expected).max() < 1e-6


def test_one_item_moves_a_gradient_no_further_than_its_bound(model: AutoModelForCausalLM) -> None:
    fewer, calm, noisy = user(0, EXAMPLES[:2]), PrivacyConfig(0.0, 0.25), PrivacyConfig(1.0, 0.25)
    with_item, without = (3 * gradients(model, [one], calm) for one in (user(0), fewer))
    assert 0.2 < float(np.linalg.norm(with_item - without)) <= 0.25 * (1 + 1e-4)
    noises = [3 * gradients(model, [one], noisy) - still for one, still in ((user(0), with_item), (fewer, without))]
    assert all(noise.std() == pytest.approx(0.25, rel=0.1) for noise in noises)
    assert abs(np.corrcoef(noises)[0, 1]) < 0.1  # never the same noise over other items


def test_the_bits_of_a_noisy_gradient_lie_on_the_grid(model: AutoModelForCausalLM) -> None:
    privacy, pack = PrivacyConfig(1.0, 0.25), [user(0)]
    with attached(model, pack, TRAIN) as bank:
        bank.start(0, TRAIN.peft, 0)
        private_backward(privacy, pack, KEY)(bank, {0: EXAMPLES}, replace(TRAIN, items_per_step=1), 0)
        gradient = torch.cat([stack.grad[0].reshape(-1) for stack in bank.stacks().values()])  # type: ignore[index]
    steps = gradient.double() / fine_grid(0.25)
    small = steps[steps.abs() < 2**24]  # larger ones are rounded to float32 afterwards
    assert len(small) > 0.3 * len(steps) and torch.equal(small, small.round())
    assert len(torch.unique(small % 16)) == 16


def test_nothing_that_has_no_noise_leaves_a_private_step(model: AutoModelForCausalLM) -> None:
    """Losses and counts of tokens would tell two histories apart; so would an error over one item."""
    for examples in (EXAMPLES, EXAMPLES[:1] * 3):
        pack = [user(0, examples)]
        (done,) = train_pack(model, pack, TRAIN, backward=private_backward(PrivacyConfig(1.0), pack, KEY))
        assert (done.losses, done.num_useful_tokens, done.error) == ((0.0, 0.0), 0, None)


def test_a_users_private_gradient_is_theirs_alone(model: AutoModelForCausalLM) -> None:
    privacy, other = PrivacyConfig(1.0, 0.25), user(1, EXAMPLES[:1])
    alone, together = (gradients(model, pack, privacy) for pack in ([user(0)], [user(0), other]))
    assert np.abs(alone - together).max() < 1e-6
    assert np.abs(alone - gradients(model, [other, user(0)], privacy, slot=1)).max() < 1e-6


def test_training_repeats_under_a_key_and_differs_under_another(model: AutoModelForCausalLM) -> None:
    def train(key: bytes) -> np.ndarray:
        (done,) = train_pack(model, [user(0)], TRAIN, backward=private_backward(PrivacyConfig(1.0), [user(0)], key))
        assert done.adapter is not None and math.isfinite(done.losses[0])
        return np.concatenate([value.reshape(-1) for value in done.adapter.tensors.values()])

    assert np.array_equal(train(KEY), train(KEY)) and not np.array_equal(train(KEY), train(bytes(32)))


def test_private_personal_training_is_a_run_of_its_own_and_says_what_it_costs(folder: Path, tmp_path: Path) -> None:
    users = write_users(tmp_path / "users.jsonl", [tagging_user(n) for n in range(2)] + [tagging_user(8, role="base")])
    config = write_config(tmp_path, folder, users)
    oppu("prepare", config)
    oppu("adapt", config)
    plain = oppu("train", config)
    before = adapters(config)
    private = oppu("train", config, "privacy.noise_multiplier=2.0")
    assert "privacy" not in plain and plain["fingerprints"]["run"] != private["fingerprints"]["run"]
    assert private["privacy"]["epsilon"] == pytest.approx(epsilon(2.0, 1.0, 1, 1e-5))
    assert private["num_trained"] == 2 and all(adapters(config)[name] != before[name] for name in before)
    vault = Vault(run_dir(config) / "vault")
    assert vault.load("user-0", base_fingerprint=None)[1].recipe["privacy"]["noise_multiplier"] == 2.0
    vault.close()
    assert oppu("train", config, "privacy.noise_multiplier=2.0")["num_trained"] == 0
    assert result(config, "train")["config"]["privacy"] == {**vars(PrivacyConfig()), "noise_multiplier": 2.0}
