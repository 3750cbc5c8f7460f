"""The page: what it says, that it opens alone, that Markdown and HTML agree, and how it looks to a browser."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from matplotlib.axes import Axes
from test_findings import write_run, write_suite

from oppu_ray import plots
from oppu_ray import report as report_module
from oppu_ray.cli import main
from oppu_ray.report import Block, reasons, report, to_html, to_markdown

ARMS = {"majority_global": 0.5, "majority_user": 0.4, "task": 0.3, "rag_k1": 0.4, "pag": 0.35, "oppu": 0.8}
ARMS |= {"oppu_k1": 0.8, "oppu_pag": 0.8, "swapped": 0.3}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite with one set that gains, under two seeds, and a study."""
    folder = tmp_path_factory.mktemp("suite")
    for seed in (0, 1):
        write_run(folder / f"seed{seed}", ARMS, seed, {"oppu": 0.5, "swapped": -0.2})
    write_run(folder / "ia3", {"oppu": 0.6}, shift={"oppu": 0.1})
    units = [("seed0", "main", ""), ("seed1", "main", ""), ("ia3", "peft_methods", "ia3")]
    return write_suite(folder, units)


@pytest.fixture(scope="module")
def null_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose own adapters change nothing."""
    return write_run(tmp_path_factory.mktemp("null") / "nothing", {"task": 0.5, "oppu": 0.5, "swapped": 0.5})


@pytest.fixture(scope="module")
def page(suite: Path, null_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report on both, by the command line."""
    out = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report_module, "NUM_RESAMPLES", 200)
        assert main(["report", str(suite), str(null_run), "--out", str(out)]) == 0
    return out


