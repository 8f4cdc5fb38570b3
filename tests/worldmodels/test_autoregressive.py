"""The world model: streaming equals the full pass, rows are independent, and a small one learns the dot world."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer, encoded, fit, locate
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution, solver_levels
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers.whitening import whiten
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TransformerConfig
from worldline.worldmodels.guesses import motion_of
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.streaming import Frame
from worldline.worldmodels.transformer import banded_causal_mask, teacher_forcing_mask


def small_model(seed: int = 0, actions: bool = True, **options) -> AutoregressiveWorldModel:
    torch.manual_seed(seed)
    network = TransformerConfig(width=48, depth=2, heads=2, window=4, patch=2, actions=actions)
    clip = dot_clip(64, 4, 5)
    return AutoregressiveWorldModel(
        AutoregressiveConfig(network=network, **options),
        replace(SPEC, latent=dot_tokenizer().latent_spec),
        action_normalizer=RobustNormalizer.fit(clip.actions),
        pose_normalizer=RobustNormalizer.fit(clip.poses),
    )


def scrambled(model: AutoregressiveWorldModel) -> AutoregressiveWorldModel:
    """Random weights everywhere: zero-initialised gates would hide any mistake behind them.

    Smaller ones where a pose comes from the pose before: a dream of several frames must not explode.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bounds" in name:  # of the aim: the lower one stays below
                continue
            scale = 0.02 if "guess_pose" in name or "unembed_pose" in name else 0.25
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> AutoregressiveWorldModel:
    return scrambled(small_model())


