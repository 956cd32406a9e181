"""Mode cohort: what moves, what is left out, and that an epoch is where it can be stopped."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from scaling.config import Settings, SettingsError, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids
from scaling.data.scene_views import SceneViews
from scaling.data.stores import SourceSpec
from scaling.distributed.stage2.actors import FitJob
from scaling.distributed.stage2.cohort_actors import CohortFitter
from scaling.library.run_folder import RunFolder
from scaling.models.shared_files import save_shared
from scaling.models.shared_model import SharedModel
from scaling.training import phase_loop
from scaling.training.fit_cohort import Cohort, CohortFit, fit_cohort
from scaling.training.fit_frozen import fit_scenes
from scaling.training.phase_loop import Diverged, EpochReport
from scaling.training.stage1 import Stage1

pytestmark = pytest.mark.slow

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00002", "epoch-00003"], "the last two"
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


@pytest.mark.parametrize("torn", [1, 2])
def test_a_torn_checkpoint_costs_an_epoch_no_more(whole, shared, settings, tiny_scenes, tmp_path, torn):
    """The cohort goes on from the checkpoint before the torn one, or starts over where both are torn."""
    fit(shared, tiny_scenes[:3], settings, tmp_path)
    for epoch in range(3, 3 - torn, -1):
        path = tmp_path / f"epoch-{epoch:05d}" / "scenes-0-of-1.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    reports: list[EpochReport] = []
    same(fit(shared, tiny_scenes[:3], settings, tmp_path, on_epoch=reports.append), whole)
    assert [report.epochs_done for report in reports] == ([3] if torn == 1 else [1, 2, 3])


def test_the_checkpoint_of_another_cohort_is_refused(shared, settings, tiny_scenes, tmp_path):
    fit(shared, tiny_scenes[:2], settings, tmp_path)
    with pytest.raises(SettingsError, match="other scenes or settings"):
        fit(shared, tiny_scenes[:3], settings, tmp_path)


def poison(monkeypatch, scene_id: str, in_rgb: bool) -> None:
    """What the scene should show is no number, so its loss is NaN, at every step of 2a or of 2b."""
    make_batch = phase_loop.make_batch

    def poisoned(shared: SharedModel, phase: Any, items: Any) -> Any:
        batch = make_batch(shared, phase, items)
        for place, item in enumerate(items):
            if item.scene.scene_id == scene_id and bool(phase.loss.rgb) == in_rgb:
                (batch.images if in_rgb else batch.latents)[place] = float("nan")
        return batch

    monkeypatch.setattr(phase_loop, "make_batch", poisoned)


@pytest.mark.parametrize("in_rgb", [False, True])
def test_a_member_that_diverges_is_left_out(shared, settings, tiny_scenes, tmp_path, monkeypatch, in_rgb):
    poison(monkeypatch, tiny_scenes[1].scene_id, in_rgb)
    done = fit(shared, tiny_scenes[:3], settings, tmp_path)
    assert [scene.scene_id for scene in done.scenes] == [tiny_scenes[0].scene_id, tiny_scenes[2].scene_id]
    why = done.left_out[tiny_scenes[1].scene_id]
    assert f"{'rgb' if in_rgb else 'latent'}, epoch 0: numbers are not finite" in why
    assert all(tensor.isfinite().all() for tensor in done.tuned.values())
    assert all(scene.params.micro_planes.isfinite().all() for scene in done.scenes)


def test_the_others_end_as_if_the_epoch_had_begun_without_it(shared, settings, tiny_scenes, tmp_path, monkeypatch):
    without = Cohort(shared, shared.content_hash(), tiny_scenes[:3], settings)
    without.dropped = {tiny_scenes[1].scene_id: "never took part"}
    without.go_on(lambda report: None, None)
    poison(monkeypatch, tiny_scenes[1].scene_id, in_rgb=False)
    done = fit(shared, tiny_scenes[:3], settings, tmp_path)
    for name, tensor in done.tuned.items():
        assert torch.equal(tensor, without.shared.state_dict()[name])
    assert torch.equal(done.scenes[1].params.coefs, without.table.coefs[2])


def test_shared_parts_that_diverge_are_no_members_fault(shared, settings, tiny_scenes, tmp_path, monkeypatch):
    """Neither where every member of a step goes at once, nor where no later step notices."""
    values = merge(settings.model_dump(), {"stage2": {"latent": {"lr": {"base_planes": 1e38}}}})
    with pytest.raises(Diverged, match="numbers are not finite") as error:
        fit(shared, tiny_scenes[:3], make_settings(values), tmp_path / "all")
    assert error.value.scene_ids == []

    step = Cohort._step

    def last_step_spoils(self: Cohort, *arguments: Any) -> Any:
        result = step(self, *arguments)
        self.shared.base_planes.data.view(-1)[0] = float("nan")
        return result

    once = merge(settings.model_dump(), {"stage2": {"latent": {"num_epochs": 1, "steps_per_epoch": 1}}})
    monkeypatch.setattr(Cohort, "_step", last_step_spoils)
    with pytest.raises(Diverged) as error:
        fit(shared, tiny_scenes[:3], make_settings(once), tmp_path / "last")
    assert error.value.scene_ids == [] and not list((tmp_path / "last").glob("*"))


def test_the_actor_records_who_was_left_out_before_it_commits(settings, shared, tmp_path, monkeypatch):
    """So that a driver that dies before it hears of it does not fit that scene as a cohort of its own."""
    ids = embedded_ids(7)[4:]
    run = RunFolder(tmp_path / "run")
    save_shared(shared, run.shared, embedded_ids(4))
    spec = SourceSpec.of(None, settings.data)
    poison(monkeypatch, ids[1], in_rgb=False)
    fitter = CohortFitter(FitJob(str(run.path), str(run.shared), settings.model_dump(), astuple(spec)))
    outcomes = {o.scene_id: o.kind for o in fitter.fit(pa.table({"scene_id": ids}), attempt=1).outcomes}
    assert outcomes == {ids[0]: "fitted", ids[1]: "diverged", ids[2]: "fitted"}
    assert set(run.given_up()) == {ids[1]} and sorted(run.library.ids()) == [ids[0], ids[2]]
    assert not list((run.checkpoints / "cohorts").iterdir())


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
