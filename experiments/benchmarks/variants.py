"""Every variant of the method on one set of scenes, one CPU thread: quality, CPU time and bytes a scene, as a table.

python experiments/benchmarks/variants.py --json FILE [--store STORE --train-scenes FILE --fit-scenes FILE]

Finished rows are kept in --out, so the same command continues a call that was killed. Two calls with different --rows
can share a machine; start the second when the first has trained the autoencoder. Use another --out for another store,
other scenes or other schedules.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from scaling.cli import read_preset, read_yaml, run_command
from scaling.config import Settings, SettingsError, make_settings, merge
from scaling.models.shared_files import save_shared
from scaling.storage.json_yaml import parse_json

SCHEDULES = Path(__file__).with_name("variants.yaml")
# Row → its preset, its mode of stage 2, and its section of variants.yaml.
ROWS = {
    "paper": ("paper", "cohort", "paper"),
    "default, frozen": ("default", "frozen", "ours"),
    "default, cohort": ("default", "cohort", "ours"),
    "ulw": ("ulw", "frozen", "ours"),
    "micro_only": ("micro_only", "frozen", "ours"),
    "m1": ("m1", "frozen", "ours"),
    "rgb_micro_macro": ("rgb_micro_macro", "frozen", "ours"),
    "rgb_triplanes": ("rgb_triplanes", "frozen", "ours"),
}
COLUMNS = ("test", "train", "SSIM", "autoencoder", "stage 1, CPU-s", "CPU-s/scene", "bytes/scene")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="scene store (default: the embedded cars, 32 and 16 of them)")
    parser.add_argument("--train-scenes", type=Path, help="ids of stage 1's scenes, one a line")
    parser.add_argument("--fit-scenes", type=Path, help="ids of stage 2's scenes, one a line")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/variants"), help="run folders of the rows")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser


def row_settings(preset: str, mode: str, section: str, autoencoder: Path | None) -> Settings:
    """A preset with the schedules of variants.yaml over it. Where the preset's autoencoder is of kind kl, `autoencoder`
    replaces it: the folder of the one that all such rows share."""
    schedules = read_yaml(SCHEDULES)
    values = merge(merge(read_preset(preset), schedules["everywhere"]), schedules[section])
    if autoencoder is not None and make_settings(values).autoencoder.kind == "kl":
        values = merge(values, {"autoencoder": {"pretrained": str(autoencoder), "subfolder": None}})
    return make_settings(merge(values, {"stage2": {"mode": mode}}))


def check_out(out: Path, job: dict[str, Any]) -> None:
    """Note the job in the folder --out. Raises SettingsError where the folder holds the rows of another job."""
    path = out / "job.json"
    text = json.dumps(job, indent=1)
    if path.is_file() and path.read_text() != text:
        raise SettingsError(f"{path}: this folder is of another store, other scenes or schedules; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def train(settings: Settings, spec: Any, ids: list[str], folder: Path, bounds: Any = None) -> None:
    """Run stage 1 in this process and save the shared model in `folder`, unless it is there already.

    Its CPU time goes into seconds.json, which is written last. bounds: low and high corner [2, 3] of the cuboid that
    planes span if the settings name none; None: the cuboid around the scenes themselves.
    """
    from scaling.data.scene_views import views_from_row
    from scaling.training.stage1 import Stage1

    if (folder / "seconds.json").is_file():
        return
    views = [views_from_row(row, settings.data.image_size) for row in spec.open().rows(ids)]
    start = time.process_time()
    stage1 = Stage1(settings, ids, views, bounds=bounds)
    stage1.run(lambda report: print(f"  {report.epochs_done}/{report.epochs_total} {report.losses}", flush=True))
    seconds = time.process_time() - start
    save_shared(stage1.shared, folder, ids)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def run_row(name: str, settings: Settings, spec: Any, train_ids: list[str], fit_ids: list[str], out: Path) -> None:
    """Run both stages of a row, unless it is done, and write its figures to OUT/ROW/row.json.

    Stage 2 calls the actors' own code in this process. Raises RuntimeError where a scene was not fitted.
    """
    import pyarrow as pa

    from scaling.data.scene_store import SCHEMA
    from scaling.distributed.stage2.actors import FitJob, SceneFitter
    from scaling.distributed.stage2.cohort_actors import CohortFitter
    from scaling.distributed.stage2.messages import FITTED
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import summarise

    run = RunFolder(out / name.replace(", ", "-"))
    if (run.path / "row.json").is_file():
        return
    print(name, flush=True)
    shared = out / "shared" / settings_key(settings)
    train(settings, spec, train_ids, shared)
    run.write_config("stage2", settings, {"shared": str(shared.absolute())})
    # The library notes wall seconds: CPU time over wall time of the whole stage converts them.
    job = FitJob(str(run.path), str(shared), settings.model_dump(), astuple(spec))
    wall, cpu = time.perf_counter(), time.process_time()
    if settings.stage2.mode == "cohort":
        outcomes = CohortFitter(job).fit(pa.table({"scene_id": fit_ids}), attempt=1).outcomes
    else:
        rows = [{**row, "error": None} for row in spec.open().rows(fit_ids)]
        table = pa.Table.from_pylist(rows, schema=SCHEMA.append(pa.field("error", pa.string())))
        outcomes = SceneFitter(job).fit(table, attempt=1).outcomes
    cpu_per_wall = (time.process_time() - cpu) / (time.perf_counter() - wall)
    failed = [outcome for outcome in outcomes if outcome.kind != FITTED]
    if failed:
        raise RuntimeError(f"row {name}: these scenes were not fitted: {failed}")
    metrics = summarise(run)
    figures = {
        "test_psnr": metrics["test"]["psnr"],
        "train_psnr": metrics["train"]["psnr"],
        "ssim": metrics["test"]["ssim"],
        "autoencoder_psnr": metrics["autoencoder"]["psnr"],
        "stage1_cpu_seconds": parse_json((shared / "seconds.json").read_bytes()),
        "cpu_seconds_per_scene": metrics["seconds_per_scene"] * cpu_per_wall,
        "bytes_per_scene": metrics["bytes_per_scene"],
        "num_scenes": metrics["num_scenes"],
    }
    (run.path / "row.json").write_text(json.dumps(figures, indent=1))


def settings_key(settings: Settings) -> str:
    """A name for stage 1 with these settings: rows that differ in stage 2 alone share it."""
    values = json.dumps(settings.model_dump(exclude={"stage2"}), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:12]


def table_text(figures: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table; PSNR in dB."""
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in figures.items():
        autoencoder = "-" if row["autoencoder_psnr"] is None else f"{row['autoencoder_psnr']:.2f}"
        cells = (
            f"{row['test_psnr']:.2f}", f"{row['train_psnr']:.2f}", f"{row['ssim']:.3f}", autoencoder,
            f"{row['stage1_cpu_seconds']:.0f}", f"{row['cpu_seconds_per_scene']:.1f}", f"{row['bytes_per_scene']:,.0f}",
        )  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    arguments = make_parser().parse_args()

    import torch

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec

    torch.set_num_threads(1)
    spec = SourceSpec.of(arguments.store, row_settings("default", "frozen", "ours", None).data)
    train_ids = choose_ids(spec.open(), arguments.train_scenes, count=None if arguments.train_scenes else 32)
    fit_ids = choose_ids(
        spec.open(), arguments.fit_scenes, leave_out=train_ids, count=None if arguments.fit_scenes else 16
    )
    job = {"source": asdict(spec), "train": train_ids, "fit": fit_ids, "schedules": SCHEDULES.read_text()}
    check_out(arguments.out, job)
    # The autoencoder alone: every other phase is left out.
    alone = row_settings("sd", "frozen", "autoencoder", None)
    still = {phase: {"num_epochs": 0} for phase in ("warmup", "joint", "adapt", "distil")}
    train(make_settings(merge(alone.model_dump(), {"stage1": still})), spec, train_ids, arguments.out / "autoencoder")
    autoencoder = (arguments.out / "autoencoder" / "autoencoder").absolute()
    for name in arguments.rows:
        run_row(name, row_settings(*ROWS[name], autoencoder), spec, train_ids, fit_ids, arguments.out)
    paths = {name: arguments.out / name.replace(", ", "-") / "row.json" for name in ROWS}
    done = {name: parse_json(path.read_bytes()) for name, path in paths.items() if path.is_file()}
    arguments.json.write_text(json.dumps({"source": asdict(spec), "rows": done}, indent=1))
    print(table_text(done))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
