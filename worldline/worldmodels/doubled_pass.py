"""The doubled pass of training: one clip as two streams of frames, history and targets, in one sequence.

A clip of frames 0..T becomes history frames 0..T-1 at levels of their own and target frames 1..T at theirs. With
`teacher_forcing_mask` a target sees exactly what streaming will show it: finished history and itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from worldline.diffusion import add_noise, linear_path
from worldline.types import Clip
from worldline.worldmodels.guesses import motion_of
from worldline.worldmodels.ports import FrameBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkClip:
    """A clip in the network's units: whitened latents, normalised poses, normalised flattened blocks."""

    frames: Mapping[str, Tensor]  # camera -> "b t c h w"
    poses: Tensor  # "b t p"
    actions: Tensor  # "b t-1 k*a"
    text: Tensor | None  # "b e"
    aims: Tensor | None  # "b t p": to where commands have added up by each frame (`PoseGuess`)
    acted: Tensor | None = None  # "b" bool: of which rows the actions are known, the history's as well; None: of all

    def after(self, lead: int) -> "NetworkClip":
        """Without the first `lead` frames."""
        frames = {camera: z[:, lead:] for camera, z in self.frames.items()}
        return NetworkClip(
            frames=frames,
            poses=self.poses[:, lead:],
            actions=self.actions[:, lead:],
            text=self.text,
            aims=None if self.aims is None else self.aims[:, lead:],
            acted=self.acted,
        )


def first_frames(clip: Clip) -> Tensor:
    """ "b": each row's first frame that is there, its lead counted."""
    rows = torch.zeros(len(clip.poses), dtype=torch.long)
    return rows if clip.led is None else rows + clip.lead - clip.led.cpu()


def doubled_batch(
    clip: NetworkClip,
    past: NetworkClip,
    *,
    history_level: Tensor,
    target_level: Tensor,
    told: Tensor | None,
    seen: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> FrameBatch:
    """Network input of the two streams, 2 (t - 1) frames.

    Args:
        clip: what targets are made of.
        past: what history is made of: the same clip, or what was imagined in its place.
        history_level, target_level: "b t-1".
        told: "b t-1" bool, whether a target is told its action (None: all are); in rows that are `acted`.
        seen: camera -> "b t-1" bool, whether the history frames hold that camera; all do where it is not named.
        generator: of the noise, which is drawn on the CPU so that it does not depend on the device.
    """
    frames, poses, actions = clip.frames, clip.poses, clip.actions
    b, t = poses.shape[:2]

    def noised(clean: Tensor, level: Tensor) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return add_noise(linear_path, clean, noise, level)

    history = {camera: noised(z[:, :-1], history_level) for camera, z in past.frames.items()}
    target = {camera: noised(z[:, 1:], target_level) for camera, z in frames.items()}
    pose_history, pose_target = noised(past.poses[:, :-1], history_level), noised(poses[:, 1:], target_level)
    for camera, there in seen.items():
        history[camera] = history[camera] * there[..., None, None, None]
    all_there = torch.ones(b, t - 1, dtype=torch.bool, device=poses.device)
    held = {camera: seen.get(camera, all_there) for camera in frames}
    before = torch.cat([past.poses[:, :1], past.poses[:, :-2]], 1)
    motion = motion_of(past.poses[:, :-1], before, shift(actions))  # of the frame before each target
    has_action = torch.ones(b, 2 * t - 2, dtype=torch.bool, device=poses.device)
    has_action[:, 0] = False
    if told is not None:
        has_action[:, t - 1 :] = told
    if clip.acted is not None:
        has_action &= clip.acted[:, None]
    time = torch.arange(t, device=poses.device)
    return FrameBatch(
        latents={camera: torch.cat([history[camera], target[camera]], 1) for camera in frames},
        previous={camera: torch.cat([shift(history[camera]), history[camera]], 1) for camera in frames},
        pose=torch.cat([pose_history, pose_target], 1),
        previous_pose=torch.cat([shift(pose_history), pose_history], 1),
        motion=torch.cat([shift(motion), motion], 1),
        level=torch.cat([history_level, target_level], 1),
        action=torch.cat([shift(actions), actions], 1),
        has_action=has_action,
        time=torch.cat([time[:-1], time[1:]]),
        seen={camera: torch.cat([there, all_there], 1) for camera, there in seen.items()},
        previous_seen={camera: torch.cat([shift(there), there], 1) for camera, there in held.items()},
        aim=None if clip.aims is None else torch.cat([shift(clip.aims[:, :-1]), clip.aims[:, :-1]], 1),
        text=clip.text,
    )


def shift(x: Tensor) -> Tensor:
    """Frame i gets what stood at frame i-1, the first frame zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
