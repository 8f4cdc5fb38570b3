"""Unified video-action models: what is absent has no say, acting makes no video, and small ones learn what only actions decide."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer, encoded, fit, gaussian_denoiser, locate
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution, linear_path, sample_euler, solver_levels
from worldline.errors import SpecMismatch
from worldline.types import Clip, WorldModel
from worldline.worldmodels.trajectories import Guidance
from worldline.worldmodels.video_action import (
    FORWARD,
    INVERSE,
    JOINT,
    POLICY,
    QUERIES,
    VIDEO,
    Query,
    Role,
    TrunkConfig,
    VideoActionConfig,
    VideoActionModel,
)
from worldline.worldmodels.video_action.guided import steering
from worldline.worldmodels.video_action.queries import Roles, draw_roles
from worldline.worldmodels.video_action.state import Dreamt
from worldline.worldmodels.video_action.tokens import Draw

H, F = 2, 3
SMALL = {"trunk": TrunkConfig(width=64, depth=2, heads=4, patch=1, registers=2), "history": H, "horizon": F}


def build(design: str, **options) -> VideoActionModel:
    torch.manual_seed(0)
    clip = dot_clip(64, 4, 5)
    settings = SMALL | {"head_width": 64, "head_depth": 2, "solver_steps": 1, "action_steps": 1} | options
    return VideoActionModel(
        VideoActionConfig(design=design, **settings),
        replace(SPEC, latent=dot_tokenizer().latent_spec),
        action_normalizer=RobustNormalizer.fit(clip.actions),
        pose_normalizer=RobustNormalizer.fit(clip.poses),
    )


def scrambled(model: VideoActionModel) -> VideoActionModel:
    """Random weights everywhere: zero outputs would hide any mistake behind them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=["uwm", "uva"])
def model(request) -> VideoActionModel:
    return scrambled(build(request.param, solver_steps=2, text="hashed"))


def clip_of(n: int, frames: int, seed: int = 3) -> Clip:
    return encoded(dot_clip(n, frames, seed), dot_tokenizer())


def first(clip: Clip, frames: int) -> Clip:
    latents = {c: z[:, :frames] for c, z in clip.frames.items()}
    return replace(clip, frames=latents, poses=clip.poses[:, :frames], actions=clip.actions[:, : frames - 1])


def coming(clip: Clip, frames: int) -> dict[str, torch.Tensor]:
    return {c: z[:, frames:] for c, z in clip.frames.items()}


# --- queries ----------------------------------------------------------------------------------------------------------


def test_a_query_says_what_comes_is_given_wanted_or_absent():
    assert FORWARD.at(3).actions == (Role.GIVEN,) * 3
    assert VIDEO.first(1, 3).frames == (Role.DENOISED, Role.ABSENT, Role.ABSENT)
    with pytest.raises(ValueError, match="something to denoise is required"):
        Query(frames=(Role.GIVEN,), actions=(Role.ABSENT,))
    with pytest.raises(ValueError, match="one role or 3 of them required, got 2"):
        Query(frames=(Role.DENOISED, Role.GIVEN), actions=(Role.ABSENT,)).at(3)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_asks_what_sampling_asks(sparse):
    """Every named query, whole and of each number of frames, is among those that training draws; nothing else is."""
    drawn = draw_roles(dict.fromkeys(QUERIES, 1.0), 4000, F, torch.Generator().manual_seed(0), sparse=sparse)
    rows = {(tuple(f), tuple(a)) for f, a in zip(drawn.frames.tolist(), drawn.actions.tolist())}
    expected = set()
    for query in QUERIES.values():
        for count in range(1, F + 1):
            asked = query.first(count, F)
            frames = [r if not sparse or i == count - 1 else Role.ABSENT for i, r in enumerate(asked.frames)]
            expected.add((tuple(map(int, frames)), tuple(map(int, asked.actions))))
    assert rows == expected


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_are_not_imitated_are_told_their_actions(sparse):
    """They are asked what forward, inverse and video ask, of as many frames; the others what they were asked before."""
    shares = dict.fromkeys(QUERIES, 1.0)
    n, imitated = 2000, torch.arange(2000) % 2 == 0
    plain, told = (
        draw_roles(shares, n, F, torch.Generator().manual_seed(0), sparse=sparse, imitated=which)
        for which in (None, imitated)
    )
    assert torch.equal(plain.frames[imitated], told.frames[imitated])
    assert torch.equal(plain.actions[imitated], told.actions[imitated])
    others = draw_roles(dict.fromkeys(("forward", "inverse", "video"), 1.0), n, F, torch.Generator().manual_seed(1), sparse=sparse)  # fmt: skip
    allowed = {(tuple(f), tuple(a)) for f, a in zip(others.frames.tolist(), others.actions.tolist())}
    rows = {(tuple(f), tuple(a)) for f, a in zip(told.frames[~imitated].tolist(), told.actions[~imitated].tolist())}
    assert rows == allowed


