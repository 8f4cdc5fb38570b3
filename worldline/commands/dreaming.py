"""Verbs `imagine` and `eval`: watch a world model dream held-out episodes, and measure it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.commands.asking import ask
from worldline.commands.dreaming_page import evaluation_page
from worldline.commands.judging import load_judges
from worldline.commands.outputs import check_report_folder, check_video_file, command_line
from worldline.commands.sampling import SamplingFlags, calibrate_doubt, load_doubt, load_dream
from worldline.data import LeRobotDataset
from worldline.errors import WorldlineError
from worldline.eval import Report, video_grid, write_mp4
from worldline.eval.probes import Probe
from worldline.eval.protocol import protocol_results
from worldline.eval.ranking import imagine_replays, replay_diagnostic
from worldline.eval.replays import Replays, join_replays, load_replays, open_for, range_results, within_range
from worldline.eval.revisit import revisit_identity
from worldline.eval.world_model import evaluate_world_model
from worldline.policies import load_policy
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.types import require_match
from worldline.worldmodels import TrainedWorldModel
from worldline.worldmodels.trajectories import Guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagine(SamplingFlags):
    """Replay an episode's actions in a world model's dream; real and imagined side by side.

    Example: worldline imagine --world-model runs/wm --data data/drawer --episode 3 --out out.mp4

    What a unified model would do: worldline imagine --world-model runs/va --data data/drawer --episode 3 --mode policy

    By the instruction alone (a model trained with --model.text hashed --model.actionless 0.5):
    worldline imagine --world-model runs/wm --data data/reach --episode 3 --actions none --instruction "reach the red box"
    """

    world_model: Path
    """Folder of a trained world model."""
    data: Path
    """Dataset folder."""
    episode: int
    """Its number in the dataset."""
    out: Path = Path("out.mp4")
    """Video file."""
    frames: int | None = None
    """How many frames; the whole episode by default."""
    actions: Literal["true", "negated", "zeroed", "none"] = "true"
    """What the dream is given: the recorded actions, or wrong ones to see that it obeys them, or none: it imagines whatever may
    follow (a model trained with --model.actionless)."""
    mode: Literal["forward", "policy", "inverse", "video", "joint"] = "forward"
    """What is asked (a unified video-action model). forward: what do the recorded actions lead to? policy: which actions would it take
    at each frame? inverse: which led from frame to frame? video: what may happen? joint: what may happen, and by which actions?
    Actions are drawn beside the recorded ones in a plot next to --out."""
    guide: str | None = None
    """A policy towards which the actions of a joint dream are moved (policy-guided diffusion)."""
    guide_coefficient: float = 1.0
    """How far, whatever the number of solver steps."""
    instruction: str | None = None
    """Said in place of the episode's own (a model trained with --model.text)."""
    clip_actions: bool = False
    """Clip recorded actions that are out of their range, instead of refusing them."""
    seed: int = 0
    """Of the solver's noise."""

    def __post_init__(self) -> None:
        _at_least(self, frames=2, solver_steps=1)
        if self.guide is not None and self.mode != "joint":
            raise ValueError(f"--guide is for --mode joint, in which actions are imagined; got --mode {self.mode}")
        if self.actions != "true" and self.mode != "forward":
            raise ValueError(
                f"--actions is for --mode forward, in which the dream is given some; got --actions {self.actions} and --mode {self.mode}"
            )


