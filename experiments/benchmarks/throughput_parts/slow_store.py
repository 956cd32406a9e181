"""An S3-compatible server in memory that answers only after a while: python slow_store.py PORT SECONDS"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class Slow:
    """A WSGI application behind a line of so many seconds."""

    def __init__(self, application: Callable[..., Iterable[bytes]], seconds: float) -> None:
        self.application, self.seconds = application, seconds

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.seconds)
        return self.application(environ, start_response)


if __name__ == "__main__":
    server = Slow(DomainDispatcherApplication(create_backend_app), float(sys.argv[2]))
    run_simple("127.0.0.1", int(sys.argv[1]), server, threaded=True)
