"""The EDM U-Net behind the world model's contract: rows are independent, starts are as trained, and a small one learns the dot world."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer, encoded, fit, locate
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LogNormalSigmas, row_noise
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers import PixelPatches
from worldline.types import CameraSpec, Clip, LatentSpec, WorldModel
from worldline.worldmodels import AutoregressiveWorldModel, EDMConfig, EDMWorldModel
from worldline.worldmodels.edm_unet import _before_each

SMALL = {"block_out_channels": (32, 32), "pose_width": 64}


def small_model(seed: int = 0, latent: LatentSpec | None = None, **options) -> EDMWorldModel:
    torch.manual_seed(seed)
    clip = dot_clip(64, 4, 5)
    return EDMWorldModel(
        EDMConfig(**SMALL | options),
        replace(SPEC, latent=latent or dot_tokenizer().latent_spec),
        action_normalizer=RobustNormalizer.fit(clip.actions),
        pose_normalizer=RobustNormalizer.fit(clip.poses),
    )


def scrambled(model: EDMWorldModel) -> EDMWorldModel:
    """Random weights everywhere, small enough that dreams do not explode: zero outputs would hide any mistake behind them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.02 if "foretell" in name else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=generator) + float("norm" in name and "weight" in name))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> EDMWorldModel:
    return scrambled(small_model(churn=1.0))  # noise at every step


def part(clip: Clip, frames: int) -> Clip:
    """The first frames of a clip."""
    latents = {c: z[:, :frames] for c, z in clip.frames.items()}
    return replace(clip, frames=latents, poses=clip.poses[:, :frames], actions=clip.actions[:, : frames - 1])


def test_it_keeps_the_contract(model):
    assert isinstance(model, WorldModel)
    clip = encoded(dot_clip(2, 3, 3), dot_tokenizer())
    state, dream = model.imagine(model.observe(clip), torch.rand(2, 5, 2, 2), seeds=torch.arange(2))
    assert len(state) == 2 and dream.latents["top"].shape == (2, 5, *clip.frames["top"].shape[2:])
    assert dream.poses.shape == (2, 5, 2) and dream.latents["top"].isfinite().all()
    assert not torch.allclose(dream.latents["top"][:, 0], dream.latents["top"][:, 1], atol=1e-3)


