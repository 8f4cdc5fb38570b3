"""GRPO on a denoiser: it learns what its reward asks for, is held near where it began, and notices what is broken."""

import copy
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.oracles import dot_clip, dot_tokenizer, encoded, fit, locate, move
from tests.worldmodels.test_autoregressive import small_model
from tests.worldmodels.test_traced import begin
from worldline.errors import WorldlineError
from worldline.rl_in_imagination.denoiser_grpo import (
    DenoiserUpdater,
    GRPOConfig,
    advantages,
    dream,
    log_density,
    offset,
    rows_of,
)

CONFIG = GRPOConfig(contexts=8, group=8, frames=3, minibatch=64, lr=1e-3, clip=1e-3, kl=0.0, max_kl=5.0)


def follows(frames, actions):
    """The truth of the dot world: how near the dot is to where its actions lead from where it was."""
    video = frames["top"]
    found = locate(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    meant = [move(found[:, i], actions[:, i]) for i in range(actions.shape[1])]
    return -10 * (found[:, 1:] - torch.stack(meant, 1)).norm(dim=-1)


@cache
def _half_trained():
    model, tokenizer = small_model(), dot_tokenizer()
    fit(model, lambda step: encoded(dot_clip(16, 5, step), tokenizer), steps=120, lr=3e-3)
    return model.eval(), tokenizer


def half_trained():
    """A model that has seen a little of the dot world; a copy each time."""
    model, tokenizer = _half_trained()
    return copy.deepcopy(model), tokenizer


def contexts(step: int, count: int = CONFIG.contexts):
    return begin(count, 1, CONFIG.frames, seed=1000 + step)


def judged(model, tokenizer, config=CONFIG) -> float:
    """By the deployed sampler, on contexts of its own."""
    seen, actions = begin(64, 1, config.frames, seed=77)
    _, made = model.imagine(model.observe(seen), actions, seeds=torch.arange(64))
    latents = {c: torch.cat([seen.frames[c], z], 1) for c, z in made.latents.items()}
    return float(follows(tokenizer.decode(latents), actions).mean())


def test_dreams_come_to_follow_their_actions_and_rows_that_did_better_are_made_likelier():
    model, tokenizer = half_trained()
    before = judged(model, tokenizer)
    updater, generator = DenoiserUpdater(model, CONFIG), torch.Generator().manual_seed(0)
    for step in range(30):
        seen, actions = contexts(step)
        seeds = torch.arange(64) + 64 * step
        made = dream(model, tokenizer, follows, seen, actions, CONFIG, seeds=seeds)
        if step == 0:
            good = made.advantage.mean(1) > 0.5
            old = log_density(model.trace_means(made.trace), made.trace).detach()
        updater.update(made, generator)
        if step == 0:
            change = log_density(model.trace_means(made.trace), made.trace).detach() - old
            assert change[:, good].mean() > change[:, ~good].mean()
    after = judged(model, tokenizer)
    assert after > before + 0.05 * abs(before), (before, after)


def test_advantages_are_within_groups_by_dream_or_by_frame():
    reward = torch.tensor([[1.0, 0], [0, 0], [5, 5], [5, 7]])
    config = replace(CONFIG, group=2, credit="dream")
    whole = advantages(reward, config)
    assert torch.equal(whole[:, 0], whole[:, 1]) and (whole[0] > 0).all() and (whole[3] > 0).all()
    assert torch.allclose(whole[0], -whole[1])
    by_frame = advantages(reward, replace(config, credit="frame", discount=0.5))
    # of the first group the second frame is alike in both rows, of the second only that counts, and, halved, in the first too
    assert by_frame[0, 1] == by_frame[1, 1] == 0 and by_frame[0, 0] > 0
    assert by_frame[3, 0] > 0 and by_frame[3, 1] > 0


def test_a_frame_is_credited_with_every_reward_that_looked_at_it():
    """Only the reward of the first transition differs, and it looks a frame ahead: the second frame is what it may have been about."""
    reward = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    config = replace(CONFIG, group=2, credit="frame", discount=0.5)
    blind, looking = advantages(reward, config), advantages(reward, config, ahead=1)
    assert blind[0, 0] > 0 and blind[0, 1] == 0
    assert looking[0, 0] > 0 and looking[0, 1] > 0 and looking[0, 2] == 0


def test_exploring_rows_dream_under_commands_of_their_own_and_are_judged_by_the_true_ones():
    model, tokenizer = half_trained()
    seen, actions = contexts(0)
    told = []

    def judge(frames, commanded):
        told.append(commanded)
        return follows(frames, commanded)

    seeds = torch.arange(64)
    still, wide = (
        dream(model, tokenizer, judge, seen, actions, replace(CONFIG, explore=e), seeds=seeds) for e in (0.0, 0.4)
    )
    assert torch.equal(told[0], told[1]) and torch.equal(told[0][::8], actions)  # rewarded for what was commanded
    spread = [made.reward.mean(1).unflatten(0, (-1, 8)).std(1).mean() for made in (still, wide)]
    assert spread[1] > 2 * spread[0]  # what sets rows apart is what they did, no longer the sampler's noise
    # the path's density is that under the true commands, by the weights as they are
    assert torch.allclose(wide.old, log_density(model.trace_means(wide.trace), wide.trace), atol=1e-4)
    assert torch.allclose(wide.trace.context.units.actions, still.trace.context.units.actions)
    moved = offset(actions, model.spec.action, 0.4, torch.arange(8))
    assert moved.abs().max() <= 1 and torch.equal(offset(actions, model.spec.action, 0.4, torch.arange(8)), moved)

    before, updater = judged(model, tokenizer), DenoiserUpdater(model, CONFIG)
    for step in range(12):
        seen, actions = contexts(step)
        config = replace(CONFIG, explore=0.4)
        made = dream(model, tokenizer, follows, seen, actions, config, seeds=seeds + 64 * step)
        updater.update(made, torch.Generator().manual_seed(step))
    assert judged(model, tokenizer) > before, (before, judged(model, tokenizer))


def test_a_strong_divergence_term_holds_the_model_where_it_was():
    moved = []
    for kl in (0.0, 100.0):
        model, tokenizer = half_trained()
        updater = DenoiserUpdater(model, replace(CONFIG, kl=kl))
        seen, actions = contexts(0)
        for step in range(4):
            made = dream(model, tokenizer, follows, seen, actions, CONFIG, seeds=torch.arange(64) + 64 * step)
            found = updater.update(made, torch.Generator().manual_seed(step))
        moved.append(found["kl"])
    assert moved[1] < 0.5 * moved[0]


def test_the_reference_stays_and_rows_of_a_trace_are_the_same_rows():
    model, tokenizer = half_trained()
    seen, actions = contexts(0)
    made = dream(model, tokenizer, follows, seen, actions, CONFIG, seeds=torch.arange(64))
    rows = torch.tensor([5, 60])
    part = model.trace_means(rows_of(made.trace, rows))
    assert torch.allclose(part, model.trace_means(made.trace)[:, rows], atol=1e-4)
    assert torch.allclose(made.old, log_density(model.trace_means(made.trace), made.trace), atol=1e-3)
    updater = DenoiserUpdater(model, CONFIG)
    before = [p.clone() for p in updater.reference.parameters()]
    updater.update(made, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, updater.reference.parameters()))
    assert not any(p.requires_grad for p in updater.reference.parameters())


