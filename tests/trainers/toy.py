"""The dot world recorded as a dataset, and the smallest configs of every stage."""

from pathlib import Path

import torch
from torch import Tensor

from tests.oracles import GOAL, SPEC, K, draw, move
from worldline.data import write_dataset
from worldline.types import Episode

FRAMES = 12


def dot_episode(index: int, expert: bool) -> Episode:
    """Experts walk right along a wave, and arrive; the others drift left and never do."""
    generator = torch.Generator().manual_seed(index)
    position = torch.rand(1, 2, generator=generator) * torch.tensor([0.2, 0.8]) + 0.1
    positions, blocks = [position], []
    for _ in range(FRAMES - 1):
        noise = 0.03 * torch.randn(1, K, 2, generator=generator)
        if expert:
            wish = torch.stack([torch.full((1,), 0.8), 0.8 * torch.cos(7 * position[:, 0])], -1)
        else:
            wish = 1.5 * torch.rand(1, 2, generator=generator) - torch.tensor([0.9, 0.75])
        blocks.append((wish[:, None] + noise).clamp(-1, 1))
        position = move(position, blocks[-1])
        positions.append(position)
    poses: Tensor = torch.cat(positions)
    done = poses[:, 0] > GOAL
    return Episode(
        frames={"top": draw(poses)},
        poses=poses,
        actions=torch.cat(blocks),
        states=poses.clone(),
        rewards=None,
        frame_success=done,
        success=bool(done.any()),
        terminated=False,
        truncated=True,
        instruction="go right",
        spec=SPEC,
        index=index,
        provenance={"policy": "dot", "cause": "expert" if expert else "random", "seed": str(index)},
    )


def write_dots(root: Path, episodes: int = 32, split_seed: int = 9) -> Path:
    """Half experts, half random walks."""
    recorded = (dot_episode(i, expert=i % 2 == 0) for i in range(episodes))
    return write_dataset(root, recorded, codec="libx264", crf=10, split_seed=split_seed)
