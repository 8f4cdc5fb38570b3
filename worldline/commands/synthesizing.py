"""Verb `synthesize`: imagined episodes, scored and filtered, as a dataset that trains policies like any other."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from worldline.checkpoint import read_json, to_json, write_json
from worldline.commands.acting import load_acting
from worldline.commands.outputs import command_line
from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import SamplingFlags, load_dream, load_scorer
from worldline.data.lerobot_write import DatasetWriter
from worldline.errors import DatasetError
from worldline.eval import Report, video_grid
from worldline.eval.plots import score_histogram
from worldline.eval.ranking import imagine_replays, replay_diagnostic
from worldline.eval.replays import load_starts
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.success import SuccessScorer, check_scorer
from worldline.rl_in_imagination.synthesis import ImaginedEpisode, SynthesisConfig, synthesize
from worldline.types import Policy, WorldSpec, require_match

NOTES = "synthesis.json"  # in the staging folder: how far it has come


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesize(SamplingFlags):
    """Imagine episodes from real first frames, score them, keep the successes, and write them as a LeRobot dataset.

    Every episode says which world model, policy, start, seed and score it came from. `worldline train policy --data REAL IMAGINED
    --imagined-share 0.5 --init-from runs/bc50` then fine-tunes a policy on both.

    Low-dimensional trajectories for offline RL: worldline synthesize --trajectory-model runs/traj --help

    Example: worldline synthesize --policies runs/bc50 runs/bc50@noise=0.3 --world-model runs/wm --scorer runs/success \\
             --data data/drawer --out data/imagined
    """

    policies: tuple[str, ...]
    """Policies that take turns; '@noise=0.3' behind one makes it try other things."""
    world_model: Path
    """In which episodes are imagined."""
    scorer: Path
    """Who says which of them succeed (worldline train scorer)."""
    data: tuple[Path, ...]
    """Datasets whose training episodes give the first frames, and whose labelled held-out ones set the threshold."""
    out: Path
    """Folder for the dataset; its report is out/synthesis/report.html."""
    episodes: int = 400
    """Episodes imagined, of which some are kept."""
    make: SynthesisConfig = field(default_factory=SynthesisConfig)
    instructions: tuple[str, ...] = ()
    """Said in turn in place of the starts' own."""
    threshold: float | None = None
    """Success probability that is kept; by default chosen on imagined replays of held-out episodes."""
    override_audit: bool = False
    """Use a scorer that failed its audit. The report says so."""
    seed: int = 0
    """Of starts and of the solver's noise."""
    batch: int = 32
    """Episodes imagined at a time: as many as memory holds."""

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("--policies: at least one policy is required, got none")
        if self.episodes < 1 or self.batch < 1:
            raise ValueError(f"episodes and batch must be at least 1, got {self.episodes} and {self.batch}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold between 0 and 1 required, got {self.threshold}")


