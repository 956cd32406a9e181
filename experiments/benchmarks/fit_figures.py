"""For fit.py: from curves to the figures that it prints."""

from __future__ import annotations

from typing import Any

from scaling.command_line import read_preset
from scaling.config import Settings, make_settings

METHODS = ("paper", "default", "rgb_triplanes")
LEAST_GAIN = 0.2  # dB below which a ratio of times would say nothing


def speedup_2b(published: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both gains are over the method's own 2a, read by the decoder as 1b left it. What our decoder gained in 1c is paid
    in stage 1 and comes with the first batch that it decodes; what moving the scenes adds to it is told apart."""
    end = published["rgb"].end.decoded
    gain = end - published["latent"].end.unadapted
    time = ours["rgb"].seconds_to("decoded", ours["latent"].end.unadapted + gain)
    theirs = published["rgb"].seconds_to("decoded", end)
    first = ours["rgb"].points[0]
    return {
        "speedup_2b": theirs / time if time and gain >= LEAST_GAIN else None,
        "paper_gain_2b_db": gain,
        "default_gain_2b_db": ours["rgb"].end.decoded - ours["latent"].end.unadapted,
        "default_gain_2b_over_adapted_db": ours["rgb"].end.decoded - first.decoded,
        "paper_seconds_2b": theirs,
        "default_seconds_2b": time,
    }


def sd_size(
    published: dict[str, Any], ours: dict[str, Any], settings: dict[str, Settings], scenes: int
) -> dict[str, Any]:
    """A scene's whole stage 2 with an autoencoder of Stable Diffusion's size: measured seconds a view by counted
    views. The epochs of the published 2b are those of the preset, and those that were run."""
    from sd_size import sd_seconds_per_view

    each, views = sd_seconds_per_view(), ours["views"]
    epochs = {"published": make_settings(read_preset("paper")).stage2.rgb.num_epochs}
    epochs["run"] = settings["paper"].stage2.rgb.num_epochs
    # Steps through the student cost what they did here: it does not grow with the decoder.
    passes = 0 if ours["student"] else 2 * views * settings["default"].stage2.rgb.num_epochs
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
        "sd_seconds_per_scene": {**theirs, "default": mine},
        "decoder_passes_paper": 3 * views * epochs["published"],
        "decoder_passes_default": passes,
    }


def table_text(figures: dict[str, Any]) -> str:
    """The headline keys, and a row for each method, as Markdown."""
    keys = (
        "speedup_2a", "speedup_2b", "paper_gain_2b_db", "default_gain_2b_db", "default_gain_2b_over_adapted_db",
        "speedup_stage2_sd", "speedup_stage2_sd_epochs_run", "psnr_gain_db", "bytes_per_scene", "decoder_passes_paper",
        "decoder_passes_default",
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
    for name in METHODS:
        row = figures["methods"][name]
        lines.append(
            f"| {name} | {row['psnr']:.2f} | {row['autoencoder_psnr']:.2f} | {row['stage1_cpu_seconds']:.0f} "
            f"| {row['cpu_seconds_per_scene']:.1f} | {row['bytes_per_scene']:,.0f} |"
        )
    return "\n".join(lines)


def methods_rows(
    published: dict[str, Any],
    own: dict[str, Any],
    seconds: dict[str, float],
    settings: dict[str, Settings],
    scenes: int,
) -> dict[str, Any]:
    """Quality, CPU time and bytes of each method; own: those of `default` and `rgb_triplanes`."""
    shape = settings["paper"].representation
    planes = len(shape.plane_axes) * shape.micro_features * shape.resolution**2
    fitting = published["latent"].end.seconds + published["rgb"].end.seconds
    rows = {
        "paper": {
            "psnr": published["rgb"].end.decoded,
            "autoencoder_psnr": own["default"]["autoencoder_psnr"],
            "cpu_seconds_per_scene": (fitting + own["default"]["encode_seconds"]) / scenes,
            "bytes_per_scene": 4 * (planes + shape.num_base_planes),
        }
    }
    for name, run in own.items():
        fitting = run["latent"].end.seconds + (run["rgb"].end.seconds if run["rgb"] is not run["latent"] else 0.0)
        rows[name] = {
            "psnr": run["psnr"],
            "autoencoder_psnr": run["autoencoder_psnr"],
            "cpu_seconds_per_scene": (fitting + run["encode_seconds"]) / scenes,
            "bytes_per_scene": run["bytes_per_scene"],
        }
    return {name: {**row, "stage1_cpu_seconds": seconds[name]} for name, row in rows.items()}
