"""The dispatcher: every scene is accounted for, whatever happens to the actors."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray
from helpers.actors import Books, FragileActor
from ray.exceptions import ActorDiedError, ActorUnavailableError

from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.stage2.messages import FITTED, Counts, Fitted, Flight, Outcome, Piece
from scaling.distributed.stage2.pieces import MAX_LOSSES
from scaling.library.parts import Part

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own warnings are theirs to mend


class NoActor:
    """What the dispatcher may kill when it has it no more."""


@pytest.fixture
def books(monkeypatch) -> Books:
    return Books()


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(ray, "kill", lambda actor: None)


def dispatcher(books: Books, **more: Any) -> Dispatcher:
    return Dispatcher(NoActor, lambda: 2, max_attempts=2, deadline=60, accounts=books, **more)


def piece(*ids: str) -> Piece:
    return Piece(pa.table({"scene_id": list(ids)}))


def waiting(found: Dispatcher) -> list[list[str]]:
    return [left.ids for left in found.pieces.waiting]


def test_every_scene_is_accounted_for(ray_6_cpus_4_gpus, books):
    """With real actors: one that dies, one that hangs, a write that fails once, a scene that cannot be used."""
    groups = [["deadly-1", "bad-1"], ["slow-1"], ["flaky-1", "a"], ["b"]]
    batches = iter([pa.table({"scene_id": ids}) for ids in groups])
    job = Dispatcher(FragileActor.remote, lambda: 3, max_attempts=1, deadline=2.0, accounts=books)
    *_, counts = job.run(batches, 6)
    assert (counts.done, counts.failed, counts.left) == (3, 3, 0)
    assert {event.scene_id: event.kind for event in books.events} == {
        "deadly-1": "actor died", "bad-1": "bad input", "slow-1": "actor died", "flaky-1": "retry", "a": "retry",
    }  # fmt: skip
    assert books.kinds("bad-1") == ["retry", "bad input"], "its first actor died with its neighbour"
    [told] = [event.message for event in books.events if event.scene_id == "slow-1"]
    assert told == "no result within 2 s"


def test_a_deadly_scene_is_found_by_halves(books):
    """Of 8 scenes the sixth kills: 4 + 4, 2 + 2, 1 + 1; alone it may kill twice. Its neighbours are never given up."""
    job, counts = dispatcher(books), Counts(total=8)
    job.pieces.waiting.append(piece(*"abcdefgh"))
    deaths = 0
    while job.pieces.waiting:
        taken = job.pieces.waiting.popleft()
        if "f" in taken.ids:
            deaths += 1
            job.pieces.lost(taken, "gone", counts, own_doing=True)
        else:
            job.pieces.settle(taken, Fitted([Outcome(i, FITTED, "", 20.0) for i in taken.ids], None), counts)
    assert (counts.done, counts.failed, deaths) == (7, 1, 3 + 2)
    assert books.kinds("f") == ["retry"] * 4 + ["actor died"] and books.kinds("a") == ["retry"]
    assert counts.mean_psnr == 20.0


def test_a_nodes_death_is_not_its_scenes_fault_for_ever(books):
    job, counts = dispatcher(books), Counts(total=2)
    job.pieces.waiting.append(piece("a", "b"))
    for _ in range(MAX_LOSSES):
        job.pieces.lost(job.pieces.waiting.popleft(), "the node died", counts, own_doing=False)
        assert waiting(job) == [["a", "b"]]
    job.pieces.lost(job.pieces.waiting.popleft(), "the node died", counts, own_doing=False)
    assert waiting(job) == [["a"], ["b"]], "a scene that kills nodes is looked for as one that kills actors"
    assert [left.attempt for left in job.pieces.waiting] == [MAX_LOSSES + 2] * 2


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (ActorUnavailableError("Socket closed", None), [["a", "b"]]),
        (ActorDiedError(), [["a"], ["b"]]),
    ],
)
def test_which_deaths_are_a_nodes(books, no_ray, monkeypatch, error, left):
    """As measured: a node that vanishes makes its actors unavailable; a process that dies is reported as dead."""

    def fail(future: object) -> None:
        raise error

    monkeypatch.setattr(ray, "get", fail)
    job = dispatcher(books)
    assert not job._collect("future", Flight(NoActor(), piece("a", "b")), Counts(total=2))
    assert waiting(job) == left


def test_a_commit_that_came_through_counts(books):
    """An actor may die between its commit and its answer; what it had not stored is tried again."""
    part = Part(
        name=f"part-000001-0001-{'0' * 20}.parquet", sha256="", num_bytes=1, stage=2, shared="", settings_hash="",
        scene_ids=("a", "c"),
    )  # fmt: skip
    books.committed["a", "b", "c"] = part
    job, counts = dispatcher(books), Counts(total=3)
    job.pieces.lost(piece("a", "b", "c"), "gone", counts, own_doing=True)
    assert (counts.done, counts.failed, waiting(job)) == (2, 0, [["b"]])


class Queue(NoActor):
    """Takes calls and never answers."""

    class fit:
        @staticmethod
        def remote(rows: pa.Table, attempt: int) -> object:
            return object()


def test_the_last_pieces_and_suspects_are_not_given_ahead(books):
    """Two actors, pieces of two scenes: while 4 or more scenes are in nobody's hands, an actor gets a second piece."""
    job, counts = dispatcher(books, at_once=2), Counts(total=8)
    job.target = 2
    batches = iter([pa.table({"scene_id": [f"{n}-a", f"{n}-b"]}) for n in range(4)])
    first, second = Queue(), Queue()
    job._give(first, batches, counts)
    job._give(second, batches, counts)
    held = [[flight.piece.ids[0] for flight in job.in_flight.values() if flight.actor is of] for of in (first, second)]
    assert held == [["0-a", "1-a"], ["2-a"]]
    third, retried = Queue(), piece("4-a", "4-b").again([0])
    job.pieces.waiting.appendleft(retried)
    job._give(second, batches, Counts(total=99))
    job._give(third, batches, Counts(total=99))
    held = [[flight.piece.ids[0] for flight in job.in_flight.values() if flight.actor is of] for of in (second, third)]
    assert held == [["2-a"], ["4-a"]], "what was lost before is held alone"


