"""Which scenes of a source a job works on, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from scaling.data.scene_id import check_scene_id
from scaling.data.stores import SceneSource
from scaling.storage.atomic import read_limited


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