def test_what_is_broken_is_named():
    model, tokenizer = half_trained()
    seen, actions = contexts(0)
    with pytest.raises(WorldlineError, match=r"finite rewards required, got nan in row 0, frame 0"):
        dream(model, tokenizer, lambda f, a: follows(f, a) / 0 * 0, seen, actions, CONFIG, seeds=torch.arange(64))
    made = dream(model, tokenizer, follows, seen, actions, CONFIG, seeds=torch.arange(64))
    updater = DenoiserUpdater(model, replace(CONFIG, lr=0.5, max_kl=1e-3))
    with pytest.raises(WorldlineError, match=r"nats a number from the pretrained one, at most 0.001"):
        for _ in range(3):
            updater.update(made, torch.Generator().manual_seed(0))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(WorldlineError, match="finite log-probability"):
        updater.update(made, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"groups of at least 2 rows required .*got 1"):
        GRPOConfig(group=1)
    with pytest.raises(ValueError, match=r"at least 4 solver steps .*got 2"):
        GRPOConfig(solver_steps=2)


def test_adapters_alone_learn_and_are_published_as_plain_weights():
    """It begins as it was, only adapters move, and what is published says the same without them."""
    model, tokenizer = half_trained()
    begun = copy.deepcopy(model)
    updater = DenoiserUpdater(model, replace(CONFIG, lora_rank=4, lr=1e-2))
    assert sum(p.numel() for p in updater.weights) < 0.3 * sum(p.numel() for p in begun.parameters())
    seen, actions = contexts(0)
    made = dream(model, tokenizer, follows, seen, actions, CONFIG, seeds=torch.arange(64))
    assert torch.allclose(made.old, log_density(begun.trace_means(made.trace), made.trace), atol=1e-3)
    updater.update(made, torch.Generator().manual_seed(0))
    plain = updater.published()
    assert set(plain.state_dict()) == set(begun.state_dict())
    means, before = model.trace_means(made.trace), begun.trace_means(made.trace)
    assert torch.allclose(plain.trace_means(made.trace), means, atol=1e-4)
    assert (means - before).abs().max() > 1e-3
    moved = {k for k, v in plain.state_dict().items() if not torch.equal(v, begun.state_dict()[k])}
    hidden = {id(p) for p in begun.hidden_matrices()}
    assert moved and moved <= {name for name, p in begun.named_parameters() if id(p) in hidden}
    with pytest.raises(ValueError, match="lora_rank, explore and prefix of at least 0 required, got -1"):
        GRPOConfig(lora_rank=-1)


def test_adapters_without_peft_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(WorldlineError, match=r"adapters of low rank require peft: pip install 'worldline\[lora\]'"):
        DenoiserUpdater(half_trained()[0], replace(CONFIG, lora_rank=2))
