"""Steps that the table-making scripts share: record once, train once, count what a training step costs."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from bench_train import gflop

from worldline.checkpoint import to_json
from worldline.commands.recording import Record, cores, run_record
from worldline.commands.rollouts import TruthSettings
from worldline.data import LeRobotDataset, RobustNormalizer, strided
from worldline.sim.workers import end_with_parent
from worldline.tokenizers import load_tokenizer
from worldline.trainers.world_model import TrainWorldModel
from worldline.types import Clip, WorldSpec
from worldline.worldmodels import AutoregressiveWorldModel

T = TypeVar("T")
TIMED = (40, 120)  # steps of the two short runs whose difference says what a step costs


def record(out: Path, world: str, episodes: int, **options: Any) -> Path:
    """Record a dataset unless it is there."""
    if not kept(out, {"world": world, "episodes": episodes, **options}, done="meta/info.json"):
        print(f"recording {out}", flush=True)
        run_record(Record(world=world, out=out, episodes=episodes, **options))
    return out


def kept(made: Path, made_with: Mapping[str, Any], *, done: str = "") -> bool:
    """Whether `made` (a file, or a folder that holds `done` at its end) is there and was made with just this.

    What it is made with is noted beside it. Raises `SystemExit` where it was made with something else: a table must not show what another
    command found.
    """
    note, now = made.with_name(f"{made.name}-made-with.json"), json.loads(json.dumps(to_json(dict(made_with))))
    if not (made / done if done else made).is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(now, indent=1))
        return False
    before = json.loads(note.read_text()) if note.is_file() else now
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise SystemExit(f"{made} was made with another {', '.join(changed)}: use another --out, or delete it")
    return True


def together(jobs: int, calls: Sequence[Callable[[], T]]) -> list[T]:
    """What independent calls give, `jobs` of them at a time in processes of their own; 1: one after another, in this one.

    The calls are functions of modules (`functools.partial`), so that another process can be told them. Where one fails, the others
    go on to their end, so that what they keep is kept, and then its error is raised.
    """
    if jobs == 1 or len(calls) < 2:
        return [call() for call in calls]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(calls)), mp_context=spawn, initializer=_begin_worker) as pool:
        begun = [pool.submit(call) for call in calls]
    return [one.result() for one in begun]


def _begin_worker() -> None:
    """One thread; and where the script is killed its trainings end too, so that the next run does not find them still writing."""
    torch.set_num_threads(1)
    end_with_parent()


def train(module: Any, config: Any) -> Path:
    """Run a stage unless it has run to its end."""
    path, claim = config.out / "config.json", config.out / "training" / "run.json"
    if path.is_file() and json.loads(path.read_text())["provenance"].get("steps") == config.loop.steps:
        before = json.loads(claim.read_text())["config"]
        learned = before["data"]
        if learned != [str(folder) for folder in config.data]:
            raise SystemExit(
                f"{config.out} learned from {learned}, now {list(map(str, config.data))}: use another --out"
            )
        now = to_json(config)
        if changed := [name for name in before if name in now and before[name] != now[name]]:
            raise SystemExit(f"{config.out} was trained with another {', '.join(changed)}: use another --out")
        return config.out
    print(f"training {config.out}", flush=True)
    return module.run(config)


def training_gflop(config: TrainWorldModel, *, lead: int = 60, draws: int = 8) -> float:
    """Arithmetic of one training step (forward and backward), in GFLOP, on average over what a step draws by chance.

    Counted on random clips of the data's shapes; `lead` frames stand before a clip where there is a memory.
    """
    tokenizer, dataset = load_tokenizer(config.tokenizer), LeRobotDataset(config.data[0])
    spec = replace(strided(dataset.spec, config.stride), latent=tokenizer.latent_spec)
    p, low, high = len(spec.pose_names), spec.action.low, spec.action.high
    model = AutoregressiveWorldModel(
        config.model,
        spec,
        action_normalizer=RobustNormalizer(low=low, high=high),
        pose_normalizer=RobustNormalizer(low=(0.0,) * p, high=(1.0,) * p),
    )
    lead = lead if config.model.network.memory.size else 0
    b, t = config.loop.batch_size, config.frames + lead
    clip = Clip(
        frames={c: torch.randn(b, t, *shape) for c, shape in tokenizer.latent_spec.shapes.items()},
        actions=torch.rand(b, t - 1, spec.control_steps, spec.action.dim),
        poses=torch.rand(b, t, p),
        instruction=("",) * b,
        lead=lead,
    )
    steps = [
        gflop(lambda seed=seed: model.loss(clip, torch.Generator().manual_seed(seed))[0].backward())
        for seed in range(draws)
    ]
    return sum(steps) / draws


def seconds_a_step(module: Any, settings: Any) -> float:
    """CPU seconds of a training step of a stage, timed once and kept beside its folder."""

    def run(steps: int, out: Path) -> None:
        module.run(replace(settings, out=out, loop=replace(settings.loop, steps=steps, warmup=1)), progress=False)

    return pace(run, settings.out, TIMED)


def pace(run: Callable[[int, Path], Any], out: Path, timed: tuple[int, int]) -> float:
    """CPU seconds of one step of `run(steps, folder)`: what a short and a longer run differ by. Kept beside `out`.

    A short run before them does not count: it fills the caches on disk. Those in memory fill while the first of the two runs: until every
    episode has been decoded once, a step costs up to twenty times what it costs then. Raises `SystemExit` for a difference that is no time.
    """
    kept = out.with_name(f"{out.name}-pace.json")
    if not kept.is_file():
        took, scratch = [], out.with_name(f"{out.name}-timed")
        for steps in (min(4, timed[0]), *timed):
            shutil.rmtree(scratch, ignore_errors=True)
            start = time.process_time()
            run(steps, scratch)
            took.append(time.process_time() - start)
            shutil.rmtree(scratch)
        _, short, long = took
        if long <= short:
            raise SystemExit(
                f"{out}: {timed[1]} steps took {long:.1f} CPU seconds, {timed[0]} took {short:.1f}: no pace"
            )
        kept.write_text(json.dumps((long - short) / (timed[1] - timed[0])))
    return json.loads(kept.read_text())


def truth_settings(task: str, spec: WorldSpec, *, episodes: int, frames: int, seed: int) -> TruthSettings:
    """How a Meta-World task judges policies: so many true episodes of so many frames, from starts of their own."""
    horizon = (frames - 1) * spec.control_steps
    options = {"episodes": episodes, "starts": episodes, "horizon": horizon, "frames": frames}
    return TruthSettings(world=f"metaworld/{task}", spec=spec, **options, seed=seed, processes=cores())
