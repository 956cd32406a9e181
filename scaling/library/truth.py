"""The views that fitted scenes were fitted to."""

from __future__ import annotations

from scaling.config import Data
from scaling.data.scene_source import EMBEDDED, SceneSource, SourceSpec
from scaling.data.scenes import SceneViews, views_from_row
from scaling.library.run_folder import RunFolder


def noted_source(store: str, data: Data) -> SceneSource:
    """The source that a run notes as `store`. FileNotFoundError or ValueError where it cannot be used."""
    return SourceSpec.of(None if store == EMBEDDED else store, data).open()


def stored_views(run: RunFolder, scene_id: str, stage: int, data: Data) -> SceneViews:
    """A scene's views, of the source that the stage which fitted it used, as config.yaml names it; data: the settings
    of its model. Raises FileNotFoundError, LookupError or ValueError where they cannot be read."""
    source = noted_source(run.store_of(stage), data)
    return views_from_row(next(iter(source.rows([scene_id]))), data.image_size)
