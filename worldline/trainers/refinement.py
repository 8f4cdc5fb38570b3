"""Refine a policy inside the frozen world model: collect imagined decisions, update, check, keep the best (World4RL 2509.19080).

- An iteration's decisions begin at real first frames of training episodes, and are drawn by (seed, iteration) alone; so a killed
  refinement goes on bit for bit.
- The check rolls the policy out from first frames of held-out episodes, which it never trains on, with the same noise every time.
  It needs no environment. The policy that is published is the one that did best there, each check averaged with those beside it
  (`smoothed`); when that has not improved for `patience` checks, refinement stops.
- With a second opinion (another world model and scorer, in which nothing is optimised) it is success there that decides: a policy that
  learned the weak spots of one dream does not meet them in another (validation by models not trained on, ME-TRPO 1802.10592, section 4).
- Nothing of the world models, their tokenizers or the scorers learns: their fingerprints are compared at the end.
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributions import kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from worldline.checkpoint import best_device, fingerprint, to_json
from worldline.errors import WorldlineError
from worldline.eval.intervals import wilson
from worldline.eval.replays import Replays
from worldline.executor import index_observation
from worldline.policies import ClonedPolicy, SteeredPolicy, VideoActionPolicy, load_policy
from worldline.policies.heads import DiffusionHead, GaussianHead
from worldline.rl_in_imagination.collect import collect, require_actor
from worldline.rl_in_imagination.doubt import Doubt
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.episodes import ImaginedEpisodes
from worldline.rl_in_imagination.ppo import PPOConfig, Updater, ValueNetwork
from worldline.rl_in_imagination.success import episode_probability
from worldline.trainers.inputs import claim_output
from worldline.trainers.state import IterationState
from worldline.types import Observation, Scorer, WorldSpec, require_match

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """How long, from where, and how it is watched."""

    iterations: int = 40
    """Of dreaming and learning."""
    rows: int = 32
    """Episodes imagined side by side."""
    frames: int = 41
    """Of an episode, the real first one included."""
    critic_first: int = 3
    """Iterations in which the critic alone learns."""
    progress: float = 0.0
    """Weight of the shaping by the scorer's success probability: a reward before success is seen."""
    least_std: float = 0.1
    """Gaussian policies begin to explore with at least this standard deviation (normalised actions); the most is 1."""
    check_every: int = 5
    """Iterations between checks on held-out first frames."""
    check_episodes: int = 64
    """Episodes of a check."""
    patience: int = 3
    """Checks without an improvement after which refinement stops."""
    seed: int = 0
    """Of starts, dreams and updates."""
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        for name in ("iterations", "rows", "check_every", "check_episodes", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frames < 2 or self.critic_first < 0 or self.progress < 0 or not 0 < self.least_std <= 1:
            raise ValueError(
                "frames of at least 2, critic_first and progress of at least 0, least_std above 0 and at most 1 required, got "
                f"{self.frames}, {self.critic_first}, {self.progress} and {self.least_std}"
            )
        if self.ppo.algorithm == "grpo" and self.rows % self.ppo.group:
            raise ValueError(f"rows must be whole groups of {self.ppo.group} (grpo), got {self.rows}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """What stays as it is: the dream, the scorer, the rule of success (a probability above `threshold` for `persist` frames), and what
    ends episodes that leave the data."""

    dream: Dream
    scorer: Scorer
    threshold: float
    persist: int = 1
    doubt: Doubt | None = None

    def fingerprints(self) -> dict[str, str]:
        parts = {"world_model": self.dream.world_model, "tokenizer": self.dream.tokenizer, "scorer": self.scorer}
        return {name: fingerprint(part.state_dict()) for name, part in parts.items() if isinstance(part, nn.Module)}


def load_actor(folder: str | Path, spec: WorldSpec, *, least_std: float) -> Any:
    """The policy to refine in a world of `spec`, as reinforcement learning moves it; diffusion policies and unified
    models are steered by their noise.

    Raises `PolicyError` or `SpecMismatch` naming what does not fit that world.
    """
    policy: Any = load_policy(str(folder), spec=spec)
    denoises = isinstance(policy, VideoActionPolicy) or (
        isinstance(policy, ClonedPolicy) and isinstance(policy.head, DiffusionHead)
    )
    if denoises:
        policy = SteeredPolicy(policy).to(best_device())
    require_actor(policy, spec)
    require_match(spec, policy.spec, between=f"world model and policy {folder}")
    if isinstance(policy, ClonedPolicy) and isinstance(policy.head, GaussianHead):
        with torch.no_grad():
            policy.head.log_std.clamp_(min=math.log(least_std))
    return policy.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """What a refinement did. `history` holds a row for each iteration, `checks` one for each check; both JSON-like."""

    history: list[dict[str, float]]
    checks: list[dict[str, float]]
    best: int  # the iteration whose policy is published
    stopped: str
    fingerprints: Mapping[str, str]


def claim(out: Path, settings: RefineSettings, identity: Mapping[str, Any]) -> None:
    """Make `out` this refinement's. What `identity` names must be the same when it goes on; it may be longer then."""
    kept = {k: v for k, v in to_json(settings).items() if k not in ("iterations", "patience")}
    claim_output(out, "refinement", {**identity, "settings": kept}, identity=(*identity, "settings"))


def refine(
    actor: Any,
    judges: Judges,
    starts: Observation,
    held_out: Replays,
    settings: RefineSettings,
    out: Path,
    *,
    second: Judges | None = None,
    provenance: Mapping[str, Any],
    progress: bool = True,
) -> Refinement:
    """Refine `actor`, publish the best in `out` and every checked one in `out/checked/ITERATION`. Goes on from `out/training`.

    Args:
        starts: real first observations that imagined episodes begin at.
        held_out: real episodes for the check; whole ones say how far the policy moved where the robot has been.
        out: a folder claimed for this run (`claim`).
        second: in whose dream checks decide instead; the policy is never refined there.
    """
    before = _fingerprints(judges, second)
    torch.manual_seed(settings.seed)
    critic = None
    if settings.ppo.algorithm == "ppo":
        normalizer = cloned(actor).pose_normalizer
        critic = ValueNetwork(actor.encoder.config, actor.spec, pose_normalizer=normalizer).eval()
        critic = critic.to(next(actor.parameters()).device)  # drawn on the CPU: the same wherever it runs
    updater = Updater(actor, critic, settings.ppo)
    state = IterationState(
        out / "training" / "state.safetensors",
        modules={"actor": updater.actor, "reference": updater.reference, "critic": updater.critic},
        optimizers={"actor": updater.optimizer, "critic": updater.critic_optimizer},
    )
    iteration, history, checks = state.restore()
    spec = actor.spec
    frames_a_chunk = cloned(actor).chunk_length // spec.control_steps
    episodes = ImaginedEpisodes(
        judges.dream,
        judges.scorer,
        starts,
        rows=settings.rows,
        horizon=settings.frames - 1,
        threshold=judges.threshold,
        persist=judges.persist,
        doubt=judges.doubt,
    )
    decisions = math.ceil((settings.frames - 1) / frames_a_chunk)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=iteration)
    bar = tqdm(total=settings.iterations, initial=iteration, desc="refine", unit="iteration", disable=not progress)
    stopped = "all iterations were run"
    try:
        while True:
            # --- check: is it better where it has not trained? --------------------------------------------------------
            last = iteration >= settings.iterations
            if (iteration % settings.check_every == 0 or last) and not (
                checks and checks[-1]["iteration"] == iteration
            ):
                found = check(actor, updater.reference, judges, held_out, settings)
                if second is not None:
                    found |= {f"second_{k}": v for k, v in imagined(actor, second, held_out, settings).items()}
                checks.append({"iteration": float(iteration), **found})
                facts = {**provenance, "iteration": iteration, "check": found}
                actor.save_pretrained(out / "checked" / f"{iteration:04d}", provenance=facts)
                publish(out, best_of(checks))
                for name, value in found.items():
                    writer.add_scalar(f"check/{name}", value, iteration)
                shown = {"held-out": "success", "second opinion": "second_success"}
                bar.set_postfix({name: f"{found[key]:.2f}" for name, key in shown.items() if key in found})
                state.store(iteration, history, checks)
            since = sum(c["iteration"] > best_of(checks) for c in checks)
            if not last and since >= settings.patience:
                stopped = f"{since} checks brought nothing better than iteration {best_of(checks)}"
                break
            if last:
                break

            # --- collect ----------------------------------------------------------------------------------------------
            seed = settings.seed * 1_000_003 + iteration
            generator = torch.Generator().manual_seed(seed)
            begin, again = None, True
            if settings.ppo.algorithm == "grpo":
                count = settings.rows // settings.ppo.group
                begin = torch.randint(len(starts), (count,), generator=generator)
                begin, again = begin.repeat_interleave(settings.ppo.group), False
            made = collect(
                episodes,
                actor,
                critic,
                decisions=decisions,
                seed=seed,
                starts=begin,
                again=again,
                progress=settings.progress,
                discount=settings.ppo.discount,
            )

            # --- update -----------------------------------------------------------------------------------------------
            move = critic is None or iteration >= settings.critic_first
            learned = updater.update(made, generator=generator, move=move)
            iteration += 1
            history.append({"iteration": float(iteration), **made.outcomes(), "frames": float(made.frames), **learned})
            state.store(iteration, history, checks)

            # --- log --------------------------------------------------------------------------------------------------
            bar.update()
            for name, value in history[-1].items():
                if not math.isnan(value):
                    writer.add_scalar(f"refine/{name}", value, iteration)
    finally:
        bar.close()
        writer.close()
    publish(out, best_of(checks))
    after = _fingerprints(judges, second)
    if after != before:
        raise WorldlineError(f"the world model, tokenizer and scorer must stay as they were: {before}, got {after}")
    return Refinement(history=history, checks=checks, best=best_of(checks), stopped=stopped, fingerprints=before)


def _fingerprints(judges: Judges, second: Judges | None) -> dict[str, str]:
    more = {} if second is None else {f"second {name}": value for name, value in second.fingerprints().items()}
    return judges.fingerprints() | more


def smoothed(checks: Sequence[Mapping[str, float]]) -> list[float]:
    """Success of every check (the second opinion's, where there is one), averaged with the checks before and after it at half its weight.

    64 dreams tell success to 0.06, and the best of nine such checks is mostly the luckiest; neighbours are nearly the same policy.
    """
    success = [c.get("second_success", c["success"]) for c in checks]
    padded = [None, *success, None]
    means = []
    for before, at, after in zip(padded, success, padded[2:]):
        beside = [s for s in (before, after) if s is not None]
        means.append((2 * at + sum(beside)) / (2 + len(beside)))
    return means


def best_of(checks: Sequence[Mapping[str, float]]) -> int:
    """The iteration that did best on held-out first frames, by `smoothed` success; the first of equals."""
    means = smoothed(checks)
    return int(checks[means.index(max(means))]["iteration"])


def publish(out: Path, iteration: int) -> None:
    """Make the policy checked after so many iterations the one that `out` holds."""
    shutil.copytree(out / "checked" / f"{iteration:04d}", out, dirs_exist_ok=True)


@torch.no_grad()
def check(actor: Any, reference: Any, judges: Judges, held_out: Replays, settings: RefineSettings) -> dict[str, float]:
    """Imagined success from held-out first frames, with its interval, and how far the policy moved on real held-out frames."""
    seen = real_observations(held_out, 128)
    away = kl_divergence(actor.distribution(seen), reference.distribution(seen)).mean()
    return {**imagined(actor, judges, held_out, settings), "real_kl": float(away)}


@torch.no_grad()
def imagined(actor: Any, judges: Judges, held_out: Replays, settings: RefineSettings) -> dict[str, float]:
    """Success in the dream of `judges` from held-out first frames, with its interval; the same noise every time."""
    rows = torch.arange(settings.check_episodes) % len(held_out.poses)
    made = rollout(
        judges.dream,
        actor,
        judges.scorer,
        index_observation(held_out.first, rows),
        frames=settings.frames,
        seeds=torch.arange(settings.check_episodes) + 7919,
        leaves=None if judges.doubt is None else judges.doubt.exceeded,
    )
    said = episode_probability(made.probability, persist=judges.persist) > judges.threshold
    starts = min(len(said), len(held_out.poses))  # dreams from one start hardly differ
    between = wilson(float(said.float().mean()) * starts, starts)
    return {"success": float(said.float().mean()), "low": between.low, "high": between.high}


def real_observations(replays: Replays, most: int) -> Observation:
    """At most so many frames of real episodes, evenly spread."""
    n, t = replays.poses.shape[:2]
    chosen = torch.linspace(0, n * t - 1, min(most, n * t)).long()
    return Observation(
        images={c: x.flatten(0, 1)[chosen] for c, x in replays.frames.items()},
        pose=replays.poses.flatten(0, 1)[chosen],
        instruction=tuple(replays.instruction[int(i) // t] for i in chosen),
    )


def cloned(actor: Any) -> ClonedPolicy | VideoActionPolicy:
    """The policy that was learned from demonstrations."""
    return actor.base if isinstance(actor, SteeredPolicy) else actor
