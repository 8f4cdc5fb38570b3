"""One world model for two robots that share nothing but the trunk and the experts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.robots import CABLE_EYES, DOTS, TRIPOD, clips, robots
from worldline.diffusion import LevelDistribution
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers import whiten
from worldline.types import Clip, WorldModel
from worldline.worldmodels import (
    AutoregressiveConfig,
    AutoregressiveWorldModel,
    MultiWorldModel,
    TransformerConfig,
    load_world_model,
)
from worldline.worldmodels.doubled_pass import doubled_batch
from worldline.worldmodels.embodiments import member_folder
from worldline.worldmodels.memory import MemoryConfig
from worldline.worldmodels.streaming import Frame
from worldline.worldmodels.transformer import teacher_forcing_mask

BOTH = (DOTS, TRIPOD)


def make(seed: int = 0, network: dict | None = None, **options) -> MultiWorldModel:
    torch.manual_seed(seed)
    sizes = {"width": 32, "depth": 2, "heads": 2, "window": 3, "patch": 2, "guess_width": 16, "experts": 3}
    return MultiWorldModel(
        AutoregressiveConfig(network=TransformerConfig(**sizes | (network or {})), **options), robots()
    )


def scrambled(model: MultiWorldModel) -> MultiWorldModel:
    """Random weights everywhere, small where a pose comes from the pose before."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bounds" in name:  # of the aim: the lower one stays below
                continue
            p.copy_((0.02 if "guess_pose" in name or "unembed_pose" in name else 0.25) * torch.randn(p.shape))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MultiWorldModel:
    return scrambled(make())


def first(clip: Clip, frames: int = 1) -> Clip:
    cut = {c: z[:, :frames] for c, z in clip.frames.items()}
    return replace(clip, frames=cut, poses=clip.poses[:, :frames], actions=clip.actions[:, : frames - 1])


def dream(world: AutoregressiveWorldModel, clip: Clip, rows: slice = slice(None)) -> torch.Tensor:
    seeds = torch.tensor([4, 9, 2])[: len(clip.poses)]
    _, made = world.imagine(world.observe(first(clip)), clip.actions, seeds=seeds)
    return torch.cat([z.flatten(2) for z in made.latents.values()], 2)[rows]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("network", [{}, {"memory": MemoryConfig(recent=1, nearest=1, stride=2, gap=1, capacity=6)}])
def test_training_shows_a_target_what_streaming_shows_it(name, network):
    world, t = scrambled(make(network=network, history=LevelDistribution(clean=1.0))).member(name), 7
    clip = clips(2, t, 3)[name]
    units = world.network_units(clip)
    clean, pure = torch.zeros(2, t - 1), torch.ones(2, t - 1)
    batch = doubled_batch(
        units,
        units,
        history_level=clean,
        target_level=pure,
        told=None,
        seen={},
        generator=torch.Generator().manual_seed(0),
    )
    targets = slice(t - 1, None)
    memories = world.training_pass.memories(clip, units, batch.keep(targets), {}, None)
    with torch.no_grad():
        trained = world.network(name, batch, teacher_forcing_mask(t - 1, 3), targets, memories)
    assert torch.equal(trained.routing.weight, world.routing(clip).weight)
    noise, seen = batch.keep(targets), {c: torch.ones(2, dtype=torch.bool) for c in units.frames}
    for i in range(1, t):
        state, action = world.observe(first(clip, i)), units.actions[:, i - 1]
        latents = {c: z[:, i - 1] for c, z in noise.latents.items()}
        noisy = Frame(latents=latents, pose=noise.pose[:, i - 1], seen=seen)
        memory = world.streaming.read_memory(state, action)
        made, pose = world.streaming.step(state, noisy, torch.ones(2), action, memory=memory)
        assert torch.allclose(pose, trained.pose[:, i - 1], atol=1e-4)
        for camera, z in made.items():
            assert torch.allclose(z, trained.latents[camera][:, i - 1], atol=1e-4)


def test_a_member_is_a_whole_world_model_on_the_shared_weights(model):
    for name in BOTH:
        member, clip = model.member(name), clips(2, 3, 0)[name]
        assert isinstance(member, WorldModel) and member.spec == robots()[name].spec
        _, made = member.imagine(member.observe(first(clip)), clip.actions, seeds=torch.arange(2))
        assert {c: z.shape for c, z in made.latents.items()} == {c: z[:, 1:].shape for c, z in clip.frames.items()}
        assert made.poses.shape == clip.poses[:, 1:].shape
        assert all(a is b for a, b in zip(member.parameters(), model.parameters(), strict=True))


