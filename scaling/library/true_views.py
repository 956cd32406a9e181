"""The true views of fitted scenes: those that they were fitted to, and the test views beside them."""

from __future__ import annotations

from scaling.config import Data
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import EMBEDDED, SceneSource, SourceSpec
from scaling.library.run_folder import RunFolder


def noted_source(run: RunFolder, stage: int, data: Data, store: str | None = None) -> SceneSource:
    """Open `store`; None: the source that a stage of the run used, as config.yaml names it. Raises FileNotFoundError or
    ValueError where it cannot be used."""
    named = store or run.store_of(stage)
    try:
        return SourceSpec.of(None if named == EMBEDDED else named, data).open()
    except FileNotFoundError as error:
        if store:
            raise
        raise FileNotFoundError(f"{error}; or give --store STORE, if it is somewhere else now") from None


def stored_views(run: RunFolder, scene_id: str, stage: int, data: Data, store: str | None = None) -> SceneViews:
    """A scene's views, from `store`; None: from the source that its stage used, as config.yaml names it. data: settings
    of the scene's model. Raises FileNotFoundError or ValueError where the views cannot be read."""
    source = noted_source(run, stage, data, store)
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
            self._sources[stage] = noted_source(self.run, stage, data, self.store)
        row = next(iter(self._sources[stage].rows([scene_id])))
        return views_from_row(row, data.image_size)
