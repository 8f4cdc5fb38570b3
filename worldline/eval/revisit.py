"""Does a dream bring back what it saw long ago? The arm leaves a cell of its table, returns, and a probe says what lies there.

In `arm/...` worlds every cell holds an object of its own colour and shape that only the wrist camera sees, drawn anew in every
episode: what returns can be known from memory alone. One revisit an episode is judged, so that outcomes are independent: the
one with the longest absence. The dream is given the real frames up to the last one before the cell comes into sight again
(`returned`), or, harder, only those up to the last one in which it was in sight (`left`): then it dreams the absence too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from worldline.errors import CheckpointError, DatasetError
from worldline.eval.intervals import wilson
from worldline.eval.probes import Probe
from worldline.eval.replays import Replays
from worldline.rl_in_imagination.dream import Dream
from worldline.sim.arm import cell_in_view, cells_in_sight
from worldline.sim.arm_scene import CELL_COLUMNS, CELLS_FROM, COLOURS, SHAPES
from worldline.types import Clip

LONGEST_JUDGED = 16  # frames after the return
IDENTITIES = (*(f"colour/{name}" for name in COLOURS), *(f"shape/{name}" for name in SHAPES))
"""Outputs of an identity probe: one for each colour and each shape, 1 for what is there and 0 for what is not."""


def below_the_hand(states: Float[Tensor, "t s"]) -> tuple[Tensor, Tensor]:
    """Frames "m" at which a cell is at the centre of the wrist camera's picture, and what lies there, "m 11" (`IDENTITIES`)."""
    centre = cell_in_view(states)
    times = (centre >= 0).nonzero()[:, 0]
    kind = [_kind(states[i], int(centre[i])) for i in times.tolist()]
    colour, shape = (torch.tensor([k[j] for k in kind], dtype=torch.long) for j in (0, 1))
    return times, torch.cat([F.one_hot(colour, len(COLOURS)), F.one_hot(shape, len(SHAPES))], dim=1).float()


def _kind(state: Tensor, cell: int) -> tuple[int, int]:
    """Colour and shape (indices) of a cell's object."""
    at = CELLS_FROM + cell * len(CELL_COLUMNS)
    colour, shape = (int(state[at + CELL_COLUMNS.index(name)]) for name in ("colour", "shape"))
    return colour, shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisit:
    """A cell that was looked at, out of sight from frame `left` to frame `returned` - 1, and centred in `judged` again."""

    row: int  # of the replays
    cell: int
    left: int
    returned: int
    judged: tuple[int, ...]
    colour: int
    shape: int


def find_revisits(states: Float[Tensor, "n t s"], *, away: int, judged: int = 3) -> list[Revisit]:
    """Of each episode the revisit with the longest absence, if that is at least `away` frames long.

    The cell must have been at the picture's centre before it left, and be there for at least `judged` of the
    `LONGEST_JUDGED` frames after it came back. `states` are an `arm/...` world's; others raise `SimulatorError`.
    """
    found = []
    for row, episode in enumerate(states):
        sight, centre = cells_in_sight(episode), cell_in_view(episode)
        best: Revisit | None = None
        for cell in range(sight.shape[1]):
            seen = sight[:, cell].nonzero()[:, 0].tolist()
            for last, again in zip(seen, seen[1:]):
                after = [i for i in range(again, min(again + LONGEST_JUDGED, len(episode))) if centre[i] == cell]
                known = bool((centre[: last + 1] == cell).any())
                longest = best.returned - best.left if best else away - 1
                if known and len(after) >= judged and again - (last + 1) > longest:
                    colour, shape = _kind(episode[0], cell)
                    best = Revisit(
                        row=row,
                        cell=cell,
                        left=last + 1,
                        returned=again,
                        judged=tuple(after),
                        colour=colour,
                        shape=shape,
                    )
        if best is not None:
            found.append(best)
    return found


