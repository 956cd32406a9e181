"""Addresses: no secret is taken or shown, no stranger's server is asked; names of any letters find their files."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from mlflow import MlflowClient

from scaling.cli import command_parser, disk_folder, parse_settings, run_command
from scaling.config import SettingsError
from scaling.data.scene_store import SceneStore
from scaling.distributed.tracking import Tracker, read_curves, ui_command
from scaling.library.run_folder import RunFolder
from scaling.storage import addresses
from scaling.storage.addresses import check_no_secret, check_server, masked
from scaling.storage.atomic import replace_file
from scaling.storage.paths import to_path
from scaling.storage.text import shown

pytestmark = pytest.mark.filterwarnings("default")  # MLflow's own warnings are theirs to mend

SECRETS = [
    "s3://AKIAKEY:SECRETWORD@bucket/runs",
    "s3://AKIAKEY:SECR/ETWORD@bucket/runs",
    "s3://SECRETWORD@bucket/runs",
    "gs://me:SECRETWORD@bucket/runs",
    "s3://bucket/runs?secret_key=SECRETWORD",
    "abfs://container@account/runs?sas_token=SECRETWORD",
    "s3://bucket/runs?endpoint_override=http://me:SECRETWORD@host",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri, capsys):
    for use in (to_path, SceneStore, check_no_secret):
        with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as error:
            use(uri)
        assert "ETWORD" not in str(error.value)
    for flag in ("--run", "--store"):
        with pytest.raises(SystemExit):
            parse_settings(command_parser("", "run", "store"), [flag, uri])
        told = capsys.readouterr().err
        assert "must hold no key" in told and "ETWORD" not in told


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account/runs", "gs://anonymous@bucket/runs", "s3://bucket/a?region=x", "s3://bucket/run@v2",
        "s3://bucket/a:b@c", "hdfs://user@node:9000/x",
    ],
)  # fmt: skip
def test_names_before_the_host_are_no_secrets(uri):
    check_no_secret(uri)
    assert masked(uri) == uri


@pytest.mark.parametrize(
    ("text", "shown_as"),
    [
        ("see postgresql://u:p@ss@host/db now", "see postgresql://***@host/db now"),
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://***@bucket/x"),
        ("http://host:5000/a@b", "http://***@b"),  # too much rather than too little
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_masks(text, shown_as):
    assert masked(text) == shown_as


@pytest.mark.parametrize("flag", ["--config", "--run"])
def test_a_secret_in_any_flag_is_not_printed(flag, capsys):
    with pytest.raises(SystemExit):
        parse_settings(command_parser("", "run"), [flag, "s3://KEY:SECRETWORD@b/x.yaml"])
    assert "SECRETWORD" not in capsys.readouterr().err


def test_an_option_that_stands_twice_is_refused():
    """Libraries differ in which of the two they take."""
    with pytest.raises(ValueError, match="endpoint_override' stands in it twice"):
        to_path("s3://b/x?endpoint_override=evil&region=x&endpoint_override=good")


def test_what_is_printed_is_masked(capsys):
    def fail() -> int:
        raise SettingsError("cannot reach postgresql://me:word@host/db?password=word")

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: cannot reach postgresql://***@host/db?password=***\n"


def test_a_password_of_the_tracking_server_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:word@127.0.0.1:1/db")
    run = RunFolder(tmp_path / "run")
    assert "word" not in ui_command(run) and "***@127.0.0.1" in ui_command(run)
    with pytest.raises(RuntimeError, match="cannot be used") as error:  # its driver is not installed
        Tracker(run, "stage2")
    assert "word" not in str(error.value)


def test_commands_are_noted_without_secrets(tmp_path, monkeypatch, tiny_settings):
    monkeypatch.setattr("sys.argv", ["stage2.py", "--address", "ray://me:word@host"])
    run = RunFolder(tmp_path)
    run.write_config("stage2", tiny_settings, {})
    assert "word" not in (tmp_path / "config.yaml").read_text()


def test_a_file_cannot_name_the_server_that_gets_a_signed_request(tmp_path, monkeypatch, tiny_settings):
    run = RunFolder(tmp_path)
    theirs = "s3://bucket/shared?endpoint_override=evil.example:9000&scheme=http"
    run.write_config("stage2", tiny_settings, {"shared": theirs, "store": theirs})
    for use in (run.shared_in_use, lambda: run.store_of(2)):
        with pytest.raises(ValueError, match=r"config.yaml names the server 'evil.example:9000'.*AWS_ENDPOINT_URL_S3"):
            use()
    check_server(theirs, "config.yaml", asked="s3://mine/run?endpoint_override=http://evil.example:9000")
    check_server("s3://bucket/shared", "config.yaml")
    for uri in ("abfs://c@evil.example/x", "hdfs://evil.example:9000/x", "s3://b/x?proxy=evil.example"):
        with pytest.raises(ValueError, match="names the server"):
            check_server(uri, "config.yaml")
    monkeypatch.setattr(addresses, "_asked", set())
    parse_settings(command_parser("", "run", "store"), ["--store", theirs])
    assert run.store_of(2) == theirs, "the user named it on this command line"
    monkeypatch.setattr(addresses, "_asked", set())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://evil.example:9000")
    assert run.store_of(2) == theirs


# ---------------------------------------------------------------------- names with any letters


def test_a_run_folder_of_any_name_has_its_database_beside_it(tmp_path, monkeypatch):
    name = "a?b%20c d#e'f&g;h"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = RunFolder(tmp_path / name / "run")
    tracker = Tracker(run, "stage2")
    tracker.log_metrics({"stage2/psnr": 20.0}, step=1)
    tracker.end()
    assert [path.name for path in (tmp_path / name).glob("mlflow.db")] == ["mlflow.db"]
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0)]}
    words = shlex.split(ui_command(run))
    assert words[:2] == ["mlflow", "ui"] and len(words) == 4
    assert MlflowClient(tracking_uri=words[3]).get_experiment_by_name("run") is not None


def test_home_is_expanded_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/x") == disk_folder("~/x") == tmp_path / "x"
    parsed, _ = parse_settings(command_parser("", "run", "num-scenes"), ["--run=~/x", "--num-scenes=1", "--scenes=~/y"])
    assert parsed.run == tmp_path / "x" and parsed.scenes == tmp_path / "y"


def test_a_path_that_is_not_utf8_is_told(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"caf\\xe9.*is not valid UTF-8: rename the folder"):
        to_path(name)


@pytest.mark.parametrize("length", [230, 255])
def test_the_longest_names_can_be_written(tmp_path, length):
    replace_file(tmp_path / ("a" * length), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a" * length]


def test_text_for_a_terminal():
    assert shown("a\n\n b\tc") == "a b c"
    assert shown("\x1b[31mé\u202e\udcff") == "\\x1b[31mé\\u202e\\udcff"


def test_rays_sessions_are_nobody_elses(tmp_path, monkeypatch):
    from scaling.distributed.cluster import private_folder

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path)[:0] or "/tmp/" + tmp_path.name[:10])
    base = Path(os.environ["RAY_TMPDIR"])
    folder = private_folder()
    assert folder.parent == base and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    other = private_folder()
    assert other != folder and other.stat().st_mode & 0o777 == 0o700
    other.rmdir()
    folder.rmdir()
    base.rmdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("deep" * 20)))
    assert private_folder().parent == Path("/tmp")
