"""The viewer without a browser: what its gallery finds, where its camera goes, what it draws, whom it serves."""

from __future__ import annotations

import asyncio
import math
import runpy
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_run import make_run

from scaling.cameras import look_at_origin
from scaling.cli import run_command
from scaling.config import make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.data.png import decode_png
from scaling.library.cohorts import commit_cohort
from scaling.library.parts import commit_part
from scaling.library.row_schema import METRICS
from scaling.library.run_folder import RunFolder
from scaling.library.viewpoints import Viewpoints
from scaling.models.box import Box
from scaling.models.shared_files import load_shared
from scaling.pictures.draw import to_pixels
from scaling.training.evaluate import render_views
from scaling.training.metrics.images import view_metrics
from scaling.viewer import draw_scenes
from scaling.viewer.camera import STEEPEST, Camera, start_camera, view_camera
from scaling.viewer.draw_scenes import Shot, ViewedRun, mix, modes_of, view_png
from scaling.viewer.gallery import PER_PAGE, Gallery, facts
from scaling.viewer.server import HOST, LocalOnly, is_local, open_port
from scaling.viewer.worker import Worker

VIEW = Path(__file__).resolve().parents[2] / "experiments" / "view.py"


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory) -> RunFolder:
    """Cars 2 to 4 on the shared model of cars 0 and 1."""
    scenes = [embedded_scene(scene_id, 16, 5) for scene_id in embedded_ids(5)]
    made = make_run(tmp_path_factory.mktemp("runs") / "cars", tiny_settings, scenes)
    made.write_config("stage2", tiny_settings, {"store": "embedded"})
    return made


@pytest.fixture
def viewed(run) -> ViewedRun:
    return ViewedRun(run, None)


# ---------------------------------------------------------------------- the gallery


