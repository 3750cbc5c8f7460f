"""One YAML and overrides become one checked config; whatever is wrong is named with the file and the key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oppu_ray.config import (
    PRESETS,
    BaseConfig,
    Config,
    PeftConfig,
    TrainConfig,
    WorkersConfig,
    from_dict,
    load_config,
    to_dict,
)
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
        ("sead: 1", "sead: unknown key; expected one of run_dir, preset, .*; did you mean 'seed'?"),
        ("epochs: 1", "epochs: unknown key; .*; did you mean 'adapt.epochs' or 'personal.epochs'?"),
        (
            "adapt: {peft: {rnak: 4}}",
            "adapt.peft.rnak: unknown key; expected one of kind, rank, .*; did you mean 'rank'?",
        ),
        ("data: {1: 2}", "data.1: unknown key; expected one of format, path, "),
        ("adapt: 3", "adapt: found '3'; expected a section"),
        ("adapt:", "adapt: found nothing; expected a section"),
        ("personal: {epochs: 1.5}", "personal.epochs: found '1.5'; expected a whole number"),
        ("personal: {epochs: many}", "personal.epochs: found 'many'; expected a whole number"),
        ("personal: {epochs: true}", "personal.epochs: found 'true'; expected a whole number"),
        ("personal: {epochs: .inf}", "personal.epochs: found '.inf'; expected a whole number"),
        ("personal: {epochs: 1e-3}", "personal.epochs: found '1e-3'; expected a whole number"),
        ("personal: {epochs: -1}", "personal.epochs: found '-1'; expected at least 1"),
        ("personal: {learning_rate: [1]}", r"personal.learning_rate: found \['1'\]; expected a number"),
        ("personal: {learning_rate: inf}", "personal.learning_rate: found 'inf'; expected a finite number"),
        ("personal: {learning_rate: 0}", "personal.learning_rate: found '0'; expected greater than 0"),
        ("personal: {warmup_share: 1.5}", "personal.warmup_share: found '1.5'; expected at most 1"),
        ("personal: {share_prefix: maybe}", "personal.share_prefix: found 'maybe'; expected true or false"),
        (
            "personal: {schedule: cosin}",
            "personal.schedule: found 'cosin'; expected 'linear', 'cosine' or 'constant'; did you mean 'cosine'?",
        ),
        ("personal: {peft: {kind: lroa}}", "personal.peft.kind: found 'lroa'; .*; did you mean 'lora'?"),
        ("adapt: {peft: {rank: 0}}", "adapt.peft.rank: found '0'; expected at least 1"),
        (
            "personal: {peft: {num_virtual_tokens: 0}}",
            "personal.peft.num_virtual_tokens: found '0'; expected at least 1",
        ),
        ("personal: {peft: {dropout: 1.0}}", "personal.peft.dropout: found '1.0'; expected less than 1"),
        ("personal: {peft: {dropout: nan}}", "personal.peft.dropout: found 'nan'; expected a finite number"),
        ("data: {format: jsnl}", "data.format: found 'jsnl'; expected 'auto', 'jsonl', .*; did you mean 'jsonl'?"),
        ("data: {query_share: 1}", "data.query_share: found '1'; expected less than 1"),
        ("data: {min_items: -1}", "data.min_items: found '-1'; expected at least 0"),
        ("base: {dtype: float23}", "base.dtype: found 'float23'; .*; did you mean 'float32'?"),
        ("base: {device: gpu}", "base.device: found 'gpu'; expected cpu, cuda or cuda:<number>"),
        ("memory: {retriever: bm52}", "memory.retriever: found 'bm52'; .*; did you mean 'bm25'?"),
        ("serve: {port: 65536}", "serve.port: found '65536'; expected at most 65535"),
        (
            "serve: {max_replicas: 1, min_replicas: 2}",
            "serve.max_replicas: found 1; expected at least serve.min_replicas, 2",
        ),
        (
            "serve: {max_length: 8, max_new_tokens: 8}",
            "serve.max_new_tokens: found 8; expected less than serve.max_length, 8",
        ),
        ("study: {items: few}", "study.items: found 'few'; expected all, last_<n>, similar or dissimilar"),
        ("study: {items: last_0}", "study.items: found 'last_0'; expected all"),
        ("study: {pairs: poem}", "study.pairs: found 'poem'; expected 'aligned', 'next_token'"),
        ("task: {name: {a: b}}", "task.name: found {'a': 'b'}; expected a text"),
        ('task: {name: "a\\ud800"}', "task.name: found .*; expected a text"),
        ("memory: {top_k: 2}", "memory.top_k and memory.with_profile are named by the arm"),
        ("task: {labels: a}", "task.labels: found 'a'; expected a list"),
        ("task: {labels: [a, null]}", "task.labels.1: found nothing; expected a text"),
        ("data: {columns: [text]}", r"data.columns: found \['text'\]; expected a mapping"),
        ("preset: fast", "preset: found 'fast'; expected 'default', 'paper' or 'code-compat'"),
        ("preset: [paper]", r"preset: found \['paper'\]; expected 'default', 'paper' or 'code-compat'"),
        ("[a, b]", "found list; expected a mapping of keys"),
        ("a: {b", "cannot read the config"),
        ("seed: 1\nseed: 2", "cannot read the config: key 'seed' is given twice"),
    ],
)
def test_errors_name_the_file_the_key_the_value_and_what_is_expected(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^config {path}: {message}"):
        load(path, text)


def test_all_that_is_wrong_is_named_at_once(path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        load(path, "{personal: {schedule: cosin, epochs: -1}, sead: 1}")
    keys = [line.removeprefix(f"config {path}: ").partition(":")[0] for line in str(raised.value).splitlines()]
    assert sorted(keys) == ["personal.epochs", "personal.schedule", "sead"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.device=cuda"], "base.device is 'cuda' and workers.gpus_per_worker is 0; expected cuda and above 0"),
        (["workers.gpus_per_worker=1"], "base.device is 'cpu' and workers.gpus_per_worker is 1"),
        (
            ["base.deepspeed=a.json", "workers.num_workers=0"],
            "workers.num_workers is 0, but base.deepspeed needs ranks",
        ),
        (["base.sharding=zero3"], "base.deepspeed is empty; expected a DeepSpeed JSON file"),
        (["base.sharding=zero3", "base.deepspeed=a", "personal.peft.kind=prompt"], "personal.peft.kind is 'prompt'"),
        (["base.quantization=int8", "base.deepspeed=a"], "base.quantization is 'int8'"),
        (["privacy.noise_multiplier=1", "base.sharding=zero3", "base.deepspeed=a"], "expected base.sharding=none"),
        (["privacy.noise_multiplier=1", "evaluate.arms=[oppu, rag_k1, oppu_k1]"], "expected oppu alone"),
        (["privacy.noise_multiplier=1", "evaluate.arms=[oppu, oppu_pag]"], "expected oppu alone"),
        (["privacy.noise_multiplier=1", "study.items=similar"], "expected study.items=all study.pairs=aligned"),
        (["privacy.noise_multiplier=1", "study.pairs=mixed"], "expected study.items=all study.pairs=aligned"),
    ],
)
def test_values_are_checked_against_each_other(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, "workers: {num_workers: 2}", *overrides)


def test_a_config_made_in_code_is_checked_as_one_of_a_file_is() -> None:
    with pytest.raises(ValueError, match="peft.kind|kind"):
        PeftConfig(kind="lroa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule"):
        replace(TrainConfig(), schedule="cosin")
    with pytest.raises(ValueError, match="base.device is 'cuda'"):
        replace(Config(), base=BaseConfig(device="cuda"), workers=WorkersConfig(num_workers=1))


TYPED = [
    "20240501_1200",
    "007",
    "12:30:00",
    "0x10",
    "2024-05-01",
    "yes",
    "1e3",
    "/data/chats #1/u.jsonl",
    "[a]/b",
    "~",
    "",
]


@pytest.mark.parametrize("text", TYPED)
def test_an_override_of_a_text_field_is_taken_as_typed(path: Path, text: str) -> None:
    config = load(path, "", f"run_dir={text}", f"data.path={text}", f"data.columns.text={text}")
    assert config.run_dir == config.data.path == config.data.columns["text"] == text
    assert load(path, "", f"run_dir='{text}'", f'data.path="{text}"') == load(
        path, "", f"run_dir={text}", f"data.path={text}"
    )


def test_lists_of_texts_are_taken_as_typed(path: Path) -> None:
    config = load(path, "", "task.labels=[007, 1:30, yes, no, #1, C #, 2024-05-01, '1, 2']")
    assert config.task.labels == ("007", "1:30", "yes", "no", "#1", "C #", "2024-05-01", "1, 2")
    assert load(path, "", "data.columns={text: a #b, role: null}").data.columns == {"text": "a #b", "role": None}
    assert load(path, "", "data.columns.role=null").data.columns == {"role": None}


@pytest.mark.parametrize("text", ["20240501_1200", "007", "12:30:00", "0x10", "2024-05-01", "yes", "1e3"])
def test_a_text_in_a_file_is_taken_as_typed(path: Path, text: str) -> None:
    config = load(path, f"{{run_dir: {text}, task: {{labels: [{text}]}}, data: {{columns: {{text: {text}}}}}}}")
    assert config.run_dir == config.task.labels[0] == config.data.columns["text"] == text


def test_numbers_and_truth_may_be_written_as_yaml_has_them(path: Path) -> None:
    config = load(
        path, "{seed: 1e2, personal: {share_prefix: no, epochs: 2.0, learning_rate: 1e-4}, memory: {max_words: 1_0}}"
    )
    assert (config.seed, config.personal.share_prefix, config.personal.epochs) == (100, False, 2)
    assert config.personal.learning_rate == 1e-4 and config.memory.max_words == 10


def test_only_a_study_changes_what_an_adapter_depends_on(path: Path) -> None:
    assert load(path, "").study.recipe == {}
    assert load(path, "study: {items: last_4}").study.recipe == {"study": {"items": "last_4", "pairs": "aligned"}}


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(ValueError, match=f"^config {path}: cannot read the config: .*No such file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"^config {path}: cannot read the config: "):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected dotted.key=value"),
        ("seed.a=1", "override 'seed.a=1': 'seed' is not a section"),
        ("task.labels=[", r"override 'task.labels=\[': the value is not YAML"),
        ("personal.epoch=1", "personal.epoch: unknown key; expected one of peft, .*; did you mean 'epochs'?"),
        ("personal=1", "personal: found '1'; expected a section"),
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
