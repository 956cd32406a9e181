"""The space of a sweep: a YAML file that says what its trials vary, how they are chosen, and what each may use."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from scaling.cli import read_preset, read_yaml, unflatten
from scaling.config import Positive, Section, Settings, SettingsError, flatten, make_settings, merge
from scaling.models.shared_files import settings_on
from scaling.storage.json_yaml import parse_json

SETTINGS_KEYS = list(flatten(Settings().model_dump()))
OTHER_KEYS = ("preset", "stage1_scenes")  # what else may vary
MAX_TRIALS = 10_000
LONGEST_NAME = 120  # of a trial: it is also a folder's name

Number = Annotated[float | int, Field(allow_inf_nan=False)]


class Axis(Section):
    """The values of one entry of `vary`: a list, or the range of numbers from `low` to `high`."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    """The values to try. Where the entry names several keys (a, b), each value is a list with an item for every key."""
    low: Number | None = None
    """The least number. Where `low` and `high` are whole, only whole numbers are drawn."""
    high: Number | None = None
    """The largest number; the range includes it."""
    log: bool = False
    """Whether numbers are drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _consistent(self) -> Axis:
        if self.values is not None and (self.low is not None or self.high is not None or self.log):
            raise ValueError("low, high and log do not go with values")
        if self.values is None and (self.low is None or self.high is None):
            raise ValueError("give values: [...], or low and high")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low}) must be below high ({self.high})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn from the range."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def edges(self) -> list[Any]:
        """All values, or the two ends of a range."""
        return list(self.values) if self.values is not None else [self.low, self.high]


class Space(Section):
    """A space file. Of the sources that set the same key the last one wins: the preset, `settings`, --config,
    --section.key flags, `vary`."""

    preset: str = "default"
    """Preset of all trials, unless --preset names another one or `vary` has the key `preset`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of all trials, by section. They override the preset's."""
    shared: str | None = None
    """Folder of a trained shared model. Trials then fit stage 2 on it and have no stage 1."""
    stage1_scenes: Positive = 24
    """N_1: the number of scenes that train the shared model: the first ones of the store, each category in turn."""
    stage2_scenes: Positive = 8
    """The number of scenes that every trial fits and is judged by: the first ones on which no trial trains."""
    vary: Annotated[dict[str, Axis], Field(min_length=1)]
    """Dotted settings key, `preset` or `stage1_scenes` → its values. `a, b` are keys that change together."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination; random: num_trials draws; optuna: num_trials that learn from earlier ones (TPE)."""
    num_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """The number of trials of search random or optuna."""
    metric: Literal["psnr", "ssim", "seconds_per_scene", "bytes_per_scene"] = "psnr"
    """What optuna optimises and the table is sorted by: quality of test views in stage 2, or the cost of a scene."""
    scheduler: Literal["none", "asha"] = "none"
    """asha: trials that are behind the others at 10, 30 or 90 % of their progress are stopped."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the draws of random and optuna."""
    cpus_per_trial: Positive = 1
    """CPU cores of a trial; its stage 1 has as many threads."""
    gpus_per_trial: Annotated[float, Field(gt=0, le=1)] | None = None
    """GPUs of a trial: 1, or a fraction where trials share a GPU (0.5: two of them); null: 1 where the cluster has
    GPUs. No trial has more than one, as a sweep has enough trials to fill them all."""
    concurrent: Positive | None = None
    """The number of trials at a time; null: as many as there is room for."""

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        varied = [key for name in self.vary for key in keys_of(name)]
        twice = sorted({key for key in varied if varied.count(key) > 1})
        if twice:
            raise ValueError(f"vary: {', '.join(twice)} is there twice")
        for name, axis in self.vary.items():
            _check_axis(name, axis, self.search)
        if (self.search == "grid") == (self.num_trials is not None):
            raise ValueError("num_trials: needed by search random and optuna; a grid runs all combinations without it")
        if self.shared is not None and "stage1_scenes" in varied:
            raise ValueError("vary.stage1_scenes: trials have no stage 1 where shared names a model")
        if self.scheduler == "asha":
            _check_asha(self, varied)
        return self


