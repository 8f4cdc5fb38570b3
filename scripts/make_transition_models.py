"""Makes the transition-model table of docs/results.md: World4RL's U-Net beside the transformer, and two-hot beside plain actions.

    python scripts/make_transition_models.py --out results-transitions

One Meta-World task, scripted attempts and rollouts of a cloned policy. Three world models learn from the same latents for the same CPU time
(--minutes of one thread each; a few steps are timed first, of one U-Net for both): the `tiny` transformer, and the `tiny` EDM U-Net whose actions come two-hot
or plain. All are measured by `worldline eval` on test episodes from starts that no training saw, and their reports kept. Everything is kept in
--out, which may be that of make_refinement.py: data, tokenizer and scorer are then shared. Run the same command again after an interruption.
Prints Markdown, and writes it to OUT/transitions.md.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from make_refinement import MakeRefinement, prepare, real, train_scorer
from result_tables import row, table
from stages import kept, record, seconds_a_step, train

from worldline.commands.dreaming import Evaluate, run_eval
from worldline.commands.outputs import report_results
from worldline.commands.rollouts import weights_of
from worldline.trainers import world_model, world_model_edm

ARMS = ("transformer", "unet-two-hot", "unet-plain")
HORIZONS = (10, 20, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeTransitionModels:
    """Train three world models for the same time, measure them, print the table."""

    out: Path
    task: str = "button-press-topdown-v3"
    minutes: float = 20.0
    """CPU time of training each, on one thread."""
    seeds: int = 1
    tests: int = 40
    refinement: MakeRefinement = field(default_factory=lambda: MakeRefinement(out=Path()))
    """How data, tokenizer and scorer are made; its tasks, seeds and out are not used."""


def stage_of(config: MakeTransitionModels, arm: str, seed: int) -> tuple[Any, Any]:
    """The stage of an arm and its settings, their number of steps apart."""
    home = config.out / config.task
    module: Any = world_model if arm == "transformer" else world_model_edm
    kind: Any = world_model.TrainWorldModel if arm == "transformer" else world_model_edm.TrainWorldModelEDM
    preset = module.PRESETS["tiny"][1]
    model = preset["model"]
    if arm != "transformer":
        model = replace(model, action_encoding=arm.removeprefix("unet-"))
    loop = replace(preset["loop"], seed=seed)
    return module, kind(data=real(home), tokenizer=home / "tok", out=home / f"{arm}{seed}", model=model, loop=loop)


def trained(config: MakeTransitionModels, arm: str, seed: int) -> tuple[Path, float]:
    """The arm's folder and the CPU seconds of one of its steps."""
    module, settings = stage_of(config, arm, seed)
    # both U-Nets cost the same but for the moment's luck: their actions are compared at equal steps
    seconds = seconds_a_step(*stage_of(config, "unet-two-hot" if arm == "unet-plain" else arm, seed))
    steps = max(20, round(60 * config.minutes / seconds))
    return train(module, replace(settings, loop=replace(settings.loop, steps=steps))), seconds


def measured(config: MakeTransitionModels, folder: Path, scorer: Path) -> dict[str, Any]:
    out = folder.with_name(f"eval-{folder.name}")
    if not kept(
        out,
        {"models": [weights_of(folder), weights_of(scorer)], "frames": config.refinement.frames},
        done="report.json",
    ):
        data = config.out / config.task / "test"
        options: dict[str, Any] = {"frames": config.refinement.frames, "split": "all", "doubt_steps": 2}
        run_eval(Evaluate(world_model=folder, data=(data,), out=out, scorer=scorer, **options))
    return report_results(out)


def rows_of(config: MakeTransitionModels, arm: str, seed: int, scorer: Path) -> list[str]:
    folder, seconds = trained(config, arm, seed)
    facts = json.loads((folder / "config.json").read_text())["provenance"]
    found = measured(config, folder, scorer)
    at = {(h["predictor"], h["camera"], h["horizon"]): h["moved_psnr"] for h in found["horizons"]}
    diagnostic, doubt = found["replay_diagnostic"], found["doubt"]
    told = f"{diagnostic['calibration']['auroc']:.2f}"
    worth = ", ".join("–" if doubt[k] is None else f"{doubt[k]:.2f}" for k in ("correlation", "correlation_between"))
    return [
        row(
            f"{arm}, {seed}",
            f"{facts['weights'] / 1e6:.1f}M",
            facts["steps"],
            f"{1000 * seconds:.0f}",
            camera,
            *(f"{at['true', camera, h]:.1f}" for h in HORIZONS if ("true", camera, h) in at),
            f"{found['action_sensitivity'][camera]['shuffled']['gap']['gain_db']:+.1f}",
            f"{found['pose_error'][-1]:.3f}",
            told,
            worth,
            f"{found['speed']['frames_per_second']:.0f}",
        )
        for camera in found["action_sensitivity"]
    ]


def main(config: MakeTransitionModels) -> None:
    torch.set_num_threads(1)
    shared = replace(config.refinement, out=config.out, tasks=(config.task,))
    prepare(shared, config.task)
    record(config.out / config.task / "test", f"metaworld/{config.task}", config.tests, policy="mixed", seed=1000)
    scorer = train_scorer(shared, config.task, 0)
    rows = [line for seed in range(config.seeds) for arm in ARMS for line in rows_of(config, arm, seed, scorer)]
    head = (
        "| world model, seed | weights | steps | CPU ms a step | camera | moved PSNR at frame 10 | 20 | 40 | over shuffled actions "
        "| pose error at the last frame | AUROC of imagined replays | doubt and error: all frames, between dreams | imagined frames/s |"
    )
    text = (
        f"{config.task}, {config.minutes:g} CPU minutes of one thread each, {config.tests} test episodes of {config.refinement.frames} frames "
        f"(the U-Net and the transformer as their `tiny` presets have it).\n\n{table(head, rows)}\n"
    )
    (config.out / "transitions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeTransitionModels, description=__doc__))
