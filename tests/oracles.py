"""Analytic denoisers and toy worlds with exact dynamics: what the mathematics must agree with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from worldline.diffusion import Path, expand, row_noise
from worldline.tokenizers import PixelPatches
from worldline.types import ActionSpec, CameraSpec, Clip, Imagination, Observation, Score, TensorState, WorldSpec


def gaussian_denoiser(path: Path, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[clean | x, level] when clean ~ N(mean, std^2) elementwise: linear regression of clean on x."""

    def predict(x: Tensor, level: Tensor) -> Tensor:
        c = path(expand(level, x))
        gain = c.alpha * std**2 / (c.alpha**2 * std**2 + c.sigma**2)
        return mean + gain * (x - c.alpha * mean)

    return predict


def gaussian_flow(noise: Tensor, mean: float, std: float) -> Tensor:
    """Where the exact probability-flow ODE carries noise at level 1 (alpha = 0): the monotone map between Gaussians."""
    return mean + std * noise


# --- the dot world: a bright dot moved by its actions, exactly known ---------------------------------------------------

SIZE, K = 16, 2
SPEC = WorldSpec(
    cameras=(CameraSpec(name="top", height=SIZE, width=SIZE),),
    fps=10.0,
    control_steps=K,
    action=ActionSpec(
        names=("dx", "dy"),
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        kind="delta",
        space="cartesian",
        rate_hz=20.0,
        source="commanded",
        embodiment="dot",
    ),
    pose_names=("x", "y"),
)
GOAL = 0.75  # success: x beyond this


def move(position: Tensor, block: Tensor) -> Tensor:
    """Next position "n 2" in [0, 1] after a block "n k 2": the whole block counts, in order, with walls."""
    for i in range(block.shape[1]):
        position = (position + 0.06 * block[:, i].clamp(-1, 1)).clamp(0.1, 0.9)
    return position


def draw(position: Tensor) -> Tensor:
    """uint8 frames "n 3 h w": a soft dot, brightest at the position."""
    grid = (torch.arange(SIZE) + 0.5) / SIZE
    x = torch.exp(-((grid[None] - position[:, :1]) ** 2) / 0.012)
    y = torch.exp(-((grid[None] - position[:, 1:]) ** 2) / 0.012)
    return (y[:, :, None] * x[:, None] * 255).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)


def locate(frames: Tensor) -> Tensor:
    """Centre of brightness "... 2" of frames "... 3 h w": reads the dot's position off pixels."""
    weight = frames.float().mean(-3) ** 2
    grid = (torch.arange(SIZE) + 0.5) / SIZE
    total = weight.sum((-1, -2))
    return torch.stack([(weight.sum(-2) * grid).sum(-1) / total, (weight.sum(-1) * grid).sum(-1) / total], -1)


def dot_clip(batch: int, frames: int, seed: int, start: Tensor | None = None) -> Clip:
    """Random smooth motion as a clip of uint8 frames."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.rand(batch, 2, generator=generator) * 0.8 + 0.1 if start is None else start
    trend = torch.randn(batch, 1, 1, 2, generator=generator)
    actions = (trend + 0.7 * torch.randn(batch, frames - 1, K, 2, generator=generator)).clamp(-1, 1)
    positions = [position]
    for i in range(frames - 1):
        positions.append(move(positions[-1], actions[:, i]))
    poses = torch.stack(positions, 1)
    video = draw(poses.flatten(0, 1)).unflatten(0, (batch, frames))
    return Clip(frames={"top": video}, actions=actions, poses=poses, instruction=("go right",) * batch)


def dot_tokenizer() -> PixelPatches:
    tokenizer = PixelPatches(SPEC.cameras, size=4)
    tokenizer.fit_statistics(dot_clip(64, 4, 99).frames)
    return tokenizer


def encoded(clip: Clip, tokenizer: PixelPatches) -> Clip:
    return replace(clip, frames=tokenizer.encode(clip.frames))


def fit(model: Any, draw: Callable[[int], Clip], *, steps: int, lr: float) -> Any:
    """A world model after `steps` of AdamW, each on the clip that `draw` gives for its number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        loss, _ = model.loss(draw(step), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


class ExactDotWorldModel:
    """A perfect `WorldModel`: the dot world's own dynamics behind the contract."""

    def __init__(self, tokenizer: PixelPatches) -> None:
        self.tokenizer = tokenizer
        self.spec = replace(SPEC, latent=tokenizer.latent_spec)

    def observe(self, clip: Clip) -> TensorState:
        return TensorState(tensors={"position": clip.poses[:, -1]}, rows=len(clip.poses))

    def imagine(self, state: TensorState, actions: Tensor, *, seeds: Tensor) -> tuple[TensorState, Imagination]:
        positions = [state.tensors["position"]]
        for i in range(actions.shape[1]):
            positions.append(move(positions[-1], actions[:, i]))
        poses = torch.stack(positions[1:], 1)
        frames = draw(poses.flatten(0, 1)).unflatten(0, tuple(poses.shape[:2]))
        latents = self.tokenizer.encode({"top": frames})
        return TensorState(tensors={"position": positions[-1]}, rows=len(state)), Imagination(
            latents=latents, poses=poses
        )


class DotPolicy:
    """Walks right at `speed`, looking only at pixels; `noise` is drawn from the row's seed. State counts its calls."""

    def __init__(self, speed: float, noise: float = 0.0, chunk: int = K) -> None:
        self.speed, self.noise, self.chunk, self.spec = speed, noise, chunk, SPEC

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={"calls": torch.zeros(n, 1)}, rows=n)

    def act(self, observation: Observation, state: TensorState, *, seeds: Tensor) -> tuple[Tensor, TensorState]:
        n = len(observation)
        here = locate(observation.images["top"])
        go = torch.stack([torch.full((n,), self.speed), 2 * (0.5 - here[:, 1])], -1)
        actions = go[:, None] + self.noise * row_noise(seeds, 0, 0, (self.chunk, 2))
        calls = state.tensors["calls"] + 1
        return actions.clamp(-1, 1), TensorState(tensors={"calls": calls}, rows=n)


class DotScorer:
    """Success probability 1 where the dot is seen beyond the goal."""

    name, window, input, spec = "dot-rule", 1, "pixels", SPEC

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    def step(self, state: TensorState, observation: Observation, action: Tensor | None) -> tuple[TensorState, Score]:
        done = (locate(observation.images["top"])[:, 0] > GOAL).float()
        return state, Score(reward=done, success=done)
