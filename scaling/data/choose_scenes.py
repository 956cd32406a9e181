"""Choose the scenes of a source that a job works on, and their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from scaling.data.scene_id import check_scene_id
from scaling.data.stores import SceneSource
from scaling.storage.limited import read_limited

ALL = "all"  # value of --split


def read_ids(path: Path) -> list[str]:
    """Read the scene ids of a file with one id per line; skip blank lines and # comments.

    Raises ValueError where the file cannot be read, holds a bad id or repeats an id. The message names the file and,
    for a bad id, the line.
    """
    try:
        text = read_limited(path).decode("utf-8-sig")
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
    """Category → its ids, in store order."""
    of_category: dict[str, list[str]] = {}
    for scene_id, category in zip(source.ids(), source.categories()):
        of_category.setdefault(category, []).append(scene_id)
    return of_category


def categories_in_turn(source: SceneSource) -> list[str]:
    """All ids, interleaved: one id of each category in turn, in store order within a category.

    The first N ids are therefore balanced: every category has an equal share (±1) until its ids run out.
    """
    rounds = zip_longest(*ids_by_category(source).values())
    return [scene_id for in_turn in rounds for scene_id in in_turn if scene_id is not None]


def _other_splits(source: SceneSource, split: str) -> str:
    counts = Counter(name for name in source.splits() if name not in ("", split))
    told = ", ".join(f"{number} of {name}" for name, number in sorted(counts.items()))
    return f"; it holds {told}: choose by --split" if told and split != ALL else ""


def choose_ids(
    source: SceneSource,
    wanted: Path | None,
    leave_out: Sequence[str] = (),
    skip: int = 0,
    count: int | None = None,
    balanced: bool = False,
    split: str = "train",
) -> list[str]:
    """Choose ids: those of the file `wanted`, or those of a split; drop `leave_out`, then the first `skip`.

    count: return at most this many. balanced: without a file, order the ids by `categories_in_turn`; stage 1 uses this,
    because all categories share its base planes. split: train, val, test, or all of them; scenes of no split belong to
    each. Raises ValueError where the file is bad (see `read_ids`) or names a scene that the source does not hold, or
    where no scene is left.
    """
    known = source.ids()
    if wanted is None:
        of_split = dict(zip(known, source.splits()))
        ids = categories_in_turn(source) if balanced else known
        ids = [scene_id for scene_id in ids if split == ALL or of_split[scene_id] in ("", split)]
    else:
        ids = read_ids(wanted)
        unknown = sorted(set(ids) - set(known))
        if unknown:
            raise ValueError(f"{wanted}: {source.name} holds no scene {', '.join(unknown[:5])}")
    out = set(leave_out)
    chosen = [scene_id for scene_id in ids if scene_id not in out][skip:]
    if not chosen:
        of = f"of {len(ids)} scenes" if wanted or split == ALL else f"of {len(ids)} scenes of split {split}"
        raise ValueError(
            f"no scene is left of {source.name}: {of} the shared model was trained on {len(out)}, and {skip} are "
            f"skipped{_other_splits(source, split) if wanted is None else ''}"
        )
    return chosen[:count]
