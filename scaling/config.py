"""The settings page: every key, its type, its default and one line on what it does.

Read in this order, later wins: the defaults below, `--preset NAME` (experiments/presets/NAME.yaml),
`--config FILE`, then `--section.key VALUE`. The defaults below are the preset `default`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
# A shared model brings its own settings: what sets sizes has a limit, far above what is of use, so that no file can ask
# for all memory.
Size = Annotated[int, Field(ge=1, le=4096)]
SizeOrZero = Annotated[int, Field(ge=0, le=4096)]
Channels = Annotated[list[Size], Field(min_length=1, max_length=8)]
PlaneAxes = Literal["xy", "xz", "yz", "yx", "zx", "zy"]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]

MAX_TOLD = 10  # wrong keys in an error message
REMOVED = {  # keys that there were, and what took their place
    "representation.space": "removed: autoencoder.kind says what planes encode; instead of `rgb` write `autoencoder: "
    "{kind: super_resolution, shrink: 1, decoder_blocks: 0}`, instead of `latent` write `autoencoder: {kind: kl}`",
}


class SettingsError(ValueError):
    """A settings file or flag that cannot be used; the message names the key and what is allowed."""


class Section(BaseModel):
    """A part of the settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class Data(Section):
    """What comes in."""

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
    plane_axes: Annotated[list[PlaneAxes], Field(min_length=1, max_length=6)] = ["xy", "xz", "yz"]
    """World axes along the width and height of each plane."""
    box_side: AboveZero | None = None
    """Side of the cube around the origin that the planes span, world units; null: the cuboid around all train scenes of
    the store, as their views show them before a white background."""
    combine: Literal["product", "sum"] = "product"
    """How a point's features on the planes become one: Π (1 + f) - 1 over the planes, or (published) their sum."""
    field_width: Size = 64
    """Hidden units of the field, the small network from features to density and colours."""
    field_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Hidden layers of the field; published: 1."""
    field_activation: Literal["relu", "softplus"] = "relu"
    """What follows each hidden layer of the field; published: softplus."""
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
    """Where rays are sampled: in the scene's own visual hull, and there most where its densities show a surface; or
    evenly, in all of the box (or from near to far)."""

    near: AboveZero | None = None
    """AboveZero along a ray at which the first stratum of samples starts; null: where the ray enters the box."""
    far: AboveZero | None = None
    """AboveZero at which the last stratum ends; null: where the ray leaves the box."""
    samples: Annotated[int, Field(ge=2, le=4096)] = 10
    """Stratified samples a ray."""
    importance_samples: SizeOrZero = 0
    """Samples a ray drawn from the weights of a first pass; 0: one pass only."""
    background: Literal["views", "white"] = "views"
    """What a ray that meets nothing shows: for each latent pixel the mean of stage 1's views where they are white, or
    (published) everywhere the latent of a white image. The latents of super_resolution are white either way."""

    @model_validator(mode="after")
    def _consistent(self) -> Rendering:
        if (self.near is None) != (self.far is None):
            raise ValueError("give near and far together, or neither (the box decides)")
        if self.near is not None and self.far is not None and self.near >= self.far:
            raise ValueError(f"near ({self.near}) must be below far ({self.far})")
        if self.sampled == "hull" and (self.near is not None or self.importance_samples):
            raise ValueError("near, far and importance_samples need sampled: cuboid; in a hull its surfaces decide")
        if self.importance_samples and self.samples < 4:
            raise ValueError("importance_samples need at least 4 samples in the first pass to draw from")
        return self


class Autoencoder(Section):
    """The image autoencoder, whose latents planes encode, pre-trained or from scratch."""

    kind: Literal["super_resolution", "kl", "tiny"] = "super_resolution"
    """super_resolution: the image made smaller, and a decoder that adds the detail (pixels: shrink 1, decoder_blocks
    0); kl: diffusers' AutoencoderKL; tiny: diffusers' AutoencoderTiny, pre-trained."""
    shrink: Size = 2
    """super_resolution: pixels a side of one latent."""
    decoder_width: Size = 48
    """super_resolution: features of the decoder, whose convolutions keep the latents' resolution."""
    decoder_blocks: Annotated[int, Field(ge=0, le=64)] = 4
    """super_resolution: residual blocks of the decoder, two convolutions each; 0: bilinear upsampling, no network."""
    pretrained: str | None = None
    """Hub name or local folder of a diffusers autoencoder (safetensors), or the folder `autoencoder` of another shared
    model; null: train one from scratch."""
    subfolder: str | None = None
    """Folder inside the hub repository; ignored where the local folder itself holds config.json."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of the hub repository; branches and tags are refused, as they can move."""
    block_out_channels: Channels = [32, 64, 96, 128]
    """kl from scratch: channels per resolution; n entries shrink images 2^(n-1) times a side."""
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    """kl from scratch: residual layers per resolution."""
    norm_num_groups: Size = 4
    """kl from scratch: groups of the group norms; must divide every entry of block_out_channels. With groups of one
    channel images are kept worse, by a dB or so; whether rendered latents decode worse must be measured."""
    latent_channels: Annotated[int, Field(ge=1, le=256)] = 4
    """kl from scratch: channels of the latents."""
    latent_scale: AboveZero | None = None
    """kl and tiny: s of the normalisation tanh(s z); null: 0.11 / std(z), measured on training images."""
    kl_weight: Rate = 1e-4
    """kl from scratch: weight of the mean KL divergence of the latents from N(0, 1)."""

    @property
    def has_encoder(self) -> bool:
        """Whether a network encodes, so that encoding takes time and is worth caching."""
        return self.kind != "super_resolution"

    @property
    def has_decoder(self) -> bool:
        """Whether a network decodes, which phases can train."""
        return self.kind != "super_resolution" or self.decoder_blocks > 0

    @property
    def is_identity(self) -> bool:
        """Whether latents are the pixels themselves."""
        return not (self.has_encoder or self.has_decoder) and self.shrink == 1

    @property
    def trains_first(self) -> bool:
        """Whether it has something to learn before scenes do, in phase `autoencoder` of stage 1."""
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


