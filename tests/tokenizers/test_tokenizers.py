"""Tokenizers: exact round trips, whitening, storage that notices tampering, and diffusers autoencoders."""

from dataclasses import replace

import diffusers
import pytest
import torch

from worldline import checkpoint
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers import (
    AutoencoderConfig,
    AutoencoderTokenizer,
    PixelPatches,
    Tokenizer,
    build_autoencoder,
    load_tokenizer,
    to_images,
    to_uint8,
    unwhiten,
    whiten,
)
from worldline.types import CameraSpec

ODD = CameraSpec(name="side", height=18, width=30)
EVEN = CameraSpec(name="top.left", height=32, width=16)


def frames(cameras: tuple[CameraSpec, ...] = (ODD, EVEN), b: int = 2, t: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        c.name: torch.randint(0, 256, (b, t, 3, c.height, c.width), generator=generator, dtype=torch.uint8)
        for c in cameras
    }


def autoencoder(cameras: tuple[CameraSpec, ...] = (ODD, EVEN), **options) -> AutoencoderTokenizer:
    torch.manual_seed(0)
    config = AutoencoderConfig(**({"blocks": (8, 8), "latent_channels": 4} | options))
    return AutoencoderTokenizer(cameras, build_autoencoder(config), kl_weight=config.kl_weight).eval()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_patches_give_every_pixel_back_whatever_the_frame_size(size):
    tokenizer, video = PixelPatches((ODD, EVEN), size=size), frames()
    latents = tokenizer.encode(video)
    assert {c: tuple(z.shape[2:]) for c, z in latents.items()} == tokenizer.latent_spec.shapes
    decoded = tokenizer.decode(latents)
    assert all(torch.equal(decoded[c], video[c]) for c in video)


def test_a_frame_is_padded_by_its_edge_to_an_even_number_of_latents():
    tokenizer, video = PixelPatches((ODD,), size=4), frames((ODD,))
    z = tokenizer.encode(video)["side"]
    assert tuple(z.shape) == (2, 3, 48, 6, 8)  # 24 x 32 pixels
    padded = torch.nn.functional.pixel_shuffle(z.flatten(0, 1), 4)
    below = to_images(video["side"].flatten(0, 1))[:, :, -1:].expand(-1, -1, 6, -1)
    assert torch.equal(padded[:, :, 18:, :30], below)


def test_every_grey_level_survives_the_float_images():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_images(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_frames_do_not_depend_on_how_many_are_encoded_at_once(monkeypatch):
    tokenizer, video = autoencoder(), frames()
    whole = tokenizer.encode(video)
    monkeypatch.setattr("worldline.tokenizers.base._CHUNK_PIXELS_CPU", 18 * 30)
    pieces = tokenizer.encode(video)
    assert all(torch.allclose(whole[c], pieces[c], atol=1e-5) for c in video)
    assert torch.equal(tokenizer.decode(whole)["side"].float(), tokenizer.decode(pieces)["side"].float())


def test_fitted_statistics_whiten_and_unwhiten_gives_back():
    tokenizer, video = PixelPatches((ODD, EVEN), size=2), frames(b=4, t=8)
    unfitted = tokenizer.latent_spec
    tokenizer.fit_statistics(video)
    spec, raw = tokenizer.latent_spec, tokenizer.encode(video)
    assert spec.fingerprint == unfitted.fingerprint  # statistics are not part of what was encoded
    white = whiten(raw, spec)
    for camera, z in white.items():
        std, mean = torch.std_mean(z, dim=(0, 1, 3, 4))
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-4)
        assert torch.allclose(std, torch.ones_like(std), atol=1e-4)
        assert torch.allclose(unwhiten(white, spec)[camera], raw[camera], atol=1e-5)


def test_channels_that_never_change_are_not_blown_up():
    tokenizer = PixelPatches((EVEN,), size=2)
    video = {"top.left": torch.full((2, 3, 3, 32, 16), 7, dtype=torch.uint8)}
    tokenizer.fit_statistics(video)
    white = whiten(tokenizer.encode(video), tokenizer.latent_spec)["top.left"]
    assert float(white.abs().max()) < 0.01


@pytest.mark.parametrize("fold", [1, 2, 4])
@pytest.mark.parametrize("family", ["tiny", "kl"])
def test_autoencoder_shapes(family, fold):
    tokenizer, video = autoencoder(family=family, fold=fold), frames(b=1, t=2)
    assert tokenizer.downsample == 2 * fold
    latents = tokenizer.encode(video)
    spec = tokenizer.latent_spec
    for c in (ODD, EVEN):
        channels, height, width = spec.shapes[c.name]
        assert tuple(latents[c.name].shape) == (1, 2, channels, height, width)
        assert channels == 4
        assert (height * 2 * fold, width * 2 * fold) >= (c.height, c.width)
        assert height % 2 == width % 2 == 0
    decoded = tokenizer.decode(latents)
    assert {c: z.shape for c, z in decoded.items()} == {c: z.shape for c, z in video.items()}
    images = to_images(torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8))
    loss, metrics = tokenizer.loss(images, torch.ones(2, 1, 32, 16), torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in tokenizer.parameters())
    assert not metrics["psnr"].requires_grad


