"""Offline RL through the command line: data in, models, policies, imagined data out; and what is refused."""

from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from tests.commands.conftest import Run, contents, do
from tests.commands.test_all_verbs import results
from tests.worldmodels.test_trajectories import SPEC, wander
from worldline.checkpoint import to_json
from worldline.commands.offline_rl import STARTS, require_task
from worldline.commands.sampling import SolverFlags
from worldline.data.minari import read_minari, write_minari
from worldline.data.trajectories import control_spec, low_dimensional
from worldline.errors import SpecMismatch
from worldline.policies import load_policy
from worldline.policies.states import StatePolicy
from worldline.sim.control import collect_trajectories, make_control
from worldline.worldmodels.trajectories import TrajectorySolver

LOOP = ["--loop.batch-size", 8, "--loop.warmup", 1]
SMALL = ["--model.length", 8, "--model.width", 16, "--model.depth", 2, "--model.solver.steps", 3]
AGENT = ["--seeds", 2, "--td3bc.hidden", 16, 16, "--iql.hidden", 16, 16, "--train.updates", 6, "--train.batch-size", 16,
         "--train.synthetic", 12, "--train.synthesise-every", 3, "--train.log-every", 2, "--train.evaluate-every", 3,
         "--trajectories", 5]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("offline")
    write_minari(wander(40), out / "data")
    do("train", "trajectory", "--data", out / "data", "--out", out / "traj", "--max-steps", 3, *LOOP, *SMALL)
    do("train", "dynamics", "--data", out / "data", "--out", out / "dyn", "--max-steps", 3, *LOOP, "--model.hidden", 16)
    return out


@pytest.mark.parametrize("source", ["real", "guided", "unguided", "autoregressive"])
@pytest.mark.parametrize("agent", ["td3bc", "iql"])
def test_agents_learn_from_every_kind_of_data(home, worldline: Run, tmp_path, source, agent):
    made_by = {
        "real": [],
        "guided": ["--trajectory-model", home / "traj"],
        "unguided": ["--trajectory-model", home / "traj", "--guidance.coefficient", 0.0],
        "autoregressive": ["--dynamics", home / "dyn"],
    }[source]
    out = tmp_path / "run"
    said = worldline("offline-rl", "--data", home / "data", "--agent", agent, "--out", out, *made_by, *AGENT)
    assert said.code == 0, said.err
    found = results(out, videos=False)
    assert found["seeds"] == [0, 1] and bool(found["made_from"]) == (source != "real")
    assert "train/q" in found["history"] and len(found["history"]["train/q"][0][1]) == 2
    policy = load_policy(str(out / "seed-1"), spec=SPEC)
    assert isinstance(policy, StatePolicy)


def test_policies_are_judged_in_the_simulator_and_a_run_goes_on(worldline: Run, tmp_path):
    task = make_control("pointmaze/umaze")
    draw = torch.Generator().manual_seed(0)
    data = collect_trajectories(task, lambda seen: torch.rand(len(seen), 2, generator=draw) * 2 - 1, episodes=2, seed=5)
    write_minari(data, tmp_path / "maze")
    command = ["offline-rl", "--data", tmp_path / "maze", "--task", "pointmaze/umaze", "--episodes", 1, "--out",
               tmp_path / "run", *AGENT]  # fmt: skip
    assert worldline(*command).code == 0
    first = results(tmp_path / "run", videos=False)
    assert [r["update"] for r in first["returns"]] == [0, 3, 6]
    assert worldline(*command).code == 0 and results(tmp_path / "run", videos=False) == first
    said = worldline(*command, "--td3bc.alpha", 1.0)
    assert said.code == 2 and "holds a run with other settings" in said.err
    for flags, was in ((["--episodes", 2], "episodes: was 1, is now 2"),
                       (["--task", "None"], "task: was 'pointmaze/umaze', is now None")):  # fmt: skip
        said = worldline(*command, *flags)
        assert said.code == 2 and was in said.err, said.err  # or old returns were reported as new ones
    assert results(tmp_path / "run", videos=False) == first
    other = ["offline-rl", "--data", tmp_path / "maze", "--out", tmp_path / "other", *AGENT, "--task"]
    said = worldline(*other, "hopper")
    assert said.code == 2 and "--task hopper: data of this task are required" in said.err
    assert (
        "observation: required 11 numbers" in said.err
        and "action.low: required [-1.0, -1.0, -1.0], got [-1.0, -1.0]" in said.err
    )
    said = worldline(*other, "pointmaze/medium")  # which has the same numbers
    assert said.code == 2 and "environment: required 'pointmaze/medium', got 'pointmaze/umaze'" in said.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("embodiment", "refused"), [("hopper", False), ("Hopper-v4", False), ("my-robot", False), ("HalfCheetah-v5", True)]
)
def test_only_data_that_say_they_are_another_task_s_are_refused(embodiment, refused):
    task = make_control("hopper")
    spec = replace(task.spec, action=replace(task.spec.action, embodiment=embodiment))
    if refused:
        with pytest.raises(SpecMismatch, match="environment: required 'hopper', got 'HalfCheetah-v5'"):
            require_task(spec, task)
    else:
        require_task(spec, task)


