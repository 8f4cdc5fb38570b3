"""Values of states that are reached but never left in the data: the edge-of-reach problem and its cure (Sims et al. 2402.12527).

Synthetic rollouts are short, so their last states are bootstrapped from, and some of those are never the first state of any transition:

    start --a--> s1 --a--> s2 --a--> s3          Q is trained at start, s1, s2, and asked, never trained, at s3

Whatever Q happens to be there is believed, maximised by the policy, and carried back to where it counts: with exact dynamics as with
learned ones, values run away. Only states that lie *beyond* all starts are at risk; where windows begin everywhere in the data (as
policy-guided diffusion's do) most last states are other windows' first.

The cure is pessimism where nobody has looked. Critics that were initialised apart agree where they were trained and part elsewhere, so
the least of K of them is low at the edge and harmless inside. Critics that all extrapolate alike do not part, and then no ensemble helps:
where rewards rise steadily towards the edge, for one. They can be kept diverse by asking that their slopes along the action differ (An et
al. 2110.01548, equation 4). `agents.reach_aware` sets an agent up for it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST_SLOPE = 1e-10


def pessimistic(values: Float[Tensor, "k e n"]) -> Float[Tensor, "e n"]:
    """The least of K critics' values."""
    return torch.minimum(values[0], values[1]) if len(values) == 2 else values.amin(0)


def likeness(values: Float[Tensor, "k e n"], actions: Float[Tensor, "k e n a"]) -> Float[Tensor, "e n"]:
    """How alike K critics slope along the action (2110.01548, equation 4): the mean over a critic's K - 1 others of the cosine between
    their gradients, summed over the K critics. K if all slope alike, 0 if at right angles, at least -K / (K - 1).

    Args:
        values: of critics that were given `actions`, a copy of their own each, with the graph.
    """
    (slopes,) = torch.autograd.grad(values.sum(), actions, create_graph=True)
    slopes = slopes / (slopes.norm(dim=-1, keepdim=True) + _LEAST_SLOPE)
    # the sum over all pairs i != j of <g_i, g_j> is |sum of g|^2 - sum of |g|^2
    pairs = slopes.sum(0).square().sum(-1) - slopes.square().sum((0, -1))
    return pairs / (len(values) - 1)