def test_the_loss_counts_pixels_by_their_weight():
    tokenizer = autoencoder((EVEN,), kl_weight=0.0)
    images = to_images(frames((EVEN,))["top.left"].flatten(0, 1))
    weight = torch.zeros(len(images), 1, 32, 16)
    weight[:, :, :8] = 4.0

    def loss(weight: torch.Tensor) -> float:
        return float(tokenizer.loss(images, weight, torch.Generator().manual_seed(0))[0].detach())

    quarter, rest, whole = loss(weight), loss(4.0 - weight), loss(torch.full_like(weight, 4.0))
    assert quarter > 0
    assert quarter + rest == pytest.approx(whole, rel=1e-5)
    assert loss(torch.zeros_like(weight)) == 0


def test_impossible_autoencoders_are_refused():
    with pytest.raises(ValueError, match="at least two widths"):
        AutoencoderConfig(blocks=(8,))
    with pytest.raises(ValueError, match="AutoencoderTiny needs equal widths"):
        AutoencoderConfig(family="tiny", blocks=(8, 16))
    with pytest.raises(CheckpointError, match="AutoencoderTiny or AutoencoderKL required, got Linear"):
        AutoencoderTokenizer((EVEN,), torch.nn.Linear(1, 1))


@pytest.mark.parametrize("make", [lambda: PixelPatches((ODD, EVEN), size=4), autoencoder])
def test_saved_and_loaded_is_the_same_tokenizer(make, tmp_path):
    tokenizer: Tokenizer = make()
    tokenizer.fit_statistics(frames())
    tokenizer.save_pretrained(tmp_path / "tok", provenance={"data": "dots"})
    loaded = load_tokenizer(tmp_path / "tok")
    assert loaded.latent_spec == tokenizer.latent_spec
    assert not any(p.requires_grad for p in loaded.parameters())
    before, after = tokenizer.encode(frames()), loaded.encode(frames())
    assert all(torch.equal(before[c], after[c]) for c in before)
    assert checkpoint.load_config(tmp_path / "tok", part="tokenizer")["provenance"]["data"] == "dots"


def test_the_fingerprint_names_weights_kind_and_cameras():
    tokenizer = autoencoder()
    same, first = autoencoder().fingerprint, tokenizer.fingerprint
    assert same == first
    with torch.no_grad():
        next(iter(tokenizer.parameters()))[0] += 1e-3
    others = [
        tokenizer.fingerprint,
        autoencoder((ODD,)).fingerprint,
        autoencoder((ODD, replace(EVEN, width=32))).fingerprint,
        PixelPatches((ODD, EVEN), size=2).fingerprint,
        PixelPatches((ODD, EVEN), size=4).fingerprint,
    ]
    assert len({first, *others}) == 6


def test_tampering_is_noticed(tmp_path):
    autoencoder().save_pretrained(tmp_path / "tok")
    spec = checkpoint.read_json(tmp_path / "tok/spec.json")
    checkpoint.write_json(tmp_path / "tok/spec.json", spec | {"fingerprint": "0123456789abcdef"})
    with pytest.raises(CheckpointError, match="fingerprint 0123456789abcdef required, the weights give"):
        load_tokenizer(tmp_path / "tok")
    checkpoint.write_json(tmp_path / "tok/spec.json", spec)
    weights = checkpoint.read_tensors(tmp_path / "tok/model.safetensors")
    name = next(iter(weights))
    checkpoint.write_tensors(tmp_path / "tok/model.safetensors", weights | {name: weights[name] + 1})
    with pytest.raises(CheckpointError, match="the weights give"):
        load_tokenizer(tmp_path / "tok")


def test_wrong_frames_and_cameras_are_named():
    tokenizer = PixelPatches((ODD,), size=4)
    with pytest.raises(SpecMismatch, match=r"camera side: frames of 18x30 required, got \(30, 18\)"):
        tokenizer.encode({"side": torch.zeros(1, 1, 3, 30, 18, dtype=torch.uint8)})
    with pytest.raises(SpecMismatch, match=r"camera 'wrist' is not one this tokenizer was made for: \['side'\]"):
        tokenizer.encode({"wrist": torch.zeros(1, 1, 3, 18, 30, dtype=torch.uint8)})


@pytest.mark.parametrize("family", ["tiny", "kl"])
def test_an_autoencoder_saved_by_diffusers(tmp_path, family):
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(family=family, blocks=(8, 8), fold=1, latent_channels=4))
    model.save_pretrained(tmp_path / "vae")
    tokenizer = AutoencoderTokenizer.from_diffusers((ODD, EVEN), str(tmp_path / "vae"))
    assert type(tokenizer.model) is getattr(diffusers, {"tiny": "AutoencoderTiny", "kl": "AutoencoderKL"}[family])
    assert tokenizer.downsample == 2
    expected = AutoencoderTokenizer((ODD, EVEN), model.eval()).encode(frames())
    assert all(torch.equal(z, expected[c]) for c, z in tokenizer.eval().encode(frames()).items())


def test_a_missing_autoencoder_is_a_checkpoint_error(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    for name in ("nobody/no-such-autoencoder", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match="no diffusers autoencoder could be loaded from there"):
            AutoencoderTokenizer.from_diffusers((EVEN,), name)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError):
        AutoencoderTokenizer.from_diffusers((EVEN,), str(tmp_path / "unet"))
