"""One dummy of about twenty lines for each kind of system the contracts are for, and what the contracts refuse."""

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from worldline.diffusion import row_noise
from worldline.errors import SpecMismatch
from worldline.executor import ChunkExecutor, ExecutorState
from worldline.policies.wrappers import CorruptedState
from worldline.types import (
    ActionMap,
    ActionSpec,
    CameraSpec,
    Clip,
    Episode,
    FrameSequence,
    Imagination,
    LatentSpec,
    Observation,
    Policy,
    RowState,
    Score,
    ScorePolicy,
    Scorer,
    StochasticPolicy,
    TensorState,
    Trace,
    TracedWorldModel,
    TrajectoryModel,
    VideoTokenizer,
    WorldModel,
    WorldSpec,
    require_match,
)

# --- the DROID shape: three cameras of different sizes, 15 Hz frames, three control steps a frame ------------------------

CAMERAS = (
    CameraSpec(name="exterior_1", height=18, width=32),
    CameraSpec(name="exterior_2", height=18, width=32),
    CameraSpec(name="wrist", height=12, width=16),
)
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ACTION = ActionSpec(
    names=AXES,
    low=(-1.0,) * 7,
    high=(1.0,) * 7,
    kind="absolute",
    space="cartesian",
    rate_hz=15.0,
    source="commanded",
    embodiment="franka",
)
LATENT = LatentSpec(
    fingerprint="mean-color",
    shapes={c.name: (3, 1, 1) for c in CAMERAS},
    mean={c.name: (0.0,) * 3 for c in CAMERAS},
    std={c.name: (1.0,) * 3 for c in CAMERAS},
)
SPEC = WorldSpec(cameras=CAMERAS, fps=5.0, control_steps=3, action=ACTION, pose_names=AXES, latent=LATENT)
B, T, K, A = 2, 5, 3, 7


def video(camera: CameraSpec, t: int = T, b: int = B) -> Tensor:
    return torch.randint(0, 256, (b, t, 3, camera.height, camera.width), dtype=torch.uint8)


def clip(**changes) -> Clip:
    torch.manual_seed(0)
    parts = {
        "frames": {c.name: video(c) for c in CAMERAS},
        "actions": torch.rand(B, T - 1, K, A),
        "poses": torch.rand(B, T, A),
        "instruction": ("put the cup away",) * B,
    }
    return Clip(**(parts | changes))


