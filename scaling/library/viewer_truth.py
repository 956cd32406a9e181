"""The viewer's truth: the views that scenes were fitted to, from the store that each stage used."""

from __future__ import annotations

from scaling.config import Data
from scaling.data.png import encode_png
from scaling.data.scene_source import SceneSource
from scaling.data.scenes import SceneViews, views_from_row
from scaling.library.render import to_pixels
from scaling.library.run_folder import RunFolder
from scaling.library.truth import noted_source


class Truth:
    """Opens a stage's store when a scene of it is asked for. store: instead of those that config.yaml names.

    One thread at a time may use it.
    """

    def __init__(self, run: RunFolder, store: str | None) -> None:
        self.run = run
        self.store = store
        self._sources: dict[int, SceneSource] = {}

    def views(self, scene_id: str, stage: int, data: Data) -> SceneViews:
        """All views of a scene, in the size that its model renders. OSError or ValueError where there are none: no such
        store, or the scene is not in it."""
        if stage not in self._sources:
            store = self.run.store_of(stage) if self.store is None else self.store
            self._sources[stage] = noted_source(store, data)
        row = next(iter(self._sources[stage].rows([scene_id])))
        return views_from_row(row, data.image_size)


def view_png(views: SceneViews, index: int) -> bytes:
    """One of the views as PNG bytes."""
    return encode_png(to_pixels(views.images[index]))