def test_a_rows_dream_does_not_depend_on_its_neighbours(model):
    for name in BOTH:
        clip = clips(3, 4, 0)[name]
        other = replace(clip, actions=torch.cat([clip.actions[:1], -clip.actions[1:]]))
        assert torch.allclose(dream(model.member(name), clip)[0], dream(model.member(name), other)[0], atol=1e-5)
        assert (dream(model.member(name), clip)[1] - dream(model.member(name), other)[1]).abs().max() > 1e-3


def test_the_router_can_be_changed_at_sampling(model):
    clip = clips(2, 3, 0)[TRIPOD]
    world = model.member(TRIPOD)
    dreams = {r: dream(world.with_sampling(router=r), clip) for r in ("learned", "shuffled", "uniform", "fixed", DOTS)}
    assert torch.equal(dreams["learned"], dream(world, clip))
    assert torch.equal(dream(world.with_sampling(router=TRIPOD), clip), dreams["learned"])
    for router in ("shuffled", "uniform", "fixed", DOTS):
        assert (dreams[router] - dreams["learned"]).abs().max() > 1e-3, router
    with pytest.raises(SpecMismatch, match=r"router: one of learned, .* required, got 'hard'"):
        world.with_sampling(router="hard")
    with pytest.raises(ValueError, match="requires experts"):
        AutoregressiveConfig(router="uniform")
    plain = make(network={"experts": 0}).member(DOTS)
    with pytest.raises(SpecMismatch, match="routing requires a world model with experts"):
        plain.routing(clips(2, 3, 0)[DOTS])


@pytest.mark.parametrize("router", ["learned", "shuffled", "uniform", "fixed"])
def test_what_a_step_on_one_robot_reaches(router):
    model = scrambled(make(router=router)).train()  # ways out that start at 0 would let nothing through
    loss, metrics = model.loss({DOTS: clips(4, 5, 0)[DOTS]}, torch.Generator().manual_seed(0))
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith("network.experts.experts") for name in reached)
    assert any(name.startswith("network.ports.dot.") for name in reached)
    assert not any(name.startswith("network.ports.cables") for name in reached)
    assert ("network.experts.router.weight" in reached) == (router in ("learned", "shuffled"))
    assert (f"balance/{DOTS}" in metrics) == (router in ("learned", "shuffled"))
    assert not any(value.requires_grad for value in metrics.values())
    assert model.network.experts.loads[1].abs().max() == 0


