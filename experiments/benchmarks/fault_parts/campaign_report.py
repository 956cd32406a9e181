"""For faults.py: compares what a campaign of faults left with the undisturbed library."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

CLOSE_DB = 0.1  # how much test PSNR may differ where a scene was fitted in another batch


def compare(campaign: Any, seconds: float) -> dict[str, Any]:
    """The figures of the campaign: how many scenes are lost, stored twice, fitted again, different, or failed without a
    planned reason."""
    from scaling.library.run_folder import RunFolder

    run, reference = RunFolder(campaign.out / "run"), RunFolder(campaign.out / "reference")
    stored = Counter(scene_id for path in run.library.parts() for scene_id in batch_of(path))
    committed, failed = set(stored), set(run.given_up()) - set(stored)
    expected = set(campaign.corrupt).union(*campaign.poison.values())
    same, differing, worst = compare_planes(run, reference)
    # A token that no fitter took is a fault that did not happen.
    taken = Counter(path.name.rpartition("-")[0] for path in (campaign.out / "faults" / "taken").iterdir())
    left = [path.name.rpartition("-")[0] for path in (campaign.out / "faults" / "tokens").iterdir()]
    injected = campaign.injected - Counter(left)
    assert all(injected[kind] == number for kind, number in taken.items())
    return {
        "scenes": campaign.num_scenes,
        "num_faults": sum(injected.values()),
        "faults": dict(sorted(injected.items())),
        "committed": len(committed),
        "failed": len(failed),
        "lost": len(set(campaign.ids) - committed - failed),
        "duplicated": sum(number - 1 for number in stored.values()),
        "refitted": refitted(campaign.out / "faults" / "fits", expected),
        "differing": differing,
        "wrongly_failed": len(failed - expected),
        "equal_bit_by_bit": same,
        "largest_psnr_difference_db": round(worst, 4),
        "drivers": dict(Counter(map(str, campaign.drivers))),
        "events": dict(Counter(event.kind for event in run.latest_events().values())),
        "seconds": round(seconds),
    }


def batch_of(path: Path) -> list[str]:
    """Ids of the scenes that a part holds, read from the part itself."""
    from scaling.library.parts import read_part

    return read_part(path, ["scene_id"])["scene_id"].to_pylist()


def compare_planes(run: Any, reference: Any) -> tuple[int, int, float]:
    """Compare the scenes with the undisturbed ones. → the number that are equal bit by bit; the number that differ
    although their batch was the same, or by more than CLOSE_DB; the largest difference in dB."""
    batches: list[dict[str, frozenset[str]]] = [{}, {}]
    for found, library in zip(batches, (run.library, reference.library)):
        for ids in map(batch_of, library.parts()):
            found.update(dict.fromkeys(ids, frozenset(ids)))
    undisturbed = {row["scene_id"]: row for row in reference.library.scenes()}
    same, differing, worst = 0, 0, 0.0
    for row in run.library.scenes():
        scene_id = row["scene_id"]
        other = undisturbed[scene_id]
        equal = all(row[key] == other[key] for key in ("micro_planes", "coefs", "psnr"))
        gap = abs(row["psnr"] - other["psnr"])
        same, worst = same + equal, max(worst, gap)
        differing += gap > CLOSE_DB or (not equal and batches[0][scene_id] == batches[1][scene_id])
    return same, differing, worst


def refitted(folder: Path, poison: set[str]) -> int:
    """The number of fits that were begun beyond the first of each scene. poison: scenes that do not count."""
    begun = Counter(
        scene_id for path in folder.iterdir() for scene_id in path.read_text().split() if scene_id not in poison
    )
    return sum(begun.values()) - len(begun)


def print_table(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, number in value.items():
                print(f"  {name:28}{number:>8}")
        else:
            print(f"{key:30}{value:>8}")