def run_synthesize(config: Synthesize, *, progress: bool = True) -> Path:
    """Imagine, keep, write; returns the dataset's folder. An interrupted synthesis goes on by the same command.

    Raises `DatasetError` if the threshold keeps nothing, or everything.
    """
    failures = check_scorer(config.scorer, override=config.override_audit)
    dream = load_dream(config.world_model, config.sampling())
    scorer = load_scorer(config.scorer)
    require_match(dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "control_steps"))
    policies = {name: load_acting(name, spec=dream.spec) for name in config.policies}
    for name, policy in policies.items():
        require_match(dream.spec, policy.spec, between=f"world model and policy {name}")
    starts = load_starts(config.data, "train", dream).first
    writer = DatasetWriter(config.out, dataset_spec(dream.spec), resume=True)
    threshold, chosen_by = _threshold(config, dream, scorer, progress)
    notes = _notes(config, writer, threshold)
    persist, shown = scorer.config.persist, {}
    provenance = {"world_model": weights_of(config.world_model), "scorer": scorer.name, "threshold": f"{threshold:.6g}"}
    with tqdm(total=config.episodes, initial=len(notes["scores"]), unit="episode", disable=not progress) as bar:
        for first in range(len(notes["scores"]), config.episodes, config.batch):
            rows = range(first, min(config.episodes, first + config.batch))
            name = config.policies[(first // config.batch) % len(config.policies)]
            for episode in _imagine(config, dream, policies[name], scorer, starts, rows, threshold, persist):
                keep = episode.success or config.make.keep == "all"
                if keep:
                    if notes["kept"] not in writer.staged():  # else it was staged before an interruption
                        _stage(writer, notes["kept"], episode, {**provenance, "policy": name})
                    notes["kept"] += 1
                notes["scores"].append(episode.score)
                notes["policies"].append(name)
                shown.setdefault("kept" if keep else "left out", []).append(episode)
                shown = {kind: some[:4] for kind, some in shown.items()}
                bar.update()
            write_json(writer.staging / NOTES, notes)
            bar.set_postfix({"kept": notes["kept"]})
    _check_kept(config, notes, threshold)
    _report(config, dream, notes, shown, threshold, chosen_by, failures)  # before the notes are gone with the staging
    writer.finish()
    return config.out


def dataset_spec(spec: WorldSpec) -> WorldSpec:
    """Of a dataset whose frames are the world model's."""
    return replace(spec, latent=None)


def _imagine(
    config: Synthesize,
    dream: Dream,
    policy: Policy,
    scorer: SuccessScorer,
    starts: Any,
    rows: range,
    threshold: float,
    persist: int,
) -> Iterator[ImaginedEpisode]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + rows.start)
    said = config.instructions
    return synthesize(
        dream,
        policy,
        scorer,
        starts,
        config.make,
        chosen=torch.randint(len(starts), (len(rows),), generator=generator),
        seeds=torch.randint(1 << 60, (len(rows),), generator=generator),
        threshold=threshold,
        persist=persist,
        instruction=said[(rows.start // config.batch) % len(said)] if said else None,
    )


def _threshold(config: Synthesize, dream: Dream, scorer: SuccessScorer, progress: bool) -> tuple[float, str]:
    """The probability that counts as success in the dream, and where it comes from."""
    if config.threshold is not None:
        return config.threshold, "given"
    held_out = load_starts(config.data, "held-out", dream, frames=None)
    if held_out.frame_success is None:
        return scorer.config.threshold, "scorer"
    diagnostic = replay_diagnostic(scorer, held_out, imagine_replays(dream, scorer, held_out, progress=progress))
    return diagnostic.threshold, diagnostic.threshold_from


def _notes(config: Synthesize, writer: DatasetWriter, threshold: float) -> dict[str, Any]:
    """How far an interrupted synthesis came. Raises `DatasetError` if it was made with other settings."""
    settings = {
        "policies": [
            [name, weights_of(name.partition("@")[0]) if Path(name.partition("@")[0]).is_dir() else ""]
            for name in config.policies
        ],
        "world_model": weights_of(config.world_model),
        "scorer": weights_of(config.scorer),
        "sampling": config.sampling(),
        "data": [str(folder) for folder in config.data],
        "make": to_json(config.make),
        "instructions": list(config.instructions),
        "threshold": threshold,
        "seed": config.seed,
        "batch": config.batch,
    }
    path = writer.staging / NOTES
    if not path.is_file():
        notes = {"settings": settings, "scores": [], "policies": [], "kept": 0}
        write_json(path, notes)  # before the first episode is staged
        return notes
    notes = read_json(path)
    if different := [name for name in settings if settings[name] != notes["settings"].get(name)]:
        raise DatasetError(
            f"{config.out}: the interrupted synthesis has another {', '.join(different)}. Go on with the same settings, or choose "
            "another --out."
        )
    return notes


def _stage(writer: DatasetWriter, index: int, episode: ImaginedEpisode, provenance: dict[str, str]) -> None:
    writer.stage(
        index,
        frames=episode.frames,
        actions=episode.actions,
        poses=episode.poses,
        rewards=episode.frame_success[1:].float(),
        frame_success=episode.frame_success,
        success=episode.success,
        terminated=episode.success,
        truncated=not episode.success,
        instruction=episode.instruction,
        provenance={
            **provenance,
            "cause": "imagined",
            "score": f"{episode.score:.6g}",
            "start": str(episode.start),
            "seed": str(episode.seed),
        },
    )


def _check_kept(config: Synthesize, notes: dict[str, Any], threshold: float) -> None:
    scores = torch.tensor(notes["scores"])
    if config.make.keep == "all":
        return
    found = f"scores from {scores.min():.3f} to {scores.max():.3f}, median {scores.median():.3f}"
    if not notes["kept"]:
        raise DatasetError(
            f"a threshold that keeps some of the {len(scores)} imagined episodes is required, {threshold:.3f} keeps none ({found}). "
            "Use a better policy, more --episodes, or a lower --threshold and another --out."
        )
    if notes["kept"] == len(scores):
        raise DatasetError(
            f"a threshold that leaves some of the {len(scores)} imagined episodes out is required, {threshold:.3f} keeps all ({found}): "
            "nothing is filtered. Raise --threshold, or say so with --make.keep all, and another --out."
        )


def _report(
    config: Synthesize,
    dream: Dream,
    notes: dict[str, Any],
    shown: dict[str, list[ImaginedEpisode]],
    threshold: float,
    chosen_by: str,
    failures: list[str],
) -> None:
    report = Report(
        f"Imagined episodes {config.out.name}",
        command=command_line("synthesize", config),
        provenance={"world model": weights_of(config.world_model), "scorer": weights_of(config.scorer)},
    )
    for failure in failures:
        report.warning(f"The scorer failed its audit and is used by --override-audit. {failure}")
    total = len(notes["scores"])
    report.text(
        f"**{notes['kept']}** of {total} imagined episodes were kept: success probability above {threshold:.3f} ({chosen_by}). Whether "
        "they would succeed on the robot is not known."
    )
    by_policy = []
    for name in config.policies:
        scores = [s for s, p in zip(notes["scores"], notes["policies"]) if p == name]
        if scores:
            by_policy.append(
                {"policy": name, "episodes": len(scores), "success": sum(s > threshold for s in scores) / len(scores)}
            )
    report.table("By policy", ["policy", "episodes", "imagined success"], [list(row.values()) for row in by_policy])
    report.plot("Scores", score_histogram(notes["scores"], threshold))
    for kind, some in shown.items():
        for i, episode in enumerate(some):
            title = f"{kind} {i}: score {episode.score:.2f}"
            report.video(title, video_grid({kind: dict(episode.frames)}, cell=128), dream.spec.fps)
    results = {
        "episodes": total,
        "kept": notes["kept"],
        "threshold": threshold,
        "threshold_from": chosen_by,
        "scores": notes["scores"],
        "by_policy": by_policy,
        "audit_failures": failures,
    }
    report.write(config.out / "synthesis", results)
