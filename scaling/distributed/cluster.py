"""Joins a Ray cluster or starts a local one, and divides its CPUs and GPUs between workers."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address
from ray.autoscaler.sdk import request_resources

from scaling.config import SettingsError
from scaling.storage.progress import waiting_for

MAX_SESSIONS_PATH = 40  # names of sockets may have 107 bytes, of which Ray's own part takes some 60
OBJECT_STORE_BYTES = 512 << 20  # of a local cluster: holds a few batches of views; results go to disk instead


@dataclass(frozen=True)
class Resources:
    """What the whole cluster has. gpus: those that are up, or gpus_asked if that is more; gpus_asked: GPUs requested
    from the autoscaler; node_cpus: CPUs of each machine, empty: one machine has them all."""

    cpus: int
    gpus: int
    gpus_asked: int = 0
    node_cpus: tuple[int, ...] = ()

    @property
    def machines(self) -> list[int]:
        """CPUs of each machine, in descending order."""
        return sorted(self.node_cpus or [self.cpus], reverse=True)


def connect(address: str | None = None, gpus: int = 0) -> Resources:
    """Join the cluster at `address` or at RAY_ADDRESS, else start a local one on this machine. → what it has.

    gpus: how many to request from the autoscaler; they count as present, although they may come up minutes later.
    Raises ConnectionError where the named cluster does not answer.
    """
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)  # ray.init replaces it by one that exits at once
        address = address or os.environ.get("RAY_ADDRESS")
        _check_reachable(address)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            try:
                with waiting_for(f"the Ray cluster at {address}"):
                    ray.init(address=address, **quiet)
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                raise _no_cluster(address, str(error).strip().splitlines()[0]) from error
        else:
            keep_to_this_machine()
            ray.init(
                address="local",
                num_cpus=max(2, usable_cpus()),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(private_folder()),
                **quiet,
            )
        # SIGTERM is again what the command made of it; only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if gpus:
        request_resources(bundles=[{"GPU": 1}] * gpus)
        atexit.register(request_resources, bundles=[])  # otherwise the machines stay up, and cost, after the job
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return Resources(sum(nodes), max(gpus, gpus_now()), gpus, tuple(nodes))


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPUs that this process may use: a job's share of a machine. The least of those that the kernel lets it run on
    and of its control group's quota, at least 1."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with suppress(OSError, ValueError):  # version 2: "200000 100000", or "max 100000"
        quota, period = (cgroup / "cpu.max").read_text().split()
        counts.append(int(quota) // int(period))
    with suppress(OSError, ValueError):  # version 1: −1 without a quota
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        counts.append(int(quota) // int(period) if int(quota) > 0 else counts[0])
    return max(1, min(counts))


def keep_to_this_machine() -> None:
    """Close a local cluster to other machines and users; call this before it starts.

    Whoever reaches a Ray cluster can run code in it. So it listens on loopback, and asks for a secret that no file
    holds and that this process's children inherit.
    """
    listen_on_loopback()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # in use unless RAY_AUTH_MODE says otherwise


def private_folder() -> Path:
    """A folder for Ray's sessions, with the logs and sockets of its processes, that other users cannot open. Ray's own
    default, /tmp/ray, is open to all of them.

    In RAY_TMPDIR or in the folder for temporary files. A folder of that name that is not this user's alone is not used.
    """
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    folder = Path(base, f"ray-{os.getuid()}")
    if len(str(folder)) > MAX_SESSIONS_PATH:
        folder = Path("/tmp", folder.name)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    return folder


def listen_on_loopback() -> None:
    """Make a cluster whose nodes are all on this machine unreachable from others; call this before it starts.

    Ray does this by itself on macOS and Windows, hence the variable's name. Processes that join need the variable, too.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported


def gpus_now() -> int:
    """GPUs of the nodes that are up."""
    return int(ray.cluster_resources().get("GPU", 0))


