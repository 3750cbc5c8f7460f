"""What the documents tell to type can be typed: commands, targets, modules, paths, config keys, function names."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from packaging.requirements import Requirement

from oppu_ray.cli import main
from oppu_ray.config import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "oppu_ray", "jobs", "serve", "tests", ".ci")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci/run", "cluster/README.md")),
    *sorted((ROOT / "oppu_ray").rglob("*.yaml")),
    *sorted((ROOT / "jobs").rglob("*.py")),
    *sorted((ROOT / "oppu_ray" / "bench").glob("*.py")),
]
FILES = (".py", ".yaml", ".json", ".jsonl", ".zip", ".txt", ".lock", ".gz", ".com")
RESULTS = ("arms", "controls", "fingerprints", "gains", "nll_gains", "rows", "ratios")
"""Parts of a `result.json`."""
BY_NAME = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def typed(document: Path) -> str:
    """What is to be typed: Markdown's code blocks and spans, a module's docstring, all of a YAML, a script's lines."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if document.suffix == ".yaml":
        return text
    if document.suffix != ".md":
        return re.sub(r"#.*", "", text)
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return "\n".join([*blocks, *spans])


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture
def subcommands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.search(r"\{([\w,-]+)\}", capsys.readouterr().out)
    assert listed is not None
    return set(listed[1].split(","))


def config_keys(kind: Any = Config, at: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        yield at + name
        if dataclasses.is_dataclass(hint):
            yield from config_keys(hint, f"{at}{name}.")


def has_name(module: str, name: str) -> bool | None:
    """Whether a module of ours defines a name; None if there is no such module."""
    paths = [path for folder in ("oppu_ray", "serve") for path in (ROOT / folder).rglob(f"{module}.py")]
    pattern = rf"^\s*(?:async )?(?:def|class) {name}\b|^\s*{name}\b *[:=]"
    return any(re.search(pattern, path.read_text(), re.MULTILINE) for path in paths) if paths else None


def wrong_commands(text: str, subcommands: set[str]) -> set[str]:
    return set(re.findall(r"(?:^|[\s`/])oppu ([a-z]+)", text, re.MULTILINE)) - subcommands


def wrong_targets(text: str) -> set[str]:
    return set(re.findall(r"(?:^|[\s`])make ([a-z]\w*)", text, re.MULTILINE)) - targets()


def wrong_modules(text: str) -> list[str]:
    places = [(name, ROOT / name.replace(".", "/")) for name in re.findall(r"-m ((?:jobs|oppu_ray|serve)[\w.]*)", text)]
    return [name for name, path in places if not (path.with_suffix(".py").is_file() or path.is_dir())]


def wrong_keys(text: str) -> list[str]:
    """What looks like a config key, `a.b=` or a name in a section of the config, and is none."""
    known = set(config_keys())
    sections = {key.partition(".")[0] for key in known if "." in key}
    given = re.findall(r"(?<![\w.=])([a-z_]+(?:\.[a-z_]+)+)=", text)
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_.]*[a-z])\b(?!\()", text)
    named = [key for key in named if not has_name(*key.split(".", 1)) and not key.endswith(FILES)]
    return [key for key in (*given, *named) if key not in known and key != "dotted.key"]


def wrong_names(text: str) -> list[str]:
    """What looks like `module.name`, ours or a library's, and is none; keys of the config and of results aside."""
    wrong, keys = [], set(config_keys())
    for whole in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[A-Za-z_]+)+)(?![\w./-])", text):
        module, name = whole.split(".")[:2]
        if whole in keys or whole.endswith(FILES) or module in (*RESULTS, "dotted"):
            continue
        if module in ("jobs", "serve", "oppu_ray"):
            path = ROOT / whole.replace(".", "/")
            found = path.with_suffix(".py").is_file() or path.is_dir()
        elif (ours := has_name(module, name)) is not None:
            found = ours
        else:
            found = find_spec(module) is not None and hasattr(import_module(module), name)
        wrong += [] if found else [whole]
    return wrong


@BY_NAME
def test_every_oppu_command_is_a_subcommand(document: Path, subcommands: set[str]) -> None:
    assert not wrong_commands(typed(document), subcommands), f"{document}: no such subcommand"


@BY_NAME
def test_every_make_command_is_a_target(document: Path) -> None:
    assert not wrong_targets(typed(document)), f"{document}: no such target"


@BY_NAME
def test_every_module_that_is_run_is_there(document: Path) -> None:
    assert not wrong_modules(typed(document)), f"{document}: no such module"


@BY_NAME
def test_every_path_is_there(document: Path) -> None:
    text = typed(document)
    places = "|".join(map(re.escape, FOLDERS))
    paths = re.findall(rf"(?<![\w./-])((?:{places})/[\w./*-]*)", text)
    if document.suffix == ".md":
        paths += re.findall(r"\]\(((?!https?:|#|mailto:)[^)#]+)", document.read_text(encoding="utf-8"))  # links
    for path in paths:
        assert any(ROOT.glob(path.rstrip("./"))), f"{document}: {path} does not exist"


@BY_NAME
def test_every_config_key_is_known(document: Path) -> None:
    assert not wrong_keys(typed(document)), f"{document}: not a config key"


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if one.suffix == ".md"], ids=lambda path: str(path))
def test_every_function_a_document_names_is_where_it_says(document: Path) -> None:
    assert not wrong_names(typed(document)), f"{document}: no such name"


def test_mistakes_in_a_document_are_found(subcommands: set[str]) -> None:
    """A check that finds nothing in this text would find nothing anywhere."""
    text = """
    oppu train run.yaml workers.no_such_key=1 nosection.key=2 workers.num_workers=2
    oppu trian run.yaml
    make test
    make tests_of_old
    python -m jobs.fuzz
    python -m jobs.no_such_job
    `vault.keep_nothing` `vault.Vault` `vault.encrypt` `vault.py` `workers.Worker` `privacy.epsilon_max_of_old`
    `federated.train_rounds` `federated.train_all_rounds` `no_module.some_function` `json.dumps` `json.dump_all`
    `result.json` `fingerprints.histories` `jobs.chaos` `jobs.no_such_job`
    """
    assert wrong_commands(text, subcommands) == {"trian"}
    assert wrong_targets(text) == {"tests_of_old"}
    assert wrong_modules(text) == ["jobs.no_such_job"]
    assert sorted(set(wrong_keys(text))) == [
        "federated.train_all_rounds", "nosection.key", "privacy.epsilon_max_of_old", "vault.keep_nothing",
        "workers.no_such_key",
    ]  # fmt: skip
    assert {"no_module.some_function", "json.dump_all", "jobs.no_such_job", "federated.train_all_rounds"} <= set(
        wrong_names(text)
    )
    assert not {"json.dumps", "vault.Vault", "workers.Worker", "jobs.chaos"} & set(wrong_names(text))


def test_there_is_something_to_check() -> None:
    text = "\n".join(typed(document) for document in DOCUMENTS)
    counts = [
        len(re.findall(pattern, text)) for pattern in (r"oppu [a-z]+", r"make [a-z]+", r"-m jobs", r"[a-z_]+\.[a-z_]+=")
    ]
    assert min(counts) > 3, counts


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(pins.values()) and len(pins) == len(lines), "constraints.txt: expected name==version on every line"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["cpu"], *extras["dev"]):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name != "pip":  # comes with the virtual environment
            assert name in pins and requirement.specifier.contains(pins[name]), f"constraints.txt: {text}"
