"""Which scenes and views a step takes: equally many from each scene bucket, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from scaling.config import SettingsError
from scaling.training.random_streams import stream

Entry = tuple[str, int]  # scene id, and the view where items are whole views


def bucket_of(scene_ids: Sequence[str], num_buckets: int) -> dict[str, int]:
    """The bucket of each scene. Scenes are dealt in turn, so buckets differ by at most one scene.

    Raises SettingsError where there are fewer scenes than buckets.
    """
    if len(scene_ids) < num_buckets:
        raise SettingsError(
            f"{len(scene_ids)} scenes for stage1.num_buckets = {num_buckets}: every bucket needs a scene; "
            "raise --num-scenes or lower stage1.num_buckets"
        )
    return {scene_id: index % num_buckets for index, scene_id in enumerate(scene_ids)}


def epoch_batches(
    buckets: dict[int, list[Entry]], per_bucket: int, steps: int, *names: object
) -> Iterator[list[tuple[int, Entry]]]:
    """Yield one epoch's steps: `per_bucket` entries from each given bucket, as (place in the global batch, entry).

    A bucket is dealt out in random order and shuffled again when it runs out. The order depends on `names` and the
    bucket alone, so a worker that holds some of the buckets sees its part of the same global batch.
    """
    queues = {bucket: _deal(entries, names, bucket) for bucket, entries in buckets.items()}
    for _ in range(steps):
        yield [
            (bucket * per_bucket + place, next(queue))
            for bucket, queue in queues.items()
            for place in range(per_bucket)
        ]


def _deal(entries: list[Entry], names: tuple[object, ...], bucket: int) -> Iterator[Entry]:
    generator = stream(*names, "bucket", bucket)
    while True:
        for index in torch.randperm(len(entries), generator=generator).tolist():
            yield entries[index]
