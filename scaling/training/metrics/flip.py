"""FLIP: the error that an eye sees when two images alternate on a screen (Andersson et al., 2020).

The colours of both images are blurred as an eye at a distance blurs them, and compared in a space in which equal
distances look equal. Where edges and points of one image are missing in the other, the colour error weighs more.

NVIDIA's program takes 45 ms of a CPU core for a view of 128² pixels, and the view must leave the GPU for it. This one
takes a batch on the images' device. The tests compare the two.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180  # FLIP's own: at 0.7 m from a screen 0.7 m wide, of 3840 pixels
CHUNK = 16  # images at a time: FLIP needs about twenty times their memory

# Contrast sensitivity of the eye: a sum of Gaussians a √(π/b) exp(−π² r²/b) of the angle r in degrees, (a, b) each.
SENSITIVITY = (
    ((1.0, 0.0047),),  # light and dark
    ((1.0, 0.0053),),  # red and green
    ((34.1, 0.04), (13.5, 0.025)),  # blue and yellow
)
FEATURE_WIDTH = 0.082  # degrees: the width of what an eye sees as an edge or a point
COLOUR_EXPONENT, FEATURE_EXPONENT = 0.7, 0.5
KNEE, KNEE_ERROR = 0.4, 0.95  # differences up to KNEE times the largest one map to [0, KNEE_ERROR]

RGB_TO_XYZ = (
    (0.4123865632529917, 0.3575914909206253, 0.18045049120356368),
    (0.21263682167732384, 0.7151829818412507, 0.07218019648142547),
    (0.019330620152483987, 0.11919716364020845, 0.9503725870054354),
)  # linear sRGB, D65


def flip(images: Tensor, truth: Tensor) -> Tensor:
    """Mean FLIP error of each image, in [0, 1]; 0: no visible difference. [B, 3, H, W] twice, sRGB in [0, 1] → [B]."""
    pairs = torch.stack([images, truth]).float().clamp(0, 1)
    return torch.cat([_errors(part).flatten(1).mean(1) for part in pairs.split(CHUNK, dim=1)])


def _errors(pairs: Tensor) -> Tensor:
    """Error maps [B, H, W] of pairs of images [2, B, 3, H, W]."""
    opponent = _opponent(_xyz(_linear(pairs)))
    colours = _colour_error(opponent)
    features = _feature_error((opponent[:, :, 0] + 16) / 116)
    return colours ** (1 - features)


# ---------------------------------------------------------------------- colours


def _colour_error(opponent: Tensor) -> Tensor:
    """Opponent colours [2, B, 3, H, W] → colour differences as an eye at a distance sees them, [B, H, W] in [0, 1]."""
    seen = _hunt(_xyz(_rgb(_blurred(opponent)).clamp(0, 1)))
    extremes = torch.eye(3, device=opponent.device)[1:, None, :, None, None]  # green and blue differ most
    largest = _distance(_hunt(_xyz(extremes)))
    difference, knee = _distance(seen), KNEE * largest
    below = KNEE_ERROR / knee * difference
    above = KNEE_ERROR + (1 - KNEE_ERROR) * (difference - knee) / (largest - knee)
    return torch.where(difference < knee, below, above)


def _linear(rgb: Tensor) -> Tensor:
    """sRGB → linear light."""
    return torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def _mixed(matrix: Tensor, colours: Tensor) -> Tensor:
    """Multiply colours [..., 3, H, W] by a 3 × 3 matrix."""
    return (matrix.to(colours) @ colours.flatten(-2)).view_as(colours)


def _xyz(rgb: Tensor) -> Tensor:
    """Linear light → XYZ, as fractions of white."""
    matrix = torch.tensor(RGB_TO_XYZ, dtype=torch.float64)
    return _mixed(matrix / matrix.sum(1, keepdim=True), rgb)


def _opponent(xyz: Tensor) -> Tensor:
    """Fractions of white → YCxCz: light and dark, red and green, blue and yellow."""
    x, y, z = xyz.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def _rgb(opponent: Tensor) -> Tensor:
    """YCxCz → linear light: the inverse of `_xyz` and `_opponent`."""
    light, red_green, blue_yellow = opponent.unbind(-3)
    y = (light + 16) / 116
    matrix = torch.tensor(RGB_TO_XYZ, dtype=torch.float64)
    white = torch.stack([y + red_green / 500, y, y - blue_yellow / 200], -3)
    return _mixed((matrix / matrix.sum(1, keepdim=True)).inverse(), white)


def _hunt(xyz: Tensor) -> Tensor:
    """Fractions of white → CIE L*a*b*, with colours weakened where it is dark (Hunt effect)."""
    bend = 6 / 29
    x, y, z = torch.where(xyz > bend**3, xyz.clamp(min=0) ** (1 / 3), xyz / (3 * bend**2) + 4 / 29).unbind(-3)
    light = 116 * y - 16
    return torch.stack([light, 0.01 * light * 500 * (x - y), 0.01 * light * 200 * (y - z)], -3)


def _distance(lab: Tensor) -> Tensor:
    """HyAB distance, which is valid for large differences too, to the power of COLOUR_EXPONENT.

    Pairs [2, B, 3, H, W] → [B, H, W].
    """
    light, red_green, blue_yellow = (lab[0] - lab[1]).unbind(-3)
    return (light.abs() + torch.hypot(red_green, blue_yellow)) ** COLOUR_EXPONENT


# ---------------------------------------------------------------------- filters


def _feature_error(light: Tensor) -> Tensor:
    """Lightness [2, B, H, W] in [0, 1] → edges or points that only one image shows, [B, H, W] in [0, 1]."""
    strengths = []
    for kind in ("edge", "point"):
        across = _filtered(light, "smooth", kind)
        down = _filtered(light, kind, "smooth")
        strengths.append(torch.hypot(across, down))
    edge, point = ((strength[0] - strength[1]).abs() for strength in strengths)
    return (torch.maximum(edge, point) / math.sqrt(2)) ** FEATURE_EXPONENT


def _blurred(opponent: Tensor) -> Tensor:
    """Filter each channel by its contrast sensitivity; a filter's weights sum to 1."""
    channels = []
    for channel, gaussians in zip(opponent.unbind(-3), SENSITIVITY):
        # `_gaussian` divides taps by their sum; the sum's square, for two directions, goes back into the weight here.
        heights = [a * math.sqrt(math.pi / b) * _gaussian(b)[1] ** 2 for a, b in gaussians]
        parts = [height * _filtered(channel, b, b) for height, (_, b) in zip(heights, gaussians)]
        channels.append(sum(parts[1:], parts[0]) / sum(heights))
    return torch.stack(channels, -3)