class Rates(Section):
    """Learning rates at the start of a phase; 0 freezes the part."""

    encoder: Rate = 0.0
    """Encoder of the autoencoder."""
    decoder: Rate = 0.0
    """Decoder of the autoencoder."""
    field: Rate = 0.0
    """The field."""
    base_planes: Rate = 0.0
    """Base planes."""
    micro_planes: Rate = 0.0
    """Micro planes of each scene."""
    coefs: Rate = 0.0
    """Coefficients of each scene."""
    student: Rate = 0.0
    """The student, a small decoder."""


class LossWeights(Section):
    """Weights of the mean squared errors; RGB is taken in [-1, 1]."""

    latent: Rate = 0.0
    """Rendered latents against encoded images, both normalised."""
    rgb: Rate = 0.0
    """Decoded renders against images."""
    autoencoder: Rate = 0.0
    """Decoded encodings against images."""
    student: Rate = 0.0
    """The student against the decoder, on rendered latents: its images, and their differences."""


class Phase(Section):
    """A stretch of training with its own losses, rates and schedule; every phase of both stages is one."""

    num_epochs: Count = 1
    """Epochs; 0 leaves the phase out."""
    steps_per_epoch: Positive | None = None
    """Steps of an epoch; null: one pass over every training view of every scene."""
    rays_per_item: Positive | None = None
    """Random rays of one scene, over all its training views, a step; null: the rays of one whole view."""
    crop: Positive | None = None
    """Side in latents of the square that is taken of each view, around a pixel that shows the scene; null, or at least
    the latents' own side: whole views."""
    loss: LossWeights = LossWeights(latent=1.0)
    lr: Rates = Rates()
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rates after each epoch."""
    lr_cosine_to: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor reached by a half cosine over the whole phase; 1: none."""
    lr_milestones: list[Positive] = []
    """Epochs at which the learning rates drop by lr_milestone_factor."""
    lr_milestone_factor: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Factor on the learning rates at each milestone."""
    items_per_step: Positive | None = None
    """Items (whole views, or scenes where rays_per_item is set) in a step's global batch."""
    field_frozen_from_epoch: Count | None = None
    """Epoch from which the field no longer moves; null: never."""
    tv_weight: Rate = 0.0
    """Weight of the planes' total variation, (‖Δh‖² + ‖Δw‖²) / (H + W), mean over the batch."""

    @property
    def encodes_views(self) -> bool:
        """Whether a step encodes its views itself, with gradients, instead of taking cached latents."""
        return self.loss.autoencoder > 0 or self.lr.encoder > 0

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if self.rays_per_item is not None and (self.loss.rgb or self.loss.student or self.encodes_views):
            raise ValueError(
                "rays_per_item must be null where loss.rgb, loss.autoencoder, loss.student or lr.encoder use views"
            )
        if self.rays_per_item is not None and self.crop is not None:
            raise ValueError("crop must be null where rays_per_item is set: it is a part of a view")
        if self.num_epochs and not any(self.loss.model_dump().values()):
            raise ValueError("loss: one of latent, rgb, autoencoder, student must be above 0 in a phase that runs")
        return self


