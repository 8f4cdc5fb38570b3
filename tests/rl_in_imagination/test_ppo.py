"""Refinement in a perfect world: decisions say what happened, and every kind of policy reaches the known optimum."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import GOAL, SPEC, DotPolicy, DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import small_policy, starts
from worldline.data.normalization import RobustNormalizer
from worldline.errors import PolicyError, WorldlineError
from worldline.policies import EncoderConfig, SteeredPolicy
from worldline.rl_in_imagination.collect import Decisions, collect, require_actor
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.episodes import ImaginedEpisodes
from worldline.rl_in_imagination.ppo import PPOConfig, Updater, ValueNetwork, clipped_loss
from worldline.types import TensorState

EYES = EncoderConfig(channels=(16, 16, 16), features=32, shift=0)


def world(rows: int = 32, horizon: int = 16) -> ImaginedEpisodes:
    tokenizer = dot_tokenizer()
    dream = Dream(ExactDotWorldModel(tokenizer), tokenizer)
    return ImaginedEpisodes(dream, DotScorer(), starts(64, seed=3), rows=rows, horizon=horizon)


def leaning(kind: str = "bc", lean: float = 0.15):
    """A policy that drifts to the right: some of its episodes succeed."""
    policy = small_policy(kind, sample=True)
    with torch.no_grad():
        if kind == "bc":
            policy.head.net[-1].bias.add_(torch.tensor([lean, 0.0] * 2))
    return policy


def where(observation) -> torch.Tensor:
    """A critic that values a place by its x."""
    return observation.pose[:, 0]


@pytest.fixture(scope="module")
def decisions() -> Decisions:
    return collect(world(rows=16, horizon=6), leaning(lean=0.6), where, decisions=14, seed=0)


def test_decisions_say_what_happened(decisions: Decisions) -> None:
    n, t = decisions.reward.shape
    assert (n, t) == (16, 14) and decisions.live.all() and decisions.frames == n * t
    assert torch.equal(decisions.value, decisions.pose[..., 0])
    assert torch.equal(decisions.reward > 0, decisions.terminated) and decisions.terminated.any()
    assert torch.equal(decisions.terminated, decisions.after > GOAL)
    # within an episode what a decision led to is what the next one saw; at an end it is the last frame, not the next first one
    ended = decisions.ended[:, :-1]
    assert torch.equal(decisions.after[:, :-1][~ended], decisions.value[:, 1:][~ended])
    assert ((decisions.after[:, :-1] - decisions.value[:, 1:]).abs()[ended] > 1e-3).float().mean() > 0.9
    assert not (decisions.terminated & decisions.truncated).any()
    assert (
        (decisions.ended | (torch.arange(t) == t - 1)).logical_and(~decisions.terminated).eq(decisions.truncated).all()
    )
    for row in range(n):  # no episode is longer than the horizon
        ends = [-1, *decisions.ended[row].nonzero().flatten().tolist()]
        assert all(b - a <= 6 for a, b in zip(ends, ends[1:]))


def test_success_is_that_of_each_rows_first_episode(decisions: Decisions) -> None:
    """A row has time for another only where the first was short: counting those too would count success twice."""
    once = collect(world(rows=16, horizon=6), leaning(lean=0.6), where, decisions=6, seed=0, again=False)
    assert decisions.ended.sum() > 16 and decisions.outcomes() == once.outcomes()
    assert 0 < once.outcomes()["success"] < 1 and once.outcomes()["episodes"] == 16


def test_a_decision_s_log_probability_is_that_of_its_choice(decisions: Decisions) -> None:
    chosen = torch.tensor([0, 5, 14, 100, 223])
    observation, choice = decisions.rows(chosen)
    with torch.no_grad():
        again = leaning(lean=0.6).distribution(observation).log_prob(choice)
    assert torch.allclose(again, decisions.log_prob.flatten()[chosen], atol=1e-4)
    assert torch.equal(observation.pose[2], decisions.pose[1, 0])


def test_the_seed_decides_and_rows_are_their_own(decisions: Decisions) -> None:
    again, fewer, other = (
        collect(world(rows=rows, horizon=6), leaning(lean=0.6), where, decisions=14, seed=seed)
        for rows, seed in ((16, 0), (5, 0), (16, 1))
    )
    assert torch.equal(again.choice, decisions.choice) and torch.equal(again.after, decisions.after)
    assert torch.allclose(fewer.choice, decisions.choice[:5], atol=1e-5)
    assert not torch.equal(other.choice, decisions.choice)


def test_one_episode_a_row_stops_when_all_are_done() -> None:
    rows = torch.arange(4).repeat_interleave(2)
    made = collect(world(rows=8, horizon=5), leaning(), None, decisions=40, seed=0, starts=rows, again=False)
    assert made.reward.shape[1] <= 5 and torch.equal(made.pose[0::2, 0], made.pose[1::2, 0])
    assert ((made.ended & made.live).sum(1) == 1).all()
    for row in range(8):
        end = int((made.ended & made.live)[row].int().argmax())
        assert made.live[row, : end + 1].all() and not made.live[row, end + 1 :].any()
    assert made.frames == int(made.live.sum())


def test_a_chunk_of_several_blocks_ends_where_the_episode_does() -> None:
    policy = small_policy("bc", chunk=6, sample=True)  # three frames a decision
    with torch.no_grad():
        policy.head.net[-1].bias.add_(0.8)
    made = collect(world(rows=8, horizon=4), policy, where, decisions=6, seed=0)
    first = made.after - made.value
    assert made.terminated.any() and (made.after[made.terminated] > GOAL).all()
    assert (made.after[made.terminated] < GOAL + 0.13).all()  # what came within the chunk after success is not counted
    assert first.abs().max() < 3 * 0.13


def test_what_a_policy_remembers_goes_on_within_an_episode_and_begins_with_it() -> None:
    seen = []

    class Counting(type(leaning())):  # how often a row was asked since its episode began
        def reset(self, n):
            return TensorState(tensors={"asked": torch.zeros(n)}, rows=n)

        def chunk(self, choice, observation, state):
            seen.append(state.tensors["asked"])
            asked = TensorState(tensors={"asked": state.tensors["asked"] + 1}, rows=len(state))
            return super().chunk(choice, observation, state)[0], asked

    policy = leaning(lean=0.6)
    policy.__class__ = Counting
    made = collect(world(rows=8, horizon=4), policy, where, decisions=9, seed=0)
    expected = torch.zeros(8)
    for i in range(9):
        assert torch.equal(seen[i], expected)
        expected = torch.where(made.ended[:, i], 0.0, expected + 1)
    assert made.ended[:, :-1].any()


def test_shaping_moves_reward_and_not_the_optimum() -> None:
    """Along an episode potential-based shaping adds up to minus the first potential, whatever was done."""
    plain, shaped = (
        collect(world(rows=8, horizon=5), leaning(), None, decisions=9, seed=0, again=False, progress=w, discount=1.0)
        for w in (0.0, 2.0)
    )
    potential = (plain.pose[:, 0, 0] > GOAL).float()  # the dot's scorer at the first frame
    at_end = torch.zeros(8)  # episodes end outside the goal, or terminate, where the potential counts 0
    total = ((shaped.reward - plain.reward) * plain.live).sum(1)
    assert torch.allclose(total, 2.0 * (at_end - potential), atol=1e-6)


def test_the_clipped_loss_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    loss, stopped = clipped_loss(ratio.log(), advantage, 0.2)
    assert torch.allclose(-loss * 5, torch.tensor(2.0 + 2.4 - 3.0 + 1.0 - 1.6))
    assert stopped == 2 / 5  # a good one that is likelier already, a bad one that is less likely already


def refine(policy, algorithm: str, iterations: int):
    wide = RobustNormalizer(low=(0.0, 0.0), high=(1.0, 1.0))
    torch.manual_seed(0)
    critic = ValueNetwork(EYES, SPEC, pose_normalizer=wide, hidden=64).eval() if algorithm == "ppo" else None
    settings = PPOConfig(algorithm=algorithm, lr=1e-3, critic_lr=2e-3, kl=0.0, target_kl=0.2, discount=0.9)
    updater, generator, episodes = Updater(policy, critic, settings), torch.Generator().manual_seed(0), world()
    for i in range(iterations):
        begin = None
        if algorithm == "grpo":
            begin = torch.randint(64, (4,), generator=generator).repeat_interleave(8)
        made = collect(episodes, policy, critic, decisions=16, seed=i, starts=begin, again=algorithm == "ppo")
        updater.update(made, generator=generator)
    return policy


def random_diffusion():
    """A diffusion policy that goes anywhere, a little more often to the right, the same way for a whole chunk."""
    policy = small_policy("diffusion").train()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for i in range(250):
        generator = torch.Generator().manual_seed(i)
        way = torch.rand(64, 1, 2, generator=generator) * torch.tensor([1.5, 2.0]) - torch.tensor([0.5, 1.0])
        loss = policy.loss(starts(64, seed=1000 + i), way.expand(64, 2, 2), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


@pytest.mark.parametrize(
    "kind, algorithm, iterations",
    [("bc", "ppo", 36), ("bc", "grpo", 45), ("discrete", "ppo", 36), ("steered", "ppo", 36)],
)
def test_in_a_perfect_world_refinement_reaches_the_optimum(kind: str, algorithm: str, iterations: int) -> None:
    """The least number of frames from where a dot starts is known: it must succeed always, and nearly as fast as that."""
    policy = SteeredPolicy(random_diffusion()).eval() if kind == "steered" else leaning(kind)

    def judge() -> tuple[float, float]:
        acts = policy
        if kind != "steered":
            policy.head.sample = False
        dream = world().dream
        made = rollout(dream, acts, DotScorer(), starts(64, seed=9), frames=17, seeds=torch.arange(64))
        if kind != "steered":
            policy.head.sample = True
        hit = made.probability > 0.5
        least = ((GOAL - made.poses[:, 0, 0]) / 0.12).ceil().clamp(min=0)
        took = torch.where(hit.any(1), hit.float().argmax(1), 17)
        return float(hit.any(1).float().mean()), float((took - least).mean())

    before, after = judge(), None
    refine(policy, algorithm, iterations)
    after = judge()
    assert before[0] < 0.7 and before[1] > 2, before
    assert after[0] == 1.0 and after[1] < 0.4, after


def test_the_divergence_holds_a_policy_where_it_was(decisions: Decisions) -> None:
    moved = []
    for weight in (0.0, 10.0):
        policy = leaning(lean=0.6)
        updater = Updater(policy, None, PPOConfig(lr=1e-3, kl=weight, epochs=8, target_kl=10.0))
        moved.append(updater.update(decisions, generator=torch.Generator().manual_seed(0))["kl"])
    assert moved[1] < 0.3 * moved[0]


def test_the_critic_can_learn_alone(decisions: Decisions) -> None:
    policy = leaning(lean=0.6)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    wide = RobustNormalizer(low=(0.0, 0.0), high=(1.0, 1.0))
    updater = Updater(
        policy, ValueNetwork(EYES, SPEC, pose_normalizer=wide).eval(), PPOConfig(critic_lr=2e-3, epochs=20)
    )
    for seed in range(2):
        found = updater.update(decisions, generator=torch.Generator().manual_seed(seed), move=False)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert set(found) == {"value_error", "explained"} and found["explained"] > 0.3


def test_what_goes_wrong_is_said(decisions: Decisions) -> None:
    updater = Updater(leaning(lean=0.6), None, PPOConfig(lr=0.1, kl=0.0, epochs=10, target_kl=1e9, max_kl=0.5))
    with pytest.raises(WorldlineError, match=r"nats a decision away from the cloned one, at most 0.5 required"):
        updater.update(decisions, generator=torch.Generator().manual_seed(0))
    spoiled = decisions.reward.clone()
    spoiled[3, 2] = float("nan")
    for algorithm in ("ppo", "grpo"):
        with pytest.raises(WorldlineError, match=r"got nan in row 3, decision 2\. The scorer gave it"):
            Updater(leaning(), None, PPOConfig(algorithm=algorithm)).update(
                replace(decisions, reward=spoiled), generator=torch.Generator().manual_seed(0)
            )
    with pytest.raises(
        PolicyError, match="a policy with `distribution` and `chunk` is required to be refined, got DotPolicy"
    ):
        require_actor(DotPolicy(1.0), SPEC)
    for wrong, said in (
        ({"discount": 0.0}, "discount above 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"kl": -1.0}, "kl and"),
    ):
        with pytest.raises(ValueError, match=said):
            PPOConfig(**wrong)
