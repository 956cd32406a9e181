"""The views that fitted scenes were fitted to."""

from __future__ import annotations

from scaling.config import Data
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import EMBEDDED, SceneSource, SourceSpec
from scaling.library.run_folder import RunFolder


def noted_source(store: str, data: Data) -> SceneSource:
    """The source that a run notes as `store`. FileNotFoundError or ValueError where it cannot be used."""
    return SourceSpec.of(None if store == EMBEDDED else store, data).open()


def stored_views(run: RunFolder, scene_id: str, stage: int, data: Data) -> SceneViews:
    """A scene's views, of the source that the stage which fitted it used, as config.yaml names it; data: the settings
    of its model. Raises FileNotFoundError, LookupError or ValueError where they cannot be read."""
    source = noted_source(run.store_of(stage), data)
    return views_from_row(next(iter(source.rows([scene_id]))), data.image_size)


class TrueViews:
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
