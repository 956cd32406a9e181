"""For fit.py --with-paper: turns curves into the figures that are printed."""

from __future__ import annotations

from typing import Any

from scaling.cli import read_preset
from scaling.config import Settings, make_settings

COHORT = "sd, 2b in mode cohort"
LEAST_GAIN = 0.2  # dB; below it a ratio of times would mean nothing
AS_BEFORE = {  # names of figures from when `sd` was called default → their names today
    "default_seconds_2a": "sd_seconds_2a",
    "default_gain_of_1c_db": "sd_gain_of_1c_db",
    "default_gain_2b_db": "sd_gain_2b_db",
    "default_gain_2b_db_frozen": "sd_gain_2b_db_frozen",
    "default_seconds_2b": "sd_seconds_2b",
    "default_seconds_2b_frozen": "sd_seconds_2b_frozen",
    "decoder_passes_default": "decoder_passes_sd",
}


def speedup_2b(published: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """How many times faster ours reaches the gain of the published 2b, and the gains themselves.

    A gain is over the method's own 2a, decoded as 1b left the decoder. What our decoder gained in 1c is paid for in
    stage 1 and comes with the first batch that it decodes, so that gain is reported apart from what 2b adds. Ours is
    given in mode cohort, in which the decoder moves as in the published 2b, and frozen, as in `sd`.
    """
    end = published["rgb"].end.decoded
    gain = end - published["latent"].end.unadapted
    theirs = published["rgb"].seconds_to("decoded", end)
    before, adapted = ours["latent"].end.unadapted, ours["rgb"].points[0].decoded
    figures: dict[str, Any] = {
        "paper_gain_2b_db": gain,
        "paper_seconds_2b": theirs,
        "sd_gain_of_1c_db": adapted - before,
    }
    for suffix, curve in (("", ours["cohort"]), ("_frozen", ours["rgb"])):
        time = curve.seconds_to("decoded", before + gain)
        figures["speedup_2b" + suffix] = theirs / time if time and gain >= LEAST_GAIN else None
        figures["sd_gain_2b_db" + suffix] = curve.end.decoded - before
        figures["sd_seconds_2b" + suffix] = time
    return figures


def sd_size(
    published: dict[str, Any], ours: dict[str, Any], settings: dict[str, Settings], scenes: int
) -> dict[str, Any]:
    """A scene's whole stage 2 with an autoencoder of Stable Diffusion's size: measured seconds of a view, times counted
    views. The published 2b is given with the preset's number of epochs, and with the number that was run."""
    from shared.sd_size import sd_seconds_per_view

    each, views = sd_seconds_per_view(), ours["views"]
    epochs = {"published": make_settings(read_preset("paper")).stage2.rgb.num_epochs}
    epochs["run"] = settings["paper"].stage2.rgb.num_epochs
    # Steps through the student cost as much as here, because the student does not grow with the decoder.
    passes = 0 if ours["student"] else 2 * views * settings["sd"].stage2.rgb.num_epochs
    mine = views * each["encode"] + ours["latent"].end.seconds / scenes
    mine += ours["rgb"].end.seconds / scenes if ours["student"] else passes / 2 * each["frozen"]
    theirs = {
        name: views * (each["encode"] + count * each["tuned"]) + published["latent"].end.seconds / scenes
        for name, count in epochs.items()
    }
    return {
        "speedup_stage2_sd": theirs["published"] / mine,
        "speedup_stage2_sd_epochs_run": theirs["run"] / mine,
        "sd_seconds_per_view": each,
        "sd_seconds_per_scene": {**theirs, "sd": mine},
        "decoder_passes_paper": 3 * views * epochs["published"],
        "decoder_passes_sd": passes,
    }


def table_text(figures: dict[str, Any]) -> str:
    """The headline keys, and a row for each method, as Markdown."""
    keys = (
        "speedup_2a", "speedup_2b", "speedup_2b_frozen", "paper_gain_2b_db", "sd_gain_of_1c_db",
        "sd_gain_2b_db", "sd_gain_2b_db_frozen", "speedup_stage2_sd", "speedup_stage2_sd_epochs_run",
        "psnr_gain_db", "psnr_gain_cohort_db", "bytes_per_scene", "decoder_passes_paper", "decoder_passes_sd",
    )  # fmt: skip
    lines = ["| figure | value |", "|---|---|"]
    for key in keys:
        value = figures[key]
        lines.append(f"| {key} | {'null' if value is None else f'{value:,.2f}'} |")
    lines += [
        "",
        "| method | test PSNR | autoencoder | stage 1, CPU-s | stage 2, CPU-s/scene | bytes/scene |",
        "|---" * 6 + "|",
    ]
    for name, row in figures["methods"].items():
        limit = "-" if row["autoencoder_psnr"] is None else f"{row['autoencoder_psnr']:.2f}"
        lines.append(
            f"| {name} | {row['psnr']:.2f} | {limit} | {row['stage1_cpu_seconds']:.0f} "
            f"| {row['cpu_seconds_per_scene']:.1f} | {row['bytes_per_scene']:,.0f} |"
        )
    return "\n".join(lines)


def methods_rows(
    same: dict[str, Any],
    own: dict[str, Any],
    seconds: dict[str, float],
    settings: dict[str, Settings],
    scenes: int,
) -> dict[str, Any]:
    """Quality, CPU time and bytes of both methods: a row for `paper`, and two for `sd`, frozen and with 2b in mode
    cohort. same, own: see `same_model` and `own_model`. The bytes of a scene leave out a cohort's own copies of shared
    parts."""
    shape = settings["paper"].representation
    planes = len(shape.plane_axes) * shape.micro_features * shape.resolution**2
    published = same["published"]

    def row(psnr: float, run: dict[str, Any], fitting: float, num_bytes: float, method: str) -> dict[str, Any]:
        return {
            "psnr": psnr,
            "autoencoder_psnr": run["autoencoder_psnr"],
            "stage1_cpu_seconds": seconds[method],
            "cpu_seconds_per_scene": fitting / scenes,
            "bytes_per_scene": num_bytes,
        }

    encoding, latent = own["encode_seconds"], own["latent"].end.seconds
    published_seconds = published["latent"].end.seconds + published["rgb"].end.seconds
    published_bytes = 4 * (planes + shape.num_base_planes)  # micro planes and coefs, in float32
    cohort, frozen = own["cohort"].end, own["rgb"].end
    return {
        "paper": row(published["rgb"].end.decoded, same, published_seconds + encoding, published_bytes, "paper"),
        "sd": row(own["psnr"], own, encoding + latent + frozen.seconds, own["bytes_per_scene"], "sd"),
        COHORT: row(cohort.decoded, own, encoding + latent + cohort.seconds, own["bytes_per_scene"], "sd"),
    }


def row_of(figures: dict[str, Any], method: str) -> dict[str, Any]:
    """The row of a method that frontier.py measured."""
    keys = {"psnr": "psnr", "stage1_cpu_seconds": "stage1_seconds", "cpu_seconds_per_scene": "seconds"}
    keys["bytes_per_scene"] = "bytes"
    return {"autoencoder_psnr": None, **{key: figures[f"{method}_{name}"] for key, name in keys.items()}}
