"""A mixture of action experts for several robots: every frame's action is embedded by a few of N small networks.

All embodiments share the experts and the router; what tells them apart is which action dims they have and a learned embedding.
Astra (2512.08931) describes such a mixture with a router and top-k experts; its released code has no router and picks an expert by
the dataset's name. Here the router is learned, and other ways to choose stand beside it, to be compared with:

- `learned`: softmax of a linear layer, the `top_k` largest, their weights renormalised to sum 1. With `top_k=1` the weight is
  the probability itself (Switch Transformer, 2101.03961): renormalised it would be 1 and the router would learn nothing.
- `shuffled`: as learned, but each expert gets the weight of the one before it. `uniform`: all alike.
- `fixed`: the embodiment's number picks the expert.
- the name of an embodiment: routed as that one would be, with its embedding and its dims.

Experts are evaluated densely: all N of them for every frame, then weighted. Frames are routed, not tokens, so this is a small part
of a step, and it keeps every row's result apart from the others.

Balance is asked for over all embodiments together, not within one: batches here hold one embodiment, and a loss that wants each
batch spread evenly would forbid the experts to specialise (2501.11873 finds this for domains of text).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldline.errors import SpecMismatch

ROUTERS = ("learned", "shuffled", "uniform", "fixed")
EMBODIMENT_DIM = 16
_INIT = 0.1  # of the router's weights relative to Xavier's: nearly even at first (2101.03961, section 2.4)
_MEMORY = 0.9  # of an embodiment's load from step to step


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the actions of l frames were routed."""

    probability: Tensor  # "b l n", by which experts were chosen
    weight: Tensor  # "b l n", by which they were mixed: zero for those that were not
    counted: Tensor  # "b l" bool: frames that are told an action

    def keep(self, frames: slice) -> "Routing":
        return Routing(
            probability=self.probability[:, frames], weight=self.weight[:, frames], counted=self.counted[:, frames]
        )

    def mean(self, values: Float[Tensor, "b l *n"]) -> Float[Tensor, "*n"]:
        """Over the frames that count; 0 if there are none."""
        counted = self.counted.view(*self.counted.shape, *[1] * (values.ndim - 2)).to(values.dtype)
        return (values * counted).sum((0, 1)) / counted.sum().clamp(min=1)

    def entropy(self) -> Float[Tensor, ""]:
        """Mean entropy of the routing distribution, in nats: 0 for one certain expert, log n for no preference."""
        return self.mean(torch.special.entr(self.probability.float()).sum(-1))

    def load(self) -> Float[Tensor, " n"]:
        """Each expert's share in the mixtures; sums to 1."""
        share = self.mean(self.weight.float())
        return share / share.sum().clamp(min=1e-12)