def test_who_dies_beside_others_is_not_blamed(books, no_ray, monkeypatch):
    """Two single scenes in one actor: neither counts a death; alone, the deadly one does."""

    def die(future: object) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(ray, "get", die)
    job, counts, actor = dispatcher(books, at_once=2), Counts(total=2), NoActor()
    job.in_flight["b"] = Flight(actor, piece("b"))
    assert not job._collect("a", Flight(actor, piece("a")), counts)
    assert waiting(job) == [["a"], ["b"]] and not job.in_flight and not job.pieces.deaths
    alone = job.pieces.waiting.popleft()
    assert not job._collect("a", Flight(actor, alone), counts)
    assert dict(job.pieces.deaths) == {"a": 1} and waiting(job) == [["b"], ["a"]]


def test_a_piece_in_the_queue_has_time_from_when_the_one_before_it_ends(books, no_ray, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda future: Fitted([Outcome("a", FITTED)], None))
    job, counts, actor = dispatcher(books, at_once=3), Counts(total=3), NoActor()
    now = time.monotonic()
    job.in_flight = {"hung": Flight(actor, piece("h"), now - 59), "queued": Flight(actor, piece("b"), now - 50)}
    assert job._collect("a", Flight(actor, piece("a"), now - 55), counts)
    assert [now - flight.since > 1 for flight in job.in_flight.values()] == [True, False]
    job.in_flight["hung"].since -= 2
    job._kill_overdue(counts)
    assert not job.in_flight and dict(job.pieces.deaths) == {"h": 1} and dict(job.pieces.losses) == {"b": 1}
    assert waiting(job) == [["h"], ["b"]]


def test_pipelined_actors_lose_no_scene(ray_6_cpus_4_gpus, books):
    """Each scene a piece of its own, two in an actor: the deadly one is given up, what died beside it is fitted."""
    ids = ["a", "b", "deadly-1", "c", "flaky-1", "d", "e", "f", "g", "h"]
    batches = iter([pa.table({"scene_id": [scene_id]}) for scene_id in ids])
    make_actor = FragileActor.options(max_concurrency=2).remote
    job = Dispatcher(make_actor, lambda: 1, max_attempts=2, deadline=20.0, accounts=books, at_once=2)
    *_, counts = job.run(batches, len(ids))
    assert (counts.done, counts.failed) == (len(ids) - 1, 1)
    assert [event.scene_id for event in books.events if event.kind == "actor died"] == ["deadly-1"]


