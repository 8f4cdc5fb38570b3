"""Unified Video Action (2503.00200): one masked joint latent of video and actions, and light diffusion heads that read it.

- The trunk sees no noise. What is asked for is masked at its input, what is given is shown; it answers with a latent for every token. Two
  small networks denoise from it, token by token: one for patches and poses, one for action blocks. So acting runs the trunk once, over few
  tokens, and then the action head: the video head is not called.
- In training part of the coming frames' places is shown even where frames are asked for (one choice of places for all frames of a row, as
  published), which is what `decode_rounds` relies on: places are then filled in over several passes.
- Departures: actions are tokens of their own beside those of frames, not channels of them, so that what is absent can be left out; given
  actions are shown in every query that has them (in the published code in one mode of five alone, and the released model hardly
  looks at them).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.diffusion import LevelDistribution, add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.worldmodels.layers import LevelEmbedding, cut
from worldline.worldmodels.ports import Body
from worldline.worldmodels.video_action.config import VideoActionConfig, still_masked
from worldline.worldmodels.video_action.errors import Errors
from worldline.worldmodels.video_action.queries import Role, Roles
from worldline.worldmodels.video_action.tokens import Draw, Future, Known, Tokens
from worldline.worldmodels.video_action.trunk import Trunk, init_linear, modulated
from worldline.worldmodels.video_action.uwm import noise_like


class TokenHead(nn.Module):
    """Denoises single tokens: residual blocks modulated by the joint latent and the level (MAR's head, 2406.11838).

    `base` is what an untrained head answers, and the change from it what it learns.
    """

    def __init__(self, size: int, latent: int, width: int, depth: int) -> None:
        super().__init__()
        self.into = nn.Linear(2 * size, width)
        self.level, self.condition = LevelEmbedding(width), nn.Linear(latent, width)
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.out = nn.Linear(width, size)

    def forward(self, x: Tensor, level: Tensor, latent: Tensor, base: Tensor) -> Tensor:
        """The clean tokens "m size" of `x` at `level` "m", from latents "m d"."""
        condition = self.condition(latent)
        h = (
            self.into(torch.cat([x * (1 - level)[:, None], base], -1)) + condition
        )  # pure noise is turned down to nothing
        vector = F.silu(self.level(level) + condition)
        for modulation, layer in zip(self.modulations, self.layers):
            shift, scale, gate = modulation(vector).chunk(3, -1)
            h = h + gate * layer(modulated(h, shift, scale))
        return base + self.out(h)


@dataclass(frozen=True, slots=True, kw_only=True)
class JointLatent:
    """The trunk's answer for the tokens that some row has, and which frames and blocks those are."""

    views: Mapping[str, Tensor]  # camera -> "n f s d"
    poses: Tensor  # "n f d"
    actions: Tensor  # "n f d"
    frames: Tensor  # indices of the frames
    blocks: Tensor  # and of the blocks
    foretold: Tensor  # "n f p", where given blocks take the arm, of all frames


class UnifiedVideoAction(nn.Module):
    """The UVA design. All in the network's units."""

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
        self.history_level = LevelEmbedding(width)
        self.masked, self.shown = nn.Parameter(torch.randn(3, width)), nn.Parameter(torch.randn(3, width))
        self.vector = nn.Parameter(torch.zeros(width))
        cells = {c: channels * config.trunk.patch**2 for c, (channels, _, _) in shapes.items()}
        size = {"latent": width, "width": config.head_width, "depth": config.head_depth}
        self.video_head = nn.ModuleDict({self.tokens.keys[c]: TokenHead(cells[c], **size) for c in shapes})
        self.pose_head = TokenHead(body.pose_dim, **size) if body.pose_dim else None
        self.action_head = TokenHead(body.action_dim, **size)
        init_linear(self)
        self.trunk.init_weights()
        self.tokens.init_weights()
        for head in (*self.video_head.values(), self.pose_head, self.action_head):
            if isinstance(head, TokenHead):
                nn.init.zeros_(head.out.weight)

    # --- the joint latent ---------------------------------------------------------------------------------------------

    def latent(self, known: Known, given: Future, roles: Roles, revealed: Tensor | None = None) -> JointLatent:
        """One pass of the trunk.

        Args:
            revealed: "n s", places of the coming frames that are shown although the frames are asked for, all cameras' in a row.
        """
        frame_shown, action_shown = roles.frames == Role.GIVEN, roles.actions == Role.GIVEN
        places = torch.zeros(len(known.poses), self.tokens.frame_size, dtype=torch.bool, device=known.poses.device)
        if revealed is not None:
            places = F.pad(revealed, (0, 1))  # the pose is not shown along
        seen = frame_shown[..., None] | places[:, None]  # "n f s"
        at, shown = 0, {}
        for c, x in given.frames.items():
            count = self.tokens.places[c]
            patches = cut(x, self.config.trunk.patch) * seen[..., at : at + count, None]
            shown[c] = self.tokens.joined(c, patches)
            at += count
        values = Future(
            frames=shown, poses=torch.zeros_like(given.poses), actions=given.actions * action_shown[..., None]
        )
        level = known.poses.new_zeros(known.poses.shape[:2]) if known.level is None else known.level
        kinds = torch.cat([torch.zeros(self.tokens.frame_size - 1), torch.ones(1)]).long().to(seen.device)
        marks = torch.where(seen[..., None], self.shown[kinds], self.masked[kinds])
        sequence = self.tokens.sequence(
            known,
            values,
            roles,
            seen_marks=self.history_level(level),
            frame_marks=marks,
            action_marks=torch.where(action_shown[..., None], self.shown[2], self.masked[2]),
        )
        made = self.trunk(sequence, self.vector.expand(len(known.poses), -1))
        views, poses, actions = self.tokens.split(sequence, made)
        return JointLatent(
            views=views,
            poses=poses,
            actions=actions,
            frames=sequence.frames,
            blocks=sequence.actions,
            foretold=sequence.foretold,
        )

    # --- training -----------------------------------------------------------------------------------------------------

    def errors(self, known: Known, truth: Future, roles: Roles, generator: torch.Generator | None) -> Errors:
        """Of what is asked for, weighted: each token at `head_draws` levels."""
        config, device = self.config, truth.poses.device
        n, s = len(truth.poses), self.tokens.frame_size - 1
        low, high = config.masked
        share = low + (high - low) * torch.rand(n, 1, generator=generator)
        revealed = (torch.rand(n, s, generator=generator) >= share).to(device)
        found = self.latent(known, truth, roles, revealed)
        patches = self.tokens.current(known)
        frames = (roles.frames == Role.DENOISED)[:, found.frames]
        zero = truth.poses.new_zeros(())
        total = {"frames": zero, "poses": zero}
        asked_frames = frames.sum()
        at, per_camera = 0, []
        for c, latent in found.views.items():
            count = self.tokens.places[c]
            asked = frames[..., None] & ~revealed[:, None, at : at + count]
            at += count
            target = cut(truth.frames[c][:, found.frames], config.trunk.patch)
            base = patches[c][:, None].expand_as(target)
            missed = self._missed(self._video(c), target, latent, base, config.frame_levels, asked, generator)
            per_camera.append(missed / asked.sum().clamp(min=1))
        if per_camera:
            total["frames"] = torch.stack(per_camera).mean() * asked_frames
            if self.pose_head is not None:
                target = truth.poses[:, found.frames]
                base = found.foretold[:, found.frames]
                missed = self._missed(self.pose_head, target, found.poses, base, config.frame_levels, frames, generator)
                total["poses"] = missed
        blocks = (roles.actions == Role.DENOISED)[:, found.blocks]
        target = truth.actions[:, found.blocks]
        actions = self._missed(
            self.action_head, target, found.actions, torch.zeros_like(target), config.action_levels, blocks, generator
        )
        return Errors(**total, asked_frames=asked_frames, actions=actions, asked_actions=blocks.sum())

    def _video(self, camera: str) -> TokenHead:
        head = self.video_head[self.tokens.keys[camera]]
        assert isinstance(head, TokenHead)
        return head

    def _missed(
        self,
        head: TokenHead,
        target: Tensor,
        latent: Tensor,
        base: Tensor,
        levels: LevelDistribution,
        asked: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Weighted squared errors of the tokens that are `asked` for, mean over their numbers and draws, added up."""
        if not bool(asked.any()):
            return target.new_zeros(())
        draws = self.config.head_draws
        clean, z, b = (x[asked].repeat(draws, 1) for x in (target, latent, base))
        level = levels.sample((len(clean),), generator).to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        made = head(add_noise(linear_path, clean, noise, level), level, z, b)
        weight = (1 / level.clamp(min=1e-3) ** 2).clamp(max=self.config.max_weight) * (level > 0)
        return (weight * (made - clean).square().mean(1)).sum() / draws

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(self, known: Known, given: Future, roles: Roles, draw: Draw) -> Future:
        """What is asked for, given the rest: one pass of the trunk (or `rounds`, where a video is asked for), `steps` of the heads."""
        start, levels = noise_like(given, roles, draw), solver_levels(draw.steps)
        s = self.tokens.frame_size - 1
        asks = bool((roles.frames == Role.DENOISED).any())
        rounds = draw.rounds if asks else 1
        order = row_noise(draw.seeds, draw.frame, 0, (s,), stream=99).argsort(1).argsort(1) if rounds > 1 else None
        made, revealed = given, None
        found = self.latent(known, made, roles)
        for i in range(rounds):
            found = self.latent(known, made, roles, revealed) if i else found
            if asks:
                fresh = given.pick(roles, self._decoded(known, found, start, levels))
                made = fresh if revealed is None else self._keep(made, fresh, revealed)
            if order is not None:
                revealed = order < math.ceil(s * (1 - still_masked(rounds, i + 1)))
        actions = made.actions
        if bool((roles.actions == Role.DENOISED).any()):
            actions = self._acted(found, start, levels, draw, actions)
        return given.pick(roles, Future(frames=made.frames, poses=made.poses, actions=actions))

    def _keep(self, before: Future, fresh: Future, shown: Tensor) -> Future:
        """The places already shown as they were, the others fresh."""
        at, frames = 0, {}
        for c, x in before.frames.items():
            count = self.tokens.places[c]
            mine = shown[:, None, at : at + count, None]
            at += count
            old, new = cut(x, self.config.trunk.patch), cut(fresh.frames[c], self.config.trunk.patch)
            frames[c] = self.tokens.joined(c, torch.where(mine, old, new))
        return Future(frames=frames, poses=fresh.poses, actions=before.actions)

    def _decoded(self, known: Known, found: JointLatent, noise: Future, levels: Tensor) -> Future:
        """Frames and poses by the video head; zeros where there is no token."""
        patches = self.tokens.current(known)
        frames = {}
        for c, latent in found.views.items():
            x = cut(noise.frames[c][:, found.frames], self.config.trunk.patch)
            base = patches[c][:, None].expand_as(x)
            clean = torch.zeros_like(noise.frames[c])
            clean[:, found.frames] = self.tokens.joined(c, _denoised(self._video(c), x, latent, base, levels)).to(clean)
            frames[c] = clean
        poses = torch.zeros_like(noise.poses)
        if self.pose_head is not None:
            x = noise.poses[:, found.frames]
            base = found.foretold[:, found.frames]
            poses[:, found.frames] = _denoised(self.pose_head, x, found.poses, base, levels).to(poses)
        return Future(frames=frames, poses=poses, actions=noise.actions)

    def _acted(self, found: JointLatent, noise: Future, levels: Tensor, draw: Draw, actions: Tensor) -> Tensor:
        x = noise.actions[:, found.blocks]
        if draw.plan is not None and draw.warm < 1:
            at = torch.full((len(x),), draw.warm, device=x.device)
            x, levels = add_noise(linear_path, draw.plan[:, found.blocks], x, at), draw.warm * levels
        made = actions.clone()
        move, whole, places = draw.steer, torch.zeros_like(actions), found.blocks

        def steer(clean: Tensor, level: Tensor) -> Tensor:
            assert move is not None
            shown = whole.clone()
            shown[:, places] = clean.view_as(x)
            return move(shown, level[: len(x)])[:, places].reshape(clean.shape)

        base = torch.zeros_like(x)
        made[:, found.blocks] = _denoised(self.action_head, x, found.actions, base, levels, steer if move else None).to(
            made
        )
        return made


def _denoised(
    head: TokenHead,
    x: Tensor,
    latent: Tensor,
    base: Tensor,
    levels: Tensor,
    steer: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens "... size" denoised one by one; `steer` as in `Draw`, of tokens in one column."""
    z, b = latent.reshape(-1, latent.shape[-1]), base.reshape(-1, base.shape[-1])

    def predict(y: Tensor, level: Tensor) -> Tensor:
        clean = head(y, level, z, b)
        return clean if steer is None else steer(clean, level)

    return sample_euler(predict, x.reshape(-1, x.shape[-1]), levels, linear_path).reshape(x.shape)
