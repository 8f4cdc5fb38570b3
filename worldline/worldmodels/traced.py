"""Dreams of the autoregressive denoiser whose log-probability is known exactly, with gradients: what GRPO trains.

Sampling streams frame by frame, each frame by re-noising steps (`diffusion.stochastic`) of which the last, deterministic, one has no density.
The log-probability of all steps of all frames then takes one pass: the dream stands once as history, and once a solver step as noisy targets,
each of which sees the history before it and itself, as it did in streaming (a test holds the two together).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.diffusion import linear_path, solver_levels
from worldline.diffusion.noise import row_noise
from worldline.diffusion.samplers import Predict
from worldline.diffusion.stochastic import Renoised, renoised_mean, sample_renoised
from worldline.errors import SpecMismatch
from worldline.tokenizers.whitening import unwhiten
from worldline.types import Clip, Imagination, Trace
from worldline.worldmodels.doubled_pass import NetworkClip, doubled_batch
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.traces import trace_of
from worldline.worldmodels.transformer import teacher_forcing_mask

if TYPE_CHECKING:
    from worldline.worldmodels.autoregressive import AutoregressiveWorldModel
else:
    AutoregressiveWorldModel = Any  # which delegates to this module


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedDream:
    """The context of a `Trace`: what was seen, what was done, and the frames that came of it, in the network's units."""

    units: NetworkClip  # all t frames, those seen first, without noise
    held: NetworkClip  # the same as history held them
    given: int  # frames seen
    eta: float
    imagination: Imagination  # what was imagined: raw latents, poses in physical units

    def index(self, rows: Int[Tensor, " r"]) -> "TracedDream":
        """The rows named."""
        made = self.imagination
        chosen = Imagination(latents={c: z[rows] for c, z in made.latents.items()}, poses=made.poses[rows])
        return replace(self, units=_rows(self.units, rows), held=_rows(self.held, rows), imagination=chosen)


def _rows(clip: NetworkClip, rows: Tensor) -> NetworkClip:
    return replace(
        clip,
        frames={c: z[rows] for c, z in clip.frames.items()},
        poses=clip.poses[rows],
        actions=clip.actions[rows],
        text=None if clip.text is None else clip.text[rows],
    )


def require_traceable(model: AutoregressiveWorldModel, steps: int) -> None:
    """Raise `SpecMismatch` for ways of sampling whose log-probability is not known, `ValueError` for steps that training never showed."""
    config = model.config
    wrong = []
    if config.network.memory.size:
        wrong.append("a model without memory (network.memory), this one has one")
    if config.guidance != 1:
        wrong.append(f"guidance 1, got {config.guidance:g}")
    if config.cache_write != "clean":
        wrong.append(f"cache_write clean, got {config.cache_write}")
    if wrong:
        raise SpecMismatch("traced sampling requires " + "; ".join(wrong))
    replace(config, solver_steps=steps)  # raises for levels that training never shows


@torch.no_grad()
def sample_traced(
    model: AutoregressiveWorldModel,
    seen: Clip,
    actions: Float[Tensor, "n f k a"],
    *,
    seeds: Int[Tensor, " n"],
    steps: int,
    eta: float,
) -> Trace:
    """`TracedSampling.sample_traced`, frame by frame. Raises `SpecMismatch` if a camera is missing in some row: the one pass of `trace_means`
    shows every frame with every camera."""
    missing = {camera: int((~there).sum()) for camera, there in seen.present.items() if not there.all()}
    if missing:
        rows = ", ".join(f"{camera} in {count} of {len(seen.poses)} rows" for camera, count in sorted(missing.items()))
        raise SpecMismatch(
            f"traced sampling requires every camera in every row of what is observed, missing are {rows}"
        )
    streaming, seeds = model.streaming, seeds.to(model.device)
    levels = solver_levels(steps).tolist()
    given = model.network_units(seen)
    held = list(model.observed(seen))  # each says how its frame is held as history
    held_frames = {c: [state.latents[c] for state in held] for c in model.port.keys}
    held_poses, state = [state.pose for state in held], held[-1]
    blocks = model._flat_actions(actions)
    traced: list[Renoised] = []
    latents: dict[str, list[Tensor]] = {c: list(z.unbind(1)) for c, z in given.frames.items()}
    poses = list(given.poses.unbind(1))
    state = replace(state, cache=state.cache.clone())
    for i in range(blocks.shape[1]):
        frame_number = state.frames

        def solve(predict: Predict, start: Tensor, number: Tensor = frame_number) -> Tensor:
            def noise(step: int) -> Tensor:
                return row_noise(seeds, number, step, tuple(start.shape[1:]), stream=77).to(start)

            traced.append(sample_renoised(predict, start, levels, linear_path, eta=eta, noise=noise))
            return traced[-1].sample

        state, frame = streaming.next(state, blocks[:, i], seeds, solve=solve)
        for c, z in frame.latents.items():
            latents[c].append(z)
            held_frames[c].append(state.latents[c])
        poses.append(frame.pose)
        held_poses.append(state.pose)
    whole = {c: torch.stack(z, 1) for c, z in latents.items()}
    units = replace(
        given, frames=whole, poses=torch.stack(poses, 1), actions=torch.cat([given.actions, blocks], 1), aims=None
    )
    as_held = replace(
        units, frames={c: torch.stack(z, 1) for c, z in held_frames.items()}, poses=torch.stack(held_poses, 1)
    )
    t = given.poses.shape[1]
    imagined = unwhiten({c: z[:, t:] for c, z in whole.items()}, model.latent_spec)
    context = TracedDream(
        units=units,
        held=as_held,
        given=t,
        eta=eta,
        imagination=Imagination(latents=imagined, poses=model.pose_normalizer.denormalize(units.poses[:, t:])),
    )
    return trace_of(traced, levels, eta=eta, context=context, join=lambda frames: torch.stack(frames, 1))