def revisit_identity(
    dream: Dream, replays: Replays, probe: Probe, *, away: int, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """How often colour and shape of what returns are right, by frames that a probe reads.

    `real`: the recorded frames (the probe's own limit). `reconstructed`: the same through the tokenizer. `imagined`: dreamt from
    the return on. `dreamt absence`: dreamt since the cell was left. `away`: least frames out of sight.

    Raises `DatasetError` if no episode has such a revisit, `SimulatorError` if the data is not of an `arm/...` world,
    `CheckpointError` if the probe reads something else.
    """
    if probe.config.names != IDENTITIES:
        raise CheckpointError(
            f"an identity probe is required (`worldline train probe --target identity`), got one of {probe.config.target}"
        )
    revisits = find_revisits(replays.states, away=away)
    if not revisits:
        raise DatasetError(
            f"a cell that was out of sight for at least {away} frames and came back is required, got none in "
            f"{len(replays.states)} episodes of {replays.states.shape[1]} frames. Record arm/revisit with a longer horizon."
        )
    rows = []
    for revisit in tqdm(revisits, desc="revisits", unit="episode", disable=not progress, leave=False):
        frames = {c: x[revisit.row, list(revisit.judged)][None] for c, x in replays.frames.items()}
        shown = {
            "real": frames,
            "reconstructed": dream.tokenizer.decode(dream.tokenizer.encode(frames)),
            "imagined": _dreamt(dream, replays, revisit, revisit.returned, seed),
            "dreamt absence": _dreamt(dream, replays, revisit, revisit.left, seed),
        }
        said = {name: identify(probe, {c: x[0].cpu() for c, x in video.items()}) for name, video in shown.items()}
        right = {
            name: {"colour": colour == revisit.colour, "shape": shape == revisit.shape}
            for name, (colour, shape) in said.items()
        }
        rows.append({"episode": replays.episodes[revisit.row], **asdict(revisit), "right": right})
    return {
        "away": away,
        "episodes": len(rows),
        "mean_absence": sum(r["returned"] - r["left"] for r in rows) / len(rows),
        "chance": {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES)},
        **{name: _rates([r["right"][name] for r in rows]) for name in rows[0]["right"]},
        "by_episode": rows,
    }


def identify(probe: Probe, frames: dict[str, Tensor]) -> tuple[int, int]:
    """Colour and shape (indices) that an identity probe reads off frames "t c h w" of one object, by the mean of its outputs."""
    read = probe(frames).mean(0)
    return int(read[: len(COLOURS)].argmax()), int(read[len(COLOURS) :].argmax())


def _dreamt(dream: Dream, replays: Replays, revisit: Revisit, given: int, seed: int) -> dict[str, Tensor]:
    """The judged frames "1 j c h w", imagined under the recorded actions from the first `given` real frames on."""
    row, last = revisit.row, revisit.judged[-1]
    context = {c.name: replays.frames[c.name][row : row + 1, :given] for c in dream.spec.cameras}
    state = dream.world_model.observe(
        Clip(
            frames=dream.tokenizer.encode(context),
            actions=replays.actions[row : row + 1, : given - 1],
            poses=replays.poses[row : row + 1, :given],
            instruction=(replays.instruction[row],),
        )
    )
    actions = replays.actions[row : row + 1, given - 1 : last]
    _, made = dream.world_model.imagine(state, actions, seeds=torch.tensor([seed + row]))
    wanted = [i - given for i in revisit.judged]
    return dict(dream.tokenizer.decode({c: z[:, wanted] for c, z in made.latents.items()}))


def _rates(right: Sequence[dict[str, bool]]) -> dict[str, Any]:
    both = [{**r, "both": all(r.values())} for r in right]
    out = {}
    for what in both[0]:
        count = sum(r[what] for r in both)
        found = wilson(count, len(both))
        out[what] = {"rate": count / len(both), "low": found.low, "high": found.high}
    return out