# --- what is absent, and what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(QUERIES))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tokens_left_out_are_as_tokens_masked(model, name, steps):
    """A row's answer is the same beside a row that needs all tokens (its own absent ones masked) and alone (left out)."""
    clip = clip_of(2, 2 + F)
    seen = model.known(first(clip, 2))
    query = QUERIES[name].first(2, F)
    frames = {c: z[:, :2] for c, z in coming(clip, 2).items()} if name == "inverse" else None
    actions = clip.actions[:, 1:3] if name == "forward" else None
    given = model.given(query, 2, frames, actions)
    both = [query, JOINT.at(F)]
    mixed = Roles(
        frames=torch.cat([q.rows(1).frames for q in both]), actions=torch.cat([q.rows(1).actions for q in both])
    )
    seeds, at = torch.tensor([4, 9]), torch.tensor([1, 1])
    options = {"steps": steps, "seeds": seeds, "frame": at}
    with torch.no_grad():
        together = model.network.sample(seen, given, mixed, Draw(**options))
        alone = model.network.sample(seen, given, query.rows(2), Draw(**options))
    f, a = ([i for i, r in enumerate(rs) if r == Role.DENOISED] for rs in (query.frames, query.actions))
    assert torch.allclose(together.frames["top"][0, f], alone.frames["top"][0, f], atol=1e-4)
    assert torch.allclose(together.poses[0, f], alone.poses[0, f], atol=1e-4)
    assert torch.allclose(together.actions[0, a], alone.actions[0, a], atol=1e-4)


def test_what_is_absent_has_no_say_and_what_is_given_has(model):
    clip, other = clip_of(3, 2 + F), clip_of(3, 2 + F, seed=8)
    known, seeds = model.known(first(clip, 2)), torch.arange(3)
    options = {"seeds": seeds, "frame": torch.ones(3, dtype=torch.long), "steps": 2}

    def answer(query: Query, frames: Clip | None, actions: Clip | None):
        given = model.given(
            INVERSE.at(F) if frames else FORWARD.at(F),
            3,
            coming(frames, 2) if frames else None,
            actions.actions[:, 1:] if actions and not frames else None,
        )
        with torch.no_grad():
            return model.network.sample(known, given, query.at(F).rows(3), Draw(**options))

    assert torch.equal(answer(VIDEO, None, clip).frames["top"], answer(VIDEO, None, other).frames["top"])
    assert torch.equal(answer(POLICY, clip, None).actions, answer(POLICY, other, None).actions)
    assert not torch.allclose(answer(FORWARD, None, clip).frames["top"], answer(FORWARD, None, other).frames["top"])
    assert not torch.allclose(answer(INVERSE, clip, None).actions, answer(INVERSE, other, None).actions)


def test_acting_calls_no_video_head_and_runs_the_trunk_over_few_tokens():
    model, lengths, calls = scrambled(build("uva")), [], {"video": 0, "pose": 0, "action": 0}
    network = model.network
    network.trunk.register_forward_hook(lambda _m, args, _out: lengths.append(args[0].tokens.shape[1]))
    for name, head in {
        "video": network.video_head["top"],
        "pose": network.pose_head,
        "action": network.action_head,
    }.items():
        head.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    seen, seeds = first(clip_of(2, 2), 2), torch.arange(2)
    model.sample(seen, POLICY, seeds=seeds, steps=4)
    assert calls == {"video": 0, "pose": 0, "action": 4}
    assert lengths == [H * 17 + F + 2]  # history, blocks, registers
    model.sample(seen, JOINT, seeds=seeds, steps=4)
    assert calls == {"video": 4, "pose": 4, "action": 8} and lengths[1:] == [(H + F) * 17 + F + 2]


