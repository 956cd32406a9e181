"""Settings: where values come from, which win, and what wrong ones are told."""

from __future__ import annotations

import pytest
import yaml

from scaling.cli import PRESETS, command_parser, parse_settings, read_preset, read_yaml, run_command, unflatten
from scaling.config import Settings, SettingsError, flatten, make_settings, merge
from scaling.library.run_folder import settings_hash


def parse(*argv: str, flags: tuple[str, ...] = ("run",)):
    return parse_settings(command_parser("a test", *flags), argv)


def refused(capsys, *argv: str) -> str:
    """What a wrong command line is told, after it ended with status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_parses(preset):
    assert isinstance(make_settings(read_preset(preset)), Settings)


def test_the_default_preset_is_the_defaults():
    assert make_settings(read_preset("default")) == Settings()


def test_settings_survive_yaml():
    settings = make_settings(read_preset("quick"))
    assert make_settings(yaml.safe_load(yaml.safe_dump(settings.model_dump()))) == settings


def test_flags_win_over_config_over_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("representation: {resolution: 12, num_base_planes: 5}\n")
    argv = ("--preset", "quick", "--config", str(file), "--representation.num_base_planes", "6")
    namespace, settings = parse(*argv)
    shape = settings.representation
    assert settings.autoencoder.shrink == 1, "the preset wins over the defaults"
    assert shape.resolution == 12, "the file wins over the preset"
    assert shape.num_base_planes == 6, "the flag wins over the file"
    assert shape.macro_features == 12, "keys beside those stay as they are"
    assert namespace.given == {"representation.resolution": 12, "representation.num_base_planes": 6}


def test_the_run_folder_follows_the_preset():
    assert str(parse("--preset", "quick")[0].run) == "runs/quick"
    assert str(parse("--run", "elsewhere")[0].run) == "elsewhere"


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--rendering.near", "null", None),
        ("--autoencoder.pretrained", "some/folder", "some/folder"),
        ("--stage1.warmup.lr.field", "1e-3", 1e-3),
        ("--stage1.dense_adam", "true", True),
        ("--representation.plane_axes", "[xy, xz]", ["xy", "xz"]),
        ("--stage1.warmup.lr_milestones", "[20, 40]", [20, 40]),
    ],
)
def test_values_on_the_command_line(flag, text, value):
    assert flatten(parse(flag, text)[1].model_dump())[flag[2:]] == value


def test_null_on_the_command_line_undoes_a_preset():
    argv = ("--preset", "quick", "--stage1.warmup.steps_per_epoch", "null", "--autoencoder.kl_weight=0")
    settings = parse(*argv)[1]
    assert settings.stage1.warmup.steps_per_epoch is None and settings.autoencoder.kl_weight == 0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seeds": 1}, ["seeds: unknown key", "allowed here: seed, precision, data, representation"]),
        ({"data": {"size": 1}}, ["data.size: unknown key", "allowed here: image_size, embedded_views"]),
        ({"stage1": {"joint": {"lr": {"mlp": 1}}}}, ["stage1.joint.lr.mlp: unknown key", "encoder, decoder, field"]),
        ({"seed": "many"}, ["seed:", "valid integer", "given: 'many'"]),
        ({"data": 3}, ["data:", "dictionary"]),
        ({"representation": {"space": "rgb"}}, ["representation.space: removed: autoencoder.kind says", "shrink: 1"]),
        ({"autoencoder": {"kind": "vq"}}, ["autoencoder.kind:", "'super_resolution', 'kl' or 'tiny'", "given: 'vq'"]),
        ({"autoencoder": {"kind": "tiny"}}, ["autoencoder: pretrained must name", "not trained from scratch"]),
        ({"autoencoder": {"decoder_blocks": 0, "pretrained": "x"}}, ["autoencoder: pretrained must be null"]),
        ({"autoencoder": {"shrink": 3}}, ["data.image_size (128) must be a multiple of autoencoder.shrink (3)"]),
        ({"autoencoder": {"kind": "kl"}}, ["stage1.autoencoder.lr.encoder must be above 0"]),
        ({"representation": {"resolution": 1}}, ["representation.resolution:", "greater than or equal to 2"]),
        ({"representation": {"box_side": float("nan")}}, ["representation.box_side:"]),
        ({"rendering": {"samples": 0}}, ["rendering.samples:", "greater than or equal to 2"]),
        ({"representation": {"num_base_planes": 0}}, ["representation:", "both be 0 (micro only) or both above 0"]),
        (
            {"representation": {"micro_features": 0, "macro_features": 0, "num_base_planes": 0}},
            ["representation:", "micro_features and macro_features cannot both be 0"],
        ),
        ({"rendering": {"near": 0.5}}, ["rendering:", "near and far together"]),
        ({"rendering": {"near": 2.0, "far": 1.0}}, ["rendering:", "near (2.0) must be below far (1.0)"]),
        ({"autoencoder": {"norm_num_groups": 7}}, ["autoencoder:", "norm_num_groups (7) must divide"]),
        ({"stage1": {"num_buckets": 3}}, ["stage1:", "autoencoder.items_per_step (8)", "multiple of num_buckets"]),
        ({"stage1": {"joint": {"rays_per_item": 8}}}, ["stage1.joint:", "rays_per_item must be null"]),
        ({"stage2": {"rgb": {"lr": {"encoder": 1e-3}}}}, ["stage2.rgb:", "rgb: stage 2 never moves the encoder"]),
        (
            {
                "autoencoder": {"decoder_blocks": 0},
                "stage1": {"joint": {"num_epochs": 0}, "adapt": {"num_epochs": 0}, "distil": {"num_epochs": 0}},
                "stage2": {"latent": {"lr": {"decoder": 1e-4}}, "rgb": {"num_epochs": 0}},
            },
            ["stage2.latent.lr.decoder must be 0", "no decoder"],
        ),
        ({"stage2": {"rgb": {"lr": {"student": 1e-4}}}}, ["stage2.rgb: stage 2 never moves the student"]),
        ({"stage1": {"adapt": {"loss": {"student": 1}}}}, ["stage1: adapt: only distil trains the student"]),
        ({"stage1": {"distil": {"num_epochs": 1, "loss": {"rgb": 1}}}}, ["stage1: distil moves the student alone"]),
        ({"autoencoder": {"decoder_blocks": 0}}, ["stage1.adapt.num_epochs must be 0", "no decoder"]),
        (
            {"autoencoder": {"kind": "kl"}, "data": {"image_size": 100}},
            ["data.image_size (100) must be a multiple of 8"],
        ),
        (
            {"autoencoder": {"kind": "kl"}, "stage1": {"autoencoder": {"num_epochs": 0}}},
            ["autoencoder.pretrained is null", "stage1.autoencoder.num_epochs must be at least 1"],
        ),
    ],
)
def test_wrong_values_are_named(values, told):
    with pytest.raises(SettingsError) as error:
        make_settings(values)
    for words in told:
        assert words in str(error.value)


def test_all_wrong_keys_are_told_at_once():
    with pytest.raises(SettingsError) as error:
        make_settings({"seed": -1, "data": {"image_size": 0, "width": 3}})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["seed", "data.image_size", "data.width"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--data.size", "3"], ["unknown flag --data.size", "data.image_size, data.embedded_views"]),
        (["--nonsense"], ["unknown flag --nonsense", "--help"]),
        (["--data.image", "3"], ["unknown flag --data.image"]),  # no abbreviations
        (["--seed", "many"], ["seed:", "valid integer", "'many'"]),
        (["--seed", "null"], ["seed:", "valid integer"]),
        (["--seed", "[1"], ["expected ',' or ']'"]),
        (["--seed"], ["--seed", "expected one argument"]),
        (["--rendering.near", "3"], ["rendering:", "near and far together"]),
        (["--preset", "nothing"], ["no preset 'nothing'", "default", "quick"]),
        (["--preset", "../../pyproject"], ["no preset '../../pyproject'"]),
        (["--config", "missing.yaml"], ["missing.yaml: no such settings file"]),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(capsys, argv, told):
    error = refused(capsys, *argv)
    for words in told:
        assert words in error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {image_size: 0}", "data.image_size:"),
        ("seed: [1", "not readable as YAML"),
        ("- 1\n- 2", "expected sections with keys, found a list"),
        ("seed: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_wrong_file_ends_with_status_2(capsys, tmp_path, text, told):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert told in refused(capsys, "--config", str(file))


def test_what_a_cluster_job_would_lose_with_its_code_is_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "working_dir_files" / "_ray_pkg_1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "working_dir_files" / "_ray_pkg_1")
    flags = ("run", "store")
    with pytest.raises(SystemExit):
        parse("--store", "s3://bucket/cars", flags=flags)
    assert "--run: runs/default would lie in the job's own copy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--run", str(tmp_path), "--store", "cars", flags=flags)
    assert "--store: cars would lie in the job's own copy" in capsys.readouterr().err
    parse("--run", str(tmp_path), flags=flags)


@pytest.mark.parametrize(
    ("text", "told"), [("0", "at least 1"), ("two", "not a whole number"), ("1.5", "whole number")]
)
def test_counts_on_the_command_line(capsys, text, told):
    with pytest.raises(SystemExit) as ended:
        parse("--num-scenes", text, flags=("num-scenes",))
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_help_shows_every_key_with_its_line_and_value(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--preset", "quick", "--help", flags=("run", "store", "num-scenes", "address"))
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())  # argparse wraps lines
    for key in flatten(Settings().model_dump()):
        assert f"--{key} VALUE" in shown
    assert "Side of the training images in pixels; a store's larger images are area-filtered down to it. [128]" in shown
    assert "null: one pass over every training view of every scene. [100]" in shown
    assert "--store" in shown and "--address" in shown


def test_every_key_has_a_line_of_its_own():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(undocumented(Settings)) == []


@pytest.mark.parametrize(
    ("raised", "status"), [(SettingsError("s"), 2), (ValueError("v"), 1), (OSError("o"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_command_ends_in_one_line_and_a_status(capsys, raised, status):
    def main() -> int:
        raise raised

    assert run_command(main) == status
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(raised) in told


def test_a_command_that_works_returns_its_status():
    assert run_command(lambda: 0) == 0


def test_flatten_and_merge():
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert unflatten(flatten(nested)) == nested
    assert merge(nested, {"a": {"c": {"d": 3}}, "e": {"f": 4}}) == {"a": {"b": 1, "c": {"d": 3}}, "e": {"f": 4}}
    assert nested["a"]["c"] == {"d": [2]}, "merge leaves its arguments alone"


def test_an_empty_file_changes_nothing(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert read_yaml(file) == {}


def test_patience_does_not_make_another_run():
    """Who waits longer for a slow machine goes on with the same library and the same checkpoints."""
    patient = make_settings({"stage2": {"deadline_seconds": 9e4, "stall_seconds": 9e3, "max_attempts": 9}})
    assert settings_hash(patient) == settings_hash(make_settings({}))
    assert settings_hash(make_settings({"seed": 1})) != settings_hash(make_settings({}))
