"""Dreams of which no action is known: training and streaming agree, nothing leaks, and the sentence alone decides."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer, draw, encoded, fit, locate, move
from tests.worldmodels.test_options import MEMORY, clip_of, first, model_of
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution
from worldline.errors import SpecMismatch
from worldline.rl_in_imagination import Dream, rollout
from worldline.types import Clip, Observation
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TransformerConfig
from worldline.worldmodels.doubled_pass import doubled_batch
from worldline.worldmodels.streaming import Frame
from worldline.worldmodels.transformer import teacher_forcing_mask


@pytest.mark.parametrize("network", [{}, {"memory": MEMORY, "adapter": "additive"}])
def test_training_shows_an_actionless_target_what_streaming_shows_it(network):
    model, t = model_of(network=network, text="hashed", actionless=0.5, history=LevelDistribution(clean=1.0)), 8
    clip = clip_of(2, t, 3)
    units = replace(model.network_units(clip), acted=torch.zeros(2, dtype=torch.bool))
    batch = doubled_batch(
        units,
        units,
        history_level=torch.zeros(2, t - 1),
        target_level=torch.ones(2, t - 1),
        told=None,
        seen={},
        generator=torch.Generator().manual_seed(0),
    )
    targets = slice(t - 1, None)
    noise = batch.keep(targets)
    with torch.no_grad():
        memories = model.training_pass.memories(clip, units, noise, {}, None)
        trained = model.network(model.body, batch, teacher_forcing_mask(t - 1, 3), targets, memories)
    seen = {c: torch.ones(2, dtype=torch.bool) for c in units.frames}
    seeds, streaming = torch.zeros(2, dtype=torch.long), model.streaming
    state = model.observe(first(clip))
    for i in range(1, t):
        noisy = Frame(latents={c: z[:, i - 1] for c, z in noise.latents.items()}, pose=noise.pose[:, i - 1], seen=seen)
        memory = streaming.read_memory(state, None)
        with torch.no_grad():
            asked = replace(state, cache=state.cache.clone())  # what follows must not find the noisy frame there
            made, pose = streaming.step(asked, noisy, torch.ones(2), None, memory=memory)
        assert torch.allclose(pose, trained.pose[:, i - 1], atol=1e-4)
        for camera, z in made.items():
            assert torch.allclose(z, trained.latents[camera][:, i - 1], atol=1e-4)
        real = Frame(latents={c: z[:, i] for c, z in units.frames.items()}, pose=units.poses[:, i], seen=seen)
        state = streaming.append(state, real, None, seeds)


@pytest.mark.parametrize("options", [{}, {"own_history": 0.9, "action_dropout": 0.1, "network": {"memory": MEMORY}}])
def test_clips_without_known_actions_are_learned_as_if_they_had_none(options):
    """All rows drawn actionless: no action that the data holds makes a difference, to the loss or to what a weight learns."""
    model = model_of(text="hashed", actionless=1 - 1e-9, **options)
    clip = clip_of(2, 6, 3)
    other = replace(clip, actions=torch.randn_like(clip.actions))
    losses = [model.loss(c, torch.Generator().manual_seed(1))[0] for c in (clip, other)]
    assert torch.equal(*losses)
    acted = replace(model.config, actionless=0.0)
    model.config = acted
    losses = [model.loss(c, torch.Generator().manual_seed(1))[0] for c in (clip, other)]
    assert not torch.equal(*losses)


def test_a_model_that_never_saw_it_refuses():
    model = model_of(action_dropout=0.2)
    with pytest.raises(SpecMismatch, match=r"requires actions: it never learned .* --model.actionless 0.5"):
        model.imagine(model.observe(clip_of(2, 2, 3)), None, seeds=torch.arange(2))


WORDS = {"go right": (1.0, 0.0), "go left": (-1.0, 0.0), "go up": (0.0, 1.0), "go down": (0.0, -1.0)}


def said(batch: int, frames: int, seed: int) -> Clip:
    """Dots that a sentence sends one way; their actions say the same."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(WORDS), (batch,), generator=generator).tolist()
    ways = torch.tensor([list(WORDS.values())[i] for i in which])
    start = torch.rand(batch, 2, generator=generator) * 0.3 + 0.35
    clip = dot_clip(batch, frames, seed, start=start)
    return follow(clip, ways[:, None, None].expand_as(clip.actions), tuple(list(WORDS)[i] for i in which))


def follow(clip: Clip, actions: torch.Tensor, instruction: tuple[str, ...]) -> Clip:
    poses = [clip.poses[:, 0]]
    for i in range(actions.shape[1]):
        poses.append(move(poses[-1], actions[:, i]))
    made = torch.stack(poses, 1)
    video = draw(made.flatten(0, 1)).unflatten(0, made.shape[:2])
    return Clip(frames={"top": video}, actions=actions.contiguous(), poses=made, instruction=instruction)


def test_the_sentence_alone_decides_where_the_dot_goes():
    torch.manual_seed(0)
    model = AutoregressiveWorldModel(
        AutoregressiveConfig(
            network=TransformerConfig(width=48, depth=2, heads=2, window=4, patch=2), text="hashed", actionless=0.5
        ),
        replace(SPEC, latent=dot_tokenizer().latent_spec),
        action_normalizer=RobustNormalizer.fit(dot_clip(64, 4, 5).actions),
        pose_normalizer=RobustNormalizer.fit(dot_clip(64, 4, 5).poses),
    )
    fit(model, lambda step: encoded(said(32, 7, 1000 + step), dot_tokenizer()), steps=300, lr=5e-3)
    clip = said(64, 5, 7)
    start = Observation(images={"top": clip.frames["top"][:, 0]}, pose=clip.poses[:, 0], instruction=clip.instruction)
    for words in WORDS:
        told = replace(start, instruction=(words,) * 64)
        made = rollout(
            Dream(model, dot_tokenizer()), None, None, told, frames=5, seeds=torch.arange(64), keep_frames=True
        )
        assert made.actions.shape[1] == 0
        way = torch.tensor(WORDS[words])
        right = follow(clip, way.expand_as(clip.actions), told.instruction).poses[:, -1] - clip.poses[:, 0]
        for ends in (made.poses[:, -1], locate(made.frames["top"])[:, -1]):
            moved = ends - clip.poses[:, 0]
            assert (moved - right).norm(dim=-1).mean() < 0.3 * right.norm(dim=-1).mean(), words
