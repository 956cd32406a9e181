"""The sections of a report, made from its figures: what each section says, draws and lists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from scaling.report.charts import cost_chart, curve_chart, histogram
from scaling.report.figures import Cost, RunFigures
from scaling.report.pictures import Sheet, base_plane_sheet, interpolation_sheet, scene_sheets
from scaling.report.tables import (
    Form,
    Table,
    bytes_text,
    categories_table,
    cost_table,
    count_text,
    decibels,
    metrics_table,
    origin_table,
    seconds_text,
    settings_table,
)

MOST_FAILURES = 10  # listed for each run
TILES = (
    ("test PSNR", "psnr", lambda value: f"{decibels(value)} dB"),
    ("device time a scene", "seconds_per_scene", seconds_text),
    ("bytes a scene", "bytes_per_scene", bytes_text),
    ("scenes fitted", "num_scenes", count_text),
)
MODES = {"frozen": ", each alone (mode frozen)", "cohort": ", together in cohorts (mode cohort)"}
STAGE2_CURVES = (("stage2/psnr", "mean test PSNR, dB"), ("stage2/scenes_per_hour", "scenes an hour"))


@dataclass(frozen=True)
class Chart:
    """A chart. title: what it shows; svg: the picture; notes: sentences below it."""

    title: str
    svg: Markup
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page; its empty parts are left out.

    tiles: headline numbers (name, value, text); tables: (caption, table); sheets: pictures. Charts are shown side by
    side where there is room, and so are tables.
    """

    anchor: str
    title: str
    intro: str = ""
    tiles: Sequence[tuple[str, float, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = ()


def report_sections(runs: Sequence[RunFigures]) -> list[Section]:
    """All sections, in the order of the page."""
    return [
        _summary(runs), _cost(runs), _quality(runs), _scenes(runs), _training(runs), _planes(runs),
        _interpolation(runs), _settings(runs), _origin(runs),
    ]  # fmt: skip


# ---------------------------------------------------------------------- figures


def _summary(runs: Sequence[RunFigures]) -> Section:
    notes = [sentence for run in runs for sentence in _progress(run)]
    if len(runs) == 1:
        [run] = runs
        table = metrics_table([("stage 1", run.metrics["stage1"]), ("stage 2", run.metrics)], compare=False)
        values = {"psnr": run.of_stage["test"]["psnr"], **run.of_stage}
        intro = _what(run)
        tiles = [(name, values[key], form(values[key])) for name, key, form in TILES if values[key] is not None]
        return Section("summary", "Summary", intro, tiles, tables=[("", table)], notes=notes)
    second = metrics_table([(run.label, run.metrics) for run in runs], compare=True)
    first = metrics_table([(run.label, run.metrics["stage1"]) for run in runs], compare=True)
    tables = [("Stage 2: scenes fitted on the shared model", second), ("Stage 1: scenes it was trained on", first)]
    return Section("summary", "Summary", tables=tables, notes=notes)


def _what(run: RunFigures) -> str:
    """The run in a few sentences."""
    noted, trained, fitted = run.noted, run.metrics["stage1"]["num_scenes"], run.metrics["num_scenes"]
    told = [f"{trained:,} scenes trained the shared model."] if trained else []
    if fitted:
        how = MODES.get(str(noted.get("stage2.mode")), "")
        told.append(f"{fitted:,} {'more ' if trained else ''}were fitted on it{how}.")
    size = noted.get("data.image_size")
    if size is not None:
        told.append(f"Images have {size} by {size} pixels; planes hold {_held(noted)}.")
    return " ".join(told)


def _held(noted: Mapping[str, Any]) -> str:
    if noted.get("autoencoder.kind") != "super_resolution":
        return "latents"
    shrink = noted.get("autoencoder.shrink")
    return "pixels" if shrink == 1 else f"images {shrink} times smaller"


def _progress(run: RunFigures) -> list[str]:
    """Sentences on what a run has not done yet, and on what failed."""
    asked, fitted = run.noted.get("stage 2: num_scenes"), run.metrics["num_scenes"]
    told = []
    if run.stage == 1:
        told.append(f"{run.label}: stage 2 has fitted no scene yet; the scenes shown are those of stage 1.")
    elif isinstance(asked, int) and fitted + len(run.failed) < asked:
        told.append(f"{run.label}: stage 2 has fitted {fitted:,} of {asked:,} scenes so far.")
    if run.failed:
        kinds = Counter(event.kind for event in run.failed.values())
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        told.append(f"{run.label}: {len(run.failed):,} scenes failed ({counted}):")
        first = sorted(run.failed.items())[:MOST_FAILURES]
        told += [f"{scene_id}: {event.kind}: {event.message}" for scene_id, event in first]
    return told


def _cost(runs: Sequence[RunFigures]) -> Section:
    section = Section(
        "cost", "Cost against the number of scenes",
        "What N scenes cost in all: total(N) = shared cost + N · cost of a scene. The shared cost is stage 1's device "
        "time, or the bytes of the shared model. Dots were measured as the library grew; lines are the formula.",
        notes=[*(_not_known(run) for run in runs if not run.seconds.is_known), *_alone(runs)],
    )  # fmt: skip
    charts, tables = [], []
    for of, form, costs in (
        ("seconds", seconds_text, [run.seconds for run in runs]), ("bytes", bytes_text, [run.num_bytes for run in runs])
    ):  # fmt: skip
        if any(cost.is_known for cost in costs):
            title = "Device time in all" if of == "seconds" else "Bytes in all"
            charts.append(Chart(title, cost_chart(costs, of), _formulas(runs, costs, form)))
            tables.append((title, cost_table([run.label for run in runs], costs, form)))
    return replace(section, charts=charts, tables=tables)


def _formulas(runs: Sequence[RunFigures], costs: Sequence[Cost], form: Form) -> list[str]:
    lead = [f"{run.label}: " if len(runs) > 1 else "" for run in runs]
    return [
        f"{start}total(N) = {form(cost.shared)} + N · {form(cost.each)}"
        for start, cost in zip(lead, costs)
        if cost.shared is not None and cost.each is not None
    ]


def _not_known(run: RunFigures) -> str:
    if run.stage == 1:
        return f"{run.label}: what a further scene costs is known once stage 2 has fitted some."
    return (
        f"{run.label}: the device time of stage 1 is not known, because the run that trained the shared model was not "
        "found; only bytes are drawn."
    )


def _alone(runs: Sequence[RunFigures]) -> list[str]:
    """Sentences that say from how many scenes on each run is cheaper than a run that fits every scene alone."""
    alone = [run for run in runs if run.fits_alone]
    if not alone:
        return [
            "None of these runs fits every scene alone, so there is no cost to compare with. To see one, add a run of "
            "--preset rgb_triplanes, which shares neither planes nor an autoencoder, with one more --run."
        ]
    base, told = alone[0], [f"{alone[0].label} fits every scene alone: its scenes share no planes and no autoencoder."]
    for run in runs:
        pairs = (("less device time", run.seconds, base.seconds), ("fewer bytes", run.num_bytes, base.num_bytes))
        for of, cost, other in pairs:
            if not run.fits_alone and cost.is_known and other.is_known:
                start = cost.cheaper_from(other)
                told.append(
                    f"{run.label} never takes {of} than that."
                    if start is None
                    else f"{run.label} takes {of} than that from {math.ceil(start):,} scenes on."
                )
    return told


def _quality(runs: Sequence[RunFigures]) -> Section:
    values = [list(run.psnr().values()) for run in runs]
    intro = "Test PSNR of the scenes; dashed lines are means."
    if not any(values):
        return Section("quality", "Quality", notes=["No scene has a test PSNR: none of them has test views."])
    categories = categories_table(runs)
    tables = [("Test PSNR by category, dB (scenes)", categories)] if categories else []
    return Section("quality", "Quality", intro, charts=[Chart("Test PSNR", histogram(values))], tables=tables)


def _training(runs: Sequence[RunFigures]) -> Section:
    charts = [*_stage1_charts(runs), *_stage2_charts(runs)]
    without = [run.label for run in runs if not run.curves]
    notes = [
        f"{', '.join(without)}: no curves, because MLflow's database beside the run folder (or the server that "
        "MLFLOW_TRACKING_URI names) holds none."
    ] * bool(without)
    return Section("training", "Training curves", charts=charts, notes=notes)


def _stage1_charts(runs: Sequence[RunFigures]) -> list[Chart]:
    """One chart for each loss of stage 1, with one line for each run and phase."""
    losses: dict[str, list[tuple[int, str, Sequence[tuple[int, float]]]]] = {}
    for index, run in enumerate(runs):
        for key, points in run.curves.items():
            stage, _, rest = key.partition("/")
            phase, _, loss = rest.partition("/")
            if stage == "stage1" and points:
                losses.setdefault(loss, []).append((index, phase, points))
    # Charts come in the order in which training first used the losses.
    charts = []
    for loss, found in sorted(losses.items(), key=lambda item: min(points[0][0] for _, _, points in item[1])):
        found.sort(key=lambda line: (line[0], line[2][0]))
        series = [(index, points) for index, _, points in found]
        svg = curve_chart(series, "epoch of stage 1", "loss", log=True, label=f"Loss {loss} of stage 1")
        spans = [f"{phase}: {_epochs(points)}" for index, phase, points in found if index == found[0][0]]
        lead = f"Phases of {runs[found[0][0]].label}: " if len(runs) > 1 else "Phases: "
        charts.append(Chart(f"Stage 1, loss {loss}", svg, [f"{lead}{', '.join(spans)}"]))
    return charts


def _epochs(points: Sequence[tuple[int, float]]) -> str:
    first, last = points[0][0], points[-1][0]
    return f"epoch {first}" if first == last else f"epochs {first} to {last}"


def _stage2_charts(runs: Sequence[RunFigures]) -> list[Chart]:
    charts = []
    for key, label in STAGE2_CURVES:
        series = [(index, run.curves[key]) for index, run in enumerate(runs) if run.curves.get(key)]
        if series:
            charts.append(Chart(f"Stage 2, {label}", curve_chart(series, "scenes done", label, log=False, label=label)))
    return charts


# ---------------------------------------------------------------------- pictures


def _scenes(runs: Sequence[RunFigures]) -> Section:
    title, intro = "Scenes", "Views that were not trained on. Errors: white is none, black half the range or more."
    if len(runs) == 1:
        return Section("scenes", title, intro, sheets=scene_sheets(runs))
    # The same id may name another scene in another store, or with another number of views.
    sources = {(run.noted.get(f"stage {run.stage}: store"), run.noted.get("data.embedded_views")) for run in runs}
    sheets = scene_sheets(runs) if len(sources) == 1 else []
    if sheets:
        intro = "Views that were not trained on, of the best, median and worst scene by the runs' mean PSNR."
        return Section("scenes", title, intro, sheets=sheets)
    each = [
        Sheet(f"{run.label}, {sheet.title}", sheet.strips, sheet.heads, sheet.notes)
        for run in runs
        for sheet in scene_sheets([run])
    ]
    return Section("scenes", title, intro, sheets=each, notes=["The runs have no scene of the same source in common."])


def _planes(runs: Sequence[RunFigures]) -> Section:
    return _each("planes", "Base planes", runs, base_plane_sheet, "it has no base planes: its scenes share none")


def _interpolation(runs: Sequence[RunFigures]) -> Section:
    section = "Between two scenes"
    return _each("between", section, runs, interpolation_sheet, "no two of its scenes share a model")


def _each(
    anchor: str, title: str, runs: Sequence[RunFigures], make: Callable[[RunFigures], Sheet | None], why_none: str
) -> Section:
    made = [(run.label, make(run)) for run in runs]
    sheets = [Sheet(label if len(runs) > 1 else "", s.strips, s.heads, s.notes) for label, s in made if s]
    return Section(anchor, title, sheets=sheets, notes=[f"{label}: {why_none}." for label, sheet in made if not sheet])


# ---------------------------------------------------------------------- where it comes from


def _settings(runs: Sequence[RunFigures]) -> Section:
    unknown = [run.label for run in runs if not run.noted]
    if unknown:
        notes = [f"{', '.join(unknown)}: no config.yaml says which settings were used."]
        return Section("settings", "Settings", notes=notes)
    table = settings_table(runs)
    if not table.rows:
        return Section("settings", "Settings", notes=["All are the same." if len(runs) > 1 else "All are defaults."])
    intro = "Settings that differ between the runs." if len(runs) > 1 else "Settings that differ from the defaults."
    return Section("settings", "Settings", intro, tables=[("", table)])


def _origin(runs: Sequence[RunFigures]) -> Section:
    return Section("origin", "Origin", tables=[("", origin_table(runs))])