def test_data_whose_actions_have_another_range_are_refused():
    task = make_control("hopper")
    spec = replace(task.spec, action=replace(task.spec.action, high=(1.0, 1.0, 2.0)))
    with pytest.raises(SpecMismatch, match=r"action.high: required \[1.0, 1.0, 1.0\], got \[1.0, 1.0, 2.0\]"):
        require_task(spec, task)


def test_synthesized_trajectories_are_a_dataset_with_scores(home, worldline: Run, tmp_path):
    run = ["offline-rl", "--data", home / "data", "--out", tmp_path / "run", *AGENT]
    assert worldline(*run).code == 0
    make = ["synthesize", "--trajectory-model", home / "traj", "--trajectories", 7]
    said = worldline(*make, "--policy", tmp_path / "run" / "seed-0", "--out", tmp_path / "made")
    assert said.code == 0, said.err
    made = read_minari(tmp_path / "made")
    assert len(made) == 7 and made.spec == SPEC
    about = made.provenance[3]
    assert about["coefficient"] == "0.1" and about["seed"] == "3" and float(about["score"]) < 0
    assert results(tmp_path / "made" / "synthesis", videos=False)["trajectories"] == 7
    both = worldline("offline-rl", "--data", home / "data", tmp_path / "made", "--out", tmp_path / "both", *AGENT)
    assert both.code == 0, both.err
    free = worldline(*make, "--out", tmp_path / "free")
    assert free.code == 0 and "score" not in read_minari(tmp_path / "free").provenance[0]
    said = worldline(*make, "--out", tmp_path / "free")
    assert said.code == 2 and "a new folder is required, this exists" in said.err


