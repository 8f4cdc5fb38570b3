"""Several small networks of one shape side by side, so that a layer of all of them is one batched matrix product.

Eight seeds of an agent, or ten critics of each, cost the overhead of one. Every network is initialised by its own seed, and no
operation mixes networks: member j of eight is the network that would be trained alone with that seed.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.diffusion.noise import mix


class BatchedMLP(nn.Module):
    """`e` perceptrons with ReLU between their layers, initialised as `nn.Linear` is: uniform within 1/sqrt(inputs).

    Args:
        sizes: of the layers, inputs and outputs included.
        seeds: one a member; there are as many members as seeds.
        stream: tells networks apart that are initialised by the same seeds.
    """

    def __init__(self, sizes: Sequence[int], seeds: Sequence[int], *, stream: int = 0) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1 or not seeds:
            raise ValueError(
                f"at least two sizes of at least 1 and one seed required, got {list(sizes)}, {list(seeds)}"
            )
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()  # "e i o", "e 1 o"
        drawn = [_layers(sizes, seed, stream) for seed in seeds]
        for layer in range(len(sizes) - 1):
            self.weights.append(nn.Parameter(torch.stack([member[layer][0] for member in drawn])))
            self.biases.append(nn.Parameter(torch.stack([member[layer][1] for member in drawn])))

    @property
    def members(self) -> int:
        return len(self.weights[0])

    def forward(self, values: Float[Tensor, "e n i"], *, first: int | None = None) -> Float[Tensor, "e n o"]:
        """Member j's output for its own rows. With `first` only so many members, the first ones, are asked."""
        layers = list(zip(self.weights, self.biases))
        for layer, (weight, bias) in enumerate(layers):
            if first is not None:
                weight, bias = weight[:first], bias[:first]
            values = torch.baddbmm(bias, values, weight)
            if layer < len(layers) - 1:
                values = values.relu_()
        return values


def _layers(sizes: Sequence[int], seed: int, stream: int) -> list[tuple[Tensor, Tensor]]:
    """Weight "i o" and bias "1 o" of every layer of one member."""
    generator = torch.Generator().manual_seed(int(mix(mix(torch.tensor(seed)) ^ stream)) & (2**63 - 1))
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:]):
        bound = 1 / math.sqrt(inputs)
        weight = torch.empty(inputs, outputs).uniform_(-bound, bound, generator=generator)
        layers.append((weight, torch.empty(1, outputs).uniform_(-bound, bound, generator=generator)))
    return layers
