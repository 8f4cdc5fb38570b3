"""Verb `rank`: which policy is best, judged in imagination; with --truth, judged against the simulator too."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.commands.acting import load_acting
from worldline.commands.independence import shared_with_training
from worldline.commands.outputs import check_report_folder, command_line
from worldline.commands.ranking_against import change_since, earlier_outcomes, outcomes_of
from worldline.commands.ranking_page import ranking_page
from worldline.commands.recording import cores
from worldline.commands.rollouts import (
    Kept,
    Truth,
    TruthSettings,
    check_truth,
    fingerprint_of,
    fingerprint_of_tensor,
    identity_of,
    weights_of,
)
from worldline.commands.sampling import SamplingFlags, load_dream, load_scorer
from worldline.errors import WorldlineError
from worldline.eval import Report, video_grid
from worldline.eval.ranking import (
    Ranked,
    ReplayDiagnostic,
    imagine_policy,
    imagine_replays,
    own_actions_table,
    policy_table,
    replay_diagnostic,
    summarize_ranking,
    tokenizer_table,
)
from worldline.eval.replays import Replays, join_replays, load_replays, open_for, range_results
from worldline.executor import index_observation
from worldline.policies import ThroughTokenizer
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import SuccessScorer
from worldline.types import Observation, Policy, WorldSpec, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank(SamplingFlags):
    """Rank policies by imagined rollouts.

    With --truth the dreams start from the first frames of the very episodes that give the truth, and the report says how
    far imagination can be trusted. Without it they start from held-out first frames of --data: that is what you have with a
    robot and no simulator.

    Example: worldline rank --world-model runs/wm --scorer runs/success --policies runs/bc50 runs/bc10 \\
             --truth metaworld/drawer-open-v3 --data data/drawer --out reports/rank
    """

    world_model: Path
    """In whose dream they are ranked."""
    scorer: Path
    """Who says what success is there (worldline train scorer)."""
    policies: tuple[str, ...]
    """Policy folders, module:function, ws://host:port; behind any '@noise=0.5,lag=4' corrupts it, '@best=8,scorer=runs/success,dream=runs/wm'
    has it try 8 chunks in that dream and send the best."""
    out: Path
    """Folder for the report and the rollouts."""
    truth: str | None = None
    """Simulator that gives the truth, for example metaworld/drawer-open-v3."""
    data: tuple[Path, ...] = ()
    """Datasets whose held-out episodes are replayed as a diagnostic and set the threshold; without --truth, also starts."""
    replays: Literal["held-out", "all"] = "held-out"
    """Which episodes of --data are replayed (all: for datasets recorded for testing alone)."""
    episodes: int = 50
    """True rollouts a policy."""
    imagined_episodes: int = 100
    """Imagined rollouts a policy; the first --episodes of them start where the true ones do."""
    frames: int | None = None
    """Frames of a rollout; with --truth those of the simulator's horizon, else those of the shortest held-out episode."""
    horizon: int = 160
    """Control steps of a true rollout."""
    lineages: tuple[str, ...] = ()
    """The training each policy comes from; by default its name up to '@'. Policies of one training are not independent."""
    correct_with: int = 10
    """True rollouts a policy that the bias correction may use."""
    through_tokenizer: int = 0
    """True rollouts a policy that sees each frame encoded and decoded: parts the tokenizer's share of a gap from the
    dynamics' share. Needs --truth."""
    own_actions: int = 0
    """True rollouts a policy of the very actions it took in imagination. Where simulator and dream say the same of them, what
    is wrong is what the policy saw; where they do not, what actions lead to, or the scorer. Needs --truth."""
    against: Path | None = None
    """Report folder of a ranking by another world model, else alike (--policies, --truth, --episodes, --seed): which of the two ranks better?"""
    seed: int = 0
    """Of true starts and of the solver's noise."""
    batch: int = 50
    """Rollouts imagined at a time: as many as memory holds."""
    processes: int | None = None
    """Simulator processes; one a core by default."""
    videos: int = 2
    """How many policies' rollouts are shown: the best, then the worst (0 to 2)."""

    def __post_init__(self) -> None:
        if len(self.policies) < 2:
            raise ValueError(f"--policies: at least two policies are required to rank, got {list(self.policies)}")
        if len(set(self.policies)) != len(self.policies):
            raise ValueError(f"--policies: each policy must be named once, got {list(self.policies)}")
        if self.lineages and len(self.lineages) != len(self.policies):
            raise ValueError(f"--lineages: one a policy required ({len(self.policies)}), got {len(self.lineages)}")
        if not self.truth and not self.data:
            raise ValueError(
                "either --truth SIMULATOR or --data DATASET is required: dreams need first frames to start from"
            )
        most = min(self.episodes, self.imagined_episodes)
        for name in ("through_tokenizer", "own_actions"):
            count = getattr(self, name)
            if count and (not self.truth or not 0 <= count <= most):
                raise ValueError(
                    f"--{name.replace('_', '-')}: --truth and at most the smaller of --episodes and --imagined-episodes "
                    f"({most}) required, got {count} with --truth {self.truth}"
                )
        if self.against is not None and not self.truth:
            raise ValueError("--against: --truth is required, without which nobody knows which model ranks better")
        for name in ("episodes", "imagined_episodes", "horizon", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: at least 1 required, got {getattr(self, name)}")
        if self.frames is not None and self.frames < 2:
            raise ValueError(f"--frames: at least 2 required, got {self.frames}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judges:
    """World model and scorer, and where their rollouts are kept."""

    dream: Dream
    scorer: SuccessScorer
    kept: Kept
    identity: list[Any]


def run_rank(config: Rank, *, progress: bool = True) -> Path:
    """Roll out, compare, write the report, return its folder."""
    check_report_folder(config.out)
    earlier = earlier_outcomes(config.against, labels(config.policies))
    judges = _load_judges(config)
    dream, scorer = judges.dream, judges.scorer
    policies = _load_policies(config, dream.spec)
    settings = _truth_settings(config, dream)
    replays = _load_replays(config, dream)
    with Truth(settings, judges.kept) if settings else nullcontext() as truth:
        warnings = shared_with_training(
            config.policies,
            world_model=config.world_model,
            scorer=config.scorer,
            calibration=config.data,
            truth=(settings.world, settings.seeds) if settings else None,
        )
        if truth is not None:
            starts, frames = truth.starts(), truth.settings.frames
            distinct = len(starts)
        else:
            every = join_replays(replays)  # the config requires --data without --truth
            starts, frames = _repeat(every.first, config.imagined_episodes), every.poses.shape[1]
            distinct = min(len(every.first), len(starts))
        true = _simulate(config, truth, policies, progress) if truth is not None else None
        imagined = _imagine(config, judges, policies, starts, frames, progress)
        diagnostic = _replay(config, judges, replays, progress)
        threshold = diagnostic.threshold if diagnostic else scorer.config.threshold
        ranked = summarize_ranking(
            labels(config.policies),
            config.lineages or [name.partition("@")[0] for name in config.policies],
            torch.stack([made["probability"] for made in imagined]),
            true,
            threshold=threshold,
            persist=scorer.config.persist,
            correct_with=config.correct_with,
            starts=distinct,
            seed=config.seed,
        )
        results = _results(config, ranked, diagnostic, threshold, frames) | {
            "independence": warnings,
            "actions_out_of_range": _ranges(config, dream, imagined),
            "through_tokenizer": None,
            "own_actions": None,
            "change": change_since(config.against, earlier, ranked, seed=config.seed),
        }
        persist = scorer.config.persist
        if truth is not None and config.through_tokenizer:
            seen = _through_tokenizer(config, judges, truth, policies, progress)
            results["through_tokenizer"] = tokenizer_table(ranked, seen, persist=persist)
        if truth is not None and config.own_actions:
            own = _own_actions(config, truth, imagined, progress)
            results["own_actions"] = own_actions_table(ranked, own, persist=persist)
        report = Report("Policy ranking", command=command_line("rank", config), provenance=_provenance(config, scorer))
        ranking_page(report, bool(config.data), ranked, diagnostic, results, warnings)
        _videos(report, config, judges, policies, ranked, starts, frames, truth)
    report.write(config.out, results)
    return config.out


def check_rank(config: Rank) -> None:
    """Raise at once what `run_rank` would raise after hours of something else: for what is not there, or does not fit."""
    dream = _load_judges(config).dream
    _load_policies(config, dream.spec)
    if settings := _truth_settings(config, dream):
        check_truth(settings)


def _load_policies(config: Rank, spec: WorldSpec) -> dict[str, Policy]:
    policies = {name: load_acting(name, spec=spec) for name in config.policies}
    for name, policy in policies.items():
        require_match(spec, policy.spec, between=f"world model and policy {name}")
    return policies


def labels(policies: tuple[str, ...]) -> list[str]:
    """Short names for tables: the last part of each name, the whole name where two would be alike."""
    short = []
    for name in policies:
        base, at, options = name.partition("@")
        last = [
            f"{key}{equal}{Path(value).name}" for key, equal, value in (o.partition("=") for o in options.split(","))
        ]
        short.append(Path(base).name + at + ",".join(last))
    return [s if short.count(s) == 1 else name for s, name in zip(short, policies)]


def _load_judges(config: Rank) -> _Judges:
    dream = load_dream(config.world_model, config.sampling())
    scorer = load_scorer(config.scorer)
    require_match(dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "control_steps"))
    identity = [weights_of(config.world_model), weights_of(config.scorer), config.seed, config.sampling()]
    return _Judges(dream=dream, scorer=scorer, kept=Kept(config.out / "rollouts"), identity=identity)


def _truth_settings(config: Rank, dream: Dream) -> TruthSettings | None:
    if config.truth is None:
        return None
    longest = config.horizon // dream.spec.control_steps + 1
    if config.frames is not None and config.frames > longest:
        raise WorldlineError(
            f"--frames: at most {longest} required, the frames of --horizon {config.horizon} control steps, got "
            f"{config.frames}. Raise --horizon or leave --frames out."
        )
    return TruthSettings(
        world=config.truth,
        spec=dream.spec,
        episodes=config.episodes,
        starts=max(config.episodes, config.imagined_episodes),
        horizon=config.horizon,
        frames=config.frames or longest,
        seed=config.seed,
        processes=cores() if config.processes is None else config.processes,
    )


def _load_replays(config: Rank, dream: Dream) -> list[Replays]:
    cameras = [c.name for c in dream.spec.cameras]
    parts = []
    for dataset, stride in [open_for(dream.spec, folder) for folder in config.data]:
        chosen = dataset.split(config.replays)
        parts.append(load_replays(dataset, chosen, cameras=cameras, frames=config.frames, stride=stride, held=True))
    return parts


def _replay(config: Rank, judges: _Judges, replays: list[Replays], progress: bool) -> ReplayDiagnostic | None:
    """The diagnostic on the replays with success labels; None without any."""
    labelled = [part for part in replays if part.frame_success is not None]
    if not labelled:
        return None
    every = join_replays(labelled)

    def imagine() -> dict[str, Tensor]:
        options: dict[str, Any] = {"seed": config.seed, "batch": config.batch, "progress": progress}
        return {"probability": imagine_replays(judges.dream, judges.scorer, every, **options)}

    key = ["replayed", judges.identity, fingerprint_of(every.first), fingerprint_of_tensor(every.actions)]
    return replay_diagnostic(judges.scorer, every, judges.kept(key, imagine)["probability"])


def _simulate(config: Rank, truth: Truth, policies: dict[str, Policy], progress: bool) -> Tensor:
    """True success of every frame, "policies r t"."""
    found = []
    for (name, policy), label in zip(policies.items(), labels(config.policies)):
        shown = f"simulate {label}" if progress else None
        found.append(truth.frame_success(identity_of(name, policy), policy, progress=shown))
    return torch.stack(found)


def _imagine(
    config: Rank, judges: _Judges, policies: dict[str, Policy], starts: Observation, frames: int, progress: bool
) -> list[dict[str, Tensor]]:
    """For every policy the success probabilities of its imagined frames, "n t", and the actions it took, "n t-1 k a"."""
    found = []
    for (name, policy), label in zip(policies.items(), labels(config.policies)):

        def imagine(policy: Policy = policy, label: str = label) -> dict[str, Tensor]:
            options: dict[str, Any] = {"frames": frames, "seed": config.seed, "batch": config.batch}
            shown = f"imagine {label}" if progress else None
            made = imagine_policy(judges.dream, policy, judges.scorer, starts, label=shown, **options)
            return {"probability": made.probability, "actions": made.actions}

        key = ["imagined with actions", judges.identity, identity_of(name, policy), frames, fingerprint_of(starts)]
        found.append(judges.kept(key, imagine))
    return found


def _ranges(config: Rank, dream: Dream, imagined: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Of the actions that policies asked for in imagination, how many the dream clipped, as a simulator would."""
    counted = [range_results(made["actions"], dream.spec.action) for made in imagined]
    return [{"policy": name, **found} for name, found in zip(labels(config.policies), counted)]


def _own_actions(config: Rank, truth: Truth, imagined: list[dict[str, Tensor]], progress: bool) -> Tensor:
    """True success of every frame, "policies r t", under the actions that the policies took in imagination."""
    found = []
    for made, label in zip(imagined, labels(config.policies)):
        shown = f"simulate the imagined actions of {label}" if progress else None
        found.append(truth.success_of_actions(made["actions"][: config.own_actions], progress=shown))
    return torch.stack(found)


def _through_tokenizer(
    config: Rank, judges: _Judges, truth: Truth, policies: dict[str, Policy], progress: bool
) -> Tensor:
    """True success of every frame, "policies r t", of policies that see reconstructed frames."""
    tokenizer, found = judges.dream.tokenizer, []
    for (name, policy), label in zip(policies.items(), labels(config.policies)):
        identity = ["through", tokenizer.latent_spec.fingerprint, *identity_of(name, policy)]
        shown = f"simulate {label} on reconstructed frames" if progress else None
        seeing = ThroughTokenizer(policy, tokenizer)
        found.append(truth.frame_success(identity, seeing, episodes=config.through_tokenizer, progress=shown))
    return torch.stack(found)


def _repeat(starts: Observation, count: int) -> Observation:
    """`count` rows by going round the starts; their noise and policy seeds differ."""
    return index_observation(starts, torch.arange(count) % len(starts))


def _results(
    config: Rank, ranked: Ranked, diagnostic: ReplayDiagnostic | None, threshold: float, frames: int
) -> dict[str, Any]:
    return {
        "policies": policy_table(ranked, diagnostic.threshold_interval if diagnostic else None),
        "statistics": ranked.statistics.to_dict() if ranked.statistics else None,
        "contrasts": ranked.contrasts.to_dict(),
        "outcomes": outcomes_of(ranked),
        "corrected": ranked.corrected,
        "replay_diagnostic": diagnostic.to_dict() if diagnostic else None,
        "threshold": threshold,
        "frames": frames,
        "truth": config.truth,
        "world_model": str(config.world_model),
        "scorer": str(config.scorer),
    }


def _provenance(config: Rank, scorer: SuccessScorer) -> dict[str, Any]:
    return {
        "world model": f"{config.world_model} ({weights_of(config.world_model)})",
        "scorer": scorer.name,
        "truth": config.truth or "none",
        "seed": config.seed,
    }


def _videos(
    report: Report,
    config: Rank,
    judges: _Judges,
    policies: dict[str, Policy],
    ranked: Ranked,
    starts: Observation,
    frames: int,
    truth: Truth | None,
) -> None:
    """Two imagined rollouts of the best and the worst policy, with --truth beside the true ones from the same starts."""
    rates = (ranked.imagined if ranked.truth is None else ranked.truth).float().mean(1)
    order = rates.argsort(descending=True, stable=True).tolist()
    rows = torch.arange(min(2, len(starts)))
    for which in [order[0], order[-1]][: config.videos]:
        policy = list(policies.values())[which]
        made = rollout(
            judges.dream,
            policy,
            None,
            index_observation(starts, rows),
            frames=frames,
            seeds=rows * 7919 + config.seed,
            keep_frames=True,
        ).frames
        real = truth.videos(policy, len(rows)) if truth is not None else None
        for i in rows.tolist():
            columns = {"true": real[i]} if real is not None else {}
            columns["imagined"] = {camera: video[i] for camera, video in made.items()}
            title = f"{labels(config.policies)[which]}, start {i}"
            report.video(title, video_grid(columns, cell=128), judges.dream.spec.fps)