def test_a_video_is_filled_in_over_several_rounds():
    model = scrambled(build("uva", decode_rounds=3, masked=(0.5, 1.0)))
    passes = []
    model.network.trunk.register_forward_hook(lambda *_: passes.append(1))
    seen = first(clip_of(2, 2), 2)
    made = model.sample(seen, VIDEO, seeds=torch.arange(2))
    assert len(passes) == 3 and made.latents["top"].shape[1] == F
    once = model.with_sampling(decode_rounds=1).sample(seen, VIDEO, seeds=torch.arange(2))
    assert len(passes) == 4 and not torch.allclose(once.latents["top"], made.latents["top"])
    # the places of the first round are those of one round; later rounds look at them
    same = (once.latents["top"] - made.latents["top"]).abs().amax((1, 2)) < 1e-5
    assert 0 < int(same.sum()) < same.numel()


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_that_training_never_asked_is_refused(name):
    shares = {other: 1.0 for other in QUERIES if other != name} | {name: 0.0}
    model, seen, seeds = build("uwm", shares=shares), first(clip_of(2, 2), 2), torch.arange(2)
    given = {
        "frames": coming(clip_of(2, 3), 2) if name == "inverse" else None,
        "actions": torch.zeros(2, 1, 2, 2) if name == "forward" else None,
    }
    query = QUERIES[name].first(1, F)
    refused = rf"learned the {name} query is required, the share of that is 0.* a share of {name} in --model\.shares"
    with pytest.raises(SpecMismatch, match=refused):
        model.sample(seen, query, seeds=seeds, **given)
    for asked, actions in (("forward", torch.zeros(2, 1, 2, 2)), ("video", None)):
        if name == asked:
            with pytest.raises(SpecMismatch, match=refused):
                model.imagine(model.observe(seen), actions, seeds=seeds)
        else:
            model.imagine(model.observe(seen), actions, seeds=seeds)
    model.also_learned = (name,)  # its data asked for it
    model.sample(seen, query, seeds=seeds, **given)


def test_rounds_that_show_more_than_training_showed_are_refused():
    build("uva").with_sampling(decode_rounds=2)  # 29% of the places, and training showed up to 30%
    for rounds, shown, allows in ((3, "50%", "0.5"), (4, "62%", "0.38")):
        with pytest.raises(ValueError, match=rf"shows {shown} .* training at most 30% .*--model\.masked {allows} 1 in"):
            build("uva").with_sampling(decode_rounds=rounds)
        build("uva", masked=(float(allows), 1.0)).with_sampling(decode_rounds=rounds)
    build("uwm").with_sampling(decode_rounds=3)  # which has no rounds


# --- the world model's contract ---------------------------------------------------------------------------------------


def test_it_keeps_the_contract_of_a_world_model(model):
    assert isinstance(model, WorldModel)
    clip, seeds = clip_of(3, 3), torch.tensor([4, 9, 4])
    actions = torch.rand(3, 5, 2, 2) * 2 - 1
    state = model.observe(clip)
    kept = {name: x.clone() for name, x in state.tensors.items()}
    final, once = model.imagine(state, actions, seeds=seeds)
    assert once.latents["top"].shape == (3, 5, *clip.frames["top"].shape[2:]) and once.poses.shape == (3, 5, 2)
    assert all(torch.equal(state.tensors[name], x) for name, x in kept.items())
    middle, begun = model.imagine(state, actions[:, :2], seeds=seeds)
    again, rest = model.imagine(middle, actions[:, 2:], seeds=seeds)
    assert torch.allclose(torch.cat([begun.latents["top"], rest.latents["top"]], 1), once.latents["top"], atol=1e-5)
    assert torch.equal(again.tensors["frame"], final.tensors["frame"])
    order = torch.tensor([2, 0, 1, 1])
    _, forked = model.imagine(state.index(order), actions[order], seeds=seeds[order])
    assert torch.allclose(once.latents["top"][order], forked.latents["top"], atol=1e-4)
    _, other = model.imagine(state, actions, seeds=seeds + 1)
    assert not torch.allclose(once.latents["top"], other.latents["top"], atol=1e-3)
    _, free = model.imagine(state, None, seeds=seeds)
    assert free.latents["top"].shape[1] == 1


