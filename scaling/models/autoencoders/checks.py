"""Checks of an autoencoder's config.json: folders come from anywhere, so kind and sizes are checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

Side = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[list[Side], Field(min_length=1, max_length=8)]
Blocks = Annotated[list[Annotated[int, Field(ge=0, le=16)]], Field(min_length=1, max_length=8)]
Channels = Annotated[int, Field(ge=1, le=256)]
Shift = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] | None


class _Kl(BaseModel):
    """The keys of an AutoencoderKL's config.json that must be checked; other keys do no harm."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    block_out_channels: Widths = [64]
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    latent_channels: Channels = 4
    norm_num_groups: Side = 32
    shift_factor: Shift = None


class _Tiny(BaseModel):
    """The same for an AutoencoderTiny."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    encoder_block_out_channels: Widths = [64] * 4
    decoder_block_out_channels: Widths = [64] * 4
    num_encoder_blocks: Blocks = [1, 3, 3, 3]
    num_decoder_blocks: Blocks = [3, 3, 3, 1]
    upsampling_scaling_factor: Annotated[int, Field(ge=1, le=16)] = 2
    latent_channels: Channels = 4
    shift_factor: Shift = None

    @model_validator(mode="after")
    def _there_and_back(self) -> _Tiny:
        grows = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        shrinks = 2 ** (len(self.num_encoder_blocks) - 1)
        if grows != shrinks:
            raise ValueError(f"the encoder shrinks images {shrinks} times, the decoder enlarges latents {grows} times")
        return self


class _SuperResolution(BaseModel):
    shrink: Side
    decoder_width: Side
    decoder_blocks: Annotated[int, Field(ge=0, le=64)]


KINDS: dict[str, tuple[str, type[BaseModel]]] = {  # kind → the class that config.json names, and limits of its keys
    "kl": ("AutoencoderKL", _Kl),
    "tiny": ("AutoencoderTiny", _Tiny),
    "super_resolution": ("SuperResolutionAutoencoder", _SuperResolution),
}


def check_config(config: Mapping[str, Any], kind: str) -> None:
    """Check that config.json describes an autoencoder of this kind, of sensible size, for images of 3 channels.

    Raises ValueError naming the first key that does not.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json: expected an object, found a {type(config).__name__}")
    name, sizes = KINDS[kind]
    named = config.get("_class_name", name)
    if named != name:
        fits = next((other for other, (known, _) in KINDS.items() if known == named), None)
        remedy = f"autoencoder.kind must be {fits}" if fits else f"kinds are {', '.join(KINDS)}"
        raise ValueError(f"_class_name is {named!r:.80}, autoencoder.kind {kind} needs {name!r}: {remedy}")
    try:
        sizes.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "sizes"
        raise ValueError(f"{key}: {first['msg']} (given: {first['input']!r:.80})") from None
