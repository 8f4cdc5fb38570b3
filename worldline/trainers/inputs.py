"""What every training stage does before it trains: open the datasets, choose episodes, claim the output folder."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Float
from torch import Tensor

from worldline.checkpoint import changes, load_config, read_json, resolve, to_json, write_json
from worldline.data import (
    FrameStore,
    LatentCache,
    LeRobotDataset,
    RobustNormalizer,
    action_blocks,
    collate,
    common_range,
    require_actions,
    strided,
    with_lead,
)
from worldline.errors import CheckpointError, DatasetError
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.types import Clip, WorldSpec, require_match


def cache_root() -> Path:
    """Where latents are cached: `$WORLDLINE_CACHE`, by default `~/.cache/worldline`."""
    return Path(os.environ.get("WORLDLINE_CACHE", Path.home() / ".cache" / "worldline"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One dataset, the episodes of it that are used, its decoded frames, and at which stride single moments are read."""

    dataset: LeRobotDataset
    episodes: tuple[int, ...]
    store: FrameStore
    stride: int = 1

    @property
    def spec(self) -> WorldSpec:
        return strided(self.dataset.spec, self.stride)


def open_datasets(
    roots: Sequence[Path],
    split: str,
    *,
    cameras: Sequence[str] | None = None,
    max_episodes: int | None = None,
    stride: int = 1,
) -> list[Selection]:
    """Open datasets of one spec. Raises `SpecMismatch` where two differ, `DatasetError` for an empty split
    or episodes shorter than a stride. A range of actions that a dataset does not declare is that of all of them (`common_range`)."""
    if not roots:
        raise DatasetError("at least one dataset folder is required after --data, got none")
    chosen = []
    for dataset in common_range([LeRobotDataset(root, cameras=cameras) for root in roots]):
        root = dataset.root
        if chosen:
            require_match(dataset.spec, chosen[0].dataset.spec, between=f"datasets {root} and {chosen[0].dataset.root}")
        episodes = dataset.split(split)[:max_episodes]
        if stride > 1 and max(dataset.length(i) for i in episodes) <= stride:
            raise DatasetError(f"{root}: episodes of more than {stride} frames required for stride {stride}, got none.")
        chosen.append(Selection(dataset=dataset, episodes=tuple(episodes), store=FrameStore(dataset), stride=stride))
    return chosen


def data_provenance(
    selections: Sequence[Selection], out: Path, *, init_from: Path | None = None, part: str = "world-model"
) -> dict[str, list[str]]:
    """What a checkpoint in `out` says of its data: folders as given, folders seen from `out`, and fingerprints, by which
    the same data is known again when both have been moved together. The data of `init_from`, a `part`, counts too.
    """
    roots = [s.dataset.root for s in selections]
    found = {
        "data": [str(root) for root in roots],
        "data_from_here": [os.path.relpath(root.resolve(), out.resolve()) for root in roots],
        "dataset_fingerprints": [s.dataset.fingerprint for s in selections],
    }
    if init_from is not None:
        init_from = resolve(init_from)
        earlier = load_config(init_from, part=part)["provenance"]
        named = earlier.get("data", [])
        seen = [
            os.path.relpath(Path(init_from, p).resolve(), out.resolve()) for p in earlier.get("data_from_here", named)
        ]
        for root, place, mark in zip(named, seen, earlier.get("dataset_fingerprints", named), strict=True):
            if mark not in found["dataset_fingerprints"]:
                for key, value in zip(found, (root, place, mark), strict=True):
                    found[key].append(value)
    return found


def contents(selections: Sequence[Selection]) -> dict[str, str]:
    """What is in the data of a run, by which other data at the same path is known (`claim_output`)."""
    return {f"what {s.dataset.root} holds": s.dataset.fingerprint for s in selections}


def cameras_of(cameras: Sequence[str] | None, tokenizer: Tokenizer | None) -> list[str] | None:
    """Those asked for, else those that the tokenizer was made for, else all (None)."""
    if cameras is not None:
        return list(cameras)
    return None if tokenizer is None else [c.name for c in tokenizer.cameras]


