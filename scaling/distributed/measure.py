"""What Ray uses of its object store, for benchmarks."""

from __future__ import annotations

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address


class StoreUse:
    """Sampled use of the joined cluster's object stores, in bytes. Ray tells it to `ray memory` alone, hence the
    private names."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.spilled_bytes = 0
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)

    def sample(self) -> None:
        """Takes one sample."""
        stats = get_memory_info_reply(self._state).store_stats
        self.peak_bytes = max(self.peak_bytes, stats.object_store_bytes_used)
        self.spilled_bytes = stats.spilled_bytes_total
