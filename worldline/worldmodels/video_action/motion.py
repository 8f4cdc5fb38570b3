"""How the arm moves in a clip, as far as it is known, and what the network that foretells it misses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldline.worldmodels.guesses import PoseGuess, motion_of, pose_miss
from worldline.worldmodels.video_action.tokens import Known, follow_from

WEIGHT = 0.1  # of the guess in the loss: nothing else moves its weights, and a large gradient would shrink the others' when clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Of t frames, in the network's units."""

    poses: Tensor  # "n t p"
    actions: Tensor  # "n t-1 k*a"
    motion: Tensor  # "n t p+p+k*a" (`motion_of`)
    aims: Tensor  # "n t p"; "n t 0" where commands are not added up
    told: Tensor  # "n t-1" bool: the block is known, and so are the frames on either side of it


def moves_in(guess: PoseGuess | None, poses: Tensor, actions: Tensor, first: Tensor) -> Moves:
    """Of poses "n t p" and normalised blocks "n t-1 k*a", whose rows begin at rest at frame `first` "n".

    Blocks that are not finite are not known: the row begins anew after the last of them.
    """
    t = poses.shape[1]
    known = torch.isfinite(actions).all(2)
    since = torch.where(known, 0, torch.arange(1, t, device=poses.device)).amax(1) if t > 1 else first
    told = torch.arange(t - 1, device=poses.device) >= torch.maximum(first, since)[:, None]
    blocks = torch.where(told[..., None], actions, torch.zeros_like(actions))
    there = torch.arange(t - 1, device=poses.device) >= first[:, None]  # poses are known without the block
    before = torch.cat([poses[:, :1], torch.where(there[..., None], poses[:, :-1], poses[:, 1:])], 1)
    led_by = torch.cat([blocks.new_zeros(len(blocks), 1, blocks.shape[2]), blocks], 1)
    aims = poses[..., :0] if guess is None else guess.aims(poses, blocks, torch.maximum(first, since))
    return Moves(poses=poses, actions=blocks, motion=motion_of(poses, before, led_by), aims=aims, told=told)


def guess_miss(guess: PoseGuess, moves: Moves, known: Known, now: int, horizon: int) -> Tensor:
    """What the guessed pose misses: one frame ahead over all that is known, and from its own guesses over the horizon after frame `now`."""
    once = pose_miss(guess(moves.motion[:, :-1], moves.actions, moves.told, moves.aims[:, :-1]), moves.poses[:, 1:])
    ahead = slice(now, now + horizon)
    led = follow_from(guess, known, moves.actions[:, ahead])
    followed = pose_miss(led, moves.poses[:, now + 1 : now + 1 + horizon])
    return WEIGHT * (_mean_where(once, moves.told) + _mean_where(followed, moves.told[:, ahead]))


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
