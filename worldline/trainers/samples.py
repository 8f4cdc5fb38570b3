"""Single moments of episodes as training samples: what policies, scorers, inverse models and probes learn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.data import draw
from worldline.errors import DatasetError
from worldline.trainers.inputs import Selection
from worldline.types import Episode, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """n moments: frames (the last `window`, oldest first, stacked as channels), poses, and what the target function gave.
    `after` is the same of `SampleDraw.ahead` frames later, where that was asked for."""

    observation: Observation
    target: Float[Tensor, "n ..."]
    after: Observation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    selection: int
    episode: int
    start: int  # of this episode's moments in the flat list
    times: Tensor
    targets: Tensor
    poses: Tensor
    instruction: str


class SampleDraw:
    """All moments of the selected episodes at which `target` is defined.

    Args:
        target: episode -> (times "m", values "m ..."): the frames it is defined at, and its values there.
        window: frames stacked, the selections' stride apart; before the first frame the first one is repeated.
        balance: draw moments with target > 0.5 and the others equally often (binary targets).
        apart, share: draw the moments of episodes for which `apart` holds with this share of every batch.
        camera: the one camera whose frames are given; by default all. Raises `SpecMismatch` if there is none of that name.
        ahead: how many frames after each moment `Samples.after` is observed; 0: it is not. Raises `ValueError` if a moment of
            `target` has no frame so far ahead.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        target: Callable[[Episode], tuple[Tensor, Tensor]],
        *,
        window: int = 1,
        balance: bool = False,
        apart: Callable[[Episode], bool] | None = None,
        share: float = 0.5,
        camera: str | None = None,
        ahead: int = 0,
    ) -> None:
        self.selections, self.window, self.ahead = selections, window, ahead
        spec = selections[0].spec
        self.spec = spec if camera is None else replace(spec, cameras=(spec.camera(camera),))
        self.moments: list[_Moments] = []
        owner, flat, held = [], [], []
        for which, s in enumerate(selections):
            for number in s.episodes:
                episode = s.dataset.episode(number)
                times, values = target(episode)
                if len(times) and int(times.max()) + ahead >= len(episode):
                    raise ValueError(
                        f"moments with {ahead} frames after them required, got moment {int(times.max())} of {len(episode)} frames"
                    )
                owner += [len(self.moments)] * len(times)
                held += [apart is not None and apart(episode)] * len(times)
                flat.append(values)
                self.moments.append(
                    _Moments(
                        selection=which,
                        episode=number,
                        start=len(owner) - len(times),
                        times=times,
                        targets=values,
                        poses=episode.poses,
                        instruction=episode.instruction,
                    )
                )
        if not owner:
            raise DatasetError(
                f"{[str(s.dataset.root) for s in selections]}: no moment to learn from in {len(self.moments)} episodes. "
                "What is learned must be there: success labels for a scorer or implicit Q-learning (docs/data.md), states for a probe of them, and "
                "episodes at least as long as what is learned from one."
            )
        self.owner, self.targets = torch.tensor(owner), torch.cat(flat)
        self.pools, self.shares = [torch.arange(len(owner))], (1.0,)
        if apart is not None:
            other = torch.tensor(held)
            self.pools, self.shares = [(~other).nonzero().flatten(), other.nonzero().flatten()], (1 - share, share)
            if not all(map(len, self.pools)):
                raise DatasetError(
                    f"moments of both kinds are required to mix {share:.0%} of one into the other, got {int((~other).sum())} and "
                    f"{int(other.sum())}"
                )
        if balance:
            self.shares = (0.5, 0.5)
            positive = self.targets > 0.5
            self.pools = [(~positive).nonzero().flatten(), positive.nonzero().flatten()]
            if not all(map(len, self.pools)):
                raise DatasetError(
                    f"labelled frames of both kinds are required, got {int(positive.sum())} with success and "
                    f"{int((~positive).sum())} without. Record, or label, what is missing (`record --policy mixed` has both; docs/data.md, "
                    "success labels)."
                )

    def __len__(self) -> int:
        return len(self.owner)

    def batch(self, seed: int, step: int, size: int) -> Samples:
        """Moments of training step `step`: a function of the arguments alone."""
        last = int(size * self.shares[-1] + 0.5) if len(self.pools) > 1 else size
        sizes = [size - last, last] if len(self.pools) > 1 else [last]
        chosen = [pool[draw(len(pool), seed + i, step, sizes[i])] for i, pool in enumerate(self.pools)]
        return self.gather(torch.cat(chosen))

    def gather(self, indices: Tensor) -> Samples:
        """The moments numbered."""
        places = []
        for i in indices.tolist():
            moments = self.moments[int(self.owner[i])]
            places.append((moments, int(moments.times[i - moments.start])))
        after = self._observe([(m, t + self.ahead) for m, t in places]) if self.ahead else None
        return Samples(observation=self._observe(places), target=self.targets[indices], after=after)

    def _observe(self, places: Sequence[tuple[_Moments, int]]) -> Observation:
        images = {
            camera.name: torch.stack([self._frames(m, camera.name, t) for m, t in places])
            for camera in self.spec.cameras
        }
        return Observation(
            images=images,
            pose=torch.stack([m.poses[t] for m, t in places]),
            instruction=tuple(m.instruction for m, _ in places),
        )

    def _frames(self, moments: _Moments, camera: str, time: int) -> UInt8[Tensor, "wc h w"]:
        selection = self.selections[moments.selection]
        rows = ((torch.arange(self.window) - self.window + 1) * selection.stride + time).clamp(min=0)
        return selection.store.rows(moments.episode, camera, rows).flatten(0, 1)
