"""Inverse models on the dot world, and their audit: the honest ones pass, the cheats are found out by name."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import SPEC, K, dot_clip, draw, locate, move
from worldline.checkpoint import to_json
from worldline.data import RobustNormalizer
from worldline.errors import CheckpointError, SpecMismatch, WorldlineError
from worldline.policies import EncoderConfig
from worldline.rl_in_imagination.inverse import InverseConfig, InverseModel, window_rows
from worldline.rl_in_imagination.inverse_agreement import Reading, agreement_of, calibrate, r_squared, skill
from worldline.rl_in_imagination.inverse_audit import (
    AuditThresholds,
    InverseClip,
    audit_inverse,
    calibrate_inverse,
    check_inverse,
)
from worldline.rl_in_imagination.inverse_networks import TokenConfig
from worldline.rl_in_imagination.spoiled import SPOILED, keep_ends
from worldline.tokenizers import PixelPatches
from worldline.types import CameraSpec

NORMALIZER = RobustNormalizer(low=(-1.0, -1.0), high=(1.0, 1.0))
KINDS = {"exact", "single_frame", "wrong_action", *SPOILED}


def small(**options) -> InverseConfig:
    """Networks that a test can afford."""
    return InverseConfig(
        **{
            "hidden": 64,
            "shift": 0,
            "encoder": EncoderConfig(channels=(8, 16), features=16, shift=0),
            "tokens": TokenConfig(width=32, depth=1, heads=2, patch=4),
        }
        | options
    )


def episodes(count: int, seed: int = 0, frames: int = 12) -> list[InverseClip]:
    """Walks with the walls out of reach, so that every action can be seen."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(count):
        trend = 0.9 * torch.rand(2, generator=generator) - 0.45
        actions = (0.6 * torch.randn(frames - 1, K, 2, generator=generator) + trend).clamp(-1, 1)
        clips.append(walk(actions, torch.tensor([[0.5, 0.5]])))
    return clips


def walk(actions: Tensor, position: Tensor) -> InverseClip:
    positions = [position]
    for block in actions:
        positions.append(move(positions[-1], block[None]))
    return InverseClip(frames={"top": draw(torch.cat(positions))}, actions=actions)


