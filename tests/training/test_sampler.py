"""Random streams, and what a step's batch holds whatever the workers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from scaling.config import SettingsError
from scaling.models.shared_model import SharedModel
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.sampler import bucket_of, epoch_batches
from scaling.training.stage1 import check_workers
from scaling.training.training_scene import prepare_scene


def test_streams_depend_on_names_alone():
    assert stream(0, "warmup", "car").initial_seed() == 927826806844409801, "a checkpoint's run must not draw anew"
    draws = {torch.rand((), generator=stream(*names)).item() for names in [("a",), ("b",), ("a", 1), ("a", 2), ("a1",)]}
    assert len(draws) == 5


def test_buckets_differ_by_one_scene_at_most():
    assert bucket_of(list("abcde"), 2) == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}
    with pytest.raises(SettingsError, match=r"1 scenes for stage1\.num_buckets = 2"):
        bucket_of(["a"], 2)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_global_batch_does_not_depend_on_the_workers(num_workers):
    entries = {bucket: [(f"{bucket}-{scene}", view) for scene in range(2) for view in range(3)] for bucket in range(4)}
    alone = list(epoch_batches(entries, 5, 4, 0, "warmup", 3))
    together: list[list[Any]] = [[] for _ in alone]
    for rank in range(num_workers):
        owned = {bucket: entries[bucket] for bucket in entries if Workers(rank, num_workers).owns(bucket)}
        for batch, part in zip(together, epoch_batches(owned, 5, 4, 0, "warmup", 3)):
            batch.extend(part)
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    for batch in alone:
        assert sorted(place for place, _ in batch) == list(range(20))
        assert all(entry in entries[place // 5] for place, entry in batch)


def test_a_bucket_is_dealt_out_whole_before_it_is_shuffled_again():
    entries = [(name, None) for name in "abcde"]
    dealt = [entry for batch in epoch_batches({0: entries}, 2, 5, "seed") for _, entry in batch]
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == entries and dealt[:5] != dealt[5:]


def test_every_worker_needs_a_bucket(tiny_settings):
    check_workers(tiny_settings, 2)
    with pytest.raises(SettingsError, match=r"3 workers for stage1\.num_buckets = 2"):
        check_workers(tiny_settings, 3)


def test_a_scene_beside_the_box_is_named(tiny_settings, tiny_scenes):
    away = tiny_scenes[0].cam2world.clone()
    away[:, :3, 2] *= -1  # every camera looks outwards
    scene = dataclasses.replace(tiny_scenes[0], cam2world=away)
    with pytest.raises(ValueError, match=r"scene car-00000: no ray .* check the poses"):
        prepare_scene(SharedModel(tiny_settings), scene)
