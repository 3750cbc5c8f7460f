"""`oppu report`: the arrow findings -> one page, as HTML that opens without network, as Markdown, and as PNGs.

In go folders of runs and suites, out come `index.html`, `report.md`, the pictures and `result.json` in one folder. The
page is a list of blocks that is written out twice, so that the two cannot disagree. A reader might question that it
explains its own null results: each sentence is a rule over the figures, printed beside them, and can be checked there.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from oppu_ray import plots
from oppu_ray.evaluation import HEURISTIC_ARMS, explain, parse_arm
from oppu_ray.files import write_atomic
from oppu_ray.findings import (
    CLAIMS,
    MIN_USERS_PER_BIN,
    NOT_SUPPORTED,
    ORDINARY,
    SMALLEST_GAIN,
    SUPPORTED,
    TOO_LITTLE,
    find,
    load_runs,
)
from oppu_ray.plots import CONTROL, HABIT, OWN, SHARED, UNITS, Row

NUM_RESAMPLES = 10_000
BESIDE = {
    "LaMP-1": ("acc +.008 [-.045, +.061]", "", ""),
    "LaMP-2N": ("acc +.005 [-.001, +.011]", "acc .810", "acc .792"),
    "LaMP-2M": ("acc +.076 [+.065, +.088]", "acc .600", "acc .466"),
    "LaMP-3": ("MAE +.009 [-.068, +.086]", "MAE .179", ""),
    "LaMP-4": ("R-1 +.001 [-.001, +.003]", "R-1 .191", "R-1 .189"),
    "LaMP-5": ("R-1 +.004 [-.011, +.019]", "R-1 .519", ""),
    "LaMP-7": ("R-1 +.015 [+.001, +.030]", "R-1 .539", "R-1 .493"),
}
"""By LaMP task: gain of the personal adapter over task adapter and retrieval in an independent re-run of OPPU's release
(SmolLM3-3B, OPPU's data and scorer; "Fine-Tuning a 3B-Parameter LLM on a Smartphone", 2026, code gordofreemo/
mobile_LoRA_ft); OPPU on Llama-2-7B, and a shared stage alone, as PerFit (ICLR 2026) prints them: second-hand."""


COLOURS = "blue with the own adapter, grey shared, orange another user's adapter, ochre no model"


@dataclass(frozen=True)
class Block:
    """One piece of the page. `kind`: title, heading, text, table or picture; `name` is a picture's."""

    kind: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    name: str = ""


