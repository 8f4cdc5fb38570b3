"""Verb `refine`: make a policy better inside the frozen world model; with --truth, see in the simulator whether it did."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.commands.outputs import command_line
from worldline.commands.recording import cores
from worldline.commands.refining_page import refinement_page
from worldline.commands.rollouts import Kept, Truth, TruthSettings, check_truth, fingerprint_of, identity_of, weights_of
from worldline.commands.sampling import SamplingFlags, calibrate_doubt, load_doubt, load_dream, load_scorer
from worldline.errors import WorldlineError
from worldline.eval import Report, video_grid
from worldline.eval.intervals import newcombe_paired, wilson
from worldline.eval.ranking import ReplayDiagnostic, imagine_replays, replay_diagnostic
from worldline.eval.replays import Replays, load_starts
from worldline.executor import index_observation
from worldline.policies import load_policy
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import SuccessScorer, check_scorer, episode_probability, episode_success
from worldline.trainers.refinement import (
    Judges,
    Refinement,
    RefineSettings,
    claim,
    load_actor,
    refine,
    smoothed,
)
from worldline.types import WorldSpec, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine(SamplingFlags):
    """Refine a cloned policy by reinforcement learning in a frozen world model: no further step in the environment.

    Imagined episodes begin at first frames of --data's training episodes, the check at those of its held-out ones. The best policy by
    that check is published in --out, which is a policy folder like any other; the same command goes on after an interruption.

    Example: worldline refine --policy runs/bc50 --world-model runs/wm --scorer runs/success --data data/drawer --out runs/refined
    """

    policy: Path
    """A policy folder: bc and discrete ones learn themselves, a diffusion or unified video-action policy is steered by its noise."""
    world_model: Path
    """The frozen world model in which it is refined."""
    scorer: Path
    """Whose success is the reward (worldline train scorer)."""
    data: tuple[Path, ...]
    """Datasets with the real first frames; those with success labels also set the threshold."""
    out: Path
    """Folder for the refined policy, its checks and the report."""
    rl: RefineSettings = field(default_factory=RefineSettings)
    threshold: float | None = None
    """Success probability that counts as success in the dream; by default chosen on imagined replays of held-out episodes."""
    doubt_steps: int = 0
    """End imagined episodes that leave what the world model knows: where two denoisings of a frame, of so many solver steps, disagree
    more than in dreams of held-out episodes. 2 costs about four more passes a frame; 0: never."""
    check_world_model: Path | None = None
    """Another world model (seed, kind or data) in whose dream the checks are done, and which the policy is never refined in: it decides what
    is published and when to stop. Success that rises in the first dream alone is that dream's weak spot, not a better policy. Two that learned
    from the same data may share one: another seed did not see what docs/results.md tells of."""
    check_scorer: Path | None = None
    """Scorer of those checks, best one of its own; --scorer by default."""
    override_audit: bool = False
    """Use scorers that failed their audit. The report says so."""
    truth: str | None = None
    """Simulator that judges every checked policy afterwards, for example metaworld/drawer-open-v3. It is never trained in."""
    truth_episodes: int = 50
    """True rollouts of each checked policy."""
    seed_of_truth: int = 1
    """Of the true starts."""
    processes: int | None = None
    """Simulator processes; one a core by default."""
    videos: int = 3
    """Held-out starts shown before and after."""

    def __post_init__(self) -> None:
        if self.truth_episodes < 1 or self.videos < 0:
            raise ValueError(
                f"truth_episodes of at least 1 and videos of at least 0 required, got {self.truth_episodes} and {self.videos}"
            )
        if self.check_scorer is not None and self.check_world_model is None:
            raise ValueError("check_scorer goes with check_world_model, the second dream, which was not given")
        if self.doubt_steps < 0:
            raise ValueError(f"doubt_steps of at least 0 required, got {self.doubt_steps}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold between 0 and 1 required, got {self.threshold}")


def run_refine(config: Refine, *, progress: bool = True) -> Path:
    """Refine, write the report, return the folder."""
    scorers = {config.scorer, config.check_scorer or config.scorer}
    failures = [f"{s}: {said}" for s in sorted(scorers) for said in check_scorer(s, override=config.override_audit)]
    dream = load_dream(config.world_model, config.sampling())
    if settings := _truth_settings(config, dream.spec):
        check_truth(settings)
    scorer = _load_scorer(config.scorer, dream)
    doubt = load_doubt(dream, config.doubt_steps) if config.doubt_steps else None
    actor = load_actor(config.policy, dream.spec, least_std=config.rl.least_std)
    held_out = load_starts(config.data, "held-out", dream, frames=None)
    starts = load_starts(config.data, "train", dream).first
    made_from = {
        "policy": weights_of(config.policy),
        "world_model": weights_of(config.world_model),
        "scorer": scorer.name,
        "data": [str(folder) for folder in config.data],
    }
    other = None
    if config.check_world_model is not None:
        other = _second_dream(config, config.check_world_model, dream.spec)
        made_from |= {"check_world_model": weights_of(config.check_world_model), "check_scorer": other[1].name}
    asked = {name: made_from.get(name) for name in ("check_world_model", "check_scorer")}
    changes = {"threshold": config.threshold, "sampling": config.sampling(), "doubt_steps": config.doubt_steps}
    claim(config.out, config.rl, {**made_from, **asked, **changes})
    kept = Kept(config.out / "rollouts")
    first = _opinion(config, dream, scorer, [made_from["world_model"], config.sampling()], held_out, kept, progress)
    second = other and _opinion(config, *other, [made_from["check_world_model"], {}], held_out, kept, progress)
    judges, doubted = first.judges, None
    if doubt is not None:
        doubted = calibrate_doubt(doubt, held_out, progress=progress)
        judges = replace(judges, doubt=replace(doubt, limit=doubted.limit))
    found = refine(
        actor,
        judges,
        starts,
        held_out,
        config.rl,
        config.out,
        second=second and second.judges,
        provenance={"refined_from": str(config.policy), **made_from},
        progress=progress,
    )
    truth = _truth(config, first, second, found, kept, progress) if config.truth else None
    results = {
        "best_iteration": found.best,
        "stopped": found.stopped,
        "threshold": judges.threshold,
        # no episode may have ended in an iteration: then its success is not a number
        "history": [{k: None if math.isnan(v) else v for k, v in row.items()} for row in found.history],
        "checks": [{**c, "smoothed": mean} for c, mean in zip(found.checks, smoothed(found.checks))],
        "audit_failures": failures,
        "frozen": dict(found.fingerprints),
        "replayed": first.diagnostic and hallucination(first.diagnostic),
        "replay_diagnostic": first.diagnostic and first.diagnostic.to_dict(),
        "second": second
        and {
            "threshold": second.judges.threshold,
            "replayed": second.diagnostic and hallucination(second.diagnostic),
        },
        "doubt": None if doubted is None else to_json(doubted),
        "truth": truth,
    }
    provenance = {
        "policy": f"{config.policy} ({made_from['policy']})",
        "world model": made_from["world_model"],
        "scorer": scorer.name,
    }
    if other is not None:
        provenance |= {"checked in": made_from["check_world_model"], "checked by": made_from["check_scorer"]}
    report = Report(
        f"Refinement of {config.policy.name}", command=command_line("refine", config), provenance=provenance
    )
    refinement_page(report, results, failures)
    _videos(report, config, judges, held_out)
    report.write(config.out, results)
    return config.out


def _load_scorer(folder: Path, dream: Dream) -> SuccessScorer:
    scorer = load_scorer(folder)
    require_match(dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "control_steps"))
    return scorer


def _second_dream(config: Refine, folder: Path, spec: WorldSpec) -> tuple[Dream, SuccessScorer]:
    """Another world model, sampled as its checkpoint says, and a scorer of it. Raises where it is of another world, or the same model."""
    if weights_of(folder) == weights_of(config.world_model):
        raise WorldlineError(
            f"--check-world-model: another model than --world-model required, got the same weights in {folder}. Train one with another "
            "--loop.seed."
        )
    dream = load_dream(folder)
    for required, provided in ((spec, dream.spec), (dream.spec, spec)):  # the same cameras, not only enough
        require_match(provided, required, between="--world-model and --check-world-model")
    return dream, _load_scorer(config.check_scorer or config.scorer, dream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """A dream with what judges it, how well it replays held-out episodes, and the key that its dreams are kept under."""

    judges: Judges
    diagnostic: ReplayDiagnostic | None
    key: list[Any]


def _opinion(
    config: Refine,
    dream: Dream,
    scorer: SuccessScorer,
    key: list[Any],
    held_out: Replays,
    kept: Kept,
    progress: bool,
) -> Opinion:
    """Judges by the threshold that is asked for, or that tells replays of held-out episodes best."""
    key = [*key, scorer.name]
    diagnostic = None
    if held_out.frame_success is not None:
        about = ["replayed", *key, [str(folder) for folder in config.data]]
        said = kept(about, lambda: {"probability": imagine_replays(dream, scorer, held_out, progress=progress)})
        diagnostic = replay_diagnostic(scorer, held_out, said["probability"])
    threshold = config.threshold
    if threshold is None:
        threshold = diagnostic.threshold if diagnostic is not None else scorer.config.threshold
    judges = Judges(dream=dream, scorer=scorer, threshold=threshold, persist=scorer.config.persist)
    return Opinion(judges=judges, diagnostic=diagnostic, key=key)


def hallucination(diagnostic: ReplayDiagnostic) -> dict[str, Any]:
    """Of held-out episodes that truly failed, how many the dream of their own actions and the scorer call a success."""
    episodes, true, said = (sum(row[i] for row in diagnostic.by_cause.values()) for i in range(3))
    wrong = diagnostic.calibration.false_positives
    return {"failures": episodes - true, "called_success": wrong, "successes": true, "imagined_successes": said}


def _truth_settings(config: Refine, spec: WorldSpec) -> TruthSettings | None:
    if config.truth is None:
        return None
    return TruthSettings(
        world=config.truth,
        spec=spec,
        episodes=config.truth_episodes,
        starts=config.truth_episodes,
        horizon=(config.rl.frames - 1) * spec.control_steps,
        frames=config.rl.frames,
        seed=config.seed_of_truth,
        processes=cores() if config.processes is None else config.processes,
    )


def _truth(
    config: Refine, first: Opinion, second: Opinion | None, found: Refinement, kept: Kept, progress: bool
) -> dict[str, Any]:
    """Of every checked policy: true and imagined success from the same starts, and how often the dream made a failure a success."""
    spec, frames = first.judges.dream.spec, config.rl.frames
    settings = _truth_settings(config, spec)
    assert settings is not None
    rows = []
    successes: dict[int, Tensor] = {}
    with Truth(settings, kept) as truth:
        starts = truth.starts()

        def said(opinion: Opinion, folder: Path, policy: Any) -> Tensor:
            judges, seeds = opinion.judges, torch.arange(len(starts)) + 104_729
            key = ["dreamt", weights_of(folder), *opinion.key, frames, fingerprint_of(starts)]

            def imagine() -> dict[str, Tensor]:
                made = rollout(judges.dream, policy, judges.scorer, starts, frames=frames, seeds=seeds)
                return {"probability": made.probability}

            return episode_probability(kept(key, imagine)["probability"], persist=judges.persist) > judges.threshold

        for check in found.checks:
            iteration = int(check["iteration"])
            folder = config.out / "checked" / f"{iteration:04d}"
            policy = load_policy(str(folder), spec=spec)
            shown = f"simulate iteration {iteration}" if progress else None
            frame_success = truth.frame_success(identity_of(str(folder), policy), policy, progress=shown)
            true = episode_success(frame_success, persist=first.judges.persist)
            imagined = said(first, folder, policy)
            between = wilson(int(true.sum()), len(true))
            row = {
                "iteration": iteration,
                "true": float(true.float().mean()),
                "true_interval": [between.low, between.high],
                "imagined": float(imagined.float().mean()),
                "failures": int((~true).sum()),
                "called_success": int((imagined & ~true).sum()),
            }
            if second is not None:
                imagined = said(second, folder, policy)
                row |= {
                    "second": float(imagined.float().mean()),
                    "second_called_success": int((imagined & ~true).sum()),
                }
            rows.append(row)
            successes[iteration] = true
    before, best = successes[0], successes[found.best]
    gain = newcombe_paired(best.double().numpy(), before.double().numpy())
    return {
        "simulator": config.truth,
        "episodes": config.truth_episodes,
        "horizon": settings.horizon,
        "checked": rows,
        "gain": float(best.float().mean() - before.float().mean()),
        "gain_interval": [gain.low, gain.high],
    }


def _videos(report: Report, config: Refine, judges: Judges, held_out: Replays) -> None:
    """Dreams of the cloned and the refined policy from the same held-out starts with the same noise."""
    rows = torch.arange(min(config.videos, len(held_out.poses)))
    if not len(rows):
        return
    dreams = {}
    for name, folder in (("before", config.out / "checked" / "0000"), ("refined", config.out)):
        policy = load_policy(str(folder), spec=judges.dream.spec)
        dreams[name] = rollout(
            judges.dream,
            policy,
            None,
            index_observation(held_out.first, rows),
            frames=config.rl.frames,
            seeds=rows + 7919,
            keep_frames=True,
        ).frames
    for i in rows.tolist():
        columns = {name: {c: x[i] for c, x in frames.items()} for name, frames in dreams.items()}
        report.video(f"held-out start {i}, imagined", video_grid(columns, cell=128), judges.dream.spec.fps)
