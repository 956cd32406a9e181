"""The cache of compiled loops."""

from __future__ import annotations

import importlib
import os
import sys

INNER = "from scaling.storage.compiled import compiled\n\n\n@compiled()\ndef inner(x):\n    return x * {factor}\n"
OUTER = """from cached_inner import inner
from scaling.storage.compiled import compiled


@compiled()
def outer(x):
    return inner(x) + 1
"""


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
