"""fit.py: tiny settings through all of it, on embedded cars of 16²; and what it must not get wrong."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaling.config import Settings, SettingsError, make_settings, merge
from scaling.data.choose_scenes import read_ids
from scaling.storage.json_yaml import parse_json

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
PRESETS = ("default", "sharp", "compact", "rgb_triplanes", "same_field_triplanes")
FIGURES = ("psnr", "ssim", "bytes", "row_bytes", "int4_bytes", "seconds", "stage1_seconds")
PIXELS = {
    "autoencoder": {"shrink": 1, "decoder_blocks": 0},
    "stage1": {"autoencoder": {"num_epochs": 0}, "adapt": {"num_epochs": 0}},
}


@pytest.fixture
def frontier(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("fit_parts.frontier")


@pytest.fixture
def tiny(tiny_values, frontier) -> dict[str, Settings]:
    """The five and `paper` and `sd`, so small that each stage takes a second."""
    off = {"num_epochs": 0}
    few = {"num_epochs": 1, "steps_per_epoch": 6, "rays_per_item": 16, "check_every": None}
    base = merge(
        tiny_values,
        {
            "autoencoder": {"kind": "super_resolution", "shrink": 2, "decoder_width": 8, "decoder_blocks": 1},
            "stage1": {"autoencoder": {"lr": {"encoder": 0.0}}, "joint": off, "distil": off},
            "stage2": {"latent": few, "rgb": {"num_epochs": 1, "steps_per_epoch": 2}},
        },
    )
    sharp = merge(merge(base, PIXELS), {"stage2": {"rgb": off}})
    published = {
        "representation": {"box_side": 2.0, "combine": "sum", "field_layers": 1},
        "rendering": {"sampled": "cuboid", "near": 0.5, "far": 2.1, "importance_samples": 4, "background": "white"},
        "stage1": {"distil": off},
        "stage2": {
            "mode": "cohort",
            "start": "random",
            "micro_dtype": "float32",
            "latent": {**few, "rays_per_item": None, "items_per_step": 2},
            "rgb": {"steps_per_epoch": 2, "items_per_step": 2, "lr": {"decoder": 1e-3}},
        },
    }
    values = {
        "default": base,
        "sharp": sharp,
        "compact": merge(sharp, {"representation": {"micro_features": 1}}),
        "paper": merge(tiny_values, published),
        "sd": merge(tiny_values, {"stage1": {"distil": off}}),
    }
    settings = {name: make_settings(each) for name, each in values.items()}
    plain = {"rgb_triplanes": settings["default"], "same_field_triplanes": settings["sharp"]}
    # Their stage 1 is that of a real preset: a thousand steps.
    few = {"warmup": {"num_epochs": 1, "steps_per_epoch": 3}}
    return settings | {name: frontier.over(frontier.as_triplanes(each), stage1=few) for name, each in plain.items()}


@pytest.fixture
def run_fit(tmp_path, monkeypatch, capsys, frontier, tiny) -> Any:
    """run_fit(flags) → figures and what was printed, of 4 cars in stage 1 and 2 others, in this process."""
    fit, paper, stage1, figures = (
        importlib.import_module(name) for name in ("fit", "fit_parts.paper", "fit_parts.stage1", "fit_parts.figures")
    )
    monkeypatch.setattr(frontier, "method_settings", tiny.__getitem__)
    monkeypatch.setattr(frontier, "PACE_STEPS", 3)
    monkeypatch.setattr(fit, "Data", lambda: tiny["default"].data)
    monkeypatch.setattr(stage1, "ProcessPoolExecutor", lambda *_, **__: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(paper, "autoencoder_folder", lambda job: None)
    monkeypatch.setattr(paper, "method_settings", lambda method, *_: tiny[method])
    monkeypatch.setattr(paper, "REPEATS_AT", (1,))
    of_sd_size = ("speedup_stage2_sd", "speedup_stage2_sd_epochs_run", "decoder_passes_paper", "decoder_passes_sd")
    monkeypatch.setattr(figures, "sd_size", lambda *_: dict.fromkeys(of_sd_size, 1.0))

    def call(*flags: str) -> tuple[dict[str, Any], str]:
        lists = {"train": range(4), "fit": range(4, 6)}
        for name, numbers in lists.items():
            (tmp_path / name).write_text("".join(f"car-{number:05d}\n" for number in numbers))
        given = ("--train-scenes", str(tmp_path / "train"), "--fit-scenes", str(tmp_path / "fit"))
        path = tmp_path / "new" / "figures.json"
        argv = ["fit", *given, "--out", str(tmp_path / "out"), "--json", str(path), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        assert fit.main() == 0
        return parse_json(path.read_bytes()), capsys.readouterr().out

    return call


def test_presets_side_by_side(run_fit, tiny):
    figures, printed = run_fit("--uncarved", "sharp")
    for preset in PRESETS:
        assert all(figures[f"{preset}_{name}"] > 0 for name in FIGURES if name != "ssim")
        by_scene = figures["scenes"][preset]
        assert list(by_scene) == ["car-00004", "car-00005"]
        assert figures[f"{preset}_psnr"] == pytest.approx(sum(by_scene.values()) / 2)
        assert f"| {preset} |" in printed
    assert figures["sharp_gain_db"] == figures["sharp_psnr"] - figures["same_field_triplanes_psnr"]
    assert figures["default_gain_db"] == figures["default_psnr"] - figures["rgb_triplanes_psnr"]
    assert figures["same_field_triplanes_bytes"] > figures["same_field_triplanes_int4_bytes"]
    assert figures["same_time"]["same_field_triplanes"]["as"] == "sharp"
    assert figures["settings"]["sharp"] == tiny["sharp"].model_dump() and figures["steps"]["sharp"] == 6
    assert list(figures["uncarved_difference_db"]) == ["car-00004", "car-00005"]
    assert figures["scene_lists"]["fit"] == ["car-00004", "car-00005"] and figures["cpu"] and figures["torch"]
    again, _ = run_fit("--presets", "compact")  # its stage 1 is kept
    assert again["compact_stage1_seconds"] == figures["compact_stage1_seconds"]
    assert again["compact_psnr"] == figures["compact_psnr"] and "sharp_gain_db" not in again


def test_with_paper(run_fit):
    figures, printed = run_fit("--presets", "default", "--with-paper")
    assert {"speedup_2a", "speedup_2b", "psnr_gain_db", "bytes_per_scene", "speedup_stage2_sd"} <= figures.keys()
    assert figures["default_seconds_2a"] == figures["sd_seconds_2a"]
    rows = figures["methods"]
    assert list(rows) == ["paper", "sd", "sd, 2b in mode cohort", "default"]
    assert figures["default_minus_paper_db"] == figures["default_psnr"] - rows["paper"]["psnr"]
    assert "| default_minus_paper_db |" in printed and "| sd, 2b in mode cohort |" in printed


def test_triplanes_differ_from_sharp_in_their_planes_alone(frontier):
    sharp, planes = (frontier.method_settings(name) for name in ("sharp", "same_field_triplanes"))
    shape = {"micro_features": 32, "macro_features": 0, "num_base_planes": 0, "resolution": 64}
    assert planes.representation.model_dump() == sharp.representation.model_dump() | shape
    assert planes.rendering == sharp.rendering
    assert planes.stage1.warmup == frontier.method_settings("rgb_triplanes").stage1.warmup
    assert planes.stage2.latent == sharp.stage2.latent and planes.stage2.micro_dtype == "int8"
    assert planes.autoencoder.is_identity


def test_plain_triplanes_are_summed_and_have_one_hidden_layer(frontier):
    shape = frontier.method_settings("rgb_triplanes").representation
    assert (shape.combine, shape.field_layers, shape.field_width) == ("sum", 1, 64)


def test_steps_that_take_as_long(frontier, tiny):
    """100 steps of 2 s, now 3 s each, and 2b's 30 s: as long as 33 steps of 10 s. Scenes that end early: 200 + 30 s."""
    clock = frontier.StepClock(steps=100, seconds=200.0, rgb_seconds=30.0)
    assert frontier.same_time_steps(tiny["sharp"], clock, own_pace=3.0, pace=10.0) == 33
    ends = frontier.over(tiny["sharp"], stage2={"latent": {"check_every": 2}})
    assert frontier.same_time_steps(ends, clock, own_pace=3.0, pace=10.0) == 23
    longer = frontier.with_steps(ends, 33.4).stage2.latent
    assert longer.steps_per_epoch == 33 and longer.check_every is None


@pytest.mark.parametrize(
    ("methods", "uncarved", "why"),
    [
        (["same_field_triplanes"], None, "sharp"),
        (["paper"], None, "cohort"),
        (["nothing"], None, "no preset"),
        (["sharp"], "compact", "--uncarved"),
    ],
)
def test_what_cannot_be_compared(frontier, methods, uncarved, why):
    with pytest.raises(SettingsError, match=why):
        frontier.check_methods(methods, uncarved)


@pytest.mark.parametrize(
    ("train", "fit", "sizes"),
    [
        ("train", "fit", (32, 8)),
        ("planes-train", "planes-fit", (16, 8)),
        ("cars-choose-train", "cars-choose-fit", (16, 8)),
    ],
)
def test_lists_of_scenes(train, fit, sizes):
    """No list of stage 1 holds a scene that is fitted, and settings are chosen on others."""
    first, second = (read_ids(FOLDER / "scenes" / f"{name}.txt") for name in (train, fit))
    assert (len(first), len(second)) == sizes and not set(first) & set(second)
    if train != "train":
        known = {scene_id for name in ("train", "fit") for scene_id in read_ids(FOLDER / "scenes" / f"{name}.txt")}
        assert not known & {*first, *second}
