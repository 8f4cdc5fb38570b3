"""Routing of actions to experts: what is derived on paper holds."""

import math

import pytest
import torch

from worldline.errors import SpecMismatch
from worldline.worldmodels import TransformerConfig
from worldline.worldmodels.experts import (
    ROUTERS,
    ActionExperts,
    Routing,
    balance_loss,
    report_routing,
    top_weights,
)

DIMS = {"short": 2, "long": 5, "other": 5}
TOLD = torch.ones(3, 4, dtype=torch.bool)


def experts_of(seed: int = 0, experts: int = 4, top_k: int = 2) -> ActionExperts:
    torch.manual_seed(seed)
    made = ActionExperts(DIMS, 8, experts=experts, top_k=top_k)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.5 * torch.randn(p.shape))
    return made


def routing_of(probability: torch.Tensor, top_k: int = 1) -> Routing:
    weight = top_weights(probability, top_k)
    return Routing(probability=probability, weight=weight, counted=torch.ones(probability.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("router", [*ROUTERS, "other"])
def test_dims_that_an_embodiment_lacks_do_not_matter(router):
    experts = experts_of()
    own = torch.randn(3, 4, 2)
    expected, routing = experts(own, "short", told=TOLD, router=router)
    rubbish = torch.tensor([float("inf"), float("nan"), 1e9]).expand(3, 4, 3)
    for absent in (rubbish, torch.randn(3, 4, 3)):
        padded = torch.cat([own, absent], -1)
        got, routed = experts(padded, "short", told=TOLD, router=router)
        assert torch.equal(got, expected) and torch.equal(routed.weight, routing.weight)
    padded = torch.cat([own, torch.randn(3, 4, 3)], -1).requires_grad_()
    experts(padded, "short", told=TOLD, router=router)[0].square().sum().backward()
    assert padded.grad is not None
    assert padded.grad[..., 2:].abs().max() == 0 and padded.grad[..., :2].abs().max() > 0


def test_the_embodiment_is_told_even_where_its_dims_are_those_of_another():
    experts, moves = experts_of(), torch.randn(3, 4, 5)
    (long, routed), (other, routed_other) = (experts(moves, name, told=TOLD) for name in ("long", "other"))
    assert (long - other).abs().max() > 1e-3
    assert (routed.probability - routed_other.probability).abs().max() > 1e-3
    as_other = experts(moves, "long", told=TOLD, router="other")[1]
    assert torch.equal(as_other.probability, routed_other.probability)


def test_top_k_by_hand():
    probability = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert torch.allclose(top_weights(probability, 2), torch.tensor([0, 4 / 7, 0, 3 / 7]))
    assert torch.allclose(top_weights(probability, 4), probability)
    assert torch.equal(top_weights(probability, 1), torch.tensor([0, 0.4, 0, 0]))  # the router learns by it


def test_the_mixture_is_what_its_experts_say_alone():
    experts, moves = experts_of(), torch.randn(3, 4, 2)
    mixed, routing = experts(moves, "short", told=TOLD)
    assert ((routing.weight > 0).sum(-1) == 2).all() and torch.allclose(routing.weight.sum(-1), torch.ones(3, 4))
    alone = torch.stack([expert(experts._known(moves, "short")) for expert in experts.experts], -1)
    assert torch.allclose(mixed, torch.einsum("blde,ble->bld", alone, routing.weight), atol=1e-6)
    for number, name in enumerate(DIMS):
        given = torch.randn(3, 4, DIMS[name])
        fixed = experts(given, name, told=TOLD, router="fixed")[0]
        assert torch.allclose(fixed, experts.experts[number](experts._known(given, name)), atol=1e-6)
    uniform = experts(moves, "short", told=TOLD, router="uniform")[0]
    assert torch.allclose(uniform, alone.mean(-1), atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shuffled_gives_every_expert_the_weight_of_another(count):
    experts, moves = experts_of(experts=count), torch.randn(3, 4, 2)
    learned = experts(moves, "short", told=TOLD)[1].weight
    shuffled = experts(moves, "short", told=TOLD, router="shuffled")[1].weight
    origin = [next(j for j in range(count) if torch.equal(shuffled[..., i], learned[..., j])) for i in range(count)]
    assert sorted(origin) == list(range(count)) and all(i != j for i, j in enumerate(origin))


def test_the_balance_loss_is_one_if_even_and_n_if_collapsed():
    n = 4
    even = torch.full((n,), 1 / n)
    one = torch.eye(n)[2]
    assert balance_loss(even, even) == pytest.approx(1)  # n * n * (1/n)^2
    assert balance_loss(one, one) == pytest.approx(n)  # n * 1 * 1
    assert balance_loss(torch.tensor([0.75, 0.25]), torch.tensor([0.6, 0.4])) == pytest.approx(2 * (0.45 + 0.1))
    experts = experts_of(experts=n)
    collapsed = routing_of(one.expand(3, 4, n))
    assert experts.balance(collapsed, "long") == pytest.approx(n)
    uncounted = Routing(probability=collapsed.probability, weight=collapsed.weight, counted=~TOLD)
    assert experts.balance(uncounted, "short") == 0


def test_embodiments_may_each_keep_an_expert_of_their_own():
    """Balance is over all of them: collapsed each onto another one, together they are even."""
    experts = experts_of(experts=3).train()
    routings = {name: routing_of(torch.eye(3)[i].expand(2, 4, 3)) for i, name in enumerate(DIMS)}
    for _ in range(2):
        losses = [float(experts.balance(routing, name)) for name, routing in routings.items()]
    assert losses == pytest.approx([1, 1, 1])
    same = experts_of(experts=3).train()
    for _ in range(2):
        losses = [float(same.balance(routings["long"], name)) for name in DIMS]
    assert losses == pytest.approx([3, 3, 3])
    before = same.loads.clone()
    same.eval().balance(routings["short"], "long")
    assert torch.equal(same.loads, before)  # only training remembers


def test_the_balance_loss_leads_away_from_the_expert_that_is_overloaded():
    experts = experts_of(experts=3)
    logits = torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
    experts.balance(routing_of(logits.softmax(-1).expand(2, 4, 3)), "long").backward()
    assert logits.grad is not None and logits.grad[0] > 0 and logits.grad[1] < 0


def test_figures_of_a_routing():
    even = routing_of(torch.full((2, 3, 4), 0.25), top_k=4)
    report = report_routing({"a": [even], "b": [even, even]})
    assert report["information"] == pytest.approx(0)
    assert report["embodiments"]["b"]["entropy"] == pytest.approx(math.log(4))
    assert report["embodiments"]["b"]["entropy_share"] == pytest.approx(1)
    assert report["embodiments"]["b"]["load"] == pytest.approx([0.25] * 4)
    apart = {name: [routing_of(torch.eye(4)[i].expand(2, 3, 4))] for i, name in enumerate("ab")}
    report = report_routing(apart)
    assert report["information"] == pytest.approx(math.log(2))  # the expert says which embodiment it was
    assert report["embodiments"]["a"] == {"entropy": 0, "entropy_share": 0, "load": [1, 0, 0, 0]}


def test_routers_that_cannot_be():
    with pytest.raises(
        SpecMismatch, match="learned, shuffled, uniform, fixed, short, long, other required, got 'hard'"
    ):
        experts_of()(torch.randn(3, 4, 2), "short", told=TOLD, router="hard")
    with pytest.raises(SpecMismatch, match="at least 2 experts, got 1"):
        experts_of(experts=1, top_k=1).check_router("shuffled")
    with pytest.raises(SpecMismatch, match="an expert for each embodiment, got 2 for 3: short, long, other"):
        experts_of(experts=2).check_router("fixed")
    for wrong in ({"experts": 2, "top_k": 3}, {"experts": 2, "top_k": 0}, {"experts": -1}):
        with pytest.raises(ValueError, match="top_k from 1 to experts required"):
            TransformerConfig(**wrong)
    with pytest.raises(ValueError, match="actions=True required with experts"):
        TransformerConfig(experts=2, actions=False)
