"""Caches the encoder's mean latents of every view of a store, once, so that stage 2 need not encode them.

Ray actors hold the shared model and make one part of the cache after another; stage 2's dispatcher assigns the parts.
A part is written whole or not at all, and is the same whoever makes it. If an actor dies, another one makes its part.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass, field
from typing import Any

import pyarrow as pa
import torch

from scaling.config import Settings, SettingsError
from scaling.data.latent_cache import LatentCache
from scaling.data.latents import pack_latents
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SourceSpec, read_rows
from scaling.distributed.cluster import Resources, actor_class, share_for_actors
from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.stage2.messages import FITTED, Fitted, Outcome
from scaling.library.failures import RETRY
from scaling.library.manifest import Event
from scaling.library.parts import Part
from scaling.models.shared_files import load_shared, read_config, read_hash
from scaling.storage.paths import AnyPath, to_path, uri_of
from scaling.storage.text import shown
from scaling.training import watchdog
from scaling.training.training_scene import as_bytes, encode_images

DECODED_AHEAD = 2  # scenes that are decoded while the device encodes another
TOLD = 5  # left-out scenes whose reasons are printed
TRIES = 5  # actors that may die on a part before the job ends


@dataclass(frozen=True)
class EncodeJob:
    """What an actor needs to know, in plain values. shared: as `paths.uri_of` returns it; spec: of a SourceSpec."""

    shared: str
    spec: tuple[str | None, int, int, str | None]
    threads: int
    stall_seconds: float


@dataclass
class Encoded:
    """The number of scenes in a part, or in the whole cache. left_out: by id, why other scenes could not be read."""

    num_scenes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


class Encoder:
    """An actor: holds the shared model on its device and makes parts of the cache."""

    def __init__(self, job: EncodeJob) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def ready(self) -> None:
        """Read the shared model. This is not in the constructor, as Ray hides what a constructor raises. Raises
        SharedModelError where the model is damaged."""
        spec = SourceSpec(*self.job.spec)
        with watchdog.Watchdog(self.job.stall_seconds):  # a start that hangs ends itself: no deadline holds before
            self.shared, shared_hash = load_shared(to_path(self.job.shared), self.device)
            self.source = spec.open()
            self.cache = LatentCache(SceneStore(str(spec.store)), shared_hash)

    def encode(self, number: int) -> Encoded:
        """Encode and write a part of the cache. Raises OSError naming the file where it cannot be written."""
        with watchdog.Watchdog(self.job.stall_seconds):
            rows, done = [], Encoded()
            for scene_id, views in _decoded(read_rows(self.source, self.cache.ids(number)), self.job.spec[1]):
                try:
                    if isinstance(views, Exception):
                        raise views
                    rows.append(self._row(views))
                except ValueError as error:
                    done.left_out[scene_id] = str(error)
                watchdog.beat()
            self.cache.write(number, rows)
            done.num_scenes = len(rows)
            return done

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """Encode the part that the batch names; called by the dispatcher. → an outcome for each of its scenes."""
        ids, number = batch["scene_id"].to_pylist(), batch["part"][0].as_py()
        left_out = self.encode(number).left_out
        kinds = {scene_id: "bad input" if scene_id in left_out else FITTED for scene_id in ids}
        return Fitted([Outcome(scene_id, kind, left_out.get(scene_id, "")) for scene_id, kind in kinds.items()], None)

    def _row(self, views: SceneViews) -> dict[str, Any]:
        try:
            latents = encode_images(self.shared, as_bytes(views.images).to(self.device))
            return {"scene_id": views.scene_id, "shape": list(latents.shape), "latents": pack_latents(latents)}
        except torch.AcceleratorError:
            os._exit(1)  # the GPU fails every later call too


def _decoded(rows: Iterable[dict[str, Any]], image_size: int) -> Iterator[tuple[str, SceneViews | Exception]]:
    """Yield the views of each row, or why they cannot be used. Threads decode a few rows ahead."""

    def decode(row: dict[str, Any]) -> SceneViews | Exception:
        try:
            if row.get("error"):
                return SceneError(row["scene_id"], "", row["error"])
            return views_from_row(row, image_size)
        except SceneError as error:
            return error

    with ThreadPoolExecutor(DECODED_AHEAD) as pool:
        waiting: deque[tuple[str, Future[SceneViews | Exception]]] = deque()
        for row in rows:
            waiting.append((row["scene_id"], pool.submit(decode, row)))
            if len(waiting) > DECODED_AHEAD:
                scene_id, views = waiting.popleft()
                yield scene_id, views.result()
        for scene_id, views in waiting:
            yield scene_id, views.result()


def check_encodes(shared_folder: AnyPath) -> Settings:
    """The settings of a shared model that has an encoder. Raises SettingsError where it has none, SharedModelError
    where there is no shared model."""
    settings = read_config(shared_folder)
    if not settings.autoencoder.has_encoder:
        raise SettingsError(
            f"--shared {shared_folder}: autoencoder.kind is {settings.autoencoder.kind}, which has no network to "
            "encode with; there are no latents to cache, and stage 2 needs none"
        )
    return settings


def cache_latents(store: str, shared_folder: AnyPath, resources: Resources) -> Encoded:
    """Cache the latents of every scene of a store under the shared model, except for those that are cached already.

    Raises what `check_encodes` and opening the store raise, SharedModelError where the model's tensors do not match its
    hash, ValueError where no scene could be read, OSError where a part cannot be written, RuntimeError where actors
    died too often. Parts that were written are kept.
    """
    settings = check_encodes(shared_folder)
    spec = SourceSpec.of(store, settings.data)
    cache = LatentCache(SceneStore(str(spec.store)), read_hash(shared_folder))
    complete = cache.num_scenes()
    if complete is not None:
        print(f"the latents of {complete} of {len(cache.store)} scenes are cached already in {cache.folder}")
        return Encoded(complete)
    # From here on latents.json must not vouch for parts that are being replaced.
    cache.begin()
    whole = cache.whole_parts()
    parts = {number: cache.ids(number) for number in range(cache.num_parts) if number not in whole}
    total = Encoded(sum(whole.values()))
    each = share_for_actors(resources, None, len(parts))
    actor = actor_class(Encoder, each)
    job = EncodeJob(uri_of(shared_folder), astuple(spec), each.threads, settings.stage2.stall_seconds)
    # The dispatcher halves a batch whose actor died; a part must stay whole, so it is passed off as a cohort.
    dispatcher = Dispatcher(
        make_actor=lambda: actor.remote(job),
        wanted=lambda: min(each.workers, len(parts)),
        max_attempts=TRIES,
        deadline=settings.stage2.deadline_seconds,
        accounts=_Parts(total.left_out),
        cohorts=_Whole(),
        title="latents",
    )
    batches = (pa.table({"scene_id": ids, "part": [number] * len(ids)}) for number, ids in parts.items())
    with closing(dispatcher.run(batches, sum(map(len, parts.values())))) as progress:
        for counts in progress:
            total.num_scenes = sum(whole.values()) + counts.done
    if not total.num_scenes:
        why = next(iter(total.left_out.values()), f"remove {cache.folder} to try them again")
        raise ValueError(f"{store}: no scene could be read, so no latents are cached; {why}")
    cache.finish(total.num_scenes)
    print(f"the latents of {total.num_scenes} of {len(cache.store)} scenes are cached in {cache.folder}")
    for why in list(total.left_out.values())[:TOLD]:
        print(f"left out: {shown(why)}")
    return total


class _Whole:
    """The dispatcher's cohorts: a part is made by one actor as a whole, and has no epochs."""

    def text(self) -> str:
        return ""

    def epochs(self, ids: list[str]) -> int:
        """Always 0: an actor that dies leaves nothing of its part."""
        return 0


class _Parts:
    """The dispatcher's accounts. A finished part is in its place already, so only failures are noted. left_out: see
    `Encoded`."""

    def __init__(self, left_out: dict[str, str]) -> None:
        self.left_out = left_out

    def check(self) -> None:
        """Do nothing: other jobs need not be shut out, as they write the same parts."""

    def find(self, attempt: int, batch: list[str]) -> None:
        """Always None: a part whose actor died is made again."""

    def add(self, part: Part) -> None:
        """Do nothing: readers find the parts of a cache by their names."""

    def record(self, events: list[Event]) -> None:
        """Note the scenes that could not be read. Raises RuntimeError where a part was given up."""
        for event in events:
            if event.kind == "bad input":
                self.left_out[event.scene_id] = event.message
            elif event.kind != RETRY:
                raise RuntimeError(
                    f"actors died {TRIES} times while encoding the part of the cache that holds scene "
                    f"{event.scene_id} ({event.message}); run the same command again to go on"
                )
