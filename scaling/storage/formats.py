"""What all formats on disk share: a format version, and names that are SHA-256 hashes."""

from __future__ import annotations

import re

MAX_EPOCH = 999_999  # of a driver's lease: file names have six digits for it
SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Whether a text from a file is a hexadecimal SHA-256, and so is safe as the name of a folder."""
    return bool(SHA256.fullmatch(text))


class NewerFormat(ValueError):
    """A file is of a newer format than this program reads: it may be sound."""


def check_format(where: object, version: int, newest: int, error: type[ValueError] = NewerFormat) -> None:
    """Raise `error` where a file has a newer format than this program reads. where: the file, for the message."""
    if version > newest:
        raise error(f"{where}: format version {version}, this program reads up to {newest}: update the program")
