"""The image autoencoder and the normalisation of its latents.

`encode` and `decode` speak images in [0, 1] and normalised latents in [−1, 1]; `raw_latents` are what
diffusers' AutoencoderKL itself produces. In RGB space the autoencoder is the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.files import read_limited
from scaling.models.precision import networks
from scaling.parsing import parse_json

if TYPE_CHECKING:  # two seconds of imports, for those who make one
    from diffusers import AutoencoderKL

MARGIN = 1e-4  # keeps atanh finite
TARGET_STD = 0.11  # of s · z: s = 0.11 / std(z) keeps tanh near-linear over the latents' range


def normalise(raw_latents: Tensor, latent_scale: Tensor | float) -> Tensor:
    """n = tanh(s z), in [−1, 1]; any shape."""
    return torch.tanh(latent_scale * raw_latents)


def denormalise(latents: Tensor, latent_scale: Tensor | float) -> Tensor:
    """z = atanh(clamp(n, ±(1 − 1e-4))) / s, the inverse of `normalise`; any shape."""
    return torch.atanh(latents.clamp(-1 + MARGIN, 1 - MARGIN)) / latent_scale


class LatentDecoder(nn.Module):
    """The decoding half of an AutoencoderKL: latents [B, C, h, w] normalised → images [B, 3, H, W] in [0, 1]."""

    def __init__(self, post_quant_conv: nn.Module | None, decoder: nn.Module, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.post_quant_conv = post_quant_conv
        self.decoder = decoder

    def forward(self, latents: Tensor, latent_scale: Tensor | float) -> Tensor:
        """latents [B, C, h, w] in [−1, 1], their scale s → images [B, 3, H, W] in [0, 1], clamped."""
        raw_latents = denormalise(latents, latent_scale)
        with networks(raw_latents, self.precision):
            if self.post_quant_conv is not None:
                raw_latents = self.post_quant_conv(raw_latents)
            images = self.decoder(raw_latents)
        return ((images.float() + 1) / 2).clamp(0, 1)


class LatentAutoencoder(nn.Module):
    """AutoencoderKL with normalised latents."""

    latent_scale: Tensor

    def __init__(self, vae: AutoencoderKL, latent_scale: float | None) -> None:
        super().__init__()
        self.precision = "float32"  # the shared model sets it from its settings
        self.vae = vae
        self.register_buffer("latent_scale", torch.tensor(latent_scale or TARGET_STD))  # as for a std of 1

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def shrink(self) -> int:
        """How many times smaller a latent image's side is than the image's."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode_raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] → mean and log-variance of the raw latents, each [B, C, h, w]."""
        with networks(images, self.precision):
            distribution = self.vae.encode(2 * images - 1).latent_dist
        return distribution.mean.float(), distribution.logvar.float()

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] → mean latents [B, C, h, w], normalised."""
        return normalise(self.encode_raw(images)[0], self.latent_scale)

    def encode_sample(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images → samples of the latents, normalised, and their KL divergence from N(0, 1).

        images [B, 3, H, W], noise [B, C, h, w] (standard normal) → [B, C, h, w], [B] (mean over latent values).
        """
        mean, log_variance = self.encode_raw(images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
        return normalise(mean + (0.5 * log_variance).exp() * noise, self.latent_scale), divergence

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w], normalised → images [B, 3, H, W] in [0, 1]."""
        return self.decoder()(latents, self.latent_scale)

    def decoder(self) -> LatentDecoder:
        """The decoding half; shares its parameters with this autoencoder."""
        return LatentDecoder(self.vae.post_quant_conv, self.vae.decoder, self.precision)

    def copy_decoder(self) -> LatentDecoder:
        """A decoder of its own that starts where this autoencoder's stands."""
        return copy.deepcopy(self.decoder())

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the encoder and of the decoder, quantisation convolutions included."""
        encoder = [p for name, p in self.vae.named_parameters() if name.startswith(("encoder.", "quant_conv."))]
        decoder = [p for name, p in self.vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
        return encoder, decoder


class IdentityAutoencoder(nn.Module):
    """RGB space: latents are the pixels themselves, mapped to [−1, 1]."""

    latent_channels = 3
    shrink = 1

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] → the same in [−1, 1]."""
        return 2 * images - 1

    def encode_sample(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`: nothing is sampled, so the divergence [B] is 0."""
        return self.encode(images), images.new_zeros(len(images))

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 3, H, W] in [−1, 1] → images in [0, 1], clamped."""
        return ((latents + 1) / 2).clamp(0, 1)

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """It has no parameters."""
        return [], []


def build_autoencoder(settings: AutoencoderSettings, image_size: int) -> LatentAutoencoder:
    """A pre-trained autoencoder by hub name or folder, or a new small one.

    Raises ValueError that names the folder or hub name where it cannot be loaded.
    """
    if settings.pretrained is not None:
        return LatentAutoencoder(load_vae(settings), settings.latent_scale)
    from diffusers import AutoencoderKL

    depth = len(settings.block_out_channels)
    vae = AutoencoderKL(
        sample_size=image_size,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=tuple(settings.block_out_channels),
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        mid_block_add_attention=False,
    )
    return LatentAutoencoder(vae, settings.latent_scale)


class _VaeConfig(BaseModel):
    """What of an AutoencoderKL's config.json sets its size; the rest of it does no harm."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    block_out_channels: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=8)] = [64]
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    latent_channels: Annotated[int, Field(ge=1, le=256)] = 4
    norm_num_groups: Annotated[int, Field(ge=1, le=4096)] = 32


def check_vae_config(config: Mapping[str, Any]) -> None:
    """ValueError names the first key that makes an AutoencoderKL of an absurd size, or one that is not for images."""
    try:
        _VaeConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key}: {first['msg']} (given: {first['input']!r:.80})") from None


def load_vae(settings: AutoencoderSettings) -> AutoencoderKL:
    """AutoencoderKL.from_pretrained by local folder or hub name: safetensors only, and of the hub a pinned revision.

    Raises ValueError that names it where it cannot be loaded.
    """
    from diffusers import AutoencoderKL

    source = str(settings.pretrained)
    where: dict[str, Any] = {"subfolder": settings.subfolder, "revision": settings.revision}
    try:
        if Path(source).is_dir():
            inside = (Path(source) / "config.json").is_file()
            where = {} if inside else {"subfolder": settings.subfolder}
            config = Path(source, "" if inside else settings.subfolder or "", "config.json")
            check_vae_config(parse_json(read_limited(config)))
        elif settings.revision is None:
            raise ValueError("autoencoder.revision is null: name the commit on the hub, branches and tags can move")
        return AutoencoderKL.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False, **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"autoencoder.pretrained: cannot load {source!r} ({where or 'no subfolder'}): {error}\n"
            "Name a diffusers AutoencoderKL on the hub, with the commit of its revision, or a local folder with "
            "config.json and safetensors; or set autoencoder.pretrained to null to train a small one."
        ) from error


ImageAutoencoder = LatentAutoencoder | IdentityAutoencoder


def derive_background(autoencoder: ImageAutoencoder, image_size: int, device: Any) -> Tensor:
    """What a ray that meets nothing shows: the latent of a white image, averaged over pixels, in [0, 1]. → [C]."""
    with torch.no_grad():
        white = autoencoder.encode(torch.ones(1, 3, image_size, image_size, device=device))
    return ((white + 1) / 2).mean(dim=(0, 2, 3))
