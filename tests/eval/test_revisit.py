"""Revisits: which ones are judged, and that the judge tells a dream that remembers from one that does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.oracles import SPEC
from worldline.data import RobustNormalizer
from worldline.errors import CheckpointError, DatasetError, SimulatorError
from worldline.eval.probes import Probe, ProbeConfig
from worldline.eval.replays import Replays
from worldline.eval.revisit import IDENTITIES, below_the_hand, find_revisits, revisit_identity
from worldline.rl_in_imagination import Dream
from worldline.sim.arm_kinematics import CELLS, inverse
from worldline.sim.arm_scene import draw_scene, state_of
from worldline.tokenizers import PixelPatches
from worldline.types import CameraSpec, Imagination, TensorState

SIZE = 16
WRIST = replace(SPEC, cameras=(CameraSpec(name="wrist", height=SIZE, width=SIZE),))


def states(walk: list[int], seed: int) -> torch.Tensor:
    """ "t 54": the hand above one cell after another of the scene `seed`."""
    rows = [state_of(inverse(np.array([*CELLS[cell], 0.06, 0.0])), np.zeros(4), -1, draw_scene(seed)) for cell in walk]
    return torch.from_numpy(np.stack(rows)).float()


def test_the_longest_absence_of_a_cell_that_was_looked_at_is_judged():
    walk = [0, 0, 1, 2, 0, 0, 8, 8, 8, 8, 8, 8, 1, 1, 0, 0, 0]
    (found,) = find_revisits(states(walk, 3)[None], away=5)
    assert (found.cell, found.left, found.returned, found.judged) == (0, 6, 14, (14, 15, 16))
    colour, shape = (int(i) for i in (found.colour, found.shape))
    times, kind = below_the_hand(states(walk, 3))
    assert times.tolist() == list(range(17))
    assert kind[0].nonzero()[:, 0].tolist() == [colour, 8 + shape]
    assert find_revisits(states(walk, 3)[None], away=9) == []
    assert find_revisits(states(walk[:16], 3)[None], away=5) == []  # seen in two frames only after the return
    with pytest.raises(SimulatorError, match="54 columns"):
        find_revisits(torch.zeros(1, 5, 39), away=3)


class PaintedProbe(Probe):
    """Reads an object that is painted as two grey levels: no training, no error."""

    def __init__(self, names: tuple[str, ...] = IDENTITIES) -> None:
        unit = RobustNormalizer(low=(0.0,) * len(names), high=(1.0,) * len(names))
        super().__init__(ProbeConfig(target="identity", names=names), WRIST, unit)

    def forward(self, frames):
        half = frames["wrist"].float().mean(1)
        colour, shape = half[:, : SIZE // 2].mean((1, 2)) / 30, half[:, SIZE // 2 :].mean((1, 2)) / 80
        near = [-(colour[:, None] - torch.arange(8)).abs(), -(shape[:, None] - torch.arange(3)).abs()]
        return torch.cat(near, 1)


def painted(colour: int, shape: int) -> torch.Tensor:
    frame = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
    frame[:, : SIZE // 2], frame[:, SIZE // 2 :] = 30 * colour, 80 * shape
    return frame


class Playback:
    """Shows frame number i of a row's own episode, whatever was observed; from `forgets_at` on a blank."""

    def __init__(self, tokenizer: PixelPatches, videos: torch.Tensor, forgets_at: int) -> None:
        self.spec = replace(WRIST, latent=tokenizer.latent_spec)
        self.tokenizer, self.videos, self.forgets_at = tokenizer, videos, forgets_at

    def observe(self, clip):
        # which episode this is can be read off its poses
        return TensorState(
            tensors={"at": torch.tensor([clip.poses.shape[1]]), "row": clip.poses[:, 0, 0].long()}, rows=1
        )

    def imagine(self, state, actions, *, seeds):
        first, f = int(state.tensors["at"]), actions.shape[1]
        shown = self.videos[state.tensors["row"], first : first + f].clone()
        if first < self.forgets_at:
            shown[:] = painted(7, 2)
        latents = self.tokenizer.encode({"wrist": shown})
        return state, Imagination(latents=latents, poses=torch.zeros(1, f, 2))


def test_a_dream_that_remembers_is_right_and_one_that_forgets_is_not():
    walk = [0, 0, 1, 2, 5, 5, 8, 8, 8, 7, 4, 4, 1, 1, 0, 0, 0]
    seen = torch.stack([states(walk, seed) for seed in range(6)])
    videos = torch.stack([
        torch.stack([painted(*divmod_kind(kind)) for kind in below_the_hand(s)[1]]) for s in seen
    ])  # fmt: skip
    n, t = videos.shape[:2]
    poses = torch.arange(n).float()[:, None, None].expand(n, t, 2)
    replays = Replays(
        episodes=tuple(range(10, 10 + n)),
        frames={"wrist": videos},
        poses=poses,
        actions=torch.zeros(n, t - 1, 2, 2),
        instruction=("",) * n,
        frame_success=None,
        states=seen,
        causes=("revisit",) * n,
    )
    tokenizer = PixelPatches(WRIST.cameras, size=4)
    tokenizer.fit_statistics({"wrist": videos})
    returned = find_revisits(seen, away=5)[0].returned
    dream = Dream(Playback(tokenizer, videos, forgets_at=returned), tokenizer)
    found = revisit_identity(dream, replays, PaintedProbe(), away=5)
    assert found["episodes"] == n and found["by_episode"][0]["episode"] == 10
    for name in ("real", "reconstructed", "imagined"):
        assert found[name]["both"]["rate"] == 1.0 and found[name]["both"]["low"] < 1.0
    assert found["dreamt absence"]["both"]["rate"] <= 1 / n  # a blank is right at most where the object looks like it
    with pytest.raises(DatasetError, match="out of sight for at least 30 frames"):
        revisit_identity(dream, replays, PaintedProbe(), away=30)
    with pytest.raises(CheckpointError, match="an identity probe is required"):
        revisit_identity(dream, replays, PaintedProbe(names=("x", "y")), away=5)


def divmod_kind(kind: torch.Tensor) -> tuple[int, int]:
    colour, shape = kind.nonzero()[:, 0].tolist()
    return colour, shape - 8
