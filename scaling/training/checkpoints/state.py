"""Checkpoints between epochs: one shard of scenes per worker plus the shared model, as safetensors and JSON.

Scenes are found by id, not by rank, so a checkpoint can be loaded on another number of workers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from scaling.config import SettingsError, as_noted, flatten, make_settings
from scaling.data.scene_id import SceneId
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import first_fault, parse_json
from scaling.storage.limited import read_limited
from scaling.storage.tensors import load_tensors

if TYPE_CHECKING:
    from scaling.training.phase_loop import Phases

REMOVE = "set this checkpoint aside, and the same command goes on from the one before, or starts anew"


def save_checkpoint(run: Phases, folder: Path) -> None:
    """Write this worker's part into `folder`; rank 0 adds the shared model, its optimiser and the progress.

    Raises OSError naming the file that could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"scenes-{run.workers.rank}-of-{run.workers.size}.safetensors", save(_scene_tensors(run)))
    if run.workers.rank:
        return
    replace_file(folder / "shared.safetensors", save(_plain(run.shared.state_dict())))
    replace_file(folder / "optimiser.safetensors", save(_optimiser_tensors(run.optimiser)))
    progress = {
        "phase_index": run.phase_index,
        "epoch": run.epoch,
        "seconds": run.seconds,
        "num_shards": run.workers.size,
        "dropped": run.dropped,
        **run.identity,
    }
    replace_file(folder / "progress.json", json.dumps(progress).encode())


class _Progress(BaseModel):
    """progress.json, beside which it holds the keys that identify the job."""

    model_config = ConfigDict(extra="allow")

    phase_index: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    seconds: float
    num_shards: Annotated[int, Field(ge=1, le=99_999)]
    dropped: dict[SceneId, str] = {}


def read_progress(folder: Path) -> dict[str, Any]:
    """The values in a checkpoint's progress.json. Raises ValueError naming the file where it is damaged."""
    path = folder / "progress.json"
    try:
        return _Progress.model_validate(parse_json(read_limited(path))).model_dump()
    except ValueError as error:
        raise ValueError(f"{path}: {first_fault(error)}; {REMOVE}") from error


def read_state(folder: Path) -> dict[str, Tensor]:
    """The shared model's state in a checkpoint. Raises ValueError naming the file where it is damaged."""
    return _tensors(folder / "shared.safetensors")


def load_checkpoint(run: Phases, folder: Path) -> None:
    """Load the shared model, this worker's scenes and the progress into `run`.

    Raises SettingsError where the checkpoint belongs to another job, ValueError naming a file that is damaged.
    """
    progress = read_progress(folder)
    if any(_differs(key, progress.get(key), value) for key, value in run.identity.items()):
        raise SettingsError(
            f"{folder}: this checkpoint was made with other scenes or settings; use those again, or name another --run"
        )
    shards = load_scenes(folder)
    run.shared.load_tensors(read_state(folder))
    for scene_id, row in run.row.items():
        for name, table in (("micro_planes", run.table.micro_planes), ("coefs", run.table.coefs)):
            found = shards.get(f"{scene_id}/{name}")
            if found is None or found.shape != table[row].shape:
                what = "missing" if found is None else f"{list(found.shape)}, not {list(table[row].shape)}"
                raise ValueError(f"{folder}: {name} of scene {scene_id} are {what}; {REMOVE}")
            table[row] = found.to(run.shared.device)
    run.phase_index, run.epoch, run.seconds = progress["phase_index"], progress["epoch"], progress["seconds"]
    run.dropped = progress.get("dropped", {})


def _differs(key: str, noted: Any, now: Any) -> bool:
    """Whether a noted value is that of another job. A setting that is newer counts as the program then behaved."""
    if key != "settings" or not isinstance(noted, dict):
        return bool(noted != now)
    try:
        before = flatten(make_settings(as_noted(noted)).model_dump())
    except SettingsError:
        return True
    return any(before.get(name) != value for name, value in flatten(now).items())


def load_optimisers(run: Phases, folder: Path) -> None:
    """Load the optimisers' states. The checkpoint's phase must have been entered before, which makes the optimisers."""
    _load_optimiser(run.optimiser, _tensors(folder / "optimiser.safetensors"))
    _load_rows(run, load_scenes(folder))


def load_scenes(folder: Path) -> dict[str, Tensor]:
    """The scenes of all workers in a checkpoint: {"<id>/micro_planes": [P, F_mic, K, K], "<id>/coefs": [M], …}."""
    return _scene_shards(folder, read_progress(folder)["num_shards"])


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _scene_tensors(run: Phases) -> dict[str, Tensor]:
    tensors = {}
    for scene_id, row in run.row.items():
        tensors[f"{scene_id}/micro_planes"] = run.table.micro_planes[row]
        tensors[f"{scene_id}/coefs"] = run.table.coefs[row]
        if run.table.hull is not None:
            tensors[f"{scene_id}/hull"] = run.table.hull[row]
        for key, optimiser in run.scene_optimiser.adams.items():
            tensors[f"{scene_id}/{key}.first"] = optimiser.first[row]
            tensors[f"{scene_id}/{key}.second"] = optimiser.second[row]
            tensors[f"{scene_id}/{key}.steps"] = optimiser.steps[row]
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _scene_shards(folder: Path, num_shards: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for rank in range(num_shards):
        tensors |= _tensors(folder / f"scenes-{rank}-of-{num_shards}.safetensors")
    return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMOVE}") from error


def _load_rows(run: Phases, shards: dict[str, Tensor]) -> None:
    for scene_id, row in run.row.items():
        for key, optimiser in run.scene_optimiser.adams.items():
            for name in ("first", "second", "steps"):
                getattr(optimiser, name)[row] = shards[f"{scene_id}/{key}.{name}"].to(run.shared.device)


def _optimiser_tensors(optimiser: torch.optim.Adam | None) -> dict[str, Tensor]:
    states = optimiser.state_dict()["state"] if optimiser else {}
    return _plain({f"{index}.{name}": t for index, state in states.items() for name, t in state.items()})


def _load_optimiser(optimiser: torch.optim.Adam | None, tensors: dict[str, Tensor]) -> None:
    if optimiser is None or not tensors:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
