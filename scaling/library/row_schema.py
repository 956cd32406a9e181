"""The columns of a library's rows. Without torch: commands that only read tables start in half the time."""

from __future__ import annotations

import pyarrow as pa

# Older versions. 1: part names without epoch and attempt, no manifest; 2: no compression, float64 metrics, no int4;
# 3: no hulls, whole numbers as int8 or two in a byte; 4: Huffman codes, deflated hulls.
FORMAT_VERSION = 5
METRICS = (
    "psnr", "ssim", "lpips", "train_psnr", "train_ssim", "autoencoder_psnr", "autoencoder_ssim", "mean_image_psnr",
    "latent_psnr", "ms_ssim", "flip", "train_ms_ssim", "train_flip", "autoencoder_ms_ssim", "autoencoder_flip",
)  # fmt: skip
LATER_METRICS = METRICS[METRICS.index("ms_ssim") :]  # older parts lack these columns
PLANES = ("micro_planes", "micro_dtype", "micro_shape", "micro_scale", "coefs", "hull")
SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("category", pa.string()),
        ("stage", pa.int8()),
        ("shared", pa.string()),
        ("cohort", pa.string()),
        ("micro_planes", pa.large_binary()),
        ("micro_dtype", pa.string()),
        ("micro_shape", pa.list_(pa.int32())),
        ("micro_scale", pa.list_(pa.float32())),
        ("coefs", pa.list_(pa.float32())),
        ("hull", pa.large_binary()),
        *[(name, pa.float32()) for name in METRICS],
        ("seconds", pa.float32()),
        ("settings_hash", pa.string()),
        ("seed", pa.int64()),
        ("format_version", pa.int32()),
    ]
)
