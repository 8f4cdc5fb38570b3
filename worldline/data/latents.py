"""Raw latents of a dataset on disk, made once per tokenizer and read while training.

One safetensors file an episode plus `cache.json`, which names the tokenizer and the dataset by fingerprint: opening the
cache with another tokenizer raises. Files appear whole or not at all, so building resumes. Latents are stored un-whitened
as float32 (a 64x64 camera at 8x8x8 takes 2 KB a frame); `half=True` halves that for large datasets.

With stride s every *phase* (frames j, j+s, j+2s, ...) of an episode is kept as a sequence of its own, so no frame is lost.
With a tokenizer that makes one latent of r frames, latent i belongs to frame i*r of its phase and r*k actions lie between
two latents. Actions, poses and instructions are kept too: training needs neither the dataset nor its videos.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from worldline.checkpoint import from_json, read_about, read_json, read_tensors, to_json, write_json, write_tensors
from worldline.data.clips import Windows, action_blocks, collate, draw, strided, with_lead
from worldline.data.lerobot_read import LeRobotDataset
from worldline.errors import CheckpointError, DatasetError
from worldline.types import Clip, VideoTokenizer, WorldSpec

log = logging.getLogger(__name__)
INDEX_EVERY = 5.0  # seconds between two writings of the index, which holds all episodes
MADE_WITH = ("tokenizer_fingerprint", "dataset_fingerprint", "stride", "half", "cameras")  # each file says it, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of one cached episode."""

    episode: int
    phase: int
    length: int  # latent frames