class Stage1Phase(Phase):
    """A phase of stage 1."""

    items_per_step: Positive = 32
    """Items (whole views, or scenes where rays_per_item is set) in a step's global batch."""


class Stage2Phase(Phase):
    """In mode frozen scenes move alone: the rates of decoder, field and base planes, items_per_step and
    field_frozen_from_epoch are not used."""

    items_per_step: Positive | None = None
    """Mode cohort: items (whole views, or scenes where rays_per_item is set) in a step; null: as many as scenes."""
    check_every: Positive | None = None
    """Mode frozen, random rays: steps between looks at two training views that are held out. A scene that is hardly
    better than at the look before ends: its rates fall by lr_cosine_to within decay_steps, and it leaves the batch;
    null: every scene takes all steps, and lr_cosine_to spans all of them."""
    decay_steps: Positive = 150
    """Steps in which the rates of a scene fall that ends; the last ones of all steps at the latest."""
    coefs_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Mode frozen, random rays: part of all steps after which coefs stand still where micro planes go on, so that base
    planes need not be mixed again; 1: never."""
    rounded_from: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Mode frozen, random rays: part of all steps after which scenes are rendered from planes rounded as
    stage2.micro_dtype will store them (their gradients pass straight through); 1: never."""
    through: Literal["student", "decoder"] = "student"
    """Mode frozen: what loss.rgb decodes with; the decoder too where the shared model has no student. Mode cohort: the
    decoder."""

    @model_validator(mode="after")
    def _moves_scenes(self) -> Stage2Phase:
        if self.lr.encoder or self.loss.autoencoder:
            raise ValueError("stage 2 never moves the encoder: lr.encoder and loss.autoencoder must be 0")
        if self.lr.student or self.loss.student:
            raise ValueError("stage 2 never moves the student: lr.student and loss.student must be 0")
        if self.check_every is not None and self.rays_per_item is None:
            raise ValueError("check_every needs rays_per_item: whole views are fitted without looks at held-out ones")
        if self.num_epochs and not (self.lr.micro_planes or self.lr.coefs):
            raise ValueError("lr: micro_planes or coefs must be above 0, or nothing of a scene moves")
        return self


SCENE_RATES = {"micro_planes": 2e-2, "coefs": 2e-2}


