"""The viewer's page: the gallery on the left, the chosen scene on the right. The server does all the work."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from nicegui import Client, context, ui

from scaling.viewer.draw_scenes import ViewedRun, data_url
from scaling.viewer.gallery import BEST_FIRST, SORTS, Gallery
from scaling.viewer.scene_pane import ERRORS, ScenePane
from scaling.viewer.server import App, LocalOnly
from scaling.viewer.worker import Worker

MAX_VISITORS = 32  # open pages; each takes some MB
CONNECT_SECONDS = 20.0  # a visitor whose browser opens no connection in this time is forgotten
TOGETHER = 4  # thumbnails in one job: a scene that is being turned waits for one job at most
STYLE = Path(__file__).with_name("viewer.css")


class GalleryPane:
    """The gallery of one page. Thumbnails are drawn only for the scenes shown, and kept for all pages."""

    def __init__(self, viewed: ViewedRun, worker: Worker, gallery: Gallery, scene: ScenePane) -> None:
        self.viewed, self.worker, self.gallery, self.scene = viewed, worker, gallery, scene
        self.key = f"{context.client.id} thumbnails"
        self.descending = False
        self.cards: dict[str, ui.element] = {}
        self.chosen = ""
        self._build()

    def _build(self) -> None:
        self.search = ui.input(placeholder="Search ids, categories, cohorts", on_change=self.refresh).mark("search")
        self.search.props("dense outlined clearable debounce=200").classes("w-full search")
        with ui.row().classes("w-full items-center no-wrap gap-2"):
            self.sort = ui.select(SORTS, value="scene_id", on_change=self._on_sort).props(
                "dense outlined options-dense"
            )
            self.sort.classes("col sort")
            self.direction = ui.button(icon="arrow_upward", on_click=self._turn_round).props("flat dense round")
            self.direction.classes("direction").tooltip("Turn the order round")
            stages = {row["stage"] for row in self.gallery.rows.values()}
            names = {0: "both stages", 1: "stage 1", 2: "stage 2"}
            self.stage = ui.select(names, value=0, on_change=self.refresh).props("dense outlined options-dense")
            self.stage.set_visibility(len(stages) > 1)
        self.found = ui.label("").classes("faint found")
        self.grid = ui.element("div").classes("grid-of-scenes")
        self.pages = ui.pagination(1, 1, direction_links=True, on_change=self.refresh).props(
            "max-pages=6 dense size=sm"
        )
        self.pages.classes("self-center pages")

    async def _on_sort(self) -> None:
        self._order(self.sort.value in BEST_FIRST)
        await self.refresh()

    async def _turn_round(self) -> None:
        self._order(not self.descending)
        await self.refresh()

    def _order(self, descending: bool) -> None:
        self.descending = descending
        self.direction.props(f"icon={'arrow_downward' if descending else 'arrow_upward'}")

    async def refresh(self, *_: Any) -> None:
        """Show the gallery page that search, order and page number ask for, then draw the missing thumbnails."""
        page = self.gallery.page(
            self.search.value or "", self.sort.value, self.descending, self.pages.value or 1, self.stage.value or None
        )
        self.pages.max = page.num_pages
        if self.pages.value != page.number:
            self.pages.set_value(page.number)  # its on_change calls this method again
            return
        self.pages.set_visibility(page.num_pages > 1)
        last = page.first + len(page.rows) - 1
        self.found.set_text(f"{page.first}-{last} of {page.num_found:,}" if page.rows else "no scene matches")
        self.grid.clear()
        self.cards.clear()
        with self.grid:
            for row in page.rows:
                self._card(row)
        await self._draw([row["scene_id"] for row in page.rows])

    def _card(self, row: Mapping[str, Any]) -> None:
        chosen = " chosen" if row["scene_id"] == self.chosen else ""
        card = ui.element("div").classes(f"scene-card{chosen}").on("click", lambda: self._pick(row))
        with card:
            card.props["title"] = f"{row['scene_id']} {row['category']}"
            self.cards[row["scene_id"]] = card
            ui.element("img").classes("thumbnail")
            mix = ui.button(icon="add").props("round dense unelevated size=sm").classes("mix")
            mix.on("click.stop", lambda: self.scene.pick_second(row)).tooltip("Mix the shown scene with this one")
            ui.label(row["scene_id"]).classes("ellipsis name")
            ui.label("-" if row["psnr"] is None else f"{row['psnr']:.2f} dB").classes("faint")

    async def _pick(self, row: Mapping[str, Any]) -> None:
        self.mark(row["scene_id"])
        await self.scene.pick(row)

    def mark(self, scene_id: str) -> None:
        """Frame the card of the chosen scene, now and whenever the gallery shows it again."""
        if self.chosen in self.cards:
            self.cards[self.chosen].classes(remove="chosen")
        if scene_id in self.cards:
            self.cards[scene_id].classes("chosen")
        self.chosen = scene_id

    async def _draw(self, ids: Sequence[str]) -> None:
        """Show the thumbnails of the scenes; draw those that are not kept.

        Drawing stops when the gallery shows another page: the jobs of that page replace those of this one.
        """
        cards = dict(self.cards)
        kept = {scene_id: self.viewed.thumbnail(scene_id) for scene_id in ids}
        self._set(cards, {scene_id: png for scene_id, png in kept.items() if png is not None})
        missing = [scene_id for scene_id, png in kept.items() if png is None]
        for start in range(0, len(missing), TOGETHER):
            chunk = missing[start : start + TOGETHER]
            job = partial(self.viewed.draw_thumbnails, chunk)
            try:
                made = await asyncio.wrap_future(self.worker.ask(self.key, job))
            except ERRORS as error:
                with self.grid:
                    ui.notify(str(error), type="negative", multi_line=True, timeout=10_000)
                continue
            if made is None or cards != self.cards:
                return
            self._set(cards, made)

    def _set(self, cards: Mapping[str, ui.element], pngs: Mapping[str, bytes]) -> None:
        for scene_id, png in pngs.items():
            image = next(iter(cards[scene_id]))
            image.props["src"] = data_url(png)


def make_app(viewed: ViewedRun, worker: Worker, reader: Worker) -> App:
    """The page at / as an ASGI app for `serve`. worker renders; reader reads true views and the gallery."""

    @ui.page("/", title=f"{viewed.run.name} - scaled inverse graphics")
    async def page() -> None:
        gallery = await asyncio.wrap_future(reader.ask(f"{context.client.id} gallery", viewed.gallery))
        ui.add_css(STYLE)
        ui.colors(primary="#e0a458", dark="#17191c", negative="#a33a3a")
        _header(viewed, gallery)
        with ui.row().classes("page no-wrap"):
            left, right = ui.column().classes("left"), ui.column().classes("right")
        with right:
            scene = ScenePane(viewed, worker, reader)
        with left:
            pane = GalleryPane(viewed, worker, gallery, scene)
        # When the browser leaves the page, its waiting jobs are dropped.
        for key in (scene.key + " frame", pane.key):
            context.client.on_delete(partial(worker.drop, key))
        try:
            await asyncio.wait_for(context.client.connected(), CONNECT_SECONDS)
        except TimeoutError:
            context.client.delete()
            return
        first = gallery.page().rows[0]
        pane.mark(first["scene_id"])
        await asyncio.gather(scene.pick(first), pane.refresh())

    # NiceGUI looks for its server among all objects in memory; torch's deprecated objects warn when they are touched.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # those pages load scripts from a CDN
    ui.run_with(app, dark=True, show_welcome_message=False, gzip_middleware_factory=None, message_history_length=0)
    return LocalOnly(app, _is_full)


def _is_full() -> bool:
    """Whether there are as many visitors as there may be; those that have left, or never came, do not count."""
    if len(Client.instances) >= MAX_VISITORS:
        Client.prune_instances(client_age_threshold=CONNECT_SECONDS)
    return len(Client.instances) >= MAX_VISITORS


def _header(viewed: ViewedRun, gallery: Gallery) -> None:
    data = viewed.shared.settings.data
    with ui.row().classes("head w-full items-baseline no-wrap gap-4"):
        ui.label(viewed.run.name).classes("run")
        ui.label(f"{len(gallery):,} fitted scenes").classes("faint")
        identity = viewed.shared.autoencoder.is_identity
        space = "RGB space" if identity else f"latents of {viewed.shared.latent_size}²"
        ui.label(f"{data.image_size}² images, {space}").classes("faint")
        ui.space()
        ui.label("drag to orbit · wheel to zoom · reload for scenes that were committed since").classes("faint")
