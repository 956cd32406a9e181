"""Command lines: settings from `--preset`, `--config` and `--section.key`, and the flags that commands share."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel

from scaling.config import REMOVED, Settings, SettingsError, flatten, make_settings, merge
from scaling.storage import atomic
from scaling.storage.addresses import SecretInAddress, ask_server, masked
from scaling.storage.json_yaml import MAX_YAML_BYTES, parse_yaml
from scaling.storage.limited import read_limited
from scaling.storage.text import shown

if TYPE_CHECKING:
    from scaling.storage.paths import AnyPath

JOB_COPY = "working_dir_files"  # part of the path of the folder where `ray job submit --working-dir` runs a driver
PRESETS = Path(__file__).resolve().parent.parent / "experiments" / "presets"


def positive_int(text: str) -> int:
    """argparse type for counts of at least 1. Raises ArgumentTypeError, which says what was given instead."""
    return _at_least(1, text)


def count(text: str) -> int:
    """argparse type for counts that may be 0."""
    return _at_least(0, text)


def port_number(text: str) -> int:
    """argparse type for a port to listen on; 0 stands for any free port."""
    port = count(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"ports go up to 65535, not {port}")
    return port


def location(text: str) -> AnyPath:
    """argparse type for a folder on a disk, or the URI of a folder in an object store."""
    from scaling.storage.paths import to_path  # imports pyarrow, which takes longer than parsing

    try:
        path = to_path(text)
        ask_server(text)
        return path
    except SecretInAddress as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def address(text: str) -> str:
    """argparse type for a scene store: as `location`, but as a text."""
    location(text)
    return text


def local_file(text: str) -> Path:
    """argparse type for a file on a disk."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: must be a file on a disk")
    return _on_disk(text)


def disk_folder(text: str) -> Path:
    """argparse type for a folder on a disk, for output that other programs read."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: must be a folder on a disk; copy it to the store afterwards")
    return _on_disk(text)


def _on_disk(text: str) -> Path:
    from scaling.storage.paths import local

    try:
        return local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """A parser whose errors show no secret that stands in an address."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(masked(message)))


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    return value


def _documented_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _documented_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def command_parser(description: str | None, *flags: str) -> argparse.ArgumentParser:
    """A parser with `--preset`, `--config`, and those shared flags that `flags` names: "run", "runs", "store",
    "address", "gpus", "num-scenes". "runs": `--run` may be repeated, and the namespace's `runs` is the list.

    `parse_settings` adds every `--section.key`.
    """
    parser = Parser(
        description=description, allow_abbrev=False, usage="%(prog)s [flags]   (--help shows every flag and key)"
    )
    parser.add_argument("--preset", default="default", help="settings of experiments/presets/NAME.yaml")
    parser.add_argument("--config", type=local_file, help="YAML file of settings over the preset's")
    if "run" in flags:
        parser.add_argument("--run", type=location, help="run folder or file-system URI (default: runs/<preset>)")
    if "runs" in flags:
        parser.add_argument(
            "--run", dest="runs", action="append", type=location,
            help="run folder or file-system URI; repeat it to compare runs (default: runs/<preset>)",
        )  # fmt: skip
    if "store" in flags:
        parser.add_argument("--store", type=address, help="scene store: folder or URI (default: the embedded cars)")
    if "num-scenes" in flags:
        parser.add_argument("--num-scenes", type=positive_int, required=True, help="number of scenes to take")
        parser.add_argument("--scenes", type=local_file, help="file with one scene id a line, instead of store order")
        parser.add_argument(
            "--split", choices=("train", "val", "test", "all"), default="train",
            help="scenes of which split to take, where the store has splits and without --scenes",
        )  # fmt: skip
    if "address" in flags:
        parser.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local one)")
    if "gpus" in flags:
        parser.add_argument(
            "--gpus", type=positive_int, default=0, metavar="N",
            help="ask the cluster's autoscaler for N GPUs, and plan with them (default: the GPUs present)",
        )  # fmt: skip
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Settings]:
    """Read the command line; where it is wrong, end the program with status 2 and a message.

    The namespace gains `given`: the settings that flags or --config named, by dotted key.
    """
    # --preset and --config are read first: the values that --help shows depend on them.
    argv = list(sys.argv[1:] if argv is None else argv)
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=parser.get_default("preset"))
    first.add_argument("--config", type=local_file)
    chosen, _ = first.parse_known_args(argv)
    try:
        values = read_preset(chosen.preset)
        from_file = read_yaml(chosen.config) if chosen.config else {}
        shown = flatten(make_settings(merge(values, from_file)).model_dump())
        _add_settings(parser, shown)
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(_explain_unknown(unknown[0], list(shown)))
        # Flags win over the file, and the file over the preset.
        flags = {key: _flag_value(key, text) for key, text in vars(namespace).items() if key in shown}
        over = merge(from_file, unflatten(flags))
        settings = make_settings(merge(values, over))
    except SettingsError as error:
        parser.error(str(error))
    namespace.given = flatten(over)
    # The default run folder is named after the preset, which is known only now.
    if getattr(namespace, "run", False) is None:
        namespace.run = Path("runs") / namespace.preset
    if getattr(namespace, "runs", False) is None:
        namespace.runs = [Path("runs") / namespace.preset]
    if JOB_COPY in Path.cwd().parts:
        _refuse_relative(parser, namespace)
    return namespace, settings


