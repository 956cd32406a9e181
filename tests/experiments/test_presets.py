"""Every preset goes through both stages for two steps a phase, and paper says what the paper says."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import AutoencoderKL

from scaling.cli import PRESETS, read_preset
from scaling.config import Settings, flatten, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models.shared_model import SharedModel
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_cohort import fit_cohort
from scaling.training.fit_frozen import FittedScene, fit_scenes
from scaling.training.stage1 import Stage1, active_phases


@pytest.fixture(scope="module")
def saved_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small autoencoder that shrinks 8 times, as Stable Diffusion's does, saved as a diffusers folder."""
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(2, 4, 4, 4), norm_num_groups=2, latent_channels=4, mid_block_add_attention=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def two_steps(preset: str, autoencoder: str) -> Settings:
    values: dict[str, Any] = read_preset(preset)
    if make_settings(values).autoencoder.pretrained:
        values = merge(values, {"autoencoder": {"pretrained": autoencoder}})
    full = make_settings(values)
    short: dict[str, Any] = {"data": {"embedded_views": 6}, "stage1": {}, "stage2": {}}
    phases = {"stage1": ("autoencoder", "warmup", "joint", "adapt", "distil"), "stage2": ("latent", "rgb")}
    for stage, names in phases.items():
        for name in names:
            phase = getattr(getattr(full, stage), name)
            if phase.num_epochs:
                short[stage][name] = {"num_epochs": 1, "steps_per_epoch": 2}
                if stage == "stage1":
                    short[stage][name]["items_per_step"] = full.stage1.num_buckets
    return make_settings(merge(values, short))


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_preset_runs_both_stages(preset, saved_autoencoder, tmp_path):
    """Stage 2 in the preset's own mode; sd in both modes."""
    settings = two_steps(preset, saved_autoencoder)
    ids = embedded_ids(6)
    views = [embedded_scene(scene_id, settings.data.image_size, 6) for scene_id in ids]
    phases: list[str] = []
    stage1 = Stage1(settings, ids[:4], views[:4])
    stage1.run(lambda report: phases.append(report.phase))
    assert phases == active_phases(settings)
    shared, shape = stage1.shared.requires_grad_(False).eval(), settings.representation
    results: list[tuple[SharedModel, FittedScene]] = []
    if settings.stage2.mode == "frozen":
        results.append((shared, fit_scenes(shared, views[4:], settings)[0]))
    if settings.stage2.mode == "cohort" or preset == "sd":
        cohort = fit_cohort(shared, shared.content_hash(), views[4:], settings, tmp_path)
        assert {name.split(".")[0] for name in cohort.tuned} == {"base_planes", "field", "decoder"}
        results.append((cohort.shared, cohort.scenes[0]))
    for model, fitted in results:
        assert fitted.params.micro_planes.shape == (3, shape.micro_features, shape.resolution, shape.resolution)
        assert fitted.params.coefs.shape == (shape.num_base_planes,)
        metrics = evaluate_scene(model, fitted.params[None], views[4])
        assert 0 < metrics["psnr"] < 60
        assert (metrics["autoencoder_psnr"] is None) == settings.autoencoder.is_identity


@pytest.mark.parametrize(
    ("preset", "pixels", "micro", "macro", "num_base"),
    [
        ("paper", False, 10, 22, 50),
        ("ulw", False, 0, 32, 50),
        ("micro_only", False, 32, 0, 0),
        ("m1", False, 10, 22, 1),
        ("rgb_micro_macro", True, 10, 22, 50),
        ("rgb_triplanes", True, 32, 0, 0),
    ],
)
def test_variants_are_the_papers(preset, pixels, micro, macro, num_base):
    settings = make_settings(read_preset(preset))
    shape = settings.representation
    found = (settings.autoencoder.is_identity, shape.micro_features, shape.macro_features, shape.num_base_planes)
    assert found == (pixels, micro, macro, num_base)


def test_paper_is_the_published_method():
    paper = make_settings(read_preset("paper"))
    shape = paper.representation
    assert (shape.micro_features, shape.macro_features, shape.num_base_planes, shape.resolution) == (10, 22, 50, 64)
    assert shape.plane_axes == ["xy", "xz", "zx"] and shape.box_side == 2.0
    assert (paper.rendering.samples, paper.rendering.importance_samples) == (48, 48)
    assert paper.autoencoder.latent_scale == 0.02
    assert active_phases(paper) == ["warmup", "joint"]
    warmup, joint = paper.stage1.warmup, paper.stage1.joint
    assert (warmup.num_epochs, warmup.items_per_step, joint.num_epochs, joint.items_per_step) == (50, 128, 50, 8)
    assert (warmup.tv_weight, joint.tv_weight) == (1e-4 * 128, 1e-4 * 8)
    assert joint.lr.model_dump() == {
        "encoder": 1e-4, "decoder": 1e-4, "field": 1e-4, "base_planes": 1e-2, "micro_planes": 1e-4, "coefs": 1e-2,
        "student": 0.0,
    }  # fmt: skip
    latent, rgb = paper.stage2.latent, paper.stage2.rgb
    assert (latent.num_epochs, latent.items_per_step, latent.lr_decay) == (30, 32, 0.94157)
    assert (rgb.num_epochs, rgb.items_per_step, rgb.lr_decay) == (50, 8, 0.94157)
    assert (paper.stage2.mode, paper.stage2.cohort_size, paper.stage2.start) == ("cohort", None, "random")
    assert paper.precision == "float32"


def test_no_default_of_ours_can_change_paper():
    """Every key of its phases and of the representation and rendering is written in the file itself."""
    values = read_preset("paper")
    written, known = flatten(values), flatten(make_settings(values).model_dump())
    sections = (
        "autoencoder.pretrained",
        "autoencoder.latent_scale",
        "representation.",
        "rendering.",
        "stage1.warmup.",
        "stage1.joint.",
        "stage2.latent.",
        "stage2.rgb.",
    )
    assert [key for key in known if key.startswith(sections) and key not in written] == []
