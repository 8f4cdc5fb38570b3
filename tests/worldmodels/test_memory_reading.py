"""What the network makes of remembered frames: the warp."""

import torch

from worldline.worldmodels.memory_reading import Warp


def view(content: torch.Tensor, pose: torch.Tensor, cells: int = 8) -> torch.Tensor:
    """ "n c h w": what a camera at `pose` "n 3" (two places and a height factor) sees of a smooth plane, waves "n c 4"."""
    grid = torch.linspace(-1, 1, cells)
    x = pose[:, :1, None] + pose[:, 2:, None] * grid[None, None, :]
    y = pose[:, 1:2, None] + pose[:, 2:, None] * grid[None, :, None]
    a, b, c, d = content.unbind(-1)
    at = lambda z: z[..., None, None]  # noqa: E731
    return torch.sin(at(a) * x[:, None] + at(b) * y[:, None] + at(c)) + 0.3 * at(d)


def draw(n: int, generator: torch.Generator):
    content = torch.randn(n, 2, 4, generator=generator) * 2
    low, high = torch.tensor([-0.4, -0.4, 0.8]), torch.tensor([0.4, 0.4, 1.2])
    then, now = (low + (high - low) * torch.rand(n, 3, generator=generator) for _ in range(2))
    return view(content, then), view(content, now), then, now


def test_the_warp_learns_from_near_poses_where_any_pose_sees_what_was_seen_from_another():
    """It learns from pairs that lie close together and is asked about pairs that do not, in other scenes. What was out of the
    picture is told by `sight`."""
    torch.manual_seed(0)
    warp, generator = Warp(3, 1), torch.Generator().manual_seed(0)
    warp.init_weights()
    picture, wanted, then, now = draw(256, generator)
    moved, sight = warp({"top": picture}, then, now - then)["top"]
    assert torch.allclose(moved, picture, atol=1e-5) and (sight > 1 - 1e-5).all()  # before training it moves nothing
    optimizer = torch.optim.Adam(warp.parameters(), 3e-3)
    for _ in range(400):
        pose = torch.lerp(*draw(64, generator)[2:], 0.2 * torch.rand(64, 1, generator=generator))
        near = pose + 0.15 * (draw(64, generator)[3] - pose)
        content = torch.randn(64, 2, 4, generator=generator) * 2
        frames = torch.stack([view(content, pose), view(content, near)], 1)
        optimizer.zero_grad()
        there = {"top": torch.ones(64, 2, dtype=torch.bool)}
        warp.error({"top": frames}, torch.stack([pose, near], 1), there, 1)["top"].backward()
        optimizer.step()
    moved, sight = warp({"top": picture}, then, now - then)["top"]
    error = ((moved - wanted).square() * sight).mean() / sight.mean()
    assert error < 0.3 * ((picture - wanted).square() * sight).mean() / sight.mean()
    beside_itself = warp({"top": picture}, then, torch.tensor([4.0, 0.0, 0.0]).expand(256, 3))["top"][1]
    assert beside_itself.mean() < 0.1 * sight.mean()


def test_a_frame_that_is_not_there_teaches_the_warp_nothing():
    warp, frames, poses = Warp(3, 2), torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 3)
    there = {"a": torch.tensor([[False, True, True]] * 2), "b": torch.zeros(2, 3, dtype=torch.bool)}
    both = {"a": frames, "b": frames}
    changed = {"a": torch.cat([100 * frames[:, :1], frames[:, 1:]], 1), "b": 100 * frames}
    errors, same = warp.error(both, poses, there, 1), warp.error(changed, poses, there, 1)
    assert torch.equal(errors["a"], same["a"]) and errors["a"] > 0 and errors["b"] == same["b"] == 0
