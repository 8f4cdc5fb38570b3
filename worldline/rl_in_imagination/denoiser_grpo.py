"""GRPO on a world model's denoiser (RLIR 2509.23958; GRPO 2402.03300; of denoising steps Flow-GRPO 2505.05470).

From each of some real contexts, and the actions that were recorded after it, a group of rows dreams with noise of its own. What sets
them apart is luck; the rows whose frames say their actions more clearly than the group's others are made likelier:

    reward      how well the actions read off frames i, i+1 agree with those commanded between them
    advantage   the reward over the group's mean, by the group's spread; of the whole dream, or of each frame with what it was seen for
    loss        the clipped ratio of each solver step of each frame, and a divergence from the pretrained model

The sampler's noise hardly changes what a dream does: what sets its rows apart is then mostly the reader's own noise. With `explore` each
row dreams under commands of its own, some way off, and is judged by the true ones; the path of a row that did better is made likelier *under the true
commands* (ours, not the paper's; the ratio is of the weights now to those before the update, and not of the two commands).

A frame has thousands of numbers, so the ratio of a step's densities is 0 or infinite after the smallest move. As in the literature the ratio is
taken per number (its d-th root); the gradient keeps its direction, and `clip` is small accordingly.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldline.diffusion import row_noise
from worldline.errors import SpecMismatch, WorldlineError
from worldline.rl_in_imagination.low_rank import add_adapters, merged
from worldline.rl_in_imagination.returns import group_advantages
from worldline.types import ActionSpec, Clip, Trace, TracedWorldModel, VideoTokenizer, WorldModel

Reward = Callable[[Mapping[str, UInt8[Tensor, "n t c _h _w"]], Float[Tensor, "n t-1 k a"]], Float[Tensor, "n t-1"]]
"""Frames (the last real one first) and the blocks between them to a reward of each block."""


@runtime_checkable
class Retelling(Protocol):
    """A world model whose dreams can be told as if they had been dreamt under other commands."""

    def retold(self, trace: Trace, actions: Float[Tensor, "n f k a"]) -> Trace: ...


def require_retelling(model: Any) -> None:
    """Raise `SpecMismatch` for a model that cannot explore."""
    if not isinstance(model, Retelling):
        raise SpecMismatch(
            f"--rl.grpo.explore: an autoregressive world model is required, whose dreams can be told as of other commands, got {type(model).__name__}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """How dreams become updates of the world model."""

    contexts: int = 4
    """Real contexts an update begins from."""
    group: int = 8
    """Rows that dream from each."""
    frames: int = 8
    """Imagined by each row, to learn from."""
    prefix: int = 0
    """Frames dreamt by the deployed sampler before those: from none to so many, drawn for each update. A dream drifts from its actions as it
    grows, and learns there only what it is shown there. 0: dreams begin at real frames (published)."""
    solver_steps: int = 4
    """Of a frame; the last is deterministic and does not count."""
    eta: float = 1.0
    """Fresh noise of a solver step; 1: ancestral sampling."""
    explore: float = 0.0
    """Standard deviation of the offset, the same for all its blocks, of the commands that a row dreams under, in half ranges of the action. 0: only
    the sampler's noise sets rows apart (published). Learned faster in a toy world, did harm on Meta-World (docs/results.md). Autoregressive
    models only."""
    credit: Literal["dream", "frame"] = "frame"
    """dream: every frame gets the advantage of the whole dream's mean reward (published). frame: that of the rewards for which it was looked at,
    and of those after it."""
    discount: float = 0.9
    """Of a frame's later rewards, for credit frame: errors stay."""
    clip: float = 2e-4
    """How far the ratio per number may go from 1."""
    kl: float = 0.1
    """Weight of the divergence from the pretrained model, in nats a number and solver step, over that of a ratio at its clip."""
    epochs: int = 1
    """Passes over the dreams of an update."""
    minibatch: int = 16
    """Rows of a gradient step."""
    lr: float = 1e-4
    """Of AdamW. Thirty updates at this rate moved a model of 2.5M weights by 0.0004 nats a number."""
    lora_rank: int = 0
    """Of adapters on the matrices of the transformer's blocks, which are then all that learns (needs peft); 0: all weights but the guesses'."""
    max_norm: float = 1.0
    """Largest gradient norm."""
    max_kl: float = 0.2
    """Nats a number and solver step from the pretrained model at which training stops with an error. Far below this pictures suffer: at 0.5 a toy
    world's were ruined."""

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"groups of at least 2 rows required (a row is compared with others), got {self.group}")
        if self.solver_steps < 4:
            raise ValueError(
                f"at least 4 solver steps are required, of which the last is deterministic, got {self.solver_steps}"
            )
        if min(self.contexts, self.frames, self.epochs, self.minibatch) < 1 or not 0 < self.eta <= 1:
            raise ValueError(
                "contexts, frames, epochs and minibatch of at least 1, eta above 0 and at most 1 required, got "
                f"{self.contexts}, {self.frames}, {self.epochs}, {self.minibatch} and {self.eta}"
            )
        if min(self.lora_rank, self.explore, self.prefix) < 0:
            raise ValueError(
                f"lora_rank, explore and prefix of at least 0 required, got {self.lora_rank}, {self.explore} and {self.prefix}"
            )
        if not self.clip > 0 or self.kl < 0 or not self.lr > 0 or not 0 <= self.discount <= 1:
            raise ValueError(
                f"clip and lr above 0, kl of at least 0, discount from 0 to 1 required, got {self.clip}, {self.lr}, {self.kl} and "
                f"{self.discount}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedDreams:
    """n dreams of f frames, in groups of neighbouring rows that began alike."""

    trace: Trace
    reward: Float[Tensor, "n f"]
    advantage: Float[Tensor, "n f"]
    old: Float[Tensor, "s n f"]  # log-density a number of each solver step when it was sampled


@torch.no_grad()
def dream(
    model: TracedWorldModel,
    tokenizer: VideoTokenizer,
    reward: Reward,
    seen: Clip,
    actions: Float[Tensor, "b f k a"],
    config: GRPOConfig,
    *,
    seeds: Int[Tensor, " n"],
    ahead: int = 0,
) -> TracedDreams:
    """Dream a group from each context, and judge.

    Args:
        seen: raw latents of what came before, real or dreamt, a row each context. actions: what is done after it.
        seeds: one a row of the groups, `config.group` for each context.
        ahead: frames behind a transition that its reward looks at.

    Raises `WorldlineError` for NaN in rewards, `SpecMismatch` to explore with a model that cannot retell a path.
    """
    if config.explore:
        require_retelling(model)
    rows = torch.arange(len(actions)).repeat_interleave(config.group)
    seen, actions = repeat(seen, rows), actions[rows]
    meant = offset(actions, model.spec.action, config.explore, seeds)
    trace = model.sample_traced(seen, meant, seeds=seeds, steps=config.solver_steps, eta=config.eta)
    made = model.dreamt(trace)
    if isinstance(model, Retelling) and config.explore:
        trace = model.retold(trace, actions)
    latents = {c: torch.cat([seen.frames[c][:, -1:].to(z), z], 1) for c, z in made.latents.items()}
    earned = reward(tokenizer.decode(latents), actions).to(trace.x.device)
    if not earned.isfinite().all():
        row, frame = (~earned.isfinite()).nonzero()[0].tolist()
        raise WorldlineError(f"finite rewards required, got {float(earned[row, frame])} in row {row}, frame {frame}")
    old = log_density(model.trace_means(trace) if config.explore else trace.mean, trace)
    return TracedDreams(trace=trace, reward=earned, advantage=advantages(earned, config, ahead=ahead), old=old)


@torch.no_grad()
def dreamt_from(model: WorldModel, first: Clip, actions: Float[Tensor, "b f k a"], *, seeds: Int[Tensor, " b"]) -> Clip:
    """A clip of one frame and the f that the deployed sampler dreams after it: what a longer dream has been through."""
    if not actions.shape[1]:
        return first
    _, made = model.imagine(model.observe(first), actions, seeds=seeds)
    return replace(
        first,
        frames={c: torch.cat([first.frames[c].to(z), z], 1) for c, z in made.latents.items()},
        poses=torch.cat([first.poses.to(made.poses), made.poses], 1),
        actions=actions,
    )


def offset(
    actions: Float[Tensor, "n f k a"], spec: ActionSpec, explore: float, seeds: Int[Tensor, " n"]
) -> Float[Tensor, "n f k a"]:
    """Actions within their range, each row's moved by an offset of its own (`GRPOConfig.explore`)."""
    if not explore:
        return actions
    low, high = torch.tensor(spec.low).to(actions), torch.tensor(spec.high).to(actions)
    far = explore * (high - low) / 2 * row_noise(seeds.to(actions.device), 0, 0, (spec.dim,), stream=78).to(actions)
    return (actions + far[:, None, None]).clamp(low, high)


def advantages(reward: Float[Tensor, "n f"], config: GRPOConfig, *, ahead: int = 0) -> Float[Tensor, "n f"]:
    """Of each frame of each row, within its group. Reward i is of the transition to frame i, which looks at `ahead` frames behind it, too: so
    frame i is credited with those of the transitions from i - ahead on."""
    if config.credit == "dream":
        return group_advantages(reward.mean(1), config.group)[:, None].expand_as(reward)
    total, later = torch.empty_like(reward), torch.zeros_like(reward[:, 0])
    for i in reversed(range(reward.shape[1])):
        later = reward[:, i] + config.discount * later
        total[:, i] = later + reward[:, max(0, i - ahead) : i].sum(1)
    return torch.stack([group_advantages(column, config.group) for column in total.unbind(1)], 1)


def log_density(means: Float[Tensor, "s n f d"], trace: Trace) -> Float[Tensor, "s n f"]:
    """Log-density of each solver step of each frame, a number of it."""
    std = trace.std.to(means)[:, None, None, None]
    each = -0.5 * ((trace.x[1:] - means) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return each.mean(-1)


class DenoiserUpdater:
    """Moves a world model along its dreams' advantages, and keeps it near what it was."""

    def __init__(self, model: Any, config: GRPOConfig) -> None:
        self.model, self.config = model, config
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        if config.lora_rank:
            self.weights = add_adapters(model, config.lora_rank)
        else:
            self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.lr, weight_decay=0.0)

    def published(self) -> Any:
        """The model as it is now, with plain weights."""
        return merged(self.model) if self.config.lora_rank else self.model

    def update(self, dreams: TracedDreams, generator: torch.Generator) -> dict[str, float]:
        """Gradient steps over all rows. Raises `WorldlineError` for a log-probability that is not finite, or a model that went too far."""
        config, n, told = self.config, len(dreams.reward), []
        for _ in range(config.epochs):
            for rows in torch.randperm(n, generator=generator).split(config.minibatch):
                loss, shown = self.loss(dreams, rows)
                self.optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.weights, config.max_norm)
                if not norm.isfinite():
                    raise WorldlineError(
                        f"a finite log-probability and gradient are required, got a gradient norm of {float(norm)}"
                    )
                self.optimizer.step()
                told.append(shown | {"gradient_norm": float(norm)})
        found = {name: sum(row[name] for row in told) / len(told) for name in told[0]}
        if not found["kl"] <= config.max_kl:
            raise WorldlineError(
                f"the world model is {found['kl']:.3g} nats a number from the pretrained one, at most {config.max_kl:g} are allowed. "
                "Lower the learning rate, or raise the weight of the divergence (kl)."
            )
        return found

    def loss(self, dreams: TracedDreams, rows: Int[Tensor, " r"]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The clipped objective of some rows, and what to watch."""
        config, trace = self.config, rows_of(dreams.trace, rows)
        means = self.model.trace_means(trace)
        with torch.no_grad():
            before = self.reference.trace_means(trace)
        change = log_density(means, trace) - dreams.old[:, rows]
        if not change.isfinite().all():
            raise WorldlineError("a finite log-probability is required, got NaN or infinity; the weights are broken")
        ratio, advantage = change.exp(), dreams.advantage[rows]
        held = ratio.clamp(1 - config.clip, 1 + config.clip)
        gain = torch.minimum(ratio * advantage, held * advantage)
        std = trace.std.to(means)[:, None, None, None]
        kl = (0.5 * ((means - before) / std).square()).mean()
        # in units of the clip, so that learning rate and weight mean the same whatever the clip is
        loss = -(gain / config.clip).mean() + config.kl * kl / config.clip
        shown = {
            "loss": float(loss.detach()),
            "kl": float(kl.detach()),
            "clipped": float(((ratio - 1).abs() > config.clip).float().mean()),
            "ratio_spread": float(ratio.detach().std()),
        }
        return loss, shown


def rows_of(trace: Trace, rows: Int[Tensor, " r"]) -> Trace:
    """The rows named."""
    return replace(trace, mean=trace.mean[:, rows], x=trace.x[:, rows], context=trace.context.index(rows))


def repeat(clip: Clip, rows: Int[Tensor, " r"]) -> Clip:
    """The rows named, repeats allowed."""
    return replace(
        clip,
        frames={c: z[rows] for c, z in clip.frames.items()},
        poses=clip.poses[rows],
        actions=clip.actions[rows],
        present={c: there[rows] for c, there in clip.present.items()},
        instruction=tuple(clip.instruction[int(i)] for i in rows) if clip.instruction else (),
    )
