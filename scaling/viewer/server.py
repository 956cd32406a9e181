"""The viewer's server: it listens on loopback only, and serves only pages that it made itself."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
# The browser may load from this server alone, and talk to it alone. The page's own scripts are inline and built at run
# time.
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

ASSETS = "/_nicegui/"  # what the page loads; every other path makes a visitor

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class LocalOnly:
    """ASGI middleware that refuses requests which name another host, or come from another site's page; and a visitor
    who asks for the page at / while is_full says that there are enough.

    A web page may let its own name resolve to 127.0.0.1, or open a WebSocket to that address. Its Host or Origin header
    then gives it away. It may also link to this address, load it in a frame or open it in new windows: browsers say so
    in Sec-Fetch-Site.
    """

    def __init__(self, app: App, is_full: Callable[[], bool] = lambda: False) -> None:
        self.app, self.is_full = app, is_full

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and not is_local(scope["headers"]):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _refuse(send, 403, f"type http://{HOST} or http://localhost and the port into the address bar")
        elif (
            scope["type"] == "http"
            and not scope["path"].startswith(ASSETS)
            and (_is_prefetch(scope["headers"]) or self.is_full())
        ):
            await _refuse(send, 503, "too many pages are open: close some, and reload in half a minute")
        else:
            await self.app(scope, receive, _with_policy(send))


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def _is_prefetch(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a browser asks for a page that nobody looks at yet: NiceGUI waits for its visitor without end."""
    return any(name in (b"purpose", b"sec-purpose") and b"prefetch" in value.lower() for name, value in headers)


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
        await send(message)

    return sending


def is_local(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether there is one Host header, which names this machine, and the Origin, if there is one, is that host; and
    no Sec-Fetch-Site says that another site's page is behind the request."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    if len(hosts) != 1 or _hostname(f"//{hosts[0]}") not in NAMES:
        return False
    sites = [value for name, value in headers if name == b"sec-fetch-site"]
    # "none": the user typed the address or took a bookmark.
    return all(origin == f"http://{hosts[0]}" for origin in origins) and all(
        s in (b"same-origin", b"none") for s in sites
    )


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as "//[::"
        return None


def open_port(port: int) -> socket.socket:
    """A socket bound to a port of loopback (0: any free one). Raises OSError that says what to do where it is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed can be taken
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(f"port {port} of {HOST} is in use: end what uses it, or choose another with --port") from None
    return listening


def serve(app: App, listening: socket.socket) -> None:
    """Serve the app until Ctrl-C or SIGTERM; open pages are then disconnected within a second."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=1, server_header=False, proxy_headers=False
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        uvicorn.Server(config).run(sockets=[listening])
