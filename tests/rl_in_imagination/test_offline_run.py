"""The offline loop: data made anew from the policies as they are, a killed run that goes on bit for bit, and what stops it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.rl_in_imagination.integrator import SPEC, record, step, true_return
from worldline.checkpoint import load_config
from worldline.data.trajectories import low_dimensional
from worldline.errors import CheckpointError, SpecMismatch, WorldlineError
from worldline.policies import load_policy
from worldline.policies.states import StatePolicies
from worldline.rl_in_imagination.offline import (
    AgentConfig,
    OfflineConfig,
    OfflineRun,
    StateIQLConfig,
    SyntheticTables,
    TD3BCConfig,
    train_offline,
)
from worldline.types import CameraSpec

TD3 = TD3BCConfig(hidden=(16, 16), actor_lr=1e-3, critic_lr=1e-3)
IQL = StateIQLConfig(hidden=(16, 16))
CONFIG = OfflineConfig(
    updates=40, batch_size=32, synthetic=24, synthesise_every=15, evaluate_every=10, save_every=10, log_every=5
)
SEEDS = (4, 11)


class Killed(Exception):
    pass


def rehearse(policies: StatePolicies, update: int) -> SyntheticTables:
    """On-policy steps in the exact world; each member's own."""
    generator = torch.Generator().manual_seed(update)
    seen = (2 * torch.rand(100, 2, generator=generator) - 1).expand(policies.members, -1, -1).contiguous()
    done = policies.act(seen)
    after, rewards = step(seen, done)
    ended = torch.zeros_like(rewards, dtype=torch.bool)
    return SyntheticTables(observations=seen, actions=done, rewards=rewards, next_observations=after, terminated=ended)


def killed_at(update: int) -> Callable[[StatePolicies, int], dict[str, Tensor]]:
    def evaluate(policies: StatePolicies, now: int) -> dict[str, Tensor]:
        if now == update:
            raise Killed
        return true_return(policies)

    return evaluate


def run(agent: AgentConfig = TD3, config: OfflineConfig = CONFIG, **options) -> OfflineRun:
    options = {"seeds": SEEDS, "synthesise": rehearse, "evaluate": true_return, "progress": False} | options
    return train_offline(record(10, 0), agent, config, **options)


def same(a: OfflineRun, b: OfflineRun) -> None:
    for (name, x), (_, y) in zip(a.policies.state_dict().items(), b.policies.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    assert a.history.keys() == b.history.keys()
    for name, points in a.history.items():
        assert [at for at, _ in points] == [at for at, _ in b.history[name]], name
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(points, b.history[name])), name


@pytest.mark.parametrize("agent", [TD3, IQL], ids=["td3+bc", "iql"])
@pytest.mark.parametrize("when", [10, 20, 40])
def test_a_killed_run_goes_on_bit_for_bit(agent: AgentConfig, when: int, tmp_path: Path) -> None:
    whole = run(agent)
    with pytest.raises(Killed):
        run(agent, out=tmp_path, evaluate=killed_at(when))
    same(run(agent, out=tmp_path), whole)
    same(run(agent, out=tmp_path), whole)  # and once finished, it is there


def test_no_point_of_a_curve_is_missing_where_a_run_goes_on_between_two(tmp_path: Path) -> None:
    """Saved at 9, noted at 10: the policy learns in every second update, and had learned last in the one before the save."""
    config = replace(CONFIG, save_every=9, log_every=10)
    whole = run(config=config)
    assert [at for at, _ in whole.history["train/policy_loss"]] == [10, 20, 30, 40]
    with pytest.raises(Killed):
        run(config=config, out=tmp_path, evaluate=killed_at(10))
    same(run(config=config, out=tmp_path), whole)


def test_data_is_made_anew_from_the_policies_as_they_are() -> None:
    asked: list[tuple[int, Tensor]] = []

    def watch(policies: StatePolicies, update: int) -> SyntheticTables:
        asked.append((update, policies.net.weights[0].detach().clone()))
        return rehearse(policies, update)

    trained = run(synthesise=watch)
    assert [update for update, _ in asked] == [0, 15, 30]
    assert not torch.equal(asked[0][1], asked[1][1]) and not torch.equal(asked[1][1], asked[2][1])
    assert [update for update, _ in trained.history["eval/return"]] == [0, 10, 20, 30, 40]
    assert [update for update, _ in trained.history["train/q"]] == list(range(5, 45, 5))
    assert trained.history["eval/return"][0][1].shape == (2,)


def test_a_run_of_two_seeds_is_two_runs() -> None:
    both, second = run(), run(seeds=SEEDS[1:])
    for name, value in second.policies.state_dict().items():
        other = both.policies.state_dict()[name]
        assert torch.allclose(value, other if name in ("mean", "std") else other[1:], atol=2e-5), name