class Stage1(Section):
    """Trains the shared model on the first scenes."""

    autoencoder: Stage1Phase = Stage1Phase(
        num_epochs=3,
        steps_per_epoch=100,
        items_per_step=8,
        crop=32,
        loss=LossWeights(autoencoder=1.0),
        lr=Rates(decoder=1e-3),
        lr_cosine_to=0.05,
    )
    """Phase 0: an autoencoder from scratch, left out where a pre-trained one is named or there is nothing to train.
    Kind super_resolution has a decoder alone; kl needs lr.encoder, too."""
    warmup: Stage1Phase = Stage1Phase(
        num_epochs=12,
        steps_per_epoch=250,
        items_per_step=16,
        rays_per_item=128,
        loss=LossWeights(latent=1.0),
        lr=Rates(field=5e-3, base_planes=1e-2, **SCENE_RATES),
        lr_cosine_to=0.1,
    )
    """Phase 1a: planes, coefs and field on cached latents; the autoencoder is frozen."""
    joint: Stage1Phase = Stage1Phase(
        num_epochs=0,
        steps_per_epoch=500,
        items_per_step=8,
        loss=LossWeights(latent=1.0, autoencoder=0.3),
        lr=Rates(encoder=1e-4, decoder=1e-4, field=1e-4, base_planes=1e-3, micro_planes=1e-3, coefs=1e-3),
        lr_cosine_to=0.1,
    )
    """Phase 1b, left out unless asked for (there is no encoder to train in kind super_resolution): everything, the
    autoencoder included: the latent space becomes 3D-aware. To read rendered latents is left to 1c, so that the
    autoencoder stays a good one of images, and a step takes half the time."""
    adapt: Stage1Phase = Stage1Phase(
        num_epochs=5,
        steps_per_epoch=100,
        items_per_step=8,
        crop=32,
        loss=LossWeights(rgb=1.0),
        lr=Rates(decoder=5e-4),
        lr_cosine_to=0.05,
    )
    """Phase 1c (ours): a copy of the decoder learns to read rendered latents; stage 2 decodes with it."""
    distil: Stage1Phase = Stage1Phase(
        num_epochs=0,
        steps_per_epoch=100,
        items_per_step=8,
        loss=LossWeights(student=1.0),
        lr=Rates(student=2e-3),
        lr_cosine_to=0.02,
    )
    """Phase 1d (ours), left out unless asked for: a small student learns that decoder on rendered latents, and stage 2
    moves scenes through it: a tenth of the time of an autoencoder of a million parameters, a fifth of the gain."""
    student_width: Size = 96
    """Features of the student, whose convolutions keep the latents' resolution."""
    student_blocks: Annotated[int, Field(ge=0, le=64)] = 2
    """Residual blocks of the student, two convolutions each."""
    num_buckets: Positive = 4
    """Scene buckets that every batch draws from equally; workers share them, so there are at most as many."""
    dense_adam: bool = False
    """Published behaviour, in stage 2's mode cohort too: a step moves the parameters of all scenes, also of those that
    are not in its batch."""

    @model_validator(mode="after")
    def _consistent(self) -> Stage1:
        for name in ("autoencoder", "warmup", "joint", "adapt", "distil"):
            items = getattr(self, name).items_per_step
            if items % self.num_buckets:
                raise ValueError(f"{name}.items_per_step ({items}) must be a multiple of num_buckets")
        loss, lr = self.adapt.loss, self.adapt.lr
        others = lr.encoder or lr.field or lr.base_planes or lr.micro_planes or lr.coefs
        if self.adapt.num_epochs and (loss.latent or loss.autoencoder or others or not lr.decoder):
            raise ValueError("adapt moves the decoder alone, by loss.rgb alone: every other rate and loss must be 0")
        for name in ("autoencoder", "warmup", "joint", "adapt"):
            phase = getattr(self, name)
            if phase.loss.student or phase.lr.student:
                raise ValueError(f"{name}: only distil trains the student: loss.student and lr.student must be 0")
        loss_alone = self.distil.loss == LossWeights(student=self.distil.loss.student)
        lr_alone = self.distil.lr == Rates(student=self.distil.lr.student)
        if self.distil.num_epochs and not (loss_alone and lr_alone and self.distil.lr.student):
            raise ValueError("distil moves the student alone, by loss.student: every other rate and loss must be 0")
        return self


PATIENCE = {"max_attempts", "deadline_seconds", "stall_seconds"}


