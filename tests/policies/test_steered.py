"""A steered diffusion policy: the policy it steers until it is trained, and never anything but chunks that one denoises to."""

import pytest
import torch

from tests.oracles import SPEC, dot_tokenizer
from tests.policies.dots import small_policy, starts
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
    same = policy.chunk(torch.zeros(8, policy.size), starts(8))
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
    assert torch.allclose(policy.chunk(noise.flatten(1), first), theirs, atol=1e-6)
    assert not torch.allclose(policy.chunk(1 - noise.flatten(1), first), theirs, atol=1e-3)
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
    assert torch.equal(again.chunk(noise.flatten(1), first), policy.chunk(noise.flatten(1), first))


def test_who_can_be_steered_and_who_has_a_density() -> None:
    with pytest.raises(
        PolicyError, match=r"a diffusion policy is required to steer by its noise, got one of kind 'bc'"
    ):
        SteeredPolicy(small_policy("bc"))
    with pytest.raises(PolicyError, match=r"a policy with a density is required .* SteeredPolicy"):
        small_policy("diffusion").distribution(starts(2))
