"""The refinement stage in the exact dot world: it gets better, goes on bit for bit, stops by its check, and touches nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.oracles import SPEC, DotScorer, ExactDotWorldModel, dot_tokenizer, locate
from tests.policies.dots import small_policy
from worldline.checkpoint import read_tensors
from worldline.errors import CheckpointError, PolicyError, SpecMismatch, WorldlineError
from worldline.eval.replays import Replays, load_starts
from worldline.policies import SteeredPolicy, load_policy
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.ppo import PPOConfig
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer, audit_failures, check_scorer
from worldline.trainers import refinement
from worldline.trainers.refinement import (
    Judges,
    Refinement,
    RefineSettings,
    best_of,
    claim,
    load_actor,
    refine,
    smoothed,
)
from worldline.types import Score

SETTINGS = RefineSettings(
    iterations=6,
    rows=16,
    frames=13,
    critic_first=1,
    check_every=2,
    check_episodes=32,
    least_std=0.3,
    ppo=PPOConfig(lr=1e-3, critic_lr=2e-3, kl=0.0, discount=0.9, target_kl=0.2, minibatch=64),
)
IDENTITY = {"policy": "p"}


@pytest.fixture(scope="module")
def judges() -> Judges:
    tokenizer = dot_tokenizer()
    return Judges(dream=Dream(ExactDotWorldModel(tokenizer), tokenizer), scorer=DotScorer(), threshold=0.5)


@pytest.fixture(scope="module")
def held_out(dots: Path, judges: Judges) -> Replays:
    return load_starts((dots,), "held-out", judges.dream, frames=None)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy, out = small_policy("bc"), tmp_path_factory.mktemp("policy") / "bc"
    with torch.no_grad():
        policy.head.net[-1].bias.add_(torch.tensor([0.25, 0.0] * 2))
        policy.head.log_std.fill_(-3.0)
    policy.save_pretrained(out)
    return out


def run(
    judges: Judges, held_out: Replays, dots: Path, policy: Path, out: Path, *, second: Judges | None = None, **changes
) -> Refinement:
    settings = replace(SETTINGS, **changes)
    actor = load_actor(policy, SPEC, least_std=settings.least_std)
    claim(out, settings, IDENTITY)
    starts = load_starts((dots,), "train", judges.dream).first
    options = {"provenance": {"from": "test"}, "progress": False}
    return refine(actor, judges, starts, held_out, settings, out, second=second, **options)


@pytest.fixture(scope="module")
def whole(judges: Judges, held_out: Replays, dots: Path, cloned: Path, tmp_path_factory) -> tuple[Path, Refinement]:
    out = tmp_path_factory.mktemp("refined") / "whole"
    return out, run(judges, held_out, dots, cloned, out, iterations=16)


def test_it_gets_better_where_it_has_not_trained(whole: tuple[Path, Refinement]) -> None:
    out, found = whole
    assert [int(c["iteration"]) for c in found.checks] == list(range(0, 2 * len(found.checks), 2))
    assert found.checks[0]["success"] < 0.5 < 0.9 < max(c["success"] for c in found.checks)
    assert found.checks[0]["real_kl"] == 0 and found.checks[-1]["real_kl"] > 0
    assert "kl" not in found.history[0] and "kl" in found.history[1]  # the critic alone, then both
    published, best = (
        load_policy(str(out), spec=SPEC),
        load_policy(str(out / "checked" / f"{found.best:04d}"), spec=SPEC),
    )
    assert all(torch.equal(a, b) for a, b in zip(published.state_dict().values(), best.state_dict().values()))


def test_a_killed_refinement_goes_on_bit_for_bit(
    whole: tuple[Path, Refinement], judges, held_out, dots, cloned, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "again"
    run(judges, held_out, dots, cloned, out, iterations=4)
    calls, collect = [], refinement.collect

    def killed(*args, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return collect(*args, **options)

    monkeypatch.setattr(refinement, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        run(judges, held_out, dots, cloned, out, iterations=16)
    monkeypatch.setattr(refinement, "collect", collect)
    found = run(judges, held_out, dots, cloned, out, iterations=16)
    assert found.checks == whole[1].checks and str(found.history) == str(whole[1].history)
    states = [read_tensors(folder / "training" / "state.safetensors") for folder in (whole[0], out)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_it_stops_when_checks_bring_nothing_better(judges, held_out, dots, cloned, tmp_path) -> None:
    still = replace(SETTINGS.ppo, lr=1e-12)
    found = run(judges, held_out, dots, cloned, tmp_path / "still", iterations=50, check_every=1, ppo=still)
    assert len(found.checks) <= 4 + 3 and found.stopped.startswith("3 checks brought nothing better than iteration")
    assert best_of([{"iteration": 0.0, "success": 0.5}, {"iteration": 5.0, "success": 0.5}]) == 0


def test_a_lucky_check_is_not_what_is_published() -> None:
    """The checks of a real refinement (soccer-v3): one of 64 dreams stands out, those around it do not."""
    checks = [{"iteration": 5.0 * i, "success": s} for i, s in enumerate((0.45, 0.48, 0.69, 0.59, 0.59, 0.59))]
    assert smoothed(checks) == pytest.approx([0.46, 0.525, 0.6125, 0.615, 0.59, 0.59])
    assert best_of(checks) == 15
    assert smoothed(checks[:1]) == [0.45]


class LeakyScorer(DotScorer):
    """Pays at the bottom left, away from the goal: a weak spot of one dream."""

    name = "leaky"

    def step(self, state, observation, action):
        state, _ = super().step(state, observation, action)
        x, y = locate(observation.images["top"]).T
        paid = ((x < 0.5) & (y > 0.8)).float()
        return state, Score(reward=paid, success=paid)


def test_a_second_opinion_does_not_publish_what_one_dream_alone_calls_better(
    judges: Judges, held_out: Replays, dots: Path, tmp_path: Path
) -> None:
    policy, leaky = small_policy("bc"), replace(judges, scorer=LeakyScorer())
    with torch.no_grad():
        policy.head.net[-1].bias.add_(torch.tensor([0.5, 0.0] * 2))  # goes right, far enough
    policy.save_pretrained(tmp_path / "bc")
    settings = {"iterations": 16, "ppo": replace(SETTINGS.ppo, lr=3e-3)}
    alone = run(leaky, held_out, dots, tmp_path / "bc", tmp_path / "alone", **settings)
    asked = run(leaky, held_out, dots, tmp_path / "bc", tmp_path / "asked", second=judges, **settings)
    own = [c["success"] for c in asked.checks]
    assert own == [c["success"] for c in alone.checks][: len(own)]  # who decides changes nothing in the learning
    assert set(asked.fingerprints) > set(alone.fingerprints)  # the second is proven frozen, too
    told = {}
    for name in ("alone", "asked"):
        published = load_policy(str(tmp_path / name), spec=SPEC)
        told[name] = [refinement.imagined(published, j, held_out, SETTINGS)["success"] for j in (leaky, judges)]
    assert told["alone"][0] > told["asked"][0] + 0.3 and told["alone"][1] < told["asked"][1] - 0.3, told
    assert len(asked.checks) < len(alone.checks)


def test_other_settings_are_refused_and_more_iterations_are_not(judges, held_out, dots, cloned, tmp_path) -> None:
    run(judges, held_out, dots, cloned, tmp_path / "r", iterations=1)
    with pytest.raises(CheckpointError, match=r"holds a run with other settings:\n  settings\.\w+"):
        run(judges, held_out, dots, cloned, tmp_path / "r", iterations=1, rows=8)
    assert len(run(judges, held_out, dots, cloned, tmp_path / "r", iterations=2).history) == 2


def test_exploration_has_a_floor_and_a_ceiling(cloned) -> None:
    std = load_actor(cloned, SPEC, least_std=0.3).head.distribution(torch.zeros(1, 34)).base_dist.stddev
    assert torch.allclose(std, torch.full_like(std, 0.3))
    wide = small_policy("bc")
    with torch.no_grad():
        wide.head.log_std.fill_(2.0)
    assert torch.equal(wide.head.distribution(torch.zeros(1, 34)).base_dist.stddev, torch.ones(1, 4))


def test_a_diffusion_policy_is_steered(judges, held_out, dots, tmp_path) -> None:
    small_policy("diffusion").save_pretrained(tmp_path / "d")
    actor = load_actor(tmp_path / "d", SPEC, least_std=0.1)
    assert isinstance(actor, SteeredPolicy)
    run(judges, held_out, dots, tmp_path / "d", tmp_path / "out", iterations=2, critic_first=0)
    again = load_actor(tmp_path / "out", SPEC, least_std=0.1)  # and a steered one goes on as it is
    assert isinstance(again, SteeredPolicy)


@pytest.mark.parametrize("kind", ["bc", "diffusion"])
def test_a_policy_is_refined_on_the_gpu_where_there_is_one(kind, tmp_path, monkeypatch) -> None:
    small_policy(kind).save_pretrained(tmp_path / "p")
    sent = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *to, **_: sent.append((module, *to)) or module)
    actor = load_actor(tmp_path / "p", SPEC, least_std=0.1)
    assert sent[-1] == (actor, "cuda")  # with what steers it, before an optimiser is made of its weights


def test_a_world_model_that_changes_is_an_error(held_out, dots, cloned, tmp_path) -> None:
    tokenizer = dot_tokenizer()
    scorer = SuccessScorer(SuccessConfig(), SPEC)
    judges = Judges(dream=Dream(ExactDotWorldModel(tokenizer), tokenizer), scorer=scorer, threshold=0.5)
    actor = load_actor(cloned, SPEC, least_std=0.3)
    starts = load_starts((dots,), "train", judges.dream).first
    step = scorer.step

    def meddle(*args):
        with torch.no_grad():
            scorer.head[0].bias.add_(1e-3)
        return step(*args)

    scorer.step = meddle
    settings = replace(SETTINGS, iterations=1)
    claim(tmp_path / "m", settings, IDENTITY)
    with pytest.raises(WorldlineError, match="the world model, tokenizer and scorer must stay as they were"):
        refine(actor, judges, starts, held_out, settings, tmp_path / "m", provenance={}, progress=False)


def test_what_does_not_fit_is_named(dots, tmp_path) -> None:
    policy = small_policy("bc")
    policy.spec = replace(SPEC, action=replace(SPEC.action, kind="absolute"))
    policy.save_pretrained(tmp_path / "absolute")
    with pytest.raises(SpecMismatch, match="absolute"):
        load_actor(tmp_path / "absolute", SPEC, least_std=0.1)
    other = replace(SPEC, cameras=(replace(SPEC.cameras[0], height=32),))
    world = ExactDotWorldModel(dot_tokenizer())
    dream = Dream(world, dot_tokenizer())
    dream.spec = other
    with pytest.raises(SpecMismatch, match=r"and world model do not fit:\n  camera top"):
        load_starts((dots,), "train", dream)
    with pytest.raises(PolicyError, match=r"is required to be refined, got CallablePolicy"):
        refinement.require_actor(load_policy("tests.oracles:draw", spec=SPEC), SPEC)


def test_a_scorer_that_failed_its_audit_is_refused(tmp_path) -> None:
    good = {"episodes": 9.0, "exact": 1.0, "static": 0.0, "blurred": 0.1, "first_quarter": 0.0}
    for name, provenance in (
        ("fooled", {"audit": good | {"static": 0.5}}),
        ("blind", {"audit": good | {"exact": 0.1}}),
        ("unknown", {}),
    ):
        SuccessScorer(SuccessConfig(), SPEC).save_pretrained(tmp_path / name, provenance=provenance)
        with pytest.raises(WorldlineError, match=r"a scorer that passed its audit is required.*--override-audit"):
            check_scorer(tmp_path / name, override=False)
        assert len(check_scorer(tmp_path / name, override=True)) == 1
    assert audit_failures({"audit": good}) == []
    for wrong, said in (
        ({"rows": 0}, "rows must be"),
        ({"least_std": 2.0}, "least_std above 0"),
        ({"rows": 12, "ppo": PPOConfig(algorithm="grpo")}, "whole groups of 8"),
    ):
        with pytest.raises(ValueError, match=said):
            RefineSettings(**wrong)
