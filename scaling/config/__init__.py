"""The settings: every key, its type, its default and what it does.

They are read in this order, and later values win: the defaults in this folder, `--preset NAME`
(experiments/presets/NAME.yaml), `--config FILE`, then `--section.key VALUE`. The defaults are the preset `default`.
"""

from scaling.config.older import as_noted
from scaling.config.phases import LossWeights, Phase, Rates, Stage1Phase, Stage2Phase
from scaling.config.scenes import Autoencoder, Data, Rendering, Representation
from scaling.config.section import Positive, Section, flatten, merge
from scaling.config.settings import REMOVED, Settings, SettingsError, make_settings, with_stage2
from scaling.config.stages import PATIENCE, Stage1, Stage2

__all__ = [
    "PATIENCE",
    "REMOVED",
    "Autoencoder",
    "Data",
    "LossWeights",
    "Phase",
    "Positive",
    "Rates",
    "Rendering",
    "Representation",
    "Section",
    "Settings",
    "SettingsError",
    "Stage1",
    "Stage1Phase",
    "Stage2",
    "Stage2Phase",
    "as_noted",
    "flatten",
    "make_settings",
    "merge",
    "with_stage2",
]
