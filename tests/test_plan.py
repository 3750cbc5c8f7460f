"""`oppu plan`: the same planners as a run, figures that can be checked by hand, and balance for a million users."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from oppu_ray.cli import main
from oppu_ray.config import TrainConfig
from oppu_ray.core import Example, Item, UserHistory, UserSize
from oppu_ray.packing import make_rows, plan_packs, plan_passes, plan_user
from oppu_ray.plan import PlanConfig, load_plan, plan, simulate_users
from oppu_ray.prepared import write_prepared

TWO = [UserSize("ann", 32, 3200), UserSize("bob", 16, 1600)]
BY_HAND = PlanConfig(
    workers=2,
    tokens_per_word=1.0,
    prompt_tokens=100,
    tokens_per_s=100.0,
    cpus_per_worker=2.0,
    price_per_cpu_hour=0.5,
    bytes_per_user=1000,
    registry_bytes_per_user=10,
    personal=TrainConfig(epochs=2, items_per_step=16, max_tokens_per_pass=2000, max_users_per_pack=1),
)


def test_the_figures_are_what_one_gets_by_hand() -> None:
    found = plan(BY_HAND, TWO)  # ann: 2 epochs of 2 steps of 100 + 1600 tokens; bob: 2 epochs of 1
    assert (found.num_users, found.num_items, found.num_packs, found.num_tokens) == (2, 48, 2, 10200)
    assert (found.num_passes, found.makespan_s, found.balance) == (4 + 2, 68.0, 0.75)
    assert (found.longest_pack_s, found.longest_user_s) == (68.0, 68.0)
    assert (found.adapter_bytes, found.registry_bytes) == (2000, 20)
    assert found.usd_per_1000_users == pytest.approx(68 / 3600 * 2 * 2 * 0.5 * 500)


def test_one_worker_does_all_of_it() -> None:
    found = plan(replace(BY_HAND, workers=1), TWO)
    assert (found.makespan_s, found.balance) == (102.0, 1.0)


@pytest.mark.parametrize("max_steps", [0, 3])
def test_tokens_and_passes_are_those_of_the_real_rows(max_steps: int) -> None:
    """Three users whose examples are 4 shared tokens, 6 own ones and a completion; steps of 2 are rows of 16 tokens."""
    recipe = TrainConfig(epochs=2, items_per_step=2, max_tokens_per_pass=32, max_steps=max_steps)
    counts = {"ann": 12, "bob": 10, "eve": 8}
    works = {}
    for user_id, num in counts.items():
        examples = [Example((1, 2, 3, 4, number, 9, 9, 9, 9, 9, 7), 10) for number in range(10, 10 + num)]
        works[user_id] = plan_user(user_id, 0, examples, recipe)
    config = replace(BY_HAND, workers=1, prompt_tokens=4, personal=recipe, tokens_per_s=1.0)
    sizes = [UserSize(user_id, num, 6 * num) for user_id, num in counts.items()]
    (pack,) = plan_packs(sizes, recipe)
    num_tokens = num_passes = 0
    for step in range(max(len(work.steps) for work in works.values())):
        at_work = [works[user_id].steps[step] for user_id in pack.user_ids if step < len(works[user_id].steps)]
        rows = [row for slot, examples in enumerate(at_work) for row in make_rows(slot, examples, 32)]
        num_tokens += sum(row.num_tokens for row in rows)
        num_passes += len(plan_passes(rows, 32))
    found = plan(config, sizes)
    assert (found.num_tokens, found.num_passes) == (num_tokens, num_passes)


def test_simulated_users_are_the_same_for_a_seed_and_heavy_tailed_up_to_the_limit() -> None:
    config = PlanConfig(users=20_000, median_items=30, max_items=500)
    users = simulate_users(config)
    items = [user.num_items for user in users]
    assert users == simulate_users(config) != simulate_users(replace(config, seed=1))
    assert statistics.median(items) == pytest.approx(30, rel=0.05) and statistics.mean(items) > 45
    assert min(items) >= 1 and max(items) == 500 and len({user.user_id for user in users}) == 20_000


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_shards_of_many_users_are_balanced_and_depend_on_nothing_but_sizes(sigma: float) -> None:
    config = PlanConfig(users=100_000, workers=64, sigma=sigma)
    users = simulate_users(config)
    found = plan(config, users)
    assert 0.97 <= found.balance <= 1.0
    other = plan(replace(config, workers=8), users[::-1])
    assert (other.num_packs, other.num_passes, other.num_tokens) == (
        found.num_packs,
        found.num_passes,
        found.num_tokens,
    )


@pytest.mark.slow
def test_a_million_users_on_256_workers() -> None:
    config = PlanConfig(users=1_000_000, workers=256)
    found = plan(config, simulate_users(config))
    assert found.balance >= 0.97 and found.peak_bytes <= 4 * 2**30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The YAML of a run whose two targets and one base user are prepared."""
    users = [
        UserHistory(name, role, tuple(Item(str(i), text="four words of text") for i in range(num)))
        for name, role, num in (("ann", "target", 40), ("bob", "target", 4), ("eve", "base", 9))
    ]
    write_prepared(tmp_path / "run" / "prepare", users)
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\npersonal: {{epochs: 7}}\nworkers: {{num_workers: 3}}\n")
    return path


def test_a_prepared_run_is_planned_with_its_own_users_and_recipe(run: Path) -> None:
    config, sizes = load_plan(run, ["tokens_per_s=10", "personal.items_per_step=4"])
    assert sizes == [UserSize("ann", 40, 160), UserSize("bob", 4, 16)]
    assert (config.users, config.workers, config.tokens_per_s) == (2, 3, 10.0)
    assert (config.personal.epochs, config.personal.items_per_step) == (7, 4)


def test_the_command_prints_every_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "users=300", "workers=4"]) == 0
    simulated = capsys.readouterr().out
    assert simulated.startswith("users     300 with ") and " on 4 workers\n" in simulated
    assert {line.split()[0] for line in simulated.splitlines()} == set(
        "users packs makespan balance longest disk cost planning with".split()
    )
    assert main(["plan", "--config", str(run)]) == 0
    assert capsys.readouterr().out.startswith("users     2 with 44 items")


def test_bad_input_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text(f"run_dir: {tmp_path / 'empty'}")
    write_prepared(tmp_path / "empty" / "prepare", [])
    for arguments, message in (
        (["user=5"], "command line: user: unknown key; expected one of users, workers"),
        (["users=many"], "command line: users: found 'many'; expected a whole number"),
        (["workers=0"], "command line: workers: found '0'; expected at least 1"),
        (["--config", str(run), "users=5"], f"users=5: {run} has 2 target users; leave `users` out"),
        (["--config", str(empty)], f"{empty}: the prepared run in {tmp_path}/empty has no target users"),
    ):
        assert main(["plan", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"oppu: {message}")
