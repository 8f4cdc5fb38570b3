"""What a unified model knows in a dream, as a `TensorState`: the frame that is now, and the one that coming frames are imagined from.

Errors of an imagined frame are the start of those imagined from it. So up to `span` frames are imagined from the same known frame, each in a pass
of its own over all blocks since then; only then the last imagined frame becomes the known one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldline.types import TensorState
from worldline.worldmodels.guesses import PoseGuess, motion_of
from worldline.worldmodels.video_action.tokens import Future, Known

_PLAIN = ("poses", "count", "motion", "aim")
_FROM = "from/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dreamt:
    """n rows of a dream.

    known: at the frame that is now, whose number is `frame` "n". start: at the frame that coming ones are imagined from, `since` "n" frames
    ago. blocks: "n f k*a", those since then, then zeros; told: "n" bool, they were told.
    """

    known: Known
    frame: Tensor
    start: Known
    since: Tensor
    blocks: Tensor
    told: Tensor

    @classmethod
    def at(cls, known: Known, frame: Tensor, horizon: int) -> "Dreamt":
        """Begins now."""
        begun, width = torch.zeros_like(known.count), known.motion.shape[1] - 2 * known.poses.shape[2]
        return cls(
            known=known,
            frame=frame.to(begun.device),
            start=known,
            since=begun,
            blocks=known.motion.new_zeros(len(begun), horizon, width),
            told=torch.ones_like(begun, dtype=torch.bool),
        )

    def begun(self, rows: Tensor) -> "Dreamt":
        """With what is now as the start of some rows, "n" bool."""
        state = Dreamt.at(self.known, self.frame, self.blocks.shape[1])
        return Dreamt.of(self.state().where(rows, state.state()))

    def then(self, known: Known, block: Tensor | None) -> "Dreamt":
        """One frame later, and what is known then. `block` "n k*a" led to it; None: it was not told."""
        blocks, rows = self.blocks.clone(), torch.arange(len(self.since), device=self.since.device)
        if block is not None:
            blocks[rows, self.since] = block
        told = torch.full_like(self.told, block is not None)
        return replace(self, known=known, frame=self.frame + 1, since=self.since + 1, blocks=blocks, told=told)

    def state(self) -> TensorState:
        tensors = _tensors(self.known) | {_FROM + name: x for name, x in _tensors(self.start).items()}
        tensors |= {"frame": self.frame, "since": self.since, "blocks": self.blocks, "told": self.told}
        return TensorState(tensors=tensors, rows=len(self.frame))

    @classmethod
    def of(cls, state: TensorState) -> "Dreamt":
        held = state.tensors
        begun = {name.removeprefix(_FROM): x for name, x in held.items() if name.startswith(_FROM)}
        return cls(
            known=_known(held),
            frame=held["frame"],
            start=_known(begun),
            since=held["since"],
            blocks=held["blocks"],
            told=held["told"],
        )


def _tensors(known: Known) -> dict[str, Tensor]:
    tensors = {f"frames/{c}": x for c, x in known.frames.items()} | {name: getattr(known, name) for name in _PLAIN}
    return tensors if known.text is None else tensors | {"text": known.text}


def _known(held: Mapping[str, Tensor]) -> Known:
    frames = {name.removeprefix("frames/"): x for name, x in held.items() if name.startswith("frames/")}
    return Known(frames=frames, text=held.get("text"), **{name: held[name] for name in _PLAIN})


def after(known: Known, guess: PoseGuess | None, made: Future, *, told: bool) -> Known:
    """What is known with the frames made, and the blocks that led to them if those were told: else the arm is taken to be at rest."""
    h, count = known.poses.shape[1], made.poses.shape[1]
    poses = torch.cat([known.poses, made.poses], 1)
    last, aim = poses[:, -1], known.aim
    if guess is not None:
        for block in made.actions.unbind(1):
            aim = guess.aim(aim, block)
        aim = aim if told else guess.start(last)
    led_by = made.actions[:, -1] if told else torch.zeros_like(made.actions[:, -1])
    return replace(
        known,
        frames={c: torch.cat([x, made.frames[c]], 1)[:, -h:] for c, x in known.frames.items()},
        poses=poses[:, -h:],
        count=(known.count + count).clamp(max=h),
        motion=motion_of(last, poses[:, -2], led_by),
        aim=aim,
    )
