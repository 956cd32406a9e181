"""The READMEs hold: their Python runs, their commands parse, their links lead somewhere; the code documents itself."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.commands import WrongCommand, commands, parse_as_script
from helpers.tiny_run import make_run

from scaling.cli import PRESETS
from scaling.data.png import encode_png
from scaling.export.planes import export_planes
from scaling.pictures.draw import to_pixels

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(
    path for path in ROOT.rglob("README.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(language: str, name: str | None = None) -> list[str]:
    """The fenced blocks of a language, of one README or of all, in order; "" for those that name none."""
    texts = TEXTS.values() if name is None else [TEXTS[name]]
    return [body for text in texts for found, body in FENCE.findall(text) if found == language]


def inline_code() -> list[str]:
    """What stands between single backticks, fenced blocks left out."""
    return [code for text in TEXTS.values() for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


# ---------------------------------------------------------------------- Python


@pytest.mark.slow
def test_the_examples_run(tiny_settings, tiny_scenes, tmp_path, monkeypatch, capsys):
    """In order, as one program, beside a tiny run and a folder of views as a user has them."""
    export_planes(make_run(tmp_path / "runs" / "cars", tiny_settings, tiny_scenes), tmp_path / "planes")
    (tmp_path / "my-car").mkdir()
    for index, image in enumerate(to_pixels(tiny_scenes[0].images)):
        (tmp_path / "my-car" / f"{index:03d}.png").write_bytes(encode_png(image))
    intrinsics = (tiny_scenes[0].intrinsics[0] * torch.tensor([[16.0], [16.0], [1.0]])).tolist()
    cameras = {"intrinsics": intrinsics, "cam2world": tiny_scenes[0].cam2world.tolist()}
    (tmp_path / "my-car" / "cameras.json").write_text(json.dumps(cameras))
    monkeypatch.chdir(tmp_path)
    examples = blocks("python", "scaling/README.md")
    names: dict[str, object] = {}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"scaling/README.md, Python example {number}", "exec"), names)
    assert len(examples) == 6
    assert "2 scenes, among them ['car-00002', 'car-00003']" in capsys.readouterr().out
    assert (tmp_path / "car.png").is_file()
    assert names["data"].shape == (2, 3, 5, 4, 4) and names["std"].shape == (5,)
    assert names["views"]["images"].shape == (4, 3, 16, 16)


# ---------------------------------------------------------------------- commands


FENCED = [command for block in [*blocks("bash"), *blocks("")] for command in commands(block)]
INLINE = [command for text in inline_code() for command in commands(text) if command[1]]


@pytest.mark.parametrize(
    ("script", "arguments"), FENCED + INLINE, ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_a_command_parses(script, arguments):
    parse_as_script(script, arguments)


def test_the_commands_were_found():
    assert len(READMES) == 6
    scripts = {Path(script).stem for script, _ in FENCED}
    assert {"quickstart", "prepare", "stage1", "stage2", "evaluate", "render", "fit", "bytes"} <= scripts


def test_the_root_readme_is_short_and_begins_with_the_two_commands():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    first, second = FENCE.findall(TEXTS["README.md"])[:2]
    assert first[0] == second[0] == "bash"
    assert "experiments/quickstart.py" in first[1] and "pytest" in second[1]


def test_flags_in_the_text_exist():
    """A flag that the text names belongs to one of the README's scripts (`--section.key` stands for any setting)."""
    flags = {"--section.key", "--help"}
    for script, arguments in FENCED:
        flags |= set(parse_as_script(script, arguments)._option_string_actions)
    named = {flag for text in inline_code() for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", text)}
    assert named <= flags, f"no script has {sorted(named - flags)}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python experiments/stage1.py --num-scenes 5 --colour red", "unknown flag --colour"),
        ("python experiments/stage1.py --num-scenes 5 --stage1.warmup.epochs 3", "keys of stage1.warmup"),
        ("python experiments/stage1.py --num-scenes 5 --stage1.warmup.num_epochs many", "stage1.warmup.num_epochs"),
        ("python experiments/stage1.py --num-scenes 5 --preset tiny", "no preset 'tiny'"),
        ("A=1 python experiments/stage1.py \\\n  --run runs/cars", "required: --num-scenes"),
        ("python experiments/evaluate.py --seed 3", "leave out seed"),
        ("pip list && python experiments/stage9.py", "no such script"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    [(script, arguments)] = commands(line)
    with pytest.raises(WrongCommand, match=message):
        parse_as_script(script, arguments)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}, link


def test_every_preset_is_named():
    missing = {path.stem for path in PRESETS.glob("*.yaml")} - set(inline_code())
    assert not missing, f"no README names preset {sorted(missing)}"


# ---------------------------------------------------------------------- docstrings


def undocumented(body: list[ast.stmt], owner: str = "") -> Iterator[str]:
    """Public functions, methods and classes that say nothing about themselves.

    Left out: properties and what consists of one statement, which says it itself. A settings section is documented by
    the strings under its keys.
    """
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        is_property = any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list)
        documents_keys = isinstance(node, ast.ClassDef) and any(
            isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) for key, text in zip(node.body, node.body[1:])
        )
        if not (ast.get_docstring(node) or is_property or documents_keys or len(node.body) == 1):
            yield f"{owner}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{owner}{node.name}.")


def test_what_is_public_is_documented():
    missing = []
    for path in sorted((ROOT / "scaling").rglob("*.py")):
        module = ast.parse(path.read_text())
        missing += [] if ast.get_docstring(module) else [f"{path}: the module"]
        missing += [f"{path}: {name}" for name in undocumented(module.body)]
    assert not missing


def test_what_is_undocumented_is_found():
    source = """
class Fits:
    def bare(self):
        x = 1
        return x
    def one_statement(self):
        return 1
    def _private(self):
        x = 1
        return x
class Section:
    key: int = 1
    'What the key does.'
"""
    assert list(undocumented(ast.parse(source).body)) == ["Fits", "Fits.bare"]
