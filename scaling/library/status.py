"""The state of a run, from its files alone: Ray and the driver are not asked, and no planes are read."""

from __future__ import annotations

from collections import Counter

from scaling.library.failures import RETRY
from scaling.library.run_folder import RunFolder
from scaling.library.summary import failed_scenes, failures_text
from scaling.models.shared_files import read_text
from scaling.storage.lease import holder
from scaling.storage.text import shown


def status_text(run: RunFolder) -> str:
    """The state of a run in a few lines for the terminal. Raises FileNotFoundError where the folder holds no run."""
    noted = run.read_config()
    if not noted:
        raise FileNotFoundError(2, "no run here (no config.yaml); name the folder that --run named", str(run.path))
    lines = [f"run      {run.path}", f"driver   {shown(holder(run.library.folder / 'leases'))}", *_stage1(run, noted)]
    if "stage2" in noted:
        lines += _stage2(run, noted["stage2"]["job"].get("num_scenes", 0))
    lines += _library(run)
    failures = failures_text(run)
    return "\n".join([*lines, failures] if failures else lines)


def _stage1(run: RunFolder, noted: dict[str, dict]) -> list[str]:
    if (run.shared / "hash.txt").is_file():
        return [f"stage 1  done: shared model {shown(read_text(run.shared / 'hash.txt'))[:12]}…"]
    if "stage1" not in noted:
        return ["stage 1  not in this run: stage 2 uses the shared model of another run"]
    checkpoints = (path.name for path in (run.checkpoints / "stage1").glob("?????-*"))
    last = max(checkpoints, default="")
    return [f"stage 1  {f'epoch {int(last[:5])} is done' if last[:5].isdecimal() else 'no epoch is done'}"]


def _stage2(run: RunFolder, asked: int) -> list[str]:
    stages = run.library.stages()
    fitted = sum(stage == 2 for stage in stages.values())
    failed = failed_scenes(run, stages)
    again = [event for event in run.latest_events().values() if event.kind == RETRY and event.scene_id not in stages]
    left = asked - fitted - len(failed)
    kinds = Counter(event.kind for event in failed.values())
    why = f" ({', '.join(f'{count} {shown(kind)}' for kind, count in sorted(kinds.items()))})" if kinds else ""
    tried = f", {len(again)} of them tried before" if again else ""
    return [f"stage 2  {fitted} of {asked} scenes fitted, {len(failed)} failed{why}, {max(left, 0)} left{tried}"]


def _library(run: RunFolder) -> list[str]:
    snapshot = run.library.snapshot()
    sizes = [part.num_bytes if (part := snapshot.listed(path)) else path.stat().st_size for path in snapshot.paths]
    lines = [f"library  {len(sizes)} parts, {sum(sizes):,} bytes, epoch {snapshot.manifest.epoch}"]
    if snapshot.missing:
        ids = sum(len(snapshot.manifest.parts[name].scene_ids) for name in snapshot.missing)
        lines.append(
            f"missing  {len(snapshot.missing)} parts that the manifest lists, with {ids} scenes: restore the parts, or "
            f"fit the scenes again with the same stage-2 command ({', '.join(snapshot.missing[:3])})"
        )
    return lines