class Stored:
    """The least a `FrameSequence` is."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, frames: slice) -> Tensor:
        return self.frames[frames]


def episode(**changes) -> Episode:
    parts = {
        "frames": {c.name: Stored(video(c)[0]) for c in CAMERAS},
        "poses": torch.rand(T, A),
        "actions": torch.rand(T - 1, K, A),
        "states": torch.zeros(T, 0),
        "rewards": None,
        "frame_success": None,
        "success": None,
        "terminated": False,
        "truncated": True,
        "instruction": "put the cup away",
        "spec": SPEC,
        "index": 0,
    }
    return Episode(**(parts | changes))


def test_a_droid_episode_and_clip_fit() -> None:
    made = episode()
    assert len(made) == T and made.success is None
    assert all(isinstance(frames, FrameSequence) for frames in made.frames.values())
    assert made.frames["wrist"][1:3].shape == (2, 3, 12, 16)
    assert len(episode(frames={}, rewards=torch.zeros(T - 1), frame_success=torch.zeros(T, dtype=torch.bool))) == T
    assert clip(present={"wrist": torch.tensor([True, False])}).frames["exterior_1"].shape == (B, T, 3, 18, 32)
    assert clip(frames={}).poses.shape == (B, T, A)


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": torch.rand(T, K, A)},  # a block a frame instead of a block between frames
        {"actions": torch.rand(T - 1, A)},
        {"states": torch.zeros(T - 1, 4)},
        {"rewards": torch.zeros(T)},
        {"frame_success": torch.zeros(T)},  # not boolean
        {"frame_success": torch.zeros(T - 1, dtype=torch.bool)},
        {"poses": torch.rand(1, T, A)},
    ],
)
def test_an_episode_of_inconsistent_lengths_cannot_be_made(changes: dict) -> None:
    with pytest.raises(TypeCheckError):
        episode(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": torch.rand(B, T, K, A)},
        {"actions": torch.rand(B + 1, T - 1, K, A)},
        {"actions": torch.rand(B, T - 1, K * A)},
        {"poses": torch.rand(B, T - 1, A)},
        {"frames": {"wrist": video(CAMERAS[2], t=T + 1)}},
        {"frames": {"wrist": video(CAMERAS[2])[0]}},
        {"present": {"wrist": torch.ones(B)}},
    ],
)
def test_a_clip_of_inconsistent_shapes_cannot_be_made(changes: dict) -> None:
    with pytest.raises(TypeCheckError):
        clip(**changes)


def test_what_travels_cannot_be_changed_on_the_way() -> None:
    with pytest.raises(FrozenInstanceError):
        clip().poses = torch.zeros(B, T, A)


def test_an_action_spec_needs_a_range_for_every_dimension() -> None:
    with pytest.raises(SpecMismatch, match="got 7, 7, 1"):
        replace(ACTION, high=(1.0,))


# --- specs meet --------------------------------------------------------------------------------------------------------


def test_equal_specs_and_more_cameras_than_required_match() -> None:
    require_match(SPEC, SPEC, between="a and b")
    require_match(SPEC, replace(SPEC, cameras=CAMERAS[2:], fps=50.0, latent=None), between="world and policy")


def test_a_mismatch_names_every_field_and_both_values() -> None:
    other = replace(
        SPEC,
        cameras=(replace(CAMERAS[0], height=90, width=160), CameraSpec(name="head", height=4, width=4)),
        control_steps=1,
        action=replace(ACTION, kind="delta", rate_hz=5.0),
        pose_names=AXES[:6],
    )
    with pytest.raises(SpecMismatch) as error:
        require_match(SPEC, other, between="world model and policy")
    assert str(error.value).splitlines() == [
        "world model and policy do not fit:",
        "  camera exterior_1: required 90x160, got 18x32",
        "  camera head: required 4x4, got none",
        "  control_steps: required 1, got 3",
        "  action.kind: required 'delta', got 'absolute'",
        "  action.rate_hz: required 5.0, got 15.0",
        f"  pose_names: required {AXES[:6]!r}, got {AXES!r}",
        "Use components made for the same data and --stride.",
    ]
    require_match(SPEC, replace(other, cameras=CAMERAS), between="a and b", only=("cameras",))
    with pytest.raises(SpecMismatch, match=r"camera required: 'head'; got cameras \['exterior_1'"):
        SPEC.camera("head")


# --- the dummies -------------------------------------------------------------------------------------------------------


class MeanColor:
    """A tokenizer that keeps a frame's mean color."""

    latent_spec = LATENT

    def encode(self, frames):
        return {c: x.float().mean((-2, -1), keepdim=True) for c, x in frames.items()}

    def decode(self, latents):
        sizes = {c.name: (c.height, c.width) for c in CAMERAS}
        return {c: z.round().to(torch.uint8).expand(*z.shape[:3], *sizes[c]).clone() for c, z in latents.items()}


def effect(block: Tensor) -> Tensor:
    """A number "n" in which every control step of a block "n k a" counts, each with its own weight: order matters."""
    return (block.mean(-1) * 2.0 ** torch.arange(block.shape[1])).sum(-1)


