"""Toy episodes whose frames, poses and actions all name the frame they belong to, so that any misalignment shows."""

from pathlib import Path

import torch
from torch import Tensor

from worldline.data import DatasetWriter, LeRobotDataset
from worldline.types import ActionSpec, CameraSpec, Episode, WorldSpec

LEVEL = 5  # grey levels between consecutive frames: far above coding noise


def toy_spec(control_steps: int = 3, cameras: tuple[CameraSpec, ...] | None = None) -> WorldSpec:
    return WorldSpec(
        cameras=cameras
        or (CameraSpec(name="front", height=64, width=64), CameraSpec(name="wrist", height=48, width=80)),
        fps=20.0,
        control_steps=control_steps,
        action=ActionSpec(
            names=("dx", "dy"),
            low=(-1.0, -1.0),
            high=(1.0, 1.0),
            kind="delta",
            space="cartesian",
            rate_hz=20.0 * control_steps,
            source="commanded",
            embodiment="toy",
        ),
        pose_names=("x", "y", "grip"),
    )


def toy_frames(length: int, camera: CameraSpec, offset: int = 0) -> Tensor:
    """Frame i: grey of level 20 + 5 i, with a soft ramp of 4 levels across."""
    ramp = torch.linspace(0, 4, camera.width).expand(3, camera.height, camera.width)
    levels = 20 + LEVEL * torch.arange(length).float() + offset
    return (levels.view(-1, 1, 1, 1) + ramp).round().to(torch.uint8)


def frame_number(frames: Tensor) -> list[int]:
    """The index that `toy_frames` painted, read back from decoded frames "t c h w"."""
    return [round((float(frame.float().mean()) - 22) / LEVEL) for frame in frames]


def toy_episode(index: int, length: int = 12, spec: WorldSpec | None = None, **changes) -> Episode:
    """Action (frame i, control step j) = (i + j / 10, index) / 50; pose i = (i, index, 0)."""
    spec = spec or toy_spec()
    step = torch.arange(spec.control_steps) / 10
    time = torch.arange(length - 1)[:, None] + step[None]
    values = {
        "frames": {c.name: toy_frames(length, c) for c in spec.cameras},
        "actions": torch.stack([time, torch.full_like(time, float(index))], dim=-1) / 50,
        "poses": torch.stack([torch.arange(length).float(), torch.full((length,), index), torch.zeros(length)], dim=-1),
        "states": torch.randn(length, 4, generator=torch.Generator().manual_seed(index)),
        "rewards": torch.linspace(0, 1, length - 1),
        "frame_success": torch.arange(length) >= length - 3,
        "success": index % 2 == 0,
        "terminated": False,
        "truncated": True,
        "instruction": f"move to {index % 2}",
        "spec": spec,
        "index": index,
        "provenance": {"policy": "toy", "cause": "expert" if index % 2 == 0 else "noise", "seed": str(index)},
    }
    return Episode(**(values | changes))


def stage(writer: DatasetWriter, episode: Episode, **changes) -> None:
    names = ("frames", "actions", "poses", "states", "rewards", "frame_success", "success", "terminated", "truncated")
    values = {name: getattr(episode, name) for name in (*names, "instruction", "provenance")}
    writer.stage(episode.index, **(values | changes))


def toy_dataset(
    root: Path, lengths: tuple[int, ...] = (12, 9, 12, 5), spec: WorldSpec | None = None, **settings
) -> LeRobotDataset:
    writer = DatasetWriter(root, spec or toy_spec(), **settings)
    for index, length in enumerate(lengths):
        stage(writer, toy_episode(index, length, spec))
    return LeRobotDataset(writer.finish())
