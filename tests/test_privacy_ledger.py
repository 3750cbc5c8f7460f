"""Private users: nothing is published that has no noise, and epsilon is that of all versions ever released."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from line_tools import oppu, result, run_dir, tagging_user, write_config, write_users
from tiny import tiny_base

from oppu_ray import refresh, workers
from oppu_ray.archive import export_user, import_user
from oppu_ray.base_model import Base
from oppu_ray.cli import main
from oppu_ray.config import Config, PrivacyConfig, TrainConfig, load_config
from oppu_ray.core import InputError, UserDone
from oppu_ray.forget import forget_items, forget_user
from oppu_ray.privacy import account, epsilon, epsilon_of
from oppu_ray.progress import Progress
from oppu_ray.refresh import open_task_base, refresh_user
from oppu_ray.telemetry import Telemetry
from oppu_ray.vault import Vault, open_vault
from oppu_ray.workers import Worker

NOISE = 4.0
PRIVACY = {"noise_multiplier": NOISE}
RHO = 1 / (2 * NOISE**2)  # of a training that looks at each item once, as those here do
VOLATILE = {"run_id", "user_hash", "version", "checksums"}  # keyed or noisy: other numbers in every vault


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def make_run(folder: Path, base: Path, changed: str = "") -> Path:
    """A private run of two targets; `changed` stands in the first item of user-0."""
    users = [tagging_user(n, 6) for n in range(2)] + [tagging_user(8, role="base")]
    users[0]["history"][0]["text"] += changed
    folder.mkdir(exist_ok=True)
    path = write_config(folder, base, write_users(folder / "users.jsonl", users), privacy=PRIVACY)
    for stage in ("prepare", "adapt", "train"):
        oppu(stage, path)
    return path


@pytest.fixture(scope="module")
def made(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, base_folder)
    return folder


@pytest.fixture
def config(made: Path, base_folder: Path, tmp_path: Path) -> Path:
    """The config of a copy of the run."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run").glob("*/result.json"):
        path.write_text(path.read_text().replace(str(made / "run"), str(tmp_path / "run")))
    return write_config(tmp_path, base_folder, made / "users.jsonl", privacy=PRIVACY)


@pytest.fixture
def loaded(config: Path) -> Config:
    return load_config(config)


@pytest.fixture
def base(loaded: Config) -> Base:
    return open_task_base(loaded)


@pytest.fixture
def again(loaded: Config, base: Base) -> Callable[..., UserDone]:
    """Refresh user-0."""

    def call(**options: Any) -> UserDone:
        config = load_config(Path(loaded.run_dir).parent / "config.yaml", [f"{k}={v}" for k, v in options.items()])
        vault = open_vault(config)
        try:
            return refresh_user(config, vault, "user-0", base)
        finally:
            vault.close()

    return call


def spent(config: Config, user: str = "user-0") -> float:
    vault = open_vault(config)
    rho = vault.registry.rho(vault.user_hash(user))
    vault.close()
    return rho


def manifest(path: Path, user: str = "user-0") -> dict[str, Any]:
    """As the user gets it, in an archive."""
    vault = Vault(run_dir(path) / "vault")
    target = path.parent / f"{user}.zip"
    target.unlink(missing_ok=True)
    export_user(vault, user, target)
    vault.close()
    with zipfile.ZipFile(target) as archive:
        values = json.loads(archive.read("manifest.json"))
        return {**values, "peft_file": json.loads(archive.read("adapter/adapter_config.json"))}


def without(values: Any, *names: str) -> Any:
    if isinstance(values, dict):
        return {key: without(value, *names) for key, value in values.items() if key not in names}
    return values


def shares(path: Path) -> list[float]:
    """The share of all work that a run has shown, and before it no tokens."""
    seen = list[float]()
    tick = Progress.tick

    def noted(self: Progress) -> None:
        assert self.num_tokens == 0
        seen.append(self.forecast.share)
        tick(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "tick", noted)
        oppu("train", path, "seed=11", "personal.max_users_per_pack=1")
    return sorted(set(seen))


# ---- what is published