def _at_least(config: Any, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: at least {low} required, got {value}")


def run_imagine(config: Imagine, *, progress: bool = True) -> Path:
    """Write the video and return its path."""
    check_video_file(config.out)
    dream = load_dream(config.world_model, config.sampling())
    dataset, stride = open_for(dream.spec, config.data)
    if not 0 <= config.episode < len(dataset):
        raise WorldlineError(f"--episode 0 to {len(dataset) - 1} required by {config.data}, got {config.episode}")
    cameras = [c.name for c in dream.spec.cameras]
    acting = config.mode == "forward" and config.actions != "none"
    options: dict[str, Any] = {"frames": config.frames, "stride": stride, "acting": acting}
    replays = load_replays(dataset, [config.episode], cameras=cameras, **options)
    if dataset.acts(config.episode):
        replays = within_range(replays, dream.spec.action, clip=config.clip_actions)
    starts, signs = replays.first, {"true": 1.0, "negated": -1.0, "zeroed": 0.0}
    if config.instruction is not None:
        assert isinstance(dream.world_model, TrainedWorldModel), "what load_dream loads"
        if not dream.world_model.reads_instructions:
            raise WorldlineError(
                f"--instruction: {config.world_model} was trained without instructions. Train with `worldline train world-model "
                "--model.text hashed`."
            )
        starts = replace(starts, instruction=(config.instruction,))
    if config.mode != "forward":
        guide = None if config.guide is None else load_policy(config.guide, spec=dream.spec)
        if guide is not None:
            require_match(dream.spec, guide.spec, between=f"world model and policy {config.guide}")
        told = replace(replays, instruction=starts.instruction)
        guidance = Guidance(coefficient=config.guide_coefficient)
        options = {"seed": config.seed, "steps": config.solver_steps, "guide": guide, "guidance": guidance}
        ask(dream, told, config.mode, config.out, **options)
        return config.out
    made = rollout(
        dream,
        None,
        None,
        starts,
        frames=replays.poses.shape[1],
        seeds=torch.tensor([config.seed]),
        actions=None if config.actions == "none" else replays.actions * signs[config.actions],
        keep_frames=True,
        progress="imagine" if progress else None,
    )
    label = "imagined" if config.actions == "true" else f"imagined, actions {config.actions}"
    if config.instruction is not None:
        label += f": {config.instruction}"
    grid = video_grid({"real": _one(replays.frames, 0), label: _one(made.frames, 0)})
    write_mp4(config.out, grid, dream.spec.fps)
    return config.out


def _one(frames: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {camera: video[row] for camera, video in frames.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(SamplingFlags):
    """Measure a world model on held-out episodes: video quality by horizon, action sensitivity, what it gets wrong.

    Example: worldline eval --world-model runs/wm --data data/drawer --split held-out --out reports/wm
    """

    world_model: Path
    """Folder of a trained world model."""
    data: tuple[Path, ...]
    """Dataset folders; the episodes of several are numbered through."""
    out: Path
    """Folder for report.json and report.html."""
    split: Literal["held-out", "train", "all"] = "held-out"
    """Which episodes; numbers about training episodes say little."""
    frames: int | None = None
    """Frames of each rollout, the given one included; the shortest episode by default. Shorter episodes are left out.
    106 or more measure drift at frame 100 in full."""
    max_episodes: int | None = None
    """The first so many of each dataset."""
    action_free: Path | None = None
    """A world model trained with --model.network.actions False: the second trivial predictor."""
    probe: Path | None = None
    """A probe of object positions (`worldline train probe --target object`)."""
    inverse_model: Path | None = None
    """A probe of actions (`worldline train probe --target action`; not what `worldline train inverse` makes)."""
    pose_probes: tuple[Path, ...] = ()
    """Probes of the pose, one a camera (`worldline train probe --target pose --camera NAME`): do the views agree?"""
    i3d: Path | None = None
    """I3D weights for FVD: the TorchScript file of the StyleGAN-V protocol. Without it FVD is not measured."""
    scorer: Path | None = None
    """A success scorer: adds the replay diagnostic."""
    identity_probe: Path | None = None
    """A probe of what lies below the hand (`worldline train probe --target identity`, arm/... data): does the dream bring back what
    it saw long ago?"""
    away: int = 34
    """Frames that it must have been out of sight (with --identity-probe)."""
    clip_actions: bool = False
    """Clip recorded actions that are out of their range, instead of refusing them. They are counted in the report."""
    hidden: tuple[str, ...] = ()
    """Cameras whose first frame is kept from the dream: it imagines them from the others. Needs a model trained with
    --model.camera-dropout."""
    noisy: dict[str, float] = field(default_factory=dict)
    """Cameras whose first frame is shown through Gaussian noise, and its standard deviation (of the range 0 to 1): how much does a
    worse picture cost? A model trained with --model.camera-noise bears more."""
    doubt_steps: int = 0
    """Measures whether two denoisings of a frame, with so many solver steps, disagree where the dream is wrong, as `refine
    --doubt-steps` trusts; 0: not measured."""
    videos: int = 6
    """Episodes shown in the report."""
    batch: int = 16
    """Episodes imagined at a time: as many as memory holds."""
    seed: int = 0
    """Of the solver's noise, and of which actions are shuffled."""

    def __post_init__(self) -> None:
        _at_least(self, frames=2, max_episodes=1, solver_steps=1, away=1, batch=1, videos=0, doubt_steps=0)


def run_eval(config: Evaluate, *, progress: bool = True) -> Path:
    """Evaluate, write the report, return its folder."""
    check_report_folder(config.out)
    dream = load_dream(config.world_model, config.sampling())
    opened = _open_replays(config, dream)
    ranges, datasets = range_results(opened.cut.actions, dream.spec.action), opened.datasets
    replays, held = (
        replace(within_range(x, dream.spec.action, clip=config.clip_actions), **_degraded(config, dream))
        for x in (opened.cut, opened.held)
    )
    judges = load_judges(
        dream.spec,
        sampling=config.sampling(),
        action_free=config.action_free,
        probe=config.probe,
        inverse_model=config.inverse_model,
        pose_probes=config.pose_probes,
        identity_probe=config.identity_probe,
        scorer=config.scorer,
    )
    if config.i3d is not None and not config.i3d.is_file():
        raise WorldlineError(f"--i3d: the TorchScript file of I3D is required, there is none at {config.i3d}")
    found = evaluate_world_model(
        dream,
        replays,
        action_free=judges.action_free,
        probe=judges.probe,
        probe_truth=_probe_truth(judges.probe, replays, datasets[0]) if judges.probe else None,
        inverse_model=judges.inverse_model,
        pose_probes=judges.pose_probes,
        i3d=config.i3d,
        seed=config.seed,
        batch=config.batch,
        progress=progress,
    )
    results = {
        "split": config.split,
        "protocol": _protocol(config, dream, replays),
        "actions_out_of_range": ranges,
        **found.results,
    }
    diagnostic = None
    if judges.scorer is not None and held.frame_success is not None:
        options: dict[str, Any] = {"seed": config.seed, "batch": config.batch, "progress": progress}
        probability = imagine_replays(dream, judges.scorer, held, **options)
        diagnostic = replay_diagnostic(judges.scorer, held, probability)
        results["replay_diagnostic"] = diagnostic.to_dict()
    if judges.identity is not None:
        results["revisit"] = revisit_identity(
            dream, replays, judges.identity, away=config.away, seed=config.seed, progress=progress
        )
    if config.doubt_steps:
        doubt = load_doubt(dream, config.doubt_steps)
        results["doubt"] = to_json(calibrate_doubt(doubt, replays, batch=config.batch, progress=progress))
    report = Report(
        f"World model {config.world_model.name}",
        command=command_line("eval", config),
        provenance={
            "world_model": str(config.world_model),
            "data": " ".join(map(str, config.data)),
            "data_fingerprint": "+".join(dataset.fingerprint for dataset in datasets),
            "tokenizer": dream.tokenizer.latent_spec.fingerprint,
        },
    )
    if judges.scorer is not None and diagnostic is None:
        report.warning(f"{' '.join(map(str, config.data))} holds no success labels: the replay diagnostic was not run.")
    if opened.left_out:
        report.warning(_left_out(opened, config.frames))
    if gone := results["diverged"]:
        report.warning(
            f"{gone['episodes']} of {results['episodes']} episodes diverged from frame {gone['from_frame']} on: their imagined poses are no finite numbers. The pose error "
            "is not told from there; their pictures count in all else as they are."
        )
    if ranges["outside"]:
        report.warning(f"{ranges['outside']} of {ranges['values']} action values were out of range and are clipped.")
    if config.i3d is not None and results["fvd"]["reason"]:
        report.warning(f"FVD: {results['fvd']['reason']}")
    evaluation_page(report, found, results, diagnostic, config.videos, dream.spec.fps)
    report.write(config.out, results)
    return config.out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """The episodes of all datasets, numbered through: `cut` to the shortest, for comparing videos, and `held` as they ended, in which
    no success is lost (the same where no scorer asks for it or none ended). `left_out` were too short, of which `ended` terminated."""

    cut: Replays
    held: Replays
    datasets: list[LeRobotDataset]
    left_out: int
    ended: int


def _open_replays(config: Evaluate, dream: Dream) -> _Opened:
    if not config.data:
        raise WorldlineError("at least one dataset folder is required after --data, got none")
    cameras = [c.name for c in dream.spec.cameras]
    cut, held, datasets, left_out, ended, before = [], [], [], 0, 0, 0
    for folder in config.data:
        dataset, stride = open_for(dream.spec, folder)
        episodes = dataset.split(config.split)[: config.max_episodes]
        options: dict[str, Any] = {"cameras": cameras, "frames": config.frames, "stride": stride}
        part = load_replays(dataset, episodes, **options)
        over = [i for i in episodes if dataset.terminated(i)]
        whole = load_replays(dataset, episodes, held=True, **options) if config.scorer and over else part
        left_out += len(episodes) - len(part.episodes)
        ended += len(set(over) - set(part.episodes))
        for parts, x in ((cut, part), (held, whole)):
            parts.append(replace(x, episodes=tuple(before + i for i in x.episodes)))
        datasets.append(dataset)
        before += len(dataset)
    joined = [parts[0] if len(parts) == 1 else join_replays(parts) for parts in (cut, held)]
    return _Opened(cut=joined[0], held=joined[1], datasets=datasets, left_out=left_out, ended=ended)


def _left_out(opened: _Opened, frames: int | None) -> str:
    """A warning for the report."""
    of = opened.left_out + len(opened.cut.episodes)
    text = f"{opened.left_out} of {of} episodes are shorter than --frames {frames}: left out."
    if opened.ended:
        text += (
            f" {opened.ended} of these are shorter because they terminated, as an episode does that ends at success: videos are compared on "
            "the others alone. The replay diagnostic (--scorer) has them all."
        )
    return text


def _degraded(config: Evaluate, dream: Dream) -> dict[str, Any]:
    """Which cameras are hidden or noisy. Raises `WorldlineError` for one that the world model does not have, if all are hidden, or
    for noise that is not a positive number."""
    cameras = [c.name for c in dream.spec.cameras]
    for camera, std in config.noisy.items():
        if camera not in cameras or not 0 < std < math.inf:
            raise WorldlineError(
                f"--noisy: one of {', '.join(cameras)} and a positive number required, got {camera} {std:g}"
            )
    if (unknown := set(config.hidden) - set(cameras)) or set(config.hidden) == set(cameras):
        raise WorldlineError(
            f"--hidden: some but not all of {', '.join(cameras)} required, got {', '.join(sorted(unknown or cameras))}"
        )
    return {"hidden": config.hidden, "noisy": config.noisy}


def _protocol(config: Evaluate, dream: Dream, replays: Replays) -> dict[str, Any]:
    assert isinstance(dream.world_model, TrainedWorldModel), "what load_dream loads"
    return protocol_results(
        frames=replays.poses.shape[1],
        episodes=len(replays.episodes),
        sampling=dream.world_model.sampling,
        seed=config.seed,
        overridden=tuple(config.sampling()),
        hidden=config.hidden,
        noisy=config.noisy,
    )


def _probe_truth(probe: Probe, replays: Replays, dataset: LeRobotDataset) -> Tensor:
    """What the probe should read, from the recorded states (object) or, without them, from the real frames."""
    camera = probe.config.names[0].partition("/")[0]
    if probe.config.target == "object" and dataset.spec.action.embodiment == "metaworld-sawyer":
        from worldline.sim.metaworld import object_pixels

        n = len(replays.states)
        flat = object_pixels(replays.states.flatten(0, 1), dataset.spec.camera(camera))
        return flat.unflatten(0, (n, -1))
    return probe.read_video(replays.frames)
