"""Everything of one dream runs at one stride; what does not is refused."""

from pathlib import Path

import pytest
import torch

from tests.commands.conftest import Lab, Run
from worldline.eval.probes import Probe
from worldline.trainers.inputs import open_datasets
from worldline.trainers.probe import TrainProbe, _target
from worldline.trainers.samples import SampleDraw
from worldline.worldmodels import load_world_model

SHORT = ("--max-steps", 2, "--loop.warmup", 1, "--loop.batch-size", 4)


@pytest.fixture(scope="module")
def coarse(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.commands.conftest import do

    home = tmp_path_factory.mktemp("stride")
    network = ("--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2)
    do("train", "world-model", "--data", lab.data, "--tokenizer", lab.tok, "--out", home / "wm", "--stride", 2,
       "--frames", 4, "--model.network.window", 4, *network, *SHORT)  # fmt: skip
    eyes = ("encoder.channels", 8, 8), ("encoder.features", 16)
    for stage, out in (("policy", "bc"), ("scorer", "success")):
        options = [x for name, *values in eyes for x in (f"--{stage}.{name}", *values)]
        options += ["--policy.chunk", 4, "--policy.encoder.size", 16] if stage == "policy" else []
        do("train", stage, "--data", lab.data, "--out", home / out, "--stride", 2, *options, *SHORT)
    do("train", "probe", "--data", lab.data, "--target", "action", "--out", home / "inverse", "--stride", 2, *SHORT)
    return home


def test_a_strided_dream_is_ranked_and_measured(lab: Lab, coarse: Path, worldline: Run, tmp_path: Path) -> None:
    assert load_world_model(coarse / "wm")[0].spec.control_steps == 4
    assert Probe.from_pretrained(coarse / "inverse").spec.control_steps == 4
    said = worldline(
        "rank", "--world-model", coarse / "wm", "--scorer", coarse / "success", "--policies", coarse / "bc",
        f"{coarse / 'bc'}@noise=1", "--data", lab.data, "--episodes", 2, "--imagined-episodes", 2, "--frames", 4,
        "--out", tmp_path / "rank",
    )  # fmt: skip
    assert said.code == 0, said.err
    said = worldline(
        "eval", "--world-model", coarse / "wm", "--data", lab.data, "--scorer", coarse / "success",
        "--inverse-model", coarse / "inverse", "--split", "all", "--max-episodes", 3, "--out", tmp_path / "eval",
    )  # fmt: skip
    assert said.code == 0, said.err


@pytest.mark.parametrize("judge", ["scorer", "policy", "inverse-model"])
def test_parts_at_another_stride_are_refused(
    lab: Lab, coarse: Path, worldline: Run, tmp_path: Path, judge: str
) -> None:
    scorer = lab.scorer if judge == "scorer" else coarse / "success"
    policy = lab.bc if judge == "policy" else coarse / "bc"
    command = ["rank", "--policies", policy, f"{policy}@noise=1"]
    if judge == "inverse-model":
        worldline("train", "probe", "--data", lab.data, "--target", "action", "--out", tmp_path / "inverse", *SHORT)
        command = ["eval", "--inverse-model", tmp_path / "inverse"]
    said = worldline(
        *command, "--world-model", coarse / "wm", "--scorer", scorer, "--data", lab.data, "--out", tmp_path / "out"
    )
    assert said.code == 2 and "control_steps: required 2, got 4" in said.err and "--stride" in said.err
    assert not (tmp_path / "out").exists()


def test_the_inverse_model_learns_the_mean_action_between_the_frames_it_sees(lab: Lab, tmp_path: Path) -> None:
    selections = open_datasets((lab.data,), "train", stride=2)
    config = TrainProbe(data=(lab.data,), out=tmp_path / "probe", target="action", stride=2)
    function, _, window = _target(config, selections[0].dataset)
    draw = SampleDraw(selections, function, window=window)
    episode = selections[0].dataset.episode(selections[0].episodes[0])
    moment = draw.gather(torch.tensor([3]))  # the frame after five blocks, seen beside the one after three
    assert torch.allclose(moment.target[0], episode.actions[3:5].flatten(0, 1).mean(0))
    (video,) = (episode.frames[c.name][:] for c in draw.spec.cameras)
    (seen,) = moment.observation.images.values()
    assert torch.equal(seen[0], torch.cat([video[3], video[5]]))


def test_strides_that_leave_nothing_to_learn_or_to_send_are_refused(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for stage in (("policy",), ("scorer",), ("probe", "--target", "action")):
        said = worldline("train", *stage, "--data", lab.data, "--stride", 11, "--out", tmp_path / "out", *SHORT)
        assert said.code == 2 and "more than 11 frames required for stride 11" in said.err
    said = worldline("train", "policy", "--data", lab.data, "--stride", 5, "--out", tmp_path / "out", *SHORT)
    assert said.code == 2 and "chunks of at least 10 actions" in said.err and "got 8" in said.err
    assert not (tmp_path / "out").exists()
