"""Dreams of the unified model whose log-probability is known exactly, with gradients: what GRPO trains (the UWM design, forward query).

A chunk of frames is denoised together by re-noising steps (`diffusion.stochastic`), the last of which has no density; the next chunk begins from
what it made. Given the frames it began from, a chunk's steps depend on nothing else, so their means take one pass of the network for each
solver step, over all chunks at once. What came before a chunk is data to it, as to `imagine`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.diffusion import linear_path, solver_levels
from worldline.diffusion.noise import row_noise
from worldline.diffusion.stochastic import Renoised, renoised_mean, sample_renoised
from worldline.errors import SpecMismatch
from worldline.tokenizers.whitening import unwhiten
from worldline.types import Clip, Imagination, Trace
from worldline.worldmodels.traces import trace_of
from worldline.worldmodels.video_action.queries import FORWARD, Query, Roles
from worldline.worldmodels.video_action.state import after
from worldline.worldmodels.video_action.tokens import Draw, Future, Known
from worldline.worldmodels.video_action.uwm import UnifiedWorld, noise_like

if TYPE_CHECKING:
    from worldline.worldmodels.video_action.model import VideoActionModel
else:
    VideoActionModel = Any  # which delegates to this module


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedChunks:
    """The context of a `Trace`: what each chunk began from, the blocks it was given, and what was imagined."""

    known: tuple[Known, ...]
    given: tuple[Future, ...]
    eta: float
    imagination: Imagination

    def index(self, rows: Int[Tensor, " r"]) -> "TracedChunks":
        """The rows named."""
        made = self.imagination
        return TracedChunks(
            known=tuple(x.index(rows) for x in self.known),
            given=tuple(x.index(rows) for x in self.given),
            eta=self.eta,
            imagination=Imagination(latents={c: z[rows] for c, z in made.latents.items()}, poses=made.poses[rows]),
        )


def require_traceable(model: VideoActionModel, steps: int) -> None:
    """Raise `SpecMismatch` for ways of sampling whose log-probability is not known, `ValueError` for steps that training never showed."""
    if not isinstance(model.network, UnifiedWorld):
        raise SpecMismatch(
            "a video-action model of design uwm is required, which denoises whole frames; this one is of design "
            f"{model.config.design}, whose heads denoise token by token"
        )
    model.with_sampling(solver_steps=steps)  # raises for levels that training never shows


@torch.no_grad()
def sample_traced(
    model: VideoActionModel,
    seen: Clip,
    actions: Float[Tensor, "n f k a"],
    *,
    seeds: Int[Tensor, " n"],
    steps: int,
    eta: float,
) -> Trace:
    """`TracedSampling.sample_traced`, a chunk (`traced_chunk`) at a time. Raises `SpecMismatch` for f that is no multiple of it."""
    chunk, seeds, levels = model.traced_chunk(), seeds.to(model.device), solver_levels(steps).tolist()
    if actions.shape[1] % chunk:
        raise SpecMismatch(f"blocks in whole chunks of {chunk} required, got {actions.shape[1]}")
    known, number = [model.known(seen)], torch.full_like(seeds, seen.poses.shape[1] - 1)
    given: list[Future] = []
    traced: list[Renoised] = []
    for begin in range(0, actions.shape[1], chunk):
        given.append(model.given(_query(model), len(seeds), None, actions[:, begin : begin + chunk]))
        now, future = known[-1], given[-1]
        roles = _query(model).rows(len(seeds)).to(model.device)
        start = _joined(noise_like(future, roles, Draw(seeds=seeds, frame=number, steps=steps)), chunk)

        def predict(
            x: Tensor, level: Tensor, now: Known = now, future: Future = future, roles: Roles = roles
        ) -> Tensor:
            return _clean(model, now, future, roles, x, level)

        def noise(step: int, number: Tensor = number, like: Tensor = start) -> Tensor:
            return row_noise(seeds, number, step, tuple(like.shape[1:]), stream=77).to(like)

        traced.append(sample_renoised(predict, start, levels, linear_path, eta=eta, noise=noise))
        made = _parted(traced[-1].sample, future).first(chunk)
        known.append(after(now, model.guess_pose, made, told=True))
        number = number + chunk
    parts = [_parted(r.sample, x) for r, x in zip(traced, given)]
    latents = {c: torch.cat([p.frames[c] for p in parts], 1) for c in parts[0].frames}
    poses = model.pose_normalizer.denormalize(torch.cat([p.poses for p in parts], 1))
    imagined = Imagination(latents=unwhiten(latents, model.latent_spec), poses=poses)
    context = TracedChunks(known=tuple(known[:-1]), given=tuple(given), eta=eta, imagination=imagined)
    return trace_of(traced, levels, eta=eta, context=context, join=lambda chunks: torch.cat(chunks, 1))


def trace_means(model: VideoActionModel, trace: Trace) -> Float[Tensor, "s n f d"]:
    """Where `model` would go on average in each step of each frame, with gradients: one pass of the network for each solver step."""
    context: TracedChunks = trace.context
    chunk, n, count = model.traced_chunk(), trace.x.shape[1], len(context.known)
    known, given = _stacked_known(context.known), _stacked_future(context.given)
    roles = _query(model).rows(n * count).to(model.device)
    means = []
    for j, (now, then) in enumerate(zip(trace.level.tolist()[:-1], trace.level.tolist()[1:])):
        x = torch.cat(trace.x[j].split(chunk, 1))  # chunk by chunk, as `known` is stacked
        clean = _clean(model, known, given, roles, x, torch.full((len(x),), now, device=x.device))
        mean = renoised_mean(x, clean, now, then, linear_path, eta=context.eta)
        means.append(torch.cat(mean.split(n), 1))
    return torch.stack(means)


def _query(model: VideoActionModel) -> Query:
    return FORWARD.first(model.traced_chunk(), model.config.horizon).at(model.config.horizon)


def _clean(model: VideoActionModel, known: Known, given: Future, roles: Roles, x: Tensor, level: Tensor) -> Tensor:
    """The network's estimate of a chunk's frames "n f d", shown as `x` at `level` "n"."""
    network: UnifiedWorld = model.network  # pyright: ignore[reportAssignmentType]
    some = _parted(x, given)
    shown = Future(
        frames={c: torch.cat([z, given.frames[c][:, z.shape[1] :]], 1) for c, z in some.frames.items()},
        poses=torch.cat([some.poses, given.poses[:, some.poses.shape[1] :]], 1),
        actions=given.actions,
    )
    return _joined(network.predict(known, shown, roles, level, level), x.shape[1])


def _joined(future: Future, count: int) -> Float[Tensor, "n f d"]:
    """The first frames and poses, a vector each."""
    parts = [*(future.frames[c][:, :count].flatten(2) for c in sorted(future.frames)), future.poses[:, :count]]
    return torch.cat(parts, 2)


def _parted(x: Float[Tensor, "n f d"], like: Future) -> Future:
    """The inverse of `_joined`, in `like`'s shapes."""
    names = sorted(like.frames)
    cuts = x.split([*(like.frames[c][0, 0].numel() for c in names), like.poses.shape[2]], 2)
    frames = {c: z.unflatten(2, like.frames[c].shape[2:]) for c, z in zip(names, cuts)}
    return Future(frames=frames, poses=cuts[-1], actions=like.actions)


def _stacked_known(parts: tuple[Known, ...]) -> Known:
    first = parts[0]
    return Known(
        frames={c: torch.cat([p.frames[c] for p in parts]) for c in first.frames},
        poses=torch.cat([p.poses for p in parts]),
        count=torch.cat([p.count for p in parts]),
        motion=torch.cat([p.motion for p in parts]),
        aim=torch.cat([p.aim for p in parts]),
        text=None if first.text is None else torch.cat([p.text for p in parts if p.text is not None]),
    )


def _stacked_future(parts: tuple[Future, ...]) -> Future:
    return Future(
        frames={c: torch.cat([p.frames[c] for p in parts]) for c in parts[0].frames},
        poses=torch.cat([p.poses for p in parts]),
        actions=torch.cat([p.actions for p in parts]),
    )
