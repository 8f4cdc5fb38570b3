"""Makes the instruction table of docs/results.md: the same frame, another sentence, another dream.

    python scripts/make_instructions.py --out results-instructions

Nine tasks on one table: a sentence names a tile by where it is (arm/place, "reach the far left tile"), or with --names object by the object that
lies on it there (arm/reach, "reach the red box": the sentence must be found in the picture). A world model that knows the instruction, and has
half the time been trained on video without actions, is asked for a video: it is given one frame and a sentence and no action at all. From
each test frame it dreams twice, with two sentences that name two tiles there; noise and frame are the same. Judged is over which tile the imagined hand ends, once by the imagined pose and once by a probe that reads the pose off the imagined
picture of the top camera. Everything is kept in --out. Prints Markdown, and writes it to OUT/tables.md and a video to OUT.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from result_tables import row, table
from stages import record, train
from torch import Tensor

from worldline.commands.sampling import load_dream
from worldline.data import LeRobotDataset
from worldline.eval import video_grid, write_mp4
from worldline.eval.intervals import wilson
from worldline.eval.probes import Probe
from worldline.eval.replays import Replays, load_replays, open_for
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.sim.arm_kinematics import CELLS, PLACES, nearest_cell
from worldline.sim.arm_scene import CELL_COLUMNS, CELLS_FROM, COLOURS, SHAPES, TARGET
from worldline.tokenizers import AutoencoderConfig
from worldline.trainers import probe, tokenizer, world_model
from worldline.trainers.loop import LoopConfig

JUDGES = ("imagined pose", "pose read off the top view")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeInstructions:
    """Record, train one world model a seed, let it dream by instruction alone, print the table."""

    out: Path
    seeds: int = 1
    budget: float = 1.0
    """Multiplies all training steps. 1: about an hour of one CPU core a world model."""
    episodes: int = 600
    tests: int = 60
    frames: int = 41
    names: Literal["place", "object"] = "place"
    """What sentences name tiles by."""
    size: int = 64
    """Pixels of a frame's side. At 64 an object is four pixels on a chequered cell, which no small tokenizer keeps: 128 for --names object."""
    cameras: tuple[str, ...] = ("top",)
    """The top camera, which judges, and others."""
    latent_channels: int = 8
    text: str = "hashed"
    """The instruction's encoder: hashed, or a text model of transformers."""


def prepare(config: MakeInstructions) -> None:
    """Datasets, tokenizer and the probe that judges pictures."""
    home = config.out
    views: dict[str, Any] = {"cameras": config.cameras, "size": config.size, "policy": "expert"}
    world = "arm/place" if config.names == "place" else "arm/reach"
    record(home / "data", world, config.episodes, **views, seed=0)
    record(home / "test", world, config.tests, **views, seed=1000)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=int(2400 * config.budget))
    wide = AutoencoderConfig(latent_channels=config.latent_channels)
    train(tokenizer, tokenizer.TrainTokenizer(data=(home / "data",), out=home / "tok", autoencoder=wide, loop=loop))
    judge = LoopConfig(steps=int(1000 * config.budget), batch_size=64, lr=1e-3, ema=0.99)
    reader = probe.TrainProbe(
        data=(home / "data",),
        out=home / "probe",
        target="pose",
        columns=(0, 1),
        camera="top",
        tokenizer=home / "tok",
        loop=judge,
    )
    train(probe, reader)


def train_dream(config: MakeInstructions, seed: int) -> Dream:
    preset = world_model.PRESETS["tiny"][1]
    folder = train(
        world_model,
        world_model.TrainWorldModel(
            data=(config.out / "data",),
            tokenizer=config.out / "tok",
            out=config.out / f"wm{seed}",
            model=replace(preset["model"], text=config.text, actionless=0.5),
            starts=0.5,
            loop=replace(preset["loop"], steps=int(6000 * config.budget), seed=seed),
        ),
    )
    return load_dream(folder)


