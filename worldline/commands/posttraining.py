"""Verb `posttrain`: make a world model do what its actions say, by inverse-dynamics rewards on its own dreams."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.commands.outputs import command_line, report_results
from worldline.commands.ranking import Rank, check_rank, run_rank
from worldline.commands.ranking_page import add_change
from worldline.commands.rollouts import weights_of
from worldline.data import require_actions
from worldline.errors import SpecMismatch
from worldline.eval import Report, video_grid
from worldline.eval.plots import curve_bands
from worldline.eval.protocol import PROTOCOL
from worldline.eval.replays import open_for
from worldline.rl_in_imagination.denoiser_grpo import require_retelling
from worldline.rl_in_imagination.inverse import InverseModel
from worldline.rl_in_imagination.inverse_audit import GOOD, InverseAudit, check_inverse, stored_audit
from worldline.tokenizers import Tokenizer
from worldline.trainers.inputs import (
    LatentBatches,
    Selection,
    claim_output,
    contents,
    data_provenance,
    open_datasets,
    require_length,
)
from worldline.trainers.inverse import require_disjoint
from worldline.trainers.posttraining import Posttraining, PosttrainSettings, opening, posttrain
from worldline.types import Clip, TracedWorldModel, WorldModel, require_match
from worldline.worldmodels import AutoregressiveWorldModel, load_world_model


@dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesToRank:
    """Policies that both world models, as it was and as it became, rank by the same episodes: does it rank better? None: not asked."""

    policies: tuple[str, ...] = ()
    """Three or more, as for `worldline rank`; of no lineage whose rollouts the world model learned from."""
    scorer: Path | None = None
    """Who says what success is in the dream (worldline train scorer)."""
    truth: str | None = None
    """Simulator, for example metaworld/drawer-open-v3."""
    episodes: int = 50
    """True and imagined rollouts a policy."""
    horizon: int = 160
    """Control steps of a true rollout."""
    seed: int = 0
    """Of the true starts and of the solver's noise."""
    processes: int | None = None
    """Simulator processes; one a core by default."""

    def __post_init__(self) -> None:
        if self.policies and (len(self.policies) < 3 or self.scorer is None or self.truth is None):
            raise ValueError(
                f"--ranking: at least three --ranking.policies, --ranking.scorer and --ranking.truth are required together, got "
                f"{list(self.policies)}, {self.scorer} and {self.truth}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Posttrain:
    """Post-train a world model by reinforcement learning on its own dreams (RLIR): frames off which an inverse dynamics model reads the actions
    that were commanded are made likelier.

    The reward model is trained for; a judge of another architecture and other episodes, and the pictures (PSNR and SSIM on moved pixels, latent
    Frechet distance), are watched: where they part from the reward it stops (--rl.parted, --rl.worst-psnr and what follows). The model the
    judge likes best, of those whose pictures did not get worse and whose reward it confirmed, is published in --out, a world-model folder
    like any other; the same command goes on after an interruption.

    Example: worldline posttrain --world-model runs/wm --reward runs/reward --judge runs/judge --data data/drawer --out runs/wm-rlir
    """

    world_model: Path
    """An autoregressive world model without memory, or a unified video-action model of design uwm (of which only the forward query is
    trained and watched: what it does as a policy may change)."""
    reward: Path
    """Made by `worldline train inverse --half first`."""
    judge: Path
    """Made by `worldline train inverse --half second` with another --architecture."""
    data: tuple[Path, ...]
    """Datasets whose training episodes give contexts and actions, and whose held-out ones the check."""
    out: Path
    """Folder for the post-trained world model, its checks and the report."""
    rl: PosttrainSettings = field(default_factory=PosttrainSettings)
    override_audit: bool = False
    """Use inverse models that failed their audit, or passed it with laxer thresholds or another tokenizer than the world model's. The report
    says so."""
    videos: int = 3
    """Held-out clips shown before and after."""
    ranking: PoliciesToRank = field(default_factory=PoliciesToRank)

    def __post_init__(self) -> None:
        if self.videos < 0:
            raise ValueError(f"videos of at least 0 required, got {self.videos}")


def run_posttrain(config: Posttrain, *, progress: bool = True) -> Path:
    """Post-train, write the report, return the folder."""
    model, tokenizer = load_world_model(config.world_model)
    failures = {
        name: check_inverse(folder, tokenizer=tokenizer.fingerprint, override=config.override_audit)
        for name, folder in (("reward", config.reward), ("judge", config.judge))
    }
    require_disjoint(config.reward, config.judge)
    if not isinstance(model, TracedWorldModel):
        raise SpecMismatch(
            f"--world-model {config.world_model}: a world model whose sampling has a log-probability is required (worldline train "
            f"world-model, or video-action of design uwm), got {type(model).__name__}"
        )
    model.require_traceable(config.rl.grpo.solver_steps)
    if config.rl.grpo.explore:
        require_retelling(model)
    if isinstance(model, AutoregressiveWorldModel) and len(model.network.ports) > 1:
        raise SpecMismatch(
            f"--world-model {config.world_model}: a world model of one robot is required, this one shares its network with "
            f"{len(model.network.ports) - 1} others, which would change with it"
        )
    chunk, grpo = model.traced_chunk(), config.rl.grpo
    if grpo.frames % chunk or grpo.prefix % chunk:
        raise SpecMismatch(
            f"--rl.grpo.frames and --rl.grpo.prefix: whole chunks of {chunk} frames are required by this world model, got {grpo.frames} and "
            f"{grpo.prefix}"
        )
    reward, judge = (InverseModel.from_pretrained(folder) for folder in (config.reward, config.judge))
    for name, inverse in (("reward", reward), ("judge", judge)):
        require_match(
            model.spec, inverse.spec, between=f"world model and {name}", only=("cameras", "control_steps", "action")
        )
    _, stride = open_for(model.spec, config.data[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made_from = {
        "world_model": weights_of(config.world_model),
        "reward": weights_of(config.reward),
        "judge": weights_of(config.judge),
    }
    cameras = [c.name for c in tokenizer.cameras]
    training, held_out = (open_datasets(config.data, split, cameras=cameras) for split in ("train", "held-out"))
    dreamt = grpo.prefix + grpo.frames + 1
    checked = _check_frames(model.spec.chunk, dreamt if grpo.prefix else 0)
    _require_clips(training, held_out, dreamt, checked, stride)
    if rank := _ranking(config):
        check_rank(rank)
    claim_output(
        config.out,
        "post-training",
        {"data": [str(d) for d in config.data], "rl": _kept(config.rl)},
        identity=("data", "rl"),
        made_from={**made_from, **contents(training)},  # of whole datasets, their held-out episodes too
    )
    options: dict[str, Any] = {"stride": stride, "device": device, "progress": progress}
    batches = LatentBatches(training, tokenizer, frames=dreamt, **options)
    clip = LatentBatches(held_out, tokenizer, frames=checked, **options).batch(0, 0, config.rl.check_clips)
    for module in (model, reward, judge):
        module.to(device)
    before = _dreams(model, tokenizer, clip, config.videos)
    found = posttrain(
        model,
        tokenizer,
        reward.agreement,
        judge.agreement,
        batches.batch,
        clip,
        config.rl,
        config.out,
        ahead=reward.config.ahead,
        provenance={
            **data_provenance(training, config.out, init_from=config.world_model),
            "tokenizer": tokenizer.fingerprint,
            "posttrained_from": str(config.world_model),
            **made_from,
        },
        progress=progress,
    )
    change = _ranked(config, progress)
    _report(config, found, failures, made_from, tokenizer, clip, before, model.spec.fps, change)
    return config.out


def _check_frames(chunk: int, least: int) -> int:
    """Of a clip that is checked: the protocol's, or `least`, and as many more as whole chunks take after the first."""
    return math.ceil((max(PROTOCOL.clip_frames, least) - 1) / chunk) * chunk + 1


def _require_clips(
    training: Sequence[Selection], held_out: Sequence[Selection], dreamt: int, checked: int, stride: int
) -> None:
    """Raise `DatasetError` if actions are not known, or episodes too short for what is dreamt or checked."""
    for s in (*training, *held_out):
        require_actions(s.dataset, s.episodes)
    for s in training:
        require_length(
            s, dreamt, stride, advice="Use fewer --rl.grpo.frames or --rl.grpo.prefix, or record longer episodes."
        )
    for s in held_out:
        advice = (
            f"Checks take clips of {checked} frames (the evaluation protocol's {PROTOCOL.clip_frames}, or more to hold --rl.grpo.prefix and whole "
            "chunks)"
        )
        require_length(
            s, checked, stride, advice=f"{advice}: record longer episodes, or leave this folder out of --data."
        )


def _kept(settings: PosttrainSettings) -> Any:
    """What must be the same when a run goes on."""
    return {k: v for k, v in to_json(settings).items() if k not in ("iterations", "patience")}


def _ranking(config: Posttrain) -> Rank | None:
    """By the world model as it was."""
    asked = config.ranking
    if not asked.policies or asked.scorer is None:
        return None
    return Rank(
        world_model=config.world_model,
        scorer=asked.scorer,
        policies=asked.policies,
        truth=asked.truth,
        episodes=asked.episodes,
        imagined_episodes=asked.episodes,
        horizon=asked.horizon,
        seed=asked.seed,
        processes=asked.processes,
        out=config.out / "ranking" / "before",
    )


def _ranked(config: Posttrain, progress: bool) -> dict[str, Any] | None:
    """How both world models rank the policies of --ranking, in reports of their own; None if it was not asked."""
    rank = _ranking(config)
    if rank is None:
        return None
    before, after = rank.out, config.out / "ranking" / "after"
    run_rank(rank, progress=progress)
    shutil.copytree(before / "rollouts", after / "rollouts", dirs_exist_ok=True)  # the true ones are the same
    run_rank(replace(rank, world_model=config.out, out=after, against=before), progress=progress)
    return report_results(after)["change"]


@torch.no_grad()
def _dreams(model: WorldModel, tokenizer: Tokenizer, clip: Clip, count: int) -> dict[str, Tensor]:
    """Frames of the first clips as the deployed sampler dreams them."""
    if not count:
        return {}
    rows = slice(0, count)
    part = Clip(
        frames={c: z[rows] for c, z in clip.frames.items()},
        poses=clip.poses[rows],
        actions=clip.actions[rows],
        instruction=clip.instruction[rows],
    )
    _, made = model.imagine(model.observe(opening(part)), part.actions, seeds=torch.arange(len(part.poses)))
    latents = {c: torch.cat([part.frames[c][:, :1].to(z), z], 1) for c, z in made.latents.items()}
    return {c: x.cpu() for c, x in tokenizer.decode(latents).items()}


def _audited(name: str, audit: InverseAudit | None) -> list[Any]:
    """A row: what an inverse model's skill was, and by which thresholds it was judged."""
    if audit is None:
        return [name, *["–"] * 5]
    skills = {score.kind: score.skill for score in audit.scores}
    worst = max((kind for kind in skills if kind not in GOOD), key=lambda kind: skills[kind])
    through = f"{skills['tokenizer']:.2f}" if "tokenizer" in skills else "not tried"
    limits = audit.thresholds
    return [name, f"{skills['exact']:.2f}", through, limits.exact, f"{worst} {skills[worst]:.2f}", limits.bad]


def _report(
    config: Posttrain,
    found: Posttraining,
    failures: dict[str, list[str]],
    made_from: dict[str, str],
    tokenizer: Tokenizer,
    clip: Clip,
    before: dict[str, Tensor],
    fps: float,
    change: dict[str, Any] | None,
) -> None:
    report = Report(
        f"Post-training of {config.world_model.name}", command=command_line("posttrain", config), provenance=made_from
    )
    for name, sentences in failures.items():
        for sentence in sentences:
            report.warning(f"The {name} model failed its audit and is used by --override-audit. {sentence}")
    first, best = found.checks[0], next(c for c in found.checks if int(c["iteration"]) == found.best)
    if found.hacked:
        report.warning(f"Stopped: {found.stopped}.")
    gap = first["ceiling"] - first["judge"]
    closed = f" ({(best['judge'] - first['judge']) / gap:.0%} of the gap to the ceiling)" if gap > 0 else ""
    if gap <= 0:
        report.warning(
            "Before post-training the judge already reads dreams as well as real video through the tokenizer: by this judge, on clips so short, "
            "there is no gap to close."
        )
    report.text(
        f"On {config.rl.check_clips} held-out clips of {clip.poses.shape[1]} frames the judge finds the commanded actions with an agreement of "
        f"**{first['judge']:.3f}** ± {first['judge_error']:.3f} before and **{best['judge']:.3f}** ± {best['judge_error']:.3f} with the model of "
        f"iteration {found.best}, which is the one in this folder{closed}; on real video through the tokenizer {first['ceiling']:.3f}. Moved pixels: "
        f"{first['moved_psnr']:.2f} and {best['moved_psnr']:.2f} dB, SSIM {first['moved_ssim']:.3f} and {best['moved_ssim']:.3f}. Latent Frechet "
        f"distance {first['frechet']:.3f} and {best['frechet']:.3f}. The best of {len(found.checks)} checks was chosen on these clips, which flatters "
        f"it. Stopped because {found.stopped}."
    )
    numbers = [int(c["iteration"]) for c in found.checks]
    for name, title in (
        ("judge", "Agreement"),
        ("moved_psnr", "PSNR on moved pixels, dB"),
        ("moved_ssim", "SSIM on moved pixels"),
        ("frechet", "Latent Frechet distance"),
    ):
        named = ("reward", "judge", "ceiling") if name == "judge" else (name,)
        curves = {
            n: {"frame": numbers, **{k: [c[n] for c in found.checks] for k in ("mean", "low", "high")}} for n in named
        }
        report.plot(title, curve_bands(curves, ylabel=title, xlabel="iteration"))
    columns = ["iteration", "reward", "judge", "moved PSNR", "moved SSIM", "latent Frechet"]
    rows = [
        [int(c["iteration"]), *(c[k] for k in ("reward", "judge", "moved_psnr", "moved_ssim", "frechet"))]
        for c in found.checks
    ]
    report.table("Checks on held-out clips", columns, rows)
    audits = {name: stored_audit(folder) for name, folder in (("reward", config.reward), ("judge", config.judge))}
    columns = [
        "model",
        "skill on real clips",
        "through the tokenizer",
        "at least",
        "worst of the other kinds",
        "at most",
    ]
    report.table("Audits of the inverse models", columns, [_audited(name, audit) for name, audit in audits.items()])
    pages = " Both rankings have pages of their own: ranking/before/report.html and ranking/after/report.html."
    add_change(report, change, before="before", after="post-trained", note=pages)
    if before:
        model, _ = load_world_model(config.out)
        after = _dreams(model, tokenizer, clip, config.videos)
        real = {
            c: x.cpu() for c, x in tokenizer.decode({c: z[: config.videos] for c, z in clip.frames.items()}).items()
        }
        for i in range(min(config.videos, len(clip.poses))):
            columns_of = {"real": real, "before": before, "after": after}
            grid = video_grid(
                {name: {c: x[i] for c, x in frames.items()} for name, frames in columns_of.items()}, cell=128
            )
            report.video(f"held-out clip {i}", grid, fps)
    results = {
        "best_iteration": found.best,
        "stopped": found.stopped,
        "hacked": found.hacked,
        "checks": found.checks,
        "history": found.history,
        "audit_failures": failures,
        "audits": {name: to_json(audit) for name, audit in audits.items()},
        "ranking": change,
    }
    report.write(config.out, results)
