"""A perfect world model must give perfect answers: what is wrong after that is the model's, not the machinery's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.oracles import GOAL, SPEC, DotPolicy, DotScorer, ExactDotWorldModel, dot_clip, dot_tokenizer, draw, move
from tests.policies.dots import observe, starts
from worldline.errors import SpecMismatch
from worldline.eval import rank_statistics
from worldline.policies import EncoderConfig
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer, episode_success
from worldline.rl_in_imagination.vector_env import ImaginedVectorEnv
from worldline.tokenizers import PixelPatches
from worldline.types import CameraSpec, Observation, Scorer

TOKENIZER = dot_tokenizer()
FRAMES = 8


@pytest.fixture
def dream() -> Dream:
    return Dream(ExactDotWorldModel(TOKENIZER), TOKENIZER)


def truth(policy: DotPolicy, position: Tensor, frames: int, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Positions "n t 2" and goal "n t" by the exact dynamics alone: no dream, executor, tokenizer or scorer."""
    track = [position]
    for i in range(frames - 1):
        calls = (seeds * 1_000_003 + i) & 0x7FFF_FFFF_FFFF_FFFF
        block, _ = policy.act(observe(position), policy.reset(len(position)), seeds=calls)
        position = move(position, block)
        track.append(position)
    positions = torch.stack(track, 1)
    return positions, positions[..., 0] > GOAL


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_imagined_success_is_the_truth(dream: Dream, noise: float) -> None:
    policy, begin, seeds = DotPolicy(0.6, noise=noise), starts(48), torch.arange(48) * 31
    made = rollout(dream, policy, DotScorer(), begin, frames=FRAMES, seeds=seeds)
    positions, beyond = truth(policy, begin.pose, FRAMES, seeds)
    assert torch.allclose(made.poses, positions, atol=1e-6)
    clear = (positions[..., 0] - GOAL).abs().amin(1) > 0.01  # pixels cannot tell a dot on the line
    assert clear.sum() > 30
    imagined, real = (episode_success(x, persist=2)[clear] for x in (made.probability > 0.5, beyond))
    assert torch.equal(imagined, real)
    assert 0 < real.float().mean() < 1, "the test needs both outcomes"


def test_a_perfect_model_ranks_perfectly(dream: Dream) -> None:
    """Six speeds, 40 starts each: r = 1, MMRV = 0 and faster is better."""
    speeds, begin, seeds = (0.1, 0.3, 0.45, 0.55, 0.65, 0.8), starts(40, seed=3), torch.arange(40)
    # starts whose dot ends a pixel's error away from the line would test the scorer, not the ranking
    clear = torch.ones(40, dtype=torch.bool)
    for speed in speeds:
        positions, _ = truth(DotPolicy(speed), begin.pose, FRAMES, seeds)
        clear &= (positions[..., 0] - GOAL).abs().amin(1) > 0.005
    rows = clear.nonzero().flatten()
    begin, seeds = observe(begin.pose[rows]), seeds[rows]
    real, imagined = [], []
    for speed in speeds:
        policy = DotPolicy(speed)
        _, beyond = truth(policy, begin.pose, FRAMES, seeds)
        made = rollout(dream, policy, DotScorer(), begin, frames=FRAMES, seeds=seeds)
        real.append(episode_success(beyond, persist=2).tolist())
        imagined.append(episode_success(made.probability > 0.5, persist=2).tolist())
    statistics = rank_statistics(real, imagined, resamples=50)
    assert statistics.pearson == pytest.approx(1.0) and statistics.mmrv == 0.0 and statistics.bias == 0.0
    assert list(statistics.imagined) == sorted(statistics.imagined)
    assert len(set(statistics.imagined)) >= 4, "the speeds must differ in success for the ranking to mean anything"


def test_rollouts_do_not_depend_on_the_batch_size(dream: Dream) -> None:
    policy, begin, seeds = DotPolicy(0.5, noise=0.5, chunk=4), starts(10), torch.arange(10) + 5
    few = rollout(dream, policy, DotScorer(), begin, frames=6, seeds=seeds, batch=3, keep_frames=True)
    many = rollout(dream, policy, DotScorer(), begin, frames=6, seeds=seeds, batch=32, keep_frames=True)
    for name in ("probability", "poses", "actions"):
        assert torch.equal(getattr(few, name), getattr(many, name)), name
    assert torch.equal(few.frames["top"], many.frames["top"])
    assert few.frames["top"].shape == (10, 6, 3, 16, 16)


def test_given_actions_are_replayed_frame_by_frame(dream: Dream) -> None:
    clip = dot_clip(5, 7, seed=1)
    begin = Observation(images={"top": clip.frames["top"][:, 0]}, pose=clip.poses[:, 0], instruction=clip.instruction)
    made = rollout(
        dream, None, None, begin, frames=7, seeds=torch.arange(5), actions=clip.actions, keep_frames=True, batch=2
    )
    assert torch.allclose(made.poses, clip.poses, atol=1e-6)
    assert torch.equal(made.frames["top"], clip.frames["top"])
    assert torch.equal(made.actions, clip.actions)