def retold(model: AutoregressiveWorldModel, trace: Trace, actions: Float[Tensor, "n f k a"]) -> Trace:
    """`AutoregressiveWorldModel.retold`: frames and poses stay, the blocks that led to them are others."""
    dream: TracedDream = trace.context
    before = dream.units.actions[:, : dream.given - 1]
    blocks = torch.cat([before, model._flat_actions(actions)], 1)
    units, held = replace(dream.units, actions=blocks), replace(dream.held, actions=blocks)
    return replace(trace, context=replace(dream, units=units, held=held))


def trace_means(model: AutoregressiveWorldModel, trace: Trace) -> Float[Tensor, "s n f d"]:
    """Where `model` would go on average in each step of each frame, with gradients: one pass of the network for all of them."""
    dream: TracedDream = trace.context
    made = model.network(model.body, *_targets(model, trace), router=model.config.router)
    s, f = len(trace.std), trace.x.shape[2]
    parts = [*(z.flatten(2) for z in made.latents.values()), made.pose]
    clean = torch.cat(parts, 2).unflatten(1, (s, f))
    levels = trace.level.tolist()
    means = [
        renoised_mean(
            trace.x[j].flatten(0, 1), clean[:, j].flatten(0, 1), levels[j], levels[j + 1], linear_path, eta=dream.eta
        ).unflatten(0, (-1, f))
        for j in range(s)
    ]
    return torch.stack(means)


def _targets(model: AutoregressiveWorldModel, trace: Trace) -> tuple[FrameBatch, Tensor, slice]:
    """The network's input: T history frames, then for each of s steps the f noisy targets; the mask; which answers are wanted."""
    dream: TracedDream = trace.context
    units, s = dream.units, len(trace.std)
    n, t = units.poses.shape[:2]
    guess = model.port.guess_pose
    if guess is not None and guess.gain is not None:
        units = replace(
            units, aims=guess.aims(units.poses, units.actions, torch.zeros(n, dtype=torch.long, device=model.device))
        )
    zero = torch.zeros(n, t - 1, device=model.device)
    options = {"history_level": zero, "target_level": zero, "told": None, "seen": {}, "generator": None}
    batch = doubled_batch(units, dream.held, **options)
    motion = doubled_batch(units, units, **options).motion  # of poses without noise
    level = torch.cat([zero + model.config.history_level, zero], 1)
    batch = replace(batch, motion=motion, level=level, time=batch.time.expand(n, -1))
    history, targets = batch.keep(slice(0, t - 1)), batch.keep(slice(t - 1 + dream.given - 1, None))
    shapes = {c: z.shape[2:] for c, z in targets.latents.items()} | {"": targets.pose.shape[2:]}
    whole = history
    for j, told in enumerate(trace.level[:s].tolist()):
        pieces = trace.x[j].split([_numbers(shape) for shape in shapes.values()], dim=2)
        shown: dict[str, Tensor] = {c: z.unflatten(2, shape) for (c, shape), z in zip(shapes.items(), pieces)}
        pose = shown.pop("")
        whole = whole.then(replace(targets, latents=shown, pose=pose, level=torch.full_like(targets.level, told)))
    return whole, _mask(t - 1, dream.given, s, model.config.network.window, model.device), slice(t - 1, None)


def _mask(frames: int, given: int, steps: int, window: int, device: torch.device) -> Tensor:
    """As `teacher_forcing_mask`, with the last targets alone, once for each solver step: none sees another's."""
    both = teacher_forcing_mask(frames, window, device)
    f = frames - given + 1
    history, past = both[:frames, :frames], both[frames + given - 1 :, :frames]
    own = torch.eye(steps * f, dtype=torch.bool, device=device)
    above = torch.cat([history, torch.zeros(frames, steps * f, dtype=torch.bool, device=device)], 1)
    return torch.cat([above, torch.cat([past.repeat(steps, 1), own], 1)])


def _numbers(shape: torch.Size) -> int:
    return int(torch.tensor(shape).prod())
