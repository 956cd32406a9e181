"""Addresses of object stores and servers: no secret is taken from one or shown, and no stranger's server is asked."""

from __future__ import annotations

import os
import re
from collections import Counter
from urllib.parse import parse_qsl

_SECRET = r"key|secret|token|passw|credential|signature|\bsas\b|\bsig\b"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s?#]*(?:[^\s]*@)?[^\s?#]*)")
_OPTION = re.compile(rf"([?&][^=&\s]*(?:{_SECRET})[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
# Of these the text before an @ is a container or a user's name, not a secret, unless a : stands in it.
_NAMED_USERS = ("abfs", "abfss", "gs", "gcs", "hdfs")
# The options that an address from a file may have beside endpoint_override.
_HARMLESS = {"region", "scheme", "allow_bucket_creation", "allow_bucket_deletion", "retry_limit_seconds"}
REMEDY = (
    "an address must hold no key and no password, as it is noted in files and shown on pages: give them by the "
    "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …) or by a profile (AWS_PROFILE)"
)
_asked: set[str] = set()  # servers that this process's command line named


class SecretInAddress(ValueError):
    """An address holds a key or a password. The message does not repeat it."""


def check_no_secret(uri: str) -> None:
    """Raise SecretInAddress where the address of an object store holds a key or a password, ValueError where an option
    stands in it twice (libraries differ in which one they take)."""
    place, _, options = uri.partition("?")
    scheme, _, rest = place.partition("://")
    authority, values = rest.partition("/")[0], parse_qsl(options, keep_blank_values=True)
    user = authority.rpartition("@")[0]
    allowed = scheme in _NAMED_USERS and ":" not in user
    # No bucket has a colon in its name: what stands before a slash in s3://KEY:SEC/RET@BUCKET is the half of a secret.
    torn = scheme in ("s3", "gs", "gcs") and ":" in authority
    named = any(re.search(_SECRET, name, re.IGNORECASE) or "@" in value for name, value in values)
    if (user and not allowed) or torn or named:
        raise SecretInAddress(REMEDY)
    twice = [name for name, times in Counter(name for name, _ in values).items() if times > 1]
    if twice:
        raise ValueError(f"option {twice[0]!r:.80} stands in it twice")


def masked(text: str) -> str:
    """A text with *** for user names and passwords in its addresses (scheme://user:password@…) and for secrets among
    their options (?…token=…)."""
    # The user's own server, whatever its password holds, and whatever part of it an error repeats.
    user = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2].rpartition("@")[0]
    for secret in (user, user.partition(":")[2]):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return _OPTION.sub(r"\1***", _ADDRESS.sub(_without_user, text))


def _without_user(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    authority = rest.partition("/")[0]
    # A password may hold a slash; then an @ follows later.
    until = rest.rfind("@") if ":" in authority and "@" not in authority else authority.rfind("@")
    if until < 0 or (scheme in _NAMED_USERS and ":" not in rest[:until]):
        return found[0]
    return f"{scheme}://***{rest[until:]}"


def ask_server(uri: str) -> None:
    """Note that the user named this address: what files say of the same server may be followed in this process."""
    _asked.update(_server(uri))


def check_server(uri: str, where: str, asked: str = "") -> None:
    """Check that an address that was read from a file may be followed: requests are signed with the user's keys.

    where: the file, for the message; asked: an address that the user named. Raises ValueError where the address names a
    server that neither `asked`, nor this process's command line, nor the environment names.
    """
    if "://" not in uri or uri.startswith("file://"):
        return
    environment = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    known = _asked | _server(asked) | {_host(name) for name in environment}
    unknown = sorted(_server(uri) - known)
    if unknown:
        scheme = dict(parse_qsl(uri.partition("?")[2])).get("scheme", "https")
        raise ValueError(
            f"{where} names the server {unknown[0]!r:.200}, which is not asked on a file's word: if it is yours, name "
            f"its address on the command line, or set AWS_ENDPOINT_URL_S3={scheme}://HOST:PORT"
        )


def _server(uri: str) -> set[str]:
    """The servers that an address names, beside the stores' own; and options of unknown effect, as if they were."""
    place, _, options = uri.partition("?")
    scheme, _, rest = place.partition("://")
    values = parse_qsl(options, keep_blank_values=True)
    found = {_host(value) for name, value in values if name == "endpoint_override"}
    found |= {f"{name}={value}" for name, value in values if name not in {*_HARMLESS, "endpoint_override"}}
    return found | {f"{scheme}://{rest.partition('/')[0]}"} if scheme in ("abfs", "abfss", "hdfs") else found


def _host(text: str) -> str:
    return (text.partition("://")[2] or text).rstrip("/")