class LatentCache:
    """Latents of a dataset. Make one with `build` or `open`.

    Attributes:
        spec: the dataset's spec at the cache's stride, with the tokenizer's `LatentSpec`.
        episodes: numbers of the cached episodes.
    """

    def __init__(self, root: Path, index: Mapping[str, Any], *, budget_bytes: int = 2 * 2**30) -> None:
        self.root = root
        self.spec = from_json(WorldSpec, index["spec"], source=f"{root}/cache.json")
        self.stride = int(index["stride"])
        self.dataset_fingerprint = str(index["dataset_fingerprint"])
        self.instructions = {int(key): str(text) for key, text in index["instructions"].items()}
        self.episodes = sorted(self.instructions)
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self._lengths = {int(key): [int(n) for n in lengths] for key, lengths in index["lengths"].items()}
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._windows: dict[tuple, tuple[list[Phase], Windows]] = {}

    @classmethod
    def build(
        cls,
        root: str | Path,
        dataset: LeRobotDataset,
        tokenizer: VideoTokenizer,
        *,
        stride: int = 1,
        episodes: Sequence[int] | None = None,
        progress: bool = True,
        device: str | torch.device = "cpu",
        batch_frames: int = 32,
        half: bool = False,
        process: tuple[int, int] = (0, 1),
    ) -> "LatentCache":
        """Encode the episodes that are not cached yet. Raises `CheckpointError` if `root` caches something else.

        `batch_frames` frames are encoded at a time where the tokenizer makes one latent a frame; a tokenizer that
        compresses time gets whole episodes. Of several processes (`process`: its number, of how many) each begins with episodes of
        its own and takes what others have encoded meanwhile.
        """
        root = Path(root)
        latent = tokenizer.latent_spec
        chosen = dataset.split("all") if episodes is None else sorted(episodes)
        index = {
            "tokenizer_fingerprint": latent.fingerprint,
            "dataset_fingerprint": dataset.fingerprint,
            "stride": stride,
            "half": half,
            "cameras": [c.name for c in dataset.spec.cameras],
            "spec": to_json(replace(strided(dataset.spec, stride), latent=latent)),
            "lengths": {},
            "instructions": {},
        }
        made_with = {name: str(index[name]) for name in MADE_WITH}
        if (root / "cache.json").is_file():
            index |= _resumed(root, index)
        rank, ranks = process
        shared = [i for at in range(ranks) for i in chosen[(rank + at) % ranks :: ranks]]  # its own, then the others'
        chosen = [i for i in shared if str(i) not in index["lengths"]]
        noted = time.monotonic()
        try:
            for number in tqdm(chosen, desc="encode", unit="episode", disable=not progress):
                about, shapes = read_about(_file(root, number))
                if about != made_with:
                    r = latent.frames_per_latent
                    tensors = _encode_episode(dataset, number, tokenizer, r, stride, device, batch_frames, half)
                    write_tensors(_file(root, number), tensors, about=made_with)
                    shapes = {name: list(x.shape) for name, x in tensors.items()}
                lengths = [shapes[f"{j}/poses"][0] for j in range(stride) if f"{j}/poses" in shapes]
                index["lengths"][str(number)] = lengths
                index["instructions"][str(number)] = str(dataset.episode_table.loc[number, "instruction"])
                if time.monotonic() - noted > INDEX_EVERY:
                    write_json(root / "cache.json", index)
                    noted = time.monotonic()
        finally:
            if chosen and index["lengths"]:
                write_json(root / "cache.json", index)
        return cls(root, index)

    @classmethod
    def open(
        cls,
        root: str | Path,
        tokenizer_fingerprint: str,
        *,
        dataset_fingerprint: str | None = None,
        budget_bytes: int = 2 * 2**30,
    ) -> "LatentCache":
        """Open a cache made with the tokenizer (and dataset) named. Raises `CheckpointError` otherwise."""
        root = Path(root)
        index = read_json(root / "cache.json")
        _require_same(root, "tokenizer_fingerprint", tokenizer_fingerprint, index)
        if dataset_fingerprint is not None:
            _require_same(root, "dataset_fingerprint", dataset_fingerprint, index)
        return cls(root, index, budget_bytes=budget_bytes)

    def episode(self, episode: int, phase: int = 0) -> Clip:
        """All latents of one phase of one episode, as a clip with b = 1."""
        length = self._lengths[episode][phase]
        return self._clip(Phase(episode=episode, phase=phase, length=length), 0, length)

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        frames: int,
        *,
        episodes: Sequence[int] | None = None,
        starts: float = 0.0,
        lead: int = 0,
    ) -> Clip:
        """Windows of `frames` latents for training step `step`: a function of the arguments alone.

        `episodes` limits the draw (a split); about a share `starts` of the windows is moved to their sequence's beginning.
        With `lead` each window comes after up to so many of the frames before it (`Clip.lead`: the most that any has).
        Raises `DatasetError` if no sequence is long enough.
        """
        sequences, places = self.windows(frames, episodes)
        generator = torch.Generator().manual_seed((seed * 6_700_417 + step) & 0x7FFF_FFFF_FFFF)
        moved = (torch.rand(batch_size, generator=generator) < starts).tolist()
        chosen = [places[i] for i in draw(len(places), seed, step, batch_size)]
        begins = [0 if begin else start for (_, start), begin in zip(chosen, moved)]
        led = [min(lead, start) for start in begins]
        clips = [
            self._clip(sequences[at], start - before, frames + before)
            for (at, _), start, before in zip(chosen, begins, led)
        ]
        return collate([with_lead(clip, before, max(led)) for clip, before in zip(clips, led)])

    def windows(self, frames: int, episodes: Sequence[int] | None = None) -> tuple[list[Phase], Windows]:
        """Sequences, and (position, start) of each window of `frames` latents in them."""
        key = (frames, None if episodes is None else tuple(episodes))
        if key not in self._windows:
            wanted = self.episodes if episodes is None else [i for i in episodes if i in self._lengths]
            sequences = [
                Phase(episode=i, phase=phase, length=length)
                for i in wanted
                for phase, length in enumerate(self._lengths[i])
            ]
            places = Windows([s.length for s in sequences], frames)
            if not places:
                longest = max((s.length for s in sequences), default=0)
                raise DatasetError(
                    f"{self.root}: sequences of at least {frames} latents required, the longest of {len(sequences)} "
                    f"has {longest}. Use fewer frames, a smaller stride or other episodes."
                )
            self._windows[key] = (sequences, places)
        return self._windows[key]

    def _clip(self, sequence: Phase, start: int, frames: int) -> Clip:
        tensors, phase = self._tensors(sequence.episode), sequence.phase
        chosen = slice(start, start + frames)
        return Clip(
            frames={c.name: tensors[f"{phase}/{c.name}"][chosen].float()[None] for c in self.spec.cameras},
            actions=tensors[f"{phase}/actions"][start : start + frames - 1][None],
            poses=tensors[f"{phase}/poses"][chosen][None],
            instruction=(self.instructions[sequence.episode],),
        )

    def _tensors(self, episode: int) -> dict[str, Tensor]:
        if episode not in self._kept:
            self._kept[episode] = read_tensors(_file(self.root, episode))
            self.bytes += _size(self._kept[episode])
            while self.bytes > self.budget_bytes and len(self._kept) > 1:
                self.bytes -= _size(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(episode)
        return self._kept[episode]


def _encode_episode(
    dataset: LeRobotDataset,
    number: int,
    tokenizer: VideoTokenizer,
    r: int,
    stride: int,
    device: str | torch.device,
    batch_frames: int,
    half: bool,
) -> dict[str, Tensor]:
    """Of r frames a latent."""
    episode = dataset.episode(number)
    frames = {camera: video[:] for camera, video in episode.frames.items()}
    out: dict[str, Tensor] = {}
    for phase in range(min(stride, len(episode))):
        count = (len(episode) - 1 - phase) // (stride * r) + 1  # latents
        pixels = slice(phase, phase + (count - 1) * stride * r + 1, stride)
        latents = _encode(
            {c: f[pixels] for c, f in frames.items()}, tokenizer, device, batch_frames if r == 1 else None
        )
        for camera, latent in latents.items():
            if len(latent) != count:
                raise CheckpointError(
                    f"tokenizer: {count} latents of {-(-(pixels.stop - phase) // stride)} frames required "
                    f"(frames_per_latent {r}), got {len(latent)}. Correct its LatentSpec."
                )
            out[f"{phase}/{camera}"] = latent.half() if half else latent.float()
        out[f"{phase}/poses"] = episode.poses[phase : phase + (count - 1) * stride * r + 1 : stride * r]
        out[f"{phase}/actions"] = action_blocks(episode.actions, stride * r, phase, count).clone()
    return out


@torch.no_grad()
def _encode(
    frames: Mapping[str, Tensor], tokenizer: VideoTokenizer, device: str | torch.device, size: int | None
) -> dict[str, Tensor]:
    total = len(next(iter(frames.values())))
    parts: dict[str, list[Tensor]] = {camera: [] for camera in frames}
    for start in range(0, total, size or total):
        piece = {camera: f[start : start + (size or total)][None].to(device) for camera, f in frames.items()}
        for camera, latent in tokenizer.encode(piece).items():
            parts[camera].append(latent[0].cpu())
    return {camera: torch.cat(pieces) for camera, pieces in parts.items()}


def _resumed(root: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    got = read_json(root / "cache.json")
    for name in MADE_WITH:
        _require_same(root, name, index[name], got)
    kept = {key: value for key, value in got["lengths"].items() if _file(root, int(key)).is_file()}
    return {"lengths": kept, "instructions": {key: got["instructions"][key] for key in kept}}


def _require_same(root: Path, name: str, required: Any, index: Mapping[str, Any]) -> None:
    if index.get(name) != required:
        raise CheckpointError(
            f"{root}: latent cache with {name.replace('_', ' ')} {required} required, got {index.get(name)}. "
            "Build a new cache in another folder, or use the tokenizer and dataset this one was made with."
        )


def _file(root: Path, episode: int) -> Path:
    return root / f"episode-{episode:06d}.safetensors"


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
