"""`imagine --mode`: the other questions that a unified video-action model answers along a recorded episode.

policy, inverse   which actions? from each frame on; drawn beside those recorded, and an R2 of each dimension
video, joint      what may happen? the model goes on from the episode's first frame on its own (joint: and says by which actions)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval import action_curves
from worldline.eval.replays import Replays
from worldline.eval.videos import video_grid, write_mp4
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.guidance import block_score
from worldline.types import Clip, Observation, Policy
from worldline.worldmodels import VideoActionModel
from worldline.worldmodels.trajectories import Guidance
from worldline.worldmodels.video_action import INVERSE, JOINT, POLICY, VIDEO


def ask(
    dream: Dream,
    replays: Replays,
    mode: str,
    out: Path,
    *,
    seed: int,
    steps: int | None = None,
    guide: Policy | None = None,
    guidance: Guidance | None = None,
) -> dict[str, float]:
    """Answer `mode` along the first of the replays: write the video and, where actions are found, a plot beside it (OUT with .png).

    Returns R2 of the found actions by dimension, where the recorded ones are known and not constant. Raises `WorldlineError` unless the model is a unified
    one, or for so many `steps` of the solver (None: the model's own) that training never showed their levels. In a joint dream `guide` nudges the actions towards what it would do (policy-guided diffusion).
    """
    model = dream.world_model
    if not isinstance(model, VideoActionModel):
        raise WorldlineError(
            f"--mode {mode}: a unified video-action model is required (`worldline train video-action`), got {type(model).__name__}. "
            "Leave --mode out to imagine what recorded actions lead to."
        )
    if steps is not None and mode in ("policy", "joint"):
        try:  # in which actions are decided; all else is denoised in so many steps already (`load_dream`)
            model = model.with_sampling(action_steps=steps)
        except ValueError as error:
            raise WorldlineError(f"--solver-steps: {error}. Sample as training showed it.") from error
    frames = {c: x[:1] for c, x in replays.frames.items()}
    whole = Clip(
        frames=dream.tokenizer.encode(frames),
        poses=replays.poses[:1],
        actions=replays.actions[:1],
        instruction=replays.instruction[:1],
    )
    columns = {"real": {c: x[0] for c, x in frames.items()}}
    if mode in ("policy", "inverse"):
        actions: Tensor | None = _found(model, whole, mode, seed)
    else:
        made, actions = _dreamt(dream, model, whole, mode, seed, guide, guidance)
        dreamt = dream.tokenizer.decode(made)
        columns[f"imagined ({mode})"] = {c: torch.cat([frames[c][:, :1], x.cpu()], 1)[0] for c, x in dreamt.items()}
    write_mp4(out, video_grid(columns), dream.spec.fps)
    if actions is None:
        return {}
    found, truth = actions.flatten(0, 1).numpy(), whole.actions[0, : len(actions)].flatten(0, 1).numpy()
    names, r2 = dream.spec.action.names, {}
    if np.isfinite(truth).all() and mode in ("policy", "inverse"):  # video alone has no actions
        missed, spread = np.square(found - truth).mean(0), np.var(truth, axis=0)
        r2 = {
            name: float(1 - m / v) for name, m, v in zip(names, missed, spread) if v > 1e-6
        }  # undefined of a constant
    titles = [f"{name}, R² {r2[name]:.2f}" if name in r2 else name for name in names]
    action_curves(truth, found, names=titles, label=mode).savefig(out.with_suffix(".png"))
    return r2


def _seen(whole: Clip, last: int, history: int) -> Clip:
    begin = max(0, last + 1 - history)
    return Clip(
        frames={c: z[:, begin : last + 1] for c, z in whole.frames.items()},
        poses=whole.poses[:, begin : last + 1],
        actions=whole.actions[:, begin:last],
        instruction=whole.instruction,
    )


def _found(model: VideoActionModel, whole: Clip, mode: str, seed: int) -> Tensor:
    """The block "k a" that leaves each frame, as the policy or the inverse query finds it, "t k a"."""
    horizon, t = model.config.horizon, whole.poses.shape[1]
    ahead = horizon if model.config.targets == "dense" else 1
    blocks = []
    for i in range(t - 1):
        seen = _seen(whole, i, model.config.history)
        count = min(ahead, t - 1 - i)
        query = (POLICY if mode == "policy" else INVERSE).first(count, horizon)
        given = {c: z[:, i + 1 : i + 1 + count] for c, z in whole.frames.items()} if mode == "inverse" else None
        made = model.sample(seen, query, seeds=torch.tensor([seed + i]), frames=given)
        blocks.append(made.actions[0, 0])
    return torch.stack(blocks).cpu()


def gone_on(
    seen: Clip, latents: Mapping[str, Float[Tensor, "1 f c _h _w"]], poses: Float[Tensor, "1 f p"], history: int
) -> Clip:
    """The last `history` frames of what was known and what was imagined after it: where fewer are imagined at a time, older ones stay known."""
    frames = {c: torch.cat([seen.frames[c].cpu(), z.cpu()], 1)[:, -history:] for c, z in latents.items()}
    known = torch.cat([seen.poses.cpu(), poses.cpu()], 1)[:, -history:]
    k, a = seen.actions.shape[2:]
    return replace(seen, frames=frames, poses=known, actions=torch.zeros(1, known.shape[1] - 1, k, a))


def _dreamt(
    dream: Dream,
    model: VideoActionModel,
    whole: Clip,
    mode: str,
    seed: int,
    guide: Policy | None,
    guidance: Guidance | None,
) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Latents (joint: and blocks "t k a") of as many frames as the episode has, a horizon at a time from the frames imagined so far."""
    seen, t, horizon = _seen(whole, 0, 1), whole.poses.shape[1], model.config.horizon
    latents: dict[str, list[Tensor]] = {c: [] for c in whole.frames}
    actions: list[Tensor] = []
    ahead = horizon if model.config.targets == "dense" else 1
    query = (JOINT if mode == "joint" else VIDEO).first(ahead, horizon)
    for begin in range(0, t - 1, ahead):
        score = None
        if guide is not None:
            images = dream.tokenizer.decode({c: z[:, -1:] for c, z in seen.frames.items()})
            now = Observation(
                images={c: x[:, 0] for c, x in images.items()}, pose=seen.poses[:, -1], instruction=seen.instruction
            )
            score = block_score(guide, now)
        made = model.sample(seen, query, seeds=torch.tensor([seed + begin]), guidance=guidance, score=score)
        for c, z in made.latents.items():
            latents[c].append(z.cpu())
        actions.append(made.actions.cpu())
        seen = gone_on(seen, made.latents, made.poses, model.config.history)
    whole_video = {c: torch.cat(z, 1)[:, : t - 1] for c, z in latents.items()}
    return whole_video, torch.cat(actions, 1)[0, : t - 1] if mode == "joint" else None