def test_two_histories_are_told_apart_by_nothing_but_noise(base_folder: Path, tmp_path: Path, made: Path) -> None:
    """Manifest, result, status and what is printed of two runs are equal, where one item says something else."""
    paths = [make_run(tmp_path / name, base_folder, text) for name, text in (("a", ""), ("b", " and a longer text"))]
    one, other = ([without(manifest(path, user), *VOLATILE) for user in ("user-0", "user-1")] for path in paths)
    moved = json.loads(json.dumps(other).replace(str(tmp_path / "b"), str(tmp_path / "a")))
    assert one == moved and one[0]["metrics"].keys() == {"rho_before", "rho", "epsilon", "delta"}
    assert manifest(paths[0])["run_id"] != manifest(made / "config.yaml")["run_id"]  # the same data, another vault
    results = [result(path, "train") for path in paths]
    times = ("elapsed_s", "users_per_hour", "hardware", "config", "run")
    assert without(results[0], *times) == without(results[1], *times)
    assert (results[0]["num_tokens"], results[0]["shard_words"]) == (0, [])
    assert [shares(path) for path in paths] == [[0.25, 0.5, 0.75, 1.0]] * 2


def test_no_metric_speaks_of_a_private_users_items(config: Path, loaded: Config) -> None:
    seen: dict[str, set[float]] = {}

    class Seen(Telemetry):
        def set(self, name: str, value: float = 1, *_: Any) -> None:
            seen.setdefault(name, set()).add(value)

        add = set

    def metrics(run_id: str, *options: str) -> dict[str, set[float]]:
        seen.clear()
        worker = Worker(load_config(config, options), open_task_base(loaded).path, run_id, Seen(run_id))
        dones = list(worker.train(("user-0", "user-1")))
        worker.vault.close()
        assert [done.error for done in dones] == [None, None]
        seen["losses"] = {loss for done in dones for loss in (done.first_loss, done.last_loss)}
        return dict(seen)

    private = metrics("private")
    assert private["oppu_computed_tokens_total"] == private["oppu_useful_tokens_per_s"] == private["losses"] == {0}
    assert "oppu_train_loss" not in private
    open_ = metrics("open", "privacy.noise_multiplier=0")
    assert max(open_["oppu_computed_tokens_total"]) > 0 and min(open_["losses"] | open_["oppu_train_loss"]) > 0


# ---- what it costs


def test_costs_of_versions_under_any_noise_add_up() -> None:
    train = TrainConfig(items_per_step=4, epochs=3)
    first = account(PrivacyConfig(2.0), train, 8, 0.0)
    assert first["rho"] == 3 / 8 and first["epsilon"] == pytest.approx(epsilon(2.0, 1.0, 3, 1e-5))
    second = account(PrivacyConfig(4.0), train, 8, first["rho"])
    assert second["rho"] == 3 / 8 + 3 / 32 and second["rho_before"] == 3 / 8
    assert first["epsilon"] < second["epsilon"] < first["epsilon"] + account(PrivacyConfig(4.0), train, 8, 0)["epsilon"]
    twice = account(PrivacyConfig(2.0), train, 8, first["rho"])
    assert twice["epsilon"] == pytest.approx(epsilon(2.0, 1.0, 6, 1e-5))
    assert epsilon_of(0.0, 1e-5) == 0.0


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_epsilon: found 0; expected greater than 0"):
        PrivacyConfig(max_epsilon=0)


