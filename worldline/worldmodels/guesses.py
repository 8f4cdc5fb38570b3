"""Two dense networks beside the transformer, each with a loss of its own; what they guess is one more input of it.

Attention over tokens learns some things late that dense layers learn in minutes, because the loss of the next frame hardly
asks for them: what one camera tells of another, and the arm's own motion to a millimetre. In a dream both are what goes
wrong, because errors of a frame are the start of the next one (docs/log.md).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    Where commands say how far to go (`aims`), they are also added up within learned bounds: the *aim*, the point to which they have
    sent the arm. It may lie far ahead of an arm that lags or is held up, and no pose tells of it. Where no action is told, the
    last pose is the guess. The input `motion` is made by `motion_of`.
    """

    def __init__(self, width: int, pose_dim: int, action_dim: int, *, aims: bool = False) -> None:
        super().__init__()
        self.pose_dim = pose_dim
        self.net = dense((3 if aims else 2) * pose_dim + 2 * action_dim, width, pose_dim)
        self.gain = nn.Linear(action_dim, pose_dim, bias=False) if aims else None
        self.bounds = nn.Parameter(torch.tensor([-1.5, 1.5])[:, None].repeat(1, pose_dim)) if aims else None

    def init_weights(self) -> None:
        """Before training the pose stays as it is, and so does the aim."""
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        if self.gain is not None:
            nn.init.zeros_(self.gain.weight)

    @torch.no_grad()
    def fit_gain(self, episodes: Iterable[tuple[Tensor, Tensor]], *, span: int = 8, ridge: float = 1e-2) -> None:
        """Start the gain from least squares: how poses change over `span` frames by the commands in between. From zero it hardly
        moves, because an aim that stays with the pose tells nothing. `episodes`: poses "e p" and blocks "e-1 k*a".
        """
        if self.gain is None:
            return
        width = self.gain.in_features
        products, targets = torch.zeros(width, width), torch.zeros(width, self.pose_dim)
        for poses, actions in episodes:
            if len(poses) > span:
                sums = actions.unfold(0, span, 1).sum(-1)
                products += sums.T @ sums
                targets += sums.T @ (poses[span:] - poses[:-span])
        scale = products.diagonal().mean().clamp(min=1e-9)
        self.gain.weight.copy_(torch.linalg.solve(products + ridge * scale * torch.eye(width), targets).T)

    def aim(self, aim: Tensor, action: Tensor) -> Tensor:
        """The aim "... p" after one more block. Without `aims` it has no dimensions, "... 0"."""
        if self.gain is None or self.bounds is None:
            return aim
        return torch.minimum(torch.maximum(aim + self.gain(action), self.bounds[0]), self.bounds[1])

    def start(self, pose: Tensor) -> Tensor:
        """The aim of an arm at rest: where it is."""
        return pose if self.gain is not None else pose[..., :0]

    def forward(self, motion: Tensor, action: Tensor, has_action: Tensor, aim: Tensor | None = None) -> Tensor:
        """`aim`: of the frame before; that frame's pose by default."""
        pose, change, before = motion.split([self.pose_dim, self.pose_dim, action.shape[-1]], dim=-1)
        known = [pose, change / STEP, before, action]
        if self.gain is not None:
            known.append(self.aim(pose if aim is None else aim, action) - pose)
        return pose + STEP * self.net(torch.cat(known, dim=-1)) * has_action[..., None]

    @torch.no_grad()
    def aims(self, poses: Tensor, actions: Tensor, first: Tensor) -> Tensor:
        """The aim at every frame "b e p" of poses "b e p" and blocks "b e-1 k*a"; rows begin at rest at frame `first` "b"."""
        aims = [self.start(poses[:, 0])]
        for i, action in enumerate(actions.unbind(1), start=1):
            begins = (first >= i)[:, None]
            aims.append(torch.where(begins, self.start(poses[:, i]), self.aim(aims[-1], action)))
        return torch.stack(aims, 1)

    def follow(
        self, poses: Tensor, actions: Tensor, aims: Tensor, first: Tensor, motion: Tensor | None = None
    ) -> Tensor:
        """The poses "b e-1 p" to which blocks "b e-1 k*a" lead from the first one, each from the guess before it.

        Rows begin at frame `first` "b": up to there the true pose is taken. `aims` "b e p": only the first frame's is. `motion`: of
        the first frame, for rows that began before it; at rest by default.
        """
        aim, guesses, told = aims[:, 0], [], actions.new_ones(())
        if motion is None:
            motion = motion_of(poses[:, 0], poses[:, 0], torch.zeros_like(actions[:, 0]))
        for i, action in enumerate(actions.unbind(1)):
            begins = (first >= i)[:, None]
            last = torch.where(begins, poses[:, i], motion[:, : self.pose_dim])
            before = torch.where(begins, torch.zeros_like(motion[:, self.pose_dim :]), motion[:, self.pose_dim :])
            if i:  # a row that begins here is at rest
                aim = torch.where(begins, self.start(poses[:, i]), aim)
            guesses.append(self(torch.cat([last, before], dim=-1), action, told, aim))
            aim = self.aim(aim, action)
            motion = motion_of(guesses[-1], last, action)
        return torch.stack(guesses, 1)


def motion_of(pose: Tensor, before: Tensor, action: Tensor) -> Tensor:
    """ "... p + p + k*a": a pose without noise, its change since the pose `before` it, and the block that led to it.

    The first pose of a clip is its own `before` and its action is zeros: what moved it is not known.
    """
    return torch.cat([pose, pose - before, action], dim=-1)


def pose_miss(guessed: Tensor, true: Tensor) -> Tensor:
    """ "b t", what guessed poses "b t p" miss. Contacts move an arm as it cannot foresee: they must not rule what it learns."""
    return F.smooth_l1_loss(guessed / STEP, true / STEP, beta=0.2, reduction="none").mean(2)