def report(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the report on the runs and suites in `folders` to the folder `out`; what it says, as `result.json` has it.

    Raises:
        ValueError: Nothing is evaluated in one of the folders, or a file in it is damaged.
    """
    findings = find(*load_runs(folders), NUM_RESAMPLES)
    blocks, pictures = compose(findings)
    out.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        write_atomic(out / name, png)
    write_atomic(out / "report.md", to_markdown(blocks).encode())
    write_atomic(out / "index.html", to_html(blocks, pictures).encode())
    result = {"command": "report", **findings}
    write_atomic(out / "result.json", json.dumps(result, indent=1).encode())
    return result


# --- what is said


def compose(findings: dict[str, Any]) -> tuple[list[Block], dict[str, bytes]]:
    """The page's blocks, and its pictures as PNGs by name."""
    sets, pictures = findings["sets"], dict[str, bytes]()
    bases = sorted({found["base"] for found in sets.values()})
    blocks = [
        Block("title", "One PEFT Per User: what personal adapters are worth"),
        Block("text", _summary(findings, bases)),
        Block("heading", "The claims"),
        _claims_table(findings),
        Block("text", _rules()),
        Block("heading", "Own adapter against the model that all share"),
        *_picture(pictures, "gains.png", "Gain of the own adapter over the task-adapted model", _gain_panels(sets), 2),
        *_personal_tables(findings),
        Block("heading", "Every arm"),
        *_picture(
            pictures, "arms.png", "Gain of every arm over the task-adapted model: " + COLOURS, _arm_panels(sets), 3
        ),
        *_arm_tables(sets),
        Block("heading", "Beside the paper"),
        *_beside(findings),
        *_who_gains(sets, pictures),
        *_studies(findings, pictures),
        Block("heading", "Where it is not positive, and why"),
        *_reasons(findings),
        Block("heading", "Every verdict"),
        _verdicts_table(findings),
        Block("heading", "How this was made"),
        *_method(findings, bases),
    ]
    return blocks, pictures


def _summary(findings: dict[str, Any], bases: list[str]) -> str:
    sets = findings["sets"]
    rows = [row for row in findings["claims"] if row["claim"] == "personal"]

    def count(is_nll: bool) -> str:
        good = {row["set"] for row in rows if (row["metric"] == "nll") == is_nll and row["verdict"] == SUPPORTED}
        return f"{len(good)} of {len(sets)}"

    num_users = sum(found["num_users"] for found in sets.values())
    num_queries = sum(found["num_queries"] for found in sets.values())
    return (
        f"{_count(len(sets), 'set')} of real histories, {num_users} people, {num_queries} later items to answer, base "
        f"{', '.join(bases)}. A personal adapter predicts its owner better than the task-adapted model (likelihood) on "
        f"{count(True)} sets, and answers better (the task's metric) on {count(False)}; both with a gain over queries "
        f"and over users that is significant after Holm's correction."
    )


def _rules() -> str:
    smallest = ", ".join(f"{gain:g} in {UNITS[metric]}" for metric, gain in SMALLEST_GAIN.items())
    return (
        "A cell counts sets (or sets and variants). Supported: the mean gain is positive over queries and over users, "
        "and both paired sign-flip tests are significant at 5 % after Holm's correction over the sets. Not "
        f"supported: both 95 % intervals end below the smallest gain that matters ({smallest}). Everything else is too "
        "little data, with the queries that would show such a gain in both tests, each with 80 % power at the level of "
        "Holm's first step. Of two p-values the first is over queries, the second over users."
    )


def _claims_table(findings: dict[str, Any]) -> Block:
    verdicts: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    for row in findings["claims"]:
        verdicts[row["claim"], row["metric"] == "nll"][row["verdict"]] += 1

    def cell(claim: str, is_nll: bool) -> str:
        found = verdicts[claim, is_nll]
        return (
            ", ".join(f"{name} {found[name]}" for name in (SUPPORTED, NOT_SUPPORTED, TOO_LITTLE) if found[name]) or "-"
        )

    seen = [claim for claim in CLAIMS if verdicts[claim, True] or verdicts[claim, False]]
    rows = tuple((CLAIMS[claim], cell(claim, False), cell(claim, True)) for claim in seen)
    return Block("table", head=("claim", "the task's metric", "likelihood"), rows=rows)


def _gain_panels(sets: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    panels: dict[str, list[Row]] = {metric: [] for metric in SMALLEST_GAIN}
    for name, found in sets.items():
        for metric, gain in found["comparisons"].get("oppu/task", {}).items():
            if metric in panels:
                panels[metric].append(Row(name, gain))
    return [(f"gain in {UNITS[metric]}", rows) for metric, rows in panels.items() if rows]


def _personal_tables(findings: dict[str, Any]) -> list[Block]:
    head = ("set", "verdict", "shared", "own", "gain by query [95 %]", "gain by user [95 %]", "p, corrected",
            "users, queries", "top tenth holds", "answers changed")  # fmt: skip
    blocks: list[Block] = []
    for is_nll, title in ((False, "The task's metric (MAE: less is better; gains are signed so that more is):"),
                          (True, "Likelihood of what the person really said, in nats per token:")):  # fmt: skip
        rows = []
        for row in (row for row in findings["claims"] if row["claim"] == "personal"):
            if (row["metric"] == "nll") == is_nll:
                found, gain = findings["sets"][row["set"]], row["gain"]
                task, own = (found["arms"][arm][row["metric"]] for arm in ("task", "oppu"))
                rows.append(
                    (
                        _set_label(row["set"], found) + ("" if is_nll else f", {UNITS[row['metric']]}"),
                        _verdict(row),
                        _number(task),
                        _number(own),
                        _interval(gain["mean"], gain["low"], gain["high"]),
                        _interval(gain["by_user_mean"], gain["by_user_low"], gain["by_user_high"]),
                        f"{_p(row['p_holm'])}, {_p(row['by_user_p_holm'])}",
                        f"{gain['num_users']}, {gain['num_queries']}",
                        "-" if gain["top_share"] is None else f"{gain['top_share']:.0%} of it",
                        f"{found['comparisons']['oppu/task']['changed']:.0%}",
                    )
                )
        if rows:
            blocks += [Block("text", title), Block("table", head=head, rows=tuple(rows))]
    return blocks


def _arm_panels(sets: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    panels = []
    for name, found in sets.items():
        rows = [
            Row(arm, found["comparisons"][f"{arm}/task"][found["metric"]], _colour(arm))
            for arm in found["arms"]
            if f"{arm}/task" in found["comparisons"] and arm != "base"
        ]
        if rows:
            panels.append((f"{name}: gain in {UNITS[found['metric']]}", rows))
    return panels


def _colour(arm: str) -> str:
    if arm in HEURISTIC_ARMS:
        return HABIT
    model = parse_arm(arm).model
    return {"own": OWN, "swapped": CONTROL}.get(model, SHARED)


def _arm_tables(sets: dict[str, Any]) -> list[Block]:
    by_metric: dict[str, list[str]] = defaultdict(list)
    for name, found in sets.items():
        by_metric[found["metric"]].append(name)
    blocks = []
    for metric, names in by_metric.items():
        arms = list(dict.fromkeys(arm for name in names for arm in sets[name]["arms"]))
        rows = [
            (arm, explain(arm), *(_score(sets[name]["arms"].get(arm, {}), metric) for name in names)) for arm in arms
        ]
        text = f"{UNITS[metric]} (nll per token in brackets):"
        blocks += [Block("text", text), Block("table", head=("arm", "what answers", *names), rows=tuple(rows))]
    return blocks


def _score(scores: dict[str, float], metric: str) -> str:
    if metric not in scores:
        return "-"
    return _number(scores[metric]) + (f" ({_number(scores['nll'])})" if "nll" in scores else "")


def _beside(findings: dict[str, Any]) -> list[Block]:
    rows = []
    for name, found in findings["sets"].items():
        if found["lamp"] in BESIDE:
            rerun, paper, stage = BESIDE[found["lamp"]]
            gain = found["comparisons"].get("oppu/task", {}).get(found["metric"])
            ours = _interval(gain["mean"], gain["low"], gain["high"]) if gain else "-"
            over = found["comparisons"].get("oppu_k1/rag_k1", {}).get(found["metric"])
            ours_rag = _interval(over["mean"], over["low"], over["high"]) if over else "-"
            label = f"{found['lamp']}: {name}, {UNITS[found['metric']]}"
            rows.append((label, ours, ours_rag, rerun, paper or "-", stage or "-"))
    if not rows:
        return [Block("text", "None of these sets has a LaMP task that published figures exist for.")]
    head = ("task", "here, over shared", "here, with retrieval", "re-run, with retrieval", "OPPU, 7B", "shared, 7B")
    text = (
        "The data differ: LaMP's own files are replaced by public data of the same kind, so compare signs and orders "
        "of magnitude, not scores. The re-run is an independent one of OPPU's released code, data and scorer with "
        "SmolLM3-3B (gain of the personal adapter over the task adapter, both with one retrieved item). The last two "
        "columns are second-hand: OPPU's and a shared stage's scores on Llama-2-7B as printed by PerFit (ICLR 2026). "
        "The paper's abstract claims gains on all seven tasks; its tables have not been checked here."
    )
    return [Block("text", text), Block("table", head=head, rows=tuple(rows))]


def _who_gains(sets: dict[str, Any], pictures: dict[str, bytes]) -> list[Block]:
    activity = {name: found["activity"] for name, found in sets.items() if found.get("activity")}
    times = {name: found["time"] for name, found in sets.items() if found.get("time")}
    curves = {name: curve for name, found in sets.items() if (curve := found.get("concentration", {}).get("nll"))}
    blocks = [Block("heading", "Who gains, and for how long")]
    panels: list[tuple[str, dict[str, Any], tuple[str, str]]] = []
    if activity:
        panels.append(("by length of history", activity, ("short", "long")))
    if times:
        panels.append(("by time since the history ends", times, ("first queries", "last")))
    if panels:
        pictures["bins.png"] = plots.bin_lines(panels)
        text = (
            "Gain in likelihood by length of history and by age of the adapter; only sets that have at least "
            f"{MIN_USERS_PER_BIN} users in every bin, and, for age, times"
        )
        blocks.append(Block("picture", text, name="bins.png"))
    if activity:
        rows = [
            (name, f"{part['low']} to {part['high']}", f"{part['nll']['num_users']}, {part['nll']['num_queries']}",
             *(_interval(part[m]["mean"], part[m]["low"], part[m]["high"]) for m in (sets[name]["metric"], "nll")))
            for name, bins in activity.items()
            for part in bins
        ]  # fmt: skip
        head = ("set", "items learnt from", "users, queries", "gain in the metric", "gain in nats per token")
        blocks.append(Block("table", head=head, rows=tuple(rows)))
    if curves:
        pictures["concentration.png"] = plots.concentration_curves(curves)
        text = "How the gain is shared out: a curve far above the diagonal means that few users hold it"
        blocks.append(Block("picture", text, name="concentration.png"))
    return blocks if len(blocks) > 1 else []


def _studies(findings: dict[str, Any], pictures: dict[str, bytes]) -> list[Block]:
    blocks = []
    for study, of_sets in findings["studies"].items():
        panels, rows = [], []
        for name, variants in of_sets.items():
            metric = next(iter(variants.values()))["metric"]
            for measure in (metric, "nll"):
                shown = [Row(variant, found[measure], SHARED if variant == ORDINARY else OWN)
                         for variant, found in variants.items()]  # fmt: skip
                panels.append((f"{name}: gain in {UNITS[measure]}", shown))
            for variant, found in variants.items():
                gains = [found[m] for m in (metric, "nll")]
                size, seconds = found["adapter_bytes"], found["s_per_user"]
                rows.append(
                    (name, variant, _number(found["task_scores"][metric]), _number(found["scores"][metric]),
                     *(_interval(gain["mean"], gain["low"], gain["high"]) for gain in gains),
                     f"{size / 1e3:,.0f} kB" if size else "-", f"{seconds:.1f} s" if seconds else "-")
                )  # fmt: skip
        head = ("set", "variant", "task-adapted", "OPPU", "gain in the metric", "gain in nats per token",
                "per user", "training")  # fmt: skip
        title = study.replace("_", " ").replace("peft", "PEFT")
        title = title[0].upper() + title[1:]
        blocks += [
            Block("heading", f"Study: {title}"),
            Block("text", f"The claim: {CLAIMS.get(study, title)}. Gains are over the task-adapted model; "
                  "the ordinary run is grey."),
            *_picture(pictures, f"{study}.png", f"{title}: gain over the task-adapted model", panels, 2),
            Block("table", head=head, rows=tuple(rows)),
        ]  # fmt: skip
    return blocks


def _reasons(findings: dict[str, Any]) -> list[Block]:
    rows = []
    for row in findings["claims"]:
        if row["claim"] == "personal" and row["metric"] != "nll" and row["verdict"] != SUPPORTED:
            found = findings["sets"][row["set"]]
            rows.append((row["set"], _verdict(row), " ".join(reasons(row, found, findings["claims"]))))
    if not rows:
        return [Block("text", "There is no such set.")]
    return [Block("table", head=("set", "verdict on the metric", "what the figures say"), rows=tuple(rows))]


def reasons(row: dict[str, Any], found: dict[str, Any], claims: list[dict[str, Any]]) -> list[str]:
    """Why a set's metric does not clearly gain, as far as its own figures say: one sentence per rule that applies."""
    comparisons, gain = found["comparisons"], row["gain"]
    main = comparisons["oppu/task"]
    verdicts = {
        (other["claim"], other["metric"]): other["verdict"]
        for other in claims
        if other["set"] == row["set"] and other["claim"] in ("personal", "own")
    }
    said = [f"The own adapter changed {main['changed']:.0%} of the answers, by {gain['mean']:+.3f} on average."]
    nll = main["nll"]
    if verdicts.get(("personal", "nll")) == SUPPORTED:
        moved = main["changed"] >= 0.25
        said.append(f"It does predict the person better ({nll['mean']:+.3f} nats per token).")
        if gain["mean"] <= 0:
            so = "the answers it changes come no nearer to the person's" if moved else "seldom the most likely answer"
            said.append(f"Probabilities move, {so}.")
    elif nll["high"] < 0:
        said.append(f"Likelihood falls ({nll['mean']:+.3f}): it learns its few items by heart.")
    if verdicts.get(("own", "nll")) not in (SUPPORTED, None):
        over = comparisons["oppu/swapped"]["nll"]
        said.append(
            f"Another user's adapter does about as well ({over['mean']:+.3f} nats): what is learnt is the task more "
            "than the person."
        )
    arms, metric = found["arms"], found["metric"]
    if {"majority_user", "majority_global"} <= set(arms):
        own, shared = arms["majority_user"][metric], arms["majority_global"][metric]
        if (own <= shared) if metric == "accuracy" else (own >= shared):
            said.append(
                f"There is little personal in the labels: a user's own most common one scores {_number(own)}, "
                f"everybody's {_number(shared)}."
            )
    if row["num_needed"] and row["num_needed"] > gain["num_queries"]:
        said.append(
            f"{gain['num_queries']} queries are too few for this: about {row['num_needed']:,} would show "
            f"{max(gain['mean'], SMALLEST_GAIN[row['metric']]):+.3f} with 80 % power."
        )
    return said


def _verdicts_table(findings: dict[str, Any]) -> Block:
    head = ("claim", "set", "what", "in", "verdict", "gain [95 %]", "by user [95 %]", "p, corrected", "seeds' spread")
    rows = []
    for row in findings["claims"]:
        gain = row["gain"]
        spread = gain["seed_spread"]
        rows.append(
            (row["claim"], row["set"], row["variant"].replace("/", " over "), UNITS[row["metric"]],
             _verdict(row), _interval(gain["mean"], gain["low"], gain["high"]),
             _interval(gain["by_user_mean"], gain["by_user_low"], gain["by_user_high"]),
             f"{_p(row['p_holm'])}, {_p(row['by_user_p_holm'])}",
             "-" if spread is None else _number(spread))
        )  # fmt: skip
    return Block("table", head=head, rows=tuple(rows))


def _method(findings: dict[str, Any], bases: list[str]) -> list[Block]:
    hardware, cost = findings["hardware"], findings["cost"]
    seeds = sorted({seed for found in findings["sets"].values() for seed in found["seeds"]})
    machine = hardware["gpu"] or f"{hardware['num_cores']} cores of {hardware['cpu']}"
    texts = [
        f"Base: {', '.join(bases)}. Seeds: {', '.join(map(str, seeds))}; a query's gains under several seeds are "
        f"averaged before anything is tested. Machine: {machine}.",
        f"Intervals: percentile bootstrap of paired gains, {NUM_RESAMPLES:,} resamples, over queries and over users. "
        "Tests: paired sign flips. Correction: Holm, over all sets, for each claim, variant and measure apart. "
        "Queries needed: normal theory for 80 % power, with the variance between users that was seen.",
    ]
    if cost:
        texts.append(
            f"Time: {_duration(cost['elapsed_s'])} in all. Every arm and variant on its own, each with its own task "
            f"adapter and personal adapters, would take {_duration(cost['unshared_s'])}: sharing saved "
            f"{cost['saved_share']:.0%}. A stage that was killed counts from its last start."
        )
    return [Block("text", text) for text in texts]


def _picture(
    pictures: dict[str, bytes], name: str, text: str, panels: list[tuple[str, list[Row]]], columns: int
) -> list[Block]:
    if not panels:
        return []
    pictures[name] = plots.forests(panels, min(columns, len(panels)))
    return [Block("picture", f"{text} (thick: 95 % interval over queries; thin: over users)", name=name)]


# --- how figures are written


def _set_label(name: str, found: dict[str, Any]) -> str:
    return f"{name} ({found['lamp']})" if found["lamp"] else name


def _number(value: float, sign: str = "") -> str:
    text = f"{value:{sign}.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _interval(mean: float, low: float, high: float) -> str:
    return f"{_number(mean, '+')} [{_number(low, '+')}, {_number(high, '+')}]"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else _number(value)


def _verdict(row: dict[str, Any]) -> str:
    return row["verdict"] + (f" ({row['num_needed']:,} queries)" if row["num_needed"] else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


# --- how it is written out


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown; pictures are files beside it."""
    parts = []
    for block in blocks:
        if block.kind == "table":
            lines = [block.head, ("---",) * len(block.head), *block.rows]
            parts.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines))
        elif block.kind == "picture":
            parts.append(f"![{block.text}]({block.name})")
        else:
            parts.append({"title": "# ", "heading": "## ", "text": ""}[block.kind] + block.text)
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """The page as one file: style and pictures inside, no script, nothing to fetch."""
    page = Environment(loader=PackageLoader("oppu_ray"), autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    data = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    return page.get_template("report.html").render(blocks=blocks, pictures=data, cell_class=_cell_class)


def _cell_class(text: str) -> str:
    verdicts = {NOT_SUPPORTED: "no", TOO_LITTLE: "open", SUPPORTED: "yes"}
    return verdicts.get(text.partition(" (")[0], "long" if len(text) > 60 else "")
