"""Settings of a phase, in either stage: losses, learning rates, schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaling.config.section import Count, Positive, Rate, Section


class Rates(Section):
    """Learning rates at the start of a phase; 0 freezes that part."""

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
    """The student, a small decoder that stage 1 distils."""


class LossWeights(Section):
    """Weights of the mean squared errors, with RGB in [-1, 1]."""

    latent: Rate = 0.0
    """Rendered latents against encoded images, both normalised."""
    rgb: Rate = 0.0
    """Decoded renders against images."""
    autoencoder: Rate = 0.0
    """Decoded encodings against images."""
    student: Rate = 0.0
    """The student against the decoder: the images of rendered latents, and how these change towards encoded latents."""


class Phase(Section):
    """A stretch of training with its own losses, learning rates and schedule; both stages consist of phases."""

    num_epochs: Count = 1
    """Epochs; 0 skips the phase."""
    steps_per_epoch: Positive | None = None
    """Steps per epoch; null: one pass over every training view of every scene."""
    rays_per_item: Positive | None = None
    """Random rays per item (scene) in a step, drawn over all its training views; null: an item is one whole view."""
    crop: Positive | None = None
    """Side, in latent pixels, of the square crop of each view, around a pixel that shows the scene; null, or at least
    the side of the latent image: whole views."""
    loss: LossWeights = LossWeights(latent=1.0)
    lr: Rates = Rates()
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rates after every epoch."""
    lr_cosine_to: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rates that half a cosine reaches at the end of the phase; 1: no decay."""
    lr_milestones: list[Positive] = Field(default=[])
    """Epochs at which the learning rates are multiplied by lr_milestone_factor."""
    lr_milestone_factor: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Factor on the learning rates at each milestone."""
    items_per_step: Positive | None = None
    """Items (whole views, or scenes where rays_per_item is set) in a step's global batch."""
    field_frozen_from_epoch: Count | None = None
    """Epoch from which the field is frozen; null: never."""
    tv_weight: Rate = 0.0
    """Weight of the planes' total variation, (‖Δh‖² + ‖Δw‖²) / (H + W), mean over the batch."""

    @property
    def encodes_views(self) -> bool:
        """Whether a step encodes its views itself, with gradients, instead of using cached latents."""
        return self.loss.autoencoder > 0 or self.lr.encoder > 0

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if self.rays_per_item is not None and (self.loss.rgb or self.loss.student or self.encodes_views):
            raise ValueError(
                "rays_per_item must be null where loss.rgb, loss.autoencoder, loss.student or lr.encoder is above 0: "
                "they need views, not random rays"
            )
        if self.rays_per_item is not None and self.crop is not None:
            raise ValueError("crop must be null where rays_per_item is set: random rays come from whole views")
        if self.num_epochs and not any(self.loss.model_dump().values()):
            raise ValueError("loss: one of latent, rgb, autoencoder, student must be above 0 in a phase that runs")
        return self


class Stage1Phase(Phase):
    """A phase of stage 1."""

    items_per_step: Positive = 32
    """Items (whole views, or scenes where rays_per_item is set) in a step's global batch."""


class Stage2Phase(Phase):
    """A phase of stage 2. In mode frozen only the scenes' own parameters move: the rates of decoder, field and base
    planes, items_per_step and field_frozen_from_epoch are not used."""

    items_per_step: Positive | None = None
    """Mode cohort: items (whole views, or scenes where rays_per_item is set) in a step; null: as many as the cohort has
    scenes."""
    check_every: Positive | None = None
    """Mode frozen, random rays: early stopping. Steps between measurements of the error on two held-out training views.
    A scene whose error is hardly below its lowest so far has stopped improving: its rates fall to lr_cosine_to within
    decay_steps, then it leaves the batch. null: every scene takes all steps, and lr_cosine_to spans all of them."""
    decay_steps: Positive = 150
    """With check_every: steps in which the rates of a scene fall once it stops improving; at the latest, the last steps
    of the phase."""
    coefs_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Mode frozen, random rays: fraction of all steps after which coefs are frozen while micro planes go on, so that
    base planes need not be mixed again; 1: never."""
    rounded_from: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Mode frozen, random rays: fraction of all steps after which scenes are rendered from micro planes rounded as
    stage2.micro_dtype stores them (gradients pass straight through the rounding); 1: never."""
    through: Literal["student", "decoder"] = "student"
    """Mode frozen: the network that loss.rgb decodes with; always the decoder where the shared model has no student.
    Mode cohort always uses the decoder."""

    @model_validator(mode="after")
    def _moves_scenes(self) -> Stage2Phase:
        if self.lr.encoder or self.loss.autoencoder:
            raise ValueError("stage 2 never moves the encoder: lr.encoder and loss.autoencoder must be 0")
        if self.lr.student or self.loss.student:
            raise ValueError("stage 2 never moves the student: lr.student and loss.student must be 0")
        if self.check_every is not None and self.rays_per_item is None:
            raise ValueError("check_every needs rays_per_item: a fit on whole views has no early stopping")
        if self.num_epochs and not (self.lr.micro_planes or self.lr.coefs):
            raise ValueError("lr: micro_planes or coefs must be above 0, else nothing of a scene is fitted")
        return self