def test_frames_are_imagined_in_chunks_as_trained(model):
    chunked = model.with_sampling(chunk=F)
    assert chunked.spec.chunk == F and model.spec.chunk == 1
    state, actions = model.observe(clip_of(2, 1)), torch.rand(2, F, 2, 2)
    _, made = chunked.imagine(state, actions, seeds=torch.arange(2))
    query = model.sample(clip_of(2, 1), FORWARD, seeds=torch.arange(2), actions=actions)
    assert torch.allclose(made.latents["top"], query.latents["top"], atol=1e-5)
    with pytest.raises(SpecMismatch, match="whole chunks of 3 required, got 2"):
        chunked.imagine(state, actions[:, :2], seeds=torch.arange(2))


def test_frames_one_at_a_time_are_imagined_from_the_same_known_frame(model):
    """Up to `span` of them, by all blocks since; then from the last imagined one."""
    seen, actions, seeds = clip_of(2, 1), torch.rand(2, F + 1, 2, 2), torch.arange(2)
    _, made = model.imagine(model.observe(seen), actions, seeds=seeds)
    for i in range(F):
        whole = model.sample(seen, FORWARD.first(i + 1, F), seeds=seeds, actions=actions[:, : i + 1])
        assert torch.allclose(made.latents["top"][:, i], whole.latents["top"][:, i], atol=1e-5)
        assert torch.allclose(made.poses[:, i], whole.poses[:, i], atol=1e-5)
    short = model.with_sampling(span=1)
    state, one = short.imagine(short.observe(seen), actions[:, :1], seeds=seeds)
    assert torch.allclose(one.latents["top"][:, 0], made.latents["top"][:, 0], atol=1e-5)
    _, two = short.imagine(state, actions[:, 1:2], seeds=seeds)
    assert not torch.allclose(two.latents["top"][:, 0], made.latents["top"][:, 1], atol=1e-3)


def test_rows_of_a_dream_may_be_reset_apart(model):
    """Each begins its spans where it begins."""
    seen, actions, seeds = clip_of(2, 1), torch.rand(2, 5, 2, 2), torch.arange(2)
    start = model.observe(seen)
    state, _ = model.imagine(start, actions[:, :2], seeds=seeds)
    mixed = state.where(torch.tensor([False, True]), start)
    _, both = model.imagine(mixed, actions[:, 2:], seeds=seeds)
    _, going = model.imagine(state, actions[:, 2:], seeds=seeds)
    _, begun = model.imagine(start, actions[:, 2:], seeds=seeds)
    for row, alone in ((0, going), (1, begun)):
        assert torch.allclose(both.latents["top"][row], alone.latents["top"][row], atol=1e-5)


def test_a_dream_knows_the_arm_as_training_does(model):
    """Its motion, and to where commands have added up: of frames imagined and of the same frames seen."""
    seen, actions, seeds = clip_of(2, 1), torch.rand(2, 4, 2, 2), torch.arange(2)
    for chunked in (model, model.with_sampling(chunk=2)):
        state, made = chunked.imagine(chunked.observe(seen), actions, seeds=seeds)
        poses = torch.cat([seen.poses, made.poses], 1)
        frames = {c: torch.cat([z, made.latents[c]], 1) for c, z in seen.frames.items()}
        known = model.known(replace(seen, frames=frames, poses=poses, actions=actions))
        dreamt = Dreamt.of(state).known
        for name in ("motion", "aim", "poses", "count"):
            assert torch.allclose(getattr(dreamt, name).float(), getattr(known, name).float(), atol=1e-5), name
    lead = replace(clip_of(2, 4), lead=2, led=torch.tensor([2, 0]))
    known = model.known(lead)
    assert known.count.tolist() == [2, 2] and not known.aim[1].equal(known.aim[0])
    cut = replace(lead, lead=0, led=None, frames={c: z[1:, 2:] for c, z in lead.frames.items()},
                  poses=lead.poses[1:, 2:], actions=lead.actions[1:, 2:], instruction=lead.instruction[1:])  # fmt: skip
    assert torch.allclose(model.known(cut).aim[0], known.aim[1]) and torch.allclose(
        model.known(cut).motion[0], known.motion[1]
    )


