"""Two dense networks beside the transformer, each with a loss of its own; what they guess is one more input of it.

Attention over tokens learns some things late that dense layers learn in minutes, because the loss of the next frame hardly
asks for them: what one camera tells of another, and the arm's own motion to a millimetre. In a dream both are what goes
wrong, because errors of a frame are the start of the next one (docs/log.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STEP = 0.1  # about what a normalised pose changes by in a frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """What dense networks make of each frame. `views` is empty and `pose` None without them."""

    views: Mapping[str, Tensor]  # camera -> "b l c h w"
    pose: Tensor | None  # "b l p"

    def keep(self, frames: slice) -> "Guesses":
        views = {camera: latents[:, frames] for camera, latents in self.views.items()}
        return Guesses(views=views, pose=None if self.pose is None else self.pose[:, frames])


def dense(known: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(known, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out))
    )


class ViewGuess(nn.Module):
    """Guesses each camera's latents from what the *others* showed in the frame before, the poses and the action.

    It is denied the camera's own history, which nearly always says more and so would be all it learns from.
    """

    def __init__(
        self, width: int, shapes: Mapping[str, tuple[int, int, int]], keys: Mapping[str, str], known: int
    ) -> None:
        super().__init__()
        self.shapes, self.keys = dict(shapes), dict(keys)
        sizes = {camera: math.prod(shape) for camera, shape in shapes.items()}
        self.nets = nn.ModuleDict(
            {keys[c]: dense(sum(sizes.values()) - size + known, width, size) for c, size in sizes.items()}
        )

    def forward(self, previous: Mapping[str, Tensor], known: Tensor) -> dict[str, Tensor]:
        """`known` "b l n": poses and action. Returns camera -> "b l c h w"."""
        guesses = {}
        for camera, key in self.keys.items():
            others = [previous[c].flatten(2) for c in self.keys if c != camera]
            guesses[camera] = self.nets[key](torch.cat([*others, known], dim=-1)).unflatten(-1, self.shapes[camera])
        return guesses


class PoseGuess(nn.Module):
    """Guesses the next pose from the last one, its last change, and the last two action blocks: an arm lags its commands.

    Its input `motion` is made by `motion_of`. Where no action is told, the last pose is the guess.
    """

    def __init__(self, width: int, pose_dim: int, action_dim: int) -> None:
        super().__init__()
        self.pose_dim = pose_dim
        self.net = dense(2 * pose_dim + 2 * action_dim, width, pose_dim)

    def forward(self, motion: Tensor, action: Tensor, has_action: Tensor) -> Tensor:
        pose, change, before = motion.split([self.pose_dim, self.pose_dim, action.shape[-1]], dim=-1)
        moved = STEP * self.net(torch.cat([pose, change / STEP, before, action], dim=-1))
        return pose + moved * has_action[..., None]

    def follow(self, first: Tensor, actions: Tensor) -> Tensor:
        """The poses "b t p" that blocks "b t k*a" lead to from the pose `first` "b p" at rest, each from the guess before it."""
        motion, told, poses = motion_of(first, first, torch.zeros_like(actions[:, 0])), actions.new_ones(()), []
        for action in actions.unbind(1):
            last = motion[:, : self.pose_dim]
            poses.append(self(motion, action, told))
            motion = motion_of(poses[-1], last, action)
        return torch.stack(poses, 1)


def motion_of(pose: Tensor, before: Tensor, action: Tensor) -> Tensor:
    """ "... p + p + k*a": a pose without noise, its change since the pose `before` it, and the block that led to it.

    The first pose of a clip is its own `before` and its action is zeros: what moved it is not known.
    """
    return torch.cat([pose, pose - before, action], dim=-1)
