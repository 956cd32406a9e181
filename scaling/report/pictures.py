"""The report's pictures, as data URIs: scenes beside their true views, base planes, interpolations of two scenes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scaling.api.scenes import Scene
from scaling.data.png import encode_png
from scaling.data.scene_views import SceneViews
from scaling.library.true_views import stored_views
from scaling.library.viewpoints import Viewpoints
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, hull_between
from scaling.pictures.draw import ELEVATION, Pixels, error_image, some_test_views, to_pixels
from scaling.report.figures import RunFigures
from scaling.training.evaluate import render_views

VIEWS = 3  # shown of a scene
STEPS = 7  # of an interpolation, both ends included
MOST_BASE_PLANES = 16
MOST_CANDIDATES = 300  # scenes that are compared, all pairs, to find the two ends of an interpolation
AZIMUTH = math.radians(35.0)  # of the camera that renders an interpolation


@dataclass(frozen=True)
class Strip:
    """A row of pictures. label: what they show; pictures: data URIs; run: index of the run whose colour marks the
    label, None for no mark; note: text below the label."""

    label: str
    pictures: Sequence[str]
    run: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Strips below each other. heads: titles of the columns; notes: sentences below the strips."""

    title: str
    strips: Sequence[Strip]
    heads: Sequence[str] = ()
    notes: Sequence[str] = ()


def data_uri(image: Pixels) -> str:
    """An image [H, W, 3] as a PNG inside a URI."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(np.ascontiguousarray(image))).decode()}"


def _strip(label: str, images: Tensor, run: int | None = None, note: str = "") -> Strip:
    return Strip(label, [data_uri(image) for image in to_pixels(images)], run, note)


# ---------------------------------------------------------------------- scenes


def scene_sheets(runs: Sequence[RunFigures]) -> list[Sheet]:
    """Sheets of the best, the median and the worst scene: the true views and the renders of each run.

    Scenes are ranked by test PSNR, the mean over the runs; only scenes that every run fitted are ranked. A sheet of a
    single run also shows the output of its autoencoder and the error of its render.
    """
    found = [run.psnr() for run in runs]
    common = {scene_id: [of[scene_id] for of in found] for scene_id in found[0] if all(scene_id in of for of in found)}
    order = sorted(common, key=lambda scene_id: (-float(np.mean(common[scene_id])), scene_id))
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    chosen = {order[place]: name for name, place in reversed(places.items())} if order else {}
    return [_scene_sheet(runs, scene_id, chosen[scene_id]) for scene_id in reversed(chosen)]


def _scene_sheet(runs: Sequence[RunFigures], scene_id: str, which: str) -> Sheet:
    scenes = [run.library[scene_id] for run in runs]
    views, note = _views(runs[0], scenes[0])
    if views is None:  # the renders are shown without the truth, from around the scene
        around = Viewpoints.around(scenes[0].shared.renderer.box)
        (poses, intrinsics), truth = around.cameras("ring", VIEWS), None
    else:
        seen = some_test_views(views, VIEWS)
        poses, intrinsics, truth = views.cam2world[seen], views.intrinsics[seen], views.images[seen]
    strips = [] if truth is None else [_strip("truth", truth)]
    for run, scene in zip(runs, scenes):
        rendered = scene.render(poses, intrinsics)
        if len(runs) > 1:
            strips.append(_strip(run.label, rendered, runs.index(run), f"{scene.metrics['psnr']:.2f} dB"))
        else:
            strips.append(_strip("render", rendered))
            strips += [] if truth is None else _checks(scene.shared, truth, rendered)
    return Sheet(f"{which}: {scene_id}", strips, notes=[_figures(scenes[0])] * (len(runs) == 1) + [note] * bool(note))


def _figures(scene: Scene) -> str:
    told = {
        "psnr": "test PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "ms_ssim": "MS-SSIM {:.3f}", "flip": "FLIP {:.3f}",
        "lpips": "LPIPS {:.3f}", "autoencoder_psnr": "autoencoder {:.2f} dB",
    }  # fmt: skip
    return ", ".join(form.format(scene.metrics[key]) for key, form in told.items() if scene.metrics[key] is not None)


@torch.no_grad()
def _checks(shared: SharedModel, truth: Tensor, rendered: Tensor) -> list[Strip]:
    """Two strips: the truth, encoded and decoded (left out where latents are the pixels), and the render's error."""
    strips = []
    if not shared.autoencoder.is_identity:
        encoded = shared.autoencoder.encode(truth.to(shared.device))
        strips.append(_strip("autoencoder", shared.autoencoder.decode(encoded)))
    return [*strips, _strip("error", error_image(truth, rendered))]


def _views(run: RunFigures, scene: Scene) -> tuple[SceneViews | None, str]:
    """A scene's true views and ""; where they cannot be read, None and a sentence that says why."""
    try:
        return stored_views(run.run, scene.scene_id, scene.stage, scene.shared.settings.data), ""
    except (OSError, ValueError) as error:
        return None, f"The truth is not shown, as it cannot be read: {error}"


# ---------------------------------------------------------------------- base planes


