"""Post-training: it publishes what the judge likes, goes on bit for bit, and notices when its reward is hacked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.oracles import dot_clip, encoded
from tests.rl_in_imagination.test_denoiser_grpo import follows, half_trained
from worldline.errors import WorldlineError
from worldline.rl_in_imagination.denoiser_grpo import GRPOConfig, dream
from worldline.trainers.posttraining import (
    PosttrainSettings,
    best_of,
    check,
    opening,
    posttrain,
    prefix_of,
    stop_reason,
)
from worldline.worldmodels import AutoregressiveWorldModel

GRPO = GRPOConfig(contexts=4, group=8, frames=3, minibatch=32, lr=1e-3, clip=1e-3, kl=0.0)
SETTINGS = PosttrainSettings(iterations=4, check_every=2, check_clips=4, grpo=GRPO)


def agrees(frames, actions):
    """In [0, 1], as an inverse model's agreement is."""
    return follows(frames, actions).exp()


def darkness(frames, actions):
    """A reward model with a leak: it likes dark frames, whatever they show."""
    video = frames["top"][:, 1:].float()
    return (1 - video.mean((2, 3, 4)) / 255) ** 4


@pytest.fixture(scope="module")
def begun():
    return half_trained()


def run(begun, out: Path, settings=SETTINGS, reward=agrees, judge=agrees):
    model, tokenizer = begun
    model.save_pretrained(out / "begin")
    own = AutoregressiveWorldModel.from_pretrained(out / "begin")

    def training(seed: int, step: int, size: int):
        return encoded(dot_clip(size, settings.grpo.prefix + GRPO.frames + 1, 10_000 * seed + step), tokenizer)

    held_out = encoded(dot_clip(12, 16, 999), tokenizer)
    found = posttrain(own, tokenizer, reward, judge, training, held_out, settings, out / "run", provenance={"reward": "exact"}, progress=False)  # fmt: skip
    return own, found


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"prefix": 5}])
def test_a_killed_run_goes_on_bit_for_bit(begun, tmp_path, changes):
    settings = replace(SETTINGS, grpo=replace(GRPO, **changes))
    whole, found = run(begun, tmp_path / "a", settings)
    run(begun, tmp_path / "b", replace(settings, iterations=2))
    again, resumed = run(begun, tmp_path / "b", settings)
    assert resumed.history == found.history and resumed.checks == found.checks
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_published_is_what_the_judge_liked_best_and_says_so(begun, tmp_path):
    _, found = run(begun, tmp_path)
    assert [c["iteration"] for c in found.checks] == [0, 2, 4] and len(found.history) == 4
    assert found.best == best_of(found.checks, SETTINGS)
    published = AutoregressiveWorldModel.from_pretrained(tmp_path / "run")
    first = found.checks[0]
    assert 0 < first["judge"] <= first["ceiling"] <= 1 and first["frechet"] > 0 and first["moved_psnr"] > 0
    before = AutoregressiveWorldModel.from_pretrained(tmp_path / "begin")
    same = all(torch.equal(a, b) for a, b in zip(published.parameters(), before.parameters(), strict=True))
    assert same == (found.best == 0)


def test_a_planted_hack_is_caught(begun, tmp_path):
    """The leak is taken: frames go dark, the reward rises, the judge does not agree; it stops, and what is published did not fall."""
    settings = replace(
        SETTINGS,
        iterations=60,
        check_every=5,
        parted=0.01,
        worst_psnr=0.2,
        patience=99,
        grpo=replace(GRPO, max_kl=50.0),
    )
    _, found = run(begun, tmp_path, settings, reward=darkness)
    assert found.hacked and "it is being hacked" in found.stopped
    assert found.checks[-1]["reward"] > found.checks[0]["reward"]
    assert found.checks[-1]["iteration"] < 60
    best = next(c for c in found.checks if c["iteration"] == found.best)
    assert best["judge"] >= found.checks[0]["judge"] > found.checks[-1]["judge"] - 1e-6
    assert found.best < found.checks[-1]["iteration"]


def row(iteration, **changes):
    """A check; at iteration 0 as training begins."""
    begun = {"reward": 0.5, "judge": 0.5, "moved_psnr": 20.0, "moved_ssim": 0.63, "frechet": 0.16}
    return {"iteration": float(iteration), **begun, **changes}


def test_only_the_judge_and_the_pictures_decide_which_is_best():
    good = row(10, judge=0.6, reward=0.6, moved_psnr=19.9)
    checks = [row(0), good, row(20, judge=0.7, reward=0.9, moved_psnr=19.0), row(30, judge=0.6, reward=0.7)]
    assert best_of(checks, SETTINGS) == 10  # 20 lost a decibel, 30 is no better than 10


BETTER = {"judge": 0.6, "reward": 0.6}


@pytest.mark.parametrize(
    ("worse", "sentence"),
    [
        ({"moved_psnr": 19.6}, "PSNR on moved pixels fell from 20.00 to 19.60 dB"),
        ({"moved_ssim": 0.57}, "SSIM on moved pixels fell from 0.630 to 0.570"),
        ({"frechet": 0.4}, "the latent Frechet distance rose from 0.160 to 0.400"),
    ],
)
def test_worse_pictures_are_not_published_and_stop_a_reward_that_rises(worse, sentence):
    """Each of the three alone, whatever the judge says; where the reward did not rise, nothing is hacked."""
    checks = [row(0), row(10, **BETTER, **worse)]
    assert best_of(checks, SETTINGS) == 0
    assert stop_reason(checks, SETTINGS) == f"the reward rose from 0.500 to 0.600 while {sentence}: it is being hacked"
    fallen = [row(0), row(10, judge=0.6, reward=0.45, **worse)]
    assert stop_reason(fallen, SETTINGS) == "" and best_of(fallen, SETTINGS) == 0


