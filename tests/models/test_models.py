"""Planes, sampling, quadrature, autoencoder and shared model, on numbers that a pencil can check."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scaling.cameras import Rays
from scaling.config import Autoencoder as AutoencoderSettings
from scaling.config import SettingsError, make_settings, merge
from scaling.models.autoencoders.kl import KLAutoencoder
from scaling.models.autoencoders.load import build_autoencoder
from scaling.models.autoencoders.normalised import denormalise, normalise
from scaling.models.box import Box
from scaling.models.field import Field
from scaling.models.renderer import Renderer, composite, quadrature
from scaling.models.sampling import stratified_depths
from scaling.models.shared_files import (
    SharedModelError,
    load_shared,
    read_config,
    read_scene_ids,
    save_shared,
    settings_on,
)
from scaling.models.shared_model import SharedModel
from scaling.models.student import Student
from scaling.models.triplanes import fuse_planes, mix_base_planes, sample_planes, total_variation

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = ("xy", "xz", "yz")


def close(ours: Tensor, by_hand) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(by_hand, dtype=ours.dtype), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- planes


def coordinate_planes(num_planes: int, resolution: int) -> Tensor:
    """Planes whose two features are a texel centre's own coordinates along width and height. [1, P, 2, K, K]"""
    centres = ((torch.arange(resolution) + 0.5) / resolution - 0.5) * 2
    along_height, along_width = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([along_width, along_height]).expand(1, num_planes, 2, resolution, resolution)


def test_each_plane_sees_its_own_axes():
    points = torch.tensor([[[0.1, 0.2, -0.3], [-0.35, 0.0, 0.25]]])
    sampled = sample_planes(coordinate_planes(3, 4), points, AXES)
    by_hand = [[[0.1, 0.2], [-0.35, 0.0]], [[0.1, -0.3], [-0.35, 0.25]], [[0.2, -0.3], [0.0, 0.25]]]
    close(sampled[0].transpose(1, 2), by_hand)


def test_a_repeated_plane_reads_the_axes_the_other_way_round():
    sampled = sample_planes(coordinate_planes(2, 4), torch.tensor([[[0.1, 0.2, 0.3]]]), ("xz", "zx"))
    close(sampled[0, :, :, 0], [[0.1, 0.3], [0.3, 0.1]])


def test_planes_are_zero_outside_the_box():
    sampled = sample_planes(torch.ones(1, 3, 1, 4, 4), torch.tensor([[[4.0, 0.0, 0.0]]]), AXES)
    close(sampled[0, :, 0, 0], [0.0, 0.0, 1.0])


def test_planes_without_axes_are_refused():
    with pytest.raises(ValueError, match="2 planes, but axes for 3"):
        sample_planes(torch.ones(1, 2, 1, 4, 4), torch.zeros(1, 1, 3), AXES)


def test_fusion_of_two_base_planes():
    base_planes = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 0.0, -10.0, 0.0]]).view(2, 1, 1, 2, 2)
    coefs = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    macro = mix_base_planes(coefs, base_planes)
    close(macro.flatten(1), [[-8.0, 4.0, 16.0, 8.0], [0.5, 1.0, 1.5, 2.0]])
    micro = torch.full((2, 1, 1, 2, 2), 7.0)
    fused = fuse_planes(micro, coefs, base_planes)
    assert fused.shape == (2, 1, 2, 2, 2)
    close(fused[:, :, 0], micro[:, :, 0])
    close(fused[:, :, 1], macro[:, :, 0])


def test_fusion_leaves_out_what_is_missing():
    base_planes, micro = torch.ones(2, 3, 4, 2, 2), torch.ones(1, 3, 5, 2, 2)
    assert fuse_planes(micro[:, :, :0], torch.ones(1, 2), base_planes).shape == (1, 3, 4, 2, 2), "macro only"
    assert fuse_planes(micro, torch.ones(1, 0), torch.ones(0, 3, 0, 2, 2)) is micro, "micro only"
    with pytest.raises(ValueError, match="3 coefs a scene, but 2 base planes"):
        mix_base_planes(torch.ones(1, 3), base_planes)


