"""One YAML and overrides become one checked config; whatever is wrong is named with the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oppu_ray.config import PRESETS, Config, from_dict, load_config, to_dict
from oppu_ray.configs import find_config

CONFIGS = sorted(find_config("demo").parent.glob("*.yaml"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(path: Path, text: str, *overrides: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_an_empty_file_is_all_defaults(path: Path) -> None:
    assert load(path, "") == Config() == from_dict({})


def test_values_are_converted_by_the_fields_type(path: Path) -> None:
    text = "{seed: 1e2, data: {num_targets: '3'}, task: {labels: [1, 2.5, a]}, personal: {epochs: 2.0}}"
    config = load(path, text, "adapt.learning_rate=2e-5", "adapt.peft.alpha=4", "adapt.share_prefix=false")
    assert config.adapt.learning_rate == 2e-5
    rate = load(path, "personal: {learning_rate: 1e-4}").personal.learning_rate
    assert rate == 1e-4 and isinstance(rate, float)
    assert config.adapt.peft.alpha == 4.0 and isinstance(config.adapt.peft.alpha, float)
    assert config.adapt.share_prefix is False and config.personal.share_prefix is True
    assert (config.seed, config.data.num_targets, config.personal.epochs) == (100, 3, 2)
    assert {type(value) for value in (config.seed, config.data.num_targets, config.personal.epochs)} == {int}
    assert config.task.labels == ("1", "2.5", "a")
    assert load(path, f"seed: {2**60 + 1}").seed == 2**60 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead: 1", "unknown key 'sead'; expected one of run_dir, preset, seed, data, "),
        ("adapt: {peft: {rnak: 4}}", "unknown key 'adapt.peft.rnak'; expected one of kind, rank, alpha, "),
        ('task: {labels: ["a\\ud800"]}', r"task.labels: a lone surrogate in 'a\\ud800'; expected Unicode"),
        ("data: {1: 2}", "unknown key 'data.1'; expected one of format, path, "),
        ("adapt: 3", "adapt.: expected a section, found 3"),
        ("adapt:", "adapt.: expected a section, found None"),
        ("personal: {epochs: 1.5}", "personal.epochs: expected int, found 1.5"),
        ("personal: {epochs: many}", "personal.epochs: expected int, found 'many'"),
        ("personal: {epochs: true}", "personal.epochs: expected int, found True"),
        ("personal: {epochs: .inf}", "personal.epochs: expected int, found inf"),
        ("personal: {learning_rate: [1]}", r"personal.learning_rate: expected float, found \[1\]"),
        ("personal: {share_prefix: 1}", "personal.share_prefix: expected bool, found 1"),
        ("task: {name: yes}", "task.name: expected str, found True"),
        ("task: {name: {a: b}}", "task.name: expected str, found {'a': 'b'}"),
        (
            "memory: {top_k: 2}",
            "memory.top_k and memory.with_profile are named by the arm",
        ),
        ("task: {labels: a}", "task.labels: expected tuple, found 'a'"),
        ("task: {labels: [a, null]}", "task.labels: expected str, found None"),
        ("data: {columns: [text]}", r"data.columns: expected dict, found \['text'\]"),
        ("data: {columns: {text: null}}", "data.columns.text: expected str, found None"),
        ("preset: fast", "preset 'fast' is unknown; expected one of default, paper, code-compat"),
        ("preset: [paper]", r"preset \['paper'\] is unknown; expected one of default, paper, code-compat"),
        ("[a, b]", "expected a mapping of keys, found list"),
        ("a: {b", "cannot read the config"),
    ],
)
def test_errors_name_the_file_the_key_the_value_and_what_is_expected(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{path}: (.|\n)*{message}"):
        load(path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: {items: few}", "study.items is 'few'; expected all, last_<n>, similar or dissimilar"),
        ("study: {items: last_0}", "study.items is 'last_0'; expected all"),
        ("study: {pairs: poem}", "study.pairs is 'poem'; expected one of aligned, next_token"),
    ],
)
def test_a_study_that_there_is_not(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: lroa}", "peft.kind is 'lroa'; expected lora, ia3 or prompt"),
        ("{rank: 0}", "peft.rank is 0; expected at least 1"),
        ("{kind: prompt, num_virtual_tokens: 0}", "peft.num_virtual_tokens is 0; expected at least 1"),
        ("{dropout: 1.0}", "peft.dropout is 1.0; expected at least 0 and below 1"),
        ("{dropout: .nan}", "peft.dropout is nan"),
    ],
)
def test_an_adapter_that_cannot_be(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, f"personal: {{peft: {text}}}")


def test_only_a_study_changes_what_an_adapter_depends_on(path: Path) -> None:
    assert load(path, "").study.recipe == {}
    assert load(path, "study: {items: last_4}").study.recipe == {"study": {"items": "last_4", "pairs": "aligned"}}


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{path}: cannot read the config: .*No such file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"^{path}: cannot read the config: "):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected dotted.key=value"),
        ("seed.a=1", "override 'seed.a=1': 'seed' is not a section"),
        ("data.path=[", r"override 'data.path=\[': the value is not YAML"),
        ("personal.epoch=1", "unknown key 'personal.epoch'; expected one of peft, learning_rate, "),
        ("personal=1", "personal.: expected a section, found 1"),
    ],
)
def test_bad_overrides_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, "seed: 1", override)


def test_the_last_override_wins_over_the_file_and_the_preset(path: Path) -> None:
    text = "{preset: paper, adapt: {peft: {rank: 4}}}"
    config = load(path, text, "adapt.peft.alpha=2", "data.path=a=b", "adapt.peft.alpha=3", "evaluate.arms=[task, oppu]")
    assert (config.adapt.peft.rank, config.adapt.peft.alpha, config.adapt.peft.dropout) == (4, 3.0, 0.05)
    assert config.data.path == "a=b" and config.evaluate.arms == ("task", "oppu")
    assert load(path, text, "preset=default").adapt.peft.dropout == 0.0


def test_the_papers_preset_is_section_4_1_of_oppu(path: Path) -> None:
    config = load(path, "preset: paper")
    for train, epochs in ((config.adapt, 3), (config.personal, 2)):
        assert (train.peft.kind, train.peft.rank, train.peft.alpha, train.peft.target_modules) == ("lora", 8, 8.0, ())
        assert (train.learning_rate, train.epochs, train.items_per_step) == (1e-4, epochs, 16)
    assert config.task.prompt_order == "paper" and config.task.max_input_words == 768
    code = load(path, "preset: code-compat")
    assert code.adapt.peft.target_modules == ("q_proj", "k_proj", "v_proj") and code.task.strategy == "stem"
    assert code.personal == config.personal


@pytest.mark.parametrize("preset", PRESETS)
def test_to_dict_and_back_is_the_same_also_through_json(path: Path, preset: str) -> None:
    config = load(path, f"{{preset: {preset}, task: {{labels: [a]}}, data: {{columns: {{text: b}}}}}}")
    values: dict[str, Any] = to_dict(config)
    assert from_dict(values) == config
    assert from_dict(json.loads(json.dumps(values))) == config


def test_an_override_changes_one_of_two_sections_that_an_alias_makes_equal(path: Path) -> None:
    config = load(path, "{adapt: &both {epochs: 2}, personal: *both}", "personal.epochs=5")
    assert (config.adapt.epochs, config.personal.epochs) == (2, 5)


def test_a_preset_is_not_changed_by_a_file_that_uses_it(path: Path) -> None:
    before = json.dumps(PRESETS)
    load(path, "{preset: code-compat, adapt: {peft: {rank: 2}}}", "adapt.peft.alpha=1")
    assert json.dumps(PRESETS) == before


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(config: Path) -> None:
    load_config(config)