def test_only_given_blocks_foretell_the_pose(model):
    known, tokens, blocks = model.known(clip_of(2, 1)), model.network.tokens, torch.rand(2, F, 4)
    roles = {name: QUERIES[name].at(F).rows(2) for name in QUERIES}
    for name, of in roles.items():
        foretold, told = tokens.foretold(known, blocks, of)
        stays = torch.allclose(foretold, known.poses[:, -1:].expand(-1, F, -1))
        assert stays == (name != "forward") and bool(told.all()) == (name == "forward")


def test_what_training_knows_of_a_start_is_what_a_dream_knows(model):
    """One frame seen: the rest of history is masked, whatever it holds."""
    clip = clip_of(2, 2)
    start = model.known(first(clip, 1))
    trained = replace(model.known(clip), count=torch.ones(2, dtype=torch.long))
    latest = {c: x.roll(1, 1) for c, x in trained.frames.items()}  # the first frame as the one that is now
    trained = replace(trained, frames=latest, poses=trained.poses.roll(1, 1))
    query, options = JOINT.at(F), {"seeds": torch.arange(2), "frame": torch.zeros(2, dtype=torch.long), "steps": 2}
    given = model.given(query, 2)
    with torch.no_grad():
        a, b = (model.network.sample(k, given, query.rows(2), Draw(**options)) for k in (start, trained))
    assert torch.allclose(a.frames["top"], b.frames["top"], atol=1e-5) and torch.allclose(
        a.actions, b.actions, atol=1e-5
    )


