"""All settings, made of plain values; errors name the key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from scaling.config.scenes import Autoencoder, Data, Rendering, Representation
from scaling.config.section import Section, merge
from scaling.config.stages import PATIENCE, Stage1, Stage2

MAX_TOLD = 10  # wrong keys that one error message lists
REMOVED = {  # removed key → what took its place
    "representation.space": "removed: autoencoder.kind says what planes encode; instead of `rgb` write `autoencoder: "
    "{kind: super_resolution, shrink: 1, decoder_blocks: 0}`, instead of `latent` write `autoencoder: {kind: kl}`",
}


class SettingsError(ValueError):
    """A settings file or flag cannot be used; the message names the key and what is allowed."""


class Settings(Section):
    """Everything that shapes a run's results, and how long stage 2 waits before it gives up (PATIENCE)."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random stream, together with scene ids and step numbers."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the autoencoder and the field on a GPU; all else, and everything on a CPU, is float32."""
    data: Data = Data()
    representation: Representation = Representation()
    rendering: Rendering = Rendering()
    autoencoder: Autoencoder = Autoencoder()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()

    def shaping(self) -> dict[str, Any]:
        """The settings that shape results, all but PATIENCE, as nested plain values. Runs that agree in them cannot be
        told apart."""
        return self.model_dump(exclude={"stage2": PATIENCE})

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        autoencoder = self.autoencoder
        # Without a decoder, a phase that trains or uses one would have nothing to do.
        if not autoencoder.has_decoder:
            for key in ("stage1.joint", "stage1.adapt", "stage1.distil", "stage2.rgb"):
                section, name = key.split(".")
                if getattr(getattr(self, section), name).num_epochs:
                    raise ValueError(f"{key}.num_epochs must be 0: no decoder, as autoencoder.decoder_blocks is 0")
            if self.stage2.latent.lr.decoder:
                raise ValueError("stage2.latent.lr.decoder must be 0: no decoder, as autoencoder.decoder_blocks is 0")
        if autoencoder.kind == "super_resolution" and self.data.image_size % autoencoder.shrink:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of autoencoder.shrink "
                f"({autoencoder.shrink})"
            )
        # An AutoencoderKL from scratch has random weights: its size must fit, and stage 1 must train it.
        shrink = 2 ** (len(autoencoder.block_out_channels) - 1)
        scratch = autoencoder.kind == "kl" and autoencoder.pretrained is None
        if scratch and self.data.image_size % shrink:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of {shrink}, "
                f"as autoencoder.block_out_channels has {len(autoencoder.block_out_channels)} entries"
            )
        if scratch and not self.stage1.autoencoder.num_epochs:
            raise ValueError("autoencoder.pretrained is null, so stage1.autoencoder.num_epochs must be at least 1")
        if scratch and not self.stage1.autoencoder.lr.encoder:
            raise ValueError("autoencoder.pretrained is null, so stage1.autoencoder.lr.encoder must be above 0")
        return self


def _describe(error: ValidationError) -> str:
    """One line for each wrong key, for the first MAX_TOLD."""
    lines = []
    for item in error.errors()[:MAX_TOLD]:
        key = ".".join(str(part) for part in item["loc"]) or "settings"
        message = item["msg"].removeprefix("Value error, ")
        if key in REMOVED:
            lines.append(f"{key}: {REMOVED[key]}")
        elif item["type"] == "extra_forbidden":
            message = f"unknown key; allowed here: {', '.join(_fields_at(item['loc'][:-1]))}"
            lines.append(f"{key}: {message}")
        else:
            given = "" if item["type"] == "value_error" else f" (given: {item['input']!r:.200})"
            lines.append(f"{key}: {message}{given}")
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Settings
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def make_settings(values: dict[str, Any]) -> Settings:
    """Make settings from nested plain values over the defaults.

    Raises SettingsError naming the wrong keys (at most MAX_TOLD) and what is allowed there.
    """
    try:
        return Settings.model_validate(merge(Settings().model_dump(), values))
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None


def with_stage2(settings: Settings, mode: str | None, cohort_size: int | None) -> Settings:
    """The settings with `--mode` as stage2.mode and `--cohort-size` as stage2.cohort_size; None changes nothing."""
    given = {"mode": mode, "cohort_size": cohort_size}
    over = {"stage2": {key: value for key, value in given.items() if value is not None}}
    return make_settings(merge(settings.model_dump(), over))
