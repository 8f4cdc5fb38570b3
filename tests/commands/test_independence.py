"""Rankings that flatter themselves are told: policies and starts shared with training, also of moved or built-on models."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import Lab, Run, record
from tests.commands.dots import WORLD
from worldline.commands import recording
from worldline.commands.independence import shared_with_training
from worldline.commands.rollouts import fingerprint_of, weights_of
from worldline.data import LeRobotDataset
from worldline.sim.record import episode_seed
from worldline.types import Observation

SHORT = ("--max-steps", 1, "--loop.warmup", 1, "--loop.batch-size", 2, "--frames", 4)
NETWORK = ("--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2)


def shared(lab: Lab, model: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {"world_model": model, "scorer": lab.scorer, "calibration": (), "truth": None}
    return shared_with_training([str(lab.bc)], **(options | changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def seen(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of the policy that is ranked."""
    folder = tmp_path_factory.mktemp("seen") / "rollouts"
    record(folder, 10, "--policy", lab.bc)
    return folder


def test_a_recording_knows_the_weights_of_its_policy(lab: Lab, seen: Path, tmp_path: Path) -> None:
    """By what they are: one that was interrupted is not gone on with by a policy that was trained further in its folder."""
    (told,) = {LeRobotDataset(seen).episode(i).provenance["policy_weights"] for i in range(10)}
    assert told == weights_of(lab.bc)
    policy = Path(shutil.copytree(lab.bc, tmp_path / "bc"))
    staging = tmp_path / "out" / ".staging"

    def interrupted(*_: object, **options: Any) -> Path:
        noted.append(options["provenance"])
        return staging

    noted: list[dict[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "record", interrupted)
        config = recording.Record(world=WORLD, out=tmp_path / "out", policy=f"{policy}@noise=1")
        recording.run_record(config, progress=False)
        (policy / "model.safetensors").write_bytes((lab.other / "model.safetensors").read_bytes())
        recording.run_record(config, progress=False)
    assert noted[0] == {"policy_weights": told} != noted[1]


def test_policies_nobody_saw_are_not_mentioned(lab: Lab) -> None:
    assert shared(lab, lab.wm) == []
    assert shared(lab, lab.wm, calibration=[lab.data]) == []


def test_true_starts_in_the_training_data_are_told(lab: Lab) -> None:
    (said,) = shared(lab, lab.wm, truth=(WORLD, [episode_seed(0, 0), 12345]))
    assert said.startswith("1 of 2 true starts") and "held-out" in said
    assert shared(lab, lab.wm, truth=(WORLD, [12345, 12346])) == []


def test_the_truth_of_another_task_is_told(lab: Lab) -> None:
    (said,) = shared(lab, lab.wm, truth=("gym/CartPole-v1", [12345, 12346]))
    assert said.startswith(f"the world model learned from {WORLD}, not from gym/CartPole-v1")


def test_a_threshold_chosen_on_rollouts_of_the_ranked_policy_is_told(
    lab: Lab, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (said,) = shared(lab, lab.wm, calibration=[seen])
    assert "flatters itself" in said and "threshold" in said
    monkeypatch.chdir(lab.root)  # under another name
    (said,) = shared_with_training(
        ["bc@noise=1"], world_model=lab.wm, scorer=lab.scorer, calibration=[seen], truth=None
    )
    assert "flatters itself" in said


def test_what_the_first_weights_saw_counts(lab: Lab, seen: Path, worldline: Run, tmp_path: Path) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    options = ("--tokenizer", lab.tok, "--model.network.window", 4, *NETWORK, *SHORT)
    assert worldline("train", "world-model", "--data", seen, "--out", first, *options).code == 0
    (said,) = shared(lab, first)
    assert "flatters itself" in said and "world-model" in said
    said = worldline("train", "world-model", "--data", lab.data, "--init-from", first, "--out", then, *options)
    assert said.code == 0, said.err
    (said,) = shared(lab, then)
    assert str(seen) in said and "flatters itself" in said


def test_data_is_found_again_after_a_move_and_not_taken_for_another(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("data", "tok", "scorer"):
        shutil.copytree(lab.root / name, here / name)
    for part, folder in (("tokenizer", "tok"), ("scorer", "scorer")):
        assert worldline("show", here / folder).code == 0, part
    options = ("--tokenizer", here / "tok", "--model.network.window", 4, *NETWORK, *SHORT)
    said = worldline("train", "world-model", "--data", here / "data", "--out", here / "wm", *options)
    assert said.code == 0, said.err
    there = tmp_path / "there"
    os.rename(here, there)
    truth = (WORLD, [episode_seed(0, 0)])
    (said,) = shared(lab, there / "wm", truth=truth, scorer=there / "scorer")
    assert "1 of 1 true starts" in said and str(there / "data") in said

    shutil.rmtree(there / "data")
    record(there / "data", 10, "--seed", 9)  # another dataset in its place
    assert any(f"{here / 'data'}, the data of the world-model" in s for s in shared(lab, there / "wm", truth=truth))


def test_kept_rollouts_are_of_their_instruction() -> None:
    """Two tasks may begin with the same picture; what is dreamt for one sentence is not the other's."""
    starts = Observation(
        images={"top": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)},
        pose=torch.zeros(2, 3),
        instruction=("reach", "reach"),
    )
    other = replace(starts, instruction=("reach", "place"))
    assert fingerprint_of(starts) == fingerprint_of(replace(starts)) != fingerprint_of(other)
