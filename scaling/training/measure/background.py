"""The background, that is, what a ray that meets nothing shows: measured on the views of stage 1's scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaling.models.shared_model import SharedModel
from scaling.training.measure.visual_hull import WHITE
from scaling.training.process_group import Workers
from scaling.training.training_scene import TrainingScene

VIEWS = 8  # of each scene
PRIOR = 5.0  # pseudo-count of the mean over all pixels, in every pixel: few views show background in the middle


@torch.no_grad()
def measure_background(shared: SharedModel, scenes: Sequence[TrainingScene], workers: Workers) -> Tensor:
    """The mean latent, for every latent pixel, of the views that are white there. → [h · w, C] in [0, 1].

    An image's latents differ over its background, as the encoder sees the image's border and, through its
    normalisation, the object. Planes cannot show this: it belongs to the image, not to the scene. A pixel that is white
    in no view takes the mean over all pixels. Where no view shows background, every pixel takes a white image's latent.
    """
    white = shared.autoencoder.background(shared.settings.data.image_size, shared.device)
    sums = torch.zeros_like(shared.background)
    counts = sums.new_zeros(len(sums), 1)
    for scene in scenes:
        spread = torch.linspace(0, scene.num_views - 1, min(VIEWS, scene.num_views)).round().long().tolist()
        latents = shared.autoencoder.encode(scene.float_images(spread)).flatten(2).transpose(1, 2)
        darkest = -torch.nn.functional.max_pool2d(-scene.images[spread].float().amin(1), shared.autoencoder.shrink)
        empty = (darkest >= WHITE).flatten(1)[..., None]
        sums += ((latents + 1) / 2 * empty).sum(0)
        counts += empty.sum(0)
    sums, counts = workers.sum(sums), workers.sum(counts)
    everywhere = sums.sum(0) / counts.sum() if counts.sum() > 0 else white
    return (sums + PRIOR * everywhere) / (counts + PRIOR)