def test_without_a_synthesiser_all_is_real() -> None:
    trained = run(synthesise=None, config=replace(CONFIG, updates=10, synthetic=240))  # which is more than a batch has
    assert bool(trained.history["train/q"][-1][1].isfinite().all())


def test_each_policy_is_published_with_what_it_was_trained_on(tmp_path: Path) -> None:
    trained = run(out=tmp_path, provenance={"model": "abc"})
    for member, seed in enumerate(SEEDS):
        policy = load_policy(str(tmp_path / f"seed-{seed}"), spec=SPEC)
        seen = torch.randn(5, 2)
        action, _ = policy.act(low_dimensional(seen), policy.reset(5), seeds=torch.arange(5))
        assert torch.allclose(action[:, 0], trained.policies.act(seen.expand(2, -1, -1))[member], atol=1e-6)
        about = load_config(tmp_path / f"seed-{seed}", part="policy")["provenance"]
        assert about["seeds"] == [seed] and about["model"] == "abc" and about["reward_factor"] == 1.0
        assert about["eval/return"] == pytest.approx(float(trained.history["eval/return"][-1][1][member]))
    kept = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert kept == ["settings.json", "state.safetensors", "synthetic-30.safetensors"]


def test_nan_stops_it_and_names_the_update(tmp_path: Path) -> None:
    def poisoned(policies: StatePolicies, update: int) -> SyntheticTables:
        tables = rehearse(policies, update)
        if update == 15:
            tables.rewards[1, 3] = math.nan
        return tables

    with pytest.raises(
        WorldlineError, match=r"made at update 15: finite rewards required.*row 3 of member 1 \(seed 11\)"
    ):
        run(synthesise=poisoned, out=tmp_path)
    same(run(out=tmp_path), run())  # what was saved before is whole
    steep = replace(TD3, critic_lr=1e30)
    with pytest.raises(
        WorldlineError, match=r"update \d+: a finite \w+ required, got (nan|inf) of member 0 \(seed 4\)"
    ):
        run(steep)


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(out=tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings:\n  agent\.alpha: was 2\.5, is now 1\.0\n"):
        run(replace(TD3, alpha=1.0), out=tmp_path)
    with pytest.raises(CheckpointError, match=r"agent\.expectile: was 'not set', is now 0\.7\n"):
        run(IQL, out=tmp_path)
    with pytest.raises(CheckpointError, match=r"seeds: was \[4, 11\], is now \[4, 12\]"):
        run(seeds=(4, 12), out=tmp_path)
    real = record(10, 0)
    others = (record(10, 1), replace(real, next_observations=real.next_observations + 0.1))
    for other in others:
        with pytest.raises(CheckpointError, match="data: was"):
            train_offline(other, TD3, CONFIG, seeds=SEEDS, synthesise=rehearse, out=tmp_path, progress=False)
    run(config=replace(CONFIG, save_every=7, log_every=3, evaluate_every=9), out=tmp_path)  # bookkeeping may change


def test_a_run_that_does_not_say_what_it_was_made_with_is_not_gone_on_with(tmp_path: Path) -> None:
    """Older ones kept their settings in another file."""
    run(out=tmp_path)
    (tmp_path / "training" / "settings.json").rename(tmp_path / "training" / "run.json")
    with pytest.raises(CheckpointError, match=r"settings.json: .* an older worldline left it"):
        run(out=tmp_path)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distinct seeds, at least one, required, got \[1, 1\]"):
        run(seeds=(1, 1))
    with pytest.raises(ValueError, match="synthetic between 0 and batch_size 32 required, got 33"):
        run(config=replace(CONFIG, synthetic=33))
    with pytest.raises(ValueError, match="synthetic of at least 0 required, got -1"):
        OfflineConfig(synthetic=-1)
    real = record(2, 0)
    pixels = replace(real, spec=replace(SPEC, cameras=(CameraSpec(name="top", height=8, width=8),)))
    with pytest.raises(SpecMismatch, match="without cameras"):
        train_offline(pixels, TD3, CONFIG, seeds=(0,), progress=False)


def test_what_the_policy_learned_is_in_the_history_though_it_learns_every_second_update() -> None:
    history = run(TD3, replace(CONFIG, log_every=10), synthesise=None, evaluate=None).history
    assert TD3.delay == 2 and {"train/q_loss", "train/policy_q", "train/policy_loss"} <= history.keys()
    assert [at for at, _ in history["train/policy_loss"]] == [at for at, _ in history["train/q_loss"]]