class ActionExperts(nn.Module):
    """N two-layer networks from any embodiment's action to the width, and the router that weighs them.

    Args:
        inputs: embodiment -> how many numbers say what its action is (`Port.moves`).
    """

    present: Tensor
    loads: Tensor

    def __init__(self, inputs: Mapping[str, int], width: int, *, experts: int, top_k: int) -> None:
        super().__init__()
        self.names, self.count, self.top_k = tuple(inputs), experts, top_k
        self.longest = max(inputs.values())
        present = torch.arange(self.longest)[None] < torch.tensor(list(inputs.values()))[:, None]
        self.register_buffer("present", present.float(), persistent=False)
        # the share of first choices of each embodiment, remembered between its batches; zeros: none yet
        self.register_buffer("loads", torch.zeros(len(inputs), experts))
        self.embodiment = nn.Parameter(torch.empty(len(inputs), EMBODIMENT_DIM))
        known = 2 * self.longest + EMBODIMENT_DIM
        self.router = nn.Linear(known, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(known, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def init_weights(self) -> None:
        """After the linear layers have theirs."""
        nn.init.normal_(self.embodiment)
        with torch.no_grad():
            self.router.weight *= _INIT

    def check_router(self, router: str) -> None:
        """Raise `SpecMismatch` unless these experts can be routed so."""
        if router not in (*ROUTERS, *self.names):
            raise SpecMismatch(f"router: one of {', '.join((*ROUTERS, *self.names))} required, got {router!r}")
        if router == "shuffled" and self.count < 2:
            raise SpecMismatch("router 'shuffled' requires at least 2 experts, got 1")
        if router == "fixed" and len(self.names) > self.count:
            raise SpecMismatch(
                f"router 'fixed' requires an expert for each embodiment, got {self.count} for {len(self.names)}: "
                f"{', '.join(self.names)}. Use as many experts, or router 'learned'."
            )

    def forward(
        self, moves: Float[Tensor, "b l m"], body: str, *, told: Tensor, router: str = "learned"
    ) -> tuple[Float[Tensor, "b l d"], Routing]:
        """The action's embedding, and how it was routed.

        Args:
            moves: what the action of each frame is; dims that `body` does not have may be left out or hold anything.
            told: "b l" bool, which frames have an action; the others are not counted in the routing's figures.
        """
        self.check_router(router)
        own = self._known(moves, body)
        probability, weight = self._route(own, body, router)
        embedded = torch.stack([expert(own) for expert in self.experts], dim=-2)
        mixed = (weight[..., None].to(embedded.dtype) * embedded).sum(-2)
        return mixed, Routing(probability=probability, weight=weight, counted=told)

    def _known(self, moves: Tensor, body: str) -> Tensor:
        """What router and experts are given: the dims there are (else 0), which these are, and the embodiment's embedding."""
        which = self.names.index(body)
        padded = F.pad(moves, (0, self.longest - moves.shape[-1]))
        # where, not times 0: what stands in a dim that is not there may be infinite
        there = self.present[which] > 0
        padded = torch.where(there, padded, torch.zeros_like(padded))
        told = torch.cat([self.present[which], self.embodiment[which]]).to(padded.dtype)
        return torch.cat([padded, told.expand(*padded.shape[:-1], -1)], dim=-1)

    def _route(self, own: Tensor, body: str, router: str) -> tuple[Tensor, Tensor]:
        """Probabilities and weights, "b l n"."""
        shape = (*own.shape[:-1], self.count)
        if router == "uniform":
            even = own.new_full(shape, 1 / self.count, dtype=torch.float32)
            return even, even
        if router == "fixed":
            which = torch.tensor(self.names.index(body), device=own.device)
            one = F.one_hot(which, self.count).float().expand(shape)
            return one, one
        own_dims = own[..., : self.longest]
        seen = self._known(own_dims, router) if router in self.names else own
        probability = self.router(seen).float().softmax(-1)
        weight = top_weights(probability, self.top_k)
        return (probability, weight) if router != "shuffled" else (probability.roll(1, -1), weight.roll(1, -1))

    def balance(self, routing: Routing, body: str) -> Float[Tensor, ""]:
        """`balance_loss` of a batch of one embodiment; in training its load is remembered for the next ones.

        The share of choices is that of all embodiments so far, each counting alike: this batch's, and of the others what is
        remembered. The probabilities are this batch's: the gradient leads it away from experts that all together overload.
        """
        which = self.names.index(body)
        first = F.one_hot(routing.probability.argmax(-1), self.count).float()
        with torch.no_grad():
            share = routing.mean(first)
            loads = self.loads.clone()
            loads[which] = share
            known = loads.sum(-1) > 0
            overall = loads[known].mean(0) if bool(known.any()) else share
            if self.training and bool(routing.counted.any()):
                before = self.loads[which]
                self.loads[which] = torch.lerp(share, before, _MEMORY) if bool(before.sum() > 0) else share
        return balance_loss(overall, routing.mean(routing.probability))


def top_weights(probability: Float[Tensor, "*b n"], top_k: int) -> Float[Tensor, "*b n"]:
    """The `top_k` largest probabilities, renormalised to sum 1 (`top_k=1`: as it is), and zero for the others."""
    value, place = probability.topk(top_k, dim=-1)
    if top_k > 1:
        value = value / value.sum(-1, keepdim=True)
    return torch.zeros_like(probability).scatter(-1, place, value)


def balance_loss(share: Float[Tensor, " n"], probability: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """N * sum_i f_i P_i (2101.03961, equation 4): f_i is the share of frames whose first choice is expert i, P_i its mean
    probability. 1 if both are even, N if one expert has all."""
    return len(share) * (share * probability).sum()


def report_routing(routings: Mapping[str, Sequence[Routing]]) -> dict[str, Any]:
    """What routing does for each embodiment, from its routings of some frames.

    Returns `embodiments`: name -> `entropy` (nats), `entropy_share` (of log N; None for one expert), `load` (a share for each
    expert); and `information`: the mutual information of embodiment and expert in nats, embodiments counting alike. It is 0 if
    all use the experts alike, at most the log of the number of embodiments, or of experts.
    """
    rows: dict[str, dict[str, Any]] = {}
    loads = []
    for name, parts in routings.items():
        count = parts[0].weight.shape[-1]
        whole = Routing(
            probability=torch.cat([r.probability.flatten(0, 1) for r in parts])[None],
            weight=torch.cat([r.weight.flatten(0, 1) for r in parts])[None],
            counted=torch.cat([r.counted.flatten() for r in parts])[None],
        )
        entropy, load = float(whole.entropy()), whole.load().cpu()
        share = entropy / float(torch.tensor(float(count)).log()) if count > 1 else None
        rows[name] = {"entropy": entropy, "entropy_share": share, "load": load.tolist()}
        loads.append(load)
    each = torch.stack(loads)
    information = torch.special.entr(each.mean(0)).sum() - torch.special.entr(each).sum(-1).mean()
    return {"embodiments": rows, "information": max(0.0, float(information))}
