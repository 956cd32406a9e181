"""A report of one run, or of several side by side: one HTML file, which needs no other file and no network.

`figures` reads the runs, `sections` says what stands on the page, `tables`, `charts` and `pictures` make its parts, and
`page.html.jinja` is the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scaling.data.scene_ref import printable
from scaling.library.run_folder import RunFolder
from scaling.report.charts import colour
from scaling.report.figures import Curves, read_figures
from scaling.report.sections import report_sections
from scaling.storage.atomic import replace_file
from scaling.storage.limited import open_regular
from scaling.storage.paths import AnyPath, uri_of

# In the first lines of every report. Those of older versions had another title.
GENERATOR = b'<meta name="generator" content="scaling report">'


def write_report(runs: Sequence[RunFolder], curves: Sequence[Curves], out: AnyPath) -> None:
    """Write the report of the runs to the file `out`.

    curves: for each run, metric → (step, value) pairs: `stage1/<phase>/<loss>` over epochs, `stage2/psnr` and
    `stage2/scenes_per_hour` over scenes; empty where none are known.
    Raises FileNotFoundError where a run has no library, ValueError where a run is named twice or files are damaged.
    """
    labels = run_labels(runs)
    figures = [read_figures(run, label, of) for run, label, of in zip(runs, labels, curves, strict=True)]
    several = len(figures) > 1
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = templates.get_template("page.html.jinja").render(
        title=f"{len(figures)} runs side by side" if several else labels[0],
        legend={label: colour(index) for index, label in enumerate(labels)} if several else {},
        sections=report_sections(figures),
        colour=colour,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    _check_own(out)
    replace_file(out, printable(page).encode())


def _check_own(out: AnyPath) -> None:
    """Raise FileExistsError where `out` is a file that is no report, and would be written over."""
    try:
        with open_regular(out) if isinstance(out, Path) else out.open_input() as file:
            beginning = file.read(4096)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise FileExistsError(f"{out} {error}: name another file") from None
    if beginning and GENERATOR not in beginning:
        raise FileExistsError(f"{out} is no report of this program, and is not written over: name another file")


def run_labels(runs: Sequence[RunFolder]) -> list[str]:
    """The names of the runs; runs that share a name are labelled by their paths. Raises ValueError where a run is named
    twice."""
    paths = [uri_of(run.path) for run in runs]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"--run {twice[0]} is given twice: name every run once")
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else path for run, path in zip(runs, paths)]
