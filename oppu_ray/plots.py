"""Findings as pictures: where matplotlib lives. In go parts of `findings.find`'s values, out come PNG bytes by name.

A reader might question pictures of intervals only, no bars: a gain without its interval says nothing here.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

OWN, SHARED, CONTROL, HABIT = "#0b6e99", "#6b7280", "#c4572e", "#a98600"
LINES = ("#0b6e99", "#c4572e", "#2f855a", "#8b5cf6", "#a98600", "#d53f8c", "#4a5568", "#00a3a3", "#7b341e")
PAGE_INCHES = 10.8
UNITS = {"accuracy": "accuracy", "mae": "MAE, points", "rougeL": "ROUGE-L", "nll": "nats per token"}
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


@dataclass(frozen=True)
class Row:
    """One line of a forest plot; `gain` as `statistics.Gain` in a dict."""

    label: str
    gain: dict[str, Any]
    colour: str = OWN


def forests(panels: Sequence[tuple[str, Sequence[Row]]], columns: int) -> bytes:
    """Panels (title, rows): per row the mean with its interval over queries (thick) and over users (thin, below)."""
    lines = -(-len(panels) // columns)
    tallest = max(len(rows) for _, rows in panels)
    with pyplot.rc_context(_STYLE):
        size = (PAGE_INCHES if columns > 1 else PAGE_INCHES / 2, lines * (0.9 + 0.26 * tallest))
        figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, (title, rows) in zip(axes.flat, panels, strict=False):
            _forest(axis, title, rows)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        return _png(figure)


def _forest(axis: Axes, title: str, rows: Sequence[Row]) -> None:
    axis.axvline(0, color="#9ca3af", linewidth=0.8)
    for place, row in enumerate(rows):
        gain, up = row.gain, len(rows) - place
        axis.plot([gain["low"], gain["high"]], [up, up], color=row.colour, linewidth=2.4, solid_capstyle="butt")
        axis.plot([gain["mean"]], [up], "o", color=row.colour, markersize=5)
        by_user = [gain["by_user_low"], gain["by_user_high"]]
        axis.plot(by_user, [up - 0.25] * 2, color=row.colour, linewidth=0.9, alpha=0.7)
        axis.plot([gain["by_user_mean"]], [up - 0.25], "|", color=row.colour, markersize=5, alpha=0.7)
    axis.set_yticks(range(len(rows), 0, -1), [row.label for row in rows])
    axis.set_ylim(0.4, len(rows) + 0.6)
    axis.set_title(title, loc="left")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(5))


def concentration_curves(curves: dict[str, list[float]]) -> bytes:
    """Per set, the share of the summed gain held by the users who gain most; above the diagonal it is concentrated."""
    with pyplot.rc_context(_STYLE):
        figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        axis.plot([0, 1], [0, 1], color="#9ca3af", linewidth=0.8, linestyle="--")
        colours = _colours(curves)
        for name, curve in sorted(curves.items()):
            shares = [0, *((place + 1) / len(curve) for place in range(len(curve)))]
            axis.plot(shares, [0, *curve], color=colours[name], linewidth=1.6, label=name)
        axis.set_ylim(0, min(2.0, 0.1 + max(max(curve) for curve in curves.values())))
        axis.set(xlabel="share of users, those who gain most first", ylabel="share of the summed gain in likelihood")
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
        return _png(figure)


def bin_lines(panels: Sequence[tuple[str, dict[str, list[dict[str, Any]]], tuple[str, str]]]) -> bytes:
    """Panels (title, set -> bins with `nll` gains, names of the first and last bin): how the gain changes."""
    with pyplot.rc_context(_STYLE):
        size = (PAGE_INCHES if len(panels) > 1 else 6.4, 3.8)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        colours, lines = _colours(name for _, of_sets, _ in panels for name in of_sets), dict[str, Any]()
        for axis, (title, of_sets, names) in zip(axes.flat, panels, strict=True):
            axis.axhline(0, color="#9ca3af", linewidth=0.8)
            for shift, (name, bins) in enumerate(sorted(of_sets.items())):
                places = [place / (len(bins) - 1) + 0.015 * (shift - len(of_sets) / 2) for place in range(len(bins))]
                means = [part["nll"]["mean"] for part in bins]
                spans = [
                    [part["nll"]["mean"] - part["nll"]["low"] for part in bins],
                    [part["nll"]["high"] - part["nll"]["mean"] for part in bins],
                ]
                lines[name] = axis.errorbar(
                    places, means, yerr=spans, color=colours[name], linewidth=1.4, elinewidth=0.8, marker="o",
                    markersize=3.5,
                )  # fmt: skip
            axis.set_xticks([0, 1], names)
            axis.set_title(title, loc="left")
            axis.set_ylabel("gain, nats per token")
        axes.flat[-1].legend(
            [lines[name] for name in colours], [*colours], frameon=False, fontsize=8, loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
        return _png(figure)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, the same in all panels of a picture."""
    return dict(zip(sorted(set(names)), cycle(LINES), strict=False))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": ""})
    pyplot.close(figure)
    return file.getvalue()
