"""The report: one page that asks for nothing, its figures those of metrics.json, nothing of a file taken for markup."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_run import make_run
from PIL import Image

from scaling.config import Settings, flatten, make_settings, merge
from scaling.data.scene_views import SceneViews
from scaling.data.stores import EMBEDDED
from scaling.library.cohorts import commit_cohort
from scaling.library.failures import FailureLog, event
from scaling.library.parts import commit_part
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.scene_row import pack_scene
from scaling.library.summary import summarise
from scaling.models.shared_files import load_shared
from scaling.report.figures import Cost, read_figures
from scaling.report.pictures import principal_colours
from scaling.report.tables import METRIC_ROWS, bytes_text, seconds_text
from scaling.report.write import write_report
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_cohort import fit_cohort

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3.0  # of stage 1, a scene; there are two
RGB = {
    "representation": {"num_base_planes": 0, "macro_features": 0},
    "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
    "stage1": {name: {"num_epochs": 0} for name in ("joint", "adapt", "distil")},
    "stage2": {"rgb": {"num_epochs": 0}},
}
CURVES = {"stage1/warmup/latent": [(1, 0.5), (2, 0.05)], "stage1/joint/latent": [(3, 0.04)], "stage2/psnr": [(2, 20.0)]}


class Page(HTMLParser):
    """What a page consists of. tags: (name, attributes); sections: by anchor, of each the texts and the table rows
    label → [(text, value or None)]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: dict[str, dict[str, list[tuple[str, float | None]]]] = {}
        self._section, self._cells, self._open = "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "section":
            self._section = found["id"]
        if tag == "tr":
            self._cells = []
        if tag in ("th", "td"):
            self._cells.append(["", None])
        if tag == "data" and self._cells:
            self._cells[-1][1] = float(found["value"])
        if tag not in ("meta", "img", "br"):
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._cells:
            (label, _), *cells = self._cells
            self.rows.setdefault(self._section, {})[label] = [(text, value) for text, value in cells]
            self._cells = []

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self.texts.setdefault(self._section, []).append(data)
        if self._cells and self._open != "small":
            self._cells[-1][0] = (self._cells[-1][0] + data).strip()

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.texts[section]).split())


def stage1_rows(run: RunFolder, settings: Settings, scenes: Sequence[SceneViews]) -> None:
    """Commits what stage 1 leaves of its own scenes."""
    shared, shared_hash = load_shared(run.shared)
    params = shared.start_params(len(scenes))
    commit_part(run.library.folder, [
        {
            **vars(pack_scene(params[row], "float16")), **evaluate_scene(shared, params[row : row + 1], views),
            "scene_id": views.scene_id, "category": views.category, "stage": 1, "shared": shared_hash, "cohort": None,
            "seconds": SECONDS, "settings_hash": settings_hash(settings), "seed": 0,
        }
        for row, views in enumerate(scenes)
    ])  # fmt: skip


def noted(run: RunFolder, settings: Settings, num_scenes: int = 2) -> RunFolder:
    """The same run with what both stages note, and metrics.json."""
    run.write_config("stage1", settings, {"num_scenes": 2, "store": EMBEDDED})
    job = {"num_scenes": num_scenes, "store": EMBEDDED, "shared": str(run.shared)}
    run.write_config("stage2", settings, job)
    summarise(run)
    return run


