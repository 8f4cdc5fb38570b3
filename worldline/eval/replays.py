"""Real episodes as a world model sees them: strided frames and whole action blocks, to be imagined again and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from worldline.data import LeRobotDataset, require_actions, strided
from worldline.errors import DatasetError
from worldline.rl_in_imagination.dream import Dream
from worldline.types import ActionSpec, Episode, Observation, WorldSpec, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class Replays:
    """n real episodes cut to t frames, as the world model sees them: strided frames and whole action blocks."""

    episodes: tuple[int, ...]
    frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]
    poses: Float[Tensor, "n t p"]
    actions: Float[Tensor, "n t-1 k a"]
    instruction: tuple[str, ...]
    frame_success: Tensor | None  # "n t" bool; None if any episode has no labels
    states: Float[Tensor, "n t s"]
    causes: tuple[str, ...]
    ends: tuple[
        int | None, ...
    ] = ()  # the frame at which each terminated, after which its last frame stands; None: it goes on
    hidden: tuple[str, ...] = ()  # cameras that a dream is not shown, though they are there to compare with
    noisy: Mapping[str, float] = field(
        default_factory=dict
    )  # cameras that a dream is shown through Gaussian noise, and its std

    @property
    def first(self) -> Observation:
        """What dreams of these episodes begin with."""
        shown = {c: _grainy(x[:, 0], self.noisy.get(c, 0.0)) for c, x in self.frames.items() if c not in self.hidden}
        return Observation(images=shown, pose=self.poses[:, 0], instruction=self.instruction)

    def held(self, values: Shaped[Tensor, "n t"], *, beyond: int = 0) -> Shaped[Tensor, "n t2"]:
        """Values of frames, those after an episode's end replaced by that at its end, and `beyond` more of them.

        Nothing undoes what an episode ended with. Of one that goes on nothing is known beyond: 0.
        """
        n, t = values.shape
        ends = torch.tensor([t + beyond if end is None else end for end in self.ends or (None,) * n])
        index = torch.minimum(torch.arange(t + beyond).expand(n, -1), ends[:, None])
        return values.gather(1, index.clamp(max=t - 1)) * (index < t).to(values.dtype)


def _grainy(images: UInt8[Tensor, "n c h w"], std: float) -> UInt8[Tensor, "n c h w"]:
    """With Gaussian noise of `std` (of the range 0 to 1), the same every time."""
    if not std:
        return images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 255 * std * noise).round().clamp(0, 255).to(torch.uint8)


def load_replays(
    dataset: LeRobotDataset,
    episodes: Sequence[int],
    *,
    cameras: Sequence[str],
    frames: int | None,
    stride: int = 1,
    acting: bool = True,
    held: bool = False,
) -> Replays:
    """Episodes of at least `frames` frames (default: the shortest), from their first frame on.

    With `held` an episode that terminated earlier stays as it ended (and repeats its last actions), and the default is the shortest of those
    that did not: simulators that end at success would else leave their fastest success to say how long an episode is.

    Raises `DatasetError` if none is long enough, or if actions are not known; without `acting` those are NaN then.
    """
    lengths = [(dataset.length(i) - 1) // stride + 1 for i in episodes]
    over = [held and dataset.terminated(i) for i in episodes]
    going = [length for length, ended in zip(lengths, over) if not ended]
    t = frames or min(going, default=max(lengths, default=0))
    chosen = [i for i, length, ended in zip(episodes, lengths, over) if length >= t or (ended and length >= 2)]
    if not chosen or t < 2:
        raise DatasetError(
            f"{dataset.root}: episodes of at least {max(t, 2)} frames required, the longest has {max(lengths, default=0)}"
        )
    if acting:
        require_actions(dataset, chosen)
    read = [dataset.episode(i) for i in chosen]
    k = read[0].actions.shape[1] * stride
    labels = [e.frame_success for e in read]
    success = None
    if all(label is not None for label in labels):
        done = [strided_success(e, stride, ended=held and e.terminated) for e in read]
        success = torch.stack([_first(seen, t) for seen in done])

    def video(frames: Any) -> Tensor:
        stop = min((t - 1) * stride + 1, (len(frames) - 1) // stride * stride + 1)
        return _first(frames[0:stop][::stride], t)

    last = [(dataset.length(i) - 1) // stride for i in chosen]
    return Replays(
        episodes=tuple(chosen),
        frames={c: torch.stack([video(e.frames[c]) for e in read]) for c in cameras},
        poses=torch.stack([_first(e.poses[::stride], t) for e in read]),
        actions=torch.stack([_first(_blocks(e.actions, stride, k), t - 1) for e in read]),
        instruction=tuple(e.instruction for e in read),
        frame_success=success,
        states=torch.stack([_first(e.states[::stride], t) for e in read]),
        causes=tuple(e.provenance.get("cause", "unknown") for e in read),
        ends=tuple(at if held and dataset.terminated(i) and at < t else None for i, at in zip(chosen, last)),
    )


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows; where there are fewer, the last again and again."""
    return rows[torch.arange(count).clamp(max=len(rows) - 1)]