def test_refreshing_composes_over_all_versions_and_shows_it(
    config: Path, loaded: Config, again: Callable[..., UserDone], capsys: pytest.CaptureFixture[str]
) -> None:
    assert spent(loaded) == RHO
    for number in (2, 3):
        done = again()
        assert done.epsilon == pytest.approx(epsilon(NOISE, 1.0, number, 1e-5)) and (
            done.first_loss,
            done.num_tokens,
        ) == (0, 0)
        shown = manifest(config)["metrics"]
        assert shown == {
            "rho_before": pytest.approx((number - 1) * RHO),
            "rho": pytest.approx(number * RHO),
            "epsilon": done.epsilon,
            "delta": 1e-5,
        }
    capsys.readouterr()
    assert main(["users", "versions", "user-0", "--vault", str(run_dir(config))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "epsilon" in lines[0] and f"{done.epsilon:.2f}" in lines[-2]
    assert (
        lines[-1]
        == f"3 versions; all that were ever trained under noise have epsilon {done.epsilon:.2f} at delta 1e-05"
    )
    assert oppu("train", config)["privacy"]["epsilon"] == pytest.approx(done.epsilon)  # of the user who paid most
    more = oppu("train", config, "seed=9")
    assert more["num_trained"] == 2 and more["privacy"]["epsilon"] == pytest.approx(epsilon(NOISE, 1.0, 4, 1e-5))
    assert spent(loaded, "user-1") == pytest.approx(2 * RHO)


@pytest.mark.parametrize("how", ["rollback", "quarantine", "forgotten item", "gc"])
def test_a_version_that_is_gone_has_been_released_all_the_same(
    how: str, loaded: Config, again: Callable[..., UserDone]
) -> None:
    done = again()
    vault = open_vault(loaded)
    user = vault.user_hash("user-0")
    assert done.version is not None
    if how == "rollback":
        vault.rollback("user-0")
    elif how == "quarantine":
        vault.registry.quarantine(user, done.version, "a test")
    elif how == "forgotten item":
        forget_items(vault, "user-0", ["u0-0"])
        assert vault.registry.versions(user) == []
    else:
        vault.gc(0)
    assert vault.registry.rho(user) == pytest.approx(2 * RHO)
    vault.close()
    assert again().epsilon == pytest.approx(epsilon(NOISE, 1.0, 3, 1e-5))


def test_a_forgotten_user_begins_anew(loaded: Config) -> None:
    vault = open_vault(loaded)
    history = vault.read_history("user-0")
    forget_user(vault, "user-0")
    assert vault.registry.rho(vault.user_hash("user-0")) == 0.0
    vault.append_history("user-0", history)
    done = refresh_user(loaded, vault, "user-0", open_task_base(loaded))
    assert done.epsilon == pytest.approx(epsilon(NOISE, 1.0, 1, 1e-5))
    vault.close()


def test_the_cost_moves_with_the_user(loaded: Config, again: Callable[..., UserDone], tmp_path: Path) -> None:
    done = again()
    vault = open_vault(loaded)
    export_user(vault, "user-0", tmp_path / "user.zip")
    import_user(vault, "another", tmp_path / "user.zip", base_fingerprint=None)
    other = Vault(tmp_path / "other")
    import_user(other, "user-0", tmp_path / "user.zip", base_fingerprint=None)
    assert other.registry.rho(other.user_hash("user-0")) == vault.registry.rho(vault.user_hash("another")) == 2 * RHO
    assert refresh_user(loaded, other, "user-0", open_task_base(loaded)).epsilon > done.epsilon
    for one in (vault, other):
        one.close()


# ---- where it ends


def test_no_training_begins_that_would_cost_more_than_is_allowed(
    loaded: Config, again: Callable[..., UserDone], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1.001 * epsilon(NOISE, 1.0, 2, 1e-5)
    again(**{"privacy.max_epsilon": limit})
    monkeypatch.setattr(refresh, "train_pack", None)  # not called
    with pytest.raises(
        InputError, match=r"privacy.max_epsilon is 1.4\d*, and training once more on 4 items would .*from 1.48 to 1.85"
    ):
        again(**{"privacy.max_epsilon": limit})
    assert spent(loaded) == pytest.approx(2 * RHO)
    vault = open_vault(loaded)
    assert vault.registry.leaseholder(vault.user_hash("user-0")) is None  # who was refused holds nothing
    assert len(vault.registry.versions(vault.user_hash("user-0"))) == 2
    vault.close()


def test_a_run_leaves_out_who_may_not_be_trained_and_trains_the_others(
    config: Path, again: Callable[..., UserDone], monkeypatch: pytest.MonkeyPatch
) -> None:
    again()
    trained: list[str] = []
    train_steps = workers.train_steps

    def noted(bank: Any, pack: Any, *rest: Any) -> Any:
        trained.extend(work.user_id for work in pack)
        return train_steps(bank, pack, *rest)

    monkeypatch.setattr(workers, "train_steps", noted)
    limit = 1.001 * epsilon(NOISE, 1.0, 2, 1e-5)
    done = oppu("train", config, "seed=3", f"privacy.max_epsilon={limit}")
    assert trained == ["user-1"] and done["num_trained"] == 1 and list(done["failed"]) == ["user-0"]
    assert "user 'user-0': privacy.max_epsilon is" in done["failed"]["user-0"] and done["num_to_retry"] == 0


def test_the_limit_is_no_part_of_a_run(config: Path, loaded: Config) -> None:
    """Who raises it goes on with the run, and finds it done."""
    assert oppu("train", config, "privacy.max_epsilon=1000")["was_done"] is True
    assert spent(loaded) == RHO


def test_forgetting_an_item_says_when_the_user_may_not_be_trained_again(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config.read_text().replace(
        "noise_multiplier: 4.0", f"noise_multiplier: 4.0\n  max_epsilon: {epsilon(NOISE, 1.0, 1, 1e-5)}"
    )
    config.write_text(values)
    assert main(["users", "forget", "user-0", "--item", "u0-0", "--yes", "--vault", str(config)]) == 0
    said = capsys.readouterr().out
    assert "forgotten" in said and "not trained again: privacy.max_epsilon is" in said