def test_actions_beyond_the_range_move_as_far_as_the_range(dream: Dream) -> None:
    state = dream.start(starts(2), seeds=torch.arange(2))
    far, limit = (dream.step(state, torch.full((2, 2, 2), value)).observation.pose for value in (9.0, 1.0))
    assert torch.equal(far, limit) and (far > state.observation.pose).any()


def test_a_policy_or_actions_but_not_both(dream: Dream) -> None:
    actions = torch.zeros(2, 3, 2, 2)
    with pytest.raises(ValueError, match="a policy or actions required, got both"):
        rollout(dream, DotPolicy(1.0), None, starts(2), frames=3, seeds=torch.arange(2), actions=actions)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused() -> None:
    other = PixelPatches(SPEC.cameras, size=8)
    with pytest.raises(SpecMismatch, match=rf"tokenizer {TOKENIZER.fingerprint} required .*got {other.fingerprint}"):
        Dream(ExactDotWorldModel(TOKENIZER), other)


@pytest.mark.parametrize("change", [{"chunk": 2}, {"latent": replace(TOKENIZER.latent_spec, frames_per_latent=4)}])
def test_a_model_of_several_frames_a_step_is_refused(change: dict) -> None:
    world = ExactDotWorldModel(TOKENIZER)
    world.spec = replace(world.spec, **change)
    with pytest.raises(SpecMismatch, match="one frame a step"):
        Dream(world, TOKENIZER)


def test_a_start_without_a_required_camera_is_refused(dream: Dream) -> None:
    blind = Observation(images={}, pose=torch.zeros(2, 2), instruction=("", ""))
    with pytest.raises(SpecMismatch, match=r"requires cameras \['top'\], the start has \[\]"):
        dream.start(blind, seeds=torch.arange(2))


def test_a_start_of_another_image_size_is_refused(dream: Dream) -> None:
    large = Observation(
        images={"top": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, pose=torch.zeros(2, 2), instruction=("", "")
    )
    with pytest.raises(SpecMismatch, match="16x16 required"):
        dream.start(large, seeds=torch.arange(2))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"control_steps": 6}, "control_steps: required 6, got 2"),
        ({"cameras": (CameraSpec(name="wrist", height=8, width=8),)}, "camera wrist: required 8x8, got none"),
    ],
)
def test_a_scorer_of_another_rate_or_view_is_refused(dream: Dream, change: dict, told: str) -> None:
    judge = DotScorer()
    judge.spec = replace(SPEC, **change)
    with pytest.raises(SpecMismatch, match=told):
        rollout(dream, DotPolicy(1.0), judge, starts(2), frames=3, seeds=torch.arange(2))
    with pytest.raises(SpecMismatch, match=told):
        ImaginedVectorEnv(dream, judge, starts(2), num_envs=2, horizon=3)


def test_a_policy_of_another_world_is_refused_with_every_difference(dream: Dream) -> None:
    policy = DotPolicy(1.0)
    policy.spec = replace(
        SPEC,
        cameras=(CameraSpec(name="wrist", height=8, width=8),),
        control_steps=4,
        action=replace(SPEC.action, kind="absolute", rate_hz=40.0),
    )
    with pytest.raises(SpecMismatch) as error:
        rollout(dream, policy, None, starts(2), frames=3, seeds=torch.arange(2))
    for line in (
        "world model and policy do not fit",
        "camera wrist: required 8x8, got none",
        "control_steps: required 4, got 2",
        "action.kind: required 'absolute', got 'delta'",
        "action.rate_hz: required 40.0, got 20.0",
    ):
        assert line in str(error.value)
    assert "pose_names" not in str(error.value)


# --- state ------------------------------------------------------------------------------------------------------------


def test_dreams_can_be_forked_and_reset_by_row(dream: Dream) -> None:
    state = dream.step(dream.start(starts(3), seeds=torch.tensor([7, 8, 9])), torch.ones(3, 2, 2))
    picked = state.index(torch.tensor([2, 2, 0]))
    assert len(picked) == 3 and picked.seeds.tolist() == [9, 9, 7]
    left, right = torch.tensor([-1.0, 0.0]).expand(1, 2, 2), torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    moved = dream.step(picked, torch.cat([left, right, right]))
    alone = dream.step(state.index(torch.tensor([2])), left)
    assert torch.equal(moved.observation.pose[:1], alone.observation.pose)
    assert moved.observation.pose[1, 0] > moved.observation.pose[0, 0]

    fresh = dream.start(starts(3, seed=1), seeds=torch.tensor([17, 18, 19]))
    fresh = replace(fresh, observation=replace(fresh.observation, instruction=("a", "b", "c")))
    mask = torch.tensor([False, True, False])
    mixed = state.where(mask, fresh)
    assert mixed.seeds.tolist() == [7, 18, 9]
    assert mixed.observation.instruction == ("go right", "b", "go right")
    blocks = torch.full((3, 2, 2), -0.5)
    after = dream.step(mixed, blocks)
    expected = torch.where(
        mask[:, None], dream.step(fresh, blocks).observation.pose, dream.step(state, blocks).observation.pose
    )
    assert torch.equal(after.observation.pose, expected)
    assert torch.equal(mixed.observation.images["top"][1], fresh.observation.images["top"][1])
    assert torch.equal(mixed.observation.images["top"][2], state.observation.images["top"][2])