def base_plane_sheet(run: RunFigures) -> Sheet | None:
    """A sheet of the base planes that scenes use most; None where the model has no base planes.

    Colours are the first three principal components of the features, the same three for all planes.
    """
    model = run.library[_typical(run)].shared
    if not model.base_planes.numel():
        return None
    base = model.base_planes.detach().cpu().float()
    use = (model.coefs_mean.square() + model.coefs_std.square()).sqrt().cpu() * base.square().mean((1, 2, 3, 4)).sqrt()
    order = use.argsort(descending=True)[:MOST_BASE_PLANES].tolist()
    pixels = principal_colours(base)
    axes = model.settings.representation.plane_axes
    # A plane's second axis runs along its height. Rows are flipped, so that this axis points up, as in a drawing.
    strips = [Strip(axis, [data_uri(pixels[k, p, ::-1]) for k in order]) for p, axis in enumerate(axes)]
    of = f" of {len(base)}" if len(base) > len(order) else ""
    notes = [
        f"{len(order)}{of} base tri-planes, the most used ones first, each with its share of the total use. Use is the "
        "root mean square of a plane's coefs times that of its values. Colours are the first three principal "
        f"components of the {base.shape[2]} features; each plane has {base.shape[3]} by {base.shape[4]} texels."
    ]
    if run.rows["cohort"].null_count < len(run.rows):
        notes.append(f"These belong to the cohort of scene {_typical(run)}: each cohort fine-tunes a copy of its own.")
    heads = [f"B{k + 1}, {100 * use[k] / use.sum().clamp(min=1e-12):.0f} %" for k in order]
    return Sheet("", strips, heads, notes)


def principal_colours(planes: Tensor) -> Pixels:
    """Colours of planes: the first three principal components of the features over all texels.

    [M, P, F, H, W] → [M, P, H, W, 3], uint8. The range of a channel spans the middle 98 % of its component's values.
    With fewer than three features the channels that are left over are 128.
    """
    texels = planes.movedim(2, -1).reshape(-1, planes.shape[2]).double()
    centred = texels - texels.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = centred @ (axes * largest.sign())  # eigh leaves signs open: fixed, colours agree between machines
    low, high = (torch.quantile(_some(values), q, dim=0) for q in (0.01, 0.99))
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(values), 3), 0.5, dtype=torch.float64)
    colours[:, : values.shape[1]] = values
    shape = (*planes.shape[:2], *planes.shape[3:], 3)
    return (colours * 255).round().byte().reshape(shape).numpy()


def _some(values: Tensor, most: int = 1_000_000) -> Tensor:
    """Evenly spread rows, fewer than 2 · `most`: torch.quantile takes no more than 16 million numbers."""
    return values[:: max(1, len(values) // most)]


def _typical(run: RunFigures) -> str:
    """The scene of median test PSNR; the first scene where none has a test PSNR."""
    psnr = run.psnr()
    order = sorted(psnr, key=lambda scene_id: (psnr[scene_id], scene_id))
    return order[len(order) // 2] if order else run.rows["scene_id"][0].as_py()


# ---------------------------------------------------------------------- interpolation


@torch.no_grad()
def interpolation_sheet(run: RunFigures) -> Sheet | None:
    """A sheet that goes from one scene to another in equal steps; None where no two scenes belong to the same model.

    The first strip interpolates coefs and micro planes, the second one coefs alone, without any micro planes.
    """
    ends = _ends(run)
    if ends is None:
        return None
    first, last = (run.library[scene_id] for scene_id in ends)
    # The camera has the distance and the focal length of the true views; without these, those of the turntables.
    views, _ = _views(run, first)
    seen = Viewpoints.around(first.shared.renderer.box) if views is None else Viewpoints.of(views)
    camera, intrinsics = (matrix.float()[None] for matrix in seen.camera(AZIMUTH, ELEVATION))
    places = torch.linspace(0, 1, STEPS).tolist()
    path = [_between(first.params, last.params, place) for place in places]

    def rendered(steps: Sequence[SceneParams]) -> Tensor:
        return torch.cat([render_views(first.shared, params, camera, intrinsics)["images"] for params in steps])

    has_micro, has_coefs = first.params.micro_planes.numel() > 0, first.params.coefs.numel() > 0
    label = " and ".join(["coefs"] * has_coefs + ["micro planes"] * has_micro)
    strips = [_strip(label, rendered(path))]
    if has_micro and has_coefs:
        alone = [replace(params, micro_planes=torch.zeros_like(params.micro_planes)) for params in path]
        strips.append(_strip("coefs alone", rendered(alone)))
    heads = [first.scene_id, *(f"{place:.2f}" for place in places[1:-1]), last.scene_id]
    return Sheet("", strips, heads)


def _between(first: SceneParams, last: SceneParams, place: float) -> SceneParams:
    """The linear interpolation of two scenes: place 0 is the first, 1 the last. Between them the hull is the union of
    both hulls."""
    micro = torch.lerp(first.micro_planes, last.micro_planes, place)
    return SceneParams(micro, torch.lerp(first.coefs, last.coefs, place), hull_between(first, last, place))


def _ends(run: RunFigures) -> tuple[str, str] | None:
    """The two scenes whose coefs differ most, among the better half (by test PSNR) of the scenes that share the typical
    scene's model. None where there are fewer than two."""
    rows = run.run.library.table(["scene_id", "stage", "psnr", "shared", "cohort", "coefs"]).to_pylist()
    rows = [row for row in rows if row["stage"] == run.stage]
    typical = next(row for row in rows if row["scene_id"] == _typical(run))
    rows = [row for row in rows if (row["shared"], row["cohort"]) == (typical["shared"], typical["cohort"])]
    psnr = run.psnr()
    rows.sort(key=lambda row: (-psnr.get(row["scene_id"], -math.inf), row["scene_id"]))
    better = rows[: min(MOST_CANDIDATES, max(2, math.ceil(len(rows) / 2)))]
    if len(better) < 2:
        return None
    coefs = np.array([row["coefs"] for row in better], dtype=np.float64)
    apart = np.linalg.norm(coefs[:, None] - coefs[None], axis=2)
    first, last = np.unravel_index(apart.argmax(), apart.shape) if apart.any() else (0, 1)
    return better[first]["scene_id"], better[last]["scene_id"]
