"""The cache of compiled loops."""

from __future__ import annotations

import importlib
import os
import sys

INNER = "from scaling.storage.compiled import compiled\n\n\n@compiled()\ndef inner(x):\n    return x * {factor}\n"
SUM = "from scaling.storage.compiled import compiled\n\n\n@compiled()\ndef total(x):\n    return x.a + x.b\n"
PAIR = "from typing import NamedTuple\n\n\nclass Pair(NamedTuple):\n    a: int\n    b: int\n"
OUTER = """from cached_inner import inner
from scaling.storage.compiled import compiled


@compiled()
def outer(x):
    return inner(x) + 1
"""


def test_a_cache_that_names_a_module_that_is_gone_is_forgotten(tmp_path, monkeypatch):
    """As after an update in which a type of an argument has moved to another module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cached_sum.py").write_text(SUM)
    found = []
    for module in ("old_types", "new_types"):
        (tmp_path / f"{module}.py").write_text(PAIR)
        for name in ("cached_sum", "old_types"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        total, pair = importlib.import_module("cached_sum").total, importlib.import_module(module).Pair
        found.append(total(pair(2, 3)))
        (tmp_path / f"{module}.py").unlink()
    assert found == [5, 5]


def test_a_loop_is_compiled_again_when_one_that_it_calls_has_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cached_outer.py").write_text(OUTER)
    found = []
    for factor in (2, 2, 3):
        inner = tmp_path / "cached_inner.py"
        if factor == 3 or not found:
            inner.write_text(INNER.format(factor=factor))
            if found:  # a file that was written later, on any file system
                os.utime(inner, (inner.stat().st_atime, inner.stat().st_mtime + 5))
        for name in ("cached_inner", "cached_outer"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        outer = importlib.import_module("cached_outer").outer
        found.append((outer(5), sum(outer.stats.cache_hits.values())))
    # From a cache the second time; the outer loop's own file never changed.
    assert found == [(11, 0), (11, 1), (16, 0)]
