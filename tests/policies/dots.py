"""Demonstrations and training in the dot world, shared by the policy tests."""

import torch
from torch import Tensor

from tests.oracles import SPEC, DotPolicy, draw, move
from worldline.data.normalization import RobustNormalizer
from worldline.policies import ClonedPolicy, EncoderConfig, PolicyConfig
from worldline.types import Observation


def observe(position: Tensor) -> Observation:
    return Observation(images={"top": draw(position)}, pose=position, instruction=("go right",) * len(position))


def starts(n: int, seed: int = 0) -> Observation:
    """Dots on the left, anywhere from top to bottom."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.3, 0.7])
    return observe(torch.rand(n, 2, generator=generator) * spread + torch.tensor([0.12, 0.15]))


def demonstrations(episodes: int, chunk: int, frames: int = 10) -> tuple[Observation, Tensor]:
    """Every frame of an expert's episodes with the chunk it decided on there."""
    expert, now = DotPolicy(0.8, chunk=chunk), starts(episodes).pose
    positions, chunks = [], []
    for _ in range(frames):
        actions, _ = expert.act(observe(now), expert.reset(episodes), seeds=torch.arange(episodes))
        positions.append(now)
        chunks.append(actions)
        now = move(now, actions[:, :2])
    return observe(torch.cat(positions)), torch.cat(chunks)


def small_policy(kind: str, *, chunk: int = 2, sample: bool = False) -> ClonedPolicy:
    torch.manual_seed(0)
    config = PolicyConfig(
        kind=kind,
        encoder=EncoderConfig(channels=(16, 16, 16), features=32, shift=0),
        hidden=64,
        chunk=chunk,
        sample=sample,
    )
    wide = RobustNormalizer(low=(-1.0, -1.0), high=(1.0, 1.0))
    return ClonedPolicy(
        config, SPEC, action_normalizer=wide, pose_normalizer=RobustNormalizer(low=(0.0, 0.0), high=(1.0, 1.0))
    ).eval()


def clone(kind: str, *, steps: int = 250) -> ClonedPolicy:
    """A policy trained on 64 demonstrations."""
    policy = small_policy(kind).train()
    observation, chunks = demonstrations(64, policy.config.chunk)
    # what the pose says must not be needed: the network has to find the dot in the pixels
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(chunks), (64,), generator=generator)
        batch = Observation(
            images={"top": observation.images["top"][rows]},
            pose=torch.rand(64, 2, generator=generator),
            instruction=("go right",) * 64,
        )
        loss = policy.loss(batch, chunks[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()
