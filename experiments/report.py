"""Report on runs in one HTML file that opens offline: python experiments/report.py --run RUN --run RUN --out FILE"""

import sys

from scaling.cli import command_parser, location, parse_without_settings, run_command


def main() -> int:
    parser = command_parser(__doc__, "runs")
    parser.add_argument("--out", type=location, required=True, help="HTML file to write; an older one is replaced")
    arguments = parse_without_settings(parser)

    from scaling.distributed.tracking import log_report, read_curves
    from scaling.library.run_folder import RunFolder
    from scaling.report.write import write_report

    runs = [RunFolder(path) for path in arguments.runs]
    for run in runs:
        run.check_fitted()
    write_report(runs, [read_curves(run) for run in runs], arguments.out)
    print(f"report: {arguments.out}")
    for run in runs:
        logged = log_report(run, arguments.out)
        print(f"MLflow: {f'an artefact of {run.name}/{logged}' if logged else f'knows no run of {run.name}'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