def _refuse_relative(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    # Ray deletes a job's copy of the code, and with it whatever lies at a relative path.
    named = {name: getattr(namespace, name, None) for name in ("run", "store", "shared", "out")}
    for name, value in [*named.items(), *(("run", run) for run in getattr(namespace, "runs", []))]:
        value = str(value or "/")
        if "://" not in value and not Path(value).is_absolute():
            parser.error(
                f"--{name}: {value} would lie in the job's own copy of the code and be deleted with it; give the URI "
                "of an object store, or the absolute path of a folder that all nodes share"
            )


def _flag_value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"--{key}: {error}") from None


def parse_without_settings(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of a command that uses no settings: `--preset` only names the default run folder, and any
    settings key is an error."""
    namespace, _ = parse_settings(parser, argv)
    if namespace.given:
        parser.error(f"settings do not change what this command does; leave out {', '.join(namespace.given)}")
    return namespace


def _explain_unknown(flag: str, keys: list[str]) -> str:
    named = flag.removeprefix("--").split("=")[0]
    if named in REMOVED:
        return f"{flag}: {REMOVED[named]}"
    section = named.rpartition(".")[0]
    near = [key for key in keys if section and key.rpartition(".")[0] == section]
    hint = f"keys of {section}: {', '.join(near)}" if near else "--help lists the flags and keys"
    return f"unknown flag {flag}; {hint}"


def _add_settings(parser: argparse.ArgumentParser, shown: dict[str, Any]) -> None:
    group = parser.add_argument_group("settings (value of the chosen preset in brackets)")
    for key, doc in _documented_keys(Settings):
        value = str(shown.get(key)).replace("None", "null")
        help_text = f"{doc} [{value}]".replace("%", "%%")
        group.add_argument(f"--{key}", dest=key, metavar="VALUE", default=argparse.SUPPRESS, help=help_text)


def run_command(main: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    An error that the user can correct becomes one line without a traceback: status 2 for settings, else 1. SIGTERM, by
    which schedulers and spot machines end a job, is treated like Ctrl-C: status 130.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except SettingsError as error:
        _print_error(str(error))
        return 2
    except OSError as error:
        _print_error(atomic.described(error))
        return 1
    except (ValueError, LookupError, RuntimeError, ArithmeticError) as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _print_error(message: str) -> None:
    """Print an error in one line: it may hold foreign text."""
    print(f"error: {shown(masked(message))}", file=sys.stderr)


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} → {"a": {"b": 1}}."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        into = values
        for section in sections:
            into = into.setdefault(section, {})
        into[name] = value
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a settings file as nested values. Raises SettingsError where it is missing, malformed or no mapping."""
    try:
        values = parse_yaml(read_limited(path, MAX_YAML_BYTES)) or {}
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected sections with keys, found a {type(values).__name__}")
    return values


def read_preset(name: str) -> dict[str, Any]:
    """Read the values of a preset. Raises SettingsError, which lists the presets, where none has this name."""
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in known:
        raise SettingsError(f"--preset: no preset {name!r}; there are {', '.join(known)}")
    return read_yaml(PRESETS / f"{name}.yaml")