def keys_of(name: str) -> list[str]:
    """The keys that an entry of `vary` names."""
    return [key.strip() for key in name.split(",")]


def _check_axis(name: str, axis: Axis, search: str) -> None:
    keys = keys_of(name)
    for key in keys:
        if key not in SETTINGS_KEYS and key not in OTHER_KEYS:
            near = difflib.get_close_matches(key, [*SETTINGS_KEYS, *OTHER_KEYS], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "experiments/sweep.py --help lists all keys"
            raise ValueError(f"vary.{key}: unknown key; {hint}")
    if axis.values is None and (search == "grid" or len(keys) > 1):
        raise ValueError(f"vary.{name}: a grid, and keys that change together, need values: [...], not low and high")
    for value in axis.values or []:
        if len(keys) > 1 and not (isinstance(value, list) and len(value) == len(keys)):
            raise ValueError(f"vary.{name}: {value!r} must be a list of {len(keys)} values, one for each key")
    if len({json.dumps(value) for value in axis.values or []}) < len(axis.values or []):
        raise ValueError(f"vary.{name}: a value is there twice")


def _check_asha(space: Space, varied: list[str]) -> None:
    if space.metric != "psnr":
        raise ValueError("scheduler: asha compares trials by PSNR on their way, so metric must be psnr")
    for key in ("stage1_scenes", "data.image_size"):
        if key in varied:
            raise ValueError(
                f"scheduler: asha compares trials on their way by the PSNR of stage 1's scenes, which says nothing "
                f"where vary has {key}: set scheduler to none"
            )


@dataclass(frozen=True)
class TrialValues:
    """One point of the space, resolved into settings. values: of the varied keys."""

    settings: Settings
    preset: str
    stage1_scenes: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A space, and what the command line sets on top of it. given: dotted settings of --config and flags; folder: where
    relative paths start, as trials run in other folders."""

    space: Space
    preset: str
    given: dict[str, Any] = field(default_factory=dict)
    folder: str = field(default_factory=lambda: str(Path.cwd()))

    @property
    def shared(self) -> Path | None:
        """The folder of the shared model where trials have no stage 1."""
        return None if self.space.shared is None else Path(self.folder, self.space.shared)

    def trial(self, config: dict[str, Any]) -> TrialValues:
        """Resolve a trial. config: entry of `vary` → its value, as JSON text where the entry has `values`.

        Raises SettingsError naming the trial's values and what is wrong.
        """
        values = self.values(config)
        over = {key: value for key, value in values.items() if key not in OTHER_KEYS}
        preset = values.get("preset", self.preset)
        num_scenes = values.get("stage1_scenes", self.space.stage1_scenes)
        try:
            if type(num_scenes) is not int or num_scenes < 1:
                raise SettingsError(f"stage1_scenes: must be a whole number of at least 1, not {num_scenes!r}")
            base = merge(merge(read_preset(preset), self.space.settings), unflatten(self.given))
            settings = make_settings(merge(base, unflatten(over)))
            # Trials run in other folders, so the path of a local autoencoder becomes absolute.
            if Path(self.folder, settings.autoencoder.pretrained or "no folder").is_dir():
                whole = str(Path(self.folder, settings.autoencoder.pretrained or ""))
                settings = make_settings(merge(settings.model_dump(), {"autoencoder": {"pretrained": whole}}))
            # The shared model fixes most settings; a setting that the user named must agree with it.
            if self.shared is not None:
                told = {**flatten(self.space.settings), **self.given, **over}
                settings = settings_on(self.shared, settings, told)
        except SettingsError as error:
            raise SettingsError(f"trial with {_shown(values)}: {error}") from None
        return TrialValues(settings, preset, num_scenes, values)

    def values(self, config: dict[str, Any]) -> dict[str, Any]:
        """The value of every varied key."""
        values: dict[str, Any] = {}
        for name, axis in self.space.vary.items():
            value = parse_json(config[name]) if axis.values is not None else config[name]
            keys = keys_of(name)
            values.update(zip(keys, value) if len(keys) > 1 else {keys[0]: value})
        return values

    def heading(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The beginning of a trial's record, also for values that do not go together."""
        values = self.values(config)
        number = None if self.shared else values.get("stage1_scenes", self.space.stage1_scenes)
        preset = values.get("preset", self.preset)
        return {"trial": name, "preset": preset, "values": values, "stage1_scenes": number}

    def name(self, number: int, config: dict[str, Any]) -> str:
        """A trial's name: its number and its varied values, in letters, digits and `. _ - =` only."""
        text = f"{number:03d}_" + "_".join(f"{k}={v}" for k, v in short(self.values(config)).items())
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", text)[:LONGEST_NAME].rstrip("-._=")

    def configs(self) -> Iterator[dict[str, Any]]:
        """All trials of a grid; else the first edge of every entry, and from there each other edge of one entry."""
        edges = {name: _encoded(axis) for name, axis in self.space.vary.items()}
        if self.space.search == "grid":
            for chosen in itertools.product(*edges.values()):
                yield dict(zip(edges, chosen))
            return
        first = {name: values[0] for name, values in edges.items()}
        yield first
        for name, values in edges.items():
            yield from ({**first, name: value} for value in values[1:])

    @property
    def num_trials(self) -> int:
        """The number of trials of the sweep."""
        return self.space.num_trials or math.prod(len(axis.edges()) for axis in self.space.vary.values())

    @property
    def most_stage1_scenes(self) -> int:
        """The largest N_1 of any trial; 0 where trials have no stage 1."""
        if self.space.shared is not None:
            return 0
        numbers = [self.values(config).get("stage1_scenes", self.space.stage1_scenes) for config in self.configs()]
        return max(numbers)

    def check(self) -> list[TrialValues]:
        """Resolve the trials of `configs`. Raises SettingsError for the first one that cannot be run."""
        if self.num_trials > MAX_TRIALS:
            raise SettingsError(f"vary: has {self.num_trials} combinations, at most {MAX_TRIALS} are run")
        varied = {key for name in self.space.vary for key in keys_of(name)}
        named = {*self.given, *(["preset"] if self.preset != self.space.preset else [])}
        if varied & named:
            raise SettingsError(f"{', '.join(sorted(varied & named))}: the space varies it; leave out the flag")
        return [self.trial(config) for config in self.configs()]


def _encoded(axis: Axis) -> list[Any]:
    """The axis's edges as a trial's config has them. `values` become JSON text, as searchers take no lists."""
    return [json.dumps(value) for value in axis.values] if axis.values is not None else axis.edges()


def choices(axis: Axis) -> list[str]:
    """The `values` of an axis that has some, as a trial's config has them."""
    return _encoded(axis)


def short(values: dict[str, Any]) -> dict[str, Any]:
    """Shorten keys to the ends that tell them apart, numbers to four digits, and paths to their last part."""
    parts = [key.split(".") for key in values]
    found = {}
    for own, value in zip(parts, values.values()):
        length = next(n for n in range(1, len(own) + 1) if sum(p[-n:] == own[-n:] for p in parts) == 1 or n == len(own))
        text = Path(value).name if isinstance(value, str) and "/" in value else value
        found[".".join(own[-length:])] = f"{text:.4g}" if isinstance(text, float) else text
    return found


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def read_space(path: Path) -> Space:
    """Read a space from a YAML file. Raises SettingsError naming the file and the wrong keys, at most ten of them."""
    values = read_yaml(path)
    try:
        return Space.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_told(item)}" for item in error.errors()[:10]]
        raise SettingsError("\n".join(lines)) from None


def _told(item: Any) -> str:
    """One wrong key, and what is allowed."""
    where = ".".join(str(part) for part in item["loc"] if part not in ("float", "int"))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        fields = Axis.model_fields if item["loc"][0] == "vary" else Space.model_fields
        message = f"unknown key; allowed here: {', '.join(fields)}"
    elif item["type"] not in ("value_error", "missing"):
        message += f" (given: {item['input']!r:.100})"
    return f"{where}: {message}" if where else message
