"""Verb `rank`: which policy is best, judged in imagination; with --truth, judged against the simulator too.

Every rollout is kept in the output folder as soon as it is done, under a key of everything it depends on: an interrupted
ranking goes on, and a ranking with one more policy only rolls that one out.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.checkpoint import load_config, read_tensors, write_tensors
from worldline.commands.dreaming import load_dream, open_for
from worldline.commands.ranking_page import ranking_page
from worldline.data import LeRobotDataset
from worldline.errors import WorldlineError
from worldline.eval import Report, video_grid
from worldline.eval.ranking import (
    Ranked,
    ReplayDiagnostic,
    imagine_policy,
    policy_table,
    replay_diagnostic,
    summarize_ranking,
)
from worldline.eval.world_model import load_replays
from worldline.executor import index_observation
from worldline.policies import load_policy
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import SuccessScorer
from worldline.sim.record import episode_seed
from worldline.sim.rollout import RolloutResult, disjoint_starts, rollout_policy
from worldline.sim.workers import WorldPool
from worldline.types import Observation, Policy, require_match

log = logging.getLogger(__name__)

TRUTH_STREAM = 777_000  # truth starts come from recordings numbered from here: no dataset is recorded with such a seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Rank policies by imagined rollouts.

    With --truth the dreams start from the first frames of the very episodes that give the truth, and the report says how
    far imagination can be trusted. Without it they start from held-out first frames of --data: that is what you have with a
    robot and no simulator.

    Example: worldline rank --world-model runs/wm --scorer runs/success --policies runs/bc50 runs/bc10 \\
             --truth metaworld/drawer-open-v3 --data data/drawer --out reports/rank
    """

    world_model: Path
    scorer: Path
    policies: tuple[str, ...]
    """Policy folders, module:function, ws://host:port; '@noise=0.5,lag=4' behind any corrupts it."""
    out: Path
    """Folder for the report and the rollouts."""
    truth: str | None = None
    """Simulator that gives the truth, for example metaworld/drawer-open-v3."""
    data: Path | None = None
    """Dataset whose held-out episodes are replayed as a diagnostic and set the threshold; without --truth, also starts."""
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
    solver_steps: int | None = None
    seed: int = 0
    batch: int = 50
    processes: int | None = None
    """Simulator processes; one a core by default."""
    videos: int = 2
    """Policies (best and worst first) whose true and imagined rollouts are shown."""

    def __post_init__(self) -> None:
        if len(self.policies) < 2:
            raise ValueError(f"at least two policies are required to rank, got {list(self.policies)}")
        if len(set(self.policies)) != len(self.policies):
            raise ValueError(f"each policy must be named once, got {list(self.policies)}")
        if self.lineages and len(self.lineages) != len(self.policies):
            raise ValueError(f"one lineage a policy required ({len(self.policies)}), got {len(self.lineages)}")
        if not self.truth and not self.data:
            raise ValueError(
                "either --truth SIMULATOR or --data DATASET is required: dreams need first frames to start from"
            )


def run_rank(config: Rank, *, progress: bool = True) -> Path:
    """Roll out, compare, write the report, return its folder."""
    dream = load_dream(config.world_model, solver_steps=config.solver_steps)
    scorer = SuccessScorer.from_pretrained(config.scorer)
    require_match(dream.spec, scorer.spec, between="world model and scorer", only=("cameras",))
    policies = {name: load_policy(name, spec=dream.spec) for name in config.policies}
    for name, policy in policies.items():
        require_match(dream.spec, policy.spec, between=f"world model and policy {name}")
    kept = _Kept(config.out / "rollouts")
    report = Report("Policy ranking", command=_command(config), provenance=_provenance(config, dream, scorer))

    diagnostic, replay_starts = _diagnose(config, dream, scorer, progress)
    threshold = diagnostic.threshold if diagnostic else scorer.config.threshold
    if config.truth:
        frames = config.frames or config.horizon // dream.spec.control_steps + 1
        starts, frame_success, shown = _truth(config, dream, policies, kept, progress)
    else:
        assert replay_starts is not None
        starts, frame_success, shown = replay_starts[0], None, {}
        frames = config.frames or replay_starts[1]
        starts = _repeat(starts, config.imagined_episodes)
    probability = torch.stack(
        [
            kept(
                ["imagined", _identity(config, name), frames, _fingerprint(starts)],
                lambda policy=policy, name=name: imagine_policy(
                    dream,
                    policy,
                    scorer,
                    starts,
                    frames=frames,
                    seed=config.seed,
                    batch=config.batch,
                    label=f"imagine {Path(name).name}" if progress else None,
                ),
            )
            for name, policy in policies.items()
        ]
    )
    ranked = summarize_ranking(
        [Path(name).name for name in config.policies],
        config.lineages or [name.partition("@")[0] for name in config.policies],
        probability,
        frame_success,
        threshold=threshold,
        persist=scorer.config.persist,
        correct_with=config.correct_with,
        seed=config.seed,
    )
    warnings = _independence(config, dream)
    results = _results(config, ranked, diagnostic, threshold, frames)
    results["independence"] = warnings
    ranking_page(report, config.data is not None, ranked, diagnostic, results, warnings)
    _videos(report, config, dream, policies, ranked, starts, frames, shown)
    report.write(config.out, results)
    return config.out


