"""What the documents tell to type can be typed: commands, targets, modules, paths, config keys, function names."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
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


@BY_NAME
def test_every_oppu_command_is_a_subcommand(document: Path, subcommands: set[str]) -> None:
    used = set(re.findall(r"(?:^|[\s`/])oppu ([a-z]+)", typed(document), re.MULTILINE))
    assert used <= subcommands, f"{document}: no such subcommand: {', '.join(sorted(used - subcommands))}"


@BY_NAME
def test_every_make_command_is_a_target(document: Path) -> None:
    used = set(re.findall(r"(?:^|[\s`])make ([a-z]\w*)", typed(document), re.MULTILINE))
    assert used <= targets(), f"{document}: no such target: {', '.join(sorted(used - targets()))}"


@BY_NAME
def test_every_module_that_is_run_is_there(document: Path) -> None:
    for module in re.findall(r"-m ((?:jobs|oppu_ray|serve)[\w.]*)", typed(document)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir(), f"{document}: no module {module}"


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
    known = set(config_keys())
    sections = {key.partition(".")[0] for key in known if "." in key}
    for key in re.findall(r"(?<![\w.=])([a-z_]+(?:\.[a-z_]+)+)=", typed(document)):
        assert key in known or key == "dotted.key", f"{document}: {key} is not a config key"
    for key in re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_.]*[a-z])\b(?!\()", typed(document)):
        module = (ROOT / "oppu_ray" / f"{key.partition('.')[0]}.py").exists() or key.endswith((".py", ".yaml"))
        assert key in known or module, f"{document}: {key} is not a config key"


def test_every_function_the_readme_names_is_where_it_says() -> None:
    for module, name in re.findall(r"(?<![\w./-])([a-z_]+)\.([A-Za-z_]+)", typed(ROOT / "README.md")):
        path = ROOT / "oppu_ray" / f"{module}.py"
        is_key = f"{module}.{name}" in set(config_keys())
        if path.exists() and not is_key and name not in ("py", "yaml", "json", "jsonl"):
            found = re.search(rf"^\s*(def|class) {name}\b|^{name}\b", path.read_text(), re.MULTILINE)
            assert found, f"README.md: {module}.{name}: {path.name} has no {name}"


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