def _check_reachable(address: str | None) -> None:
    """Raise ConnectionError where nothing listens at the address: Ray itself would try for minutes.

    "auto" is resolved as Ray does, to the cluster that the last `ray start` on this machine noted; it may be long gone.
    """
    if address and address.startswith(("http://", "https://")):
        raise _no_cluster(address, "that is a dashboard, for `ray job submit`; a driver joins HOST:PORT or auto")
    resolved = canonicalize_bootstrap_address(address) if address == "auto" else address
    if address and not resolved:
        raise _no_cluster(address, "no cluster was started on this machine")
    host, _, port = (resolved or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal() or "/" in host:
        return  # "local" and the like: Ray itself answers at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        where = f"{resolved}: {error}" if resolved != address else str(error)
        raise _no_cluster(str(address), where) from error


def _no_cluster(address: str, why: str) -> ConnectionError:
    return ConnectionError(
        f"no Ray cluster answers at {address} ({why}): start one with `ray start --head`, or leave out --address and "
        "RAY_ADDRESS for a local one"
    )


@dataclass(frozen=True)
class Share:
    """What each of `workers` equal workers gets: Ray's logical CPUs and GPUs, and CPU threads."""

    workers: int
    cpus: float
    gpus: int
    threads: int


def share(resources: Resources, wanted: int | None, reserve_cpu: bool) -> Share:
    """Divide the cluster between equal workers: one GPU each, or a share of the CPUs where there is no GPU.

    wanted: number of workers, None: one per GPU, or a single one on CPUs; reserve_cpu: leave one CPU to Ray Data's
    readers. Raises SettingsError where more workers are wanted than there are GPUs, or CPUs where there is no GPU.
    """
    if resources.gpus:
        workers = wanted or resources.gpus
        if workers > resources.gpus:
            raise SettingsError(
                f"{workers} workers need a GPU each, but the cluster has {resources.gpus}: "
                "lower --num-workers (stage 1) or --num-actors (stage 2)"
            )
        return Share(workers, 0, 1, _threads(resources, workers))
    workers = wanted or 1
    if workers > max(resources.cpus, 1):
        raise SettingsError(
            f"{workers} workers need a CPU each, but the cluster has {resources.cpus}: "
            "lower --num-workers (stage 1) or --num-actors (stage 2)"
        )
    return Share(workers, _cpus_each(resources, workers, int(reserve_cpu)), 0, _threads(resources, workers))


def share_for_actors(resources: Resources, wanted: int | None, num_tasks: int) -> Share:
    """Divide the cluster between `wanted` actors; by default one per GPU; on CPUs one per core, but at most
    num_tasks.

    On CPUs an actor per core wastes less than threads do. Raises SettingsError as `share` does.
    """
    workers = wanted or resources.gpus or max(1, min(resources.cpus, num_tasks))
    return share(resources, workers, reserve_cpu=True)


def _cpus_each(resources: Resources, workers: int, reserved: int) -> float:
    """The most CPUs that each of `workers` equal workers can have, as a worker cannot span machines."""
    free = resources.machines
    free[0] = max(free[0] - reserved, 1)
    # Whole CPUs first, then fractions: more workers than CPUs must share them.
    sizes: Iterator[float] = chain(range(max(free), 1, -1), (1 / part for part in count(1)))
    return next(round(cpus, 4) for cpus in sizes if sum(machine // cpus for machine in free) >= workers)


def _threads(resources: Resources, workers: int) -> int:
    return max(1, min(resources.machines[0], resources.cpus // workers))


def actor_class(kind: type, each: Share, at_once: int = 1) -> Any:
    """`kind` as the class of actors with these resources, spread over the nodes, that serve `at_once` calls at once.
    Ray does not restart them: the dispatcher decides what happens to the work of one that died."""
    return ray.remote(kind).options(
        num_cpus=each.cpus, num_gpus=each.gpus, scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0,
        max_concurrency=at_once,
    )  # fmt: skip
