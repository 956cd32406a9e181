"""Translates a space into Ray Tune's terms, and says whether a sweep can resume from Tune's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from scaling.distributed.sweep.results import DOWN
from scaling.distributed.sweep.space import Axis, Space, choices
from scaling.storage.json_yaml import parse_json


def is_whole(folder: Path) -> bool:
    """Whether a sweep can resume from Tune's state in `folder`.

    Tune does not write its files in one step, so a crash may tear one. Each driver has files of its own, whose names
    hold the time of its start.
    """
    states = sorted(folder.glob("experiment_state-*.json"))
    if not states or not (folder / "tuner.pkl").is_file():
        return False
    started = states[-1].stem.removeprefix("experiment_state-")
    others = [path for path in folder.glob(f"*-{started}.*") if path != states[-1]]
    try:
        parse_json(states[-1].read_bytes(), constant=float)
    except ValueError:
        return False
    return all(path.read_bytes().endswith(b".") for path in [folder / "tuner.pkl", *others])  # as pickles end


def domain(axis: Axis, search: str) -> Any:
    """An axis in Tune's terms."""
    if axis.values is not None:
        return tune.grid_search(choices(axis)) if search == "grid" else tune.choice(choices(axis))
    low, high = axis.edges()
    if axis.whole:
        return (tune.lograndint if axis.log else tune.randint)(low, high + 1)
    return (tune.loguniform if axis.log else tune.uniform)(low, high)


class _FinalOnly(OptunaSearch):
    """Optuna without intermediate reports: those are measured on other scenes than the objective."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass


def searcher(space: Space) -> Any:
    """The search algorithm, which chooses the trials."""
    if space.search == "optuna":
        return _FinalOnly(metric="objective", mode="min" if space.metric in DOWN else "max", seed=space.seed)
    return BasicVariantGenerator(max_concurrent=space.concurrent or 0, random_state=space.seed)


def scheduler(space: Space) -> Any:
    """The scheduler, which stops trials on their way; None: all trials run to their end."""
    if space.scheduler == "none":
        return None
    return ASHAScheduler(
        time_attr="progress", metric="psnr", mode="max", max_t=100, grace_period=10, reduction_factor=3
    )
