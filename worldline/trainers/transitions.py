"""Transitions of episodes as training samples of inverse models: a window of frames around each, and the block between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from worldline.data import action_blocks, draw, require_actions
from worldline.errors import DatasetError
from worldline.rl_in_imagination.inverse_audit import InverseClip, reconstruct
from worldline.tokenizers import Tokenizer
from worldline.trainers.inputs import Selection

EDGES = 0.15  # share of training windows at either edge of a clip: dreams begin and end in the middle of episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """n windows of frames, and the action block in the middle of each."""

    frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]]
    blocks: Float[Tensor, "n k a"]


class Reconstructed:
    """Frames of a dataset as a tokenizer leaves them, kept in memory where the dataset's own frames fit there (`FrameStore`)."""

    def __init__(self, selection: Selection, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = selection.store, tokenizer
        self._kept: dict[tuple[int, str], Tensor] = {}

    def frames(self, episode: int, camera: str, rows: Int[Tensor, " w"]) -> UInt8[Tensor, "w c h w2"]:
        """The frames numbered of one camera of one episode."""
        if not self.store.fits:
            return reconstruct(self.tokenizer, {camera: self.store.rows(episode, camera, rows)})[camera]
        if (episode, camera) not in self._kept:
            self._kept[episode, camera] = reconstruct(self.tokenizer, {camera: self.store.frames(episode, camera)})[
                camera
            ]
        return self._kept[episode, camera][rows]


class TransitionDraw:
    """Every transition of the selected episodes, `stride` frames long, from every frame.

    Args:
        window: frames seen, as in `InverseConfig.window`.
        edges: share of the windows cut as if a clip began there, and of those cut as if one ended.
        tokenizer: `batch` shows every other window, on average, as it reconstructs it.

    Raises `DatasetError` for episodes without actions.
    """

    def __init__(
        self, selections: Sequence[Selection], window: int, *, edges: float = 0.0, tokenizer: Tokenizer | None = None
    ) -> None:
        self.window, self.edges = window, edges
        self.reconstructed = [] if tokenizer is None else [Reconstructed(s, tokenizer) for s in selections]
        self.spec = selections[0].spec
        self.before = (window - 2) // 2
        owner, places, blocks = [], [], []
        self.selections = selections
        self.episodes: list[tuple[int, int, int]] = []  # which selection, the episode's number there, its frames
        for which, s in enumerate(selections):
            require_actions(s.dataset, s.episodes)
            for number in s.episodes:
                episode = s.dataset.episode(number)
                starts = range(len(episode) - s.stride)
                owner += [len(self.episodes)] * len(starts)
                places += starts
                blocks += [action_blocks(episode.actions, s.stride, i, 2) for i in starts]
                self.episodes.append((which, number, len(episode)))
        if not owner:
            raise DatasetError(
                f"{[str(s.dataset.root) for s in selections]}: episodes of 2 frames or more required, got none"
            )
        self.owner, self.places, self.blocks = torch.tensor(owner), torch.tensor(places), torch.cat(blocks)

    def __len__(self) -> int:
        return len(self.owner)

    def batch(self, seed: int, step: int, size: int) -> Transitions:
        """The transitions of training step `step`: a function of the arguments alone."""
        generator = torch.Generator().manual_seed((seed * 15_485_863 + step) & 0x7FFF_FFFF_FFFF)
        chosen = torch.tensor(draw(len(self), seed, step, size))
        after = self.window - 2 - self.before
        least, most = torch.full((size,), -self.before), torch.full((size,), 1 + after)
        for limit, span, sign in ((least, self.before, -1), (most, after, 1)):
            cut = torch.rand(size, generator=generator) < self.edges
            left = torch.randint(span + 1, (size,), generator=generator)  # frames seen beyond the transition's own
            limit[cut] = (sign * left + (sign > 0))[cut]
        shown = (torch.rand(size, generator=generator) < 0.5) if self.reconstructed else None
        return self.gather(chosen, least=least, most=most, reconstructed=shown)

    def gather(
        self,
        chosen: Int[Tensor, " n"],
        *,
        least: Int[Tensor, " n"] | None = None,
        most: Int[Tensor, " n"] | None = None,
        reconstructed: Bool[Tensor, " n"] | None = None,
    ) -> Transitions:
        """The transitions numbered. Frames before offset `least` (0: the transition's first frame) and behind `most` are not seen:
        the frames at these offsets are repeated. `reconstructed` windows are shown as the tokenizer leaves them."""
        offsets = torch.arange(self.window) - self.before
        windows: list[dict[str, Tensor]] = []
        for row, i in enumerate(chosen.tolist()):
            which, number, length = self.episodes[int(self.owner[i])]
            place, stride = int(self.places[i]), self.selections[which].stride
            low, high = -(place // stride), (length - 1 - place) // stride
            low = low if least is None else max(low, int(least[row]))
            high = high if most is None else min(high, int(most[row]))
            rows = place + stride * offsets.clamp(low, high)
            through = reconstructed is not None and bool(reconstructed[row])
            windows.append({c.name: self._frames(which, number, c.name, rows, through) for c in self.spec.cameras})
        frames = {c.name: torch.stack([w[c.name] for w in windows]) for c in self.spec.cameras}
        return Transitions(frames=frames, blocks=self.blocks[chosen])

    def _frames(self, which: int, episode: int, camera: str, rows: Tensor, reconstructed: bool) -> Tensor:
        if reconstructed:
            return self.reconstructed[which].frames(episode, camera, rows)
        return self.selections[which].store.rows(episode, camera, rows)


def whole_clips(selections: Sequence[Selection], *, at_most: int | None = None) -> list[InverseClip]:
    """Episodes as clips at the selections' stride, from their first frame; of several datasets evenly, `at_most` in all.

    Raises `DatasetError` for episodes without actions.
    """
    named = [(s, number) for s in selections for number in s.episodes]
    if at_most is not None and len(named) > at_most:
        named = [named[i * len(named) // at_most] for i in range(at_most)]
    clips = []
    for s, number in named:
        require_actions(s.dataset, [number])
        episode = s.dataset.episode(number)
        frames = (len(episode) - 1) // s.stride + 1
        if frames < 2:
            continue
        seen = {c.name: s.store.frames(number, c.name)[:: s.stride] for c in s.dataset.spec.cameras}
        clips.append(InverseClip(frames=seen, actions=action_blocks(episode.actions, s.stride, 0, frames)))
    return clips
