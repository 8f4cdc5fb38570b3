"""Two robots through the command line: one training, and a dream of either."""

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Lab, Run
from tests.robots import write_cables
from worldline.commands.rollouts import weights_of


@pytest.fixture(scope="module")
def multi(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.commands.conftest import do

    root = tmp_path_factory.mktemp("multi")
    write_cables(root / "cables", episodes=8, frames=8)
    do("train", "tokenizer", "--data", root / "cables", "--out", root / "eyes", "--kind", "patches", "--patch", 4)
    do("train", "world-models", "--data", lab.data, root / "cables", "--tokenizer", lab.tok, root / "eyes", "--out",
       root / "multi", "--max-steps", 3, "--frames", 4, "--balance", True, "--loop.batch-size", 2, "--loop.warmup", 1,
       "--model.network.width", 16, "--model.network.depth", 1, "--model.network.heads", 2,
       "--model.network.window", 3, "--model.network.guess-width", 8)  # fmt: skip
    return root


def test_a_member_dreams(multi: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for member, data in (("cables-v1.0", multi / "cables"), ("DotWorld-v0", lab.data)):
        out = tmp_path / f"{member}.mp4"
        folder = multi / "multi/members" / member
        said = worldline(
            "imagine", "--world-model", folder, "--data", data, "--episode", 1, "--frames", 4, "--out", out
        )
        assert said.code == 0 and out.is_file(), said.err


def test_a_member_is_measured_on_its_own_data_and_no_other(
    multi: Path, lab: Lab, worldline: Run, tmp_path: Path
) -> None:
    folder = multi / "multi/members/cables-v1.0"
    common = ["eval", "--world-model", folder, "--frames", 4, "--videos", 0, "--split", "all", "--max-episodes", 2]
    said = worldline(*common, "--data", multi / "cables", "--out", tmp_path / "report")
    assert said.code == 0, said.err
    said = worldline(*common, "--data", lab.data, "--out", tmp_path / "other")
    assert said.code == 2 and "front.b" in said.err


def test_all_of_them_are_not_one(multi: Path, worldline: Run, tmp_path: Path) -> None:
    said = worldline("imagine", "--world-model", multi / "multi", "--data", multi / "cables", "--episode", 0, "--out",
                     tmp_path / "out.mp4")  # fmt: skip
    assert said.code == 2 and "Name one of its members" in said.err and "members/cables-v1.0" in said.err


def test_show_tells_of_all_and_of_one(multi: Path, worldline: Run) -> None:
    all_, one = (
        json.loads(worldline("show", folder).out) for folder in (multi / "multi", multi / "multi/members/cables-v1.0")
    )
    assert all_["part"] == "world-models" and one["part"] == "world-model"
    assert all_["weights"] == one["weights"] > 0
    assert one["spec"] == all_["spec"]["cables/v1.0"]


def test_shared_weights_are_part_of_a_members_identity(multi: Path) -> None:
    folder = multi / "multi/members/cables-v1.0"
    before, weights = weights_of(folder), multi / "multi/model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[:-4] + b"\1\2\3\4")
    assert weights_of(folder) != before
    weights.write_bytes(held)
    assert weights_of(folder) == before


def test_help_names_the_stage(worldline: Run) -> None:
    assert "world-models" in worldline("train", "--help").out
    assert "--balance" in worldline("train", "world-models", "--help").out
