"""Shared fixtures: settings and scenes so small that a whole run takes a second. Imports stay inside the fixtures."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from scaling.config import Settings
    from scaling.data.scene_views import SceneViews
    from scaling.library.run_folder import RunFolder

# Tensors are so small here that threads wait for one another more than they compute. Set before torch is imported, and
# for all processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

IMAGE_SIZE = 16
NUM_VIEWS = 5

# 16² images ↔ 8² latents; a few steps a phase.
TINY: dict[str, Any] = {
    "data": {"image_size": IMAGE_SIZE, "embedded_views": NUM_VIEWS},
    "representation": {
        "micro_features": 2,
        "macro_features": 3,
        "num_base_planes": 2,
        "resolution": 4,
        "field_width": 8,
    },
    "rendering": {"samples": 4},
    "autoencoder": {"kind": "kl", "block_out_channels": [8, 8], "norm_num_groups": 4},
    "stage1": {
        "autoencoder": {
            "num_epochs": 1,
            "steps_per_epoch": 3,
            "items_per_step": 4,
            "lr": {"encoder": 1e-3, "decoder": 1e-3},
        },
        "warmup": {"num_epochs": 2, "steps_per_epoch": 3, "items_per_step": 4, "rays_per_item": 16},
        "joint": {
            "num_epochs": 2,
            "steps_per_epoch": 2,
            "items_per_step": 4,
            "loss": {"latent": 1.0, "rgb": 1.0, "autoencoder": 0.1},
        },
        "adapt": {"num_epochs": 1, "steps_per_epoch": 2, "items_per_step": 4},
        "distil": {"num_epochs": 1, "steps_per_epoch": 2, "items_per_step": 4},
        "student_width": 8,
        "student_blocks": 1,
        "num_buckets": 2,
    },
    "stage2": {
        "scenes_per_batch": 2,
        "latent": {"num_epochs": 1, "steps_per_epoch": 6, "rays_per_item": 16},
        "rgb": {"num_epochs": 1},
    },
}


# Files with the longest tests, so that none of them is begun last (see `pytest_xdist_make_scheduler`).
LONGEST = (
    "tests/distributed/test_distributed.py", "tests/benchmarks/test_faults.py", "tests/distributed/test_sweep.py",
    "tests/training/test_invariance.py", "tests/benchmarks/test_benchmarks.py", "tests/distributed/test_dispatcher.py",
    "tests/viewer/test_viewer_browser.py", "tests/experiments/test_presets.py",
    "tests/distributed/test_cache_latents.py", "tests/report/test_report.py",
)  # fmt: skip

# Folders whose tests run commands, draw, export or damage whole runs: all of them count as slow, so that what is left
# is the maths. Elsewhere a slow test is marked itself.
WHOLE_RUNS = {
    "api", "benchmarks", "cluster", "distributed", "experiments", "export", "pictures", "report", "safety", "storage",
    "viewer",
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave those folders out at once where slow tests are not asked for: their imports alone take many seconds."""
    left_out = "not slow" in config.option.markexpr and collection_path.name in WHOLE_RUNS
    return True if left_out and collection_path.parent == config.rootpath / "tests" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, each process takes whole files, those that take longest first."""
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            longest = [scope for scope in LONGEST if scope in self.workqueue]
            for scope in reversed(longest):
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return LongestFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "ray_6_cpus_4_gpus" in fixtures:
            item.add_marker("ray")
        if item.path.parent.name in WHOLE_RUNS or "s3_server" in fixtures:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Undo what a test of workers has set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The tiny settings as plain values, to change or to hand to another process."""
    return TINY


@pytest.fixture(scope="session")
def tiny_settings() -> Settings:
    from scaling.config import make_settings

    return make_settings(TINY)


@pytest.fixture(scope="session")
def tiny_scenes() -> list[SceneViews]:
    """Four different cars: 5 views of 16² pixels each, the first of them a test view."""
    from scaling.data.embedded.scenes import embedded_ids, embedded_scene

    return [embedded_scene(scene_id, IMAGE_SIZE, NUM_VIEWS) for scene_id in embedded_ids(4)]


@pytest.fixture(scope="session")
def fitted_run(tiny_settings, tiny_scenes, tmp_path_factory) -> RunFolder:
    """A run of embedded cars with two fitted scenes, car-00002 and car-00003, in parts of one. Not to be changed."""
    from helpers.tiny_run import make_run

    run = make_run(tmp_path_factory.mktemp("run") / "cars", tiny_settings, tiny_scenes, per_part=1)
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    return run


@pytest.fixture(scope="session")
def s3_keys() -> None:
    """The environment by which any process finds its way into the S3-compatible server; Ray's workers inherit it."""
    os.environ.update(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true", no_proxy="127.0.0.1"
    )


@pytest.fixture(scope="session")
def s3_server(s3_keys) -> Iterator[str]:
    """An S3-compatible server on loopback, with the bucket `runs`. → the options by which a URI names it."""
    from scaling.storage.paths import ObjectPath

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&allow_bucket_creation=true&region=us-east-1"
    for _ in range(100):
        try:
            ObjectPath.of(f"s3://runs{options}").filesystem.create_dir("runs")
            break
        except OSError:
            time.sleep(0.1)
    yield options
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def ray_6_cpus_4_gpus(s3_keys) -> Any:
    """One local Ray for all tests that need it, with 4 GPUs that exist only in its books. Starting costs seconds."""
    import logging

    from scaling.distributed.cluster import Resources, keep_to_this_machine

    keep_to_this_machine()
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    import ray

    ray.init(
        address="local", num_cpus=6, num_gpus=4, include_dashboard=False, object_store_memory=100 << 20,
        log_to_driver=False, logging_level=logging.ERROR,
    )  # fmt: skip
    yield Resources(cpus=6, gpus=4)
    ray.shutdown()