class _Kept:
    """Rollouts on disk under a hash of what they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"
        if path.is_file():
            return read_tensors(path)["value"]
        value = make()
        write_tensors(path, {"value": value})
        return value


def _identity(config: Rank, policy: str) -> list[Any]:
    """What an imagined rollout depends on besides its starts."""
    return [
        _weights(config.world_model),
        _weights(config.scorer),
        _policy_weights(policy),
        config.seed,
        config.solver_steps,
    ]


def _weights(folder: Path) -> str:
    """Hash of a checkpoint's weights and config."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def _policy_weights(policy: str) -> list[str]:
    folder = Path(policy.partition("@")[0])
    return [policy, _weights(folder) if folder.is_dir() else ""]


def _fingerprint(starts: Observation) -> str:
    digest = hashlib.sha256(starts.pose.numpy().tobytes())
    for camera in sorted(starts.images):
        digest.update(starts.images[camera].numpy().tobytes())
    return digest.hexdigest()[:16]


def _truth(
    config: Rank, dream: Dream, policies: dict[str, Policy], kept: _Kept, progress: bool
) -> tuple[Observation, Tensor, dict[str, list[RolloutResult]]]:
    """Starts of all imagined rollouts, true success of every frame "policies r t", and a few rollouts with frames."""
    assert config.truth is not None
    cameras = [c.name for c in dream.spec.cameras]
    count = max(config.episodes, config.imagined_episodes)
    seeds = [episode_seed(TRUTH_STREAM + config.seed, i) for i in range(count)]
    settings: dict[str, Any] = {
        "cameras": cameras,
        "size": dream.spec.cameras[0].height,
        "horizon": config.horizon,
        "control_steps": dream.spec.control_steps,
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with WorldPool(config.truth, rows=8, processes=config.processes or cores, **settings) as pool:
        starts = _first_frames(pool, seeds)
        shown: dict[str, list[RolloutResult]] = {}
        success = []
        for name, policy in policies.items():

            def roll(policy: Policy = policy, name: str = name) -> Tensor:
                log.info("true rollouts of %s", name)
                found = rollout_policy(pool, policy, seeds=seeds[: config.episodes], progress=progress)
                if any(r.frame_success is None for r in found):
                    raise WorldlineError(
                        f"--truth {config.truth}: a simulator that tells success is required, this one does not"
                    )
                return torch.stack([r.frame_success for r in found if r.frame_success is not None])

            key = ["truth", config.truth, _policy_weights(name), seeds[: config.episodes], config.horizon]
            success.append(kept(key, roll))
        order = sorted(policies, key=lambda n: -float(success[list(policies).index(n)].any(1).float().mean()))
        for name in [order[0], order[-1]][: config.videos]:
            shown[name] = rollout_policy(pool, policies[name], seeds=seeds[:2], keep_frames=True)
    return starts, torch.stack(success), shown


def _first_frames(pool: WorldPool, seeds: Sequence[int]) -> Observation:
    frames = []
    for i in range(0, len(seeds), pool.rows):
        wave = pool.reset(dict(enumerate(seeds[i : i + pool.rows])))
        frames += [wave[row] for row in sorted(wave)]
    return Observation(
        images={c: torch.stack([f.images[c] for f in frames]) for c in frames[0].images},
        pose=torch.stack([f.pose for f in frames]),
        instruction=(pool.instruction,) * len(frames),
    )


def _repeat(starts: Observation, count: int) -> Observation:
    """`count` rows by going round the starts; their noise and policy seeds differ."""
    return index_observation(starts, torch.arange(count) % len(starts))


def _diagnose(
    config: Rank, dream: Dream, scorer: SuccessScorer, progress: bool
) -> tuple[ReplayDiagnostic | None, tuple[Observation, int] | None]:
    if config.data is None:
        return None, None
    dataset, stride = open_for(dream, config.data)
    cameras = [c.name for c in dream.spec.cameras]
    replays = load_replays(dataset, dataset.split("held-out"), cameras=cameras, frames=config.frames, stride=stride)
    starts = (replays.first, replays.poses.shape[1])
    if replays.frame_success is None:
        return None, starts
    diagnostic, _ = replay_diagnostic(dream, scorer, replays, seed=config.seed, progress=progress)
    return diagnostic, starts


def _independence(config: Rank, dream: Dream) -> list[str]:
    """What would make the ranking flatter itself: ranked policies in the training data, starts shared with it."""
    found = []
    for part, folder in (("world-model", config.world_model), ("scorer", config.scorer)):
        for root in load_config(folder, part=part)["provenance"].get("data", []):
            if not Path(root).is_dir():
                continue
            dataset = LeRobotDataset(root)
            provenance = dataset.episode_table["provenance"]
            used = {str(p.get("policy")).partition("@")[0] for p in provenance if p}
            for name in config.policies:
                if name.partition("@")[0] in used:
                    found.append(
                        f"rollouts of {name} are in {root}, which trained the {part}: its rank flatters itself"
                    )
            seeds = [
                int(p["seed"])
                for p in provenance
                if p and str(p.get("seed", "")).isdigit() and p.get("world") == config.truth
            ]
            if config.truth and seeds and part == "world-model":
                truth = [episode_seed(TRUTH_STREAM + config.seed, i) for i in range(config.episodes)]
                check = disjoint_starts(config.truth, truth, seeds)
                if not check.disjoint:
                    found.append(
                        f"{len(check.same)} true starts are also starts of {root}: results are not on held-out states"
                    )
    return found


def _results(
    config: Rank, ranked: Ranked, diagnostic: ReplayDiagnostic | None, threshold: float, frames: int
) -> dict[str, Any]:
    return {
        "policies": policy_table(ranked),
        "statistics": ranked.statistics.to_dict() if ranked.statistics else None,
        "contrasts": ranked.contrasts.to_dict(),
        "corrected": ranked.corrected,
        "replay_diagnostic": diagnostic.to_dict() if diagnostic else None,
        "threshold": threshold,
        "frames": frames,
        "truth": config.truth,
        "world_model": str(config.world_model),
        "scorer": str(config.scorer),
    }


def _provenance(config: Rank, dream: Dream, scorer: SuccessScorer) -> dict[str, Any]:
    return {
        "world model": f"{config.world_model} ({_weights(config.world_model)})",
        "scorer": scorer.name,
        "truth": config.truth or "none",
        "seed": config.seed,
    }


def _command(config: Rank) -> str:
    parts = [
        f"worldline rank --world-model {config.world_model} --scorer {config.scorer} --policies {' '.join(config.policies)}"
    ]
    parts += [f"--truth {config.truth}"] if config.truth else []
    parts += [f"--data {config.data}"] if config.data else []
    return " ".join(
        [
            *parts,
            f"--episodes {config.episodes} --imagined-episodes {config.imagined_episodes} --seed {config.seed} --out {config.out}",
        ]
    )


def _videos(
    report: Report,
    config: Rank,
    dream: Dream,
    policies: dict[str, Policy],
    ranked: Ranked,
    starts: Observation,
    frames: int,
    shown: dict[str, list[RolloutResult]],
) -> None:
    """True beside imagined rollouts of the same policy from the same start."""
    names = list(shown) or [list(policies)[int(ranked.imagined.float().mean(1).argmax())]]
    for name in names[: config.videos]:
        rows = torch.arange(min(2, len(starts)))
        seeds = rows * 7919 + config.seed
        made = rollout(
            dream, policies[name], None, index_observation(starts, rows), frames=frames, seeds=seeds, keep_frames=True
        )
        for i in rows.tolist():
            columns = {"imagined": {c: x[i] for c, x in made.frames.items()}}
            if name in shown and shown[name][i].frames is not None:
                real = {c: x[:frames] for c, x in (shown[name][i].frames or {}).items() if c in made.frames}
                columns = {"true": real, **columns}
            report.video(f"{Path(name).name}, start {i}", video_grid(columns, cell=128), dream.spec.fps)
