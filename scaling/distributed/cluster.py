"""The Ray cluster: joins one or starts a local one, and says what it has."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray

OBJECT_STORE_BYTES = 512 << 20  # of a local cluster: a few batches of views; results go to disk, not through it


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all."""

    cpus: int
    gpus: int


def connect(address: str | None = None) -> Resources:
    """Joins the cluster at `address` or at RAY_ADDRESS, else starts a local one on this machine.

    Raises ConnectionError where the named cluster does not answer.
    """
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            ray.init(address=address, **quiet)
        else:
            # A cluster of this process alone, on loopback: nobody else has to prove who they are.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 0)), int(found.get("GPU", 0)))


@dataclass(frozen=True)
class Share:
    """What each of a number of equal workers gets: Ray's logical resources, and threads on a CPU."""

    workers: int
    cpus: float
    gpus: int
    threads: int


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`, or 1."""
    return max((d for d in range(1, at_most + 1) if number % d == 0), default=1)


def share(resources: Resources, wanted: int | None, reserve_cpu: bool) -> Share:
    """Divides the cluster between equal workers: one GPU each, or a share of the CPUs where there is no GPU.

    reserve_cpu leaves one CPU to Ray Data's readers. Raises ValueError where more workers than GPUs are wanted.
    """
    if resources.gpus:
        workers = wanted or resources.gpus
        if workers > resources.gpus:
            raise ValueError(f"{workers} workers need a GPU each, but the cluster has {resources.gpus}")
        return Share(workers, 0, 1, max(1, resources.cpus // workers))
    workers = wanted or 1
    cpus = max(resources.cpus - reserve_cpu, 1) / workers
    return Share(workers, round(cpus, 4) if cpus < 1 else int(cpus), 0, max(1, resources.cpus // workers))
