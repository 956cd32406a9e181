"""Imports point down only, and what lies below `distributed` runs without Ray and MLflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part of the package may import of the others, from the bottom to the top.
BOTTOM = {"config", "cameras", "storage"}
FITS = BOTTOM | {"data", "models", "training"}
READS = FITS | {"library", "pictures", "api"}
ALLOWED = {
    "config": set(),
    "cameras": set(),
    "storage": set(),
    "cli": {"config", "storage"},
    "data": BOTTOM,
    "models": BOTTOM,
    "training": BOTTOM | {"data", "models"},
    "library": FITS,
    "pictures": FITS | {"library"},
    "api": FITS | {"library"},
    "export": READS,
    "report": READS,
    "viewer": READS,
    "distributed": READS | {"cli"},
}
CLUSTER = {"ray", "mlflow"}


def part_of(path: Path) -> str:
    """`data` for scaling/data/png.py, `config` for scaling/config/."""
    return path.relative_to(ROOT / "scaling").with_suffix("").parts[0]


def imports(source: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from scaling import data` and `from scaling.data import srn` name the same layer
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "scaling").rglob("*.py") if path != ROOT / "scaling" / "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_down(path):
    part = part_of(path)
    names = [name.split(".") for name in imports(path.read_text())]
    used = {name[1] for name in names if name[0] == "scaling" and len(name) > 1}
    assert used <= ALLOWED[part] | {part}, f"scaling.{part} may not import {used - ALLOWED[part] - {part}}"
    if part != "distributed":
        assert not {name[0] for name in names} & CLUSTER, "ray and mlflow belong in scaling/distributed"


def test_entry_points_leave_ray_to_distributed():
    """Of the benchmarks one kills nodes of Ray itself."""
    for path in (ROOT / "experiments").rglob("*.py"):
        if path.name == "fake_nodes.py":
            continue
        assert not {name.split(".")[0] for name in imports(path.read_text())} & CLUSTER, path


def test_the_checks_see_imports_of_every_form():
    found = list(
        imports("import ray.data\ndef f():\n    from scaling.models import field\n    from scaling import data")
    )
    assert found == ["ray.data", "scaling.models.field", "scaling.data"]


@pytest.mark.slow
def test_everything_below_distributed_imports_without_ray_and_mlflow():
    below = [module_name(path) for path in modules() if part_of(path) != "distributed"]
    program = (
        "import importlib, sys\n"
        "sys.modules['ray'] = sys.modules['mlflow'] = None\n"  # an import of either now fails
        "importlib.import_module('scaling.config')\n"
        "heavy = {'torch', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, f'scaling.config imports {heavy}'\n"
        f"for name in {below}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- sizes


def test_rooms_and_files_stay_small():
    """At most 20 files a folder, 350 lines a file, 60 lines a function; no loose modules at the root."""
    package = ROOT / "scaling"
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "cameras.py", "cli.py"}
    for folder in {path.parent for path in package.rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 20, f"{folder}: {len(files)} files"
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_no_module_imports_itself_through_others():
    graph = {module_name(path): set(on_import(ast.parse(path.read_text()).body)) for path in modules()}
    graph = {name: {needed for needed in graph if needed in used} for name, used in graph.items()}
    while leaves := {name for name, used in graph.items() if not used}:
        graph = {name: used - leaves for name, used in graph.items() if name not in leaves}
    assert not graph, f"circles among {sorted(graph)}"


def on_import(body: list[ast.stmt]) -> Iterator[str]:
    """Modules, and names in them, that a module imports as it is imported: not in functions, nor for type checkers."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
