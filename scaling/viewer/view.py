"""The viewer: a page on loopback to browse a run's library. NiceGUI shows it; torch draws what it shows.

viewer_gallery, viewer_camera, viewer_scenes, viewer_truth and viewer_work hold all that needs no browser; viewer_page
and viewer_pane are the page, viewer_server serves it.
"""

from __future__ import annotations

import torch

from scaling.library.run_folder import RunFolder
from scaling.viewer.draw_scenes import ViewedRun
from scaling.viewer.server import HOST, open_port, serve
from scaling.viewer.worker import Worker

MISSING = "the viewer needs NiceGUI, which is not installed; run: pip install 'nicegui>=3.18,<4' (or .[view] here)"


def view(run: RunFolder, store: str | None, port: int) -> None:
    """Serves the page until Ctrl-C. store: of the true views, instead of those that config.yaml names.

    RuntimeError where NiceGUI is missing; OSError where the port is taken; errors of `ViewedRun`.
    """
    try:
        from scaling.viewer.page import make_app
    except ModuleNotFoundError as error:
        if error.name not in ("nicegui", "fastapi", "uvicorn"):
            raise
        raise RuntimeError(MISSING) from None
    with open_port(port) as listening:
        viewed = ViewedRun(run, store, "cuda" if torch.cuda.is_available() else "cpu")
        print(f"{len(run.library.ids()):,} scenes of {run.path} on http://{HOST}:{listening.getsockname()[1]}")
        if viewed.no_truth:
            print(f"no true views: {viewed.no_truth}")
        print("Ctrl-C ends it", flush=True)
        worker, reader = Worker(), Worker()
        serve(make_app(viewed, worker, reader), listening)
        for thread in (worker, reader):
            thread.close()