def test_total_variation():
    plane = torch.tensor([[0.0, 1.0], [3.0, 1.0]]).view(1, 1, 1, 2, 2)
    close(total_variation(plane), (9 + 0 + 1 + 4) / 4)
    close(total_variation(plane.repeat(5, 1, 1, 1, 1)), 3.5)  # the mean over scenes, not their sum


# ---------------------------------------------------------------------- rays and quadrature


def ray(origin, direction) -> Rays:
    direction = torch.tensor([direction], dtype=torch.float32)
    return Rays(torch.tensor([origin], dtype=torch.float32), direction / direction.norm())


@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ([-2, 0, 0], [1, 0, 0], 1.5, 2.5),
        ([-2, 0.2, -0.4], [1, 0, 0], 1.5, 2.5),
        ([-1, -1, 0], [1, 1, 0], 0.5 * math.sqrt(2), 1.5 * math.sqrt(2)),
        ([0.1, 0, 0], [0, 0, -1], 0.0, 0.5),  # from inside
    ],
)
def test_box_near_and_far(origin, direction, near, far):
    ours = Box(1.0).span(ray(origin, direction))
    close(torch.cat(ours[:2]), [near, far])
    assert ours[2].all()


@pytest.mark.parametrize(
    ("origin", "direction"), [([-2, 1, 0], [1, 0, 0]), ([2, 0, 0], [1, 0, 0]), ([-2, 0, 0], [1, 1, 0])]
)
def test_a_ray_that_misses_the_box_has_no_length(origin, direction):
    near, far, hit = Box(1.0).span(ray(origin, direction))
    assert not hit.any() and near == far


def test_stratified_depths():
    near, far = torch.tensor([1.0]), torch.tensor([3.0])
    close(stratified_depths(near, far, 4), [[1.25, 1.75, 2.25, 2.75]])
    close(stratified_depths(near, far, 4, torch.tensor([[0.0, 0.5, 0.9, 0.2]])), [[1.0, 1.75, 2.45, 2.6]])


def test_quadrature_of_a_constant_density():
    density = 2.0
    raw = torch.full((1, 4), 1 + math.log(math.expm1(density)))  # softplus(raw − 1) = 2
    depths = torch.tensor([[1.0, 1.1, 1.5, 1.6]])
    out, depth, opacity, weights = quadrature(depths, raw, torch.full((1, 4, 2), 0.3))
    through = [math.exp(-density * length) for length in (0.0, 0.1, 0.5, 0.6)]
    by_hand = [through[0] - through[1], through[1] - through[2], through[2] - through[3]]
    close(weights, [by_hand])
    close(opacity, [1 - math.exp(-density * 0.6)])
    close(out, [[0.3 * (1 - through[3])] * 2])
    close(depth, [sum(w * d for w, d in zip(by_hand, (1.05, 1.3, 1.55))) / sum(by_hand)])


def test_quadrature_takes_the_mean_of_an_intervals_ends():
    raw, colours = torch.tensor([[0.0, 4.0]]), torch.tensor([[[0.2], [0.6]]])
    out, depth, opacity, _ = quadrature(torch.tensor([[1.0, 2.0]]), raw, colours)
    alpha = 1 - math.exp(-math.log1p(math.exp(2.0 - 1)))
    close(torch.cat([out[0], depth, opacity]), [0.4 * alpha, 1.5, alpha])


def test_composite_over_the_background():
    close(composite(torch.tensor([[0.1, 0.2]]), torch.tensor([0.25]), torch.tensor([1.0, 0.4])), [[0.7, 0.0]])