class Denoiser:
    """Autoregressive: the next latent is a decayed last one plus the effect of the block; one stochastic step, traced."""

    std = 0.1

    def __init__(self, gain: float = 1.0, spec: WorldSpec = SPEC) -> None:
        self.gain, self.spec = torch.tensor(gain, requires_grad=True), spec

    def observe(self, clip: Clip) -> TensorState:
        latent = {c: z[:, -1] for c, z in clip.frames.items()}
        return TensorState(tensors={**latent, "/pose": clip.poses[:, -1]}, rows=len(clip.poses))

    def imagine(self, state, actions, *, seeds):
        latents = {c: [] for c in state.tensors if c != "/pose"}
        for i in range(actions.shape[1]):
            push = effect(actions[:, i])
            tensors = {c: 0.5 * z + push.view(-1, *[1] * (z.ndim - 1)) for c, z in state.tensors.items()}
            for c, made in latents.items():
                made.append(tensors[c])
            state = TensorState(tensors=tensors, rows=len(state))
        poses = state.tensors["/pose"][:, None].expand(-1, actions.shape[1], -1)
        return state, Imagination(latents={c: torch.stack(z, 1) for c, z in latents.items()}, poses=poses)

    def _mean(self, context) -> Tensor:
        seen, actions = context
        state = self.observe(seen)
        return self.gain * (0.5 * state.tensors["wrist"].flatten(1) + effect(actions[:, 0])[:, None])[None]

    def require_traceable(self, steps):
        pass

    def traced_chunk(self):
        return 1

    def sample_traced(self, seen, actions, *, seeds, steps=1, eta=1.0):
        noise, mean = row_noise(seeds, 0, 0, (3,)), self._mean((seen, actions)).detach()
        x = torch.stack([noise, mean[0] + self.std * row_noise(seeds, 0, 1, (3,))])
        return Trace(
            std=torch.tensor([self.std]), mean=mean, x=x, level=torch.tensor([1.0, 0.0]), context=(seen, actions)
        )

    def trace_means(self, trace):
        return self._mean(trace.context)

    def dreamt(self, trace):
        wrist = trace.x[-1][:, None, :, None, None]
        return Imagination(latents={"wrist": wrist}, poses=trace.x.new_zeros(len(wrist), 1, A))

    def log_prob(self, trace):
        normal = torch.distributions.Normal(self.trace_means(trace), trace.std.view(-1, 1, 1))
        return normal.log_prob(trace.x[1:]).sum((0, 2))


def observed() -> tuple[Denoiser, TensorState, Clip]:
    model, real = Denoiser(), clip()
    return model, model.observe(replace(real, frames=MeanColor().encode(real.frames))), real


def test_an_autoregressive_model_imagines_through_the_contract() -> None:
    model, state, _ = observed()
    assert isinstance(model, TracedWorldModel) and isinstance(MeanColor(), VideoTokenizer)
    state, made = model.imagine(state, torch.rand(B, 4, K, A), seeds=torch.arange(B))
    assert isinstance(state, RowState) and made.poses.shape == (B, 4, A)
    frames = MeanColor().decode({c: z.clamp(0, 255) for c, z in made.latents.items()})
    assert {c: tuple(x.shape) for c, x in frames.items()} == {c.name: (B, 4, 3, c.height, c.width) for c in CAMERAS}


def test_the_order_inside_a_block_and_the_order_of_blocks_both_count() -> None:
    """A contract that lost the sub-steps, or shifted blocks by one, could not carry this model."""
    model, state, _ = observed()
    actions = torch.rand(B, 4, K, A)

    def run(a: Tensor) -> Tensor:
        return model.imagine(state, a, seeds=torch.arange(B))[1].latents["wrist"].flatten(2)

    base = run(actions)
    assert not torch.allclose(run(actions.flip(2)), base)
    assert not torch.allclose(run(actions[:, [1, 0, 2, 3]])[:, -1], base[:, -1])
    changed = actions.clone()
    changed[:, 2, 1] += 1.0  # the second control step of the block that leads to frame 3
    difference = (run(changed) - base).abs().amax((0, 2))
    assert (difference[:2] == 0).all() and torch.allclose(difference[2:], torch.tensor([2.0, 1.0]), atol=1e-3)


def test_imagining_in_two_calls_is_imagining_in_one() -> None:
    model, state, _ = observed()
    actions, seeds = torch.rand(B, 4, K, A), torch.arange(B)
    _, whole = model.imagine(state, actions, seeds=seeds)
    middle, first = model.imagine(state, actions[:, :3], seeds=seeds)
    _, second = model.imagine(middle, actions[:, 3:], seeds=seeds)
    for c in whole.latents:
        assert torch.equal(torch.cat([first.latents[c], second.latents[c]], 1), whole.latents[c])