def frame_weights(
    selections: Sequence[Selection], *, apart: Sequence[bool] = (), part: float | None = None
) -> Float[Tensor, " d"]:
    """How often each dataset is drawn from: by its number of frames; those `apart` together take `part` of the draws instead."""
    weights = torch.tensor([float(sum(s.dataset.length(i) for i in s.episodes)) for s in selections])
    flags = torch.tensor(list(apart), dtype=torch.bool)
    if part is not None and flags.any() and not flags.all():
        weights[flags] *= part / weights[flags].sum()
        weights[~flags] *= (1 - part) / weights[~flags].sum()
    return weights


def share(weights: Float[Tensor, " d"], seed: int, step: int, size: int) -> list[int]:
    """How many of a batch's items each dataset gives: multinomial."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
    drawn = torch.multinomial(weights, size, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=len(weights)).tolist()


def fit_normalizers(selections: Sequence[Selection]) -> tuple[RobustNormalizer, RobustNormalizer]:
    """Action and pose normalisers of the selected episodes. Raises `DatasetError` naming an episode with NaN, or without actions."""
    for s in selections:
        require_actions(s.dataset, s.episodes)
    fit = RobustNormalizer.fit_streaming
    episodes = [(s.dataset, i) for s in selections for i in s.episodes]
    return fit(dataset.episode(i).actions for dataset, i in episodes), fit(
        dataset.episode(i).poses for dataset, i in episodes
    )


def strided_numbers(selections: Sequence[Selection], stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Poses "t p" and action blocks "t-1 k a" of every selected episode, at this stride."""
    for s in selections:
        for i in s.episodes:
            episode = s.dataset.episode(i)
            frames = (len(episode) - 1) // stride + 1
            poses = episode.poses[::stride][:frames]
            yield poses, action_blocks(episode.actions, stride, 0, frames)


