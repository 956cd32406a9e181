"""The viewer: a page on loopback to browse a run's library. NiceGUI shows the page; torch renders its pictures.

gallery, camera, draw_scenes and worker need no browser; page and scene_pane are the page; server serves it.
"""

from __future__ import annotations

import torch

from scaling.library.run_folder import RunFolder
from scaling.storage.text import shown
from scaling.viewer.draw_scenes import ViewedRun
from scaling.viewer.server import HOST, open_port, serve
from scaling.viewer.worker import Worker

MISSING = "the viewer needs NiceGUI, which is not installed; run: pip install 'nicegui>=3.18,<4' (or .[view] here)"


def view(run: RunFolder, store: str | None, port: int) -> None:
    """Serve the page until Ctrl-C.

    store: scene store of the true views, None for those that config.yaml names; port: 0 for any free one.
    Raises RuntimeError where NiceGUI is missing, OSError where the port is taken, and what `ViewedRun` raises.
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
            print(f"no true views: {shown(viewed.no_truth)}")
        print("Ctrl-C ends it", flush=True)
        worker, reader = Worker(), Worker()
        try:
            serve(make_app(viewed, worker, reader), listening)
        finally:
            for thread in (worker, reader):
                thread.close()