def test_a_trace_gives_its_probability_again_with_gradients() -> None:
    model, _, real = observed()
    seen = replace(real, frames=MeanColor().encode(real.frames))
    trace = model.sample_traced(seen, torch.rand(B, 1, K, A), seeds=torch.arange(B))
    log_prob = model.log_prob(trace)
    expected = torch.distributions.Normal(trace.mean[0], 0.1).log_prob(trace.x[1]).sum(1)
    assert torch.allclose(log_prob, expected, atol=1e-4)
    (gradient,) = torch.autograd.grad(log_prob.sum(), model.gain)
    mean = trace.mean[0] / model.gain.detach()
    by_hand = ((trace.x[1] - trace.mean[0]) / 0.1**2 * mean).sum()
    assert model.dreamt(trace).latents["wrist"].shape[:2] == (B, 1)
    assert torch.allclose(gradient, by_hand, rtol=1e-3)


@pytest.mark.parametrize("bad", [{"level": torch.tensor([1.0])}, {"x": torch.zeros(1, B, 3)}, {"std": torch.ones(2)}])
def test_a_trace_of_inconsistent_length_cannot_be_made(bad: dict) -> None:
    model, _, real = observed()
    seen = replace(real, frames=MeanColor().encode(real.frames))
    trace = model.sample_traced(seen, torch.rand(B, 1, K, A), seeds=torch.arange(B))
    with pytest.raises(TypeCheckError):
        replace(trace, **bad)


class Gaussian:
    """A stochastic policy with a score, and memory: it drifts by how often it was asked."""

    m, std = 6, 0.2
    spec = replace(SPEC, latent=None)

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={"calls": torch.zeros(n, 1)}, rows=n)

    def _mean(self, observation, state) -> Tensor:
        return (0.1 * observation.pose + 0.01 * state.tensors["calls"])[:, None].expand(-1, self.m, -1)

    def act(self, observation, state, *, seeds):
        chunk = self._mean(observation, state) + self.std * row_noise(seeds, 0, 0, (self.m, A))
        return chunk, TensorState(tensors={"calls": state.tensors["calls"] + 1}, rows=len(state))

    def log_prob(self, observation, state, actions):
        return torch.distributions.Normal(self._mean(observation, state), self.std).log_prob(actions).sum((1, 2))

    def score(self, observation, state, actions):
        return (self._mean(observation, state) - actions) / self.std**2


def seen(n: int = B) -> Observation:
    return Observation(
        images={c.name: video(c, 1, n)[:, 0] for c in CAMERAS}, pose=torch.rand(n, A), instruction=("tidy",) * n
    )


def test_a_stochastic_policy_and_its_score() -> None:
    policy, observation = Gaussian(), seen()
    assert isinstance(policy, StochasticPolicy) and isinstance(policy, ScorePolicy)
    state = policy.reset(B)
    chunk, _ = policy.act(observation, state, seeds=torch.arange(B))
    actions = chunk.requires_grad_()
    (gradient,) = torch.autograd.grad(policy.log_prob(observation, state, actions).sum(), actions)
    assert torch.allclose(policy.score(observation, state, chunk), gradient, atol=1e-4)


class VideoAction(Denoiser):
    """Unified: one object is a world model and a policy; the policy half decides from what it would imagine."""

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    def act(self, observation, state, *, seeds):
        first = Clip(
            frames=MeanColor().encode({c: x[:, None] for c, x in observation.images.items()}),
            actions=torch.zeros(len(observation), 0, K, A),
            poses=observation.pose[:, None],
            instruction=observation.instruction,
        )
        tries = torch.tensor([-1.0, 1.0])
        ends = [
            self.imagine(self.observe(first), torch.full((len(observation), 1, K, A), float(v)), seeds=seeds)[1]
            .latents["wrist"]
            .flatten(1)
            .mean(1)
            for v in tries
        ]
        best = tries[torch.stack(ends, 1).argmax(1)]
        return best[:, None, None].expand(-1, K, A).clone(), state


def test_a_unified_video_action_model_is_both_and_drives_itself() -> None:
    model = VideoAction()
    assert isinstance(model, WorldModel) and isinstance(model, Policy)
    require_match(model.spec, model.spec, between="a model and itself")
    executor = ChunkExecutor(model)
    block, _ = executor.block(seen(), executor.reset(B), seeds=torch.arange(B))
    assert torch.equal(block, torch.ones(B, K, A)), "brighter is what pushing up leads to"


