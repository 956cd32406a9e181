"""The shared model: stage 1 trains it once, and every scene of stage 2 uses it.

It holds the autoencoder, the field, the base planes, the box, the background and the statistics of stage 1's scenes;
where there are any, the adapted decoder and the student, too. It is saved as safetensors and JSON, and named by the
SHA-256 of its tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scaling.cameras import Rays, pixel_rays
from scaling.config import Settings, SettingsError
from scaling.models import cpu_render
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.autoencoders.load import build_autoencoder
from scaling.models.box import Box
from scaling.models.cells import CELLS
from scaling.models.field import Field
from scaling.models.precision import set_precision
from scaling.models.renderer import Renderer, RenderOutput
from scaling.models.sampling import samples_in
from scaling.models.student import Student
from scaling.models.triplanes import SceneParams, fuse_planes
from scaling.storage.tensors import tensors_hash


class SharedModel(nn.Module):
    """Autoencoder, field, base planes, background and statistics, as one module.

    settings: those of stage 1; of them the model reads representation, rendering, autoencoder, image size, precision,
    and the student's sizes. autoencoder: one that was built for these settings; None: build it.
    """

    background: Tensor
    coefs_mean: Tensor
    coefs_std: Tensor
    micro_mean: Tensor
    micro_std: Tensor

    def __init__(self, settings: Settings, autoencoder: ImageAutoencoder | None = None) -> None:
        super().__init__()
        set_precision(settings.precision)
        self.settings = settings
        shape = settings.representation
        if autoencoder is None:
            autoencoder = build_autoencoder(settings.autoencoder, settings.data.image_size, settings.precision)
        self.autoencoder = autoencoder
        if settings.data.image_size % autoencoder.shrink:
            raise SettingsError(
                f"data.image_size ({settings.data.image_size}) must be a multiple of {autoencoder.shrink}, "
                "by which the autoencoder shrinks an image's side"
            )
        self.decoder: nn.Module | None = (
            None  # of rendered latents; `adapt_decoder` copies one, phase `adapt` trains it
        )
        self.student: Student | None = None  # added by `add_student`, distilled from the decoder that `decode` uses
        num_planes = len(shape.plane_axes)
        self.micro_shape = (num_planes, shape.micro_features, shape.resolution, shape.resolution)
        base = torch.randn(shape.num_base_planes, num_planes, shape.macro_features, *self.micro_shape[2:])
        # Without base planes there is nothing to train: an empty tensor must not count as trainable.
        self.base_planes = nn.Parameter(base * shape.base_std, requires_grad=base.numel() > 0)
        self.field = self.new_field()
        self.renderer = Renderer(
            tuple(shape.plane_axes), Box(shape.box_side, shape.length_unit), settings.rendering.near,
            settings.rendering.far, settings.rendering.samples, settings.rendering.importance_samples, shape.combine,
        )  # fmt: skip
        # A network encodes the same white differently at different pixels, so then each pixel has its own background.
        each_pixel = settings.rendering.background == "views" and autoencoder.has_encoder
        pixels = (self.latent_size**2,) if each_pixel else ()
        self.register_buffer("background", torch.ones(*pixels, autoencoder.latent_channels))
        # Statistics of stage 1's scenes, filled at its end. Scenes of stage 2 start at coefs_mean; the report shows
        # coefs_std.
        for name, size in (("coefs_mean", shape.num_base_planes), ("coefs_std", shape.num_base_planes)):
            self.register_buffer(name, torch.zeros(size))
        for name in ("micro_mean", "micro_std"):
            self.register_buffer(name, torch.zeros(()))

    def new_field(self) -> Field:
        """A field of this model's sizes, with random weights."""
        shape = self.settings.representation
        features, colours = shape.micro_features + shape.macro_features, self.autoencoder.latent_channels
        sizes = features, shape.field_width, colours, shape.field_layers
        return Field(*sizes, shape.field_activation, self.settings.precision)

    @property
    def latent_size(self) -> int:
        """Side of a latent image, in latent pixels."""
        return self.settings.data.image_size // self.autoencoder.shrink

    @property
    def device(self) -> torch.device:
        return self.background.device

    def adapt_decoder(self) -> nn.Module:
        """Give the model its own decoder for rendered latents, at first a copy of the autoencoder's. → that decoder.

        A decoder that is there already is kept. Raises SettingsError where the autoencoder has no decoder.
        """
        if not self.autoencoder.has_decoder:
            raise SettingsError("stage1.adapt: there is no decoder to adapt; set stage1.adapt.num_epochs to 0")
        if self.decoder is None:
            self.decoder = self.autoencoder.copy_decoder().to(self.device)
        return self.decoder

    def add_student(self) -> Student:
        """Give the model a small decoder for fits in stage 2 (see student.py), at first with random weights. → it.

        A student that is there already is kept. Raises SettingsError where the autoencoder has no decoder to distil.
        """
        if not self.autoencoder.has_decoder:
            raise SettingsError("stage1.distil: there is no decoder to distil; set stage1.distil.num_epochs to 0")
        if self.student is None:
            sizes = self.settings.stage1
            self.student = Student(
                self.autoencoder.latent_channels, self.autoencoder.shrink, self.autoencoder.latent_std,
                sizes.student_width, sizes.student_blocks, self.settings.precision,
            ).to(self.device)  # fmt: skip
        return self.student

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load a whole state, by name as `state_dict` returns it; adds the adapted decoder and the student first where
        the state holds them.

        Raises RuntimeError where names or shapes differ.
        """
        if any(name.startswith("decoder.") for name in tensors):
            self.adapt_decoder()
        if any(name.startswith("student.") for name in tensors):
            self.add_student()
        self.load_state_dict(tensors)

    def background_of(self, num_rays: int, pixels: Tensor | None) -> Tensor:
        """Background colours in [0, 1] of rays through `pixels` [S, R] of a latent image.

        pixels None: the num_rays = R rays are those of whole views, in order. → [C] where one background serves all
        pixels; else [S, R, C] for `pixels`, [R, C] for whole views.
        """
        if self.background.dim() == 1:
            return self.background
        if pixels is not None:
            return self.background[pixels]
        return self.background.repeat(num_rays // len(self.background), 1)

    def latent_rays(self, cam2world: Tensor, intrinsics: Tensor) -> Rays:
        """Rays through all pixels of latent images: cam2world [..., 4, 4], intrinsics [..., 3, 3] → [..., h · w]."""
        return pixel_rays(cam2world, intrinsics, self.latent_size, self.latent_size)

    @torch.no_grad()
    def cells(self, planes: Tensor, hull: Tensor | None) -> Tensor | None:
        """Values of the box's cells (see models/box.py), [S, CELLS³] uint8: 0 outside the hull, else 1 + the density at
        the cell's centre, at most 255. None with rendering.sampled: cuboid.

        planes: fused tri-planes [S, P, F_mic + F_mac, K, K]; hull: of each scene, [S, CELLS³]; None: the whole box.
        Raises ValueError where the hulls have another shape.
        """
        if self.settings.rendering.sampled != "hull":
            return None
        if hull is not None and hull.shape != (len(planes), CELLS**3):
            raise ValueError(
                f"hulls of shape {list(hull.shape)}, {len(planes)} scenes need [{len(planes)}, {CELLS**3}]"
            )
        if hull is None:
            hull = torch.ones(len(planes), CELLS**3, dtype=torch.bool, device=planes.device)
        if cpu_render.serves(self, planes):
            return cpu_render.filled_cells(self, planes, hull)
        cells = hull.to(torch.uint8)
        centres = self.renderer.box.centres().to(planes.device)
        for row in range(len(planes)):  # one by one: hulls differ in size
            inside = hull[row].nonzero()[:, 0]
            if len(inside):
                density = self.renderer.densities(planes[row : row + 1], self.field, centres[inside])
                cells[row, inside] = (1 + density).clamp(max=255).to(torch.uint8)
        return cells

    def cells_of(self, params: SceneParams) -> Tensor | None:
        """The `cells` of S scenes, of their present planes and in their own hulls."""
        return self.cells(fuse_planes(params.micro_planes, params.coefs, self.base_planes), params.hull)

    def render(
        self,
        params: SceneParams,
        rays: Rays,
        uniforms: Tensor | None = None,
        pixels: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> RenderOutput:
        """Render rays [S, R] of S scenes → colours [S, R, C] in [−1, 1] (normalised latents), depth, opacity.

        uniforms: see `Renderer.forward`. pixels [S, R]: which of a latent image's h · w pixels the rays go through;
        None: R rays of whole views, in order. cells: from an earlier call of `cells`; None: computed from the params.
        """
        planes = fuse_planes(params.micro_planes, params.coefs, self.base_planes)
        if cells is None:
            cells = self.cells(planes, params.hull)
        return self.render_planes(planes, rays, uniforms, pixels, cells)

    def render_planes(
        self,
        planes: Tensor,
        rays: Rays,
        uniforms: Tensor | None = None,
        pixels: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> RenderOutput:
        """As `render`, from tri-planes [S, P, F_mic + F_mac, K, K] that are fused already or come from a generative
        model. cells: those of the tri-planes (see `cells`); None (unlike in `render`): rays are sampled evenly."""
        if cells is not None and pixels is None and uniforms is None and cpu_render.serves(self, planes, rays.origins):
            return cpu_render.render_whole_views(self, planes, rays, cells)
        background = self.background_of(rays.origins.shape[1], pixels)
        if cells is not None:
            chosen = samples_in(self.renderer.box, rays, cells, self.renderer.samples, uniforms)
            hit, far = chosen.hit, chosen.far
        elif self.renderer.near is None and pixels is None:
            chosen = None
            _, far, hit = self.renderer.span(rays)
        else:  # between a fixed near and far every ray has a part to sample; random rays were drawn to meet something
            return self.renderer(planes, self.field, rays, background, uniforms)
        if pixels is not None:  # a training step's rays: chosen where the scene is, so few of them meet nothing
            return self.renderer(planes, self.field, rays, background, uniforms, chosen)
        # In whole views many rays meet nothing, and are not sampled: each scene's hits are sorted to the front. Scenes
        # with fewer hits than the largest number are padded with rays that miss.
        most = int(hit.sum(1).max())
        order = hit.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        scene = torch.arange(len(order), device=order.device)[:, None]
        background = background.expand(*hit.shape, -1)
        place = (scene, order)
        found = self.renderer(
            planes, self.field, rays[place], background[place], None if uniforms is None else uniforms[place],
            None if chosen is None else chosen[place],
        )  # fmt: skip
        return RenderOutput(
            (2 * background - 1).index_put(place, found.colours),
            (far * self.renderer.box.unit).index_put(place, found.depth),
            torch.zeros_like(far).index_put(place, found.opacity),
        )

    def as_latents(self, colours: Tensor) -> Tensor:
        """Colours [B, h · w, C] of whole views, or of square crops → latents [B, C, h, w], with h = w."""
        side = math.isqrt(colours.shape[1])
        return colours.transpose(1, 2).unflatten(2, (side, side))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode rendered latents [B, C, h, w] → images [B, 3, H, W] in [0, 1], with the adapted decoder if present."""
        return self.autoencoder.decode(latents, self.decoder)

    def start_params(self, num_scenes: int) -> SceneParams:
        """Initial params of stage 2: zero micro planes [S, P, F_mic, K, K] and stage 1's mean coefs [S, M]."""
        micro = torch.zeros(num_scenes, *self.micro_shape, device=self.device)
        return SceneParams(micro, self.coefs_mean.expand(num_scenes, -1).clone())

    def random_params(self, generators: list[torch.Generator]) -> SceneParams:
        """Random initial params, for stage 1, and for stage 2 where stage2.start is random. generators: one a scene.

        → micro planes [S, P, F_mic, K, K] and coefs [S, M], both normal with mean 0 and the settings' standard
        deviations, micro_std and coefs_std.
        """
        shape = self.settings.representation
        micro = [torch.randn(self.micro_shape, generator=g) * shape.micro_std for g in generators]
        coefs = [torch.randn(shape.num_base_planes, generator=g) * shape.coefs_std for g in generators]
        return SceneParams(torch.stack(micro).to(self.device), torch.stack(coefs).to(self.device))

    def content_hash(self) -> str:
        """SHA-256 over the sorted (name, dtype, shape, bytes) of every tensor."""
        return tensors_hash(self.state_dict())