class Reads(nn.Module):
    """A network that computes its answer by `answer(windows "n w c h w") -> "n 2"` (normalised mean, certain of it)."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.none = answer, nn.Parameter(torch.zeros(1))

    def forward(self, frames: dict[str, Tensor]) -> Tensor:
        mean = self.answer(frames["top"])
        return torch.stack([mean, torch.full_like(mean, -6.0)], -1).flatten(1)

    def along(self, frames: dict[str, Tensor], rows: Tensor) -> Tensor:
        windows = frames["top"][:, rows].flatten(0, 1)
        return self({"top": windows}).unflatten(0, (-1, len(rows)))


def stub(answer) -> InverseModel:
    """An inverse model of window 2 that answers so."""
    model = InverseModel(small(window=2), SPEC, NORMALIZER).eval()
    model.network = Reads(answer)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def honest(windows: Tensor) -> Tensor:
    """Reads the motion, 0.06 a unit of action and control step, where it sees a sharp dot."""
    sharp = (windows.flatten(2).amax(2) > 200).all(1)
    return (locate(windows[:, 1]) - locate(windows[:, 0])) / (0.06 * K) * sharp[:, None]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_windows_lie_around_the_transition_and_repeat_the_edges(window: int) -> None:
    rows = window_rows(6, window)
    before = small(window=window).before
    assert rows.shape == (5, window)
    assert torch.equal(rows[:, before], torch.arange(5)) and torch.equal(rows[:, before + 1], torch.arange(1, 6))
    assert rows.min() == 0 and rows.max() == 5 and bool((rows.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("architecture", ["conv", "transformer"])
@pytest.mark.parametrize("head", ["continuous", "binned"])
def test_a_clip_is_read_as_its_windows_are_and_rows_are_independent(architecture, head) -> None:
    torch.manual_seed(0)
    model = InverseModel(small(architecture=architecture, head=head), SPEC, NORMALIZER).eval()
    video = dot_clip(3, 7, 0).frames
    whole = model.along(video)
    windows = {"top": video["top"][:, window_rows(7, 4)].flatten(0, 1)}
    torch.testing.assert_close(whole.flatten(0, 1), model.predict(windows), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole[1:2], model.along({"top": video["top"][1:2]}), atol=1e-5, rtol=1e-4)
    assert model.blocks(video).shape == (3, 6, K, 2) and whole.shape == (3, 6, 2)


@pytest.mark.parametrize("head", ["continuous", "binned"])
def test_all_steps_of_a_block_and_two_cameras_of_different_sizes(head, tmp_path) -> None:
    spec = replace(SPEC, cameras=(*SPEC.cameras, CameraSpec(name="side", height=24, width=40)))
    model = InverseModel(small(target="all", head=head, architecture="transformer"), spec, NORMALIZER)
    video = {**dot_clip(2, 5, 0).frames, "side": torch.randint(0, 256, (2, 5, 3, 24, 40), dtype=torch.uint8)}
    assert model.read_along(video).value.shape == (2, 4, K, 2)
    loss = model.loss({c: x[:, :4] for c, x in video.items()}, torch.rand(2, K, 2))
    assert loss.isfinite() and loss.requires_grad
    model.save_pretrained(tmp_path / "idm")
    loaded = InverseModel.from_pretrained(tmp_path / "idm")
    assert loaded.name == model.name and loaded.config == model.config and loaded.calibration is None
    assert torch.equal(loaded.along(video), model.eval().along(video))


def test_a_dimension_that_never_changed_is_named_and_read_as_what_it_was() -> None:
    names, ones = ("dx", "dy", "grip"), (1.0, 1.0, 1.0)
    action = replace(SPEC.action, names=names, low=(-1.0, -1.0, -1.0), high=ones)
    model = InverseModel(
        small(), replace(SPEC, action=action), RobustNormalizer(low=(-1.0, -1.0, 0.5), high=(1.0, 1.0, 0.5))
    )
    assert model.constant == ("grip",)
    clips = episodes(3)
    assert torch.equal(model.eval().along({"top": clips[0].frames["top"][None]})[..., 2], torch.full((1, 11), 0.5))
    grips = [replace(c, actions=torch.cat([c.actions, torch.full((11, K, 1), 0.5)], -1)) for c in clips]
    calibration = calibrate_inverse(model, grips).calibrated_by()
    assert calibration.weight[2] == 0 and "grip: never changes in the training data" in calibration.left_out


def test_what_does_not_fit_is_named() -> None:
    model = InverseModel(small(), SPEC, NORMALIZER).eval()
    video = dot_clip(2, 5, 0).frames
    with pytest.raises(SpecMismatch, match=r"camera top: shape \(n, \(4, 3, 16, 16\)\) required, got \(5, 3, 16, 16\)"):
        model.predict(video)
    with pytest.raises(SpecMismatch, match=r"frames of camera top: .* got none"):
        model.along({"side": video["top"]})
    with pytest.raises(SpecMismatch, match=r"got \(5, 3, 8, 16\)"):
        model.along({"top": video["top"][..., :8, :]})
    with pytest.raises(SpecMismatch, match="at least 2"):
        model.along({"top": video["top"][:, :1]})
    with pytest.raises(WorldlineError, match="calibrated on held-out clips is required"):
        model.agreement(video, torch.zeros(2, 4, K, 2))
    ready = calibrate_inverse(model, episodes(2))
    with pytest.raises(SpecMismatch, match=r"action blocks \(2, 4, 2, 2\) .* got \(2, 3, 2, 2\)"):
        ready.agreement(video, torch.zeros(2, 3, K, 2))
    for wrong, said in (
        ({"window": 1}, "2 to 8 frames required, got 1"),
        ({"bins": 2}, "bins >= 3"),
        ({"encoder": EncoderConfig(window=2, shift=0)}, "encoder.window 1 and encoder.shift 0 required"),
    ):
        with pytest.raises(ValueError, match=said):
            InverseConfig(**wrong)
    with pytest.raises(ValueError, match="patch: 2, 4 or 8 required"):
        TokenConfig(patch=3)


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_is_one_for_perfect_readings_and_falls_with_the_error() -> None:
    commanded = torch.randn(500, 1, 2, generator=torch.Generator().manual_seed(0))
    perfect = Reading(value=commanded, std=torch.ones_like(commanded))
    known = calibrate(perfect, commanded, ("dx", "dy"))
    assert torch.allclose(known.agreement(perfect, commanded), torch.ones(500))
    off = replace(perfect, value=commanded + torch.tensor(known.tolerance))
    assert torch.allclose(known.agreement(off, commanded), torch.full((500,), 0.6065), atol=1e-3)
    assert skill(1.0, known.chance) == 1 and skill(known.chance, known.chance) == 0 and known.r2 == (1.0, 1.0)


@pytest.mark.parametrize(
    ("r2", "agreement", "chance", "on_scale"),
    [(0.95, 0.87, 0.37, 0.80), (0.75, 0.77, 0.51, 0.52), (0.5, 0.65, 0.51, 0.27)],
)
def test_the_scale_of_skill_is_what_the_documentation_says(r2, agreement, chance, on_scale) -> None:
    generator = torch.Generator().manual_seed(0)
    read = r2**0.5 * torch.randn(20000, 1, 1, generator=generator)
    commanded = read + (1 - r2) ** 0.5 * torch.randn(20000, 1, 1, generator=generator)
    reading = Reading(value=read, std=torch.ones_like(read))
    known = calibrate(reading, commanded, ("dx",))
    found = float(known.agreement(reading, commanded).mean())
    assert found == pytest.approx(agreement, abs=0.02) and known.chance == pytest.approx(chance, abs=0.02)
    assert skill(found, known.chance) == pytest.approx(on_scale, abs=0.02)


def test_binned_agreement_is_the_probability_near_the_command() -> None:
    levels = torch.linspace(-1, 1, 5).expand(1, 5).contiguous()
    probability = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]).view(1, 1, 1, 5)
    reading = Reading(value=torch.zeros(1, 1, 1), std=torch.ones(1, 1, 1), levels=levels, probability=probability)
    for commanded, wanted in ((0.0, 0.8), (1.0, 0.3), (0.2, 0.6), (9.0, 0.0)):
        got = agreement_of(reading, torch.full((1, 1, 1), commanded), torch.tensor([0.5]))
        assert float(got) == pytest.approx(wanted), commanded


def test_dimensions_that_cannot_be_read_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    commanded = torch.randn(300, 1, 3, generator=generator)
    commanded[..., 2] = 1.0
    read = torch.stack([commanded[..., 0], torch.randn(300, 1, generator=generator), commanded[..., 2]], -1)
    known = calibrate(Reading(value=read, std=torch.ones_like(read)), commanded, ("dx", "dy", "grip"))
    assert known.weight == (1.0, 0.0, 0.0)
    assert [text.split(",")[0].split(":")[0] for text in known.left_out] == ["dy", "grip"]
    assert "never changes in the held-out" in known.left_out[1]
    assert r_squared(commanded, commanded)[2] == -torch.inf


# --- the audit --------------------------------------------------------------------------------------------------------


def test_an_honest_reader_passes_through_a_lossless_tokenizer_too() -> None:
    clips = episodes(8)
    model = calibrate_inverse(stub(honest), clips)
    tokenizer = PixelPatches(SPEC.cameras, size=4)
    found = audit_inverse(model, clips, tokenizer=tokenizer)
    assert (
        found.failures == ()
        and found["exact"].skill > 0.9
        and found["tokenizer"] == replace(found["exact"], kind="tokenizer")
    )
    assert {score.kind for score in found.scores} == KINDS | {"tokenizer"}
    assert all(s.agreement_low <= s.agreement <= s.agreement_high for s in found.scores)
    assert found["static"].skill < 0.1 and found["reversed"].skill < 0 and found["wrong_action"].skill < 0
    assert found.tokenizer == tokenizer.fingerprint and (found.episodes, found.transitions) == (8, 88)


def follow(position: Tensor) -> Tensor:
    """A policy that acts by where it is: what it does can be told from one frame."""
    return torch.cat([(4 * (0.5 - position[:, 1:])), 4 * (position[:, :1] - 0.5)], 1).clamp(-1, 1)


def circles(count: int) -> list[InverseClip]:
    """Episodes of `follow`."""
    generator, clips = torch.Generator().manual_seed(0), []
    for _ in range(count):
        position = 0.5 + (torch.rand(1, 2, generator=generator) - 0.5) * 0.5
        start, actions = position, []
        for _ in range(15):
            actions.append(follow(position)[:, None].expand(1, K, 2))
            position = move(position, actions[-1])
        clips.append(walk(torch.cat(actions), start))
    return clips


def test_a_reader_of_single_frames_is_found_out_even_where_the_policy_gives_it_the_answer() -> None:
    clips = circles(8)
    cheat = calibrate_inverse(stub(lambda windows: follow(locate(windows[:, 0]))), clips)
    found = audit_inverse(cheat, clips)
    assert found["exact"].skill > 0.9, "on real clips nothing shows"
    assert any(text.startswith("single_frame: a skill of at most 0.2 is required, got ") for text in found.failures)
    assert audit_inverse(calibrate_inverse(stub(honest), clips), clips).failures == ()


def test_a_reader_of_the_first_frame_alone_fails_on_every_kind_that_keeps_it() -> None:
    generator, clips = torch.Generator().manual_seed(0), []
    for i in range(8):  # the starting place says which way all of the episode goes
        side = 1.0 if i % 2 else -1.0
        noise = 0.1 * torch.randn(9, K, 2, generator=generator)
        clips.append(walk(torch.tensor([0.5 * side, 0.4 * side]) + noise, torch.tensor([[0.5 - 0.35 * side, 0.5]])))

    class Leak(Reads):
        def along(self, frames: dict[str, Tensor], rows: Tensor) -> Tensor:
            side = torch.where(locate(frames["top"][:, 0])[:, 0] < 0.5, 1.0, -1.0)
            mean = torch.stack([0.5 * side, 0.4 * side], -1)
            out = torch.stack([mean, torch.full_like(mean, -6.0)], -1).flatten(1)
            return out[:, None].expand(-1, len(rows), -1)

    model = stub(honest)
    model.network = Leak(honest)  # pyright: ignore[reportAttributeAccessIssue]
    found = audit_inverse(calibrate_inverse(model, clips), clips)
    failed = {text.split(":")[0] for text in found.failures}
    assert {"static", "ends"} <= failed and "wrong_action" not in failed and "exact" not in failed


def test_a_reader_that_knows_nothing_fails_on_exact_clips() -> None:
    clips = episodes(6)
    blind = calibrate_inverse(stub(lambda windows: torch.zeros(len(windows), 2)), clips)
    assert (
        blind.calibrated_by().chance == 0
        and float(blind.agreement({"top": clips[0].frames["top"][None]}, clips[0].actions[None]).max()) == 0
    )
    (said,) = audit_inverse(blind, clips).failures
    assert said.startswith("no action dimension can be read (dx: cannot be read, R2")
    noisy = calibrate_inverse(stub(lambda w: honest(w) + 0.3 * torch.randn(len(w), 2)), clips)
    assert any(
        text.startswith("exact: a skill of at least 0.5 is required") for text in audit_inverse(noisy, clips).failures
    )


def test_episodes_that_act_alike_cannot_give_wrong_actions() -> None:
    actions = episodes(1)[0].actions
    clips = [walk(actions + 0.01 * i, torch.tensor([[0.5, 0.5]])) for i in range(3)]
    model = calibrate_inverse(stub(honest), clips)
    (said,) = audit_inverse(model, clips).failures
    assert said.startswith("wrong_action: held-out episodes that act otherwise are required")
    assert audit_inverse(model, clips, others=episodes(4, seed=5)).failures == ()
    with pytest.raises(WorldlineError, match="at least 2 held-out episodes required to audit an inverse model, got 1"):
        audit_inverse(model, clips[:1])
    with pytest.raises(ValueError, match=r"audit.bad < audit.exact < 1 required, got 0.6 and 0.5"):
        AuditThresholds(bad=0.6)


def test_a_model_that_failed_is_refused_unless_told_otherwise(tmp_path) -> None:
    clips = circles(6)
    for name, answer in (("good", honest), ("cheat", lambda windows: follow(locate(windows[:, 0])))):
        found = audit_inverse(calibrate_inverse(stub(answer), clips), clips)
        provenance = {"audit": to_json(found)}
        InverseModel(small(), SPEC, NORMALIZER).save_pretrained(tmp_path / name, provenance=provenance)
    InverseModel(small(), SPEC, NORMALIZER).save_pretrained(tmp_path / "none")
    assert check_inverse(tmp_path / "good") == []
    with pytest.raises(
        WorldlineError, match=r"passed its audit is required.*single_frame: .* at most 0.2 .*--override-audit"
    ):
        check_inverse(tmp_path / "cheat")
    assert check_inverse(tmp_path / "cheat", override=True)
    with pytest.raises(WorldlineError, match="no audit: it takes two held-out episodes"):
        check_inverse(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no folder"):
        check_inverse(tmp_path / "nowhere")


def test_an_audit_vouches_for_its_own_tokenizer_and_not_by_lax_thresholds(tmp_path) -> None:
    """A model that was never tried on decoded frames, or passed because next to nothing was asked, is as good as one that failed."""
    found = audit_inverse(calibrate_inverse(stub(honest), circles(6)), circles(6))
    audits = {
        "plain": found,
        "through": replace(found, tokenizer="feed"),
        "lax": replace(found, thresholds=AuditThresholds(exact=0.3)),
        "kind": replace(found, thresholds=AuditThresholds(bad=0.4)),
        "strict": replace(found, thresholds=AuditThresholds(exact=0.6, bad=0.1)),
    }
    for name, audit in audits.items():
        provenance = {"audit": to_json(audit)}
        InverseModel(small(), SPEC, NORMALIZER).save_pretrained(tmp_path / name, provenance=provenance)
    assert check_inverse(tmp_path / "plain") == check_inverse(tmp_path / "strict") == []  # of real video
    assert check_inverse(tmp_path / "through", tokenizer="feed") == []
    with pytest.raises(WorldlineError, match=r"the world model's tokenizer feed is required, it was through none"):
        check_inverse(tmp_path / "plain", tokenizer="feed")
    with pytest.raises(WorldlineError, match=r"tokenizer beef is required, it was through feed"):
        check_inverse(tmp_path / "through", tokenizer="beef")
    for name, numbers in (("lax", "0.3 and 0.2"), ("kind", "0.5 and 0.4")):
        with pytest.raises(
            WorldlineError, match=rf"at least 0.5 .* at most 0.2 .* is required, it was audited by {numbers}"
        ):
            check_inverse(tmp_path / name)
        assert len(check_inverse(tmp_path / name, override=True)) == 1


def test_spoiled_clips_are_what_they_say() -> None:
    frames = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    firsts = {name: spoil(frames)[:, 0, 0, 0].tolist() for name, spoil in SPOILED.items()}
    assert (
        firsts["static"] == [0] * 6
        and firsts["reversed"] == [5, 4, 3, 2, 1, 0]
        and firsts["ends"] == [0, 0, 0, 5, 5, 5]
    )
    assert sorted(firsts["shuffled"]) == list(range(6)) != firsts["shuffled"]
    assert keep_ends(frames[:5])[:, 0, 0, 0].tolist() == [0, 0, 4, 4, 4]