class InverseDynamics:
    """Scores how well the block explains the change it led to; remembers the frame before."""

    name, window, input, spec = "inverse-dynamics", 2, "pixels", SPEC

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={"before": torch.full((n,), float("nan"))}, rows=n)

    def step(self, state, observation, action):
        now = observation.images["wrist"].float().mean((1, 2, 3))
        change = torch.where(state.tensors["before"].isnan(), 0.0, now - state.tensors["before"])
        explained = torch.zeros(len(state)) if action is None else effect(action)
        reward = -(change - explained).abs()
        return TensorState(tensors={"before": now}, rows=len(state)), Score(reward=reward, success=torch.exp(reward))


def test_an_inverse_dynamics_scorer_uses_the_block_that_led_here() -> None:
    scorer = InverseDynamics()
    assert isinstance(scorer, Scorer)
    state, first = scorer.step(scorer.reset(B), seen(), None)
    assert (first.success == 1).all()
    observation = seen()
    change = observation.images["wrist"].float().mean((1, 2, 3)) - state.tensors["before"]
    block = torch.zeros(B, K, A)
    block[:, 0] = change[:, None]
    _, right = scorer.step(state, observation, block)
    _, wrong = scorer.step(state, observation, block.flip(1))
    assert (right.reward > -1e-3).all() and (wrong.reward < right.reward).all()
    with pytest.raises(TypeCheckError):
        Score(reward=torch.zeros(B), success=torch.zeros(B + 1))


class RandomWalks:
    """A trajectory model: whole state-action sequences at once, a row from its seed alone."""

    def sample(self, seeds, *, length: int):
        return row_noise(seeds, 0, 0, (length, 4)).cumsum(1)


def test_a_trajectory_model_samples_rows_of_their_own() -> None:
    model, seeds = RandomWalks(), torch.tensor([3, 1, 4])
    assert isinstance(model, TrajectoryModel) and not isinstance(model, WorldModel)
    whole = model.sample(seeds, length=6)
    assert torch.equal(model.sample(seeds[1:2], length=6), whole[1:2])


class HalfRate:
    """An action map: every 7.5 Hz action is sent twice at 15 Hz."""

    requires, provides = replace(ACTION, rate_hz=7.5), ACTION
    fingerprint, error = "repeat-2", 0.0

    def __call__(self, actions, observation):
        return actions.repeat_interleave(2, dim=1)


def test_an_action_map_joins_what_require_match_keeps_apart() -> None:
    action_map = HalfRate()
    assert isinstance(action_map, ActionMap)
    slow = replace(SPEC, action=action_map.requires)
    with pytest.raises(SpecMismatch, match=r"action.rate_hz: required 7.5, got 15.0"):
        require_match(SPEC, slow, between="world and policy")
    require_match(SPEC, replace(slow, action=action_map.provides), between="world and mapped policy")
    chunk = torch.rand(B, 3, A)
    mapped = action_map(chunk, seen())
    assert mapped.shape == (B, 6, A) and torch.equal(mapped[:, ::2], chunk)


class Remote:
    """A remote policy as this side sees it: the state is the ids of the episodes, all else is elsewhere."""

    spec = replace(SPEC, latent=None)

    def __init__(self) -> None:
        self.next, self.log = 0, []

    def reset(self, n: int) -> TensorState:
        ids = torch.arange(self.next, self.next + n)
        self.next += n
        return TensorState(tensors={"episode": ids}, rows=n)

    def act(self, observation, state, *, seeds):
        self.log.append(state.tensors["episode"].tolist())
        return torch.zeros(len(state), K, A), state


def test_a_remote_policys_ids_follow_their_rows_through_executor_resets() -> None:
    policy = Remote()
    executor = ChunkExecutor(policy)
    _, state = executor.block(seen(), executor.reset(B), seeds=torch.arange(B))
    state = state.where(torch.tensor([True, False]), executor.reset(B)).index(torch.tensor([1, 0]))
    executor.block(seen(), state, seeds=torch.arange(B))
    assert policy.log == [[0, 1], [1, 2]]