@pytest.fixture(scope="module")
def runs(tiny_values, tiny_scenes, tmp_path_factory) -> dict[str, RunFolder]:
    """plain; longer: more steps of stage 2 and another seed; rgb: plain tri-planes; young: stage 1 alone."""
    folder = tmp_path_factory.mktemp("runs")
    over: dict[str, dict[str, Any]] = {"plain": {}, "longer": {"seed": 7, "stage2": {"latent": {"steps_per_epoch": 9}}}}
    found = {}
    for name, changed in {**over, "rgb": RGB}.items():
        settings = make_settings(merge(tiny_values, changed))
        run = make_run(folder / name, settings, tiny_scenes)
        stage1_rows(run, settings, tiny_scenes[:2])
        found[name] = noted(run, settings)
    young = RunFolder(folder / "young")
    shutil.copytree(found["plain"].shared, young.shared)
    stage1_rows(young, make_settings(tiny_values), tiny_scenes[:2])
    return {**found, "young": young}


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Page:
    """Of one run, with curves."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report([runs["plain"]], [CURVES], out)
    return Page(out)


def compared(folder: Path, *runs: RunFolder) -> Page:
    write_report(runs, [{}] * len(runs), folder / "report.html")
    return Page(folder / "report.html")


def test_the_page_asks_for_nothing(page):
    policy = [of for tag, of in page.tags if tag == "meta" and of.get("http-equiv") == "Content-Security-Policy"]
    assert [of["content"].split(";")[0] for of in policy] == ["default-src 'none'"]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "video"}
    asked = [(key, of[key]) for _, of in page.tags for key in ("src", "href", "xlink:href", "srcset") if key in of]
    assert all(value.startswith("data:image/png;base64,") if key == "src" else value[0] == "#" for key, value in asked)
    pictures = 2 * 4 + 3 * 2 + 2 * 7  # two scenes in four ways; three axes, two base planes; two strips of seven
    assert len([1 for key, _ in asked if key == "src"]) == pictures
    styles = " ".join(of["style"] for _, of in page.tags if "style" in of)
    assert "url(http" not in styles and not any(key.startswith("on") for _, of in page.tags for key in of)


def test_what_links_name_is_there_once(page):
    ids = [of["id"] for _, of in page.tags if "id" in of]
    assert len(ids) == len(set(ids))
    named = {of[key][1:] for _, of in page.tags for key in ("href", "xlink:href") if key in of}
    assert named <= set(ids) and set(page.rows) | {"scenes", "training", "planes", "between"} <= named


def test_its_figures_are_those_of_metrics_json(page, runs):
    metrics = json.loads(runs["plain"].metrics.read_bytes())
    stages = [flatten(metrics["stage1"]), flatten(metrics)]
    shown = 0
    for label, path, *_ in METRIC_ROWS:
        expected = [stage.get(path) for stage in stages]
        if any(value is not None for value in expected):
            assert [value for _, value in page.rows["summary"][label]] == expected, label
            shown += 1
    assert shown == len(METRIC_ROWS) - 1, "all but LPIPS"
    text, value = page.rows["summary"]["test PSNR, dB"][1]
    assert text == f"{value:.2f}"


def test_pictures_and_curves_are_there(page):
    alts = [of["alt"] for tag, of in page.tags if tag == "img"]
    assert {alt.split(",")[0] for alt in alts} == {
        "truth", "render", "autoencoder", "error", "xy", "xz", "yz", "coefs and micro planes", "coefs alone",
    }  # fmt: skip
    assert len([1 for tag, _ in page.tags if tag == "svg"]) == 5, "time, bytes, histogram, one loss, stage 2's PSNR"
    assert "Phases: warmup: epochs 1 to 2, joint: epoch 3" in page.text("training")


def test_what_scenes_cost_is_the_shared_part_and_theirs(runs, page):
    cost = Cost(shared=100.0, each=2.0)
    assert cost.total(50) == 200.0
    assert cost.cheaper_from(Cost(0.0, 4.0)) == 50.0, "100 + 2 N < 4 N"
    assert cost.cheaper_from(Cost(0.0, 1.0)) is None
    figures = read_figures(runs["plain"], "plain", {})
    metrics = json.loads(runs["plain"].metrics.read_bytes())
    assert figures.seconds.shared == 2 * SECONDS
    assert figures.seconds.measured[-1] == (2, pytest.approx(6 + 2 * metrics["seconds_per_scene"]))
    assert figures.num_bytes.measured[-1] == (2, metrics["shared_bytes"] + 2 * metrics["bytes_per_scene"])
    [(_, thousand)] = page.rows["cost"]["1,000 scenes"]
    assert thousand == metrics["shared_bytes"] + 1000 * metrics["bytes_per_scene"]
    assert (seconds_text(119), seconds_text(7200), bytes_text(3895), bytes_text(840)) == (
        "119 s", "2.00 h", "3.9 kB", "840 B",
    )  # fmt: skip


def test_side_by_side_exactly_the_differing_settings_are_shown(runs, tmp_path):
    found = compared(tmp_path, runs["plain"], runs["longer"])
    table = {label: [text for text, _ in cells] for label, cells in found.rows["settings"].items()}
    assert table == {
        "setting": ["plain", "longer"], "seed": ["0", "7"], "stage2.latent.steps_per_epoch": ["6", "9"],
    }  # fmt: skip
    metrics = [json.loads(runs[name].metrics.read_bytes()) for name in ("plain", "longer")]
    assert [value for _, value in found.rows["summary"]["device time a scene"]] == [SECONDS, SECONDS], "of stage 1"
    assert f"{metrics[0]['test']['psnr']:.2f}" in found.text("summary")
    [best, worst] = [of["alt"] for tag, of in found.tags if tag == "img" and of["alt"].startswith("longer, 1")][:2]
    assert best == worst == "longer, 1", "the first view of two scenes"


def test_fitting_every_scene_alone_is_what_others_are_measured_against(runs, tmp_path):
    found = compared(tmp_path, runs["plain"], runs["rgb"])
    assert "rgb fits every scene alone" in found.text("cost")
    assert "plain takes less device time than that" in found.text("cost") or "plain never" in found.text("cost")
    assert "rgb: it has no base planes" in found.text("planes")
    [(_, autoencoder), (_, none)] = found.rows["summary"]["autoencoder PSNR, dB"]
    assert autoencoder is not None and none is None


def test_nothing_of_a_file_is_taken_for_markup(tiny_values, tiny_scenes, tmp_path):
    script, image = (
        "<script src='http://evil.example/x.js'></script>",
        "<img src=x onerror=alert(1)> $x_1$ & {{ 7 * 7 }}",
    )
    settings = make_settings(merge(tiny_values, {"autoencoder": {"subfolder": script}}))
    scenes = [
        SceneViews(**{**vars(views), "category": f"{script}{index % 2}"}) for index, views in enumerate(tiny_scenes)
    ]
    run = make_run(tmp_path / image, settings, scenes)
    FailureLog(run.failures).add([event("car-00009", 1, script, image)])
    noted(run, settings, num_scenes=3)
    found = compared(tmp_path, run)
    assert not [1 for tag, of in found.tags if tag == "script" or "onerror" in of]
    assert all(of["src"].startswith("data:") for tag, of in found.tags if tag == "img")
    assert found.text("").count(image) == 2, "in the title and the heading"
    assert f"car-00009: {script}: {image}" in found.text("summary")
    assert {f"{script}0", f"{script}1"} <= set(found.rows["quality"])
    assert found.rows["settings"]["autoencoder.subfolder"][1] == (script, None)


def test_what_is_missing_is_told(runs, tiny_values, tmp_path):
    found = compared(tmp_path, runs["young"])
    assert "young: stage 2 has fitted no scene yet" in found.text("summary")
    assert "known once stage 2 has fitted some" in found.text("cost")
    assert "no curves" in found.text("training") and "no config.yaml" in found.text("settings")
    assert "The truth is not shown" in found.text("scenes")
    with pytest.raises(FileNotFoundError, match="no fitted scenes here"):
        write_report([RunFolder(tmp_path / "none")], [{}], tmp_path / "none.html")
    with pytest.raises(ValueError, match="is given twice"):
        write_report([runs["young"]] * 2, [{}] * 2, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_cohorts_on_the_shared_model_of_another_run(runs, tiny_values, tiny_scenes, tmp_path):
    """Their time has the other run's stage 1 in it, their bytes the cohort's copy, their pictures its planes."""
    rates = {"base_planes": 1e-2, "micro_planes": 1e-2, "coefs": 1e-2}
    stage2 = {"mode": "cohort", "latent": {"steps_per_epoch": 2, "lr": rates}, "rgb": {"num_epochs": 0}}
    settings = make_settings(merge(tiny_values, {"stage2": stage2}))
    shared, shared_hash = load_shared(runs["plain"].shared)
    fit = fit_cohort(shared, shared_hash, tiny_scenes[2:], settings, tmp_path / "checkpoints")
    run = RunFolder(tmp_path / "cohort")
    cohort = commit_cohort(run.library.folder, fit.tuned, shared_hash, [scene.scene_id for scene in fit.scenes])
    commit_part(run.library.folder, [
        {
            **vars(pack_scene(scene.params, "float16")), **evaluate_scene(fit.shared, scene.params[None], views),
            "scene_id": scene.scene_id, "category": "car", "stage": 2, "shared": shared_hash, "cohort": cohort,
            "seconds": 1.0, "settings_hash": settings_hash(settings), "seed": 0,
        }
        for scene, views in zip(fit.scenes, tiny_scenes[2:])
    ])  # fmt: skip
    job = {"num_scenes": 2, "store": EMBEDDED, "shared": str(runs["plain"].shared)}
    run.write_config("stage2", settings, job)
    figures = read_figures(run, "cohort", {})
    assert list(figures.seconds.measured) == [(1, 2 * SECONDS + 1), (2, 2 * SECONDS + 2)]
    copy = sum(path.stat().st_size for path in (run.library.folder / "cohorts").rglob("*") if path.is_file())
    assert figures.num_bytes.measured[-1][1] == figures.num_bytes.total(2) > figures.num_bytes.shared + copy
    assert figures.noted["stage 1: num_scenes"] == 2, "of the run that trained it"
    found = compared(tmp_path, run)
    assert "each cohort fine-tunes a copy of its own" in found.text("planes")
    assert "together in cohorts" in found.text("summary")


def test_a_run_that_was_moved_has_its_own_shared_model(runs, tiny_settings, tmp_path):
    moved = RunFolder(tmp_path / "moved")
    shutil.copytree(runs["plain"].shared, moved.shared)
    moved.write_config("stage2", tiny_settings, {"shared": str(tmp_path / "where-it-was" / "shared")})
    assert moved.shared_in_use() == moved.shared and moved.stage1_run() == moved
    moved.write_config("stage2", tiny_settings, {"shared": str(runs["rgb"].shared)})
    assert moved.shared_in_use() == runs["rgb"].shared and moved.stage1_run() == runs["rgb"]


def test_principal_colours_by_hand():
    """One feature, 0 to 1 over two texels: the first channel is all of it, the others have nothing to show."""
    pixels = principal_colours(torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2))
    assert pixels.shape == (1, 1, 1, 2, 3)
    assert sorted(pixels[0, 0, 0, :, 0].tolist()) == [0, 255] and set(pixels[..., 1:].flatten().tolist()) == {128}


@pytest.mark.filterwarnings("default")  # MLflow's own warnings are theirs to mend
def test_the_command_reads_curves_and_logs_the_page(runs, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    from scaling.distributed.tracking import Tracker, read_curves, tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert read_curves(runs["plain"]) == {} and not (tmp_path / "none.db").exists(), "reading makes no database"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracker = Tracker(runs["plain"], "stage1")
    for step, value in ((2, 0.3), (1, 0.5), (2, 0.25)):  # an epoch that was gone through twice
        tracker.log_metrics({"stage1/warmup/latent": value}, step)
    tracker.log_summary({"stage1": {"autoencoder": {"psnr": 30.0}}})
    assert read_curves(runs["plain"]) == {"stage1/warmup/latent": [(1, 0.5), (2, 0.25)]}

    spec = importlib.util.spec_from_file_location("report_command", ROOT / "experiments" / "report.py")
    assert spec and spec.loader
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    out = tmp_path / "pages" / "mine.html"
    monkeypatch.setattr(sys, "argv", ["report.py", "--run", str(runs["plain"].path), "--out", str(out)])
    assert command.main() == 0
    assert "an artefact of plain/stage1" in capsys.readouterr().out
    logged = MlflowClient(tracking_uri(runs["plain"])).list_artifacts(tracker.run_id)
    assert [artefact.path for artefact in logged] == ["mine.html"]
    assert "Stage 1, loss latent" in Page(out).text("training")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it(page, tmp_path, width):
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]
    shot = [f"--screenshot={picture}", f"--window-size={width},2400", page.path.as_uri()]
    subprocess.run(["chromium", *flags, *shot], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    blue = (abs(pixels.astype(int) - [0x2F, 0x6F, 0xDE]).max(2) < 24).sum()
    assert pixels.shape == (2400, width, 3) and blue > 200, "lines and links"
    inked = (pixels[:, -4:] != pixels[0, -1]).any((1, 2)).sum()
    assert inked <= 2, "nothing sticks out into the right margin, but the line below the contents"