def test_data_of_others_are_judged_by_the_task_whose_numbers_they_hold(worldline: Run, tmp_path):
    """Their numbers have no names: policies take the task's, and a model of trajectories that learned from them goes on fitting."""
    task, others = make_control("hopper"), control_spec("Hopper-v4", 11, [-1.0] * 3, [1.0] * 3, rate_hz=1.0)
    draw = torch.Generator().manual_seed(0)
    data = collect_trajectories(
        task, lambda seen: torch.rand(len(seen), 3, generator=draw) * 2 - 1, episodes=12, seed=5
    )
    write_minari(replace(data, spec=others), tmp_path / "hopper")
    learned = ["--data", tmp_path / "hopper", "--max-steps", 3, *LOOP]
    do("train", "trajectory", "--out", tmp_path / "traj", *learned, *SMALL)
    do("train", "dynamics", "--out", tmp_path / "dyn", *learned, "--model.hidden", 16)
    for name, source in (
        ("guided", ["--trajectory-model", tmp_path / "traj"]),
        ("steps", ["--dynamics", tmp_path / "dyn"]),
    ):
        said = worldline("offline-rl", "--data", tmp_path / "hopper", "--task", "hopper", "--episodes", 1, "--out",
                         tmp_path / name, *source, *AGENT)  # fmt: skip
        assert said.code == 0, said.err
    assert len(results(tmp_path / "guided", videos=False)["returns"]) == 3
    assert load_policy(str(tmp_path / "guided" / "seed-0"), spec=task.spec).spec == task.spec
    said = worldline("synthesize", "--trajectory-model", tmp_path / "traj", "--policy", tmp_path / "guided" / "seed-0",
                     "--trajectories", 3, "--out", tmp_path / "made")  # fmt: skip
    assert said.code == 0, said.err
    write_minari(
        replace(data, spec=replace(others, action=replace(others.action, embodiment="Walker2d-v5"))), tmp_path / "w"
    )
    said = worldline("offline-rl", "--data", tmp_path / "w", "--task", "hopper", "--out", tmp_path / "no", *AGENT)
    assert said.code == 2 and "environment: required 'hopper', got 'Walker2d-v5'" in said.err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_gymnasium_environment_judges(worldline: Run, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A dataset that Minari recorded in Pendulum, by Pendulum's own rewards."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "storage"))
    env, rng, steps = gymnasium.make("Pendulum-v1"), np.random.default_rng(0), 40
    seen, acted, earned = [env.reset(seed=0)[0]], rng.uniform(-2, 2, (steps, 1)).astype(np.float32), []
    for action in acted:
        after, reward, *_ = env.step(action)
        seen.append(after)
        earned.append(reward)
    flags = [False] * steps
    whole = EpisodeBuffer(
        observations=np.stack(seen), actions=acted, rewards=earned, terminations=flags, truncations=flags
    )
    minari.create_dataset_from_buffers("them/pendulum-v0", [whole], env="Pendulum-v1")
    run = ["offline-rl", "--data", "them/pendulum-v0", "--out", tmp_path / "run", "--episodes", 2, *AGENT, "--task"]
    said = worldline(*run, "gym/Pendulum-v1")
    assert said.code == 0, said.err
    last = results(tmp_path / "run", videos=False)["returns"][-1]
    policies = [load_policy(str(tmp_path / "run" / f"seed-{seed}"), spec=SPEC) for seed in (0, 1)]
    assert policies[0].spec.action.embodiment == "Pendulum-v1"
    for policy, told in zip(policies, last["by_seed"]):
        env, total = gymnasium.make("Pendulum-v1"), 0.0
        for seed in (STARTS, STARTS + 1):
            now, over = env.reset(seed=seed)[0], False
            while not over:
                action, _ = policy.act(
                    low_dimensional(torch.tensor(now)[None]), policy.reset(1), seeds=torch.zeros(1, dtype=int)
                )
                now, reward, terminated, truncated, _ = env.step(action[0, 0].numpy())
                total, over = total + float(reward) / 2, terminated or truncated
        assert told == pytest.approx(total, rel=1e-3)
    said = worldline(*run, "gym/MountainCarContinuous-v0")
    assert said.code == 2 and "environment: required 'MountainCarContinuous-v0', got 'Pendulum-v1'" in said.err
    said = worldline(*run, "pendulum")
    assert said.code == 2 and "gym/ID names any Gymnasium environment" in said.err


def test_the_solver_is_the_checkpoint_s_but_for_what_is_said(home, worldline: Run, tmp_path):
    """--solver.steps could be given to neither verb: a solver that is None by default has no flags."""
    for verb in ("offline-rl", "synthesize"):
        told = [verb, "--trajectory-model", home / "traj", "--help"]
        assert "--solver.steps" in worldline(*told).out, verb
    flags = ["--trajectory-model", home / "traj", "--guidance.coefficient", 0.0, "--solver.steps", 8]
    said = worldline(
        "offline-rl", "--data", home / "data", "--out", tmp_path / "run", *AGENT, *flags, "--solver.heun", True
    )
    assert said.code == 0, said.err
    used = results(tmp_path / "run", videos=False)["made_from"]["solver"]
    assert used == to_json(TrajectorySolver(steps=8, heun=True))
    for name, more in (("own", []), ("same", ["--solver.steps", 3]), ("other", ["--solver.steps", 8])):
        said = worldline(
            "synthesize", "--trajectory-model", home / "traj", "--trajectories", 3, "--out", tmp_path / name, *more
        )
        assert said.code == 0, said.err
    own, same, other = (read_minari(tmp_path / name).actions for name in ("own", "same", "other"))
    assert torch.equal(own, same) and not torch.equal(own, other[: len(own)]), "the checkpoint's own has 3 steps"
    said = worldline("offline-rl", "--data", home / "data", "--out", tmp_path / "none", *flags[:2], "--solver.steps", 0)
    assert said.code == 2 and "steps of at least 1" in said.err


def test_a_checkpoint_s_solver_keeps_what_no_flag_names():
    own = TrajectorySolver(steps=7, heun=True, inflate=1.01)
    assert SolverFlags(churn=5.0).instead_of(own) == replace(own, churn=5.0) and SolverFlags().instead_of(own) == own


def test_small_batches_of_real_data_need_no_room_for_synthetic_rows(home, worldline: Run, tmp_path):
    """240 rows of a batch are synthetic by default, and none where nothing is."""
    said = worldline("offline-rl", "--data", home / "data", "--out", tmp_path / "run", "--seeds", 1, "--td3bc.hidden", 16,
                     16, "--train.updates", 2, "--train.batch-size", 128)  # fmt: skip
    assert said.code == 0, said.err


def test_a_folder_of_something_else_is_left_as_it_was(home, worldline: Run, tmp_path):
    """--out DATA wrote a training, policies and a report into the dataset."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    run, real = tmp_path / "run", home / "data"
    for folder, said in ((real, "an empty or new folder is required, it holds ['data']"),
                         (tmp_path / "notes", "it holds ['mine.txt']"),
                         (home / "traj", "a set of policies was to be trained here, it holds a trajectory-model")):  # fmt: skip
        before = contents(folder)
        refused = worldline("offline-rl", "--data", real, "--out", folder, *AGENT)
        assert refused.code == 2 and said in refused.err, refused.err
        assert contents(folder) == before
    assert worldline("offline-rl", "--data", real, "--out", run, *AGENT).code == 0
    refused = worldline("train", "trajectory", "--data", real, "--out", run, "--max-steps", 3, *LOOP, *SMALL)
    assert refused.code == 2 and "a trajectory-model was to be trained here, it holds a set of policies" in refused.err
    (run / "training" / "run.json").write_text('{"agent": {}}')  # as versions before this one left it
    refused = worldline("offline-rl", "--data", real, "--out", run, *AGENT)
    assert refused.code == 2 and "it holds a run of an older worldline" in refused.err


def test_a_run_that_fails_before_it_made_anything_leaves_no_folder(home, worldline: Run, tmp_path):
    flags = ["--trajectory-model", home / "traj", "--guidance.coefficient", 1e12]
    assert worldline("offline-rl", "--data", home / "data", "--out", tmp_path / "run", *AGENT, *flags).code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trajectory-model", "traj", "--dynamics", "dyn"], "--trajectory-model or --dynamics required"),
        (["--agent", "iql", "--reach-aware", True], "--reach-aware is of TD3+BC"),
        (["--trajectory-model", "dyn"], "a trajectory-model is required here, this is a dynamics"),
        (["--trajectory-model", "traj", "--guidance.coefficient", -1.0], "coefficient of at least 0 is required"),
        (["--trajectory-model", "traj", "--guidance.coefficient", 1e12], "near the data are required"),
        (["--trajectory-model", "traj", "--train.synthetic", 17], "synthetic between 0 and batch_size 16 required"),
        (["--dynamics", "dyn", "--train.synthetic", 17], "synthetic between 0 and batch_size 16 required"),
        (["--seeds", 0], "trajectories and episodes of at least 1"),
    ],
)
def test_what_does_not_go_together_is_said(home, worldline: Run, tmp_path, flags, expected):
    flags = [home / flag if flag in ("traj", "dyn") else flag for flag in flags]
    said = worldline("offline-rl", "--data", home / "data", "--out", tmp_path / "run", *AGENT, *flags)
    assert said.code == 2 and expected in said.err, said.err


def test_a_model_of_another_task_is_refused(home, worldline: Run, tmp_path):
    task = make_control("pointmaze/umaze")
    data = collect_trajectories(task, lambda seen: torch.zeros(len(seen), 2), episodes=1, seed=5)
    write_minari(data, tmp_path / "maze")
    said = worldline("offline-rl", "--data", tmp_path / "maze", "--trajectory-model", home / "traj", "--out",
                     tmp_path / "run", *AGENT)  # fmt: skip
    assert said.code == 2 and "policy and trajectory model do not fit" in said.err and "required 1 numbers" in said.err
