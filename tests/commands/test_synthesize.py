"""`worldline synthesize` through the command line: a dataset like any other, whose episodes say where they come from."""

from pathlib import Path

import pytest
import torch

from tests.commands.conftest import Lab, Run
from tests.commands.test_all_verbs import results
from worldline.checkpoint import load_config
from worldline.commands import synthesizing
from worldline.data import LeRobotDataset
from worldline.policies import ClonedPolicy


def command(lab: Lab, out: Path, *more: object) -> list[object]:
    judges = ["--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--override-audit", True]
    small = ["--episodes", 7, "--batch", 3, "--make.frames", 6]
    return ["synthesize", "--policies", lab.bc, f"{lab.bc}@noise=0.5", *judges, "--out", out, *small, *more]


def test_imagined_episodes_are_a_dataset(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "imagined"
    options = ["--make.keep", "all", "--make.wander", 2, "--instructions", "go there", "stay", "--threshold", 0.4]
    said = worldline(*command(lab, out, *options))
    assert said.code == 0, said.err
    dataset, real = LeRobotDataset(out), LeRobotDataset(lab.data)
    assert len(dataset) == 7 and dataset.spec == real.spec
    found = results(out / "synthesis")
    assert found["kept"] == found["episodes"] == 7 and len(found["scores"]) == 7
    told = []
    for i in range(7):
        episode = dataset.episode(i)
        p = episode.provenance
        assert p["cause"] == "imagined" and p["scorer"].startswith("success-scorer:") and len(p["world_model"]) == 16
        assert float(p["score"]) == pytest.approx(found["scores"][i], abs=1e-4)
        assert episode.success == (float(p["score"]) > 0.4) == episode.terminated != episode.truncated
        assert 2 <= len(episode) <= 6
        told.append((p["policy"], episode.instruction))
    batches = [(str(lab.bc), "go there"), (f"{lab.bc}@noise=0.5", "stay"), (str(lab.bc), "go there")]
    assert told == [batches[i // 3] for i in range(7)]
    assert worldline("inspect", out, "--out", tmp_path / "inspect").code == 0

    mixed = tmp_path / "mixed"
    train = ["train", "policy", "--data", lab.data, out, "--init-from", lab.bc, "--imagined-share", 0.5, "--out", mixed]
    sizes = [
        "--policy.encoder.channels",
        8,
        8,
        "--policy.encoder.features",
        16,
        "--policy.encoder.size",
        16,
        "--policy.chunk",
        4,
    ]
    said = worldline(
        *train, *sizes, "--demonstrations", "all", "--max-steps", 1, "--loop.lr", 0.0, "--loop.batch-size", 4
    )
    assert said.code == 0, said.err
    ours, theirs = (ClonedPolicy.from_pretrained(folder) for folder in (mixed, lab.bc))
    assert ours.action_normalizer == theirs.action_normalizer  # not fitted again
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert load_config(mixed, part="policy")["provenance"]["data"] == [str(lab.data), str(out)]
    said = worldline(*train[:-1], tmp_path / "other", "--demonstrations", "all", "--max-steps", 1)
    assert (
        said.code == 2 and "a policy of the same kind and size is required" in said.err and "policy.encoder" in said.err
    )


@pytest.mark.parametrize("staged", [1, 4])  # in the first batch of three, in the second
def test_an_interrupted_synthesis_goes_on_and_ends_alike(
    staged: int, lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--make.keep", "all", "--threshold", 0.4]
    assert worldline(*command(lab, tmp_path / "whole", *options)).code == 0
    out, stage, calls = tmp_path / "cut", synthesizing._stage, []

    def cut(*args):
        if len(calls) == staged:
            raise KeyboardInterrupt
        calls.append(1)
        stage(*args)

    monkeypatch.setattr(synthesizing, "_stage", cut)
    assert worldline(*command(lab, out, *options)).code == 130
    monkeypatch.setattr(synthesizing, "_stage", stage)
    said = worldline(*command(lab, out, *options, "--seed", 1))
    assert said.code == 2 and "has another seed" in said.err
    assert worldline(*command(lab, out, *options)).code == 0
    whole, again = LeRobotDataset(tmp_path / "whole"), LeRobotDataset(out)
    assert len(whole) == len(again)
    for i in range(len(whole)):
        a, b = whole.episode(i), again.episode(i)
        assert a.provenance == b.provenance and torch.equal(a.actions, b.actions) and torch.equal(a.poses, b.poses)


def test_a_threshold_that_filters_nothing_is_said(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for threshold, word in ((0.9999, "keeps none"), (1e-30, "keeps all")):
        said = worldline(*command(lab, tmp_path / word[-3:], "--threshold", threshold))
        assert said.code == 2 and word in said.err and "scores from" in said.err, said.err
    said = worldline(*command(lab, tmp_path / "x", "--make.keep", "some"))
    assert said.code == 2 and "success" in said.err and "all" in said.err and "some" in said.err
    said = worldline(*command(lab, tmp_path / "x", "--episodes", 0))
    assert said.code == 2 and "episodes and batch must be at least 1" in said.err