def motions(poses: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """For each of t frames what is known of the frame before it, zeros for the first, frame by frame."""
    n, t, p = poses.shape
    rows = [torch.zeros(n, 2 * p + actions.shape[2])]
    for i in range(1, t):
        before = poses[:, i - 1] - poses[:, i - 2] if i > 1 else torch.zeros(n, p)
        block = actions[:, i - 2] if i > 1 else torch.zeros_like(actions[:, 0])
        rows.append(torch.cat([poses[:, i - 1], before, block], 1))
    return torch.stack(rows, 1)


def before(x: torch.Tensor) -> torch.Tensor:
    """What stood at the frame before; zeros at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def frame_of(latents: dict, pose: torch.Tensor) -> Frame:
    return Frame(latents=latents, pose=pose, seen={c: torch.ones(len(pose), dtype=torch.bool) for c in latents})


def full_pass(model: AutoregressiveWorldModel, clip) -> tuple[torch.Tensor, torch.Tensor]:
    """All frames at level 0 at once under the banded causal mask, without a cache."""
    units = model.network_units(clip)
    frames, poses, actions = units.frames, units.poses, units.actions
    shift = lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)  # noqa: E731
    b, t = poses.shape[:2]
    batch = FrameBatch(
        latents=frames,
        previous={c: shift(z) for c, z in frames.items()},
        pose=poses,
        previous_pose=shift(poses),
        motion=motions(poses, actions),
        aim=before(units.aims),
        level=torch.zeros(b, t),
        action=torch.cat([torch.zeros(b, 1, 4), actions], 1),
        has_action=torch.arange(t).expand(b, t) > 0,
        time=torch.arange(t),
        previous_seen={c: torch.arange(t).expand(b, t) > 0 for c in frames},
    )
    with torch.no_grad():
        made = model.network(model.body, batch, banded_causal_mask(t, model.config.network.window))
    return made.latents["top"], made.pose


@pytest.mark.parametrize("frames", [1, 3, 4, 11])
def test_streaming_equals_the_full_pass_below_at_and_beyond_the_window(model, frames):
    clip = encoded(dot_clip(2, frames, 3), dot_tokenizer())
    expected, expected_pose = full_pass(model, clip)
    units = model.network_units(clip)
    poses, actions = units.poses, units.actions
    first = replace(
        clip, frames={"top": clip.frames["top"][:, :1]}, poses=clip.poses[:, :1], actions=clip.actions[:, :0]
    )
    state = model.streaming.write(model.observe(first))
    for i in range(1, frames):
        latents = {"top": units.frames["top"][:, i]}
        out, pose = model.streaming.step(state, frame_of(latents, poses[:, i]), torch.zeros(2), actions[:, i - 1])
        assert torch.allclose(out["top"], expected[:, i], atol=1e-4)
        assert torch.allclose(pose, expected_pose[:, i], atol=1e-4)
        motion = motion_of(poses[:, i], poses[:, i - 1], actions[:, i - 1])
        state = replace(
            state, frames=state.frames + 1, latents=latents, pose=poses[:, i], motion=motion, aim=units.aims[:, i]
        )
    observed = model.streaming.write(model.observe(clip))
    assert torch.allclose(observed.cache, state.cache, atol=1e-4)
    assert observed.cache.shape[-2] == 4  # memory does not grow with the stream


def test_training_shows_a_target_exactly_what_streaming_shows_it(model):
    """The doubled pass at level 1 with clean history predicts what one solver step in the dream predicts."""
    clip = encoded(dot_clip(2, 7, 3), dot_tokenizer())
    units = model.network_units(clip)
    frames, poses, actions = units.frames, units.poses, units.actions
    t = 7
    shift = lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)  # noqa: E731
    noise, pose_noise = torch.randn(2, t - 1, *frames["top"].shape[2:]), torch.randn(2, t - 1, 2)
    history, pose_history = frames["top"][:, :-1], poses[:, :-1]
    has_action = torch.ones(2, 2 * t - 2, dtype=torch.bool)
    has_action[:, 0] = False
    batch = FrameBatch(
        latents={"top": torch.cat([history, noise], 1)},
        previous={"top": torch.cat([shift(history), history], 1)},
        pose=torch.cat([pose_history, pose_noise], 1),
        previous_pose=torch.cat([shift(pose_history), pose_history], 1),
        motion=torch.cat([motions(poses, actions)[:, :-1], motions(poses, actions)[:, 1:]], 1),
        aim=torch.cat([before(units.aims)[:, :-1], before(units.aims)[:, 1:]], 1),
        level=torch.cat([torch.zeros(2, t - 1), torch.ones(2, t - 1)], 1),
        action=torch.cat([shift(actions), actions], 1),
        has_action=has_action,
        time=torch.cat([torch.arange(t - 1), torch.arange(1, t)]),
        previous_seen={"top": has_action},
    )
    with torch.no_grad():
        made = model.network(model.body, batch, teacher_forcing_mask(t - 1, 4), slice(t - 1, None))
    trained = made.latents
    for i in range(1, t):
        state = model.observe(
            replace(
                clip,
                frames={"top": clip.frames["top"][:, :i]},
                poses=clip.poses[:, :i],
                actions=clip.actions[:, : i - 1],
            )
        )
        noisy = frame_of({"top": noise[:, i - 1]}, pose_noise[:, i - 1])
        streamed, _ = model.streaming.step(state, noisy, torch.ones(2), actions[:, i - 1])
        assert torch.allclose(streamed["top"], trained["top"][:, i - 1], atol=1e-4)


def test_causal_and_forgets_beyond_the_receptive_field(model):
    clip = encoded(dot_clip(1, 9, 3), dot_tokenizer())
    before, _ = full_pass(model, clip)
    later = clip.frames["top"].clone()
    later[:, 5] += 1
    after, _ = full_pass(model, replace(clip, frames={"top": later}))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_a_row_does_not_depend_on_its_neighbours(model):
    clip = encoded(dot_clip(3, 2, 3), dot_tokenizer())
    actions, seeds = torch.randn(3, 6, 2, 2), torch.tensor([4, 9, 4])
    state, together = model.observe(clip), None
    _, together = model.imagine(state, actions, seeds=seeds)
    order = torch.tensor([2, 0, 1])
    _, permuted = model.imagine(state.index(order), actions[order], seeds=seeds[order])
    assert torch.allclose(together.latents["top"][order], permuted.latents["top"], rtol=1e-4, atol=1e-4)
    _, alone = model.imagine(state.index(torch.tensor([1])), actions[1:2], seeds=seeds[1:2])
    assert torch.allclose(together.latents["top"][1:2], alone.latents["top"], rtol=1e-4, atol=1e-4)


def test_imagining_in_pieces_or_at_once_is_the_same_and_leaves_the_state_alone(model):
    state = model.observe(encoded(dot_clip(2, 2, 3), dot_tokenizer()))
    kept = state.cache.clone()
    actions, seeds = torch.randn(2, 5, 2, 2), torch.arange(2)
    final, once = model.imagine(state, actions, seeds=seeds)
    assert torch.equal(state.cache, kept)
    middle, first = model.imagine(state, actions[:, :2], seeds=seeds)
    again, rest = model.imagine(middle, actions[:, 2:], seeds=seeds)
    assert torch.equal(torch.cat([first.latents["top"], rest.latents["top"]], 1), once.latents["top"])
    assert torch.equal(again.cache, final.cache)


def test_rows_reset_on_their_own(model):
    fresh = model.observe(encoded(dot_clip(2, 1, 8), dot_tokenizer()))
    actions, seeds = torch.randn(2, 3, 2, 2), torch.arange(2)
    used, _ = model.imagine(model.observe(encoded(dot_clip(2, 3, 3), dot_tokenizer())), actions, seeds=seeds)
    mixed = used.where(torch.tensor([False, True]), fresh)
    _, from_mixed = model.imagine(mixed, actions, seeds=seeds)
    _, from_used = model.imagine(used, actions, seeds=seeds)
    _, from_fresh = model.imagine(fresh, actions, seeds=seeds)
    assert torch.allclose(from_mixed.latents["top"][0], from_used.latents["top"][0], atol=1e-5)
    assert torch.allclose(from_mixed.latents["top"][1], from_fresh.latents["top"][1], atol=1e-5)


def test_untrained_model_is_copy_last_frame():
    model, clip = small_model(), encoded(dot_clip(2, 3, 3), dot_tokenizer())
    _, dream = model.imagine(model.observe(clip), torch.randn(2, 2, 2, 2), seeds=torch.arange(2))
    assert torch.allclose(dream.latents["top"][:, 1], clip.frames["top"][:, -1], atol=1e-5)
    assert torch.allclose(dream.poses[:, 1], clip.poses[:, -1], atol=1e-5)


def test_levels_asked_for_in_sampling_are_levels_shown_in_training():
    config = AutoregressiveConfig()
    for steps in (1, 2, 4, 10):
        assert all(config.target.contains(level) for level in solver_levels(steps)[:-1].tolist())
    with pytest.raises(ValueError, match="history_level must be a level that training shows"):
        AutoregressiveConfig(history_level=0.6)
    with pytest.raises(ValueError, match=r"asks for level 0\.25"):
        AutoregressiveConfig(solver_steps=4, target=LevelDistribution(pure=0.5, low=0.4))


def _train(model: AutoregressiveWorldModel, steps: int) -> AutoregressiveWorldModel:
    tokenizer = dot_tokenizer()
    return fit(model, lambda step: encoded(dot_clip(32, 9, 1000 + step), tokenizer), steps=steps, lr=5e-3)


def test_a_small_model_learns_the_dot_world_and_follows_its_actions():
    model, blind = _train(small_model(), 300), _train(small_model(actions=False), 100)
    clip = dot_clip(64, 5, 7)
    first = encoded(
        replace(clip, frames={"top": clip.frames["top"][:, :1]}, poses=clip.poses[:, :1], actions=clip.actions[:, :0]),
        dot_tokenizer(),
    )

    def position_error(world, actions) -> float:
        _, dream = world.imagine(world.observe(first), actions, seeds=torch.arange(64))
        seen = locate(dot_tokenizer().decode(dream.latents)["top"])
        return float((seen - clip.poses[:, 1:]).norm(dim=-1)[:, -1].mean())

    copy_last = float((clip.poses[:, 0] - clip.poses[:, -1]).norm(dim=-1).mean())
    true, shuffled = position_error(model, clip.actions), position_error(model, clip.actions.roll(1, 0))
    assert true < 0.5 * copy_last
    assert true < 0.5 * shuffled
    assert true < 0.5 * position_error(blind, clip.actions)
    _, dream = model.imagine(model.observe(first), clip.actions, seeds=torch.arange(64))
    assert (dream.poses - clip.poses[:, 1:]).abs().mean() < 0.05


# --- two views of the dot world: the second one mirrored -------------------------------------------------------------------

TWO_VIEWS = replace(SPEC, cameras=(*SPEC.cameras, replace(SPEC.cameras[0], name="side")))


def two_view_model(**network) -> AutoregressiveWorldModel:
    torch.manual_seed(0)
    latent = dot_tokenizer().latent_spec
    both = {field: dict(getattr(latent, field)) for field in ("shapes", "mean", "std")}
    for views in both.values():
        views["side"] = views["top"]
    clip = dot_clip(64, 4, 5)
    return AutoregressiveWorldModel(
        AutoregressiveConfig(network=TransformerConfig(width=48, depth=2, heads=2, window=4, patch=2, **network)),
        replace(TWO_VIEWS, latent=replace(latent, **both)),
        action_normalizer=RobustNormalizer.fit(clip.actions),
        pose_normalizer=RobustNormalizer.fit(clip.poses),
    )


def two_view_clip(batch: int, frames: int, seed: int):
    clip = dot_clip(batch, frames, seed)
    views = {"top": clip.frames["top"], "side": clip.frames["top"].flip(-1)}
    return replace(clip, frames={c: dot_tokenizer().encode({"top": v})["top"] for c, v in views.items()})


def test_a_view_is_guessed_without_its_own_history():
    model = scrambled(two_view_model())
    clip = two_view_clip(3, 5, 0)
    guesses = []
    for hidden in (None, "side"):
        units = model.network_units(clip)
        frames, poses, actions = dict(units.frames), units.poses, units.actions
        if hidden:
            frames[hidden] = torch.randn_like(frames[hidden])
        batch = FrameBatch(
            latents=frames,
            previous=frames,
            pose=poses,
            previous_pose=poses,
            motion=motions(poses, actions),
            level=torch.zeros(3, 5),
            action=torch.cat([actions, actions[:, :1]], 1),
            has_action=torch.ones(3, 5, dtype=torch.bool),
            time=torch.arange(5),
        )
        guesses.append(model.port.guesses(batch).views)
    assert torch.equal(guesses[0]["side"], guesses[1]["side"])
    assert not torch.allclose(guesses[0]["top"], guesses[1]["top"])


def test_guesses_are_learned_and_can_be_left_out():
    model = two_view_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(70):
        loss, _ = model.loss(two_view_clip(32, 5, 1000 + step), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip = two_view_clip(128, 5, 5)
    _, metrics = model.loss(clip, generator)
    for camera, z in whiten(clip.frames, model.latent_spec).items():
        mean_frame_error = z.var(0).mean()
        assert float(metrics[f"guess_error/{camera}"]) < 0.5 * float(mean_frame_error)
    _, without = two_view_model(guess_width=0).loss(clip, generator)
    assert not any(name.startswith("guess") for name in without)


def test_checkpoint_round_trip_and_damage(model, tmp_path):
    model.save_pretrained(tmp_path / "wm", provenance={"dataset": "dots"})
    loaded = AutoregressiveWorldModel.from_pretrained(tmp_path / "wm")
    clip = encoded(dot_clip(2, 2, 3), dot_tokenizer())
    actions, seeds = torch.randn(2, 3, 2, 2), torch.arange(2)
    assert torch.equal(
        loaded.imagine(loaded.observe(clip), actions, seeds=seeds)[1].latents["top"],
        model.imagine(model.observe(clip), actions, seeds=seeds)[1].latents["top"],
    )
    assert loaded.spec == model.spec
    weights = tmp_path / "wm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        AutoregressiveWorldModel.from_pretrained(tmp_path / "wm")
    with pytest.raises(CheckpointError, match="a tokenizer is required here, this is a world-model"):
        from worldline.tokenizers import load_tokenizer

        load_tokenizer(tmp_path / "wm")


def test_a_spec_without_latents_is_refused():
    clip = dot_clip(4, 2, 0)
    with pytest.raises(SpecMismatch, match="requires a spec with latents"):
        AutoregressiveWorldModel(
            AutoregressiveConfig(),
            SPEC,
            action_normalizer=RobustNormalizer.fit(clip.actions),
            pose_normalizer=RobustNormalizer.fit(clip.poses),
        )
