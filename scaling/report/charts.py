"""The report's charts, drawn by matplotlib as SVG. The page's CSS gives text and lines their font and colours.

No text that comes from a file is drawn: the names of runs stand in the page, beside their colours.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from scaling.report.figures import Cost
from scaling.report.tables import bytes_text, count_text

# Of the runs, in order. They can be told apart on white and on black.
COLOURS = ("#2f6fde", "#e0662b", "#159a6c", "#9a55d6", "#d13c5a", "#0f9bb4", "#b58a00", "#7b8794")
INK, FAINT = "#010203", "#040506"  # placeholders, which the page's own colours replace in the SVG
SIZE = (5.2, 3.0)  # inches of 72 points; text of 9 points
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
TIMES = {  # tick in seconds → its text
    size * factor: f"{factor:,} {unit}"
    for size, unit, factors in (
        (1, "s", (1, 3, 10, 30)), (60, "min", (1, 3, 10, 30)), (3600, "h", (1, 3, 10)),
        (86_400, "days", (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)),
    )
    for factor in factors
} | {86_400: "1 day"}  # fmt: skip
POWERS = [factor * 10**power for power in range(18) for factor in (1, 3)]
MOST_TICKS = 7
WIDE = 5  # an axis may be logarithmic where the highest value is more than so many times the lowest


def colour(index: int) -> str:
    """The colour of the index-th run."""
    return COLOURS[index % len(COLOURS)]


def cost_chart(costs: Sequence[Cost], of: str) -> Markup:
    """Totals against the number of scenes, on logarithmic axes: dots are measured, lines are the formula.

    of: "seconds" or "bytes". A cost that is not known has no line; its index still counts for the colours.
    """
    measured = [point for cost in costs for point in cost.measured]
    most = 10 ** math.ceil(math.log10(max(10_000, 10 * max((n for n, _ in measured), default=1))))
    scenes = np.geomspace(1, most, 200)

    def draw(axes: Axes) -> None:
        for index, cost in enumerate(costs):
            if cost.is_known:
                axes.plot(scenes, [cost.total(n) for n in scenes], color=colour(index), linewidth=1.6)
            if cost.measured:
                axes.plot(*zip(*cost.measured), "o", color=colour(index), markersize=4.5, alpha=0.8)
        axes.set(xscale="log", yscale="log", xlabel="scenes N", xlim=(0.9, 1.1 * most))
        _ticks(axes, "x", [10**power for power in range(18)], count_text)
        if of == "seconds":
            axes.set_ylabel("device time in all")
            _ticks(axes, "y", list(TIMES), lambda seconds: TIMES[round(seconds)])
        else:
            axes.set_ylabel("bytes in all")
            _ticks(axes, "y", POWERS, bytes_text)

    return _chart(draw, f"Total {of} against the number of scenes, shared cost included")


def histogram(values: Sequence[Sequence[float]], label: str = "test PSNR, dB") -> Markup:
    """A histogram over scenes, one series for each run, with a dashed line at its mean. With several runs, heights are
    percentages of the run's scenes."""
    every = [value for series in values for value in series]
    edges = np.linspace(min(every) - 1e-3, max(every) + 1e-3, _num_bins(max(map(len, values))) + 1)
    several = len(values) > 1

    def draw(axes: Axes) -> None:
        for index, series in enumerate(values):
            if not series:
                continue
            counts = np.histogram(series, edges)[0] * (100 / len(series) if several else 1)
            axes.stairs(counts, edges, fill=True, color=colour(index), alpha=0.25 if several else 0.55)
            axes.stairs(counts, edges, color=colour(index), linewidth=1.4)
            axes.axvline(float(np.mean(series)), color=colour(index), linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set(xlabel=label, ylabel="scenes, %" if several else "scenes", ylim=(0, None))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=not several))

    return _chart(draw, f"Histogram of {label}")


def _num_bins(num_values: int) -> int:
    return int(min(40, max(8, 2 * math.sqrt(num_values))))


def curve_chart(
    series: Sequence[tuple[int, Sequence[tuple[int, float]]]], xlabel: str, ylabel: str, log: bool, label: str
) -> Markup:
    """Lines through (step, value) points. series: (index of the run, points); a line has its run's colour.

    log: a logarithmic axis of values, where all are above 0 and they span more than a factor of WIDE.
    """

    def draw(axes: Axes) -> None:
        for index, points in series:
            width = 1.5 + 1.5 * min(series[-1][0] - index, 3)  # an earlier run stays visible beneath an equal line
            size = 2 + width if len(points) <= 40 else 0
            axes.plot(*zip(*points), "-o", color=colour(index), linewidth=width, markersize=size)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        values = [value for _, points in series for _, value in points]
        if log and 0 < WIDE * min(values) < max(values):
            axes.set_yscale("log")
            steps = [factor * 10.0**power for power in range(-12, 13) for factor in (1, 2, 5)]
            _ticks(axes, "y", steps, lambda value: f"{value:g}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))

    return _chart(draw, label)


def _ticks(axes: Axes, which: str, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    """Set the ticks that lie within the axis, each with its text; where they are too many, only every second or third.

    The y axis first grows until it ends at ticks, so that it has at least two.
    """
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    if which == "y":
        low = max((tick for tick in ticks if tick <= low), default=low)
        high = min((tick for tick in ticks if tick >= high), default=high)
        axes.set_ylim(low, high)
    seen = [tick for tick in ticks if low <= tick <= high]
    axis.set_major_locator(FixedLocator(seen[:: max(1, math.ceil(len(seen) / MOST_TICKS))]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def _chart(draw: Callable[[Axes], None], label: str) -> Markup:
    """An SVG with the width and the colours of the page. Its ids differ from those of every other chart."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same figures give the same SVG
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    # matplotlib's ids are unique in one SVG only, and the page holds several.
    name = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{name}-", svg)
    head = Markup('<svg role="img" aria-label="{}"').format(label)
    return head + Markup(re.sub(r'^<svg|(?<=\s)(width|height)="[^"]*pt"\s*', "", svg))