def test_the_loss_of_both_is_the_mean_and_holds_the_weighed_balance():
    batch = clips(4, 5, 0)
    model = make().eval()
    losses = [model.loss({name: batch[name]}, torch.Generator().manual_seed(0))[0] for name in BOTH]
    without = make(balance_weight=0.0).eval()
    bare, shown = without.loss({DOTS: batch[DOTS]}, torch.Generator().manual_seed(0))
    assert torch.allclose(losses[0], bare + 0.01 * shown[f"balance/{DOTS}"], atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    assert torch.isfinite(model.loss(batch, generator)[0])
    with pytest.raises(SpecMismatch, match=r"a clip of at least one of dot, cables/v1\.0 required, got none"):
        model.loss({})


def test_an_unknown_embodiment_is_no_other_ones(model):
    with pytest.raises(SpecMismatch, match=r"one of dot, cables/v1\.0 required, which .* got 'dots'"):
        model.member("dots")
    with pytest.raises(SpecMismatch, match="got 'ur5'"):
        model.loss({"ur5": clips(2, 3, 0)[DOTS]})


def test_names_that_cannot_be():
    known = robots()
    with pytest.raises(SpecMismatch, match="the name in its spec is required, 'dot', got 'cables'"):
        MultiWorldModel(AutoregressiveConfig(), {"cables": known[DOTS]})
    with pytest.raises(SpecMismatch, match="at least one, got none"):
        MultiWorldModel(AutoregressiveConfig(), {})

    def named(*names: str) -> dict:
        spec = known[DOTS].spec
        return {n: replace(known[DOTS], spec=replace(spec, action=replace(spec.action, embodiment=n))) for n in names}

    for wrong in ("fixed", "", "..", "train"):
        with pytest.raises(SpecMismatch, match="cannot be used as a name"):
            MultiWorldModel(AutoregressiveConfig(), named(wrong))
    for pair in (("a.b", "a_b"), ("a/b", "a-b"), ("Arm", "arm")):
        with pytest.raises(SpecMismatch, match="names that differ in letters and digits"):
            MultiWorldModel(AutoregressiveConfig(), named(*pair))


def test_saved_moved_and_loaded_by_member(model, tmp_path):
    model.save_pretrained(tmp_path / "multi", provenance={"note": "both"}, of_members={DOTS: {"data": ["dots"]}})
    for name, tokenizer in ((DOTS, None), (TRIPOD, CABLE_EYES)):
        if tokenizer is not None:
            tokenizer.save_pretrained(member_folder(tmp_path / "multi", name) / "tokenizer")
    shutil.move(tmp_path / "multi", tmp_path / "moved")
    loaded, tokenizer = load_world_model(tmp_path / "moved/members/cables-v1.0")
    clip = clips(2, 4, 1)[TRIPOD]
    assert tokenizer.latent_spec == loaded.latent_spec
    assert torch.equal(dream(loaded, clip), dream(model.member(TRIPOD), clip))
    whole = MultiWorldModel.from_pretrained(tmp_path / "moved")
    assert whole.embodiments == BOTH and whole.config == model.config and whole.robots == model.robots
    assert torch.equal(dream(whole.member(DOTS), clips(2, 4, 1)[DOTS]), dream(model.member(DOTS), clips(2, 4, 1)[DOTS]))

    with pytest.raises(CheckpointError, match=r"this holds several.*\n  .*members/dot\n  .*members/cables-v1\.0"):
        load_world_model(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="weights of its own is required here, this is a member"):
        AutoregressiveWorldModel.from_pretrained(tmp_path / "moved/members/dot")
    with pytest.raises(CheckpointError, match="'dot' shares its weights with 1 others"):
        model.member(DOTS).save_pretrained(tmp_path / "dot")
    shutil.copytree(tmp_path / "moved/members/cables-v1.0", tmp_path / "alone/members/cables")
    with pytest.raises(CheckpointError, match=r"its weights are shared and are required in .*alone/model\.safetensors"):
        load_world_model(tmp_path / "alone/members/cables")


def test_a_member_may_be_named_from_within(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    folder = member_folder(tmp_path, TRIPOD)
    CABLE_EYES.save_pretrained(folder / "tokenizer")
    monkeypatch.chdir(folder)
    assert load_world_model(Path("."))[0].spec == robots()[TRIPOD].spec


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> MultiWorldModel:
    return train()


def train() -> MultiWorldModel:
    model = make(network={"width": 48, "guess_width": 64, "experts": 4, "window": 4})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    steps = 200
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        name = BOTH[step % 2]
        loss, _ = model.loss({name: clips(16, 6, 1000 + step, (name,))[name]}, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def errors(world: AutoregressiveWorldModel, clip: Clip) -> dict[str, float]:
    """Of a dream from one frame: against copying it, with the actions of others, and the other routers."""
    target = whiten({c: z[:, 1:] for c, z in clip.frames.items()}, world.latent_spec)

    def error(latents) -> float:
        white = whiten(dict(latents), world.latent_spec)
        return float(torch.stack([(white[c] - target[c]).square().mean() for c in target]).mean())

    def dreamt(world, actions) -> float:
        return error(world.imagine(world.observe(first(clip)), actions, seeds=torch.arange(len(actions)))[1].latents)

    found = {router: dreamt(world.with_sampling(router=router), clip.actions) for router in ("shuffled", "uniform")}
    copied = error({c: z[:, :1].expand(-1, clip.actions.shape[1], -1, -1, -1) for c, z in clip.frames.items()})
    return {
        **found,
        "true": dreamt(world, clip.actions),
        "others": dreamt(world, clip.actions.roll(1, 0)),
        "copy": copied,
    }


@pytest.mark.parametrize("name", BOTH)
def test_one_model_learns_both_robots_and_needs_its_router(learned, name):
    found = errors(learned.member(name), clips(64, 5, 7)[name])
    assert found["true"] < 0.8 * found["copy"]
    assert found["others"] > 1.1 * found["true"]
    assert found["shuffled"] > 1.05 * found["true"]
