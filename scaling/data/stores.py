"""Sources of scene rows: a scene store or, without one, the embedded cars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from scaling.config import Data
from scaling.data.latent_cache import LatentCache
from scaling.data.scene_store import SceneStore
from scaling.storage.formats import is_sha256
from scaling.storage.paths import to_path, uri_of

EMBEDDED = "embedded"  # what a run records as its store if it used none
EMBEDDED_COUNT = 100_000  # a limit for the list of ids: any number of cars could be made


class SceneSource(Protocol):
    """A source of scenes: ids in store order, and the rows of chosen ids."""

    @property
    def name(self) -> str: ...

    def ids(self) -> list[str]: ...

    def categories(self) -> list[str]: ...

    def splits(self) -> list[str]: ...

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]: ...

    def bounds(self) -> list[list[float]] | None: ...

    def no_bounds(self) -> dict[str, list[str]]: ...


@dataclass(frozen=True)
class EmbeddedCars:
    """Procedural cars, rendered on demand."""

    image_size: int
    num_views: int
    name: str = "the embedded cars"

    def ids(self) -> list[str]:
        """Their ids."""
        from scaling.data.embedded.scenes import embedded_ids  # imports torch, which reading a store does without

        return embedded_ids(EMBEDDED_COUNT)

    def categories(self) -> list[str]:
        return ["car"] * EMBEDDED_COUNT

    def splits(self) -> list[str]:
        return [""] * EMBEDDED_COUNT

    def bounds(self) -> None:
        """None: the bounds are not known before the cars are made."""

    def no_bounds(self) -> dict[str, list[str]]:
        return {}

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield rows in the form of a store's, one at a time."""
        from scaling.data.embedded.scenes import embedded_car

        for scene_id in self.ids() if ids is None else ids:
            yield embedded_car(scene_id, self.image_size, self.num_views)


class StoreSource(SceneStore):
    """A scene store as a source. latents: the hash of the shared model whose cached latents its rows carry."""

    def __init__(self, uri: str | Path, latents: str | None = None) -> None:
        super().__init__(uri)
        self.cache = LatentCache(self, latents) if latents else None

    @property
    def name(self) -> str:
        return self.uri

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of the store, with `latents` and `latent_shape` where cached latents are used."""
        rows = super().rows(ids)
        return self.cache.add_to(rows) if self.cache else rows


@dataclass(frozen=True)
class SourceSpec:
    """A source, named in plain values that travel between processes.

    store: None for the embedded cars; latents: as for `StoreSource`.
    """

    store: str | None
    image_size: int
    num_views: int
    latents: str | None = None

    @classmethod
    def of(cls, store: str | None, data: Data) -> SourceSpec:
        """Name the store of a command line. A local path becomes absolute, because workers run in other folders.

        Raises ValueError where `to_path` does.
        """
        return cls(uri_of(to_path(store)) if store else store, data.image_size, data.embedded_views)

    def with_latents(self, shared_hash: str) -> SourceSpec:
        """The same source, whose rows carry latents if they are cached for this shared model.

        Raises FileNotFoundError or ValueError where the store or the cache cannot be used.
        """
        if self.store is None or not is_sha256(shared_hash):
            return self
        cached = LatentCache(SceneStore(self.store), shared_hash).num_scenes()
        return replace(self, latents=shared_hash) if cached else self

    def open(self) -> SceneSource:
        """Open the source. Raises FileNotFoundError or ValueError where the store cannot be used."""
        if self.store is None:
            return EmbeddedCars(self.image_size, self.num_views)
        return StoreSource(self.store, self.latents)


def read_rows(source: SceneSource, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Read rows of scenes. Of a scene that cannot be read, the row holds only the id and `error`."""
    try:
        return list(source.rows(ids))
    except (OSError, ValueError):  # one of them is damaged: read them one by one to find it
        return [_read_one(source, scene_id) for scene_id in ids]


def _read_one(source: SceneSource, scene_id: str) -> dict[str, Any]:
    try:
        return next(iter(source.rows([scene_id])))
    except (OSError, ValueError) as error:
        return {"scene_id": scene_id, "error": str(error)}