def named(state: Tensor, names: str) -> dict[int, str]:
    """cell -> the sentence that asks for it; of objects for every one that is the only one of its kind."""
    if names == "place":
        return {i: f"reach the {place} tile" for i, place in enumerate(PLACES)}
    cells = state[CELLS_FROM:].reshape(len(CELLS), len(CELL_COLUMNS)).long().tolist()
    kinds = [tuple(cell[:2]) for cell in cells]
    said = {i: f"reach the {tuple(COLOURS)[c]} {SHAPES[s]}" for i, (c, s) in enumerate(kinds)}
    return {i: text for i, text in said.items() if kinds.count(kinds[i]) == 1}


def sentences(replays: Replays, names: str) -> list[list[tuple[int, str]]]:
    """Two of each test frame's targets with their sentences: the recorded one, and another, neither below the hand already."""
    pairs = []
    for i, states in enumerate(replays.states):
        options, target = named(states[0], names), int(states[0][TARGET])
        here = int(nearest_cell(replays.poses[i, 0].numpy()))
        others = [cell for cell in options if cell not in (target, here)]
        pairs.append([(cell, options[cell]) for cell in (target, others[i % len(others)])])
    return pairs


def final_cells(
    dream: Dream, replays: Replays, told: tuple[str, ...], judge: Probe, frames: int
) -> tuple[np.ndarray, dict]:
    """By judge, the cell below the hand at the end of each dream, "judges n"; and the frames."""
    starts = replace(replays.first, instruction=told)
    made = rollout(dream, None, None, starts, frames=frames, seeds=torch.arange(len(told)), keep_frames=True)
    read = judge.read_video({"top": made.frames["top"]})[:, -1]
    ends = (made.poses[:, -1, :2], read)
    return np.stack([nearest_cell(torch.nn.functional.pad(x, (0, 2)).numpy()) for x in ends]), dict(made.frames)


def rate(hits: np.ndarray) -> str:
    found = wilson(int(hits.sum()), len(hits))
    return f"{hits.mean():.2f} [{found.low:.2f}, {found.high:.2f}]"


def evaluate(config: MakeInstructions, seed: int) -> list[str]:
    dream, judge = train_dream(config, seed), Probe.from_pretrained(config.out / "probe")
    dataset, stride = open_for(dream.spec, config.out / "test")
    cameras = [c.name for c in dream.spec.cameras]
    replays = load_replays(dataset, range(len(dataset)), cameras=cameras, frames=config.frames, stride=stride)
    pairs = sentences(replays, config.names)
    cells = np.array([[cell for cell, _ in pair] for pair in pairs])  # "n 2"
    ends, videos = [], []
    for which in range(2):
        told = tuple(pair[which][1] for pair in pairs)
        found, frames = final_cells(dream, replays, told, judge, config.frames)
        ends.append(found)
        videos.append(frames)
    show(config.out / f"instructions{seed}.mp4", replays, pairs, videos, dream)
    rows = []
    for j, name in enumerate(JUDGES):
        own = np.concatenate([ends[w][j] == cells[:, w] for w in range(2)])
        other = np.concatenate([ends[w][j] == cells[:, 1 - w] for w in range(2)])
        both = (ends[0][j] == cells[:, 0]) & (ends[1][j] == cells[:, 1])
        rows.append(row(f"{name}, {seed}", rate(own), rate(other), rate(both)))
    return rows


def show(
    path: Path, replays: Replays, pairs: list, videos: list[dict[str, Tensor]], dream: Dream, count: int = 4
) -> None:
    """The first dreams side by side, one column a sentence."""
    columns = {}
    for i in range(count):
        for which in range(2):
            columns[f"{i}: {pairs[i][which][1]}"] = {"top": videos[which]["top"][i]}
    write_mp4(path, video_grid(columns, cell=160), dream.spec.fps)


def main(config: MakeInstructions) -> None:
    prepare(config)
    rows = [line for seed in range(config.seeds) for line in evaluate(config, seed)]
    chance = f"{len(LeRobotDataset(config.out / 'test'))} frames, two sentences each. Chance: one of nine cells, 0.11."
    head = "| judged by, seed | over the tile it was told | over the other sentence's tile | both dreams of a frame right |"
    text = f"{chance}\n\n{table(head, rows)}\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeInstructions, description=__doc__))
