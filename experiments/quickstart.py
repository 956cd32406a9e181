"""Run the whole path on embedded cars: stage 1, stage 2, metrics, pictures. It takes minutes on two CPU cores."""

import sys
import time
from pathlib import Path

from scaling.cli import command_parser, location, parse_settings, positive_int, run_command


def main() -> int:
    start = time.time()
    parser = command_parser(__doc__, "address")
    parser.add_argument("--run", type=location, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--stage1-scenes", type=positive_int, default=24, help="scenes that train the shared model")
    parser.add_argument("--stage2-scenes", type=positive_int, default=8, help="scenes fitted on top of it")
    parser.set_defaults(preset="quick")
    arguments, settings = parse_settings(parser)

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.job import Job
    from scaling.distributed.stage1.driver import train_stage1
    from scaling.distributed.stage2.driver import Stage2Job, fit_stage2
    from scaling.distributed.tracking import ui_command
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import table_text
    from scaling.pictures.of_runs import render_stored_scenes

    run = RunFolder(arguments.run)
    spec = SourceSpec.of(None, settings.data)
    cluster = connect(arguments.address)
    first = choose_ids(spec.open(), None, count=arguments.stage1_scenes)
    rest = choose_ids(spec.open(), None, leave_out=first, count=arguments.stage2_scenes)
    train_stage1(Job(run, settings, spec, first, cluster, arguments.preset))
    metrics = fit_stage2(Stage2Job(run, settings, spec, rest, cluster, arguments.preset, shared_folder=run.shared))
    # The first scene that was fitted: one that failed has nothing to render.
    pictures = render_stored_scenes(run, [scene_id for scene_id in rest if scene_id in run.library.ids(2)][:1])
    print(table_text(metrics))
    print("pictures:")
    for path in [*sorted(run.pictures.glob("*.png")), *pictures]:
        print(f"  {path}")
    print(f"metrics: {run.metrics}   library: {run.library.folder}")
    print(f"curves and pictures in a browser: {ui_command(run)}")
    print(f"done in {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
