"""The dream: a world model and its tokenizer played like a simulator, n rows at a time, on the device.

`Dream` is the torch core (start, step, fork by row); `rollout` runs a policy and a scorer in it. A policy cannot tell it
from a simulator: the same `Observation`, the same executor, images rounded to eight bits.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from worldline.errors import SpecMismatch
from worldline.executor import ChunkExecutor, index_observation
from worldline.types import Clip, Observation, Policy, Scorer, VideoTokenizer, WorldModel, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class DreamState:
    """n dreams: the world model's state, what is seen now, and each row's seed."""

    world: Any
    observation: Observation
    seeds: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.seeds)

    def index(self, rows: Int[Tensor, " r"]) -> "DreamState":
        observation = index_observation(self.observation, rows)
        return DreamState(world=self.world.index(rows), observation=observation, seeds=self.seeds[rows])

    def where(self, mask: Bool[Tensor, " n"], other: "DreamState") -> "DreamState":
        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (old.ndim - 1)), new, old)

        mine, theirs = self.observation, other.observation
        observation = Observation(
            images={c: pick(theirs.images[c], x) for c, x in mine.images.items()},
            pose=pick(theirs.pose, mine.pose),
            instruction=tuple(b if m else a for a, b, m in zip(mine.instruction, theirs.instruction, mask)),
        )
        return DreamState(
            world=self.world.where(mask, other.world), observation=observation, seeds=pick(other.seeds, self.seeds)
        )


class Timer:
    """Seconds spent by part, for benchmarks; costs two clock reads a part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class Dream:
    """A world model as an environment.

    Raises `SpecMismatch` if the tokenizer is not the one the world model was trained with, or if the model makes more than
    one frame at a time.
    """

    def __init__(self, world_model: WorldModel, tokenizer: VideoTokenizer, *, timer: Timer | None = None) -> None:
        latent = world_model.spec.latent
        if latent is None or latent.fingerprint != tokenizer.latent_spec.fingerprint:
            raise SpecMismatch(
                f"tokenizer {latent.fingerprint if latent else 'with latents'} required by the world model, "
                f"got {tokenizer.latent_spec.fingerprint}. Use the tokenizer saved beside the world model."
            )
        if latent.frames_per_latent != 1 or world_model.spec.chunk != 1:
            raise SpecMismatch(
                "a world model of one frame a step is required (chunk 1, frames_per_latent 1), got chunk "
                f"{world_model.spec.chunk}, frames_per_latent {latent.frames_per_latent}: a policy acts at every frame."
            )
        self.world_model, self.tokenizer, self.spec = world_model, tokenizer, world_model.spec
        self.timer = timer or Timer()

    def start(self, observation: Observation, *, seeds: Int[Tensor, " n"]) -> DreamState:
        """Dreams that begin at real observations: one frame is all they are given.

        A camera that the start lacks is imagined from the others, by a model that has learned to; until the first imagined frame
        it is black. Raises `SpecMismatch` if the start has none of the cameras, `observe` if the model needs the missing one.
        """
        n = len(observation)
        missing = [c for c in self.spec.cameras if c.name not in observation.images]
        if len(missing) == len(self.spec.cameras):
            raise SpecMismatch(
                f"the world model requires cameras {sorted(c.name for c in missing)}, the start has {sorted(observation.images)}"
            )
        black = {c.name: torch.zeros(n, 3, c.height, c.width, dtype=torch.uint8) for c in missing}
        observation = replace(observation, images={**observation.images, **black})
        with self.timer("tokenizer"):
            frames = {c.name: observation.images[c.name][:, None] for c in self.spec.cameras}
            latents = self.tokenizer.encode(frames)
        empty = torch.zeros(n, 0, self.spec.control_steps, self.spec.action.dim)
        clip = Clip(
            frames=latents,
            actions=empty,
            poses=observation.pose[:, None],
            present={c: torch.zeros(n, dtype=torch.bool) for c in black},
            instruction=observation.instruction,
        )
        with self.timer("denoiser"):
            world = self.world_model.observe(clip)
        return DreamState(world=world, observation=observation, seeds=seeds)

    def step(self, state: DreamState, block: Float[Tensor, "n k a"] | None) -> DreamState:
        """One frame on. The block is clipped to the action range first, as an environment would.

        None: whatever may follow, by the instruction alone; `SpecMismatch` if the world model has not learned that.
        """
        low, high = torch.tensor(self.spec.action.low), torch.tensor(self.spec.action.high)
        actions = None if block is None else block.clamp(low, high)[:, None]
        with self.timer("denoiser"):
            world, made = self.world_model.imagine(state.world, actions, seeds=state.seeds)
        with self.timer("decoder"):
            frames = self.tokenizer.decode(made.latents)
        observation = Observation(
            images={camera: video[:, 0].cpu() for camera, video in frames.items()},
            pose=made.poses[:, 0].cpu(),
            instruction=state.observation.instruction,
        )
        return replace(state, world=world, observation=observation)


