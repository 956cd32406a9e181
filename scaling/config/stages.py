"""Settings of the two stages, phase by phase."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaling.config.phases import LossWeights, Rates, Stage1Phase, Stage2Phase
from scaling.config.section import Positive, Section, Size

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
    """Phase 0: trains an autoencoder from scratch; skipped where a pre-trained one is named or there is nothing to
    train. Kind super_resolution has only a decoder to train; kl needs lr.encoder, too."""
    warmup: Stage1Phase = Stage1Phase(
        num_epochs=12,
        steps_per_epoch=250,
        items_per_step=16,
        rays_per_item=128,
        loss=LossWeights(latent=1.0),
        lr=Rates(field=5e-3, base_planes=1e-2, **SCENE_RATES),
        lr_cosine_to=0.1,
    )
    """Phase 1a: trains planes, coefs and field on cached latents; the autoencoder is frozen."""
    joint: Stage1Phase = Stage1Phase(
        num_epochs=0,
        steps_per_epoch=500,
        items_per_step=8,
        loss=LossWeights(latent=1.0, autoencoder=0.3),
        lr=Rates(encoder=1e-4, decoder=1e-4, field=1e-4, base_planes=1e-3, micro_planes=1e-3, coefs=1e-3),
        lr_cosine_to=0.1,
    )
    """Phase 1b, off by default (kind super_resolution has no encoder to train): trains everything, so that the latent
    space of the autoencoder becomes 3D-aware. Decoding rendered latents is left to phase 1c: so the autoencoder remains
    good at images, and a step takes half the time."""
    adapt: Stage1Phase = Stage1Phase(
        num_epochs=5,
        steps_per_epoch=100,
        items_per_step=8,
        crop=32,
        loss=LossWeights(rgb=1.0),
        lr=Rates(decoder=5e-4),
        lr_cosine_to=0.05,
    )
    """Phase 1c (ours): trains a copy of the decoder on rendered latents; stage 2 decodes with it."""
    distil: Stage1Phase = Stage1Phase(
        num_epochs=0,
        steps_per_epoch=100,
        items_per_step=8,
        loss=LossWeights(student=1.0),
        lr=Rates(student=2e-3),
        lr_cosine_to=0.02,
    )
    """Phase 1d (ours), off by default: distils that decoder, on rendered latents, into a small student through which
    stage 2 fits scenes. Compared with an autoencoder of a million parameters: a tenth of the time, a fifth of the
    gain."""
    student_width: Size = 96
    """Feature channels of the student, whose convolutions run at the latents' resolution."""
    student_blocks: Annotated[int, Field(ge=0, le=64)] = 2
    """Residual blocks of the student, two convolutions each."""
    num_buckets: Positive = 4
    """Buckets of scenes; every batch draws equally from each. Workers share the buckets: there can be at most as many
    workers."""
    dense_adam: bool = False
    """Published behaviour: a step moves the parameters of all scenes, also of those that are not in its batch. It
    applies to stage 2's mode cohort too."""

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
    """Fits all further scenes."""

    mode: Literal["frozen", "cohort"] = "frozen"
    """frozen: each scene is fitted on its own to the unchanged shared model; cohort: scenes are fitted together with a
    copy of the shared model, which is fine-tuned."""
    scenes_per_batch: Positive = 8
    """Mode frozen: scenes that an actor fits together and commits as one part."""
    cohort_size: Positive | None = 64
    """Mode cohort: scenes per cohort; cohorts are fixed chunks of the scenes' order; null: one cohort of all scenes."""
    latent: Stage2Phase = Stage2Phase(
        steps_per_epoch=1800,
        rays_per_item=96,
        coefs_until=0.3,
        loss=LossWeights(latent=1.0),
        lr=Rates(field=1e-3, base_planes=1e-3, micro_planes=4e-2, coefs=4e-2),
        lr_cosine_to=0.02,
    )
    """Phase 2a: fits micro planes and coefs to the encoded training views."""
    rgb: Stage2Phase = Stage2Phase(
        num_epochs=0,
        items_per_step=8,
        loss=LossWeights(rgb=1.0),
        lr=Rates(decoder=5e-4, field=1e-3, base_planes=1e-3, micro_planes=2e-2, coefs=2e-2),
        lr_cosine_to=0.1,
    )
    """Phase 2b: fits the same through the decoder (or its student) to the training images."""
    micro_dtype: Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3"] = "int4"
    """Number type in which a library stores micro planes; integers have one scale per plane and channel."""
    start: Literal["mean", "random"] = "mean"
    """mean: a scene starts from stage 1's mean coefs and zero micro planes; random (published): from random values, as
    stage 1's scenes did, and in mode cohort the field starts from random weights, too."""
    max_attempts: Positive = 3
    """Actors that may die on a scene alone in its batch (mode cohort: on a cohort) before it is recorded as failed."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Time limit for a batch (mode cohort: for an epoch), counted from when the actor is ready; after it the actor is
    killed."""
    stall_seconds: Annotated[float, Field(gt=0)] = 600.0
    """An actor that makes no step for this long ends itself, because its device hangs."""