def row(scene_id: str, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys((*METRICS, "seconds", "cohort"))
    return {"scene_id": scene_id, "category": "car", "stage": 2, **empty, **values}


def found(gallery: Gallery, **query: Any) -> list[str]:
    return [row["scene_id"] for row in gallery.page(**query).rows]


def test_a_search_wants_every_word_and_a_sort_puts_unknown_numbers_last():
    gallery = Gallery([
        row("b-1", psnr=20.0, autoencoder_psnr=25.0),
        row("a-2", psnr=22.0, autoencoder_psnr=28.0, category="Red <b>"),
        row("c-3", psnr=float("nan"), stage=1),
        row("d-4", psnr=20.0, cohort="beef" * 16),
    ])  # fmt: skip
    assert found(gallery) == ["a-2", "b-1", "c-3", "d-4"] and len(gallery) == 4
    assert found(gallery, search="CAR stage2") == ["b-1", "d-4"]
    assert found(gallery, search="red <B") == ["a-2"] and found(gallery, search="beefbeef") == ["d-4"]
    assert found(gallery, stage=1) == ["c-3"] and found(gallery, search="a-2 car") == []
    assert found(gallery, sort="psnr") == ["b-1", "d-4", "a-2", "c-3"]
    assert found(gallery, sort="psnr", descending=True) == ["a-2", "b-1", "d-4", "c-3"]
    assert found(gallery, sort="gap", descending=True)[:2] == ["a-2", "b-1"], "6 dB before 5 dB"


def test_what_is_told_of_a_scene():
    [scene] = Gallery([row("a", psnr=20.128, autoencoder_psnr=25.0, cohort="beef" * 16, category="")]).rows.values()
    assert facts(scene) == [
        ("test PSNR", "20.13 dB"), ("autoencoder", "25.00 dB"), ("gap to it", "4.87 dB"), ("stage", "2"),
        ("cohort", "beefbeef…"),
    ]  # fmt: skip


def test_pages_of_5000_scenes():
    gallery = Gallery([row(f"car-{number:04d}", psnr=float(number % 97)) for number in range(5000)])
    page = gallery.page(number=3)
    assert (page.number, page.num_pages, page.num_found, page.first) == (3, math.ceil(5000 / PER_PAGE), 5000, 49)
    assert page.rows[0]["scene_id"] == "car-0048" and len(page.rows) == PER_PAGE
    assert gallery.page(number=999).number == 209 and len(gallery.page(number=999).rows) == 5000 - 208 * 24
    nothing = gallery.page(search="no such car", number=7)
    assert (nothing.number, nothing.num_pages, nothing.num_found, nothing.first) == (1, 1, 0, 0)


# ---------------------------------------------------------------------- the camera


def looking(azimuth: float, elevation: float, radius: float = 2.0) -> Camera:
    places = (torch.tensor([value], dtype=torch.float64) for value in (azimuth, elevation, radius))
    return Camera.of(look_at_origin(*places)[0], torch.eye(3))


def test_a_camera_turns_on_its_sphere_and_stops_below_the_pole():
    turned = looking(0.3, 0.2).turned(0.5, 0.4)
    torch.testing.assert_close(turned.cam2world, looking(0.8, 0.6).cam2world)
    steep = looking(0.3, 0.2).turned(0.0, 9.0)
    torch.testing.assert_close(steep.cam2world, looking(0.3, STEEPEST).cam2world)
    above = looking(0.3, math.radians(89))  # as a truth view may be
    torch.testing.assert_close(above.turned(0.0, 1.0).cam2world, above.cam2world)
    many = looking(0.0, 0.0)
    for _ in range(1000):
        many = many.turned(2 * math.pi / 1000, 0.0)
    torch.testing.assert_close(many.cam2world, looking(0.0, 0.0).cam2world)


def test_a_camera_turns_around_the_scenes_centre():
    """A quarter turn around (2, 0, 0), from one unit in front of it along x to one unit beside it along y."""
    around = replace(Viewpoints.around(Box(None)), radius=1.0, centre=(2.0, 0.0, 0.0))
    camera = Camera.of(*around.camera(0.0, 0.0), around.centre)
    assert camera.cam2world[:3, 3].tolist() == pytest.approx([3.0, 0.0, 0.0])
    assert camera.turned(math.pi / 2, 0.0).cam2world[:3, 3].tolist() == pytest.approx([2.0, 1.0, 0.0])


def test_a_zoom_changes_the_focal_length_alone():
    camera = start_camera(Viewpoints.around(Box(None)))
    near = camera.zoomed(2.0)
    assert near.intrinsics.diagonal().tolist() == pytest.approx([2.04, 2.04, 1.0])
    assert near.intrinsics[:2, 2].tolist() == [0.5, 0.5] and torch.equal(near.cam2world, camera.cam2world)


def test_the_nearest_view_and_where_a_scene_is_first_seen_from(tiny_scenes):
    poses = torch.stack([looking(azimuth, 0.0).cam2world for azimuth in (0.0, 1.0, 2.0)]).float()
    index, degrees = looking(1.2, 0.0, radius=9.0).nearest(poses)
    assert index == 1 and degrees == pytest.approx(math.degrees(0.2), abs=1e-4)
    views = tiny_scenes[0]
    start = start_camera(Viewpoints.of(views))
    assert start.cam2world[:3, 3].norm() == pytest.approx(1.3, abs=1e-6)
    assert start.intrinsics[0, 0] == pytest.approx(views.intrinsics[0, 0, 0].item())
    assert view_camera(views, 3).nearest(views.cam2world)[0] == 3


# ---------------------------------------------------------------------- the worker


def test_of_a_key_only_the_latest_is_done_and_what_is_urgent_goes_first():
    worker, begun, go, done = Worker(), threading.Event(), threading.Event(), []

    def first() -> str:
        begun.set()
        assert go.wait(10)
        return "first"

    running = worker.ask("frame", first)
    assert begun.wait(10)
    thumbnails = worker.ask("thumbnails", lambda: done.append("thumbnails"))
    stale = [worker.ask("frame", lambda number=number: done.append(number), urgent=True) for number in range(5)]
    dropped = worker.ask("other", lambda: done.append("other"))
    worker.drop("other")
    gone = worker.ask("gone", lambda: done.append("gone"))
    assert gone.cancel(), "as asyncio does where a page was closed"
    again = worker.ask("gone", lambda: "again")
    wrong = worker.ask("wrong", lambda: 1 / 0)
    go.set()
    assert running.result(10) == "first" and [asked.result(10) for asked in (*stale, dropped)] == [None] * 6
    assert thumbnails.result(10) is None and again.result(10) == "again"
    with pytest.raises(ZeroDivisionError):
        wrong.result(10)
    assert done == [4, "thumbnails"]
    worker.close()


# ---------------------------------------------------------------------- what is drawn


def test_a_view_is_drawn_as_evaluation_renders_it(viewed):
    scene = viewed.open("car-00003")
    views = viewed.truth.views("car-00003", 2, scene.shared.settings.data)
    expected = render_views(scene.shared, scene.params, views.cam2world[:1], views.intrinsics[:1])
    drawn = viewed.draw(Shot("car-00003", view_camera(views, 0), truth=views.images[0]))
    assert (decode_png(drawn.png) == to_pixels(expected["images"])[0]).all()
    assert drawn.measured == pytest.approx(view_metrics(expected["images"], views.images[:1]))
    assert (decode_png(view_png(views, 0)) == to_pixels(views.images[0])).all()


def test_a_draft_goes_through_the_student(viewed, monkeypatch):
    shared = viewed.shared
    assert modes_of(shared) == {"rgb": "Colour", "latents": "Latents", "depth": "Depth"}
    scene, camera = viewed.open("car-00002"), viewed.start
    latents = draw_scenes.render(shared, scene.params, camera, decoded=False, draft=True)["latents"]
    draft = viewed.draw(Shot("car-00002", camera, draft=True, truth=torch.zeros(3, 16, 16)))
    assert (decode_png(draft.png) == to_pixels(shared.student(latents))[0]).all() and not draft.measured
    assert draw_scenes.has_drafts(shared, "rgb") and not draw_scenes.has_drafts(shared, "depth")
    monkeypatch.setattr(shared, "student", None)
    assert not draw_scenes.has_drafts(shared, "rgb")
    for mode in ("latents", "depth"):
        pictures = [decode_png(viewed.draw(Shot("car-00002", c, mode)).png) for c in (camera, camera.turned(1.0, 0.0))]
        assert pictures[0].shape == (8, 8, 3) and (pictures[0] != pictures[1]).any()


def test_thumbnails_are_kept(viewed):
    made = viewed.draw_thumbnails(["car-00004", "car-00002", "gone"])
    assert sorted(made) == ["car-00002", "car-00004"]
    assert viewed.thumbnail("car-00002") == made["car-00002"]
    assert (
        decode_png(made["car-00002"]) == decode_png(viewed.draw(Shot("car-00002", viewed.start, draft=True)).png)
    ).all()


def test_a_mixture_lies_between_two_scenes(viewed):
    first, second = viewed.open("car-00002"), viewed.open("car-00003")
    mixed = mix(first, second, coefs=0.25, micro=1.0)
    torch.testing.assert_close(mixed.coefs, 0.75 * first.params.coefs + 0.25 * second.params.coefs)
    assert torch.equal(mixed.micro_planes, second.params.micro_planes)
    ends = [viewed.draw(Shot("car-00002", viewed.start, second="car-00003", coefs=x, micro=x)).png for x in (0.0, 1.0)]
    assert ends == [viewed.draw(Shot(scene_id, viewed.start)).png for scene_id in ("car-00002", "car-00003")]


def test_a_scene_of_a_cohort_stands_on_its_model_and_mixes_with_no_other(run, tmp_path, tiny_settings):
    shared, shared_hash = load_shared(run.shared)
    other = RunFolder(tmp_path / "other")
    other.write_config("stage2", tiny_settings, {"shared": str(run.shared), "store": "embedded"})
    for scene_id, shift in (("car-00002", 1.0), ("car-00003", 2.0)):
        tuned = {"base_planes": shared.base_planes + shift}
        cohort = commit_cohort(other.library.folder, tuned, shared_hash, [scene_id])
        commit_part(other.library.folder, [run.library.scene(scene_id) | {"cohort": cohort}])
    own, common = ViewedRun(other, None), ViewedRun(run, None)
    shot = Shot("car-00002", common.start)
    assert own.draw(shot).png != common.draw(shot).png
    assert len(own.draw_thumbnails(["car-00002", "car-00003"])) == 2
    with pytest.raises(
        ValueError, match=r"cannot be mixed: .* cohort \w{8}… \(car-00002\) and cohort \w{8}… \(car-00003\)"
    ):
        own.draw(Shot("car-00002", own.start, second="car-00003", coefs=0.5))


def test_rgb_space_has_no_latents_and_drafts_of_fewer_rays(tiny_values, tiny_scenes, tmp_path, monkeypatch):
    values: dict[str, Any] = {
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage2": {"rgb": {"num_epochs": 0}},
    }
    values["stage1"] = {phase: {"num_epochs": 0} for phase in ("joint", "adapt", "distil")}
    settings = make_settings(merge(tiny_values, values))
    run = make_run(tmp_path / "rgb", settings, tiny_scenes[:3])
    run.write_config("stage2", settings, {"store": "embedded"})
    viewed = ViewedRun(run, None)
    assert list(modes_of(viewed.shared)) == ["rgb", "depth"] and not draw_scenes.has_drafts(viewed.shared, "rgb")
    monkeypatch.setattr(draw_scenes, "DRAFT_SIDE", 8)
    for mode in ("rgb", "depth"):
        assert draw_scenes.has_drafts(viewed.shared, mode)
        sizes = [
            decode_png(viewed.draw(Shot("car-00002", viewed.start, mode, draft)).png).shape for draft in (True, False)
        ]
        assert sizes == [(8, 8, 3), (16, 16, 3)]
    assert [r["gap"] for r in viewed.gallery().rows.values()] == [None]


def test_without_truth_the_reason_is_told(run, tmp_path, tiny_settings):
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    for name in ("library", "shared"):
        (other.path / name).symlink_to(run.path / name)
    other.write_config("stage2", tiny_settings, {"store": str(tmp_path / "moved"), "shared": str(run.shared)})
    assert "moved holds no complete scene store" in ViewedRun(other, None).no_truth
    with pytest.raises(FileNotFoundError, match="elsewhere holds no complete scene store"):
        ViewedRun(other, str(tmp_path / "elsewhere"))
    (other.path / "config.yaml").unlink()
    assert "does not say which store stage 2 used" in ViewedRun(other, None).no_truth


# ---------------------------------------------------------------------- the server


@pytest.mark.parametrize(
    ("host", "origin", "served"),
    [
        ("127.0.0.1:8080", None, True),
        ("localhost:8080", "http://localhost:8080", True),
        ("LocalHost", None, True),
        ("127.0.0.1:8080", "http://127.0.0.1:8080", True),
        ("rebound.example:8080", None, False),
        ("localhost.example", None, False),
        ("127.0.0.1.example:8080", None, False),
        ("user@127.0.0.1@example", None, False),
        ("[::", None, False),
        ("", None, False),
        (None, None, False),
        ("127.0.0.1:8080", "http://elsewhere.example", False),
        ("127.0.0.1:8080", "http://127.0.0.1:9999", False),
        ("127.0.0.1:8080", "null", False),
    ],
)
def test_only_this_machines_own_pages_are_served(host, origin, served):
    headers = [(b"host", host.encode())] if host is not None else []
    headers += [(b"origin", origin.encode())] if origin else []
    assert is_local(headers) == served
    assert not is_local([*headers, (b"host", b"other.example")]), "two hosts are one too many"


@pytest.mark.parametrize(
    ("site", "served"), [(b"none", True), (b"same-origin", True), (b"same-site", False), (b"cross-site", False)]
)
def test_another_sites_page_opens_no_page_here(site, served):
    assert is_local([(b"host", b"127.0.0.1:8080"), (b"sec-fetch-site", site)]) == served


def test_visitors_are_bounded():
    full = answer("http", b"127.0.0.1:1", path="/", is_full=lambda: True)
    assert full[0]["status"] == 503 and b"too many pages" in full[1]["body"]
    assert answer("http", b"127.0.0.1:1", path="/_nicegui/style.css", is_full=lambda: True)[0]["status"] == 200
    prefetch = answer("http", b"127.0.0.1:1", (b"sec-purpose", b"prefetch"), path="/")
    assert prefetch[0]["status"] == 503


def test_all_visitors_share_one_gallery(run):
    viewed = ViewedRun(run, None)
    first = viewed.gallery()
    assert viewed.gallery() is first
    commit_part(run.library.folder, [{**run.library.scene(run.library.ids()[0]), "scene_id": "one-more"}])
    assert len(viewed.gallery()) == len(first) + 1


def answer(
    kind: str, host: bytes, *headers: tuple[bytes, bytes], path: str = "/", is_full: Any = lambda: False
) -> list[dict[str, Any]]:
    """What LocalOnly around an app that says "hello" sends."""
    sent: list[dict[str, Any]] = []

    async def hello(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(b"host", host), *headers]}
    asyncio.run(LocalOnly(hello, is_full)(scope, None, send))
    return sent


