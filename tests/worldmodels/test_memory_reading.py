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


def test_the_warp_learns_where_a_pose_sees_what_was_seen_from_another():
    """Other scenes than those it learned from; a picture moved as it should is far nearer than the picture as it was."""
    torch.manual_seed(0)
    warp, generator = Warp(3, 1), torch.Generator().manual_seed(0)
    warp.init_weights()
    picture, wanted, then, now = draw(256, generator)

    def moved(picture, then, now):
        return warp({"top": picture[:, None]}, then[:, None], (now - then)[:, None])["top"][:, 0]

    assert torch.allclose(moved(picture, then, now), picture, atol=1e-5)  # before training it moves nothing
    optimizer = torch.optim.Adam(warp.parameters(), 3e-3)
    for _ in range(300):
        picture, wanted, then, now = draw(64, generator)
        optimizer.zero_grad()
        (moved(picture, then, now) - wanted)[..., 2:-2, 2:-2].square().mean().backward()
        optimizer.step()
    picture, wanted, then, now = draw(256, generator)
    inside = (..., slice(2, -2), slice(2, -2))  # what was out of the picture then cannot be known
    error = (moved(picture, then, now) - wanted)[inside].square().mean()
    assert error < 0.15 * (picture - wanted)[inside].square().mean()
