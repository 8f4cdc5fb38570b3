"""Every option of the network alike: what training shows is what streaming shows, and what it does can be told."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution
from worldline.errors import CheckpointError, SpecMismatch
from worldline.rl_in_imagination import Dream
from worldline.tokenizers import PixelPatches
from worldline.types import Clip, LatentSpec, Observation
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TransformerConfig
from worldline.worldmodels.doubled_pass import doubled_batch
from worldline.worldmodels.language import HashedText, text_encoder
from worldline.worldmodels.memory import MemoryConfig
from worldline.worldmodels.streaming import Frame
from worldline.worldmodels.transformer import teacher_forcing_mask

TWO_VIEWS = replace(SPEC, cameras=(*SPEC.cameras, replace(SPEC.cameras[0], name="side.b")))
MEMORY = MemoryConfig(start=True, recent=1, stride=2, nearest=2, gap=1, capacity=6)


def model_of(
    seed: int = 0, network: dict | None = None, latent: LatentSpec | None = None, **options
) -> AutoregressiveWorldModel:
    """Random weights everywhere, small where a pose comes from the pose before. `latent`: of both cameras."""
    torch.manual_seed(seed)
    clip = dot_clip(64, 4, 5)
    if latent is None:
        one = dot_tokenizer().latent_spec
        both = {
            name: {c.name: getattr(one, name)["top"] for c in TWO_VIEWS.cameras} for name in ("shapes", "mean", "std")
        }
        latent = replace(one, **both)
    sizes = {"width": 32, "depth": 2, "heads": 2, "window": 3, "patch": 2, "guess_width": 16}
    model = AutoregressiveWorldModel(
        AutoregressiveConfig(network=TransformerConfig(**sizes | (network or {})), **options),
        replace(TWO_VIEWS, latent=latent),
        action_normalizer=RobustNormalizer.fit(clip.actions),
        pose_normalizer=RobustNormalizer.fit(clip.poses),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bounds" in name:  # of the aim: the lower one stays below
                continue
            p.copy_((0.02 if "guess_pose" in name or "unembed_pose" in name else 0.25) * torch.randn(p.shape))
    return model.eval()


def clip_of(batch: int, frames: int, seed: int, **changes) -> Clip:
    clip = dot_clip(batch, frames, seed)
    views = {"top": clip.frames["top"], "side.b": clip.frames["top"].flip(-1)}
    latents = {c: dot_tokenizer().encode({"top": v})["top"] for c, v in views.items()}
    return replace(clip, frames=latents, instruction=("go right", "turn left")[:batch], **changes)


def first(clip: Clip, frames: int = 1) -> Clip:
    cut = {c: z[:, :frames] for c, z in clip.frames.items()}
    return replace(clip, frames=cut, poses=clip.poses[:, :frames], actions=clip.actions[:, : frames - 1])


OPTIONS = {
    "plain": {},
    "additive": {"network": {"adapter": "additive"}},
    "cross-attention": {"network": {"adapter": "cross-attention"}},
    "memory": {"network": {"memory": MEMORY}},
    "memory without guesses": {"network": {"memory": MEMORY, "guess_width": 0}},
    "views apart": {"network": {"cross_view": False}},
    "instruction": {"text": "hashed"},
    "a camera missing": {"camera_dropout": 0.5},
    "all": {"network": {"memory": MEMORY, "adapter": "additive"}, "text": "hashed", "camera_dropout": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_shows_a_target_what_streaming_shows_it(name):
    model, t = model_of(**OPTIONS[name], history=LevelDistribution(clean=1.0)), 9
    present = {"side.b": torch.tensor([True, False])} if "camera_dropout" in OPTIONS[name] else {}
    clip = clip_of(2, t, 3, present=present)
    units = model.network_units(clip)
    clean, pure = torch.zeros(2, t - 1), torch.ones(2, t - 1)
    seen = {c: present.get(c, torch.ones(2).bool())[:, None].expand(-1, t - 1) for c in units.frames} if present else {}
    batch = doubled_batch(
        units,
        units,
        history_level=clean,
        target_level=pure,
        told=None,
        seen=seen,
        generator=torch.Generator().manual_seed(0),
    )
    targets = slice(t - 1, None)
    memories = model.training_pass.memories(clip, units, batch.keep(targets), seen, None)
    assert (memories is not None) == ("memory" in name or name == "all")
    with torch.no_grad():
        mask = teacher_forcing_mask(t - 1, 3)
        made = model.network(model.body, batch, mask, targets, memories)
    trained, trained_pose = made.latents, made.pose
    noise = batch.keep(targets)
    everywhere = {c: torch.ones(2, dtype=torch.bool) for c in units.frames}
    for i in range(1, t):
        state = model.observe(first(clip, i))
        action = units.actions[:, i - 1]
        noisy = Frame(
            latents={c: z[:, i - 1] for c, z in noise.latents.items()}, pose=noise.pose[:, i - 1], seen=everywhere
        )
        made, pose = model.streaming.step(
            state, noisy, torch.ones(2), action, memory=model.streaming.read_memory(state, action)
        )
        assert torch.allclose(pose, trained_pose[:, i - 1], atol=1e-4)
        for camera, z in made.items():
            assert torch.allclose(z, trained[camera][:, i - 1], atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_a_dream_are_independent_forked_and_reset(name):
    model, clip = model_of(**OPTIONS[name]), clip_of(2, 5, 3)
    actions, seeds = torch.randn(2, 6, 2, 2), torch.tensor([4, 9])
    state = model.observe(clip)
    _, together = model.imagine(state, actions, seeds=seeds)
    order = torch.tensor([1, 0, 1])
    _, forked = model.imagine(state.index(order), actions[order], seeds=seeds[order])
    fresh, _ = model.imagine(model.observe(first(clip)), actions, seeds=seeds)
    _, mixed = model.imagine(fresh.where(torch.tensor([False, True]), state), actions, seeds=seeds)
    for camera, z in together.latents.items():
        assert torch.allclose(forked.latents[camera], z[order], atol=1e-4)
        assert torch.allclose(mixed.latents[camera][1], z[1], atol=1e-4)


def dream(model: AutoregressiveWorldModel, clip: Clip, actions: torch.Tensor) -> torch.Tensor:
    return model.imagine(model.observe(clip), actions, seeds=torch.tensor([4, 9]))[1].latents["top"]


@pytest.mark.parametrize("adapter", ["adaln", "additive", "cross-attention"])
def test_each_adapter_brings_each_frame_its_own_action(adapter):
    """Without guesses and pose token the adapter is the only way in; frames before the changed action stay as they are."""
    model, clip = model_of(network={"adapter": adapter, "guess_width": 0}), clip_of(2, 2, 3)
    actions = torch.randn(2, 4, 2, 2)
    changed = actions.clone()
    changed[:, 2, 1] += 1  # the second control step of one block
    before, after = dream(model, clip, actions), dream(model, clip, changed)
    assert torch.allclose(before[:, :2], after[:, :2], atol=1e-6)
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-3


def test_what_a_dream_remembers_from_beyond_its_window_changes_it_and_without_memory_nothing_does():
    clip = clip_of(2, 12, 3)
    changed = {c: z.clone() for c, z in clip.frames.items()}
    for z in changed.values():
        z[:, 1] += 1.0  # long before the window of 3 frames: 2 blocks reach back 2 * 2 frames
    other, actions = replace(clip, frames=changed), torch.randn(2, 1, 2, 2)
    for memory, differs in ((MemoryConfig(nearest=9, gap=1), True), (MemoryConfig(), False)):
        model = model_of(network={"memory": memory})
        change = (dream(model, clip, actions) - dream(model, other, actions)).abs().max()
        assert (change > 1e-3) == differs


def test_without_cross_view_a_camera_sees_no_other():
    clip = clip_of(2, 4, 3)
    other = replace(clip, frames=clip.frames | {"side.b": clip.frames["side.b"].flip(-1)})
    for cross_view, differs in ((True, True), (False, False)):
        model = model_of(network={"cross_view": cross_view})
        state, seeds, action = model.observe(clip), torch.tensor([4, 9]), torch.randn(2, 1, 2, 2)
        apart = model.imagine(model.observe(other), action, seeds=seeds)[1].latents["top"]
        change = (model.imagine(state, action, seeds=seeds)[1].latents["top"] - apart).abs().max()
        assert (change > 1e-3) == differs


def test_a_missing_camera_is_what_is_not_looked_at_and_its_loss_is_not_counted():
    model = model_of(camera_dropout=0.3)
    present = {"side.b": torch.tensor([False, False])}
    clip = clip_of(2, 4, 3, present=present)
    other = replace(clip, frames=clip.frames | {"side.b": torch.randn_like(clip.frames["side.b"])})
    actions = torch.randn(2, 3, 2, 2)
    assert torch.equal(dream(model, clip, actions), dream(model, other, actions))
    losses = [model.loss(c, torch.Generator().manual_seed(0))[1] for c in (clip, other)]
    assert losses[0]["one_step_error/side.b"] == losses[1]["one_step_error/side.b"] == 0
    _, made = model.imagine(model.observe(clip), actions, seeds=torch.tensor([4, 9]))
    assert made.latents["side.b"].shape[1] == 3  # it is imagined all the same


def test_a_dream_begins_without_a_camera_if_its_model_has_learned_to_and_is_refused_otherwise():
    clip, tokenizer = dot_clip(2, 2, 3), PixelPatches(TWO_VIEWS.cameras, size=4)
    tokenizer.fit_statistics({c.name: clip.frames["top"] for c in TWO_VIEWS.cameras})
    start = Observation(images={"top": clip.frames["top"][:, 0]}, pose=clip.poses[:, 0], instruction=clip.instruction)
    blocks, seeds = clip.actions[:, 0], torch.arange(2)
    able, unable = (
        Dream(model_of(latent=tokenizer.latent_spec, camera_dropout=share), tokenizer) for share in (0.3, 0.0)
    )
    state = able.start(start, seeds=seeds)
    assert state.observation.images["side.b"].max() == 0  # nobody has seen it yet
    whole = able.start(
        replace(start, images=dict(state.observation.images)), seeds=seeds
    )  # a black picture is another thing
    unseen, black = (able.step(s, blocks).observation.images["side.b"] for s in (state, whole))
    assert unseen.float().std() > 0 and not torch.equal(unseen, black)
    with pytest.raises(SpecMismatch, match=r"cameras \['side.b'\] are missing .* never trained without one"):
        unable.start(start, seeds=seeds)


def test_a_noisy_camera_is_noisy_up_to_a_frame_and_only_in_what_is_shown():
    model, clip, lead = model_of(camera_noise=1 - 1e-9), clip_of(2, 9, 3), 3
    whole = model.network_units(clip)
    shown = model.training_pass.noisy(whole, lead, torch.Generator().manual_seed(0))
    assert torch.equal(shown.poses, whole.poses) and torch.equal(shown.actions, whole.actions)
    untils = []
    for camera, z in whole.frames.items():
        off = (shown.frames[camera] - z).flatten(2).std(2)  # "b t"
        noisy = off > 0
        assert noisy[:, : lead + 1].all() and not noisy[:, -1].any()
        assert (noisy.int().diff(dim=1) <= 0).all()  # never again once it is over
        untils += noisy.sum(1).tolist()
    assert len(set(untils)) > 1  # drawn by row and camera
    assert model_of().training_pass.noisy(whole, lead, None) is whole


def test_guidance_leads_away_from_the_dream_without_actions():
    model, clip, action = model_of(action_dropout=0.2), clip_of(2, 3, 3), torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="which this model never was trained on"):
        model_of(guidance=2.0)
    one, two, free = (dream(model.with_sampling(guidance=s), clip, action) for s in (1.0, 2.0, 0.0))
    assert torch.allclose(two - one, one - free, atol=1e-4)  # one solver step: exactly linear
    assert torch.allclose(free, dream(model.with_sampling(guidance=0.0), clip, -action), atol=1e-5)
    assert (one - free).abs().max() > 1e-3


def test_what_reads_memory_cannot_be_what_the_cache_holds():
    """Histories of training read none."""
    shown = LevelDistribution(clean=0.5, high=0.5)
    assert model_of(history=shown).with_sampling(cache_write="last-step", solver_steps=2)
    with pytest.raises(ValueError, match=r"cache_write='clean' required with a memory of 4 frames"):
        model_of(network={"memory": MEMORY}, history=shown).with_sampling(cache_write="last-step", solver_steps=2)


def test_the_last_step_can_be_what_the_cache_holds():
    history = LevelDistribution(clean=0.5, high=0.5)
    model = model_of(history=history, solver_steps=2)
    quick = model.with_sampling(cache_write="last-step")
    with pytest.raises(ValueError, match="level 1 at 1 solver steps, which training never shows"):
        model.with_sampling(cache_write="last-step", solver_steps=1)
    calls = []
    stream = model.network.stream
    model.network.stream = lambda *args: calls.append(args[1].level.shape[1]) or stream(*args)
    clip, actions = clip_of(2, 2, 3), torch.randn(2, 4, 2, 2)
    state = model.observe(clip)
    calls.clear()
    seeds = torch.tensor([4, 9])
    usual = model.imagine(state, actions, seeds=seeds)[1].latents["top"]
    assert calls == [2, 1] * 4  # the first step of a frame takes the frame before along
    calls.clear()
    saved = quick.imagine(state, actions, seeds=seeds)[1].latents["top"]
    assert calls == [2, 1] + [1, 1] * 3  # what was observed is still to be written, what is dreamt is not
    assert torch.allclose(usual[:, 0], saved[:, 0], atol=1e-6)  # the first frame has the same history
    assert not torch.allclose(usual[:, 1], saved[:, 1], atol=1e-3)
    # the second is what the network says after a history that holds the noisy frame at its level
    middle, frame = quick.streaming.next(
        replace(state, cache=state.cache.clone()), quick._flat_actions(actions)[:, 0], seeds
    )
    again, asked = quick.streaming._denoise(
        replace(state, cache=state.cache.clone()), quick._flat_actions(actions)[:, 0], seeds
    )
    written = replace(state, cache=state.cache.clone())
    quick.streaming.step(written, asked, torch.full((2,), 0.5), quick._flat_actions(actions)[:, 0])
    assert torch.allclose(written.cache, middle.cache, atol=1e-5) and torch.equal(again.pose, frame.pose)


def test_the_instruction_reaches_the_dream_and_is_required():
    model, clip, actions = model_of(text="hashed"), clip_of(2, 2, 3), torch.randn(2, 2, 2, 2)
    other = replace(clip, instruction=("go right", "open the drawer"))
    before, after = dream(model, clip, actions), dream(model, other, actions)
    assert torch.allclose(before[0], after[0], atol=1e-6) and (before[1] - after[1]).abs().max() > 1e-3
    with pytest.raises(SpecMismatch, match="one for each of 2 rows required, got 0"):
        model.observe(replace(clip, instruction=()))


def test_hashed_text_tells_instructions_apart_and_knows_shared_words():
    embed = HashedText()
    a, b, c, empty = embed(["reach the red box", "Reach the red  box!", "open a drawer", ""])
    assert torch.equal(a, b) and empty.abs().max() == 0
    assert a @ embed(["reach the blue box"])[0] > 2 * abs(float(a @ c))
    with pytest.raises(CheckpointError, match="use `hashed`, which needs none"):
        text_encoder("no-such-folder/no-such-model")


def test_an_unknown_adapter():
    with pytest.raises(ValueError, match="adapter: one of adaln, additive, cross-attention required, got 'film'"):
        TransformerConfig(adapter="film")


def test_own_history_is_the_models_own_dream_of_the_clip():
    """As many rounds as frames: frame by frame what streaming imagines from the first. The rest of the input is silenced, for the
    noise of training and of a dream are drawn differently."""
    t = 6
    for memory in (MemoryConfig(), MEMORY):
        model = model_of(
            network={"memory": memory}, history=LevelDistribution(clean=1.0), own_history=0.5, own_rounds=1
        )
        with torch.no_grad():
            for key, embed in model.port.embed.items():
                embed.weight[:, : embed.in_features // 3] = 0
                assert embed.in_features % 3 == 0, key
            model.port.embed_pose.weight[:, : model.port.body.pose_dim] = 0
        clip = clip_of(2, t, 3)
        whole = model.network_units(clip)
        own = whole
        for _ in range(t - 1):
            own = model.training_pass.imagined(clip, whole, own, {}, None)
        _, dreamt = model.imagine(model.observe(first(clip)), clip.actions, seeds=torch.tensor([4, 9]))
        assert torch.equal(own.poses[:, 0], whole.poses[:, 0])
        poses = model.pose_normalizer.normalize(dreamt.poses)
        if memory.size:  # what is remembered of a dream is imagined too, of a clip it is true
            assert torch.allclose(own.poses[:, 1:4], poses[:, :3], atol=1e-4)
        else:
            assert torch.allclose(own.poses[:, 1:], poses, atol=1e-4)
            again = model.network_units(
                replace(clip, frames={c: torch.cat([z[:, :1], dreamt.latents[c]], 1) for c, z in clip.frames.items()})
            )
            for camera, z in own.frames.items():
                assert torch.allclose(z, again.frames[camera], atol=1e-3)


def test_own_history_takes_no_gradient_from_a_weight_in_half_precision():
    """Torch before 2.11 kept the copies that autocast made of weights under no_grad, and gave them to the pass that is to learn."""

    def learned(half: bool) -> set[str]:
        model = model_of(own_history=0.999, own_rounds=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, _ = model.loss(clip_of(2, 5, 3), torch.Generator().manual_seed(0))
        loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}

    whole = learned(half=False)
    assert whole and whole <= learned(half=True)


def test_training_on_own_history_reaches_the_weights_and_says_so_in_its_loss():
    clip = clip_of(2, 6, 3)
    plain, own = model_of(), model_of(own_history=0.999, own_rounds=2)
    losses = [m.loss(clip, torch.Generator().manual_seed(0))[0] for m in (plain, own)]
    assert losses[0] != losses[1]
    losses[1].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in own.parameters())
    with pytest.raises(ValueError, match="own_rounds must be at least 1, got 0"):
        model_of(own_history=0.5, own_rounds=0)
