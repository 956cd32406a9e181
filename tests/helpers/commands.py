"""Command lines as READMEs have them, read by the scripts that they call."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Words that stand for a value which a parser checks; other capitals are good names of folders and scenes.
PLACEHOLDERS = {"N": "1", "FILE": "/dev/null"}


class WrongCommand(AssertionError):
    """A command of the README that its script would refuse."""


class _Parsed(Exception):
    """Ends a script's main once its command line was read."""


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of every call of an `experiments/` script; lines that end in a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True) if "experiments/" in command else []
            for place, word in enumerate(words):
                if word.startswith("experiments/") and word.endswith(".py"):
                    yield word, [PLACEHOLDERS.get(argument, argument) for argument in words[place + 1 :]]


def parse_as_script(script: str, arguments: list[str]) -> argparse.ArgumentParser:
    """Reads a command line with the script's own parser, and stops before the work. → that parser.

    Raises WrongCommand with the parser's message where it refuses.
    """
    path = ROOT / script
    if not path.is_file():
        raise WrongCommand(f"{script}: no such script")
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    if hasattr(module, "make_parser"):  # a benchmark, which takes no settings
        return parsed(module.make_parser(), script, arguments)
    used: list[argparse.ArgumentParser] = []

    def stopping(parse):
        def parse_and_stop(parser: argparse.ArgumentParser) -> None:
            parse(parser, arguments)
            used.append(parser)
            raise _Parsed

        return parse_and_stop

    for name in ("parse_settings", "parse_without_settings"):
        if hasattr(module, name):
            setattr(module, name, stopping(getattr(module, name)))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            module.main()
    except _Parsed:
        return used[0]
    except SystemExit:
        raise WrongCommand(f"{script} {shlex.join(arguments)}: {said.getvalue()}") from None
    raise WrongCommand(f"{script}: its main reads no command line by scaling.cli")


def parsed(parser: argparse.ArgumentParser, script: str, arguments: list[str]) -> argparse.ArgumentParser:
    """The parser, if it takes the arguments; else WrongCommand with its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(arguments)
    except SystemExit:
        raise WrongCommand(f"{script} {shlex.join(arguments)}: {said.getvalue()}") from None
    return parser