@pytest.mark.parametrize("depths", [[1.0, 1.5, 2.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("raw", [-1e4, -120.0])
def test_an_empty_ray_has_finite_depth_and_gradients(depths, raw):
    depths = torch.tensor([depths], requires_grad=True)
    raw = torch.full((1, 3), raw, requires_grad=True)
    colours = torch.full((1, 3, 2), 0.5, requires_grad=True)
    out, depth, opacity, _ = quadrature(depths, raw, colours)
    close(depth.detach(), depths[:, -1].detach())
    close(opacity.detach(), [0.0])
    (out.sum() + depth.sum() + opacity.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (depths, raw, colours))


def test_a_ray_beside_the_box_shows_the_background():
    torch.manual_seed(0)
    planes = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    rays = ray([-2, 1, 0], [1, 0, 0])
    background = torch.tensor([0.1, 0.5, 0.9])
    renderer = Renderer(AXES, Box(1.0), None, None, samples=4, importance_samples=4)
    out = renderer(planes, Field(2, 8, 3), Rays(rays.origins[None], rays.directions[None]), background)
    close(out.colours.detach()[0, 0], 2 * background - 1)
    (out.colours.sum() + out.depth.sum()).backward()
    assert planes.grad.isfinite().all()


def test_the_field_reaches_black_and_white():
    field = Field(2, 8, 3)
    with torch.no_grad():
        field.head.weight.zero_()
        field.head.bias.copy_(torch.tensor([5.0, -50.0, 0.0, 50.0]))
    raw, colours = field(torch.randn(4, 7, 2))
    assert raw.shape == (4, 7) and colours.shape == (4, 7, 3)
    close(raw.detach()[0, 0], 5.0)
    close(colours.detach()[0, 0], [-0.001, 0.5, 1.001])


# ---------------------------------------------------------------------- autoencoder


def test_normalisation_and_back():
    raw_latents = torch.linspace(-40, 40, 17)
    close(normalise(torch.tensor([0.0, 25.0]), 0.02), [0.0, math.tanh(0.5)])
    torch.testing.assert_close(denormalise(normalise(raw_latents, 0.02), 0.02), raw_latents, rtol=1e-4, atol=1e-4)
    assert denormalise(torch.tensor([-1.0, 1.0, 3.0]), 0.02).isfinite().all()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    settings = AutoencoderSettings(kind="kl", block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=2)
    return build_autoencoder(settings, 16).vae.requires_grad_(False)


@pytest.fixture
def offline(monkeypatch):
    """No look-ups on the hub; the variable is read when the library is imported, hence the attribute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_sizes_of_an_autoencoder(vae):
    autoencoder = KLAutoencoder(vae, 0.1)
    assert (autoencoder.latent_channels, autoencoder.shrink) == (2, 4)
    latents = autoencoder.encode(torch.rand(3, 3, 16, 16))
    assert latents.shape == (3, 2, 4, 4) and latents.abs().max() < 1
    images = autoencoder.decode(latents)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    encoder, decoder = autoencoder.halves()
    assert len(encoder) + len(decoder) == len(list(vae.parameters())), "every parameter is in one half"


def test_samples_and_their_divergence(vae):
    autoencoder = KLAutoencoder(vae, 0.1)
    images = torch.rand(2, 3, 16, 16)
    mean, log_variance = autoencoder.encode_raw(images)
    sample, divergence = autoencoder.encode_sample(images, torch.zeros_like(mean))
    close(sample, autoencoder.encode(images))
    normal = torch.distributions.Normal
    by_hand = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    close(divergence, by_hand.mean((1, 2, 3)))
    close(
        autoencoder.encode_sample(images, torch.ones_like(mean))[0], torch.tanh(0.1 * (mean + (log_variance / 2).exp()))
    )


def test_the_background_is_the_latent_of_white(vae):
    scale = 0.3
    white = vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean  # 1 is white in [−1, 1]
    by_hand = (torch.tanh(scale * white) + 1).mean((0, 2, 3)) / 2
    close(KLAutoencoder(vae, scale).background(16, "cpu"), by_hand)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_local_autoencoder_loads(vae, tmp_path, subfolder, offline):
    vae.save_pretrained(tmp_path / subfolder, safe_serialization=True)
    settings = AutoencoderSettings(kind="kl", pretrained=str(tmp_path), subfolder="vae", latent_scale=0.5)
    loaded = build_autoencoder(settings, 16)
    images = torch.rand(1, 3, 16, 16)
    close(loaded.encode(images), KLAutoencoder(vae, 0.5).encode(images))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it on
@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-owner/no-such-autoencoder"])
def test_a_missing_autoencoder_is_named(name, offline):
    with pytest.raises(ValueError) as error:
        build_autoencoder(AutoencoderSettings(kind="kl", pretrained=name), 16)
    assert "autoencoder.pretrained: cannot load" in str(error.value) and name in str(error.value)
    assert "set autoencoder.pretrained to null" in str(error.value)


def test_pickled_weights_are_refused(vae, tmp_path, offline):
    vae.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(ValueError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        build_autoencoder(AutoencoderSettings(kind="kl", pretrained=str(tmp_path)), 16)


def test_an_adapted_decoder_is_a_copy(tiny_settings):
    torch.manual_seed(0)
    shared = SharedModel(tiny_settings).requires_grad_(False)
    latents = torch.rand(1, 4, 8, 8) - 0.5
    before = shared.decode(latents)
    adapted = shared.adapt_decoder()
    assert shared.adapt_decoder() is adapted, "made once"
    close(shared.decode(latents), before)
    next(adapted.decoder.parameters()).add_(0.5)
    assert not torch.equal(shared.decode(latents), before), "renders are decoded with the adapted decoder"
    close(shared.autoencoder.decode(latents), before)


def test_a_student_keeps_the_place_of_every_pixel():
    """Pixels change only around a latent that changes, and come out where the decoder puts them."""
    torch.manual_seed(0)
    student = Student(channels=4, shrink=4, latent_std=0.11, width=8, num_blocks=1, precision="float32").requires_grad_(
        False
    )
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, :, 2, 12] = 1.0
    first, second = student(latents)
    assert first.shape == (3, 64, 64) and first.min() >= 0 and first.max() <= 1
    moved = (first != second).any(0).nonzero()
    low, high = moved.min(0).values.tolist(), moved.max(0).values.tolist()
    # Four convolutions of 3 x 3: four latents to each side of row 2, column 12, as far as the image goes.
    assert low == [0, 32] and high == [27, 63]


# ---------------------------------------------------------------------- shared model


@pytest.fixture
def shared(tiny_settings) -> SharedModel:
    torch.manual_seed(0)
    shared = SharedModel(tiny_settings).requires_grad_(False)
    shared.autoencoder.latent_scale.fill_(0.2)
    shared.background.copy_(shared.autoencoder.background(tiny_settings.data.image_size, "cpu"))
    shared.coefs_mean.copy_(torch.tensor([0.3, -0.2]))
    next(shared.adapt_decoder().parameters()).add_(0.1)
    shared.add_student()
    return shared


def picture(shared: SharedModel) -> Tensor:
    params = shared.random_params([torch.Generator().manual_seed(5)])
    rays = shared.latent_rays(torch.eye(4), torch.eye(3))
    colours = shared.render(params, rays[None]).colours
    return shared.decode(shared.as_latents(colours))


def test_a_shared_model_survives_disk(shared, tmp_path):
    folder = tmp_path / "run" / "shared"
    saved = save_shared(shared, folder, ["car-1", "car-2"])
    loaded, found = load_shared(folder)
    assert saved == found == shared.content_hash() == loaded.content_hash()
    assert read_scene_ids(folder) == ["car-1", "car-2"]
    assert loaded.settings == shared.settings
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(picture(loaded), picture(shared))
    latents = torch.rand(1, 4, 8, 8) - 0.5
    assert torch.equal(loaded.student(latents), shared.student(latents))
    close(loaded.start_params(3).coefs, [[0.3, -0.2]] * 3)
    assert loaded.start_params(3).micro_planes.shape == (3, 3, 2, 4, 4)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".txt"}, "no pickles"


def test_the_hash_follows_every_tensor(shared):
    before = shared.content_hash()
    hashes = {before}
    for tensor in (shared.base_planes, shared.background, next(shared.autoencoder.vae.parameters())):
        tensor.view(-1)[0] += 1e-3
        hashes.add(shared.content_hash())
    assert len(hashes) == 4 and len(before) == 64


def test_a_shared_model_in_rgb_space(tiny_values, tmp_path):
    values = {
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage1": {"joint": {"num_epochs": 0}, "adapt": {"num_epochs": 0}, "distil": {"num_epochs": 0}},
        "stage2": {"rgb": {"num_epochs": 0}},
    }
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False)
    assert shared.latent_size == 16
    assert picture(shared).shape == (1, 3, 16, 16)
    save_shared(shared, tmp_path, [])
    assert torch.equal(picture(load_shared(tmp_path)[0]), picture(shared))
    with pytest.raises(SettingsError, match="no decoder to adapt"):
        shared.adapt_decoder()
    with pytest.raises(SettingsError, match="no decoder to distil"):
        shared.add_student()
    # Format 1 knew of no student: its settings in RGB space must not be read with the default's.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["stage1"]["distil"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 1}))
    assert read_config(tmp_path).stage1.distil.num_epochs == 0


@pytest.mark.parametrize("file", ["planes.safetensors", "decoder/model.safetensors", "student/model.safetensors"])
def test_a_changed_tensor_is_noticed(shared, tmp_path, file):
    from safetensors.torch import load_file, save_file

    save_shared(shared, tmp_path, [])
    tensors = load_file(tmp_path / file)
    name = next(name for name, tensor in tensors.items() if tensor.numel())
    save_file({**tensors, name: tensors[name] + 1e-3}, tmp_path / file)
    with pytest.raises(SharedModelError, match="the files were changed") as error:
        load_shared(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("damage", ["cut short", "missing"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "planes.safetensors", "autoencoder/diffusion_pytorch_model.safetensors", "autoencoder/config.json"],
)
def test_a_damaged_shared_model_is_named(shared, tmp_path, file, damage):
    save_shared(shared, tmp_path, [])
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink() if damage == "missing" else (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SharedModelError) as error:
        load_shared(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("part", ["decoder", "student"])
def test_a_missing_part_is_noticed(shared, tmp_path, part):
    save_shared(shared, tmp_path, [])
    shutil.rmtree(tmp_path / part)
    with pytest.raises(SharedModelError, match="were changed"):
        load_shared(tmp_path)


def test_a_half_written_shared_model_is_none(shared, tmp_path):
    save_shared(shared, tmp_path / "shared", [])
    (tmp_path / "shared" / "hash.txt").unlink()
    with pytest.raises(SharedModelError, match=r"no shared model here .*stage1\.py --run") as error:
        load_shared(tmp_path / "shared")
    assert str(tmp_path / "shared") in str(error.value)


def test_a_newer_format_is_refused(shared, tmp_path):
    save_shared(shared, tmp_path, [])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(SharedModelError, match=r"config\.json: format version 99, this program reads up to 4"):
        load_shared(tmp_path)


def test_a_model_of_format_1_has_one_background(shared, tmp_path):
    values = shared.settings.model_dump()
    del values["rendering"]["background"]
    (tmp_path / "hash.txt").write_text("0\n")
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "settings": values}))
    assert read_config(tmp_path).rendering.background == "white"


def test_stage_2_takes_its_representation_from_the_shared_model(shared, tmp_path):
    save_shared(shared, tmp_path, [])
    asked = make_settings({"seed": 9, "stage2": {"scenes_per_batch": 7}, "representation": {"resolution": 99}})
    settings = settings_on(tmp_path, asked, {"seed": 9, "stage2.scenes_per_batch": 7})
    assert settings.seed == 9 and settings.stage2 == asked.stage2
    assert settings.representation == shared.settings.representation == read_config(tmp_path).representation
    assert settings.data == shared.settings.data
    with pytest.raises(SettingsError, match=r"representation\.resolution = 99 \(shared model: 4\)") as error:
        settings_on(tmp_path, asked, {"representation.resolution": 99})
    assert str(tmp_path) in str(error.value)


def test_images_that_the_autoencoder_cannot_halve_are_refused(vae, tiny_settings):
    settings = tiny_settings.model_copy(update={"data": tiny_settings.data.model_copy(update={"image_size": 18})})
    with pytest.raises(SettingsError, match=r"data\.image_size \(18\) must be a multiple of 4"):
        SharedModel(settings, KLAutoencoder(vae, 0.1))


def test_micro_only_has_nothing_to_train_in_the_base_planes(tiny_values):
    values = merge(tiny_values, {"representation": {"macro_features": 0, "num_base_planes": 0}})
    shared = SharedModel(make_settings(values))
    assert shared.base_planes.numel() == 0 and not shared.base_planes.requires_grad
    assert len(shared.content_hash()) == 64