class Epochs:
    """Cohorts that have come as far as the numbers say."""

    def __init__(self, epochs: list[int]) -> None:
        self.left = epochs

    def text(self) -> str:
        return ""

    def epochs(self, ids: list[str]) -> int:
        return self.left.pop(0)


def test_a_cohort_whose_actor_dies_stays_whole(books):
    """Two deaths in a row are too many; one after it had come further starts the count anew."""
    job, counts = dispatcher(books, cohorts=Epochs([0, 2, 0])), Counts(total=3)
    for _ in range(2):
        job.pieces.lost(piece("a", "b", "c"), "gone", counts, own_doing=True)
        assert [job.pieces.waiting.pop().ids] == [["a", "b", "c"]]
    job.pieces.lost(piece("a", "b", "c"), "gone", counts, own_doing=True)
    assert (counts.done, counts.failed, len(job.pieces.waiting)) == (0, 3, 0)

    books.committed["a", "b", "c"] = Part(
        name=f"part-000001-0001-{'0' * 20}.parquet", sha256="", num_bytes=1, stage=2, shared="", settings_hash="",
        scene_ids=("a", "c"),
    )  # fmt: skip
    counts = Counts(total=3)
    job.pieces.lost(piece("a", "b", "c"), "gone", counts, own_doing=True)
    assert (counts.done, counts.failed) == (2, 1) and books.kinds("b")[-1] == "left out"


def test_actors_come_and_go_with_the_cluster(ray_6_cpus_4_gpus, books, monkeypatch):
    """One actor at first; while it works the cluster grows to three, and the job takes them."""
    monkeypatch.setattr("scaling.distributed.stage2.dispatcher.STAFF_SECONDS", 0.0)
    sizes: Iterator[int] = iter([1, 1, 1])
    started: list[Any] = []

    def start() -> Any:
        started.append(FragileActor.remote())
        return started[-1]

    job = Dispatcher(start, lambda: next(sizes, 3), max_attempts=1, deadline=60, accounts=books)
    batches = (pa.table({"scene_id": [f"{n}-{i}" for i in range(2)]}) for n in range(40))
    for counts in job.run(batches, 80):  # noqa: B007
        assert len(job.in_flight) <= 3
    assert counts.done == 80 and len(started) == 3


def test_actors_that_cannot_start_end_the_job_not_the_first_try(ray_6_cpus_4_gpus, books):
    """One that starts at the second try is waited for; after twice as many failures as actors in a row the job ends."""
    tries = iter(range(100))

    def start(good_from: int) -> Any:
        return FragileActor.remote(fails=next(tries) < good_from)

    job = Dispatcher(lambda: start(1), lambda: 1, max_attempts=1, deadline=60, accounts=books)
    *_, counts = job.run(iter([pa.table({"scene_id": ["a"]})]), 1)
    assert counts.done == 1
    job = Dispatcher(lambda: start(99), lambda: 1, max_attempts=1, deadline=60, accounts=books)
    with pytest.raises(RuntimeError, match="no actor could start, 2 tries in a row"):
        list(job.run(iter([pa.table({"scene_id": ["a"]})]), 1))


def test_a_signal_lets_batches_in_flight_finish(ray_6_cpus_4_gpus, books):
    """What was handed out when SIGTERM came is fitted and counted, the rest is left for the next run."""
    job = Dispatcher(FragileActor.remote, lambda: 1, max_attempts=1, deadline=60, accounts=books)
    before = signal.getsignal(signal.SIGTERM)

    def batches() -> Iterator[pa.Table]:
        for number in range(100):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield pa.table({"scene_id": [f"{number}"]})

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for counts in job.run(batches(), 100):
            seen.append(counts.done)
    assert seen[-1] == 4, "the batch in hand was fitted, no other was begun"
    assert signal.getsignal(signal.SIGTERM) is before and threading.active_count() >= 1
