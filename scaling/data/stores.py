"""Where rows of scenes come from: a scene store, or without one the embedded cars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from scaling.config import Data
from scaling.data.embedded.scenes import embedded_car, embedded_ids
from scaling.data.latent_cache import LatentCache, is_hash
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_store import SceneStore
from scaling.storage.atomic import read_limited

EMBEDDED = "embedded"  # how a run notes that it used no store
EMBEDDED_COUNT = 100_000  # any number could be made; a list of ids needs an end


class SceneSource(Protocol):
    """Ids in store order, and the rows of some of them."""

    @property
    def name(self) -> str: ...

    def ids(self) -> list[str]: ...

    def categories(self) -> list[str]: ...

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]: ...

    def bounds(self) -> list[list[float]] | None: ...


@dataclass(frozen=True)
class EmbeddedCars:
    """Procedural cars, made when asked for."""

    image_size: int
    num_views: int
    name: str = "the embedded cars"

    def ids(self) -> list[str]:
        return embedded_ids(EMBEDDED_COUNT)

    def categories(self) -> list[str]:
        return ["car"] * EMBEDDED_COUNT

    def bounds(self) -> None:
        """Not known beforehand."""

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the store's form, one at a time."""
        for scene_id in self.ids() if ids is None else ids:
            yield embedded_car(scene_id, self.image_size, self.num_views)


class StoredScenes(SceneStore):
    """A scene store that knows its name. latents: the hash of the shared model whose cached latents its rows carry."""

    def __init__(self, uri: str | Path, latents: str | None = None) -> None:
        super().__init__(uri)
        self.cache = LatentCache(self, latents) if latents else None

    @property
    def name(self) -> str:
        return self.uri

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """As a store's; with `latents` and `latent_shape`, where cached latents are used."""
        rows = super().rows(ids)
        return self.cache.add_to(rows) if self.cache else rows


@dataclass(frozen=True)
class SourceSpec:
    """Names a source in plain values that travel between processes. store None: the embedded cars; latents: as
    `StoredScenes` takes them."""

    store: str | None
    image_size: int
    num_views: int
    latents: str | None = None

    @classmethod
    def of(cls, store: str | None, data: Data) -> SourceSpec:
        """A store named on a command line; a local path becomes absolute, as workers run in other folders."""
        local = store is not None and "://" not in store
        return cls(str(Path(store).absolute()) if local and store else store, data.image_size, data.embedded_views)

    def with_latents(self, shared_hash: str) -> SourceSpec:
        """The same source; its rows carry latents, if they are cached for this shared model. ValueError where the
        cache is damaged."""
        if self.store is None or not is_hash(shared_hash):
            return self
        cached = LatentCache(SceneStore(self.store), shared_hash).num_scenes()
        return replace(self, latents=shared_hash) if cached else self

    def open(self) -> SceneSource:
        """Raises FileNotFoundError or ValueError where the store cannot be used."""
        if self.store is None:
            return EmbeddedCars(self.image_size, self.num_views)
        return StoredScenes(self.store, self.latents)


def read_ids(path: Path) -> list[str]:
    """Scene ids of a file, one a line; blank lines and # comments are skipped.

    Raises ValueError naming the file, and the line where there is one.
    """
    try:
        text = read_limited(path).decode("utf-8")
    except OSError as error:
        raise ValueError(f"--scenes {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise ValueError(f"--scenes {path}: not a text file; it should hold one scene id a line") from None
    except ValueError as error:
        raise ValueError(f"--scenes {path}: {error}") from None
    ids: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        scene_id = line.split("#")[0].strip()
        if not scene_id:
            continue
        try:
            ids.append(check_scene_id(scene_id))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    repeated = sorted(scene_id for scene_id, times in Counter(ids).items() if times > 1)
    if repeated:
        raise ValueError(f"{path}: named twice: {', '.join(repeated[:5])}")
    return ids


def ids_by_category(source: SceneSource) -> dict[str, list[str]]:
    """The ids of each category, in store order."""
    of_category: dict[str, list[str]] = {}
    for scene_id, category in zip(source.ids(), source.categories()):
        of_category.setdefault(category, []).append(scene_id)
    return of_category


def categories_in_turn(source: SceneSource) -> list[str]:
    """All ids, one of each category in turn, each category in its own order: any first N hold as many of one as of
    another, as far as there are as many."""
    rounds = zip_longest(*ids_by_category(source).values())
    return [scene_id for in_turn in rounds for scene_id in in_turn if scene_id is not None]


def choose_ids(
    source: SceneSource,
    wanted: Path | None,
    leave_out: Sequence[str] = (),
    skip: int = 0,
    count: int | None = None,
    balanced: bool = False,
) -> list[str]:
    """Ids to work on: those of the file `wanted` or all of the source, less `leave_out`, less the first `skip`.

    At most `count` of them. balanced: where no file names them, `categories_in_turn`, for stage 1, whose base planes
    all categories share. Raises ValueError where the file names a scene that the source does not hold, or where nothing
    is left.
    """
    known = source.ids()
    if wanted is None:
        ids = categories_in_turn(source) if balanced else known
    else:
        ids = read_ids(wanted)
        unknown = sorted(set(ids) - set(known))
        if unknown:
            raise ValueError(f"{wanted}: {source.name} holds no scene {', '.join(unknown[:5])}")
    out = set(leave_out)
    chosen = [scene_id for scene_id in ids if scene_id not in out][skip:]
    if not chosen:
        raise ValueError(
            f"no scene is left of {source.name}: {len(ids)} were named, the shared model was trained on {len(out)}, "
            f"{skip} are skipped"
        )
    return chosen[:count]
