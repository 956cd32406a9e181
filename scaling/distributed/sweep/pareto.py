"""Pareto fronts: the points that no other point beats in both cost and quality, as indices and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.storage.atomic import replace_file
from scaling.storage.paths import AnyPath

LISTED = 30  # names that fit beside the picture
COSTS = {"seconds_per_scene": "device seconds a scene", "bytes_per_scene": "bytes a scene"}


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats, the cheapest first.

    A point beats another one if it is at least as cheap and at least as good, and better in one of the two.
    """
    points = list(zip(costs, qualities, strict=True))
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    ]
    return sorted(front, key=lambda index: (costs[index], qualities[index]))


def fronts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Cost → the trials on its front, the cheapest first. rows: with `trial`, `psnr` and the COSTS."""
    quality = [row["psnr"] for row in rows]
    return {key: [rows[i]["trial"] for i in pareto_front([row[key] for row in rows], quality)] for key in COSTS}


def plot_fronts(rows: Sequence[Mapping[str, Any]], path: AnyPath) -> None:
    """Draw PSNR against each cost: a dot with its number for each row, the dots of the front joined by a line.

    A list beside it says what the numbers on the fronts stand for. rows: as for `fronts`; `trial` is NUMBER_VALUES, as
    a sweep names its trials.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    figure = Figure(figsize=(15, 5.5), dpi=100, layout="constrained")
    left, right, words = figure.subplots(1, 3, width_ratios=(3, 3, 2.4))
    for axes, (key, label) in zip((left, right), COSTS.items()):
        costs, quality = [row[key] for row in rows], [row["psnr"] for row in rows]
        front = pareto_front(costs, quality)
        axes.scatter(costs, quality, color="tab:grey", zorder=2)
        axes.plot([costs[i] for i in front], [quality[i] for i in front], "o-", color="tab:red", label="Pareto front")
        for cost, psnr, row in zip(costs, quality, rows):
            number = row["trial"].split("_")[0]
            axes.annotate(number, (cost, psnr), textcoords="offset points", xytext=(5, 4), fontsize=8)
        # A linear axis would crowd costs that differ more than tenfold; a logarithmic one needs positive costs.
        wide = max(costs) > 10 * min(costs) > 0
        axes.set(xscale="log" if wide else "linear", xlabel=label, ylabel="test PSNR, dB")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    named = sorted({trial for front in fronts(rows).values() for trial in front})
    lines = [trial.replace("_", "  ", 1) for trial in named[:LISTED]]
    words.axis("off")
    words.text(0, 1, "\n".join(["on a front:", *lines]), va="top", fontsize=7, transform=words.transAxes)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    replace_file(path, data.getvalue())