def _filtered(images: Tensor, down: str | float, across: str | float) -> Tensor:
    """Filter [..., H, W] along the columns (`down`) and the rows (`across`); padding repeats the border."""
    height, width = images.shape[-2:]
    return _band(down, height, images.device) @ images @ _band(across, width, images.device).T


@functools.lru_cache(maxsize=64)
def _band(kind: str | float, size: int, device: torch.device) -> Tensor:
    """A filter of `size` values as a matrix [size, size].

    Matrix products in float32 are exact on every device, while convolutions may be rounded to TF32.
    """
    taps = _gaussian(kind)[0] if isinstance(kind, float) else _feature_taps(kind)
    radius = len(taps) // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset, tap in enumerate(taps.tolist()):
        places = torch.arange(size)
        matrix[places, (places + offset - radius).clamp(0, size - 1)] += tap
    return matrix.float().to(device)


def _gaussian(b: float) -> tuple[Tensor, float]:
    """Taps exp(−π² r²/b) divided by their sum, and the sum. All reach as far as the widest of SENSITIVITY."""
    widest = max(b for gaussians in SENSITIVITY for _, b in gaussians)
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    angles = torch.arange(-radius, radius + 1, dtype=torch.float64) / PIXELS_PER_DEGREE
    taps = torch.exp(-(math.pi**2) * angles.square() / b)
    return taps / taps.sum(), taps.sum().item()


def _feature_taps(kind: str) -> Tensor:
    """Taps of a Gaussian ("smooth"), or of its first ("edge") or second ("point") derivative.

    Positive taps sum to 1, negative ones to −1.
    """
    deviation = 0.5 * FEATURE_WIDTH * PIXELS_PER_DEGREE
    radius = math.ceil(3 * deviation)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-x.square() / (2 * deviation**2))
    if kind == "smooth":
        return taps / taps.sum()
    taps = -x * taps if kind == "edge" else (x.square() / deviation**2 - 1) * taps
    above, below = taps.clamp(min=0), taps.clamp(max=0)
    return above / above.sum() - below / below.sum()