def test_a_row_does_not_depend_on_its_neighbours(model):
    clip = encoded(dot_clip(3, 2, 3), dot_tokenizer())
    actions, seeds = torch.rand(3, 6, 2, 2) * 2 - 1, torch.tensor([4, 9, 4])
    state = model.observe(clip)
    _, together = model.imagine(state, actions, seeds=seeds)
    order = torch.tensor([2, 0, 1, 1])
    _, forked = model.imagine(state.index(order), actions[order], seeds=seeds[order])
    assert torch.allclose(together.latents["top"][order], forked.latents["top"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(together.poses[order], forked.poses, atol=1e-4)
    _, other = model.imagine(state, actions, seeds=seeds + 1)
    assert not torch.allclose(together.latents["top"], other.latents["top"], atol=1e-2)


def test_imagining_in_pieces_or_at_once_is_the_same_and_leaves_the_state_alone(model):
    state = model.observe(encoded(dot_clip(2, 2, 3), dot_tokenizer()))
    kept = {name: x.clone() for name, x in state.tensors.items()}
    actions, seeds = torch.rand(2, 7, 2, 2), torch.arange(2)
    final, once = model.imagine(state, actions, seeds=seeds)
    assert all(torch.equal(state.tensors[name], x) for name, x in kept.items())
    middle, first = model.imagine(state, actions[:, :2], seeds=seeds)
    again, rest = model.imagine(middle, actions[:, 2:], seeds=seeds)
    assert torch.equal(torch.cat([first.latents["top"], rest.latents["top"]], 1), once.latents["top"])
    assert all(torch.equal(again.tensors[name], x) for name, x in final.tensors.items())


def test_rows_reset_on_their_own(model):
    fresh = model.observe(encoded(dot_clip(2, 1, 8), dot_tokenizer()))
    actions, seeds = torch.rand(2, 3, 2, 2), torch.arange(2)
    used, _ = model.imagine(model.observe(encoded(dot_clip(2, 3, 3), dot_tokenizer())), actions, seeds=seeds)
    _, from_mixed = model.imagine(used.where(torch.tensor([False, True]), fresh), actions, seeds=seeds)
    _, from_used = model.imagine(used, actions, seeds=seeds)
    _, from_fresh = model.imagine(fresh, actions, seeds=seeds)
    assert torch.allclose(from_mixed.latents["top"][0], from_used.latents["top"][0], atol=1e-4)
    assert torch.allclose(from_mixed.latents["top"][1], from_fresh.latents["top"][1], atol=1e-4)


@pytest.mark.parametrize("encoding", ["plain", "two-hot"])
def test_training_shows_what_a_dream_asks_for_from_one_frame_on(encoding):
    """The history of target i in training is the state after i real frames, for starts and full histories alike."""
    model = scrambled(small_model(action_encoding=encoding))
    clip = encoded(dot_clip(2, 7, 3), dot_tokenizer())
    trained = _before_each(*model._units(clip), model.config.history)
    x, level = torch.randn(2, *trained.frames.shape[2:]), torch.full((2,), 0.6)
    with torch.no_grad():
        foretold = model._foretold(trained)
        for i in range(1, 7):
            rows = torch.arange(2) * 6 + i - 1
            asked = model._known(model.observe(part(clip, i)), model._blocks(clip.actions[:, i - 1 : i])[:, 0])
            shown = replace(trained, **{f: getattr(trained, f)[rows] for f in ("frames", "poses", "blocks", "count")})
            assert torch.equal(asked.frames, shown.frames) and torch.equal(asked.poses, shown.poses)
            assert torch.equal(model._told(asked), model._told(shown))
            pose = model._foretold(asked)
            assert torch.allclose(pose, foretold[rows], atol=1e-5)
            there = model._denoise(x, level, asked, pose), model._denoise(x, level, shown, foretold[rows])
            assert torch.allclose(*there, atol=1e-5)
    assert torch.equal(asked.count, torch.full((2,), 6))


def test_an_untrained_model_of_changes_repeats_the_last_frame():
    model, clip = small_model(target="change", solver_steps=1), encoded(dot_clip(2, 3, 3), dot_tokenizer())
    model.fit_change(clip)
    assert not torch.equal(model.change_scale, torch.ones_like(model.change_scale))
    _, dream = model.imagine(model.observe(clip), torch.rand(2, 2, 2, 2), seeds=torch.arange(2))
    # one step from sigma 10 leaves skip * x = 10 / 101 of unit noise, in units of the change
    noise = row_noise(torch.arange(2), 3, 0, tuple(clip.frames["top"].shape[2:]))
    std = torch.tensor(model.latent_spec.std["top"])[:, None, None] * model.change_scale[:, None, None]
    expected = clip.frames["top"][:, -1] + std * noise * 10 / 101
    assert torch.allclose(dream.latents["top"][:, 0], expected, atol=1e-4)
    assert torch.allclose(dream.poses[:, 1], clip.poses[:, -1], atol=1e-5)


def test_the_loss_of_an_untrained_model_is_one():
    """Whitened frames have unit variance, and so has what EDM's network should answer, at every sigma."""
    model, clip = small_model(target="frame"), encoded(dot_clip(64, 6, 99), dot_tokenizer())
    for sigma in (0.01, 1.0, 10.0):
        at = replace(model.config.sigmas, log_std=0.0, log_mean=float(torch.tensor(sigma).log()))
        model.config = replace(model.config, sigmas=at)
        _, metrics = model.loss(clip, torch.Generator().manual_seed(0))
        assert float(metrics["weighted_error"]) == pytest.approx(1, abs=0.12)


def test_noise_asked_for_in_sampling_is_noise_shown_in_training(model):
    for steps in (1, 2, 3, 10):
        config = EDMConfig(solver_steps=steps)
        assert all(config.sigmas.contains(s) for s in config.path(config.levels).sigma[:-1].tolist())
    with pytest.raises(ValueError, match=r"asks for sigma 40, which training never shows"):
        EDMConfig(sigma_max=40.0)
    with pytest.raises(ValueError, match=r"asks for sigma 0\.001, which"):
        EDMConfig(sigma_min=0.001)
    EDMConfig(sigma_min=0.001, solver_steps=1)  # one step asks for the largest alone
    only_pure = LogNormalSigmas(pure=1.0)
    with pytest.raises(ValueError, match="never shows"):
        EDMConfig(sigmas=only_pure)
    assert model.with_sampling(solver_steps=1, churn=0.0).config.solver_steps == 1
    assert model.config.solver_steps == 3
    with pytest.raises(ValueError, match="never shows"):
        model.with_sampling(sigma_max=11.0)
    with pytest.raises(ValueError, match=r"got \['guidance', 'history_level'\]"):
        model.with_sampling(history_level=0.1, guidance=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "at least 1 frame"),
        ({"block_out_channels": (20, 32)}, "norm_groups=8 divides"),
        ({"attended": 3}, "attended must be from 0"),
        ({"solver_steps": 0}, "solver_steps must be at least 1"),
        ({"churn": -1.0}, "churn >= 0"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min <= sigma_max"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EDMConfig(**options)


def _train(model: EDMWorldModel, steps: int) -> EDMWorldModel:
    tokenizer = dot_tokenizer()
    model.fit_change(encoded(dot_clip(64, 6, 77), tokenizer))
    return fit(model, lambda step: encoded(dot_clip(32, 6, 1000 + step), tokenizer), steps=steps, lr=3e-3)


@pytest.mark.parametrize(("encoding", "target"), [("two-hot", "frame"), ("plain", "change")])
def test_a_small_model_learns_the_dot_world_and_follows_its_actions(encoding, target):
    clip, tokenizer = dot_clip(64, 6, 7), dot_tokenizer()
    options = {"action_encoding": encoding, "target": target, "sigmas": LogNormalSigmas(pure=0.3)}
    model = _train(small_model(**options), 110)
    start = model.observe(part(encoded(clip, tokenizer), 1))
    copy_last = float((clip.poses[:, 0] - clip.poses[:, -1]).norm(dim=-1).mean())

    def position_error(actions, **sampling) -> float:
        _, dream = model.with_sampling(**sampling).imagine(start, actions, seeds=torch.arange(64))
        seen = locate(tokenizer.decode(dream.latents)["top"])
        return float((seen - clip.poses[:, 1:]).norm(dim=-1)[:, -1].mean())

    one = position_error(clip.actions, solver_steps=1)
    assert one < 0.3 * copy_last
    assert one < 0.3 * position_error(clip.actions.roll(1, 0), solver_steps=1)
    assert position_error(clip.actions) < 0.6 * copy_last  # three steps ask more of so short a training
    _, dream = model.imagine(start, clip.actions, seeds=torch.arange(64))
    assert (dream.poses - clip.poses[:, 1:]).abs().mean() < 0.08


def two_cameras(side: int) -> tuple[PixelPatches, Clip]:
    cameras = (*SPEC.cameras, CameraSpec(name="side", height=16, width=side))
    clip = dot_clip(3, 6, 4)
    tokenizer = PixelPatches(cameras, size=4)
    views = {"top": clip.frames["top"], "side": clip.frames["top"].flip(-1)[..., :side]}
    return tokenizer, replace(clip, frames=tokenizer.encode(views))


def test_cameras_are_stacked_if_their_latents_can_be():
    tokenizer, clip = two_cameras(side=16)
    model = scrambled(small_model(latent=tokenizer.latent_spec))
    _, dream = model.imagine(model.observe(clip), torch.rand(3, 2, 2, 2), seeds=torch.arange(3))
    assert {c: z.shape for c, z in dream.latents.items()} == {c: z[:, :2].shape for c, z in clip.frames.items()}
    assert model.loss(clip)[0].isfinite()
    with pytest.raises(SpecMismatch, match=r"got top 4x4, side 4x2\. Record cameras of one size"):
        small_model(latent=two_cameras(side=8)[0].latent_spec)
    lacking = replace(clip, present={"side": torch.tensor([True, False, True])})
    with pytest.raises(SpecMismatch, match=r"cameras \['side'\] are missing"):
        model.observe(lacking)


def test_latents_that_do_not_halve_evenly_are_padded():
    cameras = (CameraSpec(name="top", height=24, width=16),)
    tokenizer = PixelPatches(cameras, size=4)  # 6x4, which halves to an odd 3x2
    model = scrambled(small_model(latent=tokenizer.latent_spec, block_out_channels=(16, 16, 16)))
    clip = replace(dot_clip(2, 5, 4), frames={"top": torch.randn(2, 5, *tokenizer.latent_spec.shapes["top"])})
    _, dream = model.imagine(model.observe(clip), torch.rand(2, 1, 2, 2), seeds=torch.arange(2))
    assert dream.latents["top"].shape[-2:] == (6, 4) and model.loss(clip)[0].isfinite()


def test_without_actions_it_says_so(model):
    state = model.observe(encoded(dot_clip(2, 1, 3), dot_tokenizer()))
    with pytest.raises(SpecMismatch, match="requires actions: it never learned what follows when none is known"):
        model.imagine(state, None, seeds=torch.arange(2))


def test_noise_on_history_is_trained_on_but_not_dreamt(model):
    clip, draw = encoded(dot_clip(4, 6, 3), dot_tokenizer()), lambda: torch.Generator().manual_seed(3)
    plain, noisy = scrambled(small_model()), scrambled(small_model(history_noise=0.3))
    with torch.no_grad():
        losses = [float(m.loss(clip, draw())[0]) for m in (plain, noisy, noisy)]
    assert losses[0] != losses[1] == losses[2]
    seeds, actions = torch.arange(4), torch.rand(4, 2, 2, 2)
    dreams = [m.imagine(m.observe(clip), actions, seeds=seeds)[1].latents["top"] for m in (plain, noisy)]
    assert torch.equal(*dreams)


def test_checkpoint_round_trip_and_other_kinds(model, tmp_path):
    model.fit_change(encoded(dot_clip(8, 6, 77), dot_tokenizer()))
    model.save_pretrained(tmp_path / "wm", provenance={"dataset": "dots"})
    loaded = EDMWorldModel.from_pretrained(tmp_path / "wm")
    clip = encoded(dot_clip(2, 2, 3), dot_tokenizer())
    actions, seeds = torch.rand(2, 3, 2, 2), torch.arange(2)
    again, before = (m.imagine(m.observe(clip), actions, seeds=seeds)[1] for m in (loaded, model))
    assert torch.equal(again.latents["top"], before.latents["top"]) and torch.equal(again.poses, before.poses)
    assert loaded.spec == model.spec and loaded.config == model.config
    with pytest.raises(
        CheckpointError, match="a world model of kind autoregressive with weights of its own is required"
    ):
        AutoregressiveWorldModel.from_pretrained(tmp_path / "wm")


def test_a_spec_without_latents_is_refused():
    normalizer = RobustNormalizer(low=(-1.0, -1.0), high=(1.0, 1.0))
    with pytest.raises(SpecMismatch, match="requires a spec with latents"):
        EDMWorldModel(EDMConfig(), SPEC, action_normalizer=normalizer, pose_normalizer=normalizer)
