"""Makes the revisit table of docs/results.md: does a dream bring back what it saw long ago?

    python scripts/make_revisits.py --out results-revisits

In arm/revisit every episode draws tiles and objects that the wrist camera alone sees; the arm looks at a cell, leaves it for longer
than the network looks back (layers x window), and returns. World models see the wrist camera only, and differ in nothing but
which four older frames they are shown: the nearest by pose out of a bank (`bank`), the four before the window (`recent`), four at
fixed distances (`strided`), or none. A probe reads colour and shape of what returns. Everything is kept in --out; run the same
command again after an interruption. Prints Markdown, and writes it to OUT/tables.md.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from result_tables import row, table
from stages import kept, record, train

from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import load_dream
from worldline.eval.intervals import bootstrap_distribution
from worldline.eval.probes import Probe
from worldline.eval.replays import load_replays, open_for
from worldline.eval.revisit import revisit_identity
from worldline.trainers import probe, tokenizer, world_model
from worldline.trainers.loop import LoopConfig
from worldline.worldmodels.memory import MemoryConfig

# strided frames reach as far back as the absences are long: 8, 22, 36 and 50 frames
MEMORIES = {
    "bank": MemoryConfig(recent=1, nearest=3),
    "recent": MemoryConfig(recent=4, stride=1),
    "strided": MemoryConfig(recent=4, stride=14),
    "none": MemoryConfig(),
}
SEEN = ("imagined", "dreamt absence")
WHAT = ("colour", "shape", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeRevisits:
    """Record, train one world model for each memory and seed, judge what returns, print the table."""

    out: Path
    arms: tuple[str, ...] = tuple(MEMORIES)
    """Of bank, recent, strided, none. The first is compared with each of the others."""
    seeds: int = 1
    budget: float = 1.0
    """Multiplies all training steps. 1: about 15 minutes of one CPU core a world model."""
    episodes: int = 600
    tests: int = 120
    horizon: int = 320
    """Control steps of an episode; 4 are a frame."""
    away: int = 34
    """Least frames out of sight: more than layers x window."""

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(MEMORIES):
            raise ValueError(f"arms of {', '.join(MEMORIES)} required, got {', '.join(sorted(unknown))}")


def prepare(config: MakeRevisits) -> None:
    """Datasets, tokenizer and probe."""
    home, options = config.out, {"cameras": ("wrist",), "horizon": config.horizon}
    record(home / "data", "arm/revisit", config.episodes, policy="mixed", seed=0, **options)
    record(home / "test", "arm/revisit", config.tests, policy="revisit", seed=1000, **options)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=int(700 * config.budget))
    train(tokenizer, tokenizer.TrainTokenizer(data=(home / "data",), out=home / "tok", loop=loop))
    judge = LoopConfig(steps=int(1500 * config.budget), batch_size=64, lr=1e-3, ema=0.99)
    train(
        probe,
        probe.TrainProbe(
            data=(home / "data",), out=home / "probe", target="identity", tokenizer=home / "tok", loop=judge
        ),
    )


def evaluate(config: MakeRevisits, arm: str, seed: int) -> dict[str, Any]:
    """Train one world model and judge its revisits."""
    home, preset = config.out, world_model.PRESETS["tiny"][1]
    model = replace(preset["model"], network=replace(preset["model"].network, memory=MEMORIES[arm]))
    loop = replace(preset["loop"], steps=int(4000 * config.budget), seed=seed)
    folder = train(
        world_model,
        world_model.TrainWorldModel(
            data=(home / "data",), tokenizer=home / "tok", out=home / f"{arm}{seed}", model=model, loop=loop
        ),
    )
    out = home / f"revisits-{arm}{seed}.json"
    if not kept(out, {"models": [weights_of(folder), weights_of(home / "probe")], "away": config.away}):
        dream = load_dream(folder)
        dataset, stride = open_for(dream.spec, home / "test")
        replays = load_replays(dataset, range(len(dataset)), cameras=("wrist",), frames=None, stride=stride)
        judge = Probe.from_pretrained(home / "probe")
        out.write_text(json.dumps(revisit_identity(dream, replays, judge, away=config.away, progress=True)))
    return json.loads(out.read_text())


def right(found: dict[str, Any], seen: str, what: str) -> np.ndarray:
    """One number an episode: 1 where the probe read what lies there."""
    rows = [r["right"][seen] for r in found["by_episode"]]
    return np.array([all(r.values()) if what == "both" else r[what] for r in rows], dtype=float)


def gain(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], seen: str, what: str) -> str:
    """Mean difference over episodes (and seeds), with a bootstrap interval over episodes."""
    a = np.mean([right(f, seen, what) for f in ours], axis=0)
    b = np.mean([right(f, seen, what) for f in theirs], axis=0)
    draws = bootstrap_distribution((a - b,), lambda x, axis: x.mean(axis), resamples=4000, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{(a - b).mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def tables(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    def share(rates: dict[str, Any]) -> str:
        return f"{rates['rate']:.2f} [{rates['low']:.2f}, {rates['high']:.2f}]"

    rows = []
    for (arm, seed), results in found.items():
        rates = [share(results[seen][what]) for seen in SEEN for what in WHAT]
        rows.append(row(f"{arm}, {seed}", *rates))
    first = next(iter(found.values()))
    for seen in ("reconstructed", "real"):
        rows.append(row(f"{seen} frames", *(share(first[seen][what]) for what in WHAT), "", "", ""))
    head = "| frames shown, seed |" + "".join(
        f" {what}, {said} |" for said in ("given the absence", "dreamt absence") for what in WHAT
    )
    told = f"{first['episodes']} episodes, out of sight for {first['mean_absence']:.0f} frames on average, at least {first['away']}."
    arms: dict[str, list[dict[str, Any]]] = {}
    for (arm, _), results in found.items():
        arms.setdefault(arm, []).append(results)
    ours, *others = arms
    compared = [
        row(f"{ours} - {other}", *(gain(arms[ours], arms[other], seen, what) for seen in SEEN for what in WHAT))
        for other in others
    ]
    return "\n\n".join([told, table(head, [*rows, *compared])]) + "\n"


def main(config: MakeRevisits) -> None:
    prepare(config)
    found = {(arm, seed): evaluate(config, arm, seed) for arm in config.arms for seed in range(config.seeds)}
    text = tables(found)
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeRevisits, description=__doc__))
