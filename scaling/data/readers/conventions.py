"""Conventions of camera poses in files: which way a matrix maps, and where a camera's axes point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POSES = ("cam2world", "world2cam")
# Camera-to-world matrices of these axes, times this matrix, are camera-to-world matrices of OpenCV axes.
AXES = {
    "opencv": np.eye(4),  # x right, y down, z forward
    "opengl": np.diag([1.0, -1.0, -1.0, 1.0]),  # x right, y up, z backward
}


@dataclass(frozen=True)
class Convention:
    """poses: one of POSES; axes: a key of AXES."""

    poses: str
    axes: str

    def __str__(self) -> str:
        return f"{self.poses}, {self.axes} axes"

    @property
    def flags(self) -> str:
        """The flags of experiments/prepare.py that choose it."""
        return f"--poses {self.poses} --axes {self.axes}"

    def overridden(self, poses: str | None, axes: str | None) -> Convention:
        """The same convention, except for what is not None."""
        return Convention(poses or self.poses, axes or self.axes)


def as_read(matrices: NDArray[np.float64], convention: Convention) -> NDArray[np.float64]:
    """Matrices [..., 4, 4] of a file → camera-to-world matrices of OpenCV axes.

    >>> as_read(np.eye(4), Convention("cam2world", "opengl"))[:3, 2].tolist()  # its z axis pointed backward
    [0.0, 0.0, -1.0]
    """
    cam2world = np.linalg.inv(matrices) if convention.poses == "world2cam" else matrices
    return np.asarray(cam2world @ AXES[convention.axes], dtype=np.float64)