class LatentBatches:
    """Training clips of latents from one or several datasets, encoded once and cached on disk.

    `weights`: how often each is drawn from, by default by its number of frames.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        tokenizer: Tokenizer,
        *,
        frames: int,
        stride: int,
        device: Any,
        progress: bool,
        starts: float = 0.0,
        lead: int = 0,
        weights: Float[Tensor, " d"] | None = None,
    ) -> None:
        self.weights = frame_weights(selections) if weights is None else weights
        self.selections, self.frames, self.starts, self.lead = selections, frames, starts, lead
        self.caches = []
        processes = this_process()
        rank, ranks = processes.process_index, processes.num_processes
        for s in selections:
            require_length(s, frames, stride)
            root = cache_root() / "latents" / f"{s.dataset.fingerprint}-{tokenizer.fingerprint}-s{stride}"
            tokenizer.to(device)
            # what `build` returns knows all these episodes, even while another process still rewrites the folder's index
            cache = LatentCache.build(
                root,
                s.dataset,
                tokenizer,
                stride=stride,
                episodes=s.episodes,
                progress=progress,
                device=device,
                process=(rank, ranks),
            )
            self.caches.append(cache)
        # not the cache's: it knows the statistics, and the range of actions, of the day it was made
        self.spec = replace(strided(selections[0].dataset.spec, stride), latent=tokenizer.latent_spec)

    def batch(self, seed: int, step: int, size: int) -> Clip:
        counts = share(self.weights, seed, step, size)
        parts = [
            cache.batch(seed, step, count, self.frames, episodes=s.episodes, starts=self.starts, lead=self.lead)
            for cache, s, count in zip(self.caches, self.selections, counts)
            if count
        ]
        lead = max(part.lead for part in parts)
        return collate([with_lead(part, part.lead, lead) for part in parts])


def require_length(
    selection: Selection, frames: int, stride: int, *, advice: str = "Use fewer --frames or a smaller --stride."
) -> None:
    """Raise `DatasetError` with this advice if no episode gives a clip: before an hour of encoding, not after it."""
    longest = max((selection.dataset.length(i) for i in selection.episodes), default=0)
    if longest < (frames - 1) * stride + 1:
        raise DatasetError(
            f"{selection.dataset.root}: episodes of at least {(frames - 1) * stride + 1} frames required for clips of {frames} "
            f"at stride {stride}, the longest of {len(selection.episodes)} has {longest}. {advice}"
        )


MEDIAN_FRAMES = 15  # of an episode, from which its background is taken
MEDIAN_BYTES = 2**28  # of backgrounds kept in memory


class FrameBatches:
    """Images drawn for tokenizer training, from each dataset by its number of frames, with a weight that lifts pixels unlike the episode's median."""

    def __init__(self, selections: Sequence[Selection], *, motion_weight: float, frames_per_episode: int = 8) -> None:
        self.selections, self.motion_weight, self.per_episode = selections, motion_weight, frames_per_episode
        self.spec, self.weights = selections[0].dataset.spec, frame_weights(selections)
        self._median: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """uint8 images "n 3 h w" of one camera and weights "n 1 h w" with mean one."""
        generator = torch.Generator().manual_seed((seed * 7_368_787 + step) & 0x7FFF_FFFF_FFFF)
        camera = self.spec.cameras[step % len(self.spec.cameras)].name
        images, weights = [], []
        while len(images) < size:
            which = int(torch.multinomial(self.weights, 1, generator=generator))
            s = self.selections[which]
            episode = s.episodes[int(torch.randint(len(s.episodes), (), generator=generator))]
            length = s.dataset.length(episode)
            rows = torch.randint(length, (min(self.per_episode, size - len(images)),), generator=generator)
            shown = s.store.rows(episode, camera, rows)
            away = (shown.float() - self._background(which, episode, camera)).abs().amax(1, keepdim=True)
            weight = 1 + self.motion_weight * (away > 24)
            images += list(shown)
            weights += list(weight / weight.mean())
        return torch.stack(images), torch.stack(weights)

    def _background(self, which: int, episode: int, camera: str) -> Tensor:
        """The median of frames spread over an episode; the latest used are kept."""
        key = (which, episode, camera)
        if key not in self._median:
            s = self.selections[which]
            spread = torch.linspace(0, s.dataset.length(episode) - 1, MEDIAN_FRAMES).round().long().unique()
            shown = [s.store.rows(episode, camera, row[None])[0] for row in spread]
            self._median[key] = torch.stack(shown).median(dim=0).values
            while len(self._median) > max(1, MEDIAN_BYTES // self._median[key].numel()):
                self._median.popitem(last=False)
        self._median.move_to_end(key)
        return self._median[key].float()


def load_finished_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer to train on. Raises `CheckpointError` while it is still in training: its latents would soon be another's."""
    tokenizer = load_tokenizer(folder)
    made = load_config(resolve(folder), part="tokenizer").get("provenance", {})
    steps, wanted = made.get("steps"), made.get("loop", {}).get("steps")
    if steps is not None and wanted is not None and steps < wanted:
        raise CheckpointError(
            f"{folder}: a finished tokenizer is required, this one is at step {steps} of {wanted}. Wait for its training, go on with it "
            f"by the same command, or end it where it is with --loop.steps {steps}."
        )
    return tokenizer


def this_process() -> PartialState:
    """Which of how many this is (`accelerate launch`)."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def claim_output(
    out: Path, part: str, config: Any, *, identity: Sequence[str], made_from: Mapping[str, str] | None = None
) -> None:
    """Make `out` this run's. A folder with the same run in it is gone on with, anything else is refused.

    Args:
        identity: names of the config's fields that must not change when a run goes on.
        made_from: name -> fingerprint of other parts that must not either (`contents` of the data).
    """
    # of several processes the first one claims, the others then find its claim
    with this_process().main_process_first():
        _claim(out, part, config, identity, made_from or {})


def _claim(out: Path, part: str, config: Any, identity: Sequence[str], made_from: Mapping[str, str]) -> None:
    record = {"part": part, "config": {k: v for k, v in to_json(config).items() if k in identity} | dict(made_from)}
    path = out / "training" / "run.json"
    if path.is_file():
        before = read_json(path)
        if (held := before.get("part", "run of an older worldline")) != part:
            raise CheckpointError(f"{out}: a {part} was to be trained here, it holds a {held}. Choose another --out.")
        changed = changes(before["config"], record["config"])
        if changed:
            raise CheckpointError(
                f"{out} holds a run with other settings:\n"
                + "\n".join(changed)
                + "\nUse those to resume it, or another --out."
            )
    elif held := _held(out):
        raise CheckpointError(f"{out}: an empty or new folder is required, it holds {held[:4]}. Choose another --out.")
    else:
        write_json(path, record)


def _held(out: Path) -> list[str]:
    """What is in the way of a new run. A claim that was cut short (no run.json was written) is not."""
    if out.exists() and not out.is_dir():
        return [f"a file named {out.name}"]
    if not out.exists():
        return []
    empty_claim = not any(p for p in (out / "training").glob("*") if not p.name.startswith(".run.json."))
    return sorted(p.name for p in out.iterdir() if not (p.name == "training" and empty_claim))
