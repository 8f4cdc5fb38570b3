"""What a prediction of coming frames and blocks misses, where it was asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldline.worldmodels.video_action.config import VideoActionConfig
from worldline.worldmodels.video_action.queries import Role, Roles
from worldline.worldmodels.video_action.tokens import Future


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Weighted squared errors, and how much was asked for: sums over rows, so that batches in parts add up."""

    frames: Tensor
    poses: Tensor
    asked_frames: Tensor
    actions: Tensor
    asked_actions: Tensor

    def __add__(self, other: "Errors") -> "Errors":
        names = ("frames", "poses", "asked_frames", "actions", "asked_actions")
        return Errors(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def loss(self, config: VideoActionConfig) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over what was asked for, added up by the config's weights, and detached metrics."""
        frames, poses = (x / self.asked_frames.clamp(min=1) for x in (self.frames, self.poses))
        actions = self.actions / self.asked_actions.clamp(min=1)
        loss = frames + config.pose_weight * poses + config.action_weight * actions
        metrics = {"frame_error": frames, "pose_error": poses, "action_error": actions}
        return loss, {name: x.detach() for name, x in metrics.items()}


def errors_of(made: Future, truth: Future, roles: Roles, frame_weight: Tensor, action_weight: Tensor) -> Errors:
    """Of what is denoised. Weights "n": rows of weight 0 were shown the answer and do not count."""
    frames = (roles.frames == Role.DENOISED) * (frame_weight > 0)[:, None]
    actions = (roles.actions == Role.DENOISED) * (action_weight > 0)[:, None]
    missed = {c: (made.frames[c] - x).square().mean((2, 3, 4)) for c, x in truth.frames.items()}
    per_frame = torch.stack(list(missed.values())).mean(0)
    per_pose = (made.poses - truth.poses).square().sum(2) / max(truth.poses.shape[2], 1)
    per_block = (made.actions - truth.actions).square().mean(2)
    return Errors(
        frames=(per_frame * frames * frame_weight[:, None]).sum(),
        poses=(per_pose * frames * frame_weight[:, None]).sum(),
        asked_frames=frames.sum(),
        actions=(per_block * actions * action_weight[:, None]).sum(),
        asked_actions=actions.sum(),
    )