def test_everything_is_in_one_folder(page: Path) -> None:
    names = {path.name for path in page.iterdir()}
    pictures = {"gains.png", "arms.png", "bins.png", "concentration.png", "peft_methods.png"}
    assert names == {"index.html", "report.md", "result.json", *pictures}
    assert all((page / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_beside_the_paper_stands_the_own_adapter_over_the_same_retrieval(page: Path) -> None:
    gain = json.loads((page / "result.json").read_text())["sets"]["films"]["comparisons"]["oppu_k1/rag_k1"]["accuracy"]
    (line,) = [line for line in (page / "report.md").read_text().splitlines() if line.startswith("| LaMP-2M: films")]
    assert line.split(" | ")[2].startswith(f"+{gain['mean']:.3f}".replace("0.", "."))


def test_a_set_has_one_colour_in_all_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, str]] = []
    errorbar = Axes.errorbar

    def spy(axis: Axes, places: Any, means: list[float], **style: Any) -> Any:
        drawn.append((means[0], style["color"]))
        return errorbar(axis, places, means, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    bins = {name: [{"nll": {"mean": mean, "low": 0.0, "high": 1.0}}] * 2 for name, mean in (("a", 0.1), ("b", 0.2))}
    plots.bin_lines([("one", {"b": bins["b"]}, ("x", "y")), ("all", bins, ("x", "y"))])
    colours = dict(drawn)
    assert len(drawn) == 3 and set(drawn) == set(colours.items()) and len(set(colours.values())) == 2


def test_the_result_says_what_the_page_says(page: Path) -> None:
    result = json.loads((page / "result.json").read_text())
    assert set(result) == {"command", "sets", "studies", "claims", "cost", "hardware"}
    assert result["command"] == "report" and set(result["sets"]) == {"films", "nothing"}
    text = (page / "report.md").read_text()
    for row in result["claims"]:
        assert f"{row['gain']['mean']:+.3f}".replace("0.", ".", 1) in text and row["verdict"] in text


def test_the_page_answers_every_question(page: Path) -> None:
    text = (page / "report.md").read_text()
    assert "2 sets of real histories, 24 people, 144 later items" in text
    assert "(likelihood) on 1 of 2 sets, and answers better (the task's metric) on 1 of 2" in text
    for heading in ("The claims", "Every arm", "Beside the paper", "Who gains", "Study: PEFT methods", "and why"):
        assert any(heading in line for line in re.findall(r"^## .*$", text, re.MULTILINE))
    assert "| LaMP-2M: films, accuracy |" in text and "acc +.076 [+.065, +.088]" in text
    assert "sharing saved 75%" in text and "Seeds: 0, 1" in text


def test_markdown_and_html_hold_the_same_cells(page: Path) -> None:
    markdown, written = (page / "report.md").read_text(), (page / "index.html").read_text()
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", written)]
    lines = [line.strip("|").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert len(cells) > 100 and set(cells) <= {cell.strip() for line in lines for cell in line}
    assert markdown.count("![") == written.count("<img")


def test_the_html_needs_nothing_else_and_runs_nothing(page: Path) -> None:
    written = (page / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', written)
    assert "<script" not in written and "@import" not in written and "url(" not in written


def test_what_comes_from_a_folders_name_is_text_not_markup() -> None:
    blocks = [Block("title", "<b>"), Block("table", head=("a|b",), rows=(("<script>|",),))]
    written = to_html(blocks, {})
    assert "<h1>&lt;b&gt;</h1>" in written and "<script>" not in written and "&lt;script&gt;" in written
    assert to_markdown(blocks) == "# <b>\n\n| a/b |\n| --- |\n| <script>/ |\n"


def test_a_browser_shows_it_whole(page: Path) -> None:
    with browser() as tab:
        tab.open((page / "index.html").as_uri())
        assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 300)")
        assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert tab.text("h1").startswith("One PEFT Per User") and tab.log == []


def row(**changes: Any) -> dict[str, Any]:
    gain = {"mean": 0.001, "num_queries": 100}
    return {"claim": "personal", "set": "s", "metric": "accuracy", "gain": gain, "num_needed": 500, **changes}


def figures(nll: float = 0.0, swapped: float = 0.1, user: float = 0.6) -> dict[str, Any]:
    task = {"nll": {"mean": nll, "high": nll + 0.05}, "changed": 0.07}
    pairs = {"oppu/task": task, "oppu/swapped": {"nll": {"mean": swapped}}}
    arms = {"majority_user": {"accuracy": user}, "majority_global": {"accuracy": 0.5}}
    return {"comparisons": pairs, "arms": arms, "metric": "accuracy"}


def claim(name: str, verdict: str) -> dict[str, Any]:
    return {"claim": name, "set": "s", "metric": "nll", "verdict": verdict}


def test_every_reason_is_a_rule_over_the_figures() -> None:
    changed, too_few = reasons(row(), figures(), [])
    assert changed == "The own adapter changed 7% of the answers, by +0.001 on average."
    assert too_few == "100 queries are too few for this: about 500 would show +0.020 with 80 % power."
    assert len(reasons(row(num_needed=None), figures(), [])) == len(reasons(row(num_needed=90), figures(), [])) == 1
    better = [claim("personal", "supported")]
    assert reasons(row(num_needed=None), figures(0.1), better)[1:] == [
        "It does predict the person better (+0.100 nats per token)."
    ]
    none = row(num_needed=None, gain={"mean": 0.0, "num_queries": 100})
    assert reasons(none, figures(0.1), better)[2] == "Probabilities move, seldom the most likely answer."
    assert "by heart" in reasons(row(), figures(-0.1), [claim("personal", "not supported")])[1]
    assert len(reasons(row(num_needed=None), figures(-0.04), [])) == 1  # it may as well rise
    assert "more than the person" in reasons(row(), figures(), [claim("own", "too little data")])[1]
    assert "little personal in the labels" in reasons(row(), figures(user=0.4), [])[1]


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "expected the folder of an evaluated run" in capsys.readouterr().err


def test_a_report_is_the_same_when_made_again(null_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "NUM_RESAMPLES", 50)
    assert report([null_run], tmp_path / "a") == report([null_run], tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