def _blocks(actions: Float[Tensor, "t k a"], stride: int, k: int) -> Float[Tensor, "t2 k2 a"]:
    """The whole blocks between strided frames, of k actions each."""
    return actions[: len(actions) // stride * stride].reshape(-1, k, actions.shape[-1])


def join_replays(parts: Sequence[Replays]) -> Replays:
    """The episodes of several datasets, all cut to the shortest. Labels and states are kept where all parts have them alike."""
    t = min(part.poses.shape[1] for part in parts)
    alike = len({part.states.shape[2] for part in parts}) == 1
    labels = [part.frame_success[:, :t] for part in parts if part.frame_success is not None]
    return Replays(
        episodes=tuple(i for part in parts for i in part.episodes),
        frames={c: torch.cat([part.frames[c][:, :t] for part in parts]) for c in parts[0].frames},
        poses=torch.cat([part.poses[:, :t] for part in parts]),
        actions=torch.cat([part.actions[:, : t - 1] for part in parts]),
        instruction=tuple(text for part in parts for text in part.instruction),
        frame_success=torch.cat(labels) if len(labels) == len(parts) else None,
        states=torch.cat([part.states[:, :t, : None if alike else 0] for part in parts]),
        causes=tuple(cause for part in parts for cause in part.causes),
        ends=tuple(
            None if end is None or end >= t else end
            for part in parts
            for end in part.ends or (None,) * len(part.episodes)
        ),
    )


def open_for(spec: WorldSpec, data: Path) -> tuple[LeRobotDataset, int]:
    """The dataset and the stride at which it is that of a world model. Raises `SpecMismatch` with the differing fields."""
    dataset = LeRobotDataset(data, cameras=[c.name for c in spec.cameras])
    if dataset.range_observed and dataset.spec.action.names == spec.action.names:
        dataset = dataset.with_range(
            spec.action.low, spec.action.high
        )  # other recordings of one robot reach other extremes
    stride = max(1, spec.control_steps // max(1, dataset.spec.control_steps))
    require_match(strided(dataset.spec, stride), spec, between=f"dataset {data} and world model")
    return dataset, stride


def load_starts(data: Sequence[Path], split: str, dream: Dream, *, frames: int | None = 2) -> Replays:
    """Episodes of a split, `frames` frames of each (the shortest's: None), as the world model sees them; those that ended stay so."""
    cameras = [c.name for c in dream.spec.cameras]
    parts = []
    for folder in data:
        dataset, stride = open_for(dream.spec, folder)
        parts.append(
            load_replays(dataset, dataset.split(split), cameras=cameras, frames=frames, stride=stride, held=True)
        )
    return parts[0] if len(parts) == 1 else join_replays(parts)


def outside_range(actions: Float[Tensor, "*rows a"], spec: ActionSpec) -> Bool[Tensor, "*rows a"]:
    """Which values lie outside their dimension's range by more than a ten-thousandth of it."""
    low, high = torch.tensor(spec.low), torch.tensor(spec.high)
    slack = 1e-4 * (high - low)
    return (actions < low - slack) | (actions > high + slack)


def range_results(actions: Float[Tensor, "n t k a"], spec: ActionSpec) -> dict[str, Any]:
    """How many action values are out of range, and of which dimensions: what reports say of it."""
    outside = outside_range(actions, spec)
    by_name = dict(zip(spec.names, outside.flatten(0, -2).sum(0).tolist(), strict=True))
    return {"values": outside.numel(), "outside": int(outside.sum()), "by_dimension": by_name}


def within_range(replays: Replays, spec: ActionSpec, *, clip: bool) -> Replays:
    """Replays whose actions are in range: as they are, or with `clip` clipped as an environment would.

    Raises `DatasetError` naming the first action that is not, unless `clip`.
    """
    outside = outside_range(replays.actions, spec)
    if clip:
        clipped = replays.actions.clamp(torch.tensor(spec.low), torch.tensor(spec.high))
        return replace(replays, actions=clipped)
    if outside.any():
        row, block, step, dim = outside.nonzero()[0].tolist()
        raise DatasetError(
            f"actions within their range required: {spec.names[dim]} from {spec.low[dim]:g} to {spec.high[dim]:g}, got "
            f"{float(replays.actions[row, block, step, dim]):g} in episode {replays.episodes[row]}, block {block} "
            f"({int(outside.sum())} of {outside.numel()} values are out of range). Give --clip-actions True to clip them as an "
            "environment would, or mend the dataset or its declared range."
        )
    return replays


def strided_success(episode: Episode, stride: int, *, ended: bool) -> Bool[Tensor, " t"]:
    """Success of every `stride`-th frame of a labelled episode: whether any frame since the one before it was one. Of one that `ended` where it
    does the last one has what came behind it, too: it ended between two strided frames."""
    label = episode.frame_success
    assert label is not None, "a labelled episode"
    seen = label.clone()
    if stride > 1:
        groups = label[1:][: (len(label) - 1) // stride * stride].unflatten(0, (-1, stride)).any(1)
        seen = torch.cat([label[:1], groups])
    if ended:
        seen[-1] |= label[-1]
    return seen
