"""Settings of what comes in and what a scene is made of: images, planes, rendering, the autoencoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaling.config.section import AboveZero, Channels, PlaneAxes, Rate, Section, Size, SizeOrZero


class Data(Section):
    """The training images."""

    image_size: Size = 128
    """Side of the training images in pixels; a store's larger images are area-filtered down to it."""
    embedded_views: Annotated[int, Field(ge=4, le=10_000)] = 40
    """Views rendered of each embedded car."""


class Representation(Section):
    """Planes and field: T_i = concat(T_i^mic, Σ_k w_i^k B_k), then a small network (paper, section on the method)."""

    micro_features: SizeOrZero = 10
    """F_mic: features of the planes that a scene owns."""
    macro_features: SizeOrZero = 12
    """F_mac: features of the base planes, which all scenes share."""
    num_base_planes: SizeOrZero = 16
    """M: number of base tri-planes; a scene has one coefficient for each."""
    resolution: Annotated[int, Field(ge=2, le=4096)] = 44
    """K: side of a plane in texels."""
    plane_axes: list[PlaneAxes] = Field(default=["xy", "xz", "yz"], min_length=1, max_length=6)
    """World axes along the width and height of each plane."""
    box_side: AboveZero | None = None
    """Side of the cube around the origin that the planes span, world units; null: the cuboid around all scenes
    of the store, measured from their views, which need a background of one colour."""
    length_unit: Literal["box", "world"] = "box"
    """Unit of length that densities are per. box: the box's longest side, so that scenes of any scale are learned
    alike; world (published): the world's unit."""
    combine: Literal["product", "sum"] = "product"
    """How a point's features f on the planes are combined; product: Π (1 + f) - 1; sum (published)."""
    field_width: Size = 64
    """Hidden units of the field, the small network from features to density and colours."""
    field_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Hidden layers of the field; published: 1."""
    field_activation: Literal["relu", "softplus"] = "relu"
    """Activation after each hidden layer of the field; published: softplus."""
    micro_std: Rate = 0.0
    """Standard deviation of a scene's micro planes before the first step."""
    base_std: Rate = 0.1
    """Standard deviation of the base planes before the first step."""
    coefs_std: Rate = 0.25
    """Standard deviation of a stage-1 scene's coefficients before the first step."""

    @model_validator(mode="after")
    def _consistent(self) -> Representation:
        if (self.macro_features == 0) != (self.num_base_planes == 0):
            raise ValueError("macro_features and num_base_planes must both be 0 (micro only) or both above 0")
        if self.micro_features + self.macro_features == 0:
            raise ValueError("micro_features and macro_features cannot both be 0")
        return self


class Rendering(Section):
    """Samples along a ray; distances in world units."""

    sampled: Literal["hull", "cuboid"] = "hull"
    """Where rays are sampled. hull: in the scene's own visual hull, and most densely where its densities show a
    surface; cuboid: evenly, in all of the box (or from near to far)."""

    near: AboveZero | None = None
    """Distance along a ray at which the first stratum of samples starts; null: where the ray enters the box."""
    far: AboveZero | None = None
    """Distance at which the last stratum ends; null: where the ray leaves the box."""
    samples: Annotated[int, Field(ge=2, le=4096)] = 10
    """Stratified samples a ray."""
    importance_samples: SizeOrZero = 0
    """Samples a ray that are drawn from the weights of a first pass; 0: one pass only."""
    background: Literal["views", "white"] = "views"
    """What a ray that meets nothing shows. views: for each latent pixel, the mean latent of stage 1's views that are
    white there; white (published): everywhere the mean latent of a white image. With kind super_resolution both are
    white."""

    @model_validator(mode="after")
    def _consistent(self) -> Rendering:
        if (self.near is None) != (self.far is None):
            raise ValueError("give near and far together, or neither (the box decides)")
        if self.near is not None and self.far is not None and self.near >= self.far:
            raise ValueError(f"near ({self.near}) must be below far ({self.far})")
        if self.sampled == "hull" and (self.near is not None or self.importance_samples):
            raise ValueError("near, far and importance_samples need sampled: cuboid; in a hull surfaces place samples")
        if self.importance_samples and self.samples < 4:
            raise ValueError("importance_samples need at least 4 samples in the first pass to draw from")
        return self


class Autoencoder(Section):
    """The image autoencoder, pre-trained or from scratch; planes render its latents."""

    kind: Literal["super_resolution", "kl", "tiny"] = "super_resolution"
    """super_resolution: latents are the image made smaller, and a decoder adds the detail (shrink 1 and decoder_blocks
    0: planes of pixels); kl: diffusers' AutoencoderKL; tiny: diffusers' AutoencoderTiny, pre-trained only."""
    shrink: Size = 2
    """super_resolution: pixels a side of one latent."""
    decoder_width: Size = 48
    """super_resolution: feature channels of the decoder, whose convolutions run at the latents' resolution."""
    decoder_blocks: Annotated[int, Field(ge=0, le=64)] = 4
    """super_resolution: residual blocks of the decoder, two convolutions each; 0: bilinear upsampling, no network."""
    pretrained: str | None = None
    """Hub name or local folder of a diffusers autoencoder (safetensors), or the folder `autoencoder` of another shared
    model; null: train one from scratch."""
    subfolder: str | None = None
    """Folder inside the hub repository; ignored where the local folder itself holds config.json."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit (40 hexadecimal digits) of the hub repository; branches and tags are refused, as they can move."""
    block_out_channels: Channels = Field(default=[32, 64, 96, 128])
    """kl from scratch: channels per resolution; n entries shrink images 2^(n-1) times a side."""
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    """kl from scratch: residual layers per resolution."""
    norm_num_groups: Size = 4
    """kl from scratch: groups of the group norms; must divide every entry of block_out_channels. Groups of one channel
    reconstruct images about 1 dB worse; whether rendered latents decode worse has yet to be measured."""
    latent_channels: Annotated[int, Field(ge=1, le=256)] = 4
    """kl from scratch: channels of the latents."""
    latent_scale: AboveZero | None = None
    """kl and tiny: s of the normalisation tanh(s (z - shift)); null: 0.11 / std(z), measured on training images."""
    kl_weight: Rate = 1e-4
    """kl from scratch: weight of the mean KL divergence of the latents from N(0, 1)."""

    @property
    def has_encoder(self) -> bool:
        """Whether a network encodes; then encoding takes time and is worth caching."""
        return self.kind != "super_resolution"

    @property
    def has_decoder(self) -> bool:
        """Whether a network decodes; then phases can train it."""
        return self.kind != "super_resolution" or self.decoder_blocks > 0

    @property
    def is_identity(self) -> bool:
        """Whether latents are the pixels themselves."""
        return not (self.has_encoder or self.has_decoder) and self.shrink == 1

    @property
    def trains_first(self) -> bool:
        """Whether phase `autoencoder` of stage 1 has something to train before the scenes."""
        return self.pretrained is None and self.has_decoder

    @model_validator(mode="after")
    def _consistent(self) -> Autoencoder:
        if self.kind == "tiny" and self.pretrained is None:
            raise ValueError("pretrained must name a hub repository or a folder: kind tiny is not trained from scratch")
        if self.pretrained is not None and not self.has_decoder:
            raise ValueError("pretrained must be null: decoder_blocks is 0, so there is nothing to load")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups ({self.norm_num_groups}) must divide block_out_channels {channels}")
        return self