class EveryFourth:
    """Compresses time by r = 4: the first latent is one frame, every other the mean of four."""

    r = 4
    latent_spec = replace(LATENT, fingerprint="every-fourth", frames_per_latent=4)

    def encode(self, frames):
        color = {c: x.float().mean((-2, -1), keepdim=True) for c, x in frames.items()}
        rest = {c: x[:, 1:].unflatten(1, (-1, self.r)).mean(2) for c, x in color.items()}
        return {c: torch.cat([x[:, :1], rest[c]], 1) for c, x in color.items()}

    def decode(self, latents):
        spread = {c: torch.cat([z[:, :1], z[:, 1:].repeat_interleave(self.r, 1)], 1) for c, z in latents.items()}
        return MeanColor().decode(spread)


def test_a_tokenizer_that_compresses_time_takes_r_blocks_a_latent() -> None:
    """9 frames are 3 latents; the 8 blocks of 3 actions become 2 of 12, in the order sent."""
    tokenizer, long = EveryFourth(), 9
    assert isinstance(tokenizer, VideoTokenizer)
    frames = {c.name: video(c, long) for c in CAMERAS}
    latents = tokenizer.encode(frames)
    assert {z.shape for z in latents.values()} == {(B, 3, 3, 1, 1)}
    assert tokenizer.decode(latents)["wrist"].shape == (B, long, 3, 12, 16)
    actions, poses = torch.rand(B, long - 1, K, A), torch.rand(B, long, A)
    packed = Clip(
        frames=latents,
        actions=actions.flatten(1, 2).unflatten(1, (2, tokenizer.r * K)),
        poses=poses[:, :: tokenizer.r],
        instruction=("",) * B,
    )
    assert torch.equal(packed.actions[:, 1, :K], actions[:, 4])
    model = Denoiser(spec=replace(SPEC, latent=tokenizer.latent_spec))
    _, made = model.imagine(model.observe(packed), packed.actions, seeds=torch.arange(B))
    assert made.latents["wrist"].shape == (B, 2, 3, 1, 1)
    with pytest.raises(TypeCheckError):  # blocks of single frames do not fit between latents
        replace(packed, actions=actions)


# --- state -------------------------------------------------------------------------------------------------------------


def test_tensor_state_forks_and_resets_by_row() -> None:
    state = TensorState(tensors={"a": torch.arange(3), "b": torch.arange(12.0).view(3, 2, 2)}, rows=3)
    forked = state.index(torch.tensor([2, 0, 2, 1]))
    assert len(forked) == 4 and forked.tensors["a"].tolist() == [2, 0, 2, 1]
    forked.tensors["b"].zero_()
    assert state.tensors["b"].sum() == 66, "a fork never shares storage"
    fresh = TensorState(tensors={"a": torch.full((3,), -1), "b": torch.full((3, 2, 2), -1.0)}, rows=3)
    mixed = state.where(torch.tensor([False, True, False]), fresh)
    assert mixed.tensors["a"].tolist() == [0, -1, 2]
    assert mixed.tensors["b"].flatten(1).tolist() == [[0, 1, 2, 3], [-1] * 4, [8, 9, 10, 11]]
    empty = TensorState(tensors={}, rows=3)
    assert len(empty.index(torch.tensor([0, 0]))) == 2 and len(empty.where(torch.ones(3, dtype=torch.bool), empty)) == 3


def test_every_state_of_the_library_is_a_row_state() -> None:
    inner = TensorState(tensors={}, rows=2)
    corrupted = CorruptedState(inner=inner, pending=torch.zeros(2, 1, A))
    executing = ExecutorState(
        policy=corrupted,
        queue=torch.zeros(2, K, A),
        queued=torch.zeros(2, dtype=torch.long),
        asked=torch.zeros(2, dtype=torch.long),
    )
    for state in (inner, corrupted, executing):
        assert isinstance(state, RowState) and len(state.index(torch.tensor([1, 1, 0]))) == 3


@dataclass
class NoReset:
    spec: WorldSpec = SPEC

    def act(self, observation, state, *, seeds):
        return torch.zeros(1, K, A), state


def test_what_does_not_keep_a_contract_is_told_apart() -> None:
    assert not isinstance(NoReset(), Policy)
    assert not isinstance(Gaussian(), WorldModel)
    assert not isinstance(Remote(), StochasticPolicy)
    assert not isinstance(MeanColor(), Scorer)
    assert not isinstance(object(), RowState)