def test_strangers_get_a_refusal_and_pages_a_policy():
    start, body = answer("http", b"127.0.0.1:1")
    assert start["status"] == 200 and body["body"] == b"hello"
    assert dict(start["headers"])[b"content-security-policy"].startswith(b"default-src 'self';")
    assert answer("http", b"evil.example")[0]["status"] == 403
    assert answer("websocket", b"evil.example") == [{"type": "websocket.close", "code": 1008}]


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    with open_port(0) as listening:
        listening.listen()
        host, port = listening.getsockname()
        assert host == HOST == "127.0.0.1"
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use: .* --port"):
            open_port(port)


# ---------------------------------------------------------------------- the command


def view(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(VIEW), *arguments])
    return run_command(runpy.run_path(str(VIEW))["main"])


def test_what_a_user_can_mend_is_one_line(run, tmp_path, monkeypatch, capsys):
    with socket.create_server((HOST, 0)) as taken:
        assert view(monkeypatch, "--run", str(run.path), "--port", str(taken.getsockname()[1])) == 1
        assert "is in use" in capsys.readouterr().err
    assert view(monkeypatch, "--run", str(tmp_path / "nowhere"), "--port", "0") == 1
    assert "nowhere: no fitted scenes here" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.delitem(sys.modules, "scaling.viewer.page", raising=False)
    assert view(monkeypatch, "--run", str(run.path)) == 1
    assert "pip install 'nicegui" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        view(monkeypatch, "--run", str(run.path), "--port", "70000")
    assert "ports go up to 65535" in capsys.readouterr().err
