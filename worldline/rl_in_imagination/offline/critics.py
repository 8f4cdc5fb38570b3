"""K action values for each of e members, in one stack of networks, and the slow copies that targets are made of."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.policies.batched_mlp import BatchedMLP

M = TypeVar("M", bound=nn.Module)
_FIRST_STREAM = 1000  # of critics' initial weights; the policies' is 0


class Critics(nn.Module):
    """Q(observation, action) of `count` critics a member, on normalised observations and unit actions.

    Critic k of member j is initialised by (seed j, k), so an ensemble is larger by more critics, not by others.
    """

    def __init__(
        self, observations: int, actions: int, hidden: Sequence[int], *, count: int, seeds: Sequence[int]
    ) -> None:
        super().__init__()
        self.count, self.members = count, len(seeds)
        sizes = (observations + actions, *hidden, 1)
        stacks = [BatchedMLP(sizes, seeds, stream=_FIRST_STREAM + k) for k in range(count)]
        self.net = stacks[0]
        for layer in range(
            len(sizes) - 1
        ):  # row k * e + j is critic k of member j: the first critics are a plain slice
            self.net.weights[layer] = nn.Parameter(torch.cat([stack.weights[layer].detach() for stack in stacks]))
            self.net.biases[layer] = nn.Parameter(torch.cat([stack.biases[layer].detach() for stack in stacks]))

    def forward(
        self, seen: Float[Tensor, "e n o"], actions: Float[Tensor, "e n a"], *, first: bool = False
    ) -> Float[Tensor, "k e n"]:
        """All critics' values, or with `first` those of critic 0 alone (k = 1)."""
        given = torch.cat([seen, actions], dim=-1)
        if first:
            return self.net(given, first=self.members)[None, :, :, 0]
        return self.net(given.repeat(self.count, 1, 1)).unflatten(0, (self.count, self.members))[..., 0]

    def with_own_actions(
        self, seen: Float[Tensor, "e n o"], actions: Float[Tensor, "e n a"]
    ) -> tuple[Float[Tensor, "k e n"], Float[Tensor, "k e n a"]]:
        """All critics' values, and the copy of the actions that each was given, by which it can be differentiated."""
        own = actions.detach().expand(self.count, *actions.shape).clone().requires_grad_()
        given = torch.cat([seen.expand(self.count, *seen.shape), own], dim=-1)
        return self.net(given.flatten(0, 1)).unflatten(0, (self.count, self.members))[..., 0], own


def slow_copy(module: M) -> M:
    """A copy that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, share: float) -> None:
    """Move `slow` by `share` of the way to `fast`."""
    for behind, ahead in zip(slow.parameters(), fast.parameters(), strict=True):
        behind.lerp_(ahead, share)
