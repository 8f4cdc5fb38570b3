"""The loss of the autoregressive denoiser: what a training step shows the network, and what it asks for.

All in the network's units (whitened latents, normalised poses and blocks), by the doubled pass (`doubled_pass`): every frame stands
once in a history stream and once in a target stream. History comes in three qualities, because a dream's history is not real:

- clean, or at a noise level that the network is told (Astra);
- with a camera unseen, or noisier than is told, up to some frame, or (`actionless`) with no action known of the whole clip;
- imagined by the network itself, frame by frame from the frames before (`own_history`): the errors a dream meets are not noise but
  its own. Targets stay the true frames, so what is learned is to come back from them. (Scheduled sampling, 1506.03099, in
  parallel over the frames of a clip, one further frame of error a round.)

Remembered frames are looked up as in a rollout and carry noise levels of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldline.diffusion import add_noise, linear_path
from worldline.types import Clip
from worldline.worldmodels.config import AutoregressiveConfig
from worldline.worldmodels.doubled_pass import NetworkClip, doubled_batch, first_frames
from worldline.worldmodels.experts import Routing
from worldline.worldmodels.guesses import PoseGuess, motion_of, pose_miss
from worldline.worldmodels.memory import Memories, recall_in_training
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.transformer import Prediction, SpaceTimeTransformer, teacher_forcing_mask

FOLLOWED = 64  # frames at the most
CAMERA_NOISE = 0.5  # the highest level of a noisy camera


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The network of one embodiment, and how it is trained."""

    network: SpaceTimeTransformer
    body: str
    config: AutoregressiveConfig

    def loss(
        self, clip: Clip, whole: NetworkClip, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of a clip (t >= 2 frames after its lead), and detached metrics.

        Args:
            clip: for what `whole` does not say of it: lead, and which cameras are there.
            whole: the clip in the network's units, its lead included.
            generator: of levels and noise, which are drawn on the CPU, so that they do not depend on the device.
        """
        config, device = self.config, whole.poses.device
        if config.actionless:
            acted = torch.rand(len(whole.poses), generator=generator) >= config.actionless
            whole = replace(whole, acted=acted.to(device))
        own, shown = whole.after(clip.lead), self.noisy(whole, clip.lead, generator)
        b, t = own.poses.shape[:2]
        history_level = config.history.sample((b, t - 1), generator).to(device)
        target_level = config.target.sample((b, t - 1), generator).to(device)
        told = None
        if config.action_dropout:
            told = (torch.rand(b, t - 1, generator=generator) >= config.action_dropout).to(device)
        if whole.acted is not None:
            told = whole.acted[:, None].expand(b, t - 1) if told is None else told & whole.acted[:, None]
        seen = self.seen(clip, t - 1, generator)
        history = shown.after(clip.lead)
        for _ in range(self.rounds(generator)):
            history = self.imagined(clip, shown, history, seen, generator)
        batch = doubled_batch(
            own,
            history,
            history_level=history_level,
            target_level=target_level,
            told=told,
            seen=seen,
            generator=generator,
        )
        made = self.predict(clip, shown, batch, seen, generator)
        loss, metrics = self._errors(clip, whole, made, target_level, told)
        warped = self._warp_errors(clip, whole, generator)
        return loss + _mean(warped), metrics | {f"warp_error/{c}": e.detach() for c, e in warped.items()}

    def predict(
        self,
        clip: Clip,
        whole: NetworkClip,
        batch: FrameBatch,
        seen: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> Prediction:
        """The network's answer for the target stream."""
        frames = batch.level.shape[1] // 2
        targets = slice(frames, None)
        mask = teacher_forcing_mask(frames, self.config.network.window, batch.level.device)
        memories = self.memories(clip, whole, batch.keep(targets), seen, generator)
        return self.network(self.body, batch, mask, targets, memories, router=self.config.router)

    def rounds(self, generator: torch.Generator | None) -> int:
        """How many frames of its own errors this batch's history holds: 0, or drawn from 1 to `own_rounds`."""
        config = self.config
        if not config.own_history or torch.rand((), generator=generator) >= config.own_history:
            return 0
        return int(torch.randint(1, config.own_rounds + 1, (), generator=generator))

    @torch.no_grad()
    def imagined(
        self,
        clip: Clip,
        whole: NetworkClip,
        history: NetworkClip,
        seen: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> NetworkClip:
        """The clip as the network imagines it, each frame in one step from the frames before it in `history`; the first is true.

        So after r rounds the frame at place i holds the errors of min(i, r) frames of a dream.
        """
        b, t = history.poses.shape[:2]
        clean = torch.zeros(b, t - 1, device=history.poses.device)
        batch = doubled_batch(
            history,
            history,
            history_level=clean + self.config.history_level,
            target_level=clean + 1,
            told=None,
            seen=seen,
            generator=generator,
        )
        made = self.predict(clip, whole, batch, seen, generator)
        frames = {c: torch.cat([z[:, :1], made.latents[c]], dim=1) for c, z in history.frames.items()}
        return replace(history, frames=frames, poses=torch.cat([history.poses[:, :1], made.pose], dim=1))

    def _errors(
        self, clip: Clip, whole: NetworkClip, made: Prediction, target_level: Tensor, told: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a prediction: of frames and poses, of what the dense networks guessed, of the warp, of the router."""
        config, own = self.config, whole.after(clip.lead)
        frames, poses = own.frames, own.poses
        weight = (1 / target_level.clamp(min=1e-3) ** 2).clamp(max=config.max_weight)

        def error(made: Tensor, camera: str) -> Tensor:
            """ "b t-1": zero where the data has no such camera."""
            missed = (made - frames[camera][:, 1:]).square().mean((2, 3, 4))
            if camera not in clip.present:
                return missed
            return missed * clip.present[camera].to(missed.device)[:, None]

        per_camera = {c: error(made.latents[c], c) for c in frames}
        pose_error = (made.pose - poses[:, 1:]).square().mean(2) if poses.shape[2] else torch.zeros_like(weight)
        loss = _mean({c: (weight * e).mean() for c, e in per_camera.items()})
        loss = loss + config.pose_weight * (weight * pose_error).mean()
        guesses = {c: error(z, c).mean() for c, z in made.guesses.views.items()}
        loss = loss + _mean(guesses)
        if made.guesses.pose is not None:
            miss = pose_miss(made.guesses.pose, poses[:, 1:])
            guesses["pose"] = miss.mean() if told is None else _mean_where(miss, told, empty=0.0)
            loss = loss + guesses["pose"]
            if config.own_history:  # and from its own guesses: errors that add up frame by frame are small in any one
                guess_pose = self.network.port(self.body).guess_pose
                assert guess_pose is not None
                guesses["followed pose"] = self._followed(clip, whole, guess_pose)
                loss = loss + guesses["followed pose"]
        metrics = {f"guess_error/{c}": e.detach() for c, e in guesses.items()}
        if (found := made.remembered) is not None:
            for c, z in found.moved.items():  # how near memory comes by itself
                missed = (z - frames[c][:, 1:]).square().mean(2, keepdim=True)
                metrics[f"memory_error/{c}"] = _mean_where(missed, found.sight[c]).detach()
        if made.routing is not None:
            metrics["routing_entropy"] = made.routing.entropy().detach()
            if (balance := self._balance(made.routing)) is not None:
                loss = loss + config.balance_weight * balance
                metrics["balance"] = balance.detach()
        pure = target_level == 1
        metrics |= {f"one_step_error/{c}": _mean_where(e, pure).detach() for c, e in per_camera.items()}
        return loss, metrics | {"one_step_error/pose": _mean_where(pose_error, pure).detach()}

    def _followed(self, clip: Clip, whole: NetworkClip, guess: PoseGuess) -> Tensor:
        """What the guessed pose misses, from its own guesses, over the last `FOLLOWED` frames there are."""
        begin = max(0, whole.poses.shape[1] - 1 - FOLLOWED)
        poses, actions = whole.poses[:, begin:], whole.actions[:, begin:]
        aims = poses[..., :0] if whole.aims is None else whole.aims[:, begin:]
        first = first_frames(clip).to(poses.device) - begin
        motion = None
        if begin:
            motion = motion_of(poses[:, 0], whole.poses[:, begin - 1], whole.actions[:, begin - 1])
        missed = pose_miss(guess.follow(poses, actions, aims, first, motion), poses[:, 1:])
        there = torch.arange(missed.shape[1], device=poses.device) >= first[:, None]
        return _mean_where(missed, there if whole.acted is None else there & whole.acted[:, None], empty=0.0)

    def _warp_errors(self, clip: Clip, whole: NetworkClip, generator: torch.Generator | None) -> dict[str, Tensor]:
        """What the memory's warp gets wrong, by camera, over all frames there are, one or two frames apart."""
        encoder = self.network.port(self.body).memory
        if encoder is None:
            return {}
        there = self.there(clip, whole)
        apart = int(torch.randint(1, 3, (), generator=generator)) if whole.poses.shape[1] > 2 else 1
        return encoder.warp.error(whole.frames, whole.poses, there, apart)

    def there(self, clip: Clip, whole: NetworkClip) -> dict[str, Tensor]:
        """camera -> "b e" bool, which frames of the clip and its lead exist and hold the camera."""
        exists = torch.arange(whole.poses.shape[1]) >= first_frames(clip)[:, None]
        held = {c: exists & clip.present[c].cpu()[:, None] if c in clip.present else exists for c in whole.frames}
        return {c: there.to(whole.poses.device) for c, there in held.items()}

    def _balance(self, routing: Routing) -> Tensor | None:
        """The loss that keeps experts in use, where a router is learned."""
        assert self.network.experts is not None
        if self.config.router in ("uniform", "fixed"):
            return None
        return self.network.experts.balance(routing, self.body)

    def seen(self, clip: Clip, frames: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """camera -> "b frames", which history frames hold it. Empty if nothing is ever missing."""
        if not (self.config.camera_dropout or clip.present):
            return {}
        device = next(self.network.parameters()).device
        seen: dict[str, Tensor] = {}
        for camera in self.network.port(self.body).keys:
            since = torch.zeros(len(clip.poses), dtype=torch.long)
            if self.config.camera_dropout:
                missing = torch.rand(len(since), generator=generator) < self.config.camera_dropout
                since = torch.where(missing, torch.randint(1, frames + 1, since.shape, generator=generator), since)
            there = torch.arange(frames) >= since[:, None]
            if camera in clip.present:
                there = there & clip.present[camera].cpu()[:, None]
            seen[camera] = there.to(device)
        return seen

    def noisy(self, whole: NetworkClip, lead: int, generator: torch.Generator | None) -> NetworkClip:
        """What the network is shown of the clip: some cameras noisy up to a frame drawn, as from a worse lens (`camera_noise`)."""
        if not self.config.camera_noise:
            return whole
        frames = {}
        b, e = whole.poses.shape[:2]
        for camera, z in whole.frames.items():
            drawn = torch.rand(b, generator=generator) < self.config.camera_noise
            until = torch.where(drawn, lead + torch.randint(1, e - lead, (b,), generator=generator), 0)
            level = CAMERA_NOISE * torch.rand(b, generator=generator)[:, None] * (torch.arange(e) < until[:, None])
            noise = torch.randn(z.shape, generator=generator).to(z)
            frames[camera] = add_noise(linear_path, z, noise, level.to(z))
        return replace(whole, frames=frames)

    def memories(
        self,
        clip: Clip,
        whole: NetworkClip,
        targets: FrameBatch,
        seen: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> Memories | None:
        """What each target is shown of the frames before it; `seen` as of the history, for the clip's own frames."""
        config, device = self.config.network, whole.poses.device
        if not config.memory.size:
            return None
        b, e = whole.poses.shape[:2]
        length = torch.full((b,), e - clip.lead)
        led = length if clip.led is None else length + clip.led.cpu()
        always = torch.ones(b, dtype=torch.bool, device=device)
        there = {}
        for camera in whole.frames:
            before = clip.present.get(camera, always).to(device)[:, None].expand(b, clip.lead)
            own = seen.get(camera, always[:, None].expand(b, e - clip.lead - 1))
            there[camera] = torch.cat([before, own, always[:, None]], dim=1)
        # sampling looks up by the action, also for the frame that guidance imagines without it
        known = (
            torch.ones_like(targets.has_action)
            if whole.acted is None
            else whole.acted[:, None].expand_as(targets.has_action)
        )
        query = self.network.port(self.body).foretell(replace(targets, has_action=known))
        level = self.config.history.sample((b, e), generator).to(device)
        noised = {}
        for camera, z in whole.frames.items():
            noise = torch.randn(z.shape, generator=generator).to(z)
            noised[camera] = add_noise(linear_path, z, noise, level)
        return recall_in_training(
            noised, there, whole.poses, level, led.to(device), query, config.memory, config.window
        )


def _mean(errors: Mapping[str, Tensor]) -> Tensor:
    """Over cameras, of what each of them misses."""
    return torch.stack(list(errors.values())).mean() if errors else torch.zeros(())


def _mean_where(values: Tensor, mask: Tensor, *, empty: float = float("nan")) -> Tensor:
    """Mean over the mask (or by these weights), `empty` where that is empty: a small batch may hold no such target. The log leaves
    out NaN."""
    weight = mask.sum()
    return torch.where(weight > 0, (values * mask).sum() / weight.clamp(min=1e-6), empty)