@pytest.mark.parametrize("within", [{"moved_psnr": 19.8}, {"moved_ssim": 0.6}, {"frechet": 0.3}])
def test_what_chance_does_to_pictures_stops_nothing(within):
    checks = [row(0), row(10, **BETTER, **within)]
    assert stop_reason(checks, SETTINGS) == "" and best_of(checks, SETTINGS) == 10


def test_a_tiny_frechet_distance_may_double():
    checks = [row(0, frechet=0.01), row(10, **BETTER, frechet=0.15)]
    assert stop_reason(checks, SETTINGS) == "" and best_of(checks, SETTINGS) == 10
    checks = [row(0, frechet=0.01), row(10, **BETTER, frechet=0.25)]
    assert "Frechet distance rose from 0.010 to 0.250" in stop_reason(checks, SETTINGS)


def test_a_reward_that_the_judge_does_not_confirm_is_hacked_and_not_published():
    """As it was found: the reward rose by 0.4, the judge stood still, and the model was published."""
    checks = [row(0), row(10, reward=0.9, judge=0.5001)]
    assert "while the judge confirmed +0.000 of it, at least +0.100 required: it is being" in stop_reason(
        checks, SETTINGS
    )
    assert best_of(checks, SETTINGS) == 0
    followed = [row(0), row(10, reward=0.9, judge=0.62)]  # more than a quarter
    assert stop_reason(followed, SETTINGS) == "" and best_of(followed, SETTINGS) == 10
    noise = [row(0), row(10, reward=0.58, judge=0.501)]  # no rise that asks for a confirmation
    assert stop_reason(noise, SETTINGS) == "" and best_of(noise, SETTINGS) == 10
    fell = [row(0), row(10, reward=0.51, judge=0.47)]
    assert "while the judge fell from 0.500 to 0.470: it is being hacked" in stop_reason(fell, SETTINGS)


def test_an_opening_is_the_frame_behind_the_lead():
    clip = replace(dot_clip(2, 6, 0), lead=2)
    first = opening(clip)
    assert torch.equal(first.frames["top"][:, 0], clip.frames["top"][:, 2]) and first.actions.shape[1] == 0
    assert first.lead == 0


def test_prefixes_are_whole_chunks_of_every_length_up_to_the_longest():
    def drawn(prefix: int, chunk: int) -> list[int]:
        return [prefix_of(replace(GRPO, prefix=prefix), chunk, torch.Generator().manual_seed(i)) for i in range(60)]

    assert set(drawn(0, 1)) == {0} and set(drawn(6, 2)) == {0, 2, 4, 6} and set(drawn(3, 1)) == {0, 1, 2, 3}
    assert drawn(6, 2) == drawn(6, 2)


def test_behind_a_prefix_a_dream_is_told_the_commands_that_follow_it(begun, tmp_path, monkeypatch):
    """What it is judged by is the clip's actions at those frames, and the first frame it is judged on is the last one dreamt before."""
    lengths = []

    def spy(model, tokenizer, reward, seen, actions, config, *, seeds, ahead):
        iteration = len(lengths)
        clip = encoded(dot_clip(config.contexts, config.prefix + config.frames + 1, iteration), tokenizer)
        t = seen.poses.shape[1]
        lengths.append(t)
        assert torch.equal(seen.actions, clip.actions[:, : t - 1]) and torch.equal(
            seen.frames["top"][:, 0], clip.frames["top"][:, 0]
        )
        assert torch.equal(actions, clip.actions[:, t - 1 : t - 1 + config.frames])
        return dream(model, tokenizer, reward, seen, actions, config, seeds=seeds, ahead=ahead)

    monkeypatch.setattr("worldline.trainers.posttraining.dream", spy)
    settings = replace(SETTINGS, iterations=6, check_every=6, grpo=replace(GRPO, prefix=4))
    run(begun, tmp_path, settings)
    assert len(lengths) == 6 and len(set(lengths)) > 2 and max(lengths) <= 5


def test_settings_are_checked():
    with pytest.raises(ValueError, match="check_clips of at least 4"):
        PosttrainSettings(check_clips=2)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        PosttrainSettings(iterations=0)
    with pytest.raises(ValueError, match=r"worst_ssim of at least 0 required, got -0.1"):
        PosttrainSettings(worst_ssim=-0.1)
    with pytest.raises(
        ValueError, match=r"worst_frechet of at least 1 and confirmed from 0 to 1 required, got 0.5 and"
    ):
        PosttrainSettings(worst_frechet=0.5)


def test_clips_in_which_nothing_moves_cannot_tell_a_picture_from_a_worse_one(begun):
    model, tokenizer = begun
    clip = encoded(dot_clip(4, 16, 999), tokenizer)
    still = replace(clip, frames={c: z[:, :1].expand_as(z) for c, z in clip.frames.items()})
    with pytest.raises(WorldlineError, match="in none of 4 does a pixel change"):
        check(model, tokenizer, agrees, agrees, still)
