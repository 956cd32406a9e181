"""Random streams that depend on names, not on history: a resumed or re-sharded run draws the same numbers."""

from __future__ import annotations

import hashlib

import torch


def stream(*names: object) -> torch.Generator:
    """A CPU generator seeded by a hash of the names: stream(seed, "warmup", step, scene_id, …)."""
    digest = hashlib.blake2b("|".join(str(name) for name in names).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
