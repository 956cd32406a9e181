"""Train the shared model on the first scenes: python experiments/stage1.py --store STORE --num-scenes 500"""

import sys

from scaling.cli import command_parser, parse_settings, positive_int, run_command


def main() -> int:
    parser = command_parser(__doc__, "run", "store", "num-scenes", "address", "gpus")
    parser.add_argument("--num-workers", type=positive_int, help="data-parallel workers (default: one per GPU, else 1)")
    arguments, settings = parse_settings(parser)

    from scaling.data.choose_scenes import choose_ids
    from scaling.data.stores import SourceSpec
    from scaling.distributed.cluster import connect
    from scaling.distributed.job import Job
    from scaling.distributed.stage1.driver import train_stage1
    from scaling.library.run_folder import RunFolder
    from scaling.library.summary import table_text

    spec = SourceSpec.of(arguments.store, settings.data)
    ids = choose_ids(spec.open(), arguments.scenes, count=arguments.num_scenes, balanced=True, split=arguments.split)
    if len(ids) < arguments.num_scenes:
        print(f"warning: there are only {len(ids)} scenes; --num-scenes asked for {arguments.num_scenes}")
    run = RunFolder(arguments.run)
    cluster = connect(arguments.address, arguments.gpus)
    metrics = train_stage1(Job(run, settings, spec, ids, cluster, arguments.preset), arguments.num_workers)
    print(table_text(metrics))
    print(f"shared model: {run.shared}   pictures: {run.pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
