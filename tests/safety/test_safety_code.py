"""The program itself: no code of it unpickles or evaluates what it reads, and its servers keep to loopback."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Modules that unpickle, and calls that unpickle or run what they are given. Lint forbids most of them, too, but not in
# scaling/distributed, where its ban of ray and mlflow is off.
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "ray.cloudpickle"}
CALLS = {
    "eval", "exec", "compile", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load",
    "np.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pd.read_pickle", "pq.read_table", "os.system",
    "safetensors.torch.load_file", "mlflow.pyfunc.load_model",
}  # fmt: skip


def modules() -> list[Path]:
    return sorted([*(ROOT / "scaling").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


def found_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            named = {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from named & (MODULES | CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield name
            for keyword in node.keywords:
                if (
                    keyword.arg in ("allow_pickle", "trust_remote_code", "shell")
                    and ast.unparse(keyword.value) != "False"
                ):
                    yield str(keyword.arg)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    assert not list(found_in(path.read_text()))


def test_the_check_sees_every_form() -> None:
    source = (
        "import pickle\nfrom ray import cloudpickle\nfrom torch import load\ndef f():\n    np.load(x, allow_pickle=1)"
    )
    assert set(found_in(source)) == {"pickle", "ray.cloudpickle", "torch.load", "np.load", "allow_pickle"}


def test_no_command_opens_a_port_to_others() -> None:
    files = [*modules(), ROOT / "README.md", *(ROOT / "experiments").rglob("*.yaml")]
    wide = re.compile(r"0\.0\.0\.0|--host\b|dashboard_host|include_dashboard=True|server_name=")
    assert [str(path) for path in files if wide.search(path.read_text())] == []


@pytest.mark.skipif(not Path("/proc/net/tcp6").is_file(), reason="looks into Linux's own tables")
def test_a_local_cluster_keeps_to_loopback(ray_6_cpus_4_gpus: object) -> None:
    owners = family(os.getpid())
    sockets = {link for pid in owners for link in links(pid) if link.startswith("socket:")}
    places = [place for place, inode in listening() if f"socket:[{inode}]" in sockets]
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    assert len(places) >= 3, "the cluster's own servers are among them"
    assert set(places) <= set(loopback)
    assert os.environ.get("RAY_AUTH_MODE") == "token" and len(os.environ["RAY_AUTH_TOKEN"]) >= 32


def listening() -> Iterator[tuple[str, str]]:
    """(address in hexadecimal, inode) of the sockets that wait for connections."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                yield words[1].partition(":")[0], words[9]


def family(oldest: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found, more = set[int](), {oldest}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in found} - found
    return found


def links(pid: int) -> Iterator[str]:
    """What the open files of a process are."""
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            yield str(path.readlink())
        except OSError:
            continue
