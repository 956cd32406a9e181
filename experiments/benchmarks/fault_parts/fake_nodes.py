"""A Ray cluster whose nodes all run on this machine and can be lost, to measure the cost of faults."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from ray.cluster_utils import Cluster

from scaling.distributed.cluster import listen_on_loopback


class FakeNodes:
    """A head without resources, for drivers, and nodes with one CPU and one GPU that exists only in Ray's books."""

    def __init__(self, nodes: int) -> None:
        listen_on_loopback()
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else can reach this cluster
        store = {"object_store_memory": 100 << 20}
        self.cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> None:
        """Add a node and wait until it is up. Only the main thread may call this."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20))

    def lose(self, which: int = -1) -> None:
        """Take a node away without a warning, as spot machines go; by default the one that was added last."""
        self.cluster.remove_node(self.nodes.pop(which), allow_graceful=False)

    def train_workers(self) -> list[int]:
        """Process ids of Ray Train's workers on the nodes; those of the node that was added last come first."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in reversed(self.nodes)]
        listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        found = {}
        for line in listed.splitlines():
            pid, parent, title = line.split(maxsplit=2)
            if int(parent) in raylets and "RayTrainWorker" in title:
                found[int(pid)] = raylets.index(int(parent))
        return sorted(found, key=found.__getitem__)

    def stop(self) -> None:
        self.cluster.shutdown()
