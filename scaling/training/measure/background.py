"""The background, that is, what a ray that meets nothing shows: measured on the views of stage 1's scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.training.measure.visual_hull import background_of, of_background
from scaling.training.process_group import Workers
from scaling.training.training_scene import TrainingScene

VIEWS = 8  # of each scene
PRIOR = 5.0  # pseudo-count of the mean over all pixels, in every pixel: few views show background in the middle


def common_colour(scenes: Sequence[SceneViews], workers: Workers) -> Tensor:
    """The colour [3] in [0, 1] that the background of most scenes has, channel by channel; white where none shows any.

    scenes: those of this worker. Every worker must call this function.
    """
    counts = torch.zeros(3, 256)
    for views in scenes:
        colour = background_of(views)
        if colour is not None:
            counts[torch.arange(3), (colour * 255).round().long()] += 1
    counts = workers.sum(counts.to(workers.device)).cpu()
    return counts.argmax(1) / 255 if counts.any() else torch.ones(3)


@torch.no_grad()
def measure_background(
    shared: SharedModel, scenes: Sequence[TrainingScene], colour: Tensor, workers: Workers
) -> Tensor:
    """The mean latent, for every latent pixel, of the views that show background there. → [h · w, C] in [0, 1].

    colour [3] in [0, 1]: the background's.

    An image's latents differ over its background, as the encoder sees the image's border and, through its
    normalisation, the object. Planes cannot show this: it belongs to the image, not to the scene. A pixel that shows
    background in no view takes the mean over all pixels. Where no view shows background, every pixel takes the latent
    of an image of its colour.
    """
    plain = shared.autoencoder.background(shared.settings.data.image_size, shared.device, colour)
    sums = torch.zeros_like(shared.background)
    counts = sums.new_zeros(len(sums), 1)
    for scene in scenes:
        spread = torch.linspace(0, scene.num_views - 1, min(VIEWS, scene.num_views)).round().long().tolist()
        latents = shared.autoencoder.encode(scene.float_images(spread)).flatten(2).transpose(1, 2)
        object_there = (~of_background(scene.float_images(spread), colour)).float()
        empty = (torch.nn.functional.max_pool2d(object_there, shared.autoencoder.shrink) == 0).flatten(1)[..., None]
        sums += ((latents + 1) / 2 * empty).sum(0)
        counts += empty.sum(0)
    sums, counts = workers.sum(sums), workers.sum(counts)
    everywhere = sums.sum(0) / counts.sum() if counts.sum() > 0 else plain
    return (sums + PRIOR * everywhere) / (counts + PRIOR)
