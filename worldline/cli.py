"""`worldline <verb>`: thin. Every verb is a dataclass and one function; the dataclass is the help, and the function is
what Python users call.

Errors that a user can cause are printed without a traceback and end with exit code 2; an interruption ends with 130 and
says how to go on.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from worldline.errors import WorldlineError

VERBS = {
    "record": "record episodes in a simulator into a LeRobot dataset",
    "inspect": "report what a dataset holds and what is wrong with it",
    "train": "train a tokenizer, world-model (also -edm, -s), video-action model, scorer, policy, offline policy, trajectory or dynamics model, inverse model or probe",
    "imagine": "dream an episode: a video of real beside imagined",
    "eval": "measure a world model on held-out episodes",
    "rank": "rank policies by imagined rollouts",
    "refine": "make a policy better inside a frozen world model",
    "synthesize": "imagine episodes, keep the successes, write them as a dataset",
    "posttrain": "make a world model do what its actions say, by rewards of an inverse dynamics model",
    "offline-rl": "policies from recorded low-dimensional data, and from trajectories imagined for them",
    "label": "recover the actions of video without any, as a new dataset",
    "show": "print what a checkpoint is and how it was made",
}
KEEPING = ("record", "train", "rank", "refine", "synthesize", "posttrain", "offline-rl", "label")  # what they have made
STAGES = {
    "tokenizer": "frames to latents and back",
    "world-model": "the autoregressive denoiser",
    "world-model-edm": "another kind of world model: World4RL's U-Net with EDM's noise, four frames of history",
    "world-models": "one denoiser for several robots, with action experts that they share",
    "video-action": "one network that is policy, world model, inverse model and video generator (UWM or UVA)",
    "scorer": "a success scorer, calibrated and audited",
    "policy": "clone demonstrations (bc, discrete or diffusion)",
    "offline": "a policy from good and bad episodes, by implicit Q-learning",
    "dynamics": "one step of a low-dimensional task, by an ensemble: the baseline of trajectory",
    "trajectory": "whole low-dimensional trajectories by diffusion, for offline RL",
    "inverse": "an inverse dynamics model: which actions led from frame to frame; calibrated and audited",
    "probe": "a regressor that reads positions or actions off frames",
}
USAGE = """usage: worldline VERB [options]      (worldline VERB --help says more)

{verbs}

A first session:
  worldline record metaworld/drawer-open-v3 --episodes 200 --policy mixed --out data/drawer
  worldline inspect data/drawer
  worldline train tokenizer --data data/drawer --preset tiny --out runs/tok
  worldline train world-model --data data/drawer --tokenizer runs/tok --preset tiny --out runs/wm
  worldline imagine --world-model runs/wm --data data/drawer --episode 3 --out out.mp4

