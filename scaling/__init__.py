"""Learn thousands of 3D scenes: a shared compression model, then one small tri-plane a scene.

In Python: `scaling.load_library(RUN)` and `scaling.fit_scene(SHARED, images, cam2world, intrinsics)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.api.scenes import fit_scene, load_library

__all__ = ["fit_scene", "load_library"]


def __getattr__(name: str) -> Any:
    # Every `import scaling.x` runs this file first. The API needs torch, whose import takes seconds; --help and the
    # settings need neither. So the API is imported at its first use.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scaling.api import scenes

    return getattr(scenes, name)
