"""Settings that older versions of this program saved."""

from __future__ import annotations

from typing import Any

from scaling.config.section import merge

NOT_NAMED = {"pretrained": None, "subfolder": None, "revision": None}
PIXELS: dict[str, Any] = {  # what `representation.space: rgb` meant
    "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0, **NOT_NAMED},
    "stage1": {"autoencoder": {"lr": {"encoder": 0.0}}},
}


def as_noted(values: dict[str, Any]) -> dict[str, Any]:
    """Complete saved settings (nested plain values): keys that the saving version lacked get values that keep its
    behaviour."""
    before = {
        "representation": {
            "box_side": 1.05,
            "length_unit": "world",
            "combine": "sum",
            "field_width": 64,
            "field_layers": 1,
            "field_activation": "softplus",
        },
        "rendering": {"sampled": "cuboid", "background": "white"},
        "stage1": {"autoencoder": {"crop": None}, "adapt": {"crop": None}, "distil": {"num_epochs": 0}},
        "stage2": {
            "latent": {"check_every": None, "rounded_from": 1.0, "coefs_until": 1.0},
            "rgb": {"coefs_until": 1.0},
        },
    }
    return merge(before, _with_kind(values))


def _with_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Put autoencoder.kind in place of the older `representation.space`. Without a pre-trained autoencoder, subfolder
    and revision become null, as in today's presets: a run of theirs can only go on with equal settings."""
    known, shape = (values.get(name) for name in ("autoencoder", "representation"))
    if isinstance(known, dict) and "kind" in known:
        return values
    space = None
    if isinstance(shape, dict):
        space = shape.get("space")
        values = {**values, "representation": {key: value for key, value in shape.items() if key != "space"}}
    if space == "rgb":
        return merge(values, PIXELS)
    unnamed = isinstance(known, dict) and known.get("pretrained", "") is None
    return merge(values, {"autoencoder": {"kind": "kl", **(NOT_NAMED if unnamed else {})}})
