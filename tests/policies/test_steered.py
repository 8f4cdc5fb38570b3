"""A steered diffusion policy: the policy it steers until it is trained, and never anything but chunks that one denoises to."""

import pytest
import torch

from tests.oracles import SPEC, dot_tokenizer
from tests.policies.dots import observe, small_policy, starts
from tests.worldmodels.test_video_action import build, scrambled
from worldline.diffusion import row_noise
from worldline.errors import PolicyError
from worldline.policies import SteeredPolicy, VideoActionPolicy, load_policy


def steered() -> SteeredPolicy:
    return SteeredPolicy(small_policy("diffusion")).eval()


def test_untrained_it_acts_as_the_policy_it_steers() -> None:
    policy = steered()
    theirs, _ = policy.base.act(starts(6), policy.base.reset(6), seeds=torch.arange(6))
    ours, _ = policy.act(starts(6), policy.reset(6), seeds=torch.arange(6))
    assert torch.equal(ours, theirs)


def test_only_the_steering_learns() -> None:
    policy, before = steered().train(), {}
    assert not policy.base.training and not policy.base.encoder.training
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    loss = -policy.distribution(starts(8)).log_prob(torch.full((8, policy.size), 2.0)).mean()
    loss.backward()
    optimizer.step()
    changed = {k.split(".")[0] for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"net", "log_std"}  # the encoder follows once the last layer is not 0
    same, _ = policy.chunk(torch.zeros(8, policy.size), starts(8), policy.reset(8))
    assert torch.equal(
        same, policy.base.emit(policy.base.head.denoise(policy.base.features(starts(8)), torch.zeros(8, policy.size)))
    )


def test_it_is_stored_whole(tmp_path) -> None:
    policy = steered()
    with torch.no_grad():
        policy.net[-1].bias.normal_()
    policy.save_pretrained(tmp_path / "s")
    again = load_policy(str(tmp_path / "s"), spec=SPEC)
    assert isinstance(again, SteeredPolicy) and again.spec == SPEC
    acts = [p.act(starts(4), p.reset(4), seeds=torch.arange(4))[0] for p in (policy, again)]
    assert torch.equal(*acts)


@pytest.mark.parametrize("design", ["uwm", "uva"])
def test_a_unified_model_is_steered_by_its_noise_and_stored_whole(design, tmp_path) -> None:
    base = VideoActionPolicy(scrambled(build(design, action_steps=2)), dot_tokenizer())
    policy, first = SteeredPolicy(base).eval(), starts(6)
    noise = row_noise(torch.arange(6), 0, 0, (3, 4), stream=1)
    theirs, _ = base.act(first, base.reset(6), seeds=torch.arange(6))

    def chunk(policy: SteeredPolicy, noise: torch.Tensor) -> torch.Tensor:
        return policy.chunk(noise.flatten(1), first, policy.reset(6))[0]

    assert torch.allclose(chunk(policy, noise), theirs, atol=1e-6)
    assert not torch.allclose(chunk(policy, 1 - noise), theirs, atol=1e-3)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    (-policy.distribution(first).log_prob(torch.full((6, policy.size), 2.0)).mean()).backward()
    optimizer.step()
    assert {k.split(".")[0] for k, v in policy.state_dict().items() if not torch.equal(v, before[k])} == {
        "net",
        "log_std",
    }
    policy.save_pretrained(tmp_path / "s")
    again = load_policy(str(tmp_path / "s"), spec=SPEC)
    assert isinstance(again, SteeredPolicy)
    assert torch.equal(chunk(again, noise), chunk(policy, noise))


@pytest.mark.parametrize("options", [{"execute": 1}, {"execute": 1, "warm": 0.5}, {"warm": 0.5}, {}])
@pytest.mark.parametrize("design", ["uwm", "uva"])
def test_a_steered_unified_model_remembers_what_its_base_does(design, options) -> None:
    """The frames before and the last plan: it looked at the present frame alone."""
    base = VideoActionPolicy(scrambled(build(design, action_steps=2)), dot_tokenizer()).with_options(**options)
    policy = SteeredPolicy(base).eval()
    now, theirs, ours = starts(3), base.reset(3), policy.reset(3)
    for call in range(3):
        seeds = torch.arange(3) + 100 * call
        noise = row_noise(seeds, 0, 0, (3, 4), stream=1).flatten(1)
        wanted, theirs = base.act(now, theirs, seeds=seeds)
        got, ours = policy.chunk(noise, now, ours)
        assert torch.allclose(got, wanted, atol=1e-6)
        now = observe(now.pose + torch.tensor([0.1, 0.05]))


def test_who_can_be_steered_and_who_has_a_density() -> None:
    with pytest.raises(
        PolicyError, match=r"a diffusion policy is required to steer by its noise, got one of kind 'bc'"
    ):
        SteeredPolicy(small_policy("bc"))
    with pytest.raises(PolicyError, match=r"a policy with a density is required .* SteeredPolicy"):
        small_policy("diffusion").distribution(starts(2))