def test_stepping_leaves_the_old_state_as_it_was(dream: Dream) -> None:
    state = dream.start(starts(2), seeds=torch.arange(2))
    first = dream.step(state, torch.ones(2, 2, 2)).observation.pose
    dream.step(state, -torch.ones(2, 2, 2))
    assert torch.equal(dream.step(state, torch.ones(2, 2, 2)).observation.pose, first)


# --- success ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "persist", "success"),
    [
        ("00100", 1, True),
        ("00100", 2, False),
        ("01010", 2, False),
        ("01100", 2, True),
        ("00011", 2, True),
        ("11000", 2, True),
        ("11011", 3, False),
        ("00000", 1, False),
        ("1", 2, False),
        ("11", 2, True),
    ],
)
def test_success_must_hold_for_some_frames_in_a_row(done: str, persist: int, success: bool) -> None:
    frames = torch.tensor([[bool(int(c)) for c in done]])
    assert bool(episode_success(frames, persist=persist)) is success


def scorer(window: int, spec=SPEC) -> SuccessScorer:
    torch.manual_seed(0)
    config = SuccessConfig(
        encoder=EncoderConfig(window=window, channels=(8, 8, 8), features=8, shift=0), scale=2.0, offset=0.3
    )
    return SuccessScorer(config, spec).eval()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_scoring_step_by_step_is_scoring_the_windows_of_the_video(window: int) -> None:
    """The windows met in training: the last `window` frames, the first frame standing in for those before it."""
    model, clip = scorer(window), dot_clip(4, 6, seed=2)
    assert isinstance(model, Scorer)
    video = clip.frames["top"]
    state = model.reset(4)
    for time in range(6):
        rows = (torch.arange(window) + time - window + 1).clamp(min=0)
        with torch.no_grad():
            logits = model.logits({"top": video[:, rows].flatten(1, 2)})
        seen = Observation(images={"top": video[:, time]}, pose=clip.poses[:, time], instruction=clip.instruction)
        state, score = model.step(state, seen, None if time == 0 else clip.actions[:, time - 1])
        assert torch.allclose(score.success, torch.sigmoid(2.0 * logits + 0.3), atol=1e-5)


def test_a_row_that_starts_over_forgets_its_frames() -> None:
    model, clip = scorer(3), dot_clip(2, 4, seed=2)
    frames = [
        Observation(images={"top": clip.frames["top"][:, t]}, pose=clip.poses[:, t], instruction=("", ""))
        for t in range(4)
    ]
    state = model.reset(2)
    for frame in frames[:3]:
        state, _ = model.step(state, frame, None)
    state = state.where(torch.tensor([False, True]), model.reset(2))
    _, mixed = model.step(state, frames[3], None)
    _, fresh = model.step(model.reset(2), frames[3], None)
    assert torch.allclose(mixed.success[1], fresh.success[1], atol=1e-6)
    assert (mixed.success[0] - fresh.success[0]).abs() > 1e-6


def test_calibration_changes_the_name_and_not_the_weights() -> None:
    model = scorer(2)
    sharper = model.calibrated(scale=5.0, persist=3)
    assert sharper.name != model.name and sharper.config.persist == 3 and model.config.persist == 2
    frame = observe(torch.full((2, 2), 0.5))
    probability = [m.step(m.reset(2), frame, None)[1].success for m in (model, sharper)]
    logit = (probability[0].logit() - 0.3) / 2.0
    assert torch.allclose(probability[1], torch.sigmoid(5.0 * logit + 0.3), atol=1e-5)


def test_a_saved_scorer_has_the_same_name_and_scores(tmp_path) -> None:
    model = scorer(2)
    model.save_pretrained(tmp_path / "scorer")
    again = SuccessScorer.from_pretrained(tmp_path / "scorer")
    frame = observe(torch.rand(3, 2))
    assert again.name == model.name and again.config == model.config
    assert torch.equal(
        again.step(again.reset(3), frame, None)[1].success, model.step(model.reset(3), frame, None)[1].success
    )


def test_the_oracle_draws_what_it_says() -> None:
    """`draw` puts the brightest pixel at the position: the tests above rest on it."""
    frame = draw(torch.tensor([[0.28125, 0.71875]]))[0, 0]
    assert divmod(int(frame.argmax()), 16) == (11, 4)