Tab completion: worldline VERB --tyro-print-completion bash (or zsh, tcsh).
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 2 (an error of the user's) or 130 (interrupted)."""
    logging.basicConfig(level=os.environ.get("WORLDLINE_LOG", "WARNING"), format="%(levelname)s: %(message)s")
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _dispatch(args)
        finally:
            sys.stdout.flush()  # `--help | head`: a closed pipe shows here, not when the interpreter exits
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (WorldlineError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        print(f"worldline: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from there" if args[0] in KEEPING else ""
        print(f"worldline: interrupted{goes_on}", file=sys.stderr)
        raise SystemExit(130) from None


def _dispatch(args: list[str]) -> None:
    if args and args[0] == "--version":
        print(f"worldline {version('worldline')}")
        return
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs=_listing(VERBS)))
        return
    verb, rest = args[0], args[1:]
    if verb == "train":
        _train(rest)
    elif verb in VERBS:
        _COMMANDS[verb](rest)
    else:
        raise WorldlineError(f"a verb is required, got {verb!r}. Verbs:\n{_listing(VERBS)}")


def _listing(entries: dict[str, str]) -> str:
    return "\n".join(f"  {name:<15} {text}" for name, text in entries.items())


def _parse(cls: type, verb: str, rest: list[str], *, default: Any = None, positional: str | None = None) -> Any:
    """The dataclass from flags. `positional` names the field that may stand first without its flag."""
    if positional and rest and not rest[0].startswith("-"):
        rest = [f"--{positional.replace('_', '-')}", *rest]
    options = {} if default is None else {"default": default}
    try:
        return tyro.cli(
            cls,
            args=rest,
            prog=f"worldline {verb}",
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            **options,
        )
    except ValueError as error:  # a config's own check; older tyro lets those of the outermost config through
        raise WorldlineError(f"{verb}: {error}") from error


def _train(args: list[str]) -> None:
    from worldline.trainers import (
        dynamics,
        inverse,
        offline,
        policy,
        probe,
        scorer,
        tokenizer,
        trajectory,
        video_action,
        world_model,
        world_model_edm,
        world_models,
    )

    modules: dict[str, tuple[Any, type]] = {
        "tokenizer": (tokenizer, tokenizer.TrainTokenizer),
        "world-model": (world_model, world_model.TrainWorldModel),
        "world-model-edm": (world_model_edm, world_model_edm.TrainWorldModelEDM),
        "world-models": (world_models, world_models.TrainWorldModels),
        "video-action": (video_action, video_action.TrainVideoAction),
        "scorer": (scorer, scorer.TrainScorer),
        "policy": (policy, policy.TrainPolicy),
        "offline": (offline, offline.TrainOffline),
        "dynamics": (dynamics, dynamics.TrainDynamics),
        "trajectory": (trajectory, trajectory.TrainTrajectory),
        "inverse": (inverse, inverse.TrainInverse),
        "probe": (probe, probe.TrainProbe),
    }
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: worldline train STAGE [options]\n\n{_listing(STAGES)}")
        return
    stage, rest = args[0], args[1:]
    if stage not in modules:
        raise WorldlineError(f"a stage is required after train, got {stage!r}. Stages:\n{_listing(STAGES)}")
    module, cls = modules[stage]
    settings, rest = _preset(module.PRESETS, rest)
    config = _parse(cls, f"train {stage}", rest, default=_partial(cls, settings))
    print(f"done: {_claiming(module.run, config)}")


def _claiming(run: Callable[[Any], Path], config: Any) -> Path:
    """What a run gives. One that ends before it saved anything leaves its folder as it was: free, or another's."""
    from worldline.commands.outputs import claimed, release_claim

    held = claimed(config.out)
    try:
        return run(config)
    except Exception:
        if not held:
            release_claim(config.out)
        raise


def _preset(presets: dict[str, tuple[str, dict[str, Any]]], args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `--preset NAME` and `--max-steps N` out of the arguments; every field of a preset can still be overridden."""
    rest, name = [], "tiny"
    i = 0
    while i < len(args):
        key, _, value = args[i].partition("=")
        if key in ("--preset", "--max-steps"):
            if not value:
                i += 1
                value = args[i] if i < len(args) else ""
            if key == "--preset":
                name = value
            else:
                rest += ["--loop.steps", value]
        else:
            rest.append(args[i])
        i += 1
    if name not in presets:
        known = "\n".join(f"  {key:<8} {text}" for key, (text, _) in presets.items())
        raise WorldlineError(f"--preset: one of these is required, got {name!r}:\n{known}")
    if any(a in ("-h", "--help") for a in rest):
        print("presets (--preset NAME, default tiny; --max-steps N is short for --loop.steps N):")
        print("\n".join(f"  {key:<8} {text}" for key, (text, _) in presets.items()) + "\n")
    return presets[name][1], rest


def _partial(cls: type, settings: dict[str, Any]) -> Any:
    """A default instance of `cls` in which fields without default are marked as still missing.

    The constructor and its checks are left out: they are for whole configs, and tyro calls them with what it parsed.
    """
    instance = object.__new__(cls)
    for f in dataclasses.fields(cls):
        value = settings.get(f.name, f.default)
        if value is dataclasses.MISSING:
            value = tyro.MISSING if f.default_factory is dataclasses.MISSING else f.default_factory()
        object.__setattr__(instance, f.name, value)
    return instance


def _record(rest: list[str]) -> None:
    from worldline.commands.recording import Record, run_record

    print(f"done: {run_record(_parse(Record, 'record', rest, positional='world'))}")


def _inspect(rest: list[str]) -> None:
    from worldline.commands.recording import Inspect, run_inspect

    out = run_inspect(_parse(Inspect, "inspect", rest, positional="data"))
    print(f"done: {out / 'report.html'} and {out / 'report.json'}")


def _imagine(rest: list[str]) -> None:
    from worldline.commands.dreaming import Imagine, run_imagine

    print(f"done: {run_imagine(_parse(Imagine, 'imagine', rest))}")


def _eval(rest: list[str]) -> None:
    from worldline.commands.dreaming import Evaluate, run_eval

    out = run_eval(_parse(Evaluate, "eval", rest))
    print(f"done: {out / 'report.html'} and {out / 'report.json'}")


def _rank(rest: list[str]) -> None:
    from worldline.commands.ranking import Rank, run_rank

    out = run_rank(_parse(Rank, "rank", rest))
    print(f"done: {out / 'report.html'} and {out / 'report.json'}")


def _refine(rest: list[str]) -> None:
    from worldline.commands.refining import Refine, run_refine

    out = _claiming(run_refine, _parse(Refine, "refine", rest))
    print(f"done: {out / 'report.html'}; the policy is {out}")


def _synthesize(rest: list[str]) -> None:
    if any(arg.partition("=")[0] == "--trajectory-model" for arg in rest):
        from worldline.commands.synthesizing_trajectories import SynthesizeTrajectories, run_synthesize_trajectories

        out = run_synthesize_trajectories(_parse(SynthesizeTrajectories, "synthesize", rest))
        print(f"done: {out} and {out / 'synthesis' / 'report.html'}")
        return
    from worldline.commands.synthesizing import Synthesize, run_synthesize

    out = run_synthesize(_parse(Synthesize, "synthesize", rest))
    print(f"done: {out} and {out / 'synthesis' / 'report.html'}")


def _posttrain(rest: list[str]) -> None:
    from worldline.commands.posttraining import Posttrain, run_posttrain

    out = _claiming(run_posttrain, _parse(Posttrain, "posttrain", rest))
    print(f"done: {out / 'report.html'}; the world model is {out}")


def _offline_rl(rest: list[str]) -> None:
    from worldline.commands.offline_rl import OfflineRL, run_offline_rl

    out = _claiming(run_offline_rl, _parse(OfflineRL, "offline-rl", rest))
    print(f"done: {out / 'report.html'}; the policies are {out}/seed-N")


def _label(rest: list[str]) -> None:
    from worldline.commands.labeling import Label, run_label

    print(f"done: {run_label(_parse(Label, 'label', rest, positional='data'))}")


def _show(rest: list[str]) -> None:
    from worldline.commands.showing import Show, run_show

    print(run_show(_parse(Show, "show", rest, positional="folder")))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "record": _record,
    "inspect": _inspect,
    "imagine": _imagine,
    "eval": _eval,
    "rank": _rank,
    "refine": _refine,
    "synthesize": _synthesize,
    "posttrain": _posttrain,
    "offline-rl": _offline_rl,
    "label": _label,
    "show": _show,
}
