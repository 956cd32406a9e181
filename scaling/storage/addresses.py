"""Addresses of object stores and servers: no secret is taken from one or shown, and no stranger's server is asked."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl

_SECRET = re.compile(r"key|secret|token|passw|credential|signature|\bsas\b|\bsig\b", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^@\s'\"?]*:[^@\s'\"]*@")
_OPTION = re.compile(rf"((?:[?&])[^=&\s]*(?:{_SECRET.pattern})[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
REMEDY = (
    "an address must hold no key and no password, as it is noted in files and shown on pages: give them by the "
    "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …) or by a profile (AWS_PROFILE)"
)


class SecretInAddress(ValueError):
    """An address holds a key or a password. The message does not repeat it."""


def check_no_secret(uri: str) -> None:
    """Raise SecretInAddress where the address of an object store holds a key or a password."""
    place, _, options = uri.partition("?")
    named = {name for name, _ in parse_qsl(options, keep_blank_values=True)}
    scheme, _, rest = place.partition("://")
    # In abfs://CONTAINER@ACCOUNT and gs://anonymous@BUCKET no secret stands before the @.
    user = rest.rpartition("@")[0] if scheme in ("s3", "hdfs") or ":" in rest.partition("@")[0] else ""
    if user or any(map(_SECRET.search, named)):
        raise SecretInAddress(REMEDY)


def masked(text: str) -> str:
    """A text with *** for user names and passwords in its addresses (scheme://user:password@…) and for secrets among
    their options (?…token=…)."""
    return _OPTION.sub(r"\1***", _USER_INFO.sub("***@", text))


def check_server(uri: str, where: str, asked: str = "") -> None:
    """Check that an address that was read from a file may be followed: requests are signed with the user's keys.

    where: the file, for the message; asked: an address that the user named. Raises ValueError where the address names a
    server (endpoint_override) that neither `asked` nor the environment names.
    """
    server = _server(uri)
    known = {_server(asked), *(os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))}
    hosts = {name.partition("://")[2] or name for name in filter(None, known)}
    if server and server not in hosts:
        raise ValueError(
            f"{where} names the server {server!r:.200}, which is not asked on a file's word: if it is yours, set "
            f"AWS_ENDPOINT_URL_S3=https://{server}"
        )


def _server(uri: str) -> str:
    options = dict(parse_qsl(uri.partition("?")[2]))
    found = options.get("endpoint_override", "")
    return found.partition("://")[2] or found
