"""The context of a frozen fit, which its functions pass on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.config import Settings
from scaling.models.shared_model import SharedModel
from scaling.training import watchdog
from scaling.training.random_streams import stream
from scaling.training.training_scene import TrainingScene


@dataclass(frozen=True)
class FitContext:
    """Context of a frozen fit.

    on_step(phase, step, mean loss of the scenes that still move) is called after every step.
    """

    shared: SharedModel
    settings: Settings
    on_step: Callable[[str, int, float], None] | None = None

    def stepped(self, name: str, step: int, losses: Tensor) -> None:
        """Report a step. losses [N]: those of the scenes that still move."""
        watchdog.beat()
        if self.on_step is not None:
            self.on_step(name, step, losses.mean().item())

    def streams(self, name: str, ready: Sequence[TrainingScene]) -> list[torch.Generator]:
        """A random stream per scene, for a phase; it depends on the seed, the phase and the scene's id alone."""
        return [stream(self.settings.seed, name, scene.scene_id) for scene in ready]
