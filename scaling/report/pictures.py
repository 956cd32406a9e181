"""The report's pictures: scenes beside their truth, base planes, and what lies between two scenes; all as data URIs."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scaling.api.scenes import Scene
from scaling.cameras import look_at_origin, normalised_intrinsics, orbit
from scaling.data.png import encode_png
from scaling.data.scene_views import SceneViews
from scaling.library.true_views import stored_views
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, hull_between
from scaling.pictures.draw import ELEVATION, Pixels, error_image, some_test_views, to_pixels
from scaling.report.figures import RunFigures
from scaling.training.evaluate import render_views

VIEWS = 3  # of a scene
STEPS = 7  # of an interpolation, both ends among them
MOST_BASE_PLANES = 16
MOST_CANDIDATES = 300  # for the two ends of an interpolation
AZIMUTH = math.radians(35.0)  # of the camera that sees an interpolation


@dataclass(frozen=True)
class Strip:
    """A row of pictures. label: what they show; pictures: data URIs; run: the index of the run whose colour the label
    has; note: below the label."""

    label: str
    pictures: Sequence[str]
    run: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Strips below each other; heads: over their columns; notes: sentences that go with it."""

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
    """The best, the median and the worst scene by the mean of the runs' test PSNR, among the scenes that all of them
    fitted: truth beside what each run renders, and of a single run its autoencoder and its error, too."""
    found = [run.psnr() for run in runs]
    common = {scene_id: [of[scene_id] for of in found] for scene_id in found[0] if all(scene_id in of for of in found)}
    order = sorted(common, key=lambda scene_id: (-float(np.mean(common[scene_id])), scene_id))
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    chosen = {order[place]: name for name, place in reversed(places.items())} if order else {}
    return [_scene_sheet(runs, scene_id, chosen[scene_id]) for scene_id in reversed(chosen)]


def _scene_sheet(runs: Sequence[RunFigures], scene_id: str, which: str) -> Sheet:
    scenes = [run.library[scene_id] for run in runs]
    views, note = _views(runs[0], scenes[0])
    if views is None:
        poses, intrinsics, truth = orbit(VIEWS, 1.3), normalised_intrinsics(1.02).expand(VIEWS, 3, 3), None
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
    """What the autoencoder makes of the truth, and where the render is wrong."""
    strips = []
    if not shared.autoencoder.is_identity:
        encoded = shared.autoencoder.encode(truth.to(shared.device))
        strips.append(_strip("autoencoder", shared.autoencoder.decode(encoded)))
    return [*strips, _strip("error", error_image(truth, rendered))]


def _views(run: RunFigures, scene: Scene) -> tuple[SceneViews | None, str]:
    """A scene's views; where they cannot be read, none and a sentence why."""
    try:
        return stored_views(run.run, scene.scene_id, scene.stage, scene.shared.settings.data), ""
    except (OSError, ValueError) as error:
        return None, f"The truth is not shown, as it cannot be read: {error}"


# ---------------------------------------------------------------------- base planes


def base_plane_sheet(run: RunFigures) -> Sheet | None:
    """The base planes that scenes use most; their features as colours by three principal components, the same for all
    planes. None where there are none."""
    model = run.library[_typical(run)].shared
    if not model.base_planes.numel():
        return None
    base = model.base_planes.detach().cpu().float()
    use = (model.coefs_mean.square() + model.coefs_std.square()).sqrt().cpu() * base.square().mean((1, 2, 3, 4)).sqrt()
    order = use.argsort(descending=True)[:MOST_BASE_PLANES].tolist()
    pixels = principal_colours(base)
    axes = model.settings.representation.plane_axes
    # The second axis of a plane runs along its height: it points up here, as in a drawing.
    strips = [Strip(axis, [data_uri(pixels[k, p, ::-1]) for k in order]) for p, axis in enumerate(axes)]
    of = f" of {len(base)}" if len(base) > len(order) else ""
    notes = [
        f"{len(order)}{of} base tri-planes, the most used ones first, each with its share of what coefs and the "
        "planes' size come to. Colours are the first three principal components of the "
        f"{base.shape[2]} features; each plane has {base.shape[3]} by {base.shape[4]} texels."
    ]
    if run.rows["cohort"].null_count < len(run.rows):
        notes.append(f"Those of the cohort of scene {_typical(run)}: each cohort fine-tunes a copy of its own.")
    heads = [f"B{k + 1}, {100 * use[k] / use.sum().clamp(min=1e-12):.0f} %" for k in order]
    return Sheet("", strips, heads, notes)


def principal_colours(planes: Tensor) -> Pixels:
    """[M, P, F, H, W] → [M, P, H, W, 3]: the first three principal components of the features over all texels, each
    stretched over 98 % of its values; fewer features than three leave channels at the middle."""
    texels = planes.movedim(2, -1).reshape(-1, planes.shape[2]).double()
    centred = texels - texels.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = centred @ (axes * largest.sign())  # a sign of its own would flip the colours from one machine to the next
    low, high = (torch.quantile(_some(values), q, dim=0) for q in (0.01, 0.99))
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(values), 3), 0.5, dtype=torch.float64)
    colours[:, : values.shape[1]] = values
    shape = (*planes.shape[:2], *planes.shape[3:], 3)
    return (colours * 255).round().byte().reshape(shape).numpy()


def _some(values: Tensor, most: int = 1_000_000) -> Tensor:
    """torch.quantile takes no more than 16 million numbers."""
    return values[:: max(1, len(values) // most)]


def _typical(run: RunFigures) -> str:
    """A scene of median test PSNR; any where none has one."""
    psnr = run.psnr()
    order = sorted(psnr, key=lambda scene_id: (psnr[scene_id], scene_id))
    return order[len(order) // 2] if order else run.rows["scene_id"][0].as_py()


# ---------------------------------------------------------------------- interpolation


@torch.no_grad()
def interpolation_sheet(run: RunFigures) -> Sheet | None:
    """From one scene to another in equal steps: coefs and micro planes, and coefs alone, without any micro planes. None
    where no two scenes stand on the same model."""
    ends = _ends(run)
    if ends is None:
        return None
    first, last = (run.library[scene_id] for scene_id in ends)
    views, _ = _views(run, first)
    radius, focal = 1.3, 1.02
    if views is not None:
        radius = views.cam2world[:, :3, 3].norm(dim=1).median().item()
        focal = views.intrinsics[:, 0, 0].median().item()
    camera = look_at_origin(torch.tensor([AZIMUTH]), torch.tensor([ELEVATION]), torch.tensor([radius]))
    intrinsics = normalised_intrinsics(focal)[None]
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
    """Linear: 0 is the first scene, 1 the last. What lies between them may be where either is."""
    micro = torch.lerp(first.micro_planes, last.micro_planes, place)
    return SceneParams(micro, torch.lerp(first.coefs, last.coefs, place), hull_between(first, last, place))


def _ends(run: RunFigures) -> tuple[str, str] | None:
    """Of the better half of the scenes that share the typical scene's model, the two whose coefs differ most."""
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
