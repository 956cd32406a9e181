"""The Pareto front: what nothing else beats in both cost and quality, as indices and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.files import replace_file
from scaling.storage import AnyPath

COSTS = {"seconds_per_scene": "device seconds a scene", "bytes_per_scene": "bytes a scene"}


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats: none is as cheap and as good, and better in one of the two.

    In the order of their costs, the cheapest first.
    """
    points = list(zip(costs, qualities, strict=True))
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    ]
    return sorted(front, key=lambda index: (costs[index], qualities[index]))


def fronts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of rows with `trial`, `psnr` and costs: cost → the trials on its front, the cheapest first."""
    quality = [row["psnr"] for row in rows]
    return {key: [rows[i]["trial"] for i in pareto_front([row[key] for row in rows], quality)] for key in COSTS}


def plot_fronts(rows: Sequence[Mapping[str, Any]], path: AnyPath) -> None:
    """A picture, PSNR against each cost: a dot a row with the number that its `trial` starts with, those of the front
    joined by a line."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items()):
        costs, quality = [row[key] for row in rows], [row["psnr"] for row in rows]
        front = pareto_front(costs, quality)
        axes.scatter(costs, quality, color="tab:grey", zorder=2)
        axes.plot([costs[i] for i in front], [quality[i] for i in front], "o-", color="tab:red", label="Pareto front")
        for index, row in enumerate(rows):
            place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 8}
            axes.annotate(row["trial"].split("_")[0], (costs[index], quality[index]), **place, zorder=3)
        axes.set(xscale="log", xlabel=label, ylabel="test PSNR, dB")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.12)
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower right")
    figure.suptitle("numbers are those of the trials in sweep.json and the table", fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    replace_file(path, data.getvalue())
