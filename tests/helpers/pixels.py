"""Settings of a small model whose latents are pixels, without phases that need a decoder."""

PIXELS = {
    "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
    "stage1": {name: {"num_epochs": 0} for name in ("joint", "adapt", "distil")},
    "stage2": {"rgb": {"num_epochs": 0}},
}
