"""Unified World Models (2504.02792): coming frames and action blocks are denoised together, each at a level of its own.

- The vector that modulates the trunk embeds both levels, of frames and of actions; every token is marked with its own, so that given and
  denoised ones may stand side by side. Given is level 0. Absent is no level: there is no token, and the vector says so. (The published
  code marks what is absent by noise, and tells its sampler a level at which 14% of it would be signal.)
- The network predicts what is clean; the loss is the flow-matching loss, its weight 1/level^2 capped.
- Observations are tokens like the rest, not a residual network's features: they are what the tokenizer gives anyway.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from worldline.diffusion import add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.worldmodels.layers import LevelEmbedding
from worldline.worldmodels.ports import Body
from worldline.worldmodels.video_action.config import VideoActionConfig
from worldline.worldmodels.video_action.errors import Errors, errors_of
from worldline.worldmodels.video_action.queries import Role, Roles
from worldline.worldmodels.video_action.tokens import Draw, Future, Known, Tokens
from worldline.worldmodels.video_action.trunk import Trunk, init_linear


class UnifiedWorld(nn.Module):
    """The UWM design. All in the network's units."""

    def __init__(
        self,
        config: VideoActionConfig,
        body: Body,
        text_dim: int,
    ) -> None:
        super().__init__()
        self.config, shapes = config, body.shapes
        width = config.trunk.width
        self.tokens = Tokens(config, body, text_dim)
        self.trunk = Trunk(config.trunk)
        self.frame_level, self.action_level, self.own_level = (LevelEmbedding(width) for _ in range(3))
        self.no_frames, self.no_actions = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        cells = {c: channels * config.trunk.patch**2 for c, (channels, _, _) in shapes.items()}
        self.to_patch = nn.ModuleDict({self.tokens.keys[c]: nn.Linear(width, cells[c]) for c in shapes})
        self.to_pose, self.to_action = nn.Linear(width, body.pose_dim), nn.Linear(width, body.action_dim)
        init_linear(self)
        self.trunk.init_weights()
        self.tokens.init_weights()
        for head in (*self.to_patch.values(), self.to_pose):
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)

    def predict(self, known: Known, shown: Future, roles: Roles, frame_level: Tensor, action_level: Tensor) -> Future:
        """What is clean. `shown` holds given values as they are and others at their row's level, "n". Zeros where there is no token."""
        own_frames = frame_level[:, None] * (roles.frames == Role.DENOISED)
        own_actions = action_level[:, None] * (roles.actions == Role.DENOISED)
        level = known.poses.new_zeros(known.poses.shape[:2]) if known.level is None else known.level
        # what is mostly noise is turned down: pure noise says nothing, and the network should not have to learn that
        signal, action_signal = 1 - own_frames, (1 - own_actions)[..., None]
        turned = {c: x * signal[..., None, None, None] for c, x in shown.frames.items()}
        sequence = self.tokens.sequence(
            known,
            Future(frames=turned, poses=shown.poses * signal[..., None], actions=shown.actions * action_signal),
            roles,
            seen_marks=self.own_level(level),
            frame_marks=self.own_level(own_frames),
            action_marks=self.own_level(own_actions),
        )
        vector = _told(self.frame_level, frame_level, roles.frames, self.no_frames)
        vector = vector + _told(self.action_level, action_level, roles.actions, self.no_actions)
        made = self.trunk(sequence, vector)
        views, poses, actions = self.tokens.split(sequence, made)
        patches = self.tokens.current(known)
        horizon = self.config.horizon
        frames = {}
        for c, x in known.frames.items():
            clean = x.new_zeros(len(x), horizon, *x.shape[2:])
            if c in views:
                changed = patches[c][:, None] + self.to_patch[self.tokens.keys[c]](views[c])
                clean[:, sequence.frames] = self.tokens.joined(c, changed).to(clean)
            frames[c] = clean
        clean_poses, clean_actions = torch.zeros_like(shown.poses), torch.zeros_like(shown.actions)
        if len(sequence.frames):
            clean_poses[:, sequence.frames] = (sequence.foretold[:, sequence.frames] + self.to_pose(poses)).to(
                clean_poses
            )
        clean_actions[:, sequence.actions] = self.to_action(actions).to(clean_actions)
        return Future(frames=frames, poses=clean_poses, actions=clean_actions)

    def errors(self, known: Known, truth: Future, roles: Roles, generator: torch.Generator | None) -> Errors:
        """Of what is asked for, weighted; levels of frames and actions are drawn apart."""
        config, device, n = self.config, truth.poses.device, len(truth.poses)
        frame_level = config.frame_levels.sample((n,), generator).to(device)
        action_level = config.action_levels.sample((n,), generator).to(device)
        level = {"frames": frame_level, "actions": action_level}
        noise = truth.like(torch.randn(truth.flat().shape, generator=generator).to(device))
        noisy = Future(
            frames={c: add_noise(linear_path, x, noise.frames[c], frame_level) for c, x in truth.frames.items()},
            poses=add_noise(linear_path, truth.poses, noise.poses, frame_level),
            actions=add_noise(linear_path, truth.actions, noise.actions, action_level),
        )
        made = self.predict(known, truth.pick(roles, noisy), roles, frame_level, action_level)
        weight = {k: (1 / x.clamp(min=1e-3) ** 2).clamp(max=config.max_weight) * (x > 0) for k, x in level.items()}
        return errors_of(made, truth, roles, weight["frames"], weight["actions"])

    def sample(self, known: Known, given: Future, roles: Roles, draw: Draw) -> Future:
        """What is asked for, given the rest. One pass of the trunk a step."""
        start, levels = noise_like(given, roles, draw), solver_levels(draw.steps)
        if draw.plan is not None and draw.warm < 1:
            levels = draw.warm * levels
            at = torch.full((len(draw.seeds),), draw.warm, device=draw.plan.device)
            start = replace(start, actions=add_noise(linear_path, draw.plan, start.actions, at))

        def predict(flat: Tensor, level: Tensor) -> Tensor:
            shown = given.pick(roles, given.like(flat))
            made = self.predict(known, shown, roles, level, level)
            if draw.steer is not None:
                made = replace(made, actions=draw.steer(made.actions, level))
            return made.flat()

        return given.pick(roles, given.like(sample_euler(predict, start.flat(), levels, linear_path)))


def _told(embed: LevelEmbedding, level: Tensor, roles: Tensor, absent: Tensor) -> Tensor:
    """What the row's vector says of one modality: its level, 0 if all that is there is given, or that it is absent."""
    level = level * (roles == Role.DENOISED).any(1)
    gone = (roles == Role.ABSENT).all(1)
    return torch.where(gone[:, None], absent, embed(level))


def noise_like(future: Future, roles: Roles, draw: Draw) -> Future:
    """Noise of a row's seed and frame, the same whatever is asked for: a stream for each camera, for poses and for actions. Zeros for
    frames that no row has."""

    def of(x: Tensor, stream: int) -> Tensor:
        return row_noise(draw.seeds, draw.frame, 0, tuple(x.shape[1:]), stream=stream).to(x)

    actions = of(future.actions, 1) if draw.noise is None else draw.noise
    if not bool((roles.frames != Role.ABSENT).any()):
        frames, poses = {c: torch.zeros_like(x) for c, x in future.frames.items()}, torch.zeros_like(future.poses)
        return Future(frames=frames, poses=poses, actions=actions)
    frames = {c: of(x, 2 + i) for i, (c, x) in enumerate(sorted(future.frames.items()))}
    return Future(frames=frames, poses=of(future.poses, 0), actions=actions)
