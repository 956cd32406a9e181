"""Mode cohort: what moves, what is left out, and that an epoch is where it can be stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.config import Settings, SettingsError, make_settings, merge
from scaling.data.scenes import SceneViews
from scaling.models.shared import SharedModel
from scaling.training.cohort import CohortFit, fit_cohort
from scaling.training.phases import EpochReport
from scaling.training.stage1 import Stage1
from scaling.training.stage2 import fit_scenes

pytestmark = pytest.mark.usefixtures("one_thread")
RATES = {"field": 1e-2, "base_planes": 1e-2, "micro_planes": 1e-2, "coefs": 1e-2}
COHORT = {
    "stage2": {
        "mode": "cohort",
        "latent": {"num_epochs": 2, "steps_per_epoch": 3, "lr": RATES},
        "rgb": {"num_epochs": 1, "items_per_step": 2, "lr": RATES | {"decoder": 1e-2}},
    }
}


@pytest.fixture(scope="module")
def settings(tiny_values) -> Settings:
    return make_settings(merge(tiny_values, COHORT))


@pytest.fixture(scope="module")
def shared(settings, tiny_scenes) -> SharedModel:
    run = Stage1(settings, [views.scene_id for views in tiny_scenes], tiny_scenes)
    run.run(lambda report: None)
    return run.shared.requires_grad_(False).eval()


def fit(shared: SharedModel, scenes: list[SceneViews], settings: Settings, folder: Path, **more: Any) -> CohortFit:
    return fit_cohort(shared, shared.content_hash(), scenes, settings, folder, **more)


def same(one: CohortFit, two: CohortFit) -> None:
    assert one.tuned.keys() == two.tuned.keys()
    for name, tensor in one.tuned.items():
        torch.testing.assert_close(tensor, two.tuned[name])
    for left, right in zip(one.scenes, two.scenes, strict=True):
        assert left.scene_id == right.scene_id
        torch.testing.assert_close(left.params.micro_planes, right.params.micro_planes)
        torch.testing.assert_close(left.params.coefs, right.params.coefs)


@pytest.fixture(scope="module")
def whole(shared, settings, tiny_scenes, tmp_path_factory) -> CohortFit:
    return fit(shared, tiny_scenes[:3], settings, tmp_path_factory.mktemp("whole"))


def test_a_cohort_tunes_a_copy_of_everything_but_the_encoder(shared, settings, tiny_scenes, tmp_path):
    before = shared.content_hash()
    reports: list[EpochReport] = []
    done = fit(shared, tiny_scenes[:3], settings, tmp_path, on_epoch=reports.append)
    assert shared.content_hash() == before
    assert {name.split(".")[0] for name in done.tuned} == {"base_planes", "field", "decoder"}
    assert [(report.phase, report.epoch) for report in reports] == [("latent", 1), ("latent", 2), ("rgb", 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00003"], "only the last checkpoint is kept"
    assert [scene.scene_id for scene in done.scenes] == [views.scene_id for views in tiny_scenes[:3]]
    assert not done.left_out and all(scene.seconds > 0 for scene in done.scenes)


def test_without_rates_for_the_shared_parts_nothing_is_tuned(shared, tiny_values, tiny_scenes, tmp_path):
    still = dict.fromkeys(("decoder", "field", "base_planes"), 0.0)
    values = merge(tiny_values, {"stage2": {"latent": {"lr": still}, "rgb": {"lr": still}}})
    assert fit(shared, tiny_scenes[:2], make_settings(values), tmp_path).tuned == {}


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_cohort_goes_on_at_its_epoch(whole, shared, settings, tiny_scenes, tmp_path, stop_after):
    class Stopped(Exception):
        pass

    def stop(report: EpochReport) -> None:
        if report.epochs_done == stop_after:
            raise Stopped

    with pytest.raises(Stopped):
        fit(shared, tiny_scenes[:3], settings, tmp_path, on_epoch=stop)
    (tmp_path / ".writing").mkdir()  # what a crash in the middle of a write leaves
    (tmp_path / ".writing" / "shared.safetensors").write_bytes(b"half")
    reports: list[EpochReport] = []
    same(fit(shared, tiny_scenes[:3], settings, tmp_path, on_epoch=reports.append), whole)
    assert [report.epochs_done for report in reports] == list(range(stop_after + 1, 4))


def test_the_checkpoint_of_another_cohort_is_refused(shared, settings, tiny_scenes, tmp_path):
    fit(shared, tiny_scenes[:2], settings, tmp_path)
    with pytest.raises(SettingsError, match="other scenes or settings"):
        fit(shared, tiny_scenes[:3], settings, tmp_path)


@pytest.mark.parametrize("phase", ["latent", "rgb"])
def test_a_member_that_diverges_is_left_out(shared, settings, tiny_scenes, tmp_path, monkeypatch, phase):
    """Its gradients become NaN at the second epoch; the others end as if that epoch had started without it."""
    poisoned = tiny_scenes[1].scene_id
    make_batch = __import__("scaling.training.phases", fromlist=["make_batch"]).make_batch

    def poison(shared: SharedModel, chosen: Any, items: Any) -> Any:
        batch = make_batch(shared, chosen, items)
        assert batch.uniforms is not None
        if bool(chosen.loss.rgb) == (phase == "rgb"):
            for place, item in enumerate(items):
                if item.scene.scene_id == poisoned:
                    batch.uniforms[place] = float("nan")
        return batch

    monkeypatch.setattr("scaling.training.phases.make_batch", poison)
    done = fit(shared, tiny_scenes[:3], settings, tmp_path)
    assert [scene.scene_id for scene in done.scenes] == [tiny_scenes[0].scene_id, tiny_scenes[2].scene_id]
    assert f"{phase}, epoch 0: numbers are not finite" in done.left_out[poisoned]
    assert all(tensor.isfinite().all() for tensor in done.tuned.values())
    assert all(scene.params.micro_planes.isfinite().all() for scene in done.scenes)


def test_when_every_member_diverges_nothing_is_fitted(shared, tiny_values, tiny_scenes, tmp_path):
    values = merge(tiny_values, COHORT)
    values = merge(values, {"stage2": {"latent": {"lr": {"micro_planes": 1e38, "coefs": 1e38}}}})
    done = fit(shared, tiny_scenes[:2], make_settings(values), tmp_path)
    assert done.scenes == [] and set(done.left_out) == {views.scene_id for views in tiny_scenes[:2]}


def test_a_random_start_starts_the_field_anew(shared, settings, tiny_scenes, tmp_path):
    values = merge(settings.model_dump(), {"stage2": {"start": "random", "latent": {"lr": {"field": 1e-9}}}})
    values = merge(values, {"stage2": {"rgb": {"num_epochs": 0}}})
    done = fit(shared, tiny_scenes[:2], make_settings(values), tmp_path)
    assert (done.tuned["field.hidden.weight"] - shared.field.hidden.weight).abs().max() > 1e-2


def test_a_cohort_learns_more_of_its_scenes_than_a_frozen_fit(shared, settings, tiny_scenes, tmp_path):
    """With the same steps, the shared parts' freedom lowers the training loss."""
    longer = {"num_epochs": 1, "steps_per_epoch": 60}
    values = merge(settings.model_dump(), {"stage2": {"latent": longer, "rgb": {"num_epochs": 0}}})
    reports: list[EpochReport] = []
    fit(shared, tiny_scenes[:2], make_settings(values), tmp_path, on_epoch=reports.append)
    frozen: list[float] = []
    fit_scenes(shared, tiny_scenes[:2], make_settings(values), lambda phase, step, loss: frozen.append(loss))
    assert reports[0].losses["latent"] < sum(frozen) / len(frozen)