def test_an_untrained_model_repeats_the_frame_that_is_now():
    for design in ("uwm", "uva"):
        clip = clip_of(2, 2)
        made = build(design).eval().sample(clip, VIDEO, seeds=torch.arange(2))
        assert torch.allclose(made.latents["top"], clip.frames["top"][:, 1:].expand(-1, F, -1, -1, -1), atol=1e-4)
        assert torch.allclose(made.poses, clip.poses[:, 1:].expand(-1, F, -1), atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_unknown_actions_are_never_looked_at(model):
    clip, acted = clip_of(6, H + F), torch.tensor([True, False] * 3)
    wrong = clip.actions.clone()
    wrong[1::2] = float("nan")
    losses = [
        model.loss(replace(clip, actions=a), torch.Generator().manual_seed(5), acted=acted)[0]
        for a in (clip.actions, wrong)
    ]
    assert torch.isfinite(losses[0]) and torch.equal(*losses)
    none = torch.zeros(6, dtype=torch.bool)
    loss, metrics = model.loss(clip, torch.Generator().manual_seed(5), acted=none)
    assert float(metrics["action_error"]) == 0 and float(metrics["frame_error"]) > 0
    grads = torch.autograd.grad(loss, list(model.network.tokens.action.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_the_error_is_that_of_what_is_asked_for_alone():
    """An untrained UWM answers the frame that is now: its frame error is the mean square of the changes, whatever the batch holds."""
    model = build("uwm", shares={"forward": 1.0, "policy": 1.0}, history_levels=LevelDistribution(clean=1.0),
                  frame_levels=LevelDistribution(pure=1.0), history=1)  # fmt: skip
    clip = clip_of(400, 1 + F)
    metrics = model.loss(clip, torch.Generator().manual_seed(0))[1]
    spec = model.latent_spec
    std = torch.tensor(spec.std["top"])[:, None, None]
    change = ((clip.frames["top"][:, 1:] - clip.frames["top"][:, :1]) / std).square().mean((0, 2, 3, 4))
    # half of the rows ask for all F frames, the others for 1 to F alike
    asked = torch.tensor([0.5 + 0.5 * (F - i) / F for i in range(F)])
    expected = float((change * asked).sum() / asked.sum())
    assert float(metrics["frame_error"]) == pytest.approx(expected, rel=0.1)


FAST = {"uwm": (350, {"frame_levels": LevelDistribution(clean=0.1, pure=0.8, low=0.02)}), "uva": (150, {})}


def learn(design: str, *, cut: bool = False) -> VideoActionModel:
    steps, options = FAST[design]
    if cut:  # the action path: what a block says reaches nothing
        options = options | {"guess_width": 0}
    model = build(design, shares={"forward": 0.7, "inverse": 0.3}, **options)
    if cut:
        torch.nn.init.zeros_(model.network.tokens.action.weight)
        model.network.tokens.action.weight.requires_grad_(False)
    return fit(model, lambda step: clip_of(24, H + F, 1000 + step), steps=steps, lr=3e-3)


def followed(model: VideoActionModel) -> tuple[float, float, float]:
    """Mean distance of the imagined dot from where it went, from where negated actions would have sent it, and of staying."""
    clip, tokenizer = clip_of(64, 2 + F, 7), dot_tokenizer()
    seen, seeds = first(clip, 2), torch.arange(64)
    away = []
    for sign in (1, -1):
        made = model.sample(seen, FORWARD, seeds=seeds, actions=sign * clip.actions[:, 1:])
        away.append(float((locate(tokenizer.decode(made.latents)["top"]) - clip.poses[:, 2:]).norm(dim=-1).mean()))
    return *away, float((clip.poses[:, 1:2] - clip.poses[:, 2:]).norm(dim=-1).mean())


@pytest.mark.parametrize("design", ["uwm", "uva"])
def test_a_small_one_follows_actions(design):
    """In the dot world only actions decide the next frame. Where they take the dot is foretold, too."""
    model = learn(design)
    true, negated, still = followed(model)
    assert true < 0.75 * still and negated > 1.3 * still
    clip = clip_of(64, 2 + F, 7)
    blocks = model.action_normalizer.normalize(clip.actions[:, 1:]).flatten(2)
    foretold, _ = model.network.tokens.foretold(model.known(first(clip, 2)), blocks, FORWARD.at(F).rows(64))
    away = (model.pose_normalizer.denormalize(foretold) - clip.poses[:, 2:]).norm(dim=-1).mean()
    assert float(away) < 0.5 * still


def test_with_the_action_path_cut_it_cannot_follow():
    """The test above would fail of a model that is blind to its actions."""
    true, negated, still = followed(learn("uva", cut=True))
    assert true > 0.75 * still and negated < 1.3 * still and true == pytest.approx(negated, rel=0.02)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_errors_name_what_was_required_and_what_was_got(model):
    clip, seeds = clip_of(2, 2), torch.arange(2)
    with pytest.raises(SpecMismatch, match="3 given action blocks required, got 2"):
        model.sample(clip, FORWARD, seeds=seeds, actions=torch.zeros(2, 2, 2, 2))
    with pytest.raises(
        SpecMismatch, match=r"blocks of 2 control steps of 2 dimensions \(dx, dy\) required, got \(2, 3\)"
    ):
        model.sample(clip, FORWARD, seeds=seeds, actions=torch.zeros(2, 3, 2, 3))
    with pytest.raises(SpecMismatch, match="finite actions required, got NaN or infinity in 1 of 24"):
        actions = torch.zeros(2, 3, 2, 2)
        actions[0, 0, 0, 0] = float("nan")
        model.sample(clip, FORWARD, seeds=seeds, actions=actions)
    with pytest.raises(SpecMismatch, match=r"3 given frames of each camera \['top'\] required, got none"):
        model.sample(clip, INVERSE, seeds=seeds)
    with pytest.raises(SpecMismatch, match=r"3 given frames of each camera .* required, got {'top': 1}"):
        model.sample(clip, INVERSE, seeds=seeds, frames={"top": clip.frames["top"][:, :1]})
    with pytest.raises(SpecMismatch, match=r"cameras \['top'\] are required .* \['top'\] are missing"):
        model.sample(replace(clip, frames={}), POLICY, seeds=seeds)
    with pytest.raises(SpecMismatch, match="clips of 5 frames"):
        model.loss(clip)
    with pytest.raises(ValueError, match="chunk: from 1 to 3 frames"):
        model.with_sampling(chunk=4)
    sparse = build("uwm", targets="end")
    assert (
        sparse.sample(clip, INVERSE.first(1, F), seeds=seeds, frames={"top": clip.frames["top"][:, :1]}).actions.shape[
            1
        ]
        == 1
    )
    with pytest.raises(SpecMismatch, match=r"one coming frame at most is required .* got 3"):
        sparse.sample(clip, VIDEO, seeds=seeds)
    with pytest.raises(ValueError, match="chunk: 1 required with targets='end'"):
        sparse.with_sampling(chunk=2)
    narrow = LevelDistribution(clean=0.5, pure=0.5)
    with pytest.raises(ValueError, match=r"solver_steps=2 asks for level 0\.5, which training never shows"):
        VideoActionConfig(frame_levels=narrow, solver_steps=2)
    with pytest.raises(ValueError, match="shares: some of policy, forward, inverse, video, joint required, got plan"):
        VideoActionConfig(shares={"plan": 1.0})


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [JOINT, POLICY], ids=["joint", "policy"])
def test_guidance_reaches_the_sampler_row_by_row_and_a_slope_of_zero_moves_nothing(model, query):
    seen, seeds = first(clip_of(3, 2 + F), 2), torch.arange(3)

    def asked(score):
        return model.sample(seen, query, seeds=seeds, steps=8, guidance=Guidance(coefficient=0.3), score=score).actions

    free = model.sample(seen, query, seeds=seeds, steps=8).actions
    assert torch.equal(asked(torch.zeros_like), free)
    only_first = asked(lambda a: (0.5 - a) * torch.tensor([1.0, 0, 0])[:, None, None, None])
    assert torch.allclose(only_first[1:], free[1:], atol=1e-6) and not torch.allclose(only_first[0], free[0], atol=1e-3)


def test_guided_blocks_of_a_known_distribution_come_nearer_to_what_the_policy_wants():
    """In place of a network the exact denoiser of N(0, 0.5^2): the more guidance, the nearer; the last step is the model's own."""
    denoise, scale = gaussian_denoiser(linear_path, 0.0, 0.5), 2.0
    start, told = torch.randn(64, F, 4, generator=torch.Generator().manual_seed(0)), []

    def made(coefficient: float, steps: int = 8) -> torch.Tensor:
        def score(actions: torch.Tensor) -> torch.Tensor:
            told.append(actions.shape)
            return 1.0 - actions

        physical = lambda blocks: (scale * blocks).unflatten(2, (2, 2))  # noqa: E731
        steer = steering(physical, POLICY.at(F), Guidance(coefficient=coefficient), score, steps)
        return physical(sample_euler(lambda x, t: steer(denoise(x, t), t), start, solver_levels(steps), linear_path))

    distance = [float((made(c) - 1).abs().mean()) for c in (0.0, 0.1, 0.3, 1.0)]
    assert distance[0] > distance[1] > distance[2] > distance[3]
    assert len(told) == 4 * 7 and told[0] == (64, F, 2, 2)
    many = [float(made(0.3, steps).mean() - made(0.0, steps).mean()) for steps in (8, 64)]
    assert many[0] == pytest.approx(many[1], rel=0.25)  # however many steps


def test_guidance_without_actions_to_find_is_refused(model):
    clip = clip_of(2, 2 + F)
    with pytest.raises(SpecMismatch, match="asks for action blocks is required by guidance"):
        model.sample(first(clip, 2), VIDEO, seeds=torch.arange(2), guidance=Guidance(), score=torch.zeros_like)