Leaves = Callable[[DreamState, Float[Tensor, "n k a"]], Bool[Tensor, " n"]]
"""Which rows leave, by these blocks, what their world model knows (`Doubt.exceeded`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """n imagined episodes of t frames, the first one real."""

    probability: Float[Tensor, "n t"]  # the scorer's success probability, frame by frame
    poses: Float[Tensor, "n t p"]
    actions: Float[Tensor, "n _acted k a"]  # t-1 blocks; none where nothing acted
    frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]  # empty unless they were asked for


def rollout(
    dream: Dream,
    policy: Policy | None,
    scorer: Scorer | None,
    starts: Observation,
    *,
    frames: int,
    seeds: Int[Tensor, " n"],
    actions: Float[Tensor, "n t k a"] | None = None,
    keep_frames: bool = False,
    leaves: Leaves | None = None,
    batch: int = 32,
    progress: str | None = None,
) -> Rollouts:
    """Imagine `frames` frames from each start: under a policy, under given actions, or, with neither, whatever may follow by the
    instruction alone (`Dream.step`). From the frame on at which a row `leaves` what the model knows, its success probability is 0.

    Raises `SpecMismatch` if the policy or the scorer requires cameras, actions or rates that the world model does not
    provide.
    """
    if policy is not None and actions is not None:
        raise ValueError("a policy or actions required, got both")
    if policy is not None:
        require_match(dream.spec, policy.spec, between="world model and policy")
    if scorer is not None:
        require_match(
            dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "fps", "control_steps")
        )
    executor = None if policy is None else ChunkExecutor(policy)
    parts = []
    groups = torch.arange(len(starts)).split(batch)
    with tqdm(
        total=len(starts) * (frames - 1), desc=progress, unit="frame", disable=progress is None, leave=False
    ) as bar:
        for rows in groups:
            given = None if actions is None else actions[rows]
            part = _rollout(
                dream,
                executor,
                scorer,
                index_observation(starts, rows),
                frames,
                seeds[rows],
                given,
                keep_frames,
                leaves,
                bar,
            )
            parts.append(part)
    return Rollouts(
        probability=torch.cat([p.probability for p in parts]),
        poses=torch.cat([p.poses for p in parts]),
        actions=torch.cat([p.actions for p in parts]),
        frames={camera: torch.cat([p.frames[camera] for p in parts]) for camera in parts[0].frames},
    )


def _rollout(
    dream: Dream,
    executor: ChunkExecutor | None,
    scorer: Scorer | None,
    starts: Observation,
    frames: int,
    seeds: Tensor,
    actions: Tensor | None,
    keep_frames: bool,
    leaves: Leaves | None,
    bar: tqdm,
) -> Rollouts:
    timer = dream.timer
    state = dream.start(starts, seeds=seeds)
    acting = None if executor is None else executor.reset(len(starts))
    scoring = None if scorer is None else scorer.reset(len(starts))
    seen, sent, probability, block = [state.observation], [], [], None
    left = torch.zeros(len(starts), dtype=torch.bool)
    for i in range(frames):
        if i:
            if executor is not None:
                assert acting is not None
                with timer("policy"):
                    block, acting = executor.block(state.observation, acting, seeds=seeds)
            elif actions is not None:
                block = actions[:, i - 1]
            if leaves is not None and block is not None:
                left = left | leaves(state, block)
            state = dream.step(state, block)
            if block is not None:
                sent.append(block)
            seen.append(state.observation)
            bar.update(len(starts))
        if scorer is not None:
            with timer("scorer"):
                scoring, score = scorer.step(scoring, state.observation, block)
            probability.append(torch.where(left, 0, score.success.cpu()))
    none = torch.zeros(len(starts), frames)
    kept = {c: torch.stack([o.images[c] for o in seen], 1) for c in state.observation.images} if keep_frames else {}
    return Rollouts(
        probability=torch.stack(probability, 1) if probability else none,
        poses=torch.stack([o.pose for o in seen], 1),
        actions=torch.stack(sent, 1)
        if sent
        else torch.zeros(len(starts), 0, dream.spec.control_steps, dream.spec.action.dim),
        frames=kept,
    )