class Stage2(Section):
    """Fits every further scene."""

    mode: Literal["frozen", "cohort"] = "frozen"
    """frozen: scenes are fitted alone on the shared model as it is; cohort: with a copy of it, fine-tuned together."""
    scenes_per_batch: Positive = 8
    """Mode frozen: scenes that an actor fits together and commits as one part."""
    cohort_size: Positive | None = 64
    """Mode cohort: scenes of a cohort, fixed chunks of the scenes' order; null: one cohort of all."""
    latent: Stage2Phase = Stage2Phase(
        steps_per_epoch=1800,
        rays_per_item=96,
        coefs_until=0.3,
        loss=LossWeights(latent=1.0),
        lr=Rates(field=1e-3, base_planes=1e-3, micro_planes=4e-2, coefs=4e-2),
        lr_cosine_to=0.02,
    )
    """Phase 2a: micro planes and coefs against the encoded training views."""
    rgb: Stage2Phase = Stage2Phase(
        num_epochs=0,
        items_per_step=8,
        loss=LossWeights(rgb=1.0),
        lr=Rates(decoder=5e-4, field=1e-3, base_planes=1e-3, micro_planes=2e-2, coefs=2e-2),
        lr_cosine_to=0.1,
    )
    """Phase 2b: the same through the decoder (or its student), against the training images."""
    micro_dtype: Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3"] = "int4"
    """How a library stores micro planes; whole numbers have one scale per plane and channel."""
    start: Literal["mean", "random"] = "mean"
    """A scene starts at stage 1's mean coefs and zero micro planes, or (published) drawn as stage 1's scenes were, and
    in mode cohort the field starts anew too."""
    max_attempts: Positive = 3
    """Actors that a scene may cost, alone in its batch, before it is recorded as failed."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """The longest that a batch (mode cohort: an epoch) may take, after which its actor is killed; counts from when the
    actor is ready."""
    stall_seconds: Annotated[float, Field(gt=0)] = 600.0
    """An actor that has done no step for so long ends itself: its device hangs."""


class Settings(Section):
    """Everything that shapes a run's results, and how long stage 2 waits before it gives up (PATIENCE)."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random stream (with scene ids and step numbers)."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the autoencoder and the field on a GPU; the rest, and everything on a CPU, is float32."""
    data: Data = Data()
    representation: Representation = Representation()
    rendering: Rendering = Rendering()
    autoencoder: Autoencoder = Autoencoder()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()

    def shaping(self) -> dict[str, Any]:
        """The values that shape results: two runs that agree in them can be told apart by nothing."""
        return self.model_dump(exclude={"stage2": PATIENCE})

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        autoencoder = self.autoencoder
        if not autoencoder.has_decoder:
            for key in ("stage1.joint", "stage1.adapt", "stage1.distil", "stage2.rgb"):
                section, name = key.split(".")
                if getattr(getattr(self, section), name).num_epochs:
                    raise ValueError(f"{key}.num_epochs must be 0: autoencoder.decoder_blocks is 0, so no decoder")
            if self.stage2.latent.lr.decoder:
                raise ValueError("stage2.latent.lr.decoder must be 0: autoencoder.decoder_blocks is 0, so no decoder")
        if autoencoder.kind == "super_resolution" and self.data.image_size % autoencoder.shrink:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of autoencoder.shrink "
                f"({autoencoder.shrink})"
            )
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
    """A line for each of the first wrong keys."""
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
    """Settings from nested plain values over the defaults.

    Raises SettingsError that names every wrong key and what is allowed there.
    """
    try:
        return Settings.model_validate(merge(Settings().model_dump(), values))
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None


NOT_NAMED = {"pretrained": None, "subfolder": None, "revision": None}
PIXELS: dict[str, Any] = {  # what `representation.space: rgb` meant
    "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0, **NOT_NAMED},
    "stage1": {"autoencoder": {"lr": {"encoder": 0.0}}},
}


def as_noted(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older program noted, as nested plain values; what it did not know of stands as it then was."""
    before = {
        "representation": {
            "box_side": 1.05,
            "combine": "sum",
            "field_width": 64,
            "field_layers": 1,
            "field_activation": "softplus",
        },
        "rendering": {"sampled": "cuboid", "background": "white"},
        "stage1": {"autoencoder": {"crop": None}, "adapt": {"crop": None}, "distil": {"num_epochs": 0}},
        "stage2": {
            "latent": {"check_every": None, "rounded_from": 1.0, "coefs_until": 1.0},
            "rgb": {"coefs_until": 1.0},
        },
    }
    return merge(before, _with_kind(values))


def _with_kind(values: dict[str, Any]) -> dict[str, Any]:
    """autoencoder.kind for `representation.space`, where that stands in its place. What an autoencoder in use does not
    need is left out, as presets do, so that a run of theirs goes on."""
    known, shape = (values.get(name) for name in ("autoencoder", "representation"))
    if isinstance(known, dict) and "kind" in known:
        return values
    space = None
    if isinstance(shape, dict):
        space = shape.get("space")
        values = {**values, "representation": {key: value for key, value in shape.items() if key != "space"}}
    if space == "rgb":
        return merge(values, PIXELS)
    unnamed = isinstance(known, dict) and known.get("pretrained", "") is None
    return merge(values, {"autoencoder": {"kind": "kl", **(NOT_NAMED if unnamed else {})}})


def with_stage2(settings: Settings, mode: str | None, cohort_size: int | None) -> Settings:
    """The settings with `--mode` as stage2.mode and `--cohort-size` as stage2.cohort_size, where they were given."""
    given = {"mode": mode, "cohort_size": cohort_size}
    over = {"stage2": {key: value for key, value in given.items() if value is not None}}
    return make_settings(merge(settings.model_dump(), over))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
