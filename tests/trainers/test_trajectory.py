"""Stage `trajectory`: from a Minari folder to a checkpoint that samples; resume; bad input."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.worldmodels.test_trajectories import SPEC, TINY, wander
from worldline.checkpoint import read_json
from worldline.data.minari import write_minari
from worldline.data.trajectories import Trajectories, join
from worldline.errors import CheckpointError, DatasetError, SpecMismatch
from worldline.trainers import trajectory
from worldline.trainers.loop import LoopConfig
from worldline.worldmodels.trajectories import TrajectoryDiffusion


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_minari(wander(60), tmp_path_factory.mktemp("minari") / "wander")


def config(data: Path, out: Path, steps: int, **loop) -> trajectory.TrainTrajectory:
    settings = {"batch_size": 8, "warmup": 1, "save_every": 2, "eval_every": 2} | loop
    return trajectory.TrainTrajectory(data=(str(data),), out=out, model=TINY, loop=LoopConfig(steps=steps, **settings))


def test_a_trained_checkpoint_samples_and_says_what_it_learned_from(tmp_path, data):
    out = trajectory.run(config(data, tmp_path / "model", 4), progress=False)
    model = TrajectoryDiffusion.from_pretrained(out)
    made = model.generate(torch.arange(3))
    assert made.spec == model.spec == SPEC and len(made) == 3
    about = read_json(out / "config.json")["provenance"]
    assert about["data"] == [str(data)] and about["transitions"] == wander(60).steps
    assert 1.0 < about["held_out_loss"] < 3.0  # of steps and of rewards, each 1 for a network that answers nothing
    assert model.layout.mean[0] != 0 and float(model.layout.reach.max()) < 20


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path, data):
    whole = trajectory.run(config(data, tmp_path / "whole", 6, cooldown=0.0), progress=False)
    trajectory.run(config(data, tmp_path / "cut", 4, cooldown=0.0), progress=False)
    cut = trajectory.run(config(data, tmp_path / "cut", 6, cooldown=0.0), progress=False)
    for a, b in zip(
        TrajectoryDiffusion.from_pretrained(whole).state_dict().values(),
        TrajectoryDiffusion.from_pretrained(cut).state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_bad_input_is_named(tmp_path, data):
    with pytest.raises(DatasetError, match=r"a folder or a Minari dataset"):
        trajectory.run(config(tmp_path / "nowhere", tmp_path / "a", 2), progress=False)
    whole = wander(60)
    short = whole.select(i for i in range(60) if not whole.terminated[whole.starts[i] + whole.lengths[i] - 1])
    cut = Trajectories(
        spec=SPEC,
        lengths=torch.full((len(short),), 5),
        **{
            name: torch.cat([getattr(short, name)[s : s + 5] for s in short.starts.tolist()])
            for name in ("observations", "actions", "rewards", "next_observations", "terminated")
        },
    )
    folder = write_minari(cut, tmp_path / "short")
    with pytest.raises(DatasetError, match=r"at least 8 steps .*required, got \d+ cut short at 5 or before"):
        trajectory.run(config(folder, tmp_path / "b", 2), progress=False)
    some = write_minari(join([whole, cut]), tmp_path / "some")
    with pytest.raises(
        DatasetError, match=rf"{len(cut)} of {60 + len(cut)} were cut short before .*first episode 60 of 5 steps"
    ):
        trajectory.run(config(some, tmp_path / "d", 2), progress=False)
    out = trajectory.run(replace(config(some, tmp_path / "d", 2), leave_out_short=True), progress=False)
    assert read_json(out / "config.json")["provenance"]["transitions"] == whole.steps  # what was learned from
    free = replace(SPEC, action=replace(SPEC.action, low=(-math.inf,), high=(math.inf,)))
    with pytest.raises(SpecMismatch, match="range"):
        trajectory.run(
            config(write_minari(replace(whole, spec=free), tmp_path / "free"), tmp_path / "e", 2), progress=False
        )
    other = replace(whole, terminated=torch.zeros_like(whole.terminated))
    with pytest.raises(CheckpointError, match="what the data hold"):  # the same steps, but nothing ends
        trajectory.run(config(data, tmp_path / "f", 2), progress=False)
        trajectory.claim_trajectories(config(data, tmp_path / "f", 4), "trajectory-model", other)
    trajectory.run(config(data, tmp_path / "c", 2), progress=False)
    with pytest.raises(CheckpointError):
        again = replace(config(some, tmp_path / "c", 4), leave_out_short=True)
        trajectory.run(again, progress=False)  # another dataset in the same folder
