"""One tiny stage 1 for all tests of a module, and its shared model."""

from __future__ import annotations

import pytest
from helpers.stage1_run import Finished, all_tensors, make_run

from scaling.models.shared_files import load_shared, save_shared
from scaling.models.shared_model import SharedModel
from scaling.training.phase_loop import EpochReport


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch):
    """Where torchvision is installed, LPIPS would fetch its weights from the network."""
    monkeypatch.setattr("scaling.training.evaluate.lpips", lambda images, truth: None)


@pytest.fixture(scope="module")
def finished(tiny_values, tiny_scenes, tmp_path_factory) -> Finished:
    run = make_run(tiny_values, tiny_scenes)
    done = Finished(run, [], [], [all_tensors(run)])

    def on_epoch(report: EpochReport) -> None:
        done.reports.append(report)
        done.folders.append(tmp_path_factory.mktemp("checkpoint"))
        done.tensors.append(all_tensors(run))
        run.save(done.folders[-1])

    run.run(on_epoch)
    return done


@pytest.fixture(scope="module")
def shared(finished, tmp_path_factory) -> SharedModel:
    folder = tmp_path_factory.mktemp("shared")
    save_shared(finished.run.shared, folder, finished.run.scene_ids)
    return load_shared(folder)[0]
