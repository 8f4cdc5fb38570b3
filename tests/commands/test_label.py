"""`train inverse` and `label` through the command line: video alone becomes a dataset that world models learn from."""

from pathlib import Path

import pytest
import torch

from tests.commands.conftest import Lab, Run, do, record
from worldline import checkpoint
from worldline.commands import labeling
from worldline.commands.labeling import Label, run_label
from worldline.data import LeRobotDataset
from worldline.rl_in_imagination.inverse import InverseModel

SMALL = ["--hidden", 64, "--encoder.channels", 8, 16, "--encoder.features", 32, "--encoder.size", 32, "--shift", 0]
LOOP = ["--loop.warmup", 5, "--loop.batch-size", 16, "--loop.lr", 4e-3, "--loop.ema", 0.9, "--loop.eval-every", 1000]


@pytest.fixture(scope="module")
def idm(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inverse") / "idm"
    do("train", "inverse", "--data", lab.data, "--tokenizer", lab.tok, "--out", out, "--max-steps", 120, *SMALL, *LOOP)
    return out


@pytest.fixture(scope="module")
def video(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same episodes as `lab.data`, without their actions."""
    out = tmp_path_factory.mktemp("video") / "video"
    record(out, 20, "--without-actions", "True")
    return out


def test_labelled_video_has_nearly_the_true_actions_and_trains(
    idm: Path, video: Path, lab: Lab, worldline: Run, tmp_path: Path
) -> None:
    out = tmp_path / "labelled"
    said = worldline("label", video, "--inverse", idm, "--out", out, "--override-audit", "True")
    assert said.code == 0 and f"done: {out}" in said.out, said.err
    labelled, truth, source = LeRobotDataset(out), LeRobotDataset(lab.data), LeRobotDataset(video)
    assert labelled.spec == truth.spec and labelled.split("held-out") == source.split("held-out")
    read = torch.cat([labelled.episode(i).actions.mean(1) for i in range(20)])
    true = torch.cat([truth.episode(i).actions.mean(1) for i in range(20)])
    assert float((read - true)[:, 0].abs().mean()) < 0.3 * float((true - true.mean(0))[:, 0].abs().mean())
    assert float(read.abs().max()) <= 1
    before, after = source.episode(3), labelled.episode(3)
    for name in ("poses", "states", "rewards", "frame_success"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert (before.success, before.terminated, before.instruction) == (
        after.success,
        after.terminated,
        after.instruction,
    )
    assert float((before.frames["rgb"][:].float() - after.frames["rgb"][:].float()).abs().mean()) < 4
    made = after.provenance
    assert made["actions"] == "recovered from video" and made["inverse_model"] == InverseModel.from_pretrained(idm).name
    assert made["inverse_r2"].startswith("action_0 0.") and made["seed"] == before.provenance["seed"]
    network = ["--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2, "--frames", 4]
    do("train", "world-model", "--data", out, "--tokenizer", lab.tok, "--out", tmp_path / "wm", "--max-steps", 2,
       "--model.network.window", 4, *network, "--loop.batch-size", 2)  # fmt: skip


def test_interrupted_labelling_goes_on(
    idm: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worldline: Run, lab: Lab
) -> None:
    out, read = tmp_path / "labelled", labeling.recovered_blocks
    config = Label(data=video, inverse=idm, out=out, override_audit=True)
    calls: list[int] = []

    def stop(model, frames):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(model, frames)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labeling, "recovered_blocks", stop)
        run_label(config, progress=False)
    said = worldline("label", lab.data, "--inverse", idm, "--out", out, "--relabel", "True", "--override-audit", "True")
    assert said.code == 2 and "holds something else that was interrupted (data: was" in said.err
    run_label(config, progress=False)
    assert len(LeRobotDataset(out)) == 20 and not (out / ".staging").exists()


def test_what_cannot_be_labelled_is_named(idm: Path, video: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    allowed = ["--inverse", idm, "--out", out, "--override-audit", "True"]
    said = worldline("label", lab.data, *allowed)
    assert said.code == 2 and "episodes without actions are required, 20 of 20 have some" in said.err
    assert "--relabel True" in said.err
    record(tmp_path / "large", 2, "--without-actions", "True", "--size", 32)
    said = worldline("label", tmp_path / "large", *allowed)
    assert said.code == 2 and "do not fit" in said.err and "camera rgb: required 64x64, got 32x32" in said.err
    assert f"dataset {tmp_path / 'large'} and inverse model {idm}" in said.err
    record(tmp_path / "slow", 2, "--without-actions", "True", "--horizon", 20, "--control-steps", 4)
    said = worldline("label", tmp_path / "slow", *allowed)
    assert (
        said.code == 2 and "control_steps: required 2, got 4" in said.err and "fps: required 10.0, got 5.0" in said.err
    )
    said = worldline("label", video, "--inverse", lab.scorer, "--out", out)
    assert said.code == 2 and "an inverse is required here, this is a scorer" in said.err
    assert not out.exists()
    said = worldline("train", "inverse", "--data", video, "--out", out, *SMALL)
    assert said.code == 2 and "are video alone" in said.err and not out.exists()
    said = worldline("train", "inverse", "--data", lab.data, "--out", out, "--window", 1)
    assert said.code == 2 and "2 to 8 frames required, got 1" in said.err


def test_a_failed_audit_is_refused(video: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    hasty = tmp_path / "hasty"
    do("train", "inverse", "--data", lab.data, "--out", hasty, "--max-steps", 1, *SMALL, "--loop.batch-size", 4)
    assert checkpoint.load_config(hasty, part="inverse")["provenance"]["audit"]["failures"]
    said = worldline("label", video, "--inverse", hasty, "--out", tmp_path / "out")
    assert said.code == 2 and "passed its audit is required" in said.err and "--override-audit True" in said.err
    assert not (tmp_path / "out").exists()
    said = worldline("show", hasty)
    assert said.code == 0 and '"part": "inverse"' in said.out and '"failures"' in said.out
