"""The true views of fitted scenes: those that they were fitted to, and the test views beside them."""

from __future__ import annotations

from scaling.config import Data
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import EMBEDDED, SceneSource, SourceSpec
from scaling.library.run_folder import RunFolder


def noted_source(store: str, data: Data) -> SceneSource:
    """Open the source that a run notes as `store`. Raises FileNotFoundError or ValueError where it cannot be used."""
    return SourceSpec.of(None if store == EMBEDDED else store, data).open()


def stored_views(run: RunFolder, scene_id: str, stage: int, data: Data) -> SceneViews:
    """A scene's views, from the source that its stage used, as config.yaml names it. data: settings of the scene's
    model. Raises FileNotFoundError or ValueError where the views cannot be read."""
    source = noted_source(run.store_of(stage), data)
    return views_from_row(next(iter(source.rows([scene_id]))), data.image_size)


class TrueViews:
    """Opens a stage's store when one of its scenes is asked for. store: used instead of those that config.yaml names.

    Only one thread at a time may use it.
    """

    def __init__(self, run: RunFolder, store: str | None) -> None:
        self.run = run
        self.store = store
        self._sources: dict[int, SceneSource] = {}

    def views(self, scene_id: str, stage: int, data: Data) -> SceneViews:
        """All views of a scene, in the size that its model renders. Raises OSError or ValueError where there is no such
        store, or it does not hold the scene."""
        if stage not in self._sources:
            store = self.run.store_of(stage) if self.store is None else self.store
            self._sources[stage] = noted_source(store, data)
        row = next(iter(self._sources[stage].rows([scene_id])))
        return views_from_row(row, data.image_size)
