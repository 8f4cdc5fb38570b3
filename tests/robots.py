"""A second robot beside the dot world of `oracles`: a dot pulled by three cables, seen by two other cameras, at another rate."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.oracles import SPEC as DOT
from tests.oracles import dot_clip, dot_tokenizer, draw
from worldline.data import RobustNormalizer, write_dataset
from worldline.tokenizers import PixelPatches
from worldline.types import ActionSpec, CameraSpec, Clip, Episode
from worldline.worldmodels import Robot

K = 1
CABLES = replace(
    DOT,
    cameras=(CameraSpec(name="front.b", height=16, width=16), CameraSpec(name="low", height=8, width=16)),
    fps=5.0,
    control_steps=K,
    action=ActionSpec(
        names=("a", "b", "c"),
        low=(-1.0,) * 3,
        high=(1.0,) * 3,
        kind="velocity",
        space="joint",
        rate_hz=5.0,
        source="commanded",
        embodiment="cables/v1.0",
    ),
    pose_names=("x", "y", "r"),
)
DOTS, TRIPOD = DOT.action.embodiment, CABLES.action.embodiment
_ANGLES = torch.tensor([0.0, 2.0944, 4.1888])
PULLS = torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1)


def pull(position: Tensor, block: Tensor) -> Tensor:
    """Next position "n 2" after a block "n 1 3": each cable pulls its own way."""
    return (position + 0.1 * block[:, 0].clamp(-1, 1) @ PULLS).clamp(0.1, 0.9)


def views(position: Tensor) -> dict[str, Tensor]:
    """uint8 frames of both cameras: the dot mirrored and dark on white, and its lower half."""
    picture = draw(position)
    return {"front.b": 255 - picture.flip(-1), "low": picture[..., 8:, :]}


def pose_of(position: Tensor) -> Tensor:
    return torch.cat([position, (position - 0.5).norm(dim=-1, keepdim=True)], -1)


def cable_clip(batch: int, frames: int, seed: int) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    position = torch.rand(batch, 2, generator=generator) * 0.8 + 0.1
    trend = torch.randn(batch, 1, 1, 3, generator=generator)
    actions = (trend + 0.5 * torch.randn(batch, frames - 1, K, 3, generator=generator)).clamp(-1, 1)
    positions = [position]
    for i in range(frames - 1):
        positions.append(pull(positions[-1], actions[:, i]))
    where = torch.stack(positions, 1)
    video = {c: v.unflatten(0, (batch, frames)) for c, v in views(where.flatten(0, 1)).items()}
    return Clip(frames=video, actions=actions, poses=pose_of(where), instruction=("pull",) * batch)


def cable_tokenizer() -> PixelPatches:
    tokenizer = PixelPatches(CABLES.cameras, size=4)
    tokenizer.fit_statistics(cable_clip(64, 4, 99).frames)
    return tokenizer


def clips(batch: int, frames: int, seed: int, names: tuple[str, ...] = (DOTS, TRIPOD)) -> dict[str, Clip]:
    """Encoded clips of the robots named."""
    made = {DOTS: (dot_clip, DOT_EYES), TRIPOD: (cable_clip, CABLE_EYES)}
    found = {}
    for name in names:
        clip = made[name][0](batch, frames, seed)
        found[name] = replace(clip, frames=made[name][1].encode(clip.frames))
    return found


def robots() -> dict[str, Robot]:
    made = ((DOT, dot_clip(64, 4, 5), DOT_EYES), (CABLES, cable_clip(64, 4, 5), CABLE_EYES))
    return {
        spec.action.embodiment: Robot(
            spec=replace(spec, latent=eyes.latent_spec),
            action_normalizer=RobustNormalizer.fit(clip.actions),
            pose_normalizer=RobustNormalizer.fit(clip.poses),
        )
        for spec, clip, eyes in made
    }


DOT_EYES, CABLE_EYES = dot_tokenizer(), cable_tokenizer()


def write_cables(root: Path, episodes: int = 20, frames: int = 10) -> Path:
    """The cable robot recorded as a dataset."""

    def episode(index: int) -> Episode:
        clip = cable_clip(1, frames, index)
        return Episode(
            frames={c: v[0] for c, v in clip.frames.items()},
            poses=clip.poses[0],
            actions=clip.actions[0],
            states=clip.poses[0, :, :2].clone(),
            rewards=None,
            frame_success=None,
            success=None,
            terminated=False,
            truncated=True,
            instruction="pull",
            spec=CABLES,
            index=index,
            provenance={"policy": "cables", "cause": "random", "seed": str(index)},
        )

    return write_dataset(root, (episode(i) for i in range(episodes)), codec="libx264", crf=10, split_seed=9)
