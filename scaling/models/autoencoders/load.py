"""Make autoencoders: pre-trained ones by hub name or folder, new ones, and empty ones for a shared model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.autoencoders.checks import KINDS, check_config
from scaling.models.autoencoders.kl import KLAutoencoder
from scaling.models.autoencoders.super_resolution import SuperResolutionAutoencoder
from scaling.models.autoencoders.tiny import TinyAutoencoder
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.progress import waiting_for
from scaling.storage.tensors import read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"  # beside config.json, as diffusers names it


def build_autoencoder(settings: AutoencoderSettings, image_size: int, precision: str = "float32") -> ImageAutoencoder:
    """Load a pre-trained autoencoder by hub name or folder, or make a new one of the settings' sizes.

    Raises ValueError where loading fails; the message names the folder or hub name.
    """
    if settings.pretrained is not None:
        return load_pretrained(settings, precision)
    if settings.kind == "super_resolution":
        return SuperResolutionAutoencoder(*_sizes(settings), precision)
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
    return KLAutoencoder(vae, settings.latent_scale, precision)


def _sizes(settings: AutoencoderSettings) -> tuple[int, int, int]:
    return settings.shrink, settings.decoder_width, settings.decoder_blocks


def empty_autoencoder(
    settings: AutoencoderSettings, config: Mapping[str, Any], precision: str = "float32"
) -> ImageAutoencoder:
    """An autoencoder as config.json describes it, without its weights.

    Raises ValueError where the kind or sizes in `config` differ from the settings', or a size is absurd.
    """
    check_config(config, settings.kind)
    if settings.kind == "super_resolution":
        for name in ("shrink", "decoder_width", "decoder_blocks"):
            if config[name] != getattr(settings, name):
                raise ValueError(f"{name} is {config[name]}, autoencoder.{name} is {getattr(settings, name)}")
        return SuperResolutionAutoencoder(*_sizes(settings), precision)
    return _of_diffusers(settings, _diffusers_class(settings.kind).from_config(config), precision)


def load_pretrained(settings: AutoencoderSettings, precision: str = "float32") -> ImageAutoencoder:
    """Load an autoencoder by local folder or hub name: only safetensors, and from the hub only a pinned revision.

    Raises ValueError where loading fails; the message names the folder or hub name and what to do.
    """
    source = str(settings.pretrained)
    where: dict[str, Any] = {"subfolder": settings.subfolder, "revision": settings.revision}
    try:
        # Everything is checked on config.json before weights are read.
        # Everything is checked on config.json before weights are read.
        if Path(source).is_dir():
            inside = (Path(source) / "config.json").is_file()
            where = {} if inside else {"subfolder": settings.subfolder}
            folder = Path(source, "" if inside else settings.subfolder or "")
            config = parse_json(read_limited(folder / "config.json"))
            if settings.kind == "super_resolution":
                return _load_super_resolution(settings, folder, config, precision)
        elif settings.kind == "super_resolution":
            raise ValueError("no such folder; kind super_resolution loads from a local folder only, not from the hub")
        elif settings.revision is None:
            raise ValueError("autoencoder.revision is null: name the commit on the hub, as branches and tags can move")
        else:
            config = _diffusers_class(settings.kind).load_config(source, **where)
        check_config(config, settings.kind)
        options = {"use_safetensors": True, "low_cpu_mem_usage": False}
        with waiting_for(f"the autoencoder {source}"):
            vae = _diffusers_class(settings.kind).from_pretrained(source, **options, **where)
        return _of_diffusers(settings, vae, precision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # The remedy depends on the kind: super_resolution is not on the hub, tiny cannot be trained from scratch.
        # The remedy depends on the kind: super_resolution is not on the hub, tiny cannot be trained from scratch.
        name = KINDS[settings.kind][0]
        remedy = f"Name a local folder with the config.json and safetensors of a {name}"
        if settings.kind != "super_resolution":
            remedy = f"Name a diffusers {name} on the hub, with the commit of its revision, or a local folder with "
            remedy += "config.json and safetensors"
        if settings.kind != "tiny":
            remedy += "; or set autoencoder.pretrained to null to train a small one"
        told = f"autoencoder.pretrained: cannot load {source!r} ({where or 'no subfolder'}): {error}\n{remedy}."
        raise ValueError(told) from error


def _diffusers_class(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, KINDS[kind][0])


def _of_diffusers(settings: AutoencoderSettings, vae: Any, precision: str) -> ImageAutoencoder:
    return (KLAutoencoder if settings.kind == "kl" else TinyAutoencoder)(vae, settings.latent_scale, precision)


def _load_super_resolution(
    settings: AutoencoderSettings, folder: Path, config: Mapping[str, Any], precision: str
) -> ImageAutoencoder:
    with torch.device("meta"):  # sizes are compared before memory is taken
        autoencoder = empty_autoencoder(settings, config, precision)
    decoder = autoencoder.get_submodule("decoder")
    tensors = read_tensors(folder / WEIGHTS, decoder.state_dict())
    decoder.to_empty(device="cpu").load_state_dict(tensors)
    return autoencoder
