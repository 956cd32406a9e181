"""Text of unknown origin, made safe to print."""

from __future__ import annotations


def shown(text: object) -> str:
    r"""A text in one line, for a terminal.

    White space becomes single spaces. What a terminal would obey or hide, such as escapes, marks of text direction and
    lone surrogates, is written as in Python: `\x1b`, `\u202e`.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in " ".join(str(text).split()))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
