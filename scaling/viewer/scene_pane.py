"""The viewer's larger half: one scene from any side, its true view beside it, and mixtures with a second scene."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nicegui import background_tasks, context, ui
from nicegui.events import GenericEventArguments
from torch import Tensor

from scaling.data.scene_views import SceneViews
from scaling.viewer.camera import Camera, view_camera
from scaling.viewer.draw_scenes import Drawn, OpenScene, Shot, ViewedRun, data_url, modes_of, view_png
from scaling.viewer.gallery import facts
from scaling.viewer.worker import Worker

TURN = math.radians(0.45)  # for each pixel that the mouse is dragged
ZOOM = 1.0015  # factor for each unit that the wheel is turned
ZOOMS = (0.5, 8.0)  # the smallest and the largest zoom
EVENT_SECONDS = 0.03  # least time between two events of one drag
REST_SECONDS = 0.2  # without an event, after which the full picture is drawn
ERRORS = (LookupError, OSError, ValueError, RuntimeError)  # raised for damaged or vanished files; the page shows them
# The pointer is captured, so that a drag goes on outside the picture.
PRESS = "(e) => { e.preventDefault(); e.currentTarget.setPointerCapture(e.pointerId); emit(e.clientX, e.clientY); }"
DRAG = "(e) => { if (e.buttons & 1) emit(e.clientX, e.clientY); }"
# A trackpad sends many small wheel events. Their running total is sent, so that those the throttle drops still count.
WHEEL = "(e) => { const d = e.currentTarget.dataset; d.z = +(d.z || 0) + e.deltaY; emit(+d.z); }"


class ScenePane:
    """The scene pane of one page. An error of rendering is shown on the page and leaves the picture as it is."""

    def __init__(self, viewed: ViewedRun, worker: Worker, reader: Worker) -> None:
        self.viewed, self.worker, self.reader = viewed, worker, reader
        self.key = context.client.id
        self.first: Mapping[str, Any] | None = None
        self.second: Mapping[str, Any] | None = None
        self.views: SceneViews | None = None
        self.camera = viewed.start
        self.at_view: int | None = -1  # the true view at the camera; −1: the first test view; None: there is none
        self.shown_view: int | None = None
        self.zoom = 1.0
        self.pointer = (0.0, 0.0)
        self.wheel = 0.0
        self.rest: asyncio.Task[None] | None = None
        self._build()

    # ------------------------------------------------------------------ the page

    def _build(self) -> None:
        with ui.row().classes("w-full items-center no-wrap gap-3"):
            self.title = ui.label("").classes("title ellipsis")
            ui.space()
            self.mode = ui.toggle(modes_of(self.viewed.shared), value="rgb", on_change=self.show).classes("modes")
            self.mode.props("dense no-caps unelevated")
        self.metrics = ui.row().classes("metrics w-full")
        with ui.row().classes("w-full no-wrap gap-4"):
            with ui.column().classes("pane"):
                self.image = self._picture("render")
                with ui.row().classes("caption w-full items-center no-wrap"):
                    self.caption = ui.label("").classes("ellipsis")
                    ui.space()
                    self.milliseconds = ui.label("").classes("faint")
            with ui.column().classes("pane"):
                self.truth = self._picture("truth")
                with ui.row().classes("caption w-full items-center no-wrap"):
                    self.truth_caption = ui.label("").classes("ellipsis")
                    ui.space()
                    self.go = ui.button("Look from here", icon="my_location", on_click=self._go_to_nearest)
                    self.go.props("flat dense no-caps size=sm")
        self._listen()
        with ui.row().classes("w-full items-center no-wrap gap-3"):
            ui.label("True views").classes("slider-name")
            self.slider = ui.slider(min=0, max=1, value=0).props("dense snap").classes("views")
            self.slider.on("update:model-value", self._on_view, throttle=0.05)
            ui.button("Reset camera", icon="restart_alt", on_click=self._reset).props("flat dense no-caps size=sm")
        self._build_mixer()

    def _picture(self, name: str) -> ui.interactive_image:
        return ui.interactive_image(sanitize=False).classes(f"picture {name}")

    def _build_mixer(self) -> None:
        with ui.row().classes("mixer w-full items-center no-wrap gap-3"):
            self.mix_hint = ui.label("Mix: press + on another scene of the gallery").classes("faint")
            self.mix_box = ui.row().classes("w-full items-center no-wrap gap-3")
            with self.mix_box:
                self.mix_name = ui.label("").classes("mix-name ellipsis")
                self.coefs = self._mix_slider("coefs", "coefs", len(self.viewed.shared.base_planes) > 0)
                self.micro = self._mix_slider("micro", "micro planes", self.viewed.shared.micro_shape[1] > 0)
                ui.button(icon="close", on_click=self._unmix).props("flat dense round size=sm").tooltip("Stop mixing")
        self.mix_box.set_visibility(False)

    def _mix_slider(self, name: str, text: str, there: bool) -> ui.slider:
        """A slider from 0, the first scene, to 1, the second. Hidden where scenes have nothing that it could mix."""
        with ui.row().classes("col items-center no-wrap gap-2") as box:
            ui.label(text).classes("slider-name")
            slider = ui.slider(min=0, max=1, step=0.01, value=0).props("dense label").classes(f"mix-{name}")
            slider.on("update:model-value", self._on_mix, throttle=0.05)
        box.set_visibility(there)
        return slider

    def _listen(self) -> None:
        self.image.on("pointerdown", self._on_press, js_handler=PRESS)
        self.image.on("pointermove", self._on_drag, throttle=EVENT_SECONDS, js_handler=DRAG)
        self.image.on("wheel.prevent", self._on_wheel, throttle=EVENT_SECONDS, js_handler=WHEEL)

    # ------------------------------------------------------------------ scenes

    async def pick(self, row: Mapping[str, Any]) -> None:
        """Show another scene. A camera at a true view goes to the same view of the new scene (to the first test view if
        there is none); a camera that was moved stays."""
        self.first, self.views, self.shown_view = row, None, None
        self._unmix_quietly()
        self.title.set_text(row["scene_id"])
        self._show_metrics(row)
        await self.show()
        try:
            views = await self._read_truth(row["scene_id"], row["stage"])
        except ERRORS as error:
            self.truth.set_source("")
            self.truth_caption.set_text(f"no truth: {error}")
            self.go.set_visibility(False)
            return
        if views is None or self.first is not row:
            return  # another scene was picked meanwhile
        self.views = views
        self.slider.props(f"max={len(views.images) - 1}")
        if self.at_view is None:
            self._show_nearest()
        else:
            await self._go_to(self.at_view if 0 <= self.at_view < len(views.images) else views.test_views[0])

    async def _read_truth(self, scene_id: str, stage: int) -> SceneViews | None:
        scene: OpenScene | None = await self._ask(self.worker, "open", lambda: self.viewed.open(scene_id), urgent=True)
        if scene is None:
            return None
        data = scene.shared.settings.data
        return await self._ask(self.reader, "truth", lambda: self.viewed.truth.views(scene_id, stage, data))

    async def pick_second(self, row: Mapping[str, Any]) -> None:
        """Mix the shown scene with another, half and half at first. The page says why if they cannot be mixed."""
        if self.first is None:
            return
        self.second = row
        self.coefs.set_value(0.5)
        self.micro.set_value(0.5)
        if not await self.show():
            await self._unmix()
            return
        self.mix_name.set_text(f"mixed with {row['scene_id']}")
        self.mix_hint.set_visibility(False)
        self.mix_box.set_visibility(True)

    def _unmix_quietly(self) -> None:
        self.second = None
        self.mix_box.set_visibility(False)
        self.mix_hint.set_visibility(True)

    async def _unmix(self) -> None:
        self._unmix_quietly()
        await self.show()

    def _show_metrics(self, row: Mapping[str, Any]) -> None:
        self.metrics.clear()
        with self.metrics:
            for name, value in facts(row):
                with ui.column().classes("metric"):
                    ui.label(value).classes("value")
                    ui.label(name).classes("name")

    # ------------------------------------------------------------------ drawing

    async def show(self, *_: Any, draft: bool = False) -> bool:
        """Draw what is chosen now. A draft is followed by the full picture once nothing moves any more.

        → False where it could not be drawn; the page then says why.
        """
        # The full picture that an earlier draft asked for is out of date.
        if self.rest is not None:
            self.rest.cancel()
            self.rest = None
        if self.first is None:
            return True
        shot = self._shot(draft)
        began = asyncio.get_running_loop().time()
        try:
            drawn: Drawn | None = await self._ask(self.worker, "frame", lambda: self.viewed.draw(shot), urgent=True)
        except ERRORS as error:
            with self.image:
                ui.notify(str(error), type="negative", multi_line=True, timeout=10_000)
            return False
        if drawn is None:
            return True  # a newer picture is on its way
        self.image.set_source(data_url(drawn.png))
        self.milliseconds.set_text(f"{1000 * (asyncio.get_running_loop().time() - began):.0f} ms")
        self._tell(shot, drawn)
        if drawn.draft and self.rest is None:
            self.rest = background_tasks.create(self._finish(), name="the full picture")
        return True

    async def _finish(self) -> None:
        await asyncio.sleep(REST_SECONDS)
        self.rest = None
        await self.show()

    def _shot(self, draft: bool) -> Shot:
        assert self.first is not None
        shot = Shot(
            self.first["scene_id"], self.camera.zoomed(self.zoom), self.mode.value or "rgb", draft,
            truth=self._true_image(),
        )  # fmt: skip
        if self.second is None:
            return shot
        return replace(shot, second=self.second["scene_id"], coefs=self.coefs.value, micro=self.micro.value)

    def _true_image(self) -> Tensor | None:
        """The true image [3, H, W] to compare the render with. None unless the camera is at a true view, without zoom,
        and shows one scene."""
        if self.views is None or self.at_view is None or self.second is not None or self.zoom != 1:
            return None
        return self.views.images[self.at_view]

    def _tell(self, shot: Shot, drawn: Drawn) -> None:
        what = ("Render" if shot.second is None else "Mixture") + (" (draft)" if drawn.draft else "")
        if drawn.measured:
            what += " · {psnr:.2f} dB on this view, MS-SSIM {ms_ssim:.3f}, FLIP {flip:.3f}".format(**drawn.measured)
        self.caption.set_text(what)

    async def _ask(self, worker: Worker, kind: str, job: Any, urgent: bool = False) -> Any:
        return await asyncio.wrap_future(worker.ask(f"{self.key} {kind}", job, urgent))

    # ------------------------------------------------------------------ the camera

    async def _move(self, camera: Camera) -> None:
        self.camera, self.at_view = camera, None
        self._show_nearest()
        await self.show(draft=True)

    def _on_press(self, event: GenericEventArguments) -> None:
        self.pointer = (float(event.args[0]), float(event.args[1]))

    async def _on_drag(self, event: GenericEventArguments) -> None:
        """The object follows the mouse, so the camera turns the other way."""
        x, y = float(event.args[0]), float(event.args[1])
        right, down = x - self.pointer[0], y - self.pointer[1]
        self.pointer = (x, y)
        await self._move(self.camera.turned(-right * TURN, down * TURN))

    async def _on_wheel(self, event: GenericEventArguments) -> None:
        total = float(event.args)
        turned, self.wheel = total - self.wheel, total
        self._zoom_to(self.zoom * ZOOM**-turned)
        await self.show(draft=True)

    def _zoom_to(self, zoom: float) -> None:
        """Zoom, within ZOOMS. A longer focal length only enlarges a picture around its centre, so the page itself can
        enlarge the true view."""
        self.zoom = min(max(zoom, ZOOMS[0]), ZOOMS[1])
        self.truth.style(f"--zoom: {self.zoom}")

    async def _on_mix(self, _: GenericEventArguments) -> None:
        await self.show(draft=True)

    async def _on_view(self, _: GenericEventArguments) -> None:
        """Go to the slider's present view. It may be newer than the event's, to which the slider would jump back."""
        if self.views is not None:
            await self._go_to(min(max(int(self.slider.value), 0), len(self.views.images) - 1))

    async def _go_to_nearest(self) -> None:
        if self.views is not None:
            await self._go_to(self.camera.nearest(self.views.cam2world)[0])

    async def _reset(self) -> None:
        self._zoom_to(1.0)
        await self._move(self.viewed.start)

    async def _go_to(self, index: int) -> None:
        """Put the camera where a true view was taken."""
        assert self.views is not None
        self.camera, self.at_view = view_camera(self.views, index), index
        self._show_truth(index, "from the same camera")
        self.go.set_visibility(False)
        await self.show()

    def _show_nearest(self) -> None:
        if self.views is not None:
            index, degrees = self.camera.nearest(self.views.cam2world)
            self._show_truth(index, f"nearest, {degrees:.0f}° away")
            self.go.set_visibility(True)

    def _show_truth(self, index: int, where: str) -> None:
        assert self.views is not None
        kind = "test" if index in self.views.test_views else "train"
        self.truth_caption.set_text(f"Truth · view {index + 1} of {len(self.views.images)} ({kind}), {where}")
        if index != self.shown_view:
            self.shown_view = index
            self.truth.set_source(data_url(view_png(self.views, index)))
            self.slider.set_value(index)
